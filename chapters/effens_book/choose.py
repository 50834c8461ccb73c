"""Which method fits: what was measured on a task against a reader's budget."""

from collections.abc import Mapping
from dataclasses import dataclass

from scipy.stats import spearmanr

from effens_book.benchmark import shipped
from effens_book.benchmark.results import names

Goal = tuple[str, str, bool]  # a score of the benchmark's, the set on which it is, and whether less is better
GOALS: dict[str, dict[str, Goal]] = {  # what may matter most, by task
    "fashion": {
        "nll": ("nll", "test", True),
        "accuracy": ("accuracy", "test", False),
        "shift": ("nll", "strong", True),
        "unknown": ("auroc", "letters", False),
    },
    "airtime": {"nll": ("nll", "test", True)},
    "definitions": {
        "nll": ("nll", "test", True),
        "accuracy": ("accuracy", "test", False),
        "shift": ("nll", "branches", True),
        "unknown": ("auroc", "austen", False),
    },
    "digits": {
        "nll": ("nll", "test", True),
        "accuracy": ("accuracy", "test", False),
        "shift": ("nll", "rotated", True),
        "unknown": ("auroc", "letters", False),
    },
    "diamonds": {"nll": ("nll", "test", True), "shift": ("nll", "heavy", True)},
    "gap": {"nll": ("nll", "test", True), "shift": ("nll", "gap", True)},
}
BUDGETS = {"train": "training", "latency": "batch 1", "throughput": "batch 256", "memory": "memory"}


@dataclass(frozen=True)
class Choice:
    """A method, and why it stands where it stands.

    Attributes:
        method: its name in the benchmark.
        qualifies: whether it is within every budget.
        score: the mean over seeds of the goal's score.
        costs: as multiples of the single network's.
        reason: in words.

    Example:
        >>> choice = choose(memory=1.1)[-1]
        >>> choice.qualifies, "memory" in choice.reason
        (False, True)
    """

    method: str
    qualifies: bool
    score: float
    costs: Mapping[str, float]
    reason: str


def choose(
    task: str = "fashion",
    *,
    train: float | None = None,
    latency: float | None = None,
    throughput: float | None = None,
    memory: float | None = None,
    goal: str = "nll",
) -> list[Choice]:
    """Rank the benchmark's methods on a task for a budget: those within it first, the best for the goal first.

    Costs count to two decimals, scores to four; of equal scores, the lower NLL comes first. Two methods whose paired
    interval includes 0 are not distinguishable on this task: the reason says so, and the cheaper one is the better
    choice. On another task the ranking may be another: see `agreement`.

    Args:
        task: ``"fashion"`` or ``"digits"`` (images), ``"airtime"`` or ``"diamonds"`` (tables), ``"definitions"``
            (texts, with a pretrained network), or ``"gap"`` (a curve).
        train: training time, at most this many times the single network's; None for any.
        latency: of one prediction at batch 1, likewise.
        throughput: time of a prediction at batch 256, likewise.
        memory: bytes stored, likewise.
        goal: ``"nll"``; ``"shift"``: NLL of strongly shifted clothes, rotated digits, heavy diamonds, texts of
            other branches or in the gap; of images and texts also ``"accuracy"`` or ``"unknown"`` (AUROC of letters, of
            a novel). The test set of airtime is a shift already.

    Returns:
        Every method, in order.

    Raises:
        ValueError: the task or the goal is unknown, or a budget is not positive.

    Example:
        >>> best, *_ = choose(train=1.5, latency=1.5)  # not much more than one network
        >>> best.qualifies
        True
    """
    if task not in GOALS:
        raise ValueError(f"task must be one of {', '.join(GOALS)}, got {task!r}")
    if goal not in GOALS[task]:
        raise ValueError(f"goal must be one of {', '.join(GOALS[task])}, got {goal!r}")
    budgets = {"train": train, "latency": latency, "throughput": throughput, "memory": memory}
    given = {name: value for name, value in budgets.items() if value is not None}
    for name, value in given.items():
        if not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}")
    less = GOALS[task][goal][2]
    found: list[tuple[str, dict[str, float], float, list[str]]] = []
    for name in measured(task):
        costs = shipped().relative_costs(task, name)
        over = [
            f"{key} {cost:g}x, above {value:g}x"
            for key, value in given.items()
            if (cost := round(costs[BUDGETS[key]], 2)) > value
        ]
        found.append((name, costs, score_of(task, name, goal), over))
    loss = {name: round(score_of(task, name, "nll"), 4) for name in measured(task)}
    found.sort(key=lambda item: (bool(item[3]), round(item[2] if less else -item[2], 4), loss[item[0]]))
    best = found[0][0]
    return [
        Choice(name, not over, score, costs, "; ".join(over) or standing(task, name, best, goal))
        for name, costs, score, over in found
    ]


def measured(task: str) -> list[str]:
    """Return the rows of a task's table that are among the results."""
    return [name for name in names(task=task) if shipped().has(task, name)]


def standing(task: str, name: str, best: str, goal: str) -> str:
    """Say how a method that qualifies compares with the best that does."""
    if name == best:
        return "the best mean within the budget"
    found = shipped().compare(task, name, best, *GOALS[task][goal][:2])
    words = {"unresolved": "not distinguishable from", "tied": "tied with"}.get(found.verdict, f"{found.verdict} than")
    return f"{words} {best}: {found.difference} {'nats' if GOALS[task][goal][0] == 'nll' else 'points'}"


def alike(task: str, name: str, other: str, goal: str) -> bool:
    """Say whether two methods are not distinguishable, or tied."""
    return shipped().compare(task, name, other, *GOALS[task][goal][:2]).verdict in ("unresolved", "tied")


def score_of(task: str, name: str, goal: str) -> float:
    """Return a method's mean score for a goal."""
    return shipped().values(task, name, *GOALS[task][goal][:2]).mean().item()


def agreement(task: str, other: str) -> float:
    """Return how far two tasks rank the methods alike by their NLL: Spearman's rank correlation."""
    both = [name for name in measured(task) if name in measured(other)]
    return float(spearmanr(*([score_of(each, name, "nll") for name in both] for each in (task, other))).statistic)
