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
