"""The benchmark's tasks: what every method is asked to do. All of it was fixed before any tuning."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributions import Normal

from effens.ensembles.base import Ensemble
from effens.likelihoods import Categorical, Gaussian, Likelihood, StudentT
from effens.training import MakeOptimizer, fit
from effens_book import data, minilm
from effens_book.data import markets, orders
from effens_book.nets import cnn, convnet, mlp

Sets = dict[str, tuple[Tensor, Tensor | None]]
Settings = dict[str, float]

PRIMARY = "nll"  # of the mean of the members, in nats, on the task's test set; lower is better
MARGIN = 0.005  # nats: two methods are tied if the whole interval of their difference is inside
TRIALS = 12  # tuning trials of every method, on validation data, the single network's included
TUNING_SEEDS = (100, 101)  # on which every trial is run; none of these seeds is used again
FINALISTS = 3  # trials, the best on these, that are run on more seeds; of them the lowest mean over all seeds wins
MORE_SEEDS = (102, 103, 104, 105, 106)
SPACE = {"lr": (1e-3, 3e-2), "weight_decay": (1e-3, 3.0)}  # searched on a log scale, the same points for every method
Space = Mapping[str, tuple[float, float]]


CONTROLS = (
    *("deep, one start", "deep, one order", "deep, bagged", "deep, short", "single, SGD"),
    *("single, searched", "deep, searched", "MIMO, repeated"),
)
LARGE_CONTROLS = (
    *("deep, as single", "BatchEnsemble, as single", "single, SGD", "deep, SGD", "SWA"),
    *("single, searched", "deep, searched", "deep, one setting", "deep, one start", "deep, bagged"),
)
TREES = ("gradient boosting",)  # the rival of every network on a table
PRETRAINED = (
    *("frozen features", "single", "single, long", "deep ensemble", "LoRA ensemble", "BatchEnsemble"),
    *("BatchEnsemble, spread", "LoRA snapshots", "LoRA snapshots, long", "LoRA SWAG", "LoRA SWAG, long", "Laplace"),
)
LUCK = tuple(f"{name}, second trial" for name in ("deep", "BatchEnsemble", "MIMO"))  # what a near tie in tuning decided


@dataclass(frozen=True)
class Task:
    """What every method is asked to do.

    Attributes:
        name: of the task.
        members: members of every ensemble.
        pool: networks that the deep ensemble trains for each seed; groups of ``members`` of them are scored.
        seeds: how many times everything is repeated.
        epochs: passes over the training data, for every network and member.
        batch_size: examples in a step.
        likelihood: what outputs mean.
        width: of the network.
        make: (width, dropout=0.0) to network.
        load: seed to named sets of (x, y); y is None where there is no right answer.
        fresh: whether each seed has data of its own.
        truth: (seed, set) to the exact predictive distribution, where it is known.
        refits: sets of every refit, where the test set comes in parts, and each is predicted by what was trained on all
            that was known before it. Settings are chosen once, before the first part.
        controls: which of the controls are run.
        everywhere: which of these are kept for every set; of the others only their predictions of the test set are.
        files: the arrays in ``data/`` that it reads.
        space: where the settings of methods trained by AdamW are searched, if not in `SPACE` and the method's own.
        one_hot: how many columns each of the categories has, which are the last columns of a table.
        tabm: members of TabM, which are nearly free in a table.
        large: whether scores are kept of all, but predictions of the first seed only, of its test and validation data
            and of sets without right answers; of controls that are not kept everywhere, none.
        block: examples in a row that count as one, where they are days: a month.
        tuned_on: the task whose tuned settings it takes, if not its own.
        device: on which it is trained.
        rows: the methods that are run, where it has some of its own; empty: those of every task.
        trials: how many settings are tried; None: `TRIALS`.
        finalists: how many of them are tried on more seeds.
        more_seeds: these seeds.
        start: makes a network with pretrained weights, where training does not start anew.
        trunk: makes the frozen part of the network, which all members share.
        prepare: gives what the trunk makes of the sets, which is what is trained on.
    """

    name: str
    members: int
    pool: int
    seeds: int
    epochs: int
    batch_size: int
    likelihood: Likelihood
    width: int
    make: Callable[..., nn.Module]
    load: Callable[[int], Sets]
    fresh: bool = False
    truth: Callable[[int, str], Normal] | None = None
    refits: Callable[[], Sequence[Sets]] | None = None
    controls: Sequence[str] = CONTROLS
    everywhere: Sequence[str] = ()
    files: Sequence[str] = ()
    space: Space = field(default_factory=dict, hash=False)
    one_hot: Sequence[int] = ()
    tabm: int = 16
    large: bool = False
    block: int = 1
    tuned_on: str = ""
    device: str = "cpu"
    rows: Sequence[str] = ()
    trials: int | None = None
    finalists: int = FINALISTS
    more_seeds: Sequence[int] = MORE_SEEDS
    start: Callable[[], nn.Module] | None = None
    trunk: Callable[[], nn.Module] | None = None
    prepare: Callable[[Sets], Sets] | None = None

    @property
    def digest(self) -> str:
        """A digest of what defines the task: its numbers, its likelihood, the sizes of its sets, its files."""
        return digest_of(self)

    def make_net(self) -> nn.Module:
        """Return a fresh network of the task's width, or the pretrained one."""
        return self.make(self.width) if self.start is None else self.start()

    def sets(self, seed: int) -> Sets:
        """Return the sets as a network gets them."""
        found = self.load(seed)
        return found if self.prepare is None else self.prepare(found)

    def fit(
        self,
        ensemble: Ensemble,
        train: tuple[Tensor, Tensor],
        settings: Settings,
        seed: int,
        optimizer: MakeOptimizer = torch.optim.AdamW,
    ) -> Ensemble:
        """Train an ensemble as the task says and return it."""
        fit(
            ensemble,
            train,
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=settings["lr"],
            weight_decay=settings["weight_decay"],
            optimizer=optimizer,
            likelihood=self.likelihood,
            device=self.device,
            seed=seed,
            progress=False,
        )
        return ensemble


