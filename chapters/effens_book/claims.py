"""A verdict on a claim: is it supported, contradicted, or not resolved by what was measured?

To bring a claim, compute for every seed a number that is positive where the claim holds, and call `judge`.

Example:
    >>> judge(torch.tensor([0.021, 0.018, 0.025, 0.019]))
    {'measured': '+0.021 ± 0.005', 'verdict': 'supported'}
"""

import torch
from torch import Tensor

from effens_book.benchmark import interval


def judge(values: Tensor, margin: float = 0.0) -> dict[str, str]:
    """Judge a claim by numbers that are positive where it holds.

    Args:
        values: one number for each seed, ``(seeds,)``, or for each seed and test example, ``(seeds, examples)``.
        margin: what is too small to matter, in the units of the values.

    Returns:
        The mean with its 95% interval, and a verdict: "supported" if the interval lies above the margin, "contradicted"
        if it lies below minus the margin, "no difference" if it lies between the two, else "unresolved".

    Raises:
        ValueError: there are fewer than two seeds, or a value is not finite.
    """
    if values.dim() not in (1, 2) or len(values) < 2:
        raise ValueError(
            f"values must be (seeds,) or (seeds, examples) of two seeds or more, got {tuple(values.shape)}"
        )
    if not bool(torch.isfinite(values).all()):
        raise ValueError("values must be finite, got some that are not")
    found = interval(values)
    low, high = found.mean - found.half, found.mean + found.half
    if low > margin:
        verdict = "supported"
    elif high < -margin:
        verdict = "contradicted"
    else:
        verdict = "no difference" if low > -margin and high < margin else "unresolved"
    return {"measured": f"{found:+.3f}", "verdict": verdict}
