"""Studies: one question each, asked on the benchmark's tasks over a grid of settings and several seeds.

A row of the benchmark says how good a method is at its best settings; a study says what one of its settings does.
``python -m effens_book.studies`` runs what is missing, resumes after a kill, and keeps one file of scores a study.

To add a study, write one function that answers for one point of the grid and one seed, and register it with `study`.
"""

import argparse
import heapq
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from tqdm import tqdm

from effens.ensembles.base import Ensemble, check_positive
from effens.ensembles.batch import BatchEnsemble
from effens.ensembles.deep import DeepEnsemble
from effens.ensembles.hyper import HyperEnsemble, greedy_select
from effens.ensembles.mimo import MIMO
from effens.ensembles.snapshot import SnapshotEnsemble
from effens.ensembles.swag import SWAG
from effens.likelihoods import Gaussian
from effens.training import MakeOptimizer, fit, predict
from effens_book import data
from effens_book.benchmark import RESULTS, TASKS, Task, shipped
from effens_book.benchmark.methods import MOMENTUM_SGD, candidate, train_one, trial_settings
from effens_book.benchmark.predictions import log_likelihoods, score, take_members
from effens_book.benchmark.run import provenance, write_json
from effens_book.benchmark.tasks import TUNING_SEEDS, Settings
from effens_book.data import markets
from effens_book.nets import mlp

Row = dict[str, Any]
Answer = Callable[..., list[Row]]
Labelled = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Study:
    """A question.

    Attributes:
        answer: ``(**settings, seed) -> rows``, of which each holds scores, and settings of its own if there are some.
        seeds: how many times it is asked.
        grid: the settings at which it is asked.
    """

    answer: Answer
    seeds: int
    grid: Sequence[Mapping[str, Any]]


STUDIES: dict[str, Study] = {}


def study(seeds: int, *grids: Mapping[str, Sequence[Any]]) -> Callable[[Answer], Answer]:
    """Register a function as a study, by its name; each of ``grids`` is name to values, of which all combinations."""
    points = [dict(zip(grid, point, strict=True)) for grid in grids for point in itertools.product(*grid.values())]

    def register(answer: Answer) -> Answer:
        STUDIES[answer.__name__] = Study(answer, seeds, points)
        return answer

    return register


# ---- The questions. ----


@study(
    8,
    {"kind": ["snapshot"], "parts": [1, 2, 4, 8]},
    {"kind": ["triangular"], "parts": [4]},
    {"kind": ["independent"], "parts": [2, 4, 8]},
    {"kind": ["single"], "parts": [8, 4, 2, 1, 0.5]},
)
def cycles(kind: str, parts: float, seed: int) -> list[Row]:
    """Divide the budget of one network on digits: into cycles, or into independent networks; or train one with less.

    A part is B / ``parts`` epochs, of B in the whole budget; half a part is one network with twice the budget. The
    triangular cycles of Fast Geometric Ensembling share the last fifth of the budget.
    """
    task = TASKS["digits"]
    brief = replace(task, epochs=round(task.epochs / parts))
    if kind in ("snapshot", "triangular"):
        schedule = "cosine" if kind == "snapshot" else kind
        make = partial(SnapshotEnsemble, task.make_net, int(parts), schedule=schedule)
        ensemble = train(task, make, tuned_settings("snapshot"), seed)
    elif kind == "independent":
        ensemble = train(brief, lambda: DeepEnsemble(task.make_net, int(parts)), tuned_settings("deep, short"), seed)
    else:
        ensemble = train(brief, lambda: DeepEnsemble(task.make_net, 1), tuned_settings("single"), seed)
    fitted = score_ensemble(task, ensemble, seed, "train")
    return [{**score_ensemble(task, ensemble, seed), "fit": fitted["member_nll"], "fit_of_mean": fitted["nll"]}]


# Rank and scale; rank 0, the diagonal form, comes last, because deviations are forgotten for it.
FORMS = ((20, 0.0), (20, 0.5), (20, 2.0), (20, 8.0), (0, 1.0))


@study(10, {"lr": [0.003, 0.01, 0.03, 0.1], "tail_lr": [0.03, 0.1, 0.3, 1.0]})
def tails(lr: float, tail_lr: float, seed: int) -> list[Row]:
    """Change the rate of SWAG's tail, on the curve with the gap in batches of 16, so that SGD has noise.

    One training, and all forms drawn from its moments: a row for each rank and scale; and one for the last weights.
    """
    task = replace(TASKS["gap"], batch_size=16, epochs=200)
    settings = {"lr": lr, "weight_decay": 1e-4}
    rows = []
    try:
        ensemble = train(task, lambda: SWAG(task.make_net, 30, tail_lr=tail_lr), settings, seed, MOMENTUM_SGD)
    except FloatingPointError:
        return [{"rank": rank, "scale": scale, "diverged": 1} for rank, scale in FORMS]
    assert isinstance(ensemble, SWAG)
    last = DeepEnsemble.of([ensemble.network])
    rows.append({"rank": -1, "scale": 0.0, **gap_scores(task, last, seed)})
    for rank, scale in FORMS:
        if rank == 0:
            ensemble.deviations.zero_()
        ensemble.scale = scale
        ensemble.finish([])
        row = {"rank": rank, "scale": scale}
        try:
            rows.append({**row, **gap_scores(task, ensemble, seed)})
        except FloatingPointError:
            rows.append({**row, "diverged": 1})
    return rows