@cache
def digest_of(task: Task) -> str:
    """Return the digest of a task, 16 hexadecimal digits."""
    numbers = [task.name, task.members, task.pool, task.epochs, task.batch_size, task.width]
    kind = [type(task.likelihood).__name__, sum(p.numel() for p in task.make(task.width).parameters())]
    sizes = {name: list(x.shape) for name, (x, _) in task.load(0).items()}
    files = [hashlib.sha256((Path(data.__file__).parent / name).read_bytes()).hexdigest() for name in task.files]
    return hashlib.sha256(json.dumps([numbers, kind, sizes, files]).encode()).hexdigest()[:16]


def load_gap(seed: int) -> Sets:
    """Make regression with a gap: each seed is another function, with other data."""
    task = data.gap_regression(seed)
    return {
        "train": (task.x_train, task.y_train),
        "val": (task.x_val, task.y_val),
        "test": (task.x_test, task.y_test),
        "gap": (task.x_gap, task.y_gap),
    }


def gap_truth(seed: int, split: str) -> Normal:
    """Return what could be known at best."""
    return data.gap_regression(seed).predictive(load_gap(seed)[split][0])


def load_digits(seed: int) -> Sets:
    """Load digits, the same for every seed; 500 of the test images are also rotated, and made noisy."""
    task = data.digits()
    x, y = task.x_test[:500], task.y_test[:500]
    return {
        "train": (task.x_train, task.y_train),
        "val": (task.x_val, task.y_val),
        "test": (task.x_test, task.y_test),
        "rotated": (data.rotate(x, 30), y),
        "noisy": (data.add_noise(x, 0.4), y),
        "letters": (data.letters()[:500], None),
    }


SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {  # mild enough that people still recognize what they see
    **{f"rotated {degrees}": partial(data.rotate, degrees=degrees) for degrees in (5, 15, 25)},
    **{f"noisy {sigma}": partial(data.add_noise, sigma=sigma) for sigma in (0.02, 0.07, 0.15)},
    **{f"blurred {sigma}": partial(data.blur, sigma=sigma) for sigma in (0.3, 0.5, 0.8)},
    **{f"moved {pixels}": partial(data.move, pixels=pixels) for pixels in (0.25, 0.75, 1.5)},
}


GRADES = {grade: list(SHIFTS)[i::3] for i, grade in enumerate(("mild", "medium", "strong"))}  # four shifts each


@cache
def fashion_sets() -> Sets:
    """Return clothes and shoes, the first 1,000 test images in twelve shifts, and digits and letters."""
    task = data.fashion()
    x, y = task.x_test[:1000], task.y_test[:1000]
    return {
        "train": (task.x_train, task.y_train),
        "val": (task.x_val, task.y_val),
        "test": (task.x_test, task.y_test),
        **{name: (shift(x), y) for name, shift in SHIFTS.items()},
        "digits": (data.digits().x_test[:1000], None),
        "letters": (data.letters(), None),
    }


def load_fashion(seed: int) -> Sets:
    """Load clothes and shoes, the same for every seed."""
    return dict(fashion_sets())


