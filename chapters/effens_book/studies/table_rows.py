"""Tables: how many members TabM wants, which of its changes matter, and what sharing weights does to overfitting."""

import time
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from effens.ensembles.base import Ensemble
from effens.ensembles.batch import BatchEnsemble, RankOneLayer, init_factors
from effens.ensembles.deep import DeepEnsemble
from effens.ensembles.tabm import TabM
from effens.training import predict
from effens_book.benchmark import TASKS, Task
from effens_book.benchmark.methods import train_one
from effens_book.benchmark.predictions import score
from effens_book.benchmark.tasks import Sets
from effens_book.finance import risk
from effens_book.nets import mlp
from effens_book.studies import running
from effens_book.studies.running import Row, study

TABLES = ("airtime", "diamonds")


QUANTILE = 0.95  # of the time in the air, that is planned for


def with_rmse(task: Task, ensemble: Ensemble, seed: int, split: str = "test") -> Row:
    """Score an ensemble, and return the error of its mean and the loss of its 95% quantile, too."""
    x, y = task.load(seed)[split]
    assert y is not None
    said = predict(ensemble, x, likelihood=task.likelihood)
    assert not isinstance(said, Tensor)
    planned = risk.quantile(said, QUANTILE)
    return {
        **score(said, y),
        "rmse": float((said.loc.mean(0) - y).square().mean().sqrt()),
        "pinball": pinball(planned, y),
        "above": 100 * float((y > planned).float().mean()),
    }


def pinball(planned: Tensor, y: Tensor) -> float:
    """Return the pinball loss of a quantile: what is too little costs 19 times what is too much."""
    short = y - planned
    return float(torch.maximum(QUANTILE * short, (QUANTILE - 1) * short).mean())


@study(5, {"task": TABLES, "members": [1, 2, 4, 8, 16, 32]})
def many_members(task: str, members: int, seed: int) -> list[Row]:
    """Give TabM more members, all else as tuned for 16."""
    of, settings = TASKS[task], running.tuned_settings("TabM", task)
    ensemble = running.train(of, lambda: TabM(of.make_net, members, fast_lr=settings["fast_lr"]), settings, seed)
    return [with_rmse(of, ensemble, seed)]


VARIANTS = ("BatchEnsemble, 4", "BatchEnsemble, 16", "signs in the first layer only", "heads of their own")


@study(5, {"task": TABLES, "like": ["BatchEnsemble", "TabM"], "variant": VARIANTS})
def changes(task: str, like: str, variant: str, seed: int) -> list[Row]:
    """Turn BatchEnsemble into TabM, one change after the other, at the tuned settings of the one and of the other."""
    of, settings = TASKS[task], running.tuned_settings(like, task)
    fast_lr = settings["fast_lr"]

    def make() -> Ensemble:
        if variant == VARIANTS[3]:
            return TabM(of.make_net, of.tabm, fast_lr=fast_lr)
        if variant == VARIANTS[2]:
            ensemble = BatchEnsemble(of.make_net, of.tabm, init="ones", fast_lr=fast_lr)
            first = next(layer for layer in ensemble.modules() if isinstance(layer, RankOneLayer))
            first.r.data = init_factors("signs", *first.r.shape)
            return ensemble
        return BatchEnsemble(of.make_net, of.members if variant == VARIANTS[0] else of.tabm, fast_lr=fast_lr)

    return [with_rmse(of, running.train(of, make, settings, seed), seed)]


RIVALS = ("single", "deep ensemble", "BatchEnsemble", "TabM", "narrow", "MIMO", "gradient boosting")


@study(3, {"task": TABLES, "method": RIVALS})
def rivals(task: str, method: str, seed: int) -> list[Row]:
    """Train what is tuned for a table once more, for the error of the mean, and for the time; let nothing else run."""
    of = replace(TASKS[task], pool=TASKS[task].members)
    settings = running.tuned_settings(method, task)
    began = time.perf_counter()
    ensemble, _ = train_one(of, method, settings, seed)
    seconds = time.perf_counter() - began
    row = {**with_rmse(of, ensemble, seed), "seconds": seconds}
    if task == "airtime":  # days of the months that were trained on
        row["above@same"] = with_rmse(of, ensemble, seed, "same")["above"]
    return [row]


