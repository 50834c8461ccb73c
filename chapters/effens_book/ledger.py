"""The ledger: every method on the same tasks, with the same tuning and seeds.

It is the book's one source of multi-seed numbers. ``python -m effens_book.ledger`` runs what is missing, resumes after
a kill, and prints the tables. Each run is kept as one file of a **prediction bank**: what every member said about every
test set, in half precision. Scores, intervals, tables and pictures are computed from the bank in seconds.

To add a method, write one function that trains it, and register it with `method`.
"""

import argparse
import copy
import datetime
import io
import itertools
import json
import math
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize, stats
from torch import Tensor, nn
from torch.distributions import Normal
from torch.distributions import StudentT as StudentTDistribution
from torch.quasirandom import SobolEngine
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from effens import scores
from effens.baselines import LastLayerLaplace, MCDropout
from effens.costs import measure
from effens.ensembles.base import Ensemble
from effens.ensembles.batch import BatchEnsemble
from effens.ensembles.deep import DeepEnsemble
from effens.ensembles.hyper import HyperEnsemble, greedy_select
from effens.ensembles.mimo import MIMO
from effens.ensembles.snapshot import SnapshotEnsemble
from effens.ensembles.swag import SWAG
from effens.likelihoods import Categorical, Gaussian, Likelihood, StudentT
from effens.storage import write_whole
from effens.training import MakeOptimizer, fit, predict
from effens_book import data, risk
from effens_book.data import markets, orders
from effens_book.nets import cnn, mlp
from effens_book.tables import Table

Sets = dict[str, tuple[Tensor, Tensor | None]]
Settings = dict[str, float]
BANK = Path(__file__).with_name("bank")  # looked up at each call, so that runs can be kept elsewhere
COMMAND = "run python -m effens_book.ledger"

# ---- Frozen before any tuning: tasks, splits, the primary metric, the search and the margin. ----

PRIMARY = "nll"  # of the mean of the members, in nats, on the task's test set; lower is better
MARGIN = 0.005  # nats: two methods are tied if the whole interval of their difference is inside
TRIALS = 12  # tuning trials of every method, on validation data, the single network's included
TUNING_SEEDS = (100, 101)  # each trial's score is the mean over these, none of which is used again
SPACE = {"lr": (1e-3, 3e-2), "weight_decay": (1e-3, 3.0)}  # searched on a log scale, the same points for every method


CONTROLS = (
    *("deep, one start", "deep, one order", "deep, bagged", "deep, short", "single, SGD"),
    *("single, searched", "deep, searched", "MIMO, repeated"),
)
LUCK = ("deep, as single", "BatchEnsemble, as single", "MIMO, second trial")  # what a near tie in tuning decided


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
        everywhere: which of these are kept for every set; of the others only what they say of the test set is.
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

    def make_net(self) -> nn.Module:
        """Return a fresh network of the task's width."""
        return self.make(self.width)

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
            device="cpu",
            seed=seed,
            progress=False,
        )
        return ensemble


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


FIRST_YEAR, LAST_YEAR = 1998, 2022
VALIDATION_DAYS = 500  # before the first year that is judged
MARKET_FEATURES = len(markets.FEATURES)


@cache
def market(target: str) -> tuple[Sets, list[Sets], NDArray[np.datetime64]]:
    """Return what settings are chosen on, the sets of every year's refit, and the days that are judged.

    Each part is seen through the mean and deviation of the days that it trains on. "test" of the first holds all years.
    """
    task = markets.task(data.prices(), target)
    years = [f"{year}-01-01" for year in range(FIRST_YEAR, LAST_YEAR + 1)]
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
    return market(TARGETS[task])[2]


TARGETS = {"returns": "return", "volatility": "volatility"}


AS_SINGLE = ("deep, as single",)


def market_task(name: str, likelihood: Likelihood) -> Task:
    """Make a task of daily prices: walk forward with a refit every year, 1998 to 2022."""
    target = TARGETS[name]

    def make(width: int, dropout: float = 0.0) -> nn.Module:
        return mlp(MARKET_FEATURES, outputs, width=width, dropout=dropout)

    def load(seed: int) -> Sets:
        return market(target)[0]

    def refits() -> Sequence[Sets]:
        return market(target)[1]

    outputs = int(likelihood.outputs or 0)
    return Task(name, 4, 4, 5, 20, 128, likelihood, 32, make, load, refits=refits, controls=AS_SINGLE)


TASKS = {
    task.name: task
    for task in (
        Task("gap", 5, 20, 10, 800, 160, Gaussian(), 64, make_mlp, load_gap, True, gap_truth),
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
        ),
        Task("diamonds", 4, 4, 8, 40, 64, Gaussian(), 64, make_table_net, load_diamonds),
        market_task("returns", StudentT()),
        market_task("volatility", Gaussian()),
        Task("orders", 4, 4, 5, 12, 128, Gaussian(), 64, make_order_net, load_orders, controls=AS_SINGLE),
    )
}

# ---- Methods: one function each. ----

