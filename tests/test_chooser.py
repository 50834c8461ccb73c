"""The chooser: within the budget first, the best first, and honest about what cannot be told apart."""

import pytest

from effens_book.benchmark import shipped
from effens_book.benchmark.results import names
from effens_book.choose import BUDGETS, GOALS, choose


@pytest.mark.parametrize("goal", GOALS)
def test_all_methods_are_there_and_sorted(goal: str) -> None:
    found = choose(goal=goal)
    assert sorted(choice.method for choice in found) == sorted(names())
    assert all(choice.qualifies for choice in found)
    metric, split, less = GOALS[goal]
    scores = [round(choice.score, 4) for choice in found]  # as `choose` counts them
    assert scores == sorted(scores, reverse=not less)
    for choice in found:
        assert choice.score == pytest.approx(shipped().values("digits", choice.method, metric, split).mean().item())


@pytest.mark.parametrize("budget", BUDGETS)
def test_what_is_above_a_budget_comes_last_and_says_why(budget: str) -> None:
    found = choose(**{budget: 1.5})  # type: ignore[arg-type]
    within = [choice.costs[BUDGETS[budget]] <= 1.5 for choice in found]
    assert within == [choice.qualifies for choice in found] == sorted(within, reverse=True)
    assert 0 < sum(within) < len(within)
    for choice in found:
        assert ("above 1.5x" in choice.reason) is not choice.qualifies


def test_the_reasons_are_the_benchmarks_comparisons() -> None:
    best, *others = choose()
    assert best.reason == "the best mean within the budget"
    for choice in others:
        found = shipped().compare("digits", choice.method, best.method)
        assert str(found.difference) in choice.reason
        assert ("not distinguishable" in choice.reason) is (found.verdict == "unresolved")


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="goal must be one of nll, accuracy, shift, unknown, got 'best'"):
        choose(goal="best")
    with pytest.raises(ValueError, match="memory must be > 0, got 0"):
        choose(memory=0)