FEW = 2000


def few_flights(seed: int) -> Sets:
    """Return the flights, of which as few are trained on as there are diamonds; each seed has others."""
    sets = TASKS["airtime"].load(seed)
    x, y = sets["train"]
    assert y is not None
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:FEW]
    return {**sets, "train": (x[rows], y[rows])}


NOISE = 0.75  # standard deviations of y: on flights the error of the mean is as large


def noisy_diamonds(seed: int) -> Sets:
    """Return the diamonds with noise added to every price, and all else as it was; each seed has other noise."""
    generator = torch.Generator().manual_seed(seed)
    noisy: Sets = {}
    for name, (x, y) in TASKS["diamonds"].load(seed).items():
        assert y is not None
        noisy[name] = x, y + NOISE * torch.randn(y.shape, generator=generator)
    return noisy


NUMBERS = 37  # columns of the flights that are no categories: these follow, one column for each code


def few_columns(seed: int) -> Sets:
    """Return few flights without their categories."""
    return {name: (x[:, :NUMBERS], y) for name, (x, y) in few_flights(seed).items()}


USELESS = 150  # columns that say nothing: the flights have about as many codes of categories


def wide_diamonds(seed: int) -> Sets:
    """Return the diamonds with columns of noise beside their own; each seed has others."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.cat([x, torch.randn(len(x), USELESS, generator=generator)], 1), y)
        for name, (x, y) in TASKS["diamonds"].load(seed).items()
    }


def make_mlp(columns: int, outputs: int, width: int, dropout: float = 0.0) -> nn.Module:
    """Make a network for a table with other columns."""
    return mlp(columns, outputs, width=width, dropout=dropout)


FEW_FLIGHTS = replace(TASKS["airtime"], load=few_flights, epochs=40, batch_size=64)
SHARED = {
    "airtime": TASKS["airtime"],
    "airtime, 2,000 rows": FEW_FLIGHTS,
    "airtime, 2,000 rows, no categories": replace(FEW_FLIGHTS, load=few_columns, make=partial(make_mlp, NUMBERS, 3)),
    "diamonds": TASKS["diamonds"],
    "diamonds, noisy prices": replace(TASKS["diamonds"], load=noisy_diamonds),
    "diamonds, 150 useless columns": replace(
        TASKS["diamonds"], load=wide_diamonds, make=partial(make_mlp, 9 + USELESS, 2)
    ),
}
FACTORS = [0.3, 1, 3]  # of the tuned learning rate: another size or noise may want another one


@study(
    3,
    {
        "task": [*SHARED],
        "method": ["deep ensemble", "TabM"],
        "weight_decay": [0.003, 0.03, 0.1, 0.3, 1.0],
        "factor": FACTORS,
    },
)
def sharing(task: str, method: str, weight_decay: float, factor: float, seed: int) -> list[Row]:
    """Change the weight decay and the learning rate of four networks and of TabM: what overfits, and what it costs."""
    of = SHARED[task]
    tuned = running.tuned_settings(method, of.name)
    settings = {**tuned, "weight_decay": weight_decay, "lr": factor * tuned["lr"]}
    make = (
        partial(DeepEnsemble, of.make_net, of.members)
        if method == "deep ensemble"
        else partial(TabM, of.make_net, of.tabm, fast_lr=settings["fast_lr"])
    )
    try:
        ensemble = running.train(of, make, settings, seed)
        found = {split: running.score_ensemble(of, ensemble, seed, split) for split in ("train", "val", "test")}
        row = {key: found["test"][key] for key in ("nll", "member_nll", "diversity_gain")}
        return [{**row, "fit": found["train"]["member_nll"], "val": found["val"]["nll"]}]
    except FloatingPointError:
        return [{"diverged": 1}]
