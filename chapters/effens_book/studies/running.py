"""What studies share: how they are registered, run, resumed and read; how an ensemble is trained and scored in them."""

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from effens.ensembles.base import Ensemble
from effens.training import MakeOptimizer, predict
from effens_book.benchmark import RESULTS, Task, shipped
from effens_book.benchmark.predictions import score
from effens_book.benchmark.run import provenance, write_json
from effens_book.benchmark.tasks import Settings

Row = dict[str, Any]
Answer = Callable[..., list[Row]]


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


def path_of(name: str) -> Path:
    """Return where a study is kept."""
    return RESULTS / "studies" / f"{name}.json"


def run(name: str, shown: "tqdm[Any] | None" = None) -> None:
    """Ask what is not answered yet; every answer is kept at once."""
    asked, path = STUDIES[name], path_of(name)
    rows = unpack(json.loads(path.read_text())) if path.exists() else []
    for point in asked.grid:
        for seed in range(asked.seeds):
            if not matching(rows, {**point, "seed": seed}):
                found = asked.answer(**point, seed=seed)
                rows += [{**point, "seed": seed, **row} for row in found]
                write_json(path, {"study": name, **provenance(), **pack([round_row(row) for row in rows])})
            if shown is not None:
                shown.update()
    read.cache_clear()


def round_row(row: Row) -> Row:
    """Round scores to six digits."""
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()}


def pack(rows: Sequence[Row]) -> dict[str, Any]:
    """Name the columns once, and give each row their values, None where it has none."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return {"columns": columns, "rows": [[row.get(key) for key in columns] for row in rows]}


def unpack(content: Mapping[str, Any]) -> list[Row]:
    """Return the rows of `pack`."""
    named = (zip(content["columns"], row, strict=True) for row in content["rows"])
    return [{key: value for key, value in row if value is not None} for row in named]


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
    return unpack(json.loads(path.read_text()))


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
