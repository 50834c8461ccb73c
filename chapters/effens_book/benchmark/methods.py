"""The benchmark's methods: one function each, and the settings that are tried for it."""

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.quasirandom import SobolEngine
from torch.utils.flop_counter import FlopCounterMode

from effens.ensembles.base import Ensemble
from effens.ensembles.batch import BatchEnsemble
from effens.ensembles.deep import DeepEnsemble
from effens.ensembles.hyper import HyperEnsemble, greedy_select
from effens.ensembles.lora import LoRAEnsemble, add_lora
from effens.ensembles.mimo import MIMO
from effens.ensembles.snapshot import SnapshotEnsemble
from effens.ensembles.swag import SWAG
from effens.ensembles.tabm import TabM
from effens.training import predict
from effens_book.baselines import LastLayerLaplace, MCDropout
from effens_book.benchmark.predictions import to_half
from effens_book.benchmark.tasks import SPACE, TASKS, TRIALS, TUNING_SEEDS, Sets, Settings, Task
from effens_book.boosting import GradientBoosting

Train = Callable[[Task, tuple[Tensor, Tensor], Settings, int], Ensemble]


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        train: the function.
        space: what it tunes beside rate and decay, as name: (low, high) on a log scale; or other limits for these two.
        like: the methods whose tuned settings it takes, if it is a variant that changes one thing only; where two have
            the same setting, the first one's.
        place: of the trials that chose these settings, 0 for the best.
        control: whether it is there to explain a method, and is no row of the tables: variants are.
        tuned: whether trials choose its settings; the others train their own candidates.
        only: the tasks on which alone it is a row of the tables; empty: all.
        long: whether it trains as long as all networks of the ensemble together.
    """

    train: Train
    space: Mapping[str, tuple[float, float]]
    like: Sequence[str] = ()
    place: int = 0
    control: bool = False
    tuned: bool = True
    only: Sequence[str] = ()
    long: bool = False


METHODS: dict[str, Method] = {}


def method(
    name: str,
    *,
    like: str | Sequence[str] = (),
    place: int = 0,
    control: bool = False,
    tuned: bool = True,
    only: Sequence[str] = (),
    long: bool = False,
    **space: tuple[float, float],
) -> Callable[[Train], Train]:
    """Register a function ``(task, (x, y), settings, seed) -> trained ensemble`` as a method of the benchmark."""
    others = (like,) if isinstance(like, str) else tuple(like)

    def register(train: Train) -> Train:
        METHODS[name] = Method(train, space, others, place, control or bool(others), tuned, only, long)
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
    networks = task.members if seed in (*TUNING_SEEDS, *task.more_seeds) else task.pool
    return task.fit(DeepEnsemble(task.make_net, networks), train, settings, seed)


@method("BatchEnsemble", fast_lr=(0.1, 3.0))
def batch_ensemble(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """Shared weights with rank-1 factors, tiled batches; each member has its own batch norm, if there is any."""
    ensemble = BatchEnsemble(task.make_net, task.members, fast_lr=settings["fast_lr"], norms="own")
    return task.fit(ensemble, train, settings, seed)


TABLES = ("airtime", "diamonds")


@method("TabM", only=("fashion", *TABLES), fast_lr=(0.1, 10.0))
def tabm(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """BatchEnsemble for tables: signs in the first layer only, heads for each member, and many members."""
    return task.fit(TabM(task.make_net, task.tabm, fast_lr=settings["fast_lr"]), train, settings, seed)


@method("gradient boosting", control=True, lr=(0.02, 0.3), trees=(50, 500), leaves=(4, 64), l2=(1e-3, 100.0))
def gradient_boosting(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """Boosted trees, for the mean and for the spread: what a table is given to first. It has no weight decay."""
    options: dict[str, Any] = {name: round(settings[name]) for name in ("trees", "leaves")}
    options |= {"one_hot": task.one_hot, "seed": seed}
    return GradientBoosting(task.likelihood, lr=settings["lr"], l2=settings["l2"], **options).fit(*train)


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
        points, rows = search_settings(task.name, seed)
        return HyperEnsemble([network for network, _ in trained(task, train, points, seed)], rows)
    ensemble, _ = search(task, train, seed)
    return ensemble


def search(task: Task, train: tuple[Tensor, Tensor], seed: int) -> tuple[HyperEnsemble, list[Settings]]:
    """Train candidates and choose among them; returns the ensemble and the settings of all that did not diverge."""
    x, y = task.load(seed)["val"]
    assert y is not None
    found = trained(task, train, trial_settings(task, "hyper", seed), seed)
    if not found:
        rule = f"at least one candidate of seed {seed} must not diverge"
        raise FloatingPointError(f"{rule}, got {TRIALS} of {TRIALS} that did")
    networks = [network for network, _ in found]
    said = predict(DeepEnsemble.of(networks), x, likelihood=task.likelihood)
    return HyperEnsemble(networks, greedy_select(said, y, task.members)), [settings for _, settings in found]


@cache
def search_settings(name: str, seed: int) -> tuple[list[Settings], list[int]]:
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
            to_half(predict(one, x, likelihood=task.likelihood))
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


# The methods of a pretrained network. A low-rank change needs a higher rate than the weights themselves.
PRETRAINED = ("definitions",)
LORA: dict[str, Any] = {"lr": (2e-3, 5e-2)}
TAIL: dict[str, Any] = {"tail_lr": (0.05, 1.0)}
CHANGED = ("query", "value")  # the layers that LoRA changes


@method("frozen features", only=PRETRAINED, lr=(3e-4, 3e-2))
def frozen_features(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """Heads alone, as many as the ensemble has members, on what the pretrained network says of a text."""
    body = Body(task.make_net()).requires_grad_(False)
    ensemble = DeepEnsemble(lambda: nn.Linear(body.width, body.classes), task.members, trunk=body)
    return replace(task, epochs=10 * task.epochs).fit(ensemble, train, settings, seed)


class Body(nn.Module):
    """A network without its head."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        head = network.get_submodule("head")
        assert isinstance(head, nn.Linear)
        self.width, self.classes, self.network = head.in_features, head.out_features, network
        network.register_module("head", nn.Identity())

    def forward(self, *x: Tensor) -> Any:
        """Return what the head would read."""
        return self.network(*x)