def make_convnet(width: int, dropout: float = 0.0) -> nn.Module:
    """Make the network of the clothes."""
    return convnet(channels=width, dropout=dropout)


@cache
def flight_sets(target: str) -> Sets:
    """Return flights: later months are the test set, and held-out days of the training months a set beside it."""
    task = data.airtime(target)
    return {name: (getattr(task, f"x_{name}"), getattr(task, f"y_{name}")) for name in ("train", "val", "test", "same")}


def flight_task(name: str, **options: Any) -> Task:
    """Make a task of flights."""

    def make(width: int, dropout: float = 0.0) -> nn.Module:
        return mlp(flight_sets(name)["train"][0].shape[1], 3, width=width, dropout=dropout)

    def load(seed: int) -> Sets:
        return dict(flight_sets(name))

    space = {"lr": (1e-3, 2e-2), "weight_decay": (1e-3, 1.0), "fast_lr": (0.1, 10.0)}
    sizes: tuple[int, int] = (10, 256)
    return Task(
        name,
        4,
        12,
        8,
        *sizes,
        StudentT(),
        64,
        make,
        load,
        files=("airtime.npz",),
        space=space,
        large=True,
        one_hot=(3, 15, 101, 7),
        **options,
    )


def make_mlp(width: int, dropout: float = 0.0) -> nn.Module:
    """Make the network of the generated task: a mean and a standard deviation from one input."""
    return mlp(1, 2, width=width, dropout=dropout)


def make_cnn(width: int, dropout: float = 0.0) -> nn.Module:
    """Make the network of the digits."""
    return cnn(channels=width, dropout=dropout)


def load_diamonds(seed: int) -> Sets:
    """Load diamonds, the same for every seed; the heavy ones lie outside what was trained on."""
    task = data.diamonds()
    return {
        name: (getattr(task, f"x_{name}"), getattr(task, f"y_{name}")) for name in ("train", "val", "test", "heavy")
    }


def make_table_net(width: int, dropout: float = 0.0) -> nn.Module:
    """Make the network of the diamonds: a mean and a standard deviation from nine columns."""
    return mlp(9, 2, width=width, dropout=dropout)


def load_orders(seed: int) -> Sets:
    """Make the simulated order flow, the same for every seed."""
    return {name: (flow.x, flow.y) for name, flow in orders.order_flow().items()}


def make_order_net(width: int, dropout: float = 0.0) -> nn.Module:
    """Make the network of the order flow: a mean and a standard deviation of the move."""
    return mlp(orders.FEATURES, 2, width=width, depth=3, dropout=dropout)


@cache
def definition_sets() -> Sets:
    """Return definitions as token ids, their kinds, and texts that define nothing of these kinds."""
    task = data.definitions()
    return {name: (ids, task.y.get(name)) for name, ids in task.ids.items()}


def load_definitions(seed: int) -> Sets:
    """Load definitions, the same for every seed."""
    return dict(definition_sets())


@cache
def pretrained_weights() -> dict[str, Tensor]:
    """Return MiniLM's trained weights."""
    return minilm.weights()


class DefinitionTrunk(nn.Module):
    """The layers of MiniLM that stay frozen: token ids (n, length) to states and the mask of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.network = minilm.minilm(pretrained_weights(), minilm.LAYERS - TOP_LAYERS)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states (n, length, width) and the mask (n, length)."""
        found: tuple[Tensor, Tensor] = self.network(ids, ids.sign())
        return found


@cache
def definition_states() -> dict[str, Any]:
    """Return what the trunk makes of all texts."""
    trunk, found = DefinitionTrunk(), {}
    for name, (ids, y) in definition_sets().items():
        with torch.no_grad():
            states, masks = zip(*map(trunk, ids.split(64)), strict=True)
        found[name] = ((torch.cat(states), torch.cat(masks)), y)
    return found


def prepare_definitions(sets: Sets) -> Sets:
    """Return the states of the same sets."""
    return {name: definition_states()[name] for name in sets}


def start_definitions() -> nn.Module:
    """Return MiniLM's last layers as they were trained, and a head drawn anew."""
    return minilm.top(pretrained_weights(), TOP_LAYERS)


def make_top(width: int, dropout: float = 0.0) -> nn.Module:
    """Make the last layers of MiniLM, without their trained weights."""
    return minilm.Top(TOP_LAYERS)


TOP_LAYERS = 1  # of MiniLM that is trained
VALIDATION_DAYS = 500  # before the first year that is judged
MARKET_FEATURES = len(markets.FEATURES)


