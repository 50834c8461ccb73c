"""Which method fits: what was measured on digits against a reader's budget."""

from collections.abc import Mapping
from dataclasses import dataclass

from effens_book.benchmark import shipped
from effens_book.benchmark.results import names

TASK = "digits"
GOALS = {  # what matters most, as a score of the benchmark's: (metric, set), and whether less is better
    "nll": ("nll", "test", True),
    "accuracy": ("accuracy", "test", False),
    "shift": ("nll", "rotated", True),
    "unknown": ("auroc", "letters", False),
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
        >>> choice = effens.choose(memory=1.1)[-1]
        >>> choice.qualifies, "memory" in choice.reason
        (False, True)
    """

    method: str
    qualifies: bool
    score: float
    costs: Mapping[str, float]
    reason: str


def choose(
    *,
    train: float | None = None,
    latency: float | None = None,
    throughput: float | None = None,
    memory: float | None = None,
    goal: str = "nll",
) -> list[Choice]:
    """Rank the benchmark's methods on digits for a budget: those within it first, the best for the goal first.

    Costs count to two decimals, scores to four; of equal scores, the lower NLL comes first. Two methods whose paired
    interval includes 0 are not distinguishable on this task: the reason says so, and the cheaper one is the better
    choice. On another task the ranking may be another: see `ranks`.

    Args:
        train: training time, at most this many times the single network's; None for any.
        latency: of one prediction at batch 1, likewise.
        throughput: time of a prediction at batch 256, likewise.
        memory: bytes stored, likewise.
        goal: ``"nll"``, ``"accuracy"``, ``"shift"`` (NLL on rotated images) or ``"unknown"`` (AUROC of letters).

    Returns:
        Every method, in order.

    Raises:
        ValueError: the goal is unknown, or a budget is not positive.

    Example:
        >>> best, *_ = choose(train=1.5, latency=1.5)  # not much more than one network
        >>> best.qualifies
        True
    """
    if goal not in GOALS:
        raise ValueError(f"goal must be one of {', '.join(GOALS)}, got {goal!r}")
    budgets = {"train": train, "latency": latency, "throughput": throughput, "memory": memory}
    given = {name: value for name, value in budgets.items() if value is not None}
    for name, value in given.items():
        if not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}")
    less = GOALS[goal][2]
    found: list[tuple[str, dict[str, float], float, list[str]]] = []
    for name in names():
        costs = shipped().relative_costs(TASK, name)
        over = [
            f"{key} {cost:g}x, above {value:g}x"
            for key, value in given.items()
            if (cost := round(costs[BUDGETS[key]], 2)) > value
        ]
        found.append((name, costs, score_of(name, goal), over))
    loss = {name: round(score_of(name, "nll"), 4) for name in names()}
    found.sort(key=lambda item: (bool(item[3]), round(item[2] if less else -item[2], 4), loss[item[0]]))
    best = found[0][0]
    return [
        Choice(name, not over, score, costs, "; ".join(over) or standing(name, best, goal))
        for name, costs, score, over in found
    ]


def standing(name: str, best: str, goal: str) -> str:
    """Say how a method that qualifies compares with the best that does."""
    if name == best:
        return "the best mean within the budget"
    found = shipped().compare(TASK, name, best, *GOALS[goal][:2])
    words = {"unresolved": "not distinguishable from", "tied": "tied with"}.get(found.verdict, f"{found.verdict} than")
    return f"{words} {best}: {found.difference} {'nats' if GOALS[goal][0] == 'nll' else 'points'}"


def alike(name: str, other: str, goal: str) -> bool:
    """Say whether two methods are not distinguishable, or tied."""
    return shipped().compare(TASK, name, other, *GOALS[goal][:2]).verdict in ("unresolved", "tied")


def score_of(name: str, goal: str) -> float:
    """Return a method's mean score for a goal."""
    return shipped().values(TASK, name, *GOALS[goal][:2]).mean().item()


def ranks(task: str) -> dict[str, int]:
    """Return each method's rank by its mean NLL on the test set of a task; 1 is the best."""
    losses = {name: shipped().values(task, name).mean().item() for name in names()}
    return {name: place for place, name in enumerate(sorted(losses, key=losses.__getitem__), start=1)}
