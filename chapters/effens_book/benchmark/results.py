"""What the benchmark found: predictions, scores with their intervals, comparisons and costs."""

import itertools
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from effens import scores
from effens_book.benchmark.methods import METHODS
from effens_book.benchmark.packing import Row, read_row
from effens_book.benchmark.predictions import (
    count_members,
    distribution,
    divergence,
    groups,
    log_likelihoods,
    log_mean,
    parameters,
    score,
    take_members,
    tempered,
)
from effens_book.benchmark.tasks import GRADES, MARGIN, PRIMARY, TASKS, Settings

RESULTS = Path(__file__).parents[1] / "results"
COMMAND = "run python -m effens_book.benchmark"
BASELINES = {
    "single, temperature": "single",
    "single, long, temperature": "single, long",
}  # derived from another method's predictions


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95% t interval, and the p-value of a true mean of 0, by the same t."""

    mean: float
    half: float
    p_value: float = math.nan

    def __format__(self, spec: str) -> str:
        """Write both numbers alike: ``f"{interval:.1f}"``, three decimals by default."""
        return f"{self.mean:{spec or 'z.3f'}} ± {self.half:{spec.lstrip('+') or '.3f'}}"  # z: no sign before a zero

    def __str__(self) -> str:
        return format(self)


def interval(sample: Tensor, block: int = 1) -> Interval:
    r"""Return the mean of a score, and half of its 95% t interval: for other seeds, and for other test examples.

    With a score of each seed, ``(seeds,)``, only seeds vary. With one of each seed and example, both do:

    .. math:: \frac{s^2_{seeds}}{S} + \left(\frac{s^2_{examples}}{N} - \frac{s^2_{residual}}{S N}\right)_+

    is the variance of the mean, where the first two are variances of means over examples and over seeds; the
    degrees of freedom are Satterthwaite's, S - 1 where seeds dominate.

    Args:
        sample: ``(seeds,)`` or ``(seeds, n)``.
        block: examples in a row of which the mean counts as one, for days that are not independent.
    """
    sample = sample.double() if sample.dim() > 1 else sample.double()[:, None]
    sample = sample[:, : sample.shape[1] // block * block].unflatten(1, (-1, block)).mean(2)
    seeds, n = sample.shape
    if seeds < 2:
        raise ValueError(f"an interval needs at least 2 seeds, got {seeds}")
    mean, by_seed, by_example = sample.mean(), sample.mean(1), sample.mean(0)
    of_seeds, of_examples = by_seed.var().item() / seeds, 0.0
    if n > 1:
        residual = (sample - by_seed[:, None] - by_example + mean).square().sum().item() / (seeds - 1) / (n - 1)
        of_examples = max(by_example.var().item() / n - residual / (seeds * n), 0.0)
    variance = of_seeds + of_examples
    spread = of_seeds**2 / (seeds - 1) + (of_examples**2 / (n - 1) if n > 1 else 0.0)
    if not variance:
        return Interval(mean.item(), 0.0, float(mean == 0))
    t = stats.t(variance**2 / spread)
    error = math.sqrt(variance)
    return Interval(mean.item(), float(t.ppf(0.975)) * error, float(2 * t.sf(abs(mean.item()) / error)))


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


class Results:
    """The results in a folder: by default those that the book was written from.

    Args:
        results: the folder.
    """

    def __init__(self, results: Path | str | None = None) -> None:
        self.folder = RESULTS if results is None else Path(results)
        self.rows: dict[tuple[str, str], Row] = {}
        self.scores: dict[tuple[str, str, int, str], dict[str, float]] = {}
        self.aurocs: dict[tuple[str, str, str], Tensor] = {}
        self.kept_losses: dict[tuple[str, str, str], Tensor] = {}

    def path(self, task: str, name: str) -> Path:
        """Return where a method's row of a task is kept."""
        return self.folder / task / f"{name.replace(' ', '-')}.npz"

    def has(self, task: str, name: str) -> bool:
        """Say whether a method's row of a task is among the results."""
        return self.path(task, BASELINES.get(name, name)).exists()

    def row(self, task: str, name: str) -> Row:
        """Return what a method did on a task.

        Raises:
            FileNotFoundError: that is not among the results.
            ValueError: the task was defined otherwise when the row was made.
        """
        if (task, name) not in self.rows:
            path = self.path(task, name)
            if not path.exists():
                raise FileNotFoundError(f"results must hold {task}, {name}, got no such row: {COMMAND}")
            of = TASKS[task]
            self.rows[task, name] = read_row(path, of.digest, lambda seed, key: of.load(seed)[key][1], of.likelihood)
        return self.rows[task, name]

    def forget(self, task: str, name: str) -> None:
        """Read a method's row again when it is asked for: its file was written."""
        self.rows.pop((task, name), None)
        self.scores.clear()
        self.aurocs.clear()
        self.kept_losses.clear()

    def predictions(self, task: str, name: str, seed: int, split: str = "test") -> Any:
        """Return every member's prediction: probabilities (members, n, classes), or a distribution (members, n).

        The baseline "single, temperature" is the single network's prediction, its confidence set on validation data.
        """
        found = self.row(task, BASELINES.get(name, name)).predictions[split, seed]
        return self.temper(task, BASELINES[name], seed, found) if name in BASELINES else found

    def pool(self, task: str, split: str = "test", seed: int = 0) -> Any:
        """Return the predictions of all independent networks that saw the same data.

        On real data these are the members of every seed's deep ensemble; on the generated task, where every seed has
        data of its own, those of one seed.
        """
        if TASKS[task].fresh:
            return self.predictions(task, "deep ensemble", seed, split)
        found = [self.predictions(task, "deep ensemble", s, split) for s in range(TASKS[task].seeds)]
        if isinstance(found[0], Tensor):
            return torch.cat(found)
        parts = zip(*map(parameters, found), strict=True)
        return distribution(type(found[0]), map(torch.cat, parts))

    def targets(self, task: str, seed: int, split: str) -> Tensor:
        """Return the right answers of a set, (n,); raise `ValueError` if there are none."""
        y = TASKS[task].load(seed)[split][1]
        if y is None:
            raise ValueError(f"scores need a set with right answers, got {split}, which has none")
        return y

    def temper(self, task: str, name: str, seed: int, prediction: Any) -> Any:
        """Return one network's prediction, its confidence set on validation data by one number."""
        y = self.targets(task, seed, "val")
        val = self.predictions(task, name, seed, "val")
        return tempered(prediction, val, y)

    def seed_scores(self, task: str, name: str, seed: int, split: str) -> dict[str, float]:
        """Return the scores of one seed; of a pool, the mean over its disjoint groups of ``members``."""
        key = (task, name, seed, split)
        if key in self.scores:
            return self.scores[key]
        if "scores" in (facts := self.row(task, BASELINES.get(name, name)).facts[seed]):
            return dict(facts["tempered" if name in BASELINES else "scores"][split])
        y = self.targets(task, seed, split)
        prediction = self.predictions(task, name, seed, split)
        parts = groups(prediction, TASKS[task].members) if name == "deep ensemble" else [prediction]
        rows = [score(part, y) for part in parts]
        if (truth := TASKS[task].truth) is not None:
            exact = truth(seed, split)
            rows = [{**row, "divergence": divergence(exact, part)} for row, part in zip(rows, parts, strict=True)]
        self.scores[key] = {metric: float(np.mean([row[metric] for row in rows])) for metric in rows[0]}
        return self.scores[key]

    def values(self, task: str, name: str, metric: str = PRIMARY, split: str = "test") -> Tensor:
        """Return one score of every seed, (seeds,).

        Args:
            task: its name.
            name: of the method.
            metric: a score; ``"auroc"`` says how well entropy separates the set ``split`` from the test set.
            split: a set, or a grade of shifts, ``"mild"``, ``"medium"`` or ``"strong"``: the mean over its sets.
        """
        if split in GRADES:
            return torch.stack([self.values(task, name, metric, shift) for shift in GRADES[split]]).mean(0)
        if metric == "auroc":
            return self.auroc(task, name, split)
        if metric == PRIMARY and (losses := self.losses(task, name, split)) is not None and not TASKS[task].large:
            return losses.double().mean(1).float()
        return torch.tensor([self.seed_scores(task, name, seed, split)[metric] for seed in range(TASKS[task].seeds)])

    def losses(self, task: str, name: str, split: str = "test") -> Tensor | None:
        """Return the NLL of each example for each seed, (seeds, n), in nats, or None.

        There is none of what a large task does not keep: other sets than the test set, and the single network with its
        temperature corrected.
        """
        of = TASKS[task]
        if split in GRADES or (of.large and (split != "test" or name in BASELINES)):
            return None
        if (task, name, split) not in self.kept_losses:
            found = []
            for seed in range(of.seeds):
                if of.large:
                    found.append(-self.row(task, name).logs[split, seed])
                    continue
                prediction, y = self.predictions(task, name, seed, split), self.targets(task, seed, split)
                parts = groups(prediction, of.members) if name == "deep ensemble" else [prediction]
                found.append(-torch.stack([log_mean(log_likelihoods(part, y)) for part in parts]).mean(0))
            self.kept_losses[task, name, split] = torch.stack(found)
        return self.kept_losses[task, name, split]

    def auroc(self, task: str, name: str, outside: str) -> Tensor:
        """Return how well total entropy tells ``outside`` from the test set, of every seed, (seeds,), in percent."""
        if (task, name, outside) not in self.aurocs:
            result = []
            for seed in range(TASKS[task].seeds):
                if "scores" in (facts := self.row(task, BASELINES.get(name, name)).facts[seed]):
                    kept = facts["tempered" if name in BASELINES else "scores"]
                    result.append(torch.tensor(kept[outside]["auroc"]))
                    continue
                found = [self.predictions(task, name, seed, split) for split in ("test", outside)]
                result.append(100 * scores.auroc(*(scores.total_entropy(probs) for probs in found)))
            self.aurocs[task, name, outside] = torch.stack(result)
        return self.aurocs[task, name, outside]

    def compare(
        self, task: str, a: str, b: str, metric: str = PRIMARY, split: str = "test", margin: float = MARGIN
    ) -> Comparison:
        """Return by how much ``a`` differs from ``b``: lower, higher, tied (inside the margin), or unresolved.

        The interval of a difference in NLL is one for other seeds and for other examples, where `losses` has those of
        both and all seeds share them; of another score, and elsewhere, for other seeds.
        """
        gap = self.values(task, a, metric, split) - self.values(task, b, metric, split)
        first, second = (self.losses(task, name, split) if metric == PRIMARY else None for name in (a, b))
        paired = gap if first is None or second is None or TASKS[task].fresh else first - second
        difference = interval(paired, TASKS[task].block if paired.dim() > 1 else 1)
        low, high = difference.mean - difference.half, difference.mean + difference.half
        if -margin < low and high < margin:
            verdict = "tied"
        elif low > 0 or high < 0:
            verdict = "lower" if high < 0 else "higher"
        else:
            verdict = "unresolved"
        return Comparison(difference, int((gap < 0).sum()), len(gap), verdict)

    def holm(
        self, task: str, reference: str, rows: Iterable[str] | None = None, metric: str = PRIMARY, split: str = "test"
    ) -> dict[str, float]:
        """Return the p-value of each method's difference from a reference, adjusted for how many there are.

        Holm (1979), "A simple sequentially rejective multiple test procedure". A table in which no method differs from
        the reference shows an adjusted p-value below 0.05 in one case of 20, however many rows it has.

        Args:
            task: its name.
            reference: the method that the others are compared with.
            rows: these others; by default every other row of the tables.
            metric: a score.
            split: the set on which it is scored.

        Returns:
            Adjusted p-values by method, the smallest first; 1 where a method is the reference in every seed.
        """
        from statsmodels.stats.multitest import multipletests  # here: it takes a second to load

        others = [name for name in (names(task=task) if rows is None else rows) if name != reference]
        found = {name: self.compare(task, name, reference, metric, split).difference.p_value for name in others}
        adjusted = multipletests(list(found.values()), method="holm")[1].tolist()
        return dict(sorted(zip(found, adjusted, strict=True), key=lambda item: item[1]))

    def curve(
        self, task: str, members: Iterable[int], metric: str = PRIMARY, split: str = "test", subsets: int = 100
    ) -> Tensor:
        """Return a score of random subsets of the pool, (sizes, subsets): how a deep ensemble depends on its members.

        Subsets of a pool overlap, so their spread says what luck in the choice of networks does, and is no interval.

        Raises:
            ValueError: a size is below 1, or above the pool's.
        """
        found, y = self.pool(task, split), self.targets(task, 0, split)
        generator = torch.Generator().manual_seed(0)
        size = count_members(found)
        logs = log_likelihoods(found, y)
        quick: dict[str, Callable[[Tensor], Tensor]] = {
            "nll": lambda part: -log_mean(part).mean(),
            "member_nll": lambda part: -part.mean(),
            "diversity_gain": lambda part: log_mean(part).mean() - part.mean(),
        }
        rows = []
        for m in members:
            if not 1 <= m <= size:
                raise ValueError(f"members must be in 1 ... {size}, got {m}")
            drawn = [torch.randperm(size, generator=generator)[:m] for _ in range(subsets)]
            if metric in quick:
                rows.append(torch.stack([quick[metric](logs[index]) for index in drawn]))
            else:
                row = [score(take_members(found, index), y)[metric] for index in drawn]
                rows.append(torch.tensor(row, dtype=torch.float64))
        return torch.stack(rows)

    def choices(self, task: str, name: str, seed: int, members: int) -> list[Tensor]:
        """Return every way to take so many of the members that a run kept; all of them where it has no more.

        A search adds its networks in an order, so of those it is the first: what it would have chosen of this size.
        """
        rows = self.row(task, name).facts[seed].get("rows")
        if rows is not None:
            return [torch.arange(max(k for k in range(len(rows) + 1) if len(set(rows[:k])) <= members))]
        kept = min(count_members(self.predictions(task, name, seed)), TASKS[task].members)
        return [torch.tensor(index) for index in itertools.combinations(range(kept), min(members, kept))]

    def at_members(self, task: str, name: str, members: int, split: str = "test") -> tuple[float, float]:
        """Return (member_nll, diversity_gain) of a smaller ensemble, the mean over seeds and all choices of members."""
        points = []
        for seed in range(TASKS[task].seeds):
            logs = log_likelihoods(self.predictions(task, name, seed, split), self.targets(task, seed, split))
            parts = [logs[index] for index in self.choices(task, name, seed, members)]
            points.append(np.mean([[-part.mean(), log_mean(part).mean() - part.mean()] for part in parts], 0))
        loss, gain = np.mean(points, 0)
        return float(loss), float(gain)

    def settings(self, task: str, name: str) -> Settings:
        """Return the settings of a method's best trial; of a variant, those of the methods that it is like."""
        method, task = METHODS[name], TASKS[task].tuned_on or task
        if not method.tuned:
            return {}
        found: Settings = {}
        for other in reversed(method.like or (name,)):
            best = self.ranked_trials(task, other)[method.place if method.like else 0]
            found |= self.trials(task, other)[best]["settings"]
        return found

    def trials(self, task: str, name: str) -> list[dict[str, Any]]:
        """Return a method's tuning trials on a task, in the order of `trial_settings`."""
        path = self.folder / task / "tuning.json"
        kept = json.loads(path.read_text("utf-8")) if path.exists() else {}
        if name not in kept:
            raise FileNotFoundError(f"results must hold the trials of {task}, {name}, got none: {COMMAND}")
        found: list[dict[str, Any]] = kept[name]
        return found

    def trial_scores(self, task: str, name: str) -> list[float]:
        """Return the mean validation score of each trial; infinite where a training diverged."""
        found = [trial[PRIMARY] for trial in self.trials(task, name)]
        return [math.inf if None in values else float(np.mean(values)) for values in found]

    def ranked_trials(self, task: str, name: str) -> list[int]:
        """Return the numbers of a method's trials, the one that is chosen first: of those on most seeds the lowest."""
        found, trials = self.trial_scores(task, name), self.trials(task, name)
        return sorted(range(len(found)), key=lambda i: (math.isinf(found[i]), -len(trials[i][PRIMARY]), found[i]))

    def costs(self, task: str, name: str, device: str = "cpu") -> dict[str, Any]:
        """Return what a method costs on the machine on which it was measured: the fields of `effens.Costs`.

        Args:
            task: its name.
            name: of the method.
            device: ``"cpu"``, or ``"cuda"``: the GPU on which ``python -m effens_book.benchmark --gpu`` was run.

        Raises:
            FileNotFoundError: that was not measured.
        """
        name = BASELINES.get(name, name)
        path = self.costs_path(task, device)
        kept = json.loads(path.read_text("utf-8")) if path.exists() else {}
        if name not in kept:
            where, option = ("", "") if device == "cpu" else (f" on {device}", " --gpu")
            raise FileNotFoundError(
                f"results must hold the costs of {task}, {name}{where}, got none: {COMMAND}{option}"
            )
        found: dict[str, Any] = kept[name]
        return found

    def costs_path(self, task: str, device: str) -> Path:
        """Return where a task's costs on a kind of device are kept."""
        kind = torch.device(device).type
        return self.folder / task / ("costs.json" if kind == "cpu" else f"costs-{kind}.json")

    def relative_costs(self, task: str, name: str, device: str = "cpu") -> dict[str, float]:
        """Return a method's costs as multiples of the single network's, on the CPU or on a GPU, ``"cuda"``.

        Training is the time of a step of the task's epochs, at batch 128; prediction the median latency at batch 1 and
        256; memory the bytes of all weights. Training memory is the peak of a step, and tuning the time of all trials,
        in trainings of one network: a hyperparameter ensemble has none but its training.
        """

        def facts(row: str) -> dict[str, float]:
            found = self.costs(task, row, device)
            return {
                "training": found["train_seconds"],
                "batch 1": found["latency_p50"]["1"],
                "batch 256": found["latency_p50"]["256"],
                "memory": found["stored_bytes"],
                "training memory": found["peak_bytes"],
            }

        one = facts("single")
        costs = {key: value / one[key] for key, value in facts(name).items()}
        method = BASELINES.get(name, name)
        trials = self.trials(task, method) if METHODS[method].tuned else []
        return {**costs, "tuning": costs["training"] * sum(len(trial[PRIMARY]) for trial in trials)}


def names(controls: bool = False, task: str = "") -> list[str]:
    """Return every row of a table: the methods, each followed by the baselines derived from it; or controls, too.

    Without a task they are the methods that are run on every task.
    """
    chosen = [name for name, method in METHODS.items() if controls or not method.control]
    chosen = [name for name in chosen if not METHODS[name].only or task in METHODS[name].only]
    if task and TASKS[task].rows:
        chosen = list(TASKS[task].rows)
    return [row for name in chosen for row in (name, *(key for key, value in BASELINES.items() if value == name))]
