"""The benchmark as a reader meets it: its results, and tables of them."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache

from effens_book.benchmark.results import COMMAND, Interval, Results, interval, names
from effens_book.benchmark.tasks import MARGIN, PRIMARY, TASKS, TRIALS
from effens_book.tables import Table

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
SECOND = "single, second trial"
SETTINGS = {
    "slots": "heads",
    "own": "own part",
    "fast_lr": "fast rate",
    "tail_lr": "tail rate",
}  # and what they are called
COSTS = {"training": "training", "batch 1": "predict 1", "batch 256": "predict 256"}  # other costs have their own name


WORDS = {  # the tasks, and what they predict
    "fashion": "fashion: photos of clothes",
    "airtime": "airtime: how long flights take",
    "digits": "digits: small images",
    "diamonds": "diamonds: prices, a table",
    "gap": "gap: a curve with a gap",
    "returns": "returns: S&P 500, daily",
    "nasdaq": "nasdaq: NASDAQ, daily",
    "oil": "oil: crude oil, daily",
    "orders": "orders: simulated order flow",
    "definitions": "definitions: a pretrained transformer",
}


class Benchmark(Results):
    """The results in a folder, by default those that the book was written from, and tables of them.

    Args:
        results: the folder.
    """

    def table(
        self,
        tasks: str | Sequence[str],
        columns: Iterable[str] = ("nll", "member_nll", "diversity_gain"),
        rows: Iterable[str] | None = None,
    ) -> Table:
        """Return a table: a row per method, a column per score, means over seeds with 95% intervals.

        The best mean is marked in the columns whose direction is a matter of quality, and the rows whose paired
        difference from it is not resolved.

        Args:
            tasks: a task's name, or several: then each has the columns.
            columns: scores on the test set; ``"nll@rotated"`` is on another set.
            rows: methods; all of them by default.
        """
        found: dict[str, dict[str, Interval]] = {}
        best: dict[str, Callable[..., str]] = {}
        unresolved, digits, seen = [], {}, set()
        several = [tasks] if isinstance(tasks, str) else list(tasks)
        for task, column in ((task, column) for task in several for column in columns):
            metric, _, split = column.partition("@")
            head = title(column) + (f", {task}" if len(several) > 1 else "")
            chosen = list(names(task=task) if rows is None else rows)
            values = {name: interval(self.values(task, name, metric, split or "test")) for name in chosen}
            for name, value in values.items():
                found.setdefault(name, {})[head] = value
            digits[head] = DECIMALS.get(metric, 3)
            seen.add(metric)
            if metric in QUALITY and len(chosen) > 1:
                best[head] = QUALITY[metric]
                first = best[head](chosen, key=lambda name: values[name].mean)  # called at once
                for name in set(chosen) - {first}:
                    if self.compare(task, name, first, metric, split or "test").verdict in ("unresolved", "tied"):
                        unresolved.append((name, head))
        seeds = dict.fromkeys(TASKS[task].seeds for task in several)
        return Table(
            found,
            caption=f"{' and '.join(several)}, means over {' and '.join(map(str, seeds))} seeds ± 95% intervals"
            + ("" if NATS.isdisjoint(seen) else ", losses in nats"),
            best=best,
            unresolved=unresolved,
            digits=digits,
        )

    def differences(
        self,
        tasks: str | Sequence[str],
        pairs: Iterable[tuple[str, str]],
        metric: str = PRIMARY,
        split: str = "test",
        margin: float = MARGIN,
    ) -> Table:
        """Return a table of paired differences, first minus second: a row for each pair, its interval and verdict.

        Args:
            tasks: a task's name, or several: then each has a column.
            pairs: methods.
            metric: a score.
            split: the set on which it is scored.
            margin: two methods are tied if the whole interval is inside.
        """
        pairs = list(pairs)
        column, digits = title(metric if split == "test" else f"{metric}@{split}"), DECIMALS.get(metric, 3)
        rows: dict[str, dict[str, str]] = {}
        for a, b in pairs:
            line = rows[f"{a} − {b}"] = {}
            for task in [tasks] if isinstance(tasks, str) else tasks:
                found = self.compare(task, a, b, metric, split, margin)
                difference = f"{found.difference:+.{digits}f}"
                if isinstance(tasks, str):
                    line[f"difference in {column}"] = difference
                    line |= {"lower in": f"{found.wins} of {found.seeds}", "verdict": found.verdict}
                else:
                    line[f"{column}, {task}"] = f"{difference} {found.verdict}"
        several = [tasks] if isinstance(tasks, str) else list(tasks)
        by_example = [
            metric == PRIMARY
            and not TASKS[task].fresh
            and all(self.losses(task, name, split) is not None for name in pair)
            for task in several
            for pair in pairs
        ]
        over = "seeds and test examples" if any(by_example) else "seeds"
        if any(by_example) and not all(by_example):  # a large task keeps no losses at a temperature
            over += ", with a temperature over seeds"
        return Table(rows, caption=f"{' and '.join(several)}, first minus second ± 95% interval over {over}")

    def across(self, name: str, other: str = "single") -> Table:
        """Return a table of how a method's NLL differs from another's on every task on which both were run.

        Where the settings that came second in one network's tuning were run as well, as on prices, where next to
        nothing chose the first, a last column compares with these.
        """
        rows: dict[str, dict[str, str | None]] = {}
        luck = "against one network's second trial"
        for task, words in WORDS.items():
            if self.has(task, name) and self.has(task, other):
                found = self.compare(task, name, other)
                rows[words] = {"difference in NLL": f"{found.difference:+.3f}", "verdict": found.verdict}
                if other == "single" and self.has(task, SECOND):
                    again = self.compare(task, name, SECOND)
                    rows[words][luck] = f"{again.difference:+.3f} {again.verdict}"
        caption = f"{name} minus {'one network' if other == 'single' else other}, NLL on test data ± 95% interval"
        return Table(rows, caption=caption)

    def cost_table(self, task: str, rows: Iterable[str] | None = None, device: str = "cpu") -> Table:
        """Return a table of what each method costs, as multiples of the single network's; all methods by default.

        The last column counts trainings of one network.
        """
        found = {
            name: times(self.relative_costs(task, name, device))
            for name in (names(task=task) if rows is None else rows)
        }
        where = "one CPU thread" if device == "cpu" else self.costs(task, "single", device)["device"]
        return Table(
            found,
            caption=f"{task}, cost as a multiple of one network's, {where}; predict: of 1 row, of 256 rows; "
            "tuning: of all trials, in trainings of one network",
        )

    def best_trials(self, task: str, methods: Iterable[str], count: int = 2) -> Table:
        """Return a table of the best tuning trials of each method: their settings, and the loss on validation data.

        The first is the one that was chosen. A second one that comes close with other settings says that luck chose.
        """
        rows, seeds = {}, set()
        for name in methods:
            settings = [trial["settings"] for trial in self.trials(task, name)]
            for place, i in enumerate(self.ranked_trials(task, name)[:count]):
                rows[f"{name}, {'chosen' if place == 0 else f'place {place + 1}'}"] = {
                    "learning rate": f"{settings[i]['lr']:.4f}",
                    "weight decay": f"{settings[i]['weight_decay']:.3f}",
                    **{
                        SETTINGS[key]: f"{int(value)}" if key == "slots" else f"{value:.2f}"
                        for key, value in settings[i].items()
                        if key in SETTINGS
                    },
                    "validation NLL": self.trial_scores(task, name)[i],
                }
                seeds.add(len(self.trials(task, name)[i][PRIMARY]))
        counts = " or ".join(map(str, sorted(seeds)))
        caption = (
            f"{task}, the best of {TASKS[task].trials or TRIALS} tuning trials; NLL in nats, mean over {counts} seeds"
        )
        return Table(rows, caption=caption, digits=4)

    def layer_table(self) -> Table:
        """Return a table of one layer's latency, as multiples of one plain layer: rows of width and batch."""
        path = self.folder / "layers.json"
        if not path.exists():
            raise FileNotFoundError(f"results must hold the costs of layers, got none: {COMMAND}")
        seen = {
            (row["width"], row["batch"], row["method"]): row["seconds"] for row in json.loads(path.read_text())["rows"]
        }
        rows: dict[str, dict[str, str]] = {}
        for width, batch in dict.fromkeys(key[:2] for key in seen):
            one = seen[width, batch, "single"]
            cells = {name: f"{seen[width, batch, name] / one:.1f}x" for name in ("deep ensemble", "BatchEnsemble")}
            rows[f"width {width}, batch {batch}"] = {"one layer": f"{1e6 * one:.0f} µs", **cells}
        return Table(rows, caption="latency of one linear layer with four members, as a multiple of one plain layer's")


@cache
def shipped() -> Benchmark:
    """Return the results that the book was written from."""
    return Benchmark()


def title(column: str) -> str:
    """Return a column's head, such as ``"NLL, rotated"`` for ``"nll@rotated"``."""
    metric, _, split = column.partition("@")
    name, _, unit = TITLES.get(metric, metric).partition(" (")
    return name + (f", {split}" if split else "") + (f" ({unit}" if unit else "")


def times(costs: Mapping[str, float], digits: int = 1) -> dict[str, str]:
    """Return relative costs in words: ``{"training": "4.2x", ...}``; tuning in whole trainings."""
    return {COSTS.get(key, key): f"{value:.{0 if key == 'tuning' else digits}f}x" for key, value in costs.items()}
