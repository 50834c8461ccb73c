"""The checks of the blanks: right answers, likely wrong ones, empty ones, and whatever else a reader may write."""

import contextlib
import io
from typing import Any

import pytest

from effens_book import check

CHECKS = {name: each for name, each in vars(check).items() if isinstance(each, check.Check)}


def said(each: check.Check, attempt: Any) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        each(attempt)
    return text.getvalue()


@pytest.mark.parametrize("name", CHECKS)
def test_right_answers_are_right_and_mistakes_are_named(name: str) -> None:
    each = CHECKS[name]
    assert said(each, each.answer) == "Right.\n"
    for words, mistake in each.mistakes.items():
        assert each.verdict(mistake) == f"Not yet: {words}."
        assert "Hint: " in said(each, mistake)


def empty(*inputs: Any) -> Any: ...


def half_empty(*inputs: Any) -> Any:
    found: Any = ...
    return found


def empty_inside(*inputs: Any) -> Any:
    found: Any = ...
    return found + 1


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("attempt", [empty, half_empty, empty_inside])
def test_an_empty_blank_gets_a_hint_and_raises_nothing(name: str, attempt: Any) -> None:
    text = said(CHECKS[name], attempt)
    assert text.startswith("Not filled in yet.\nHint: ")
    assert max(map(len, text.splitlines())) <= 88  # it fits the page


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("attempt", [lambda *x: 1 / 0, lambda *x: "text", lambda: 0, lambda *x: 12345.0])
def test_whatever_else_is_wrong_and_raises_nothing(name: str, attempt: Any) -> None:
    assert CHECKS[name].verdict(attempt).startswith("Not yet: ")


def test_what_is_wrong_is_said() -> None:
    assert "raises ZeroDivisionError: division by zero" in check.prediction.verdict(lambda probs: 1 / 0)
    assert "should have the shape (5, 3), and has (4, 5, 3)" in check.prediction.verdict(lambda probs: probs)
    assert "values differ by up to" in check.prediction.verdict(lambda probs: probs.mean(0) + 1)
    assert "returns str" in check.prediction.verdict(lambda probs: "text")


NUMBERS = {name: each for name, each in vars(check).items() if isinstance(each, check.Number)}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_right_or_its_mistake_is_named(name: str) -> None:
    each: Any = NUMBERS[name]
    assert said(each, each.answer) == "Right.\n"
    assert said(each, ...).startswith("Not filled in yet.\nHint: ")
    assert said(each, "text").startswith("Not yet.\nHint: ")
    assert said(each, 2 * each.answer + 0.37).startswith("Not yet.\nHint: ")
    for words, mistake in each.mistakes.items():
        assert said(each, mistake).replace("\n", " ").startswith(f"Not yet: {words}. Hint: ")


def test_the_numbers_are_those_that_the_chapters_count() -> None:
    import effens
    from effens_book import roofline
    from effens_book.nets import mlp

    def count(module: Any) -> int:
        return sum(p.numel() for p in module.parameters())

    layer = effens.BatchEnsembleLinear(64, 64, members=4)
    assert count(layer) - (64 * 64 + 64) == check.numbers_gained.answer

    def plain() -> Any:
        return mlp(196, 10, width=128, depth=1)

    assert count(effens.MIMO(plain, 3)) - count(plain()) == check.weights_of_mimo.answer
    knee = roofline.Machine(peak=50e12, call=5e-6, bandwidths=((4e6, 1e12),)).knee(1024)
    assert knee == pytest.approx(check.free_rows.answer)