Train = Callable[[Task, tuple[Tensor, Tensor], Settings, int], Ensemble]


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        train: the function.
        space: what it tunes beside rate and decay, as name: (low, high) on a log scale; or other limits for these two.
        like: the method whose tuned settings it takes, if it is a variant that changes one thing only.
        place: of the trials that chose these settings, 0 for the best.
        control: whether it is there to explain a method, and is no row of the tables: variants are.
        tuned: whether trials choose its settings; the others train their own candidates.
    """

    train: Train
    space: Mapping[str, tuple[float, float]]
    like: str | None = None
    place: int = 0
    control: bool = False
    tuned: bool = True


METHODS: dict[str, Method] = {}


def method(
    name: str,
    *,
    like: str | None = None,
    place: int = 0,
    control: bool = False,
    tuned: bool = True,
    **space: tuple[float, float],
) -> Callable[[Train], Train]:
    """Register a function ``(task, (x, y), settings, seed) -> trained ensemble`` as a method of the ledger."""

    def register(train: Train) -> Train:
        METHODS[name] = Method(train, space, like, place, control or like is not None, tuned)
        return train

    return register


@method("single")
def single(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """One network."""
    return task.fit(DeepEnsemble(task.make_net, 1), train, settings, seed)


@method("wide")
def wide(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """One network, so wide that it costs the FLOPs of the ensemble."""
    width = equal_flops_width(task.name)
    return task.fit(DeepEnsemble(lambda: task.make(width), 1), train, settings, seed)


@method("deep ensemble")
def deep_ensemble(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """Independent networks; while tuning as many as the ensemble has, then the whole pool."""
    networks = task.members if seed in TUNING_SEEDS else task.pool
    return task.fit(DeepEnsemble(task.make_net, networks), train, settings, seed)


@method("BatchEnsemble", fast_lr=(0.1, 3.0))
def batch_ensemble(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """Shared weights with rank-1 factors, tiled batches."""
    ensemble = BatchEnsemble(task.make_net, task.members, fast_lr=settings["fast_lr"])
    return task.fit(ensemble, train, settings, seed)


@method("snapshot")
def snapshot(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """One network in as many cycles as the ensemble has members."""
    return task.fit(SnapshotEnsemble(task.make_net, task.members), train, settings, seed)


# Rates of SGD are higher than those of AdamW, and its decay is multiplied by the rate and not by itself.
MOMENTUM_SGD = partial(torch.optim.SGD, momentum=0.9)
SGD_SPACE: dict[str, Any] = {"lr": (3e-3, 0.3), "weight_decay": (1e-5, 1e-2)}


@method("SWAG", **SGD_SPACE, tail_lr=(0.05, 1.0))
def swag(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """One network trained by SGD, and samples of the Gaussian around its path."""
    ensemble = SWAG(task.make_net, task.members, tail_lr=settings["tail_lr"], seed=seed)
    return task.fit(ensemble, train, settings, seed, MOMENTUM_SGD)


@method("MIMO", own=(0.1, 1.0), slots=(2.0, 4.999))
def mimo(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """One network with two to four inputs and outputs, the number tuned, too: it has no capacity for more."""
    ensemble = MIMO(task.make_net, int(settings["slots"]), share=1 - settings["own"])
    return task.fit(ensemble, train, settings, seed)


SEARCHED: dict[str, Any] = {"dropout": (0.02, 0.5), "narrowing": (0.5, 1.0)}


@method("hyper", tuned=False, **SEARCHED)
def hyper(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """As many candidates as a method has trials, and a greedy choice of the ensemble's members among them.

    Each seed searches anew, for here the search is the training. A candidate that diverges is none. Where there are
    refits, only those that were chosen before the first are trained again.
    """
    if task.refits is not None:
        points, rows = searched(task.name, seed)
        return HyperEnsemble([network for network, _ in trained(task, train, points, seed)], rows)
    ensemble, _ = search(task, train, seed)
    return ensemble


def search(task: Task, train: tuple[Tensor, Tensor], seed: int) -> tuple[HyperEnsemble, list[Settings]]:
    """Train candidates and choose among them; returns the ensemble and the settings of all that did not diverge."""
    x, y = task.load(seed)["val"]
    assert y is not None
    found = trained(task, train, trial_settings("hyper", seed), seed)
    if not found:
        rule = f"at least one candidate of seed {seed} must not diverge"
        raise FloatingPointError(f"{rule}, got {TRIALS} of {TRIALS} that did")
    networks = [network for network, _ in found]
    said = predict(DeepEnsemble.of(networks), x, likelihood=task.likelihood)
    return HyperEnsemble(networks, greedy_select(said, y, task.members)), [settings for _, settings in found]


@cache
def searched(name: str, seed: int) -> tuple[list[Settings], list[int]]:
    """Return the settings that a search on the task's own sets chooses, each once, and the members' rows of them."""
    task = TASKS[name]
    x, y = task.load(seed)["train"]
    assert y is not None
    with torch.random.fork_rng(devices=[]):  # so that what is trained next does not depend on whether this was cached
        torch.manual_seed(seed)
        ensemble, settings = search(task, (x, y), seed)
    return [settings[i] for i in dict.fromkeys(ensemble.index)], ensemble.rows


def trained(
    task: Task, train: tuple[Tensor, Tensor], points: Sequence[Settings], seed: int
) -> list[tuple[nn.Module, Settings]]:
    """Train a network for each of these settings, and return those that did not diverge."""
    x, _ = task.load(seed).get("val", train)
    found = []
    for i, chosen in enumerate(points):
        network = candidate(task, chosen)
        try:
            one = task.fit(DeepEnsemble.of([network]), train, chosen, TRIALS * seed + i)
            packed(predict(one, x, likelihood=task.likelihood))
        except FloatingPointError:
            continue
        found.append((network, chosen))
    return found


def candidate(task: Task, settings: Settings) -> nn.Module:
    """Make a network with the dropout and the width of these settings."""
    return task.make(round(settings["narrowing"] * task.width), dropout=settings["dropout"])


@method("narrow")
def narrow(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """Independent networks, so narrow that together they have the weights of one."""
    width = equal_weights_width(task.name)
    return task.fit(DeepEnsemble(lambda: task.make(width), task.members), train, settings, seed)


@method("MC dropout", dropout=(0.02, 0.5))
def mc_dropout(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """One network, asked with its dropout on, as many times as the ensemble has members."""
    make = partial(task.make, task.width, settings["dropout"])
    return task.fit(MCDropout(make, task.members), train, settings, seed)


@method("Laplace", precision=(0.1, 1000.0))
def laplace(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """One network, and samples of a Gaussian around its last layer, as many as the ensemble has members."""
    likelihood, precision = task.likelihood, settings["precision"]
    ensemble = LastLayerLaplace(task.make_net, task.members, precision, likelihood=likelihood, seed=seed)
    return task.fit(ensemble, train, settings, seed)


@method("deep, as single", like="single")
def as_single(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """A deep ensemble with the single network's settings: what is left when the luck of tuning is taken out."""
    return task.fit(DeepEnsemble(task.make_net, task.members), train, settings, seed)