@method("LoRA ensemble", only=PRETRAINED, **LORA)
def lora_ensemble(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """Members that share the pretrained network, each with its own low-rank change and its own head."""
    return task.fit(LoRAEnsemble(task.make_net, task.members, layers=CHANGED), train, settings, seed)


@method("BatchEnsemble, spread", only=PRETRAINED, fast_lr=(0.1, 10.0), spread=(0.02, 0.5))
def batch_spread(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """BatchEnsemble whose factors start near 1, so that what is pretrained is kept."""
    ensemble = BatchEnsemble(task.make_net, task.members, init=settings["spread"], fast_lr=settings["fast_lr"])
    return task.fit(ensemble, train, settings, seed)


def changed(task: Task) -> nn.Module:
    """Return the pretrained network with a low-rank change to train, and a head."""
    return add_lora(task.make_net(), layers=CHANGED)


@method("LoRA snapshots", only=PRETRAINED, **LORA)
def lora_snapshots(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """One low-rank change, in as many cycles as the ensemble has members."""
    return task.fit(SnapshotEnsemble(partial(changed, task), task.members), train, settings, seed)


@method("LoRA SWAG", only=PRETRAINED, **LORA, **TAIL)
def lora_swag(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """One low-rank change, and samples of the Gaussian around its path; by AdamW, as transformers are trained."""
    ensemble = SWAG(partial(changed, task), task.members, tail_lr=settings["tail_lr"], seed=seed)
    return task.fit(ensemble, train, settings, seed)


for _name, _space in {"single": {}, "LoRA snapshots": LORA, "LoRA SWAG": LORA | TAIL}.items():
    # One network, trained for as long as the networks of the ensemble together.
    method(f"{_name}, long", only=PRETRAINED, long=True, **_space)(METHODS[_name].train)


@method("deep, as single", like="single")
def as_single(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """A deep ensemble with the single network's settings: what is left when the luck of tuning is taken out."""
    return task.fit(DeepEnsemble(task.make_net, task.members), train, settings, seed)


@method("BatchEnsemble, as single", like=("single", "BatchEnsemble"))
def batch_as_single(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """BatchEnsemble with the single network's rate and decay; the vectors' rate stays as tuned for BatchEnsemble."""
    return batch_ensemble(task, train, settings, seed)


@method("BatchEnsemble, shared norms", like="BatchEnsemble")
def shared_norms(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """BatchEnsemble whose members share batch norm, its statistics included."""
    return task.fit(BatchEnsemble(task.make_net, task.members, fast_lr=settings["fast_lr"]), train, settings, seed)


@method("deep, one start", like="deep ensemble")
def one_start(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """Members that start from the same weights: only their shuffles differ."""
    first = task.make_net()
    return task.fit(DeepEnsemble(lambda: copy.deepcopy(first), task.members), train, settings, seed)


@method("deep, one order", like="deep ensemble")
def one_order(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """Members that see the same batches: only their starts differ."""

    class OneOrder(DeepEnsemble):
        def batches(self, n: int, batch_size: int, generator: torch.Generator | None = None) -> Iterable[Tensor]:
            shuffle = torch.randperm(n, generator=generator)
            yield from shuffle.expand(self.members, n).split(batch_size, dim=1)

    return task.fit(OneOrder(task.make_net, task.members), train, settings, seed)


@method("deep, bagged", like="deep ensemble")
def bagging(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """Members that each see their own resample of the data, drawn with replacement once."""

    class Bagged(DeepEnsemble):
        def batches(self, n: int, batch_size: int, generator: torch.Generator | None = None) -> Iterable[Tensor]:
            resample = torch.randint(n, (self.members, n), generator=torch.Generator().manual_seed(seed))
            return [resample.gather(1, index) for index in super().batches(n, batch_size, generator)]

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


@method("deep, SGD", like="single, SGD")
def deep_sgd(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """Independent networks trained as the single one by SGD: what SWAG's one run would be compared with."""
    return task.fit(DeepEnsemble(task.make_net, task.members), train, settings, seed, MOMENTUM_SGD)


@method("SWA", like="SWAG")
def swa(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """The mean of SWAG's weights alone: SWAG without its Gaussian."""
    ensemble = SWAG(task.make_net, 1, scale=0.0, tail_lr=settings["tail_lr"], seed=seed)
    return task.fit(ensemble, train, settings, seed, MOMENTUM_SGD)


@method("deep, one setting", like="single")
def one_setting(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """As many networks as a search has trials, all of the single network's setting, and the same greedy choice."""
    networks = [task.make_net() for _ in range(TRIALS)]
    for i, network in enumerate(networks):
        task.fit(DeepEnsemble.of([network]), train, settings, TRIALS * seed + i)
    x, y = task.load(seed)["val"]
    assert y is not None
    said = predict(DeepEnsemble.of(networks), x, likelihood=task.likelihood)
    return HyperEnsemble(networks, greedy_select(said, y, task.members))


@method("single, searched", control=True, **SEARCHED)
def single_searched(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """One network with dropout and a width that are tuned, as a hyperparameter ensemble's candidates have them."""
    return task.fit(DeepEnsemble(partial(candidate, task, settings), 1), train, settings, seed)


@method("deep, searched", control=True, **SEARCHED)
def deep_searched(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """A deep ensemble with the same two, one setting for all members."""
    return task.fit(DeepEnsemble(partial(candidate, task, settings), task.members), train, settings, seed)


@method("MIMO, repeated", like="MIMO")
def repetition(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """MIMO with each example four times in a step, as published: four times the cost."""
    ensemble = MIMO(task.make_net, int(settings["slots"]), share=1 - settings["own"], repeats=4)
    return task.fit(ensemble, train, settings, seed)


@method("single, second trial", like="single", place=1)
def single_second(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """One network with the settings that came second in tuning, by next to nothing on returns."""
    return single(task, train, settings, seed)


@method("deep, second trial", like="deep ensemble", place=1)
def deep_second(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """A deep ensemble with the settings that came second in tuning: what they decide where the test data shift."""
    return task.fit(DeepEnsemble(task.make_net, task.members), train, settings, seed)


@method("BatchEnsemble, second trial", like="BatchEnsemble", place=1)
def batch_second(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """BatchEnsemble with the settings that came second in tuning."""
    return batch_ensemble(task, train, settings, seed)


@method("MIMO, second trial", like="MIMO", place=1)
def second_trial(task: Task, train: tuple[Tensor, Tensor], settings: Settings, seed: int) -> Ensemble:
    """MIMO with the settings that came second in tuning, by next to nothing on digits: what the first place decided."""
    return mimo(task, train, settings, seed)


@cache
def equal_flops_width(name: str) -> int:
    """Return the smallest width at which one network costs the FLOPs of the task's ensemble, at the least."""
    return width_of_flops(name, TASKS[name].members)


@cache
def width_of_flops(name: str, networks: float) -> int:
    """Return the smallest width at which one network costs the FLOPs of so many of the task's, at the least."""
    task = TASKS[name]
    x = task.load(0)["val"][0][:1]

    def flops(width: int) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            task.make(width)(x)
        total: int = counter.get_total_flops()
        return total

    with torch.random.fork_rng(devices=[]):  # else the first network trained would start elsewhere than later ones
        target = networks * flops(task.width)
        return next(width for width in range(1, 100 * task.width) if flops(width) >= target)


@cache
def width_of_weights(name: str, networks: float) -> int:
    """Return the largest width at which one network has no more weights than so many of the task's."""
    task = TASKS[name]

    def weights(width: int) -> int:
        return sum(p.numel() for p in task.make(width).parameters())

    with torch.random.fork_rng(devices=[]):
        most = networks * weights(task.width)
        return max(itertools.takewhile(lambda width: weights(width) <= most, itertools.count(1)), default=1)


def equal_weights_width(name: str) -> int:
    """Return the largest width at which the task's ensemble has no more weights than one network of the task's."""
    return width_of_weights(name, 1 / TASKS[name].members)


def space_of(task: Task, name: str) -> dict[str, tuple[float, float]]:
    """Return the box in which a method's settings are searched on a task; what is trained by SGD has one of its own."""
    own = METHODS[name].space
    space = {**SPACE, **own}
    return space | {key: box for key, box in task.space.items() if key in space and not (key in SPACE and key in own)}


def trial_settings(task: Task, name: str, seed: int = 0, trials: int | None = None) -> list[Settings]:
    """Return the settings of a method's trials: Sobol points, the same for rate and decay of every method."""
    space = space_of(task, name)
    trials = trials or task.trials or TRIALS
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
    sets = task.sets(seed)
    if METHODS[name].long:
        task = replace(task, epochs=task.members * task.epochs)
    x, y = sets["train"]
    assert y is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ensemble = METHODS[name].train(task, (x, y), settings, seed)
    return ensemble, sets