@study(8, {"samples": [1, 2, 4, 8, 16, 30]})
def samples(samples: int, seed: int) -> list[Row]:
    """Draw more samples from SWAG on digits."""
    task = TASKS["digits"]
    settings = tuned_settings("SWAG")

    def make() -> Ensemble:
        return SWAG(task.make_net, samples, tail_lr=settings["tail_lr"], seed=seed)

    return [score_ensemble(task, train(task, make, settings, seed, MOMENTUM_SGD), seed)]


@study(
    5,
    {"width": [8, 16, 32, 64], "members": [1], "share": [0.0]},
    {"width": [8, 16, 32, 64], "members": [2, 3], "share": [0.0, 0.5, 0.9]},
)
def capacity(width: int, members: int, share: float, seed: int) -> list[Row]:
    """Give MIMO more or less room on digits; one member is the plain network. Tuned at width 16, and kept."""
    task = replace(TASKS["digits"], width=width)
    settings = tuned_settings("MIMO" if members > 1 else "single")
    ensemble = train(task, lambda: MIMO(task.make_net, members, share), settings, seed)
    return [
        {**score_ensemble(task, ensemble, seed), "fit": score_ensemble(task, ensemble, seed, "train")["member_nll"]}
    ]


BUDGET = 20  # trainings


@study(8, {"task": ["digits", "gap"]})
def search(task: str, seed: int) -> list[Row]:
    """Spend 20 trainings in four ways: a row for each; selected on validation data, scored on test data.

    Greedy and top: chosen among 20 candidates. Best, retrained: the best of the first 16, or of fewer where the
    ensemble is larger, trained again from M seeds. Stratified: those that are chosen greedily of the first 10, trained
    again with the rest of the budget, and chosen from all.
    """
    of = TASKS[task]
    x, y = of.load(seed)["val"]
    assert y is not None
    points = trial_settings(of, "hyper", seed, BUDGET)
    start = 1000 + 3 * BUDGET * seed

    def trained(number: int, settings: Settings) -> nn.Module:
        """Train a candidate; one that diverges is as good as one that was not trained."""
        try:
            make = partial(candidate, of, settings)
            ensemble = train(of, lambda: DeepEnsemble.of([make()]), settings, start + number, draw=seed)
        except FloatingPointError:
            return candidate(of, settings)
        return ensemble.member(0).eval()

    networks = [trained(i, settings) for i, settings in enumerate(points)]
    said = predict(DeepEnsemble.of(networks), x, likelihood=of.likelihood)
    ranked = (-log_likelihoods(said, y).mean(1)).argsort().tolist()
    first = next(i for i in ranked if i < BUDGET - of.members)
    best = [trained(BUDGET + m, points[first]) for m in range(of.members)]
    half = BUDGET // 2
    few = sorted(set(greedy_select(take_members(said, torch.arange(half)), y, of.members)))
    again = [trained(2 * BUDGET + j, points[few[j % len(few)]]) for j in range(half)]
    pool = [*networks[:half], *again]
    mixed = greedy_select(predict(DeepEnsemble.of(pool), x, likelihood=of.likelihood), y, of.members)
    ways: dict[str, Ensemble] = {
        "greedy": HyperEnsemble(networks, greedy_select(said, y, of.members)),
        "top": HyperEnsemble(networks, ranked[: of.members]),
        "best, retrained": DeepEnsemble.of(best),
        "stratified": HyperEnsemble(pool, mixed),
        "best, alone": DeepEnsemble.of([networks[ranked[0]]]),
    }
    return [
        {
            "way": way,
            "unique": len(set(getattr(ensemble, "index", range(ensemble.members)))),
            "val": score_ensemble(of, ensemble, seed, "val")["nll"],
            **score_ensemble(of, ensemble, seed),
        }
        for way, ensemble in ways.items()
    ]


DECAYED = ["single", "deep ensemble", "BatchEnsemble", "snapshot", "MIMO"]


@study(5, {"task": ["digits", "diamonds"], "method": DECAYED, "weight_decay": [0.003, 0.03, 0.1, 0.3, 1.0, 3.0]})
def decay(task: str, method: str, weight_decay: float, seed: int) -> list[Row]:
    """Change the weight decay alone, with all else tuned: does the order of the methods hold?"""
    settings = {**tuned_settings(method, task), "weight_decay": weight_decay}
    try:
        ensemble, _ = train_one(TASKS[task], method, settings, seed)
        return [score_ensemble(TASKS[task], ensemble, seed)]
    except FloatingPointError:
        return [{"diverged": 1}]


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


