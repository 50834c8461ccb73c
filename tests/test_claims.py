"""Verdicts on claims: by the interval of the mean, with a margin for what does not matter."""

import pytest
import torch

from effens_book.claims import judge


@pytest.mark.parametrize(
    ("shift", "margin", "verdict"),
    [
        (1.0, 0.0, "supported"),
        (-1.0, 0.0, "contradicted"),
        (0.0, 0.0, "unresolved"),
        (0.0, 0.5, "no difference"),
        (0.1, 0.1, "unresolved"),
    ],
)
def test_a_verdict_is_read_from_the_interval(shift: float, margin: float, verdict: str) -> None:
    values = shift + 0.1 * torch.tensor([-1.0, 1.0, -0.5, 0.5, -0.2, 0.2])
    assert judge(values, margin)["verdict"] == verdict


def test_the_interval_is_student_s() -> None:
    """The mean of 1, 2 and 3 is 2, its standard error 1 / sqrt(3), and t is 4.303 with two degrees of freedom."""
    assert judge(torch.tensor([1.0, 2.0, 3.0]))["measured"] == "+2.000 ± 2.484"


@pytest.mark.parametrize("values", [torch.ones(1), torch.ones(()), torch.ones(2, 2, 2), torch.tensor([1.0, torch.nan])])
def test_what_cannot_be_judged_is_refused(values: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="values must be"):
        judge(values)
