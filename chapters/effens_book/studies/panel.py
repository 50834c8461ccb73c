"""Forecasts of many assets at once, trained twice: what changes because of the retraining alone."""

import math
from functools import cache, partial
from typing import Any

import torch
from scipy.stats import rankdata
from torch import Tensor

from effens.ensembles.batch import BatchEnsemble
from effens.ensembles.deep import DeepEnsemble
from effens.likelihoods import Gaussian
from effens.training import fit, predict
from effens_book import data
from effens_book.benchmark.tasks import TUNING_SEEDS
from effens_book.data import markets
from effens_book.nets import mlp
from effens_book.studies.running import Row, study

Labelled = dict[str, tuple[Tensor, Tensor]]
PANEL_DAYS, PANEL_ASSETS, PANEL_FEATURES = 400, 50, 8
PANEL_GRID = [(lr, decay) for lr in (1e-3, 3e-3, 1e-2) for decay in (0.01, 0.3, 3.0)]
POOL = 32


@study(
    8, {"source": ["R2 0.002", "R2 0.01", "R2 0.05", "stocks"], "kind": ["linear", "single", "deep", "BatchEnsemble"]}
)
def panel(source: str, kind: str, seed: int) -> list[Row]:
    """Forecast many assets at once, train again, and see what changes: a row for each number of members.

    Half of the simulated signal is linear, half a product of two features. Two retrainings are compared: "ranks" is the
    rank correlation of their forecasts over the assets, the mean over days; "turnover" the share of a book that would
    change hands because of the retraining alone; "skill" the rank correlation with the signal, where it is known, and
    with what happened, of stocks. Settings come from validation data of other draws (of the stocks: of other starts),
    nine trials for each kind.
    """
    sets, target = panel_sets(source, seed)
    if kind == "linear":
        x, y = (part.double() for part in sets["train"])
        weights = torch.linalg.lstsq(x, y[:, None]).solution
        said = (sets["test"][0].double() @ weights)[:, 0].view(target.shape)
        return [{"members": 1, "ranks": 1.0, "turnover": 0.0, "skill": rank_correlation(said, target)}]
    lr, decay = panel_settings(source, kind)
    sizes = {"single": [1], "deep": [1, 2, 4, 8, 16], "BatchEnsemble": [2, 4, 8, 16]}[kind]
    rows = []
    pool = panel_forecasts(sets, kind, POOL, lr, decay, seed) if kind != "BatchEnsemble" else None
    for members in sizes:
        if pool is not None:
            books = [part.mean(0).view(target.shape) for part in pool.split(members)]
        else:
            books = [
                panel_forecasts(sets, kind, members, lr, decay, 1000 * (1 + again) + seed).mean(0).view(target.shape)
                for again in range(2)
            ]
        pairs = list(zip(books[::2], books[1::2], strict=False))
        rows.append(
            {
                "members": members,
                "ranks": sum(rank_correlation(a, b) for a, b in pairs) / len(pairs),
                "turnover": sum(turnover(a, b) for a, b in pairs) / len(pairs),
                "skill": sum(rank_correlation(book, target) for book in books) / len(books),
                "lr": lr,
                "weight_decay": decay,
            }
        )
    return rows


def panel_sets(source: str, seed: int) -> tuple[Labelled, Tensor]:
    """Return rows (days * assets, features) to train, choose and judge on, and what to rank by, (days, assets)."""
    if source == "stocks":
        task = markets.task(data.stock_prices())
        (split,) = markets.walk_forward(task, ["2015-01-01"], end="2018-01-01", validation=500)
        x = markets.standardize(task.x, split.train)
        y = task.y - task.y.mean(1, keepdim=True)  # against the other stocks
        y = y / y[split.train].std()
        parts = {"train": split.train, "val": split.val, "test": split.test}
        sets = {name: (x[rows].flatten(0, 1), y[rows].flatten()) for name, rows in parts.items()}
        return sets, y[split.test]
    r2 = float(source.removeprefix("R2 "))
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(PANEL_FEATURES, generator=generator)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, days in {"train": PANEL_DAYS, "val": 100, "test": 100}.items():
        x = torch.randn(days * PANEL_ASSETS, PANEL_FEATURES, generator=generator)
        signal = (x @ weights / weights.norm() + x[:, 0] * x[:, 1]) / math.sqrt(2)  # of variance 1
        noise = torch.randn(len(x), generator=generator)
        found[name] = (x, math.sqrt(r2) * signal + math.sqrt(1 - r2) * noise)
    return found, signal.view(-1, PANEL_ASSETS)


@cache
def panel_settings(source: str, kind: str) -> tuple[float, float]:
    """Return the rate and the decay with the lowest validation loss, of eight members or one, over two draws."""
    members = 1 if kind == "single" else 8
    losses = []
    for lr, decay in PANEL_GRID:
        total = 0.0
        for seed in TUNING_SEEDS:
            sets, _ = panel_sets(source, seed)
            said = panel_forecasts(sets, kind, members, lr, decay, seed, "val").mean(0)
            total += float((said - sets["val"][1]).square().mean())
        losses.append(total)
    return PANEL_GRID[losses.index(min(losses))]


def panel_forecasts(
    sets: Labelled, kind: str, members: int, lr: float, decay: float, seed: int, split: str = "test"
) -> Tensor:
    """Train, and return every member's forecasts, (members, rows)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        make = partial(mlp, PANEL_FEATURES, 2, width=32)
        ensemble = (BatchEnsemble if kind == "BatchEnsemble" else DeepEnsemble)(make, members)
        likelihood = Gaussian()
        given: Any = {"epochs": 4, "batch_size": 256, "lr": lr, "weight_decay": decay, "likelihood": likelihood}
        fit(ensemble, sets["train"], **given, device="cpu", seed=seed, progress=False)
    said: Tensor = predict(ensemble, sets[split][0], likelihood=likelihood).loc
    return said


def ranks_of(x: Tensor) -> Tensor:
    """Return ranks over the last dimension, centered, equals sharing their mean: (days, assets)."""
    ranks = torch.from_numpy(rankdata(x.numpy(), axis=-1))
    return ranks - ranks.mean(-1, keepdim=True)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Return the rank correlation over assets, the mean over days; 0 on a day on which all of either are equal."""
    first, second = ranks_of(a), ranks_of(b)
    sizes = (first.square().sum(-1) * second.square().sum(-1)).sqrt()
    return float(((first * second).sum(-1) / sizes.clamp_min(0.5)).mean())  # two assets that differ have 0.5


def turnover(a: Tensor, b: Tensor) -> float:
    """Return how much of a book that is proportional to ranks changes hands from one to the other, in percent."""
    first, second = (each / each.abs().sum(-1, keepdim=True).clamp_min(1) for each in (ranks_of(a), ranks_of(b)))
    return 100 * float((first - second).abs().sum(-1).mean()) / 2