# ---- What they share. ----


def tuned_settings(name: str, task: str = "digits") -> Settings:
    """Return a method's tuned settings, from the benchmark."""
    return shipped().settings(task, name)


def train(
    task: Task,
    make: Callable[[], Ensemble],
    settings: Settings,
    seed: int,
    optimizer: MakeOptimizer = torch.optim.AdamW,
    draw: int | None = None,
) -> Ensemble:
    """Train an ensemble as the benchmark does; ``draw`` is the seed of the data, if that is another."""
    x, y = task.load(seed if draw is None else draw)["train"]
    assert y is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return task.fit(make(), (x, y), settings, seed, optimizer)


def score_ensemble(task: Task, ensemble: Ensemble, seed: int, split: str = "test") -> Row:
    """Score an ensemble on one of the task's sets; raise `FloatingPointError` if a score is not finite."""
    x, y = task.load(seed)[split]
    assert y is not None
    result = score(predict(ensemble, x, likelihood=task.likelihood), y)
    if lost := [key for key, value in result.items() if not math.isfinite(value)]:
        raise FloatingPointError(f"scores must be finite, got {lost} that are not")
    return dict(result)


def gap_scores(task: Task, ensemble: Ensemble, seed: int) -> Row:
    """Score on test data and in the gap, and on validation data to choose by."""
    inside = score_ensemble(task, ensemble, seed, "gap")
    result = {**score_ensemble(task, ensemble, seed), "val": score_ensemble(task, ensemble, seed, "val")["nll"]}
    result["fit"] = score_ensemble(task, ensemble, seed, "train")["nll"]
    result |= {f"{key}@gap": inside[key] for key in ("nll", "coverage", "spread")}
    return result


# ---- Running and reading. ----


def path_of(name: str) -> Path:
    """Return where a study is kept."""
    return RESULTS / "studies" / f"{name}.json"


def run(name: str, shown: "tqdm[Any] | None" = None) -> None:
    """Ask what is not answered yet; every answer is kept at once."""
    asked, path = STUDIES[name], path_of(name)
    rows: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []
    for point in asked.grid:
        for seed in range(asked.seeds):
            if not matching(rows, {**point, "seed": seed}):
                found = asked.answer(**point, seed=seed)
                rows += [{**point, "seed": seed, **row} for row in found]
                write_json(path, {"study": name, **provenance(), "rows": [round_row(row) for row in rows]})
            if shown is not None:
                shown.update()
    read.cache_clear()


def round_row(row: Row) -> Row:
    """Round scores to six digits."""
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()}


def matching(rows: Sequence[Row], where: Mapping[str, Any]) -> list[Row]:
    """Return the rows that hold these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in where.items())]


@cache
def read(name: str) -> list[Row]:
    """Read a study's rows.

    Raises:
        FileNotFoundError: the study was not run.
    """
    path = path_of(name)
    if not path.exists():
        raise FileNotFoundError(f"results must hold the study {name}, got none: run python -m effens_book.studies")
    rows: list[Row] = json.loads(path.read_text())["rows"]
    return rows


def values(name: str, metric: str, **where: Any) -> Tensor:
    """Return one score of a study at one point of its grid, a number for each seed, (seeds,).

    Args:
        name: of the study.
        metric: a score, as of `predictions.score`, or one of the study's own.
        where: settings that name the point.

    Raises:
        KeyError: there is no such point, or it has no such score.
        ValueError: the settings name more than one point.
    """
    rows = matching(read(name), where)
    if not rows or any(metric not in row for row in rows):
        raise KeyError(f"the study {name} must hold {metric} at {where}, got none")
    seeds = [row["seed"] for row in rows]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"settings must name one point of the study {name}, got {len(rows)} rows at {where}")
    return torch.tensor([float(row[metric]) for row in sorted(rows, key=lambda row: row["seed"])])


def makespan(seconds: Iterable[float], workers: int) -> float:
    """Return when the last of some trainings ends, where each worker that is free takes the longest one that is left.

    It is at most 4/3 of the best there could be (Graham, 1969, "Bounds on multiprocessing timing anomalies",
    doi:10.1137/0117039).

    Args:
        seconds: of each training.
        workers: how many run at once.

    Example:
        >>> makespan([60.0] * 12, workers=11)  # as long as on six
        120.0
    """
    check_positive(workers=workers)
    ends = [0.0] * workers
    for each in sorted(seconds, reverse=True):
        heapq.heappush(ends, heapq.heappop(ends) + each)
    return max(ends)


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(prog="python -m effens_book.studies", description=main.__doc__)
    parser.add_argument("--studies", nargs="+", default=list(STUDIES), choices=STUDIES)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)  # so that numbers do not depend on how many cores there are
    for name in chosen.studies:
        with tqdm(total=len(STUDIES[name].grid) * STUDIES[name].seeds, desc=name, unit="run") as shown:
            run(name, shown)


if __name__ == "__main__":
    main()