@method("BatchEnsemble, as single", like="single")
def batch_as_single(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """BatchEnsemble with the single network's rate and decay; the vectors' rate stays as tuned for BatchEnsemble."""
    return batch_ensemble(task, train, {**settings, "fast_lr": tune(task, "BatchEnsemble")["fast_lr"]}, seed)


@method("deep, one start", like="deep ensemble")
def one_start(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """Members that start from the same weights: only their shuffles differ."""
    first = task.make_net()
    return task.fit(DeepEnsemble(lambda: copy.deepcopy(first), task.members), train, settings, seed)


@method("deep, one order", like="deep ensemble")
def one_order(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """Members that see the same batches: only their starts differ."""

    class OneOrder(DeepEnsemble):
        def order(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
            return torch.randperm(n, generator=generator).expand(self.members, n)

    return task.fit(OneOrder(task.make_net, task.members), train, settings, seed)


@method("deep, bagged", like="deep ensemble")
def bagged(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """Members that each see their own resample of the data, drawn with replacement once."""

    class Bagged(DeepEnsemble):
        def order(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
            resample = torch.randint(n, (self.members, n), generator=torch.Generator().manual_seed(seed))
            return resample.gather(1, super().order(n, generator=generator))

    return task.fit(Bagged(task.make_net, task.members), train, settings, seed)


@method("deep, short", control=True)
def short(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """Independent networks that share the budget of one: what a snapshot ensemble's cycles would cost from scratch."""
    brief = replace(task, epochs=round(task.epochs / task.members))
    return brief.fit(DeepEnsemble(task.make_net, task.members), train, settings, seed)


@method("single, SGD", control=True, **SGD_SPACE)
def single_sgd(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """One network trained by SGD, with no rate left at the end: SWAG but for SWAG."""
    return task.fit(DeepEnsemble(task.make_net, 1), train, settings, seed, MOMENTUM_SGD)


@method("single, searched", control=True, **SEARCHED)
def single_searched(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """One network with dropout and a width that are tuned, as a hyperparameter ensemble's candidates have them."""
    return task.fit(DeepEnsemble(partial(candidate, task, settings), 1), train, settings, seed)


@method("deep, searched", control=True, **SEARCHED)
def deep_searched(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """A deep ensemble with the same two, one setting for all members."""
    return task.fit(DeepEnsemble(partial(candidate, task, settings), task.members), train, settings, seed)


@method("MIMO, repeated", like="MIMO")
def repeated(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """MIMO with each example four times in a step, as published: four times the cost."""
    ensemble = MIMO(task.make_net, int(settings["slots"]), share=1 - settings["own"], repeats=4)
    return task.fit(ensemble, train, settings, seed)


@method("MIMO, second trial", like="MIMO", place=1)
def second_trial(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """MIMO with the settings that came second in tuning, by next to nothing on digits: what the first place decided."""
    return mimo(task, train, settings, seed)


@cache
def equal_flops_width(name: str) -> int:
    """Return the smallest width at which one network costs the FLOPs of the task's ensemble, at the least."""
    task = TASKS[name]
    x = task.load(0)["val"][0][:1]

    def flops(width: int) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            task.make(width)(x)
        total: int = counter.get_total_flops()
        return total

    with torch.random.fork_rng(devices=[]):  # else the first network trained would start elsewhere than later ones
        target = task.members * flops(task.width)
        return next(width for width in range(task.width, 100 * task.width) if flops(width) >= target)


@cache
def equal_weights_width(name: str) -> int:
    """Return the largest width at which the task's ensemble has no more weights than one network of the task's."""
    task = TASKS[name]

    def weights(width: int) -> int:
        return sum(p.numel() for p in task.make(width).parameters())

    with torch.random.fork_rng(devices=[]):
        most = weights(task.width) // task.members
        return max((width for width in range(1, task.width + 1) if weights(width) <= most), default=1)


# ---- Running: one file a run, so that a killed ledger goes on where it was. ----


def trial_settings(name: str, seed: int = 0, trials: int | None = None) -> list[Settings]:
    """Return the settings of a method's trials: Sobol points, the same for rate and decay of every method."""
    space = {**SPACE, **METHODS[name].space}
    trials = TRIALS if trials is None else trials
    points = SobolEngine(len(space), scramble=True, seed=seed).draw(trials).double()
    shared = SobolEngine(len(SPACE), scramble=True, seed=seed).draw(trials).double()
    points[:, : len(SPACE)] = shared
    limits = [(math.log(low), math.log(high)) for low, high in space.values()]
    return [
        {key: math.exp(low + u * (high - low)) for key, (low, high), u in zip(space, limits, point, strict=True)}
        for point in points.tolist()
    ]


def train_one(task: Task, name: str, settings: Settings, seed: int) -> tuple[Ensemble, Sets]:
    """Train one method with one seed, which decides the data draw, the start, the shuffles and dropout."""
    sets = task.load(seed)
    x, y = sets["train"]
    assert y is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ensemble = METHODS[name].train(task, (x, y), settings, seed)
    return ensemble, sets


def tune(task: Task, name: str) -> Settings:
    """Return the settings with the lowest validation score; trials that were run before are read, not run.

    A variant takes the settings of another method, those with the second lowest score if it says so.

    Raises:
        FloatingPointError: all trials diverged.
    """
    place, name = METHODS[name].place, METHODS[name].like or name
    if not METHODS[name].tuned:
        return {}
    settings = trial_settings(name)
    chosen = ranked_trials(task, name)[place]
    if trial(task, name, chosen, settings[chosen]) == math.inf:
        failed = sum(trial(task, name, i, settings[i]) == math.inf for i in range(TRIALS))
        rule = f"at least {('one trial', 'two trials')[place]} of {name} on {task.name} must not diverge"
        raise FloatingPointError(f"{rule}, got {failed} of {TRIALS} that did")
    return settings[chosen]


def trial(task: Task, name: str, i: int, settings: Settings) -> float:
    """Return one trial's mean validation score; infinite where training diverged."""
    path = folder(task.name, name) / f"trial-{i}.json"
    if not path.exists():
        values = [validation_score(task, name, settings, seed) for seed in TUNING_SEEDS]
        kept = [value if math.isfinite(value) else None for value in values]
        write_json(path, {"settings": settings, PRIMARY: kept, **provenance()})
    values = json.loads(path.read_text())[PRIMARY]
    return math.inf if None in values else float(np.mean(values))


def ranked_trials(task: Task, name: str) -> list[int]:
    """Return the numbers of a method's trials, the one with the lowest validation score first."""
    settings = trial_settings(name)
    scores = [trial(task, name, i, settings[i]) for i in range(TRIALS)]
    return sorted(range(TRIALS), key=scores.__getitem__)


def validation_score(task: Task, name: str, settings: Settings, seed: int) -> float:
    """Train, and score on validation data; infinite where a loss, or a prediction, is not finite."""
    try:
        ensemble, sets = train_one(task, name, settings, seed)
        x, y = sets["val"]
        prediction = asked(task, ensemble, x, seed)
        packed(prediction)  # fails on what the bank could not keep
    except FloatingPointError:
        return math.inf
    assert y is not None
    return -mixed(log_likelihoods(prediction, y)).mean().item()


def run(task: Task, name: str, seed: int) -> None:
    """Train one method with one seed and keep what its members say about every set, unless that is kept already."""
    path = folder(task.name, name) / f"{seed}.npz"
    if path.exists():
        return
    settings = tune(task, name)
    ensemble, sets = train_one(task, name, settings, seed)
    facts: dict[str, Any] = {"task": task.name, "method": name, "seed": seed, "settings": settings, **provenance()}
    if isinstance(ensemble, HyperEnsemble):  # what is chosen three times is kept once
        facts["rows"] = ensemble.rows
    rows = facts.get("rows", slice(None))
    arrays: dict[str, Any] = {"facts": np.array(json.dumps(facts))}
    for key, (x, y) in sets.items():
        if key == "test" or (key != "train" and (not METHODS[name].control or name in task.everywhere)):
            if key == "test" and task.refits is not None:
                numbers = refitted(task, name, settings, seed)
            else:
                numbers = packed(asked(task, once(ensemble), x, seed))
            arrays[key] = numbers
            if y is not None and isinstance(task.likelihood, StudentT):  # takes seconds: kept, too
                said = restored(torch.from_numpy(numbers[rows]).float(), task.likelihood)
                arrays[f"{key} crps"] = daily_crps(said, y).numpy().astype(np.float32)
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content.getvalue())
    record.cache_clear()  # a run that was deleted and made again is read again
    seed_scores.cache_clear()


def once(ensemble: Ensemble) -> Ensemble:
    """Return the ensemble with every network once, where some are chosen several times."""
    return ensemble.chosen if isinstance(ensemble, HyperEnsemble) else ensemble


def refitted(task: Task, name: str, settings: Settings, seed: int) -> NDArray[np.float16]:
    """Train anew for every part of the test set, on what was known before it, and return what is said of all parts."""
    assert task.refits is not None
    said = []
    for sets in task.refits():
        ensemble, _ = train_one(replace(task, load=partial(fixed, sets)), name, settings, seed)
        said.append(packed(asked(task, once(ensemble), sets["test"][0], seed)))
    return np.concatenate(said, axis=1)


def fixed(sets: Sets, seed: int) -> Sets:
    """Return the same sets for every seed."""
    return sets


def asked(task: Task, ensemble: Ensemble, x: Tensor, seed: int) -> Any:
    """Return every member's prediction; the seed decides what a network says whose dropout stays on."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return predict(ensemble, x, likelihood=task.likelihood)


def run_costs(task: Task, names: Iterable[str]) -> None:
    """Measure what each method's ensemble costs, unless that is kept already; together, so that they compare."""
    names = [name for name in names if not METHODS[name].control]
    paths = {name: folder(task.name, name) / "costs.json" for name in names}
    if not all(path.exists() for path in paths.values()):
        for name, found in measured(task, names, "cpu", seconds=0.4).items():
            write_json(paths[name], {**provenance(), **found})


def run_device_costs(task: Task, device: str) -> None:
    """Measure what each method's ensemble costs on another device, unless that is kept already: one file a task."""
    path = device_costs_path(task.name, device)
    if not path.exists():
        names = [name for name, method in METHODS.items() if not method.control]
        found = measured(task, names, device, seconds=0.05)
        write_json(path, {**provenance(), "device": found[names[0]]["device"], "methods": found})


def device_costs_path(task: str, device: str) -> Path:
    """Return where a task's costs on a kind of device are kept."""
    return BANK / task / f"costs-{torch.device(device).type}.json"


def measured(task: Task, names: Iterable[str], device: str, seconds: float) -> dict[str, dict[str, Any]]:
    """Return what each method's ensemble costs on a device: the fields of `effens.Costs`.

    They are measured in turns, and each time is the median of five: one long look at each would compare different
    moments of the machine. They are trained on the CPU, for some epochs only: no weight changes a cost.
    """
    brief = replace(task, pool=task.members, epochs=task.members)  # an epoch for each cycle
    ensembles: dict[str, Ensemble] = {}
    searches: dict[str, Ensemble] = {}  # of which the ensemble is a part: all of it is trained
    for name in names:
        ensemble, _ = train_one(brief if METHODS[name].tuned else task, name, tune(task, name), 0)
        if isinstance(ensemble, HyperEnsemble):
            ensemble = ensemble.chosen
            candidates = [candidate(task, settings) for settings in trial_settings(name)]
            searches[name] = DeepEnsemble.of(candidates).to(device)
        ensembles[name] = ensemble.to(device)
    x, y = task.load(0)["train"]
    assert y is not None
    looks: dict[str, list[dict[str, Any]]] = {name: [] for name in ensembles}
    for _ in range(5):
        for name, ensemble in ensembles.items():
            look = asdict(measure(bare(ensemble), x, y, likelihood=task.likelihood, seconds=seconds))
            if name in searches:
                whole = measure(searches[name], x, y, likelihood=task.likelihood, seconds=seconds)
                look["train_seconds"] = whole.train_seconds
            looks[name].append(look)
    middles = {}
    for name, found in looks.items():
        middles[name] = dict(found[0])
        middles[name]["train_seconds"] = float(np.median([look["train_seconds"] for look in found]))
        for key in ("latency_p50", "latency_p99"):
            middles[name][key] = {size: float(np.median([look[key][size] for look in found])) for size in found[0][key]}
    return middles


def bare(ensemble: Ensemble) -> nn.Module:
    """Return what costs are measured of: of a deep ensemble of one its network, as plain PyTorch trains and asks it."""
    return ensemble.member(0) if isinstance(ensemble, DeepEnsemble) and ensemble.members == 1 else ensemble


LAYERS: dict[str, Any] = {"widths": (64, 256, 1024, 4096), "batches": (1, 16, 256), "members": 4}


def run_layer_costs() -> None:
    """Time one linear layer, M of them, and BatchEnsemble's, over widths and batches, unless that is kept already."""
    path = BANK / "layers.json"
    if path.exists():
        return
    members = LAYERS["members"]
    rows = []
    for width in LAYERS["widths"]:
        make = partial(nn.Linear, width, width)
        layers = {
            "single": make(),
            "deep ensemble": DeepEnsemble(make, members),
            "BatchEnsemble": BatchEnsemble(make, members),
        }
        for batch in LAYERS["batches"]:
            x = torch.randn(batch, width)
            with torch.inference_mode():
                times = interleaved({name: partial(layer, x) for name, layer in layers.items()}, seconds=4.0)
            rows += [{"method": name, "width": width, "batch": batch, "seconds": t} for name, t in times.items()]
    write_json(path, {"members": members, "threads": torch.get_num_threads(), "rows": rows, **provenance()})


def interleaved(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Return the median time of each call, taken in turns, so that a busy moment hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    while len(times[next(iter(times))]) < 10 or time.perf_counter() - began < seconds:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(found[3:])) for name, found in times.items()}


def provenance() -> dict[str, str]:
    """Return where and when a run was made."""
    today = datetime.date.today().isoformat()
    return {"torch": torch.__version__, "python": platform.python_version(), "device": "cpu", "date": today}


def methods(task: str) -> list[str]:
    """Return what is run on a task."""
    return [name for name, method in METHODS.items() if not method.control or name in TASKS[task].controls]


def folder(task: str, name: str) -> Path:
    """Return where a method's runs are kept."""
    return BANK / task / name.replace(" ", "-")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a small file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


PARAMETERS = {Normal: ("loc", "scale"), StudentTDistribution: ("df", "loc", "scale")}
Prediction = Tensor | Normal | StudentTDistribution


def packed(prediction: Prediction) -> NDArray[np.float16]:
    """Return half precision: log probabilities (members, n, classes), or parameters (members, n, 2 or 3).

    Degrees of freedom above 1000 are kept as 1000: that is a normal distribution.

    Raises:
        FloatingPointError: the weights overflowed, so that a prediction is not finite.
    """
    if isinstance(prediction, Tensor):
        numbers = prediction.clamp_min(1e-30).log().half()  # the log keeps what is near 0 and near 1
    else:
        fields = {name: getattr(prediction, name) for name in PARAMETERS[type(prediction)]}
        if "df" in fields:
            fields["df"] = fields["df"].clamp_max(1000)
        numbers = torch.stack(list(fields.values()), -1).half()
    if lost := int((~numbers.isfinite()).sum()):
        raise FloatingPointError(f"predictions must be finite in half precision, got {lost} numbers that are not")
    return numbers.numpy()


def restored(numbers: Tensor, likelihood: Likelihood) -> Any:
    """Return the prediction that `packed` made numbers of."""
    if isinstance(likelihood, Categorical):
        return numbers.softmax(-1)
    return distribution(StudentTDistribution if isinstance(likelihood, StudentT) else Normal, numbers.unbind(-1))


def distribution(kind: Any, parts: Iterable[Tensor]) -> Any:
    """Return a distribution of these parameters, whose values were looked at when they were packed."""
    return kind(*parts, validate_args=False)


def parameters(prediction: Normal | StudentTDistribution) -> list[Tensor]:
    """Return a distribution's parameters, in the order in which its class takes them."""
    return [getattr(prediction, name) for name in PARAMETERS[type(prediction)]]


def doubles(prediction: Normal | StudentTDistribution) -> list[Tensor]:
    """Return them in float64."""
    return [part.double() for part in parameters(prediction)]


# ---- Reading. ----


@cache
def record(task: str, name: str, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what is kept of a run: facts about it, and predictions by set.

    Raises:
        FileNotFoundError: the run is not in the bank.
    """
    path = folder(task, name) / f"{seed}.npz"
    if not path.exists():
        raise FileNotFoundError(f"the ledger must hold {task}, {name}, seed {seed}, got no such run: {COMMAND}")
    with np.load(path, allow_pickle=False) as file:
        facts = json.loads(str(file["facts"]))
        sets = [key for key in file.files if key != "facts" and not key.endswith(" crps")]
        arrays = {key: torch.from_numpy(file[key]).float() for key in sets}
    if "rows" in facts:  # a network that is chosen three times is three members
        arrays = {key: array[facts["rows"]] for key, array in arrays.items()}
    likelihood = TASKS[task].likelihood
    return facts, {key: restored(array, likelihood) for key, array in arrays.items()}


def predictions(task: str, name: str, seed: int, split: str = "test") -> Any:
    """Return every member's prediction: probabilities (members, n, classes), or a distribution (members, n)."""
    return record(task, name, seed)[1][split]


def pool(task: str, split: str = "test", seed: int = 0) -> Any:
    """Return the predictions of all independent networks that saw the same data.

    On real data these are the members of every seed's deep ensemble; on the generated task, where every seed has data
    of its own, those of one seed.
    """
    if TASKS[task].fresh:
        return predictions(task, "deep ensemble", seed, split)
    found = [predictions(task, "deep ensemble", s, split) for s in range(TASKS[task].seeds)]
    if isinstance(found[0], Tensor):
        return torch.cat(found)
    parts = zip(*map(parameters, found), strict=True)
    return distribution(type(found[0]), map(torch.cat, parts))


def kept_crps(task: str, name: str, seed: int, split: str = "test") -> Tensor:
    """Return what was kept of the continuous ranked probability score of each example, (n,), in units of y.

    Raises:
        KeyError: none was kept: the members are no Student's t.
    """
    record(task, name, seed)  # says what is missing
    with np.load(folder(task, name) / f"{seed}.npz", allow_pickle=False) as file:
        return torch.from_numpy(file[f"{split} crps"])


def log_likelihoods(prediction: Prediction, y: Tensor) -> Tensor:
    """Return each member's log likelihood of each target, (members, n), float64."""
    if isinstance(prediction, Tensor):
        return scores.of_labels(prediction, y).log()
    logs: Tensor = distribution(type(prediction), doubles(prediction)).log_prob(y)
    return logs


def mixed(logs: Tensor) -> Tensor:
    """Return the log likelihood of the mean of the members, (n,)."""
    return logs.logsumexp(0) - math.log(len(logs))


def score(prediction: Prediction, y: Tensor) -> dict[str, float]:
    """Return the scores of a prediction of the members.

    In nats: nll, member_nll, diversity_gain. In percent: accuracy, ece, disagreement, coverage of the 95% band. In
    units of y: crps (of normal members), width of that band, spread of the members' means.
    """
    logs = log_likelihoods(prediction, y)
    result = {"nll": -mixed(logs).mean(), "member_nll": -logs.mean()}
    result["diversity_gain"] = result["member_nll"] - result["nll"]
    if not isinstance(prediction, Tensor):
        if isinstance(prediction, Normal):
            total = (prediction.variance.mean(0) + prediction.loc.var(0, correction=0)).sqrt()
            low, high = (prediction.loc.mean(0) + side * 1.96 * total for side in (-1, 1))
            result["crps"] = scores.crps(prediction, y)
        else:
            low, high = (risk.quantile(prediction, p) for p in (0.025, 0.975))
        result["coverage"] = 100 * ((low <= y) & (y <= high)).float().mean()
        result["width"] = (high - low).mean()
        result["spread"] = prediction.loc.std(0, correction=0).mean()
    else:
        result["accuracy"] = 100 * scores.accuracy(prediction, y)
        result["brier"] = scores.brier(prediction, y)
        result["ece"] = 100 * scores.ece(prediction, y)
        result["disagreement"] = 100 * scores.disagreement(prediction).mean()
    return {key: float(value) for key, value in result.items()}


def daily_crps(prediction: StudentTDistribution, y: Tensor) -> Tensor:
    """Return the continuous ranked probability score of each example, (n,), float64."""
    df, location, scale = doubles(prediction)
    return scores.crps_of_students(df, location, scale, y.double())


NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(64)


def divergence(truth: Normal, prediction: Normal) -> float:
    r"""Return the Kullback-Leibler divergence of the members' mixture q from the truth p, in nats, over the inputs.

    .. math:: \frac1n \sum_i \int p(y \mid x_i) \log \frac{p(y \mid x_i)}{q(y \mid x_i)} dy

    by Gauss-Hermite quadrature with 64 nodes.
    """
    nodes = torch.from_numpy(NODES)[:, None] * truth.scale.double() + truth.loc.double()  # (64, n)
    weights = torch.from_numpy(WEIGHTS / WEIGHTS.sum())
    members = Normal(prediction.loc.double()[:, None], prediction.scale.double()[:, None])  # (members, 1, n)
    gap = truth.log_prob(nodes) - mixed(members.log_prob(nodes))
    return float((weights @ gap).mean())


BASELINES = {"single, temperature": "single"}  # derived from another method's predictions


@cache
def seed_scores(task: str, name: str, seed: int, split: str) -> dict[str, float]:
    """Return the scores of one seed; of a pool, the mean over its disjoint groups of ``members``."""
    y = targets(task, seed, split)
    prediction = predictions(task, BASELINES.get(name, name), seed, split)
    if name in BASELINES:
        prediction = tempered(task, seed, prediction)
    parts = groups(prediction, TASKS[task].members) if name == "deep ensemble" else [prediction]
    rows = [score(part, y) for part in parts]
    if isinstance(TASKS[task].likelihood, StudentT):
        kept = name not in BASELINES and len(parts) == 1  # what is kept is that of all members together
        each = [kept_crps(task, name, seed, split)] if kept else [daily_crps(part, y) for part in parts]
        rows = [{**row, "crps": float(daily.mean())} for row, daily in zip(rows, each, strict=True)]
    if (truth := TASKS[task].truth) is not None:
        exact = truth(seed, split)
        rows = [{**row, "divergence": divergence(exact, part)} for row, part in zip(rows, parts, strict=True)]
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def targets(task: str, seed: int, split: str) -> Tensor:
    """Return the right answers of a set, (n,); raise `ValueError` if there are none."""
    y = TASKS[task].load(seed)[split][1]
    if y is None:
        raise ValueError(f"scores need a set with right answers, got {split}, which has none")
    return y


def groups(prediction: Any, members: int) -> list[Any]:
    """Divide a pool into disjoint groups of ``members``, and drop a remainder; a pool that is smaller is one group."""
    size = pool_size(prediction)
    parts = torch.arange(size).split(members)[: max(1, size // members)]
    return [members_of(prediction, part) for part in parts]


def pool_size(prediction: Any) -> int:
    """Return how many members a prediction has."""
    return len(prediction if isinstance(prediction, Tensor) else prediction.loc)


def members_of(prediction: Any, index: Tensor) -> Any:
    """Return the prediction of some of the members."""
    if isinstance(prediction, Tensor):
        return prediction[index]
    return distribution(type(prediction), (part[index] for part in parameters(prediction)))


def tempered(task: str, seed: int, prediction: Any) -> Any:
    """Return the single network's prediction, its confidence set on validation data by one number."""
    y = targets(task, seed, "val")
    val = predictions(task, "single", seed, "val")
    if isinstance(prediction, Normal):  # the scale of the standard deviation that fits best, in closed form
        factor = ((y - val.loc) / val.scale).square().mean().sqrt()
        return Normal(prediction.loc, prediction.scale * factor, validate_args=False)
    if isinstance(prediction, StudentTDistribution):
        return stretched(prediction, stretch(val, y))
    return scores.temper(prediction, scores.temperature(val, y))


def stretched(prediction: StudentTDistribution, factor: float) -> StudentTDistribution:
    """Return the same with every scale multiplied."""
    return StudentTDistribution(prediction.df, prediction.loc, prediction.scale * factor, validate_args=False)


def stretch(prediction: StudentTDistribution, y: Tensor) -> float:
    """Return the factor of the scales that fits best."""

    def loss(log_factor: float) -> float:
        return -float(mixed(log_likelihoods(stretched(prediction, math.exp(log_factor)), y)).mean())

    return math.exp(optimize.minimize_scalar(loss, bounds=(-2, 2), method="bounded").x)


def values(task: str, name: str, metric: str = PRIMARY, split: str = "test") -> Tensor:
    """Return one score of every seed, (seeds,); "auroc" tells the set ``split`` from the test set."""
    if metric == "auroc":
        return auroc(task, name, split)
    return torch.tensor([seed_scores(task, name, seed, split)[metric] for seed in range(TASKS[task].seeds)])


@cache
def auroc(task: str, name: str, outside: str) -> Tensor:
    """Return how well total entropy tells ``outside`` from the test set, of every seed, (seeds,), in percent."""
    result = []
    for seed in range(TASKS[task].seeds):
        found = [predictions(task, BASELINES.get(name, name), seed, split) for split in ("test", outside)]
        if name in BASELINES:
            found = [tempered(task, seed, prediction) for prediction in found]
        result.append(100 * scores.auroc(*(scores.total_entropy(probs) for probs in found)))
    return torch.stack(result)


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95% t interval."""

    mean: float
    half: float

    def __format__(self, spec: str) -> str:
        """Write both numbers alike: ``f"{interval:.1f}"``, three decimals by default."""
        return f"{self.mean:{spec or 'z.3f'}} ± {self.half:{spec.lstrip('+') or '.3f'}}"  # z: no sign before a zero

    def __str__(self) -> str:
        return format(self)


def interval(sample: Tensor) -> Interval:
    """Return the mean of a sample (n,), and half of its 95% t interval."""
    n = len(sample)
    if n < 2:
        raise ValueError(f"an interval needs at least 2 seeds, got {n}")
    half = float(stats.t.ppf(0.975, n - 1)) * sample.double().std().item() / math.sqrt(n)
    return Interval(sample.double().mean().item(), half)


@dataclass(frozen=True)
class Comparison:
    """The paired difference of two methods over seeds, with its 95% t interval and what it says."""

    difference: Interval
    wins: int
    seeds: int
    verdict: str

    def __str__(self) -> str:
        mean, half = self.difference.mean, self.difference.half
        return f"{mean:+.3f} ± {half:.3f}, lower in {self.wins} of {self.seeds}: {self.verdict}"


def compare(
    task: str, a: str, b: str, metric: str = PRIMARY, split: str = "test", margin: float = MARGIN
) -> Comparison:
    """Return by how much ``a`` differs from ``b``: lower, higher, tied (inside the margin), or unresolved."""
    gap = values(task, a, metric, split) - values(task, b, metric, split)
    difference = interval(gap)
    low, high = difference.mean - difference.half, difference.mean + difference.half
    if -margin < low and high < margin:
        verdict = "tied"
    elif low > 0 or high < 0:
        verdict = "lower" if high < 0 else "higher"
    else:
        verdict = "unresolved"
    return Comparison(difference, int((gap < 0).sum()), len(gap), verdict)


def holm(
    task: str, reference: str, rows: Iterable[str] | None = None, metric: str = PRIMARY, split: str = "test"
) -> dict[str, float]:
    """Return the p-value of each method's paired t test against a reference, adjusted for how many there are.

    Holm (1979), "A simple sequentially rejective multiple test procedure": the smallest is multiplied by the number of
    comparisons, the next by one less, and so on; none is below the one before it. A table in which no method differs
    from the reference shows an adjusted p-value below 0.05 in one case of 20, however many rows it has.

    Args:
        task: its name.
        reference: the method that the others are compared with.
        rows: these others; by default every other row of the tables.
        metric: a score.
        split: the set on which it is scored.

    Returns:
        Adjusted p-values by method, the smallest first; 1 where a method is the same as the reference in every seed.
    """
    others = [name for name in (names() if rows is None else rows) if name != reference]
    base = values(task, reference, metric, split).double().numpy()
    found = {}
    for name in others:
        p = float(stats.ttest_rel(values(task, name, metric, split).double().numpy(), base).pvalue)
        found[name] = 1.0 if math.isnan(p) else p
    adjusted: dict[str, float] = {}
    highest = 0.0
    for i, (name, p) in enumerate(sorted(found.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, (len(found) - i) * p))
        adjusted[name] = highest
    return adjusted


def curve(task: str, members: Iterable[int], metric: str = PRIMARY, split: str = "test", subsets: int = 100) -> Tensor:
    """Return a score of random subsets of the pool, (sizes, subsets): how a deep ensemble depends on its members.

    Subsets of a pool overlap, so their spread says what luck in the choice of networks does, and is no interval.

    Raises:
        ValueError: a size is below 1, or above the pool's.
    """
    found, y = pool(task, split), targets(task, 0, split)
    generator = torch.Generator().manual_seed(0)
    size = pool_size(found)
    logs = log_likelihoods(found, y)
    quick: dict[str, Callable[[Tensor], Tensor]] = {
        "nll": lambda part: -mixed(part).mean(),
        "member_nll": lambda part: -part.mean(),
        "diversity_gain": lambda part: mixed(part).mean() - part.mean(),
    }
    rows = []
    for m in members:
        if not 1 <= m <= size:
            raise ValueError(f"members must be in 1 ... {size}, got {m}")
        drawn = [torch.randperm(size, generator=generator)[:m] for _ in range(subsets)]
        if metric in quick:
            rows.append(torch.stack([quick[metric](logs[index]) for index in drawn]))
        else:
            row = [score(members_of(found, index), y)[metric] for index in drawn]
            rows.append(torch.tensor(row, dtype=torch.float64))
    return torch.stack(rows)


def choices(task: str, name: str, seed: int, members: int) -> list[Tensor]:
    """Return every way to take so many of the members that a run kept; all of them where it has no more.

    A search adds its networks in an order, so of those it is the first: what it would have chosen of this size.
    """
    facts, found = record(task, name, seed)
    if "rows" in facts:
        rows = facts["rows"]
        return [torch.arange(max(k for k in range(len(rows) + 1) if len(set(rows[:k])) <= members))]
    kept = min(pool_size(found["test"]), TASKS[task].members)
    return [torch.tensor(index) for index in itertools.combinations(range(kept), min(members, kept))]


def at_members(task: str, name: str, members: int, split: str = "test") -> tuple[float, float]:
    """Return (member_nll, diversity_gain) of a smaller ensemble: a mean over seeds and over all choices of members."""
    points = []
    for seed in range(TASKS[task].seeds):
        logs = log_likelihoods(predictions(task, name, seed, split), targets(task, seed, split))
        parts = [logs[index] for index in choices(task, name, seed, members)]
        points.append(np.mean([[-part.mean(), mixed(part).mean() - part.mean()] for part in parts], 0))
    loss, gain = np.mean(points, 0)
    return float(loss), float(gain)


def costs(task: str, name: str, device: str = "cpu") -> dict[str, Any]:
    """Return what a method costs on the machine on which the ledger was made: the fields of `effens.Costs`.

    Args:
        task: its name.
        name: of the method.
        device: ``"cpu"``, or ``"cuda"``: the GPU on which ``python -m effens_book.ledger --gpu`` was run.

    Raises:
        FileNotFoundError: that was not measured.
    """
    name = BASELINES.get(name, name)
    path = folder(task, name) / "costs.json" if device == "cpu" else device_costs_path(task, device)
    if not path.exists():
        where, option = ("", "") if device == "cpu" else (f" on {device}", " --gpu")
        raise FileNotFoundError(f"the ledger must hold the costs of {task}, {name}{where}, got none: {COMMAND}{option}")
    facts: dict[str, Any] = json.loads(path.read_text())
    return facts if device == "cpu" else {**facts, **facts["methods"][name]}


def names(controls: bool = False) -> list[str]:
    """Return every row of a table: the methods, each followed by the baselines derived from it; or controls, too."""
    chosen = [name for name, method in METHODS.items() if controls or not method.control]
    return [row for name in chosen for row in (name, *(key for key, value in BASELINES.items() if value == name))]


def table(
    task: str,
    columns: Iterable[str] = ("nll", "member_nll", "diversity_gain"),
    rows: Iterable[str] | None = None,
) -> Table:
    """Return a table: a row per method, a column per score, means over seeds with 95% intervals.

    The best mean is marked in the columns whose direction is a matter of quality, and the rows whose paired difference
    from it is not resolved.

    Args:
        task: its name.
        columns: scores on the test set; ``"nll@rotated"`` is on another set.
        rows: methods; all of them by default.
    """
    asked = [(title(column), *(column.split("@") if "@" in column else (column, "test"))) for column in columns]
    found = {
        name: {head: interval(values(task, name, metric, split)) for head, metric, split in asked}
        for name in (names() if rows is None else rows)
    }
    best = {head: QUALITY[metric] for head, metric, _ in asked if metric in QUALITY and len(found) > 1}
    unresolved = []
    for head, metric, split in asked:
        if head in best:
            first = best[head](found, key=lambda name: found[name][head].mean)
            verdicts = {name: compare(task, name, first, metric, split).verdict for name in found if name != first}
            unresolved += [(name, head) for name, verdict in verdicts.items() if verdict in ("unresolved", "tied")]
    unit = "" if NATS.isdisjoint(metric for _, metric, _ in asked) else ", losses in nats"
    return Table(
        found,
        caption=f"{task}, means over {TASKS[task].seeds} seeds ± 95% intervals{unit}",
        best=best,
        unresolved=unresolved,
        digits={head: DECIMALS.get(metric, 3) for head, metric, _ in asked},
    )


QUALITY = {"nll": min, "crps": min, "divergence": min, "accuracy": max, "auroc": max}  # which value is the best
NATS = {"nll", "member_nll", "diversity_gain", "divergence"}
DECIMALS = {"accuracy": 1, "ece": 1, "disagreement": 1, "coverage": 1, "auroc": 1}  # percentages
TITLES = {
    "nll": "NLL",
    "member_nll": "members' NLL",
    "diversity_gain": "diversity gain",
    "auroc": "AUROC (%)",
    "crps": "CRPS",
    **{key: f"{key} (%)" for key in ("accuracy", "ece", "disagreement", "coverage")},
}


def title(column: str) -> str:
    """Return a column's head, such as ``"NLL, rotated"`` for ``"nll@rotated"``."""
    metric, _, split = column.partition("@")
    name, _, unit = TITLES.get(metric, metric).partition(" (")
    return name + (f", {split}" if split else "") + (f" ({unit}" if unit else "")


def differences(
    task: str, pairs: Iterable[tuple[str, str]], metric: str = PRIMARY, split: str = "test", margin: float = MARGIN
) -> Table:
    """Return a table of paired differences, first minus second: a row for each pair, with its interval and verdict."""
    column = title(metric if split == "test" else f"{metric}@{split}")
    rows = {}
    for a, b in pairs:
        found = compare(task, a, b, metric, split, margin)
        digits = DECIMALS.get(metric, 3)
        rows[f"{a} − {b}"] = {
            f"difference in {column}": f"{found.difference:+.{digits}f}",
            "lower in": f"{found.wins} of {found.seeds}",
            "verdict": found.verdict,
        }
    return Table(rows, caption=f"{task}, paired by seed, first minus second ± 95% interval")


def relative_costs(task: str, name: str, device: str = "cpu") -> dict[str, float]:
    """Return a method's costs as multiples of the single network's, on the CPU or on a GPU, ``"cuda"``.

    Training is the time of a step of the task's epochs, at batch 128; prediction the median latency at batch 1 and 256;
    memory the bytes of all weights.
    """

    def facts(row: str) -> dict[str, float]:
        found = costs(task, row, device)
        return {
            "training": found["train_seconds"],
            "batch 1": found["latency_p50"]["1"],
            "batch 256": found["latency_p50"]["256"],
            "memory": found["stored_bytes"],
        }

    one = facts("single")
    return {key: value / one[key] for key, value in facts(name).items()}


COSTS = {"training": "training", "batch 1": "predict 1", "batch 256": "predict 256", "memory": "memory"}


def times(costs: Mapping[str, float], digits: int = 1) -> dict[str, str]:
    """Return relative costs in words: ``{"training": "4.2x", ...}``."""
    return {COSTS.get(key, key): f"{value:.{digits}f}x" for key, value in costs.items()}


def cost_table(task: str, rows: Iterable[str] | None = None, device: str = "cpu") -> Table:
    """Return a table of what each method costs, as multiples of the single network's cost; all methods by default."""
    found = {name: times(relative_costs(task, name, device)) for name in (names() if rows is None else rows)}
    where = "one CPU thread" if device == "cpu" else costs(task, "single", device)["device"]
    return Table(found, caption=f"{task}, cost as a multiple of one network's, {where}; predict: of 1 row, of 256 rows")


def best_trials(task: str, methods: Iterable[str], count: int = 2) -> Table:
    """Return a table of the best tuning trials of each method: their settings, and the loss on validation data.

    The first is the one that was chosen. A second one that comes close with other settings says that luck chose.
    """
    rows = {}
    for name in methods:
        settings = trial_settings(name)
        for place, i in enumerate(ranked_trials(TASKS[task], name)[:count]):
            rows[f"{name}, {'chosen' if place == 0 else f'place {place + 1}'}"] = {
                "learning rate": f"{settings[i]['lr']:.4f}",
                "weight decay": f"{settings[i]['weight_decay']:.3f}",
                "validation NLL": trial(TASKS[task], name, i, settings[i]),
            }
    caption = f"{task}, the best of {TRIALS} tuning trials; NLL in nats, mean over {len(TUNING_SEEDS)} seeds"
    return Table(rows, caption=caption, digits=4)


def layer_table() -> Table:
    """Return a table of one layer's latency, as multiples of one plain layer: rows of width and batch."""
    path = BANK / "layers.json"
    if not path.exists():
        raise FileNotFoundError(f"the ledger must hold the costs of layers, got none: {COMMAND}")
    seen = {(row["width"], row["batch"], row["method"]): row["seconds"] for row in json.loads(path.read_text())["rows"]}
    rows: dict[str, dict[str, str]] = {}
    for width, batch in dict.fromkeys(key[:2] for key in seen):
        one = seen[width, batch, "single"]
        cells = {name: f"{seen[width, batch, name] / one:.1f}x" for name in ("deep ensemble", "BatchEnsemble")}
        rows[f"width {width}, batch {batch}"] = {"one layer": f"{1e6 * one:.0f} µs", **cells}
    return Table(rows, caption="latency of one linear layer with four members, as a multiple of one plain layer's")


def card(task: str, name: str) -> Table:
    """Return a table of two rows: what one network and a method bring, and what they cost."""
    rows = {
        "one network" if row == "single" else row: {
            f"NLL on test {task}": interval(values(task, row)),
            **times(relative_costs(task, row)),
        }
        for row in ("single", name)
    }
    caption = f"NLL in nats, mean over {TASKS[task].seeds} seeds ± 95% interval; costs as multiples of one network's"
    return Table(rows, caption=caption)


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m effens_book.ledger", description=main.__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--no-costs", action="store_true", help="measure no costs: another program is running")
    parser.add_argument("--gpu", action="store_true", help="only measure costs, of all methods, on the GPU at hand")
    chosen = parser.parse_args(arguments)
    if chosen.gpu and not torch.cuda.is_available():
        parser.error("--gpu needs a CUDA device, got none")
    torch.set_num_threads(1)  # so that numbers and times do not depend on how many cores there are
    if chosen.gpu:
        for task in tqdm(chosen.tasks, desc="costs on the GPU", unit="task"):
            run_device_costs(TASKS[task], "cuda")
        for task in chosen.tasks:
            print(f"\n{task}: {costs(task, 'single', 'cuda')['device']}\n{cost_table(task, device='cuda')}")
        return
    pairs = [(TASKS[task], name) for task in chosen.tasks for name in chosen.methods if name in methods(task)]
    with tqdm(total=sum(task.seeds for task, _ in pairs), desc="ledger", unit="run") as shown:
        for task, name in pairs:
            for seed in range(task.seeds):
                shown.set_postfix_str(f"{task.name}, {name}, seed {seed}")
                run(task, name, seed)
                shown.update()
    if not chosen.no_costs:
        for task in chosen.tasks:
            run_costs(TASKS[task], chosen.methods)
        run_layer_costs()
    if set(chosen.methods) == set(METHODS):
        for task in chosen.tasks:
            print(f"\n{task}: test set\n{table(task)}")


if __name__ == "__main__":
    main()
