"""The chooser: within the budget first, the best first, and honest about what cannot be told apart."""

import numpy as np
import pytest

from effens_book.benchmark import shipped
from effens_book.benchmark.results import names
from effens_book.choose import BUDGETS, GOALS, agreement, choose, measured


@pytest.mark.parametrize(("task", "goal"), [(task, goal) for task, goals in GOALS.items() for goal in goals])
def test_all_methods_are_there_and_sorted(task: str, goal: str) -> None:
    found = choose(task, goal=goal)
    assert sorted(choice.method for choice in found) == sorted(measured(task))
    assert all(choice.qualifies for choice in found)
    metric, split, less = GOALS[task][goal]
    scores = [round(choice.score, 4) for choice in found]  # as `choose` counts them
    assert scores == sorted(scores, reverse=not less)
    for choice in found:
        assert choice.score == pytest.approx(shipped().values(task, choice.method, metric, split).mean().item())


@pytest.mark.parametrize("task", GOALS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_what_is_above_a_budget_comes_last_and_says_why(task: str, budget: str) -> None:
    costs = sorted({round(choice.costs[BUDGETS[budget]], 2) for choice in choose(task)})
    limit = costs[(len(costs) - 1) // 2]  # some are within it, and some are not
    found = choose(task, **{budget: limit})  # type: ignore[arg-type]
    within = [round(choice.costs[BUDGETS[budget]], 2) <= limit for choice in found]
    assert within == [choice.qualifies for choice in found] == sorted(within, reverse=True)
    assert 0 < sum(within) < len(within)
    for choice in found:
        assert (f"above {limit:g}x" in choice.reason) is not choice.qualifies


@pytest.mark.parametrize("task", GOALS)
def test_the_reasons_are_the_benchmarks_comparisons(task: str) -> None:
    best, *others = choose(task)
    assert best.reason == "the best mean within the budget"
    for choice in others:
        found = shipped().compare(task, choice.method, best.method)
        assert str(found.difference) in choice.reason
        assert ("not distinguishable" in choice.reason) is (found.verdict == "unresolved")


def test_agreement_is_spearmans_correlation_of_losses() -> None:
    rows = names()
    losses = [[shipped().values(task, name).mean().item() for name in rows] for task in ("digits", "gap")]
    places = [[sorted(each).index(loss) for loss in each] for each in losses]
    assert agreement("digits", "gap") == pytest.approx(np.corrcoef(np.array(places))[0, 1])
    assert agreement("digits", "digits") == pytest.approx(1)


def test_what_is_refused() -> None:
    with pytest.raises(
        ValueError, match="task must be one of fashion, airtime, definitions, digits, diamonds, gap, got 'faces'"
    ):
        choose("faces")
    with pytest.raises(ValueError, match="goal must be one of nll, shift, got 'accuracy'"):
        choose("gap", goal="accuracy")
    with pytest.raises(ValueError, match="goal must be one of nll, accuracy, shift, unknown, got 'best'"):
        choose(goal="best")
    with pytest.raises(ValueError, match="memory must be > 0, got 0"):
        choose(memory=0)