@dataclass(frozen=True)
class Market:
    """A series of daily prices, and the years that are judged."""

    series: str
    first: int
    last: int

    @property
    def years(self) -> list[str]:
        """The first days of the years that are judged."""
        return [f"{year}-01-01" for year in range(self.first, self.last + 1)]


MARKETS = {
    "returns": Market("S&P 500", 1998, 2022),
    "nasdaq": Market("NASDAQ", 2004, 2018),
    "oil": Market("WTI", 1994, 2018),
}


@cache
def market(name: str) -> tuple[Sets, list[Sets], NDArray[np.datetime64]]:
    """Return what settings are chosen on, the sets of every year's refit, and the days that are judged.

    Each part is seen through the mean and deviation of the days that it trains on. "test" of the first holds all years.
    """
    years = MARKETS[name].years
    task = markets.task(data.prices(MARKETS[name].series))
    splits = markets.walk_forward(task, years)
    (first, *_) = markets.walk_forward(task, years, validation=VALIDATION_DAYS)

    def sets(train: Tensor, **parts: Tensor) -> Sets:
        x = markets.standardize(task.x, train)
        return {name: (x[rows], task.y[rows]) for name, rows in {"train": train, **parts}.items()}

    refits = [sets(split.train, test=split.test) for split in splits]
    everything = torch.cat([split.test for split in splits])
    return sets(first.train, val=first.val, test=everything), refits, task.dates[everything.numpy()]


def days(task: str) -> NDArray[np.datetime64]:
    """Return the days of a market task's test set: on day i the forecast is made, at the close."""
    return market(task)[2]


LUCK_OF_RETURNS = ("deep, as single", "single, second trial")  # what the first place in tuning decided


def market_task(name: str, **options: Any) -> Task:
    """Make a task of the next day's return: walk forward with a refit every year."""

    def make(width: int, dropout: float = 0.0) -> nn.Module:
        return mlp(MARKET_FEATURES, 3, width=width, dropout=dropout)

    def load(seed: int) -> Sets:
        return market(name)[0]

    def refits() -> Sequence[Sets]:
        return market(name)[1]

    sizes: tuple[int, int] = (20, 128)
    return Task(
        name, 4, 4, 5, *sizes, StudentT(), 32, make, load, refits=refits, controls=LUCK_OF_RETURNS, block=22, **options
    )


TASKS = {
    task.name: task
    for task in (
        Task("gap", 5, 20, 10, 800, 160, Gaussian(), 64, make_mlp, load_gap, True, gap_truth, controls=()),
        Task(
            "digits",
            4,
            4,
            8,
            38,
            64,
            Categorical(),
            16,
            make_cnn,
            load_digits,
            controls=(*CONTROLS, *LUCK),
            everywhere=LUCK,
            files=("digits.npz", "letters.npz"),
        ),
        Task(
            "diamonds",
            4,
            4,
            8,
            40,
            64,
            Gaussian(),
            64,
            make_table_net,
            load_diamonds,
            controls=("single, searched", "deep, searched", *TREES),
            everywhere=TREES,
            files=("diamonds.npz",),
        ),
        market_task("returns", files=("prices.npz",)),
        market_task("nasdaq", everywhere=LUCK_OF_RETURNS, tuned_on="returns", large=True),
        market_task("oil", everywhere=LUCK_OF_RETURNS, tuned_on="returns", large=True),
        Task("orders", 4, 4, 5, 12, 128, Gaussian(), 64, make_order_net, load_orders, controls=()),
        Task(
            "fashion",
            4,
            4,
            8,
            20,
            128,
            Categorical(),
            16,
            make_convnet,
            load_fashion,
            controls=(*LARGE_CONTROLS, "BatchEnsemble, shared norms"),
            everywhere=("deep, searched",),
            files=("fashion.npz", "digits.npz", "letters.npz"),
            space={"lr": (3e-3, 3e-2), "weight_decay": (1e-3, 0.3)},
            tabm=4,
            large=True,
        ),
        flight_task("airtime", controls=(*LARGE_CONTROLS, *TREES), everywhere=TREES),
        Task(
            "definitions",
            4,
            4,
            5,
            3,
            32,
            Categorical(),
            minilm.WIDTH,
            make_top,
            load_definitions,
            controls=(),
            files=("definitions.npz",),
            space={"lr": (2e-4, 5e-3), "weight_decay": (1e-3, 0.3)},
            large=True,
            rows=PRETRAINED,
            trials=6,
            finalists=2,
            more_seeds=(102, 103, 104),
            start=start_definitions,
            trunk=DefinitionTrunk,
            prepare=prepare_definitions,
        ),
    )
}
