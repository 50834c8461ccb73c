r"""From daily prices to a forecasting task: features known at a day's close, targets, and splits that never look ahead.

All volatilities are per day and in percent. A day's variance comes from its return, or, where the day's high H and low
L are known, from its range, which is less noisy (Parkinson, 1980, doi:10.1086/296071):

.. math:: v_t = r_t^2, \quad r_t = 100 \log \frac{C_t}{C_{t-1}} \qquad \text{or} \qquad
    v_t = \frac{(100 \log H_t / L_t)^2}{4 \log 2}
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from effens_book.data import Prices

__all__ = ["FEATURES", "Split", "Task", "features", "standardize", "task", "walk_forward"]

VOLATILITY_DAYS, RETURN_DAYS = (1, 5, 22, 66), (1, 5, 22)
FEATURES = (
    *(f"log volatility, {days} days" for days in VOLATILITY_DAYS),
    *(f"return, {days} days" for days in RETURN_DAYS),
    "negative returns, 5 days",
)
FLOOR = 0.05  # percent: a quieter volatility counts as this, so that a day without change has a logarithm


@dataclass(frozen=True, eq=False)
class Task:
    """Row i: what was known at the close of ``dates[i]``, and a target that is known at the close of ``until[i]``."""

    x: Tensor  # (n, 8), or (n, assets, 8) for several stocks; float32
    y: Tensor  # (n,) or (n, assets); float32
    dates: NDArray[np.datetime64]  # (n,)
    until: NDArray[np.datetime64]  # (n,)


@dataclass(frozen=True, eq=False)
class Split:
    """Rows of a `Task` to train on, to tune on, and to judge with, each ``(rows,)`` integers, one after the other."""

    train: Tensor
    val: Tensor
    test: Tensor


def features(prices: Prices) -> Tensor:
    """Return what is known of the past at every close from the 67th day on, named in `FEATURES`.

    Log volatility over the last 1, 5 and 22 days, as in the HAR model (Corsi, 2009, doi:10.1093/jjfinec/nbp001), and
    over 66; returns over 1, 5 and 22 days, and the sum of the last five days' negative returns, in percent.

    Args:
        prices: of n days, n > 66.

    Returns:
        ``(n - 66, 8)``, or ``(n - 66, assets, 8)`` for several stocks; float32.

    Raises:
        ValueError: there are too few days.
    """
    days = max(VOLATILITY_DAYS)
    if len(prices.close) <= days:
        raise ValueError(f"prices must hold more than {days} days, got {len(prices.close)}")
    returns = _returns(prices)
    columns = [_log_volatility(prices, days) for days in VOLATILITY_DAYS]
    columns += [_sum(returns, days) for days in RETURN_DAYS]
    columns += [_sum(returns.clamp_max(0), 5)]
    return torch.stack([column[-(len(returns) - days + 1) :] for column in columns], dim=-1).float()


def task(prices: Prices, target: str = "return") -> Task:
    """Return features and what they are to forecast.

    Args:
        prices: of n days.
        target: ``"return"``, of the next day, in percent; or ``"volatility"``: the logarithm of the volatility, in
            percent a day, over the next five days.

    Returns:
        A `Task` with a row for each day that has both its features and its target.

    Raises:
        ValueError: the target is neither of the two, or there are too few days.
    """
    match target:
        case "return":
            horizon, future = 1, _returns(prices)
        case "volatility":
            horizon, future = 5, _log_volatility(prices, 5)
        case _:
            raise ValueError(f"target must be 'return' or 'volatility', got {target!r}")
    x = features(prices)[:-horizon]
    if len(x) == 0:
        raise ValueError(f"prices must hold a target {horizon} days after the features, got {len(prices.close)} days")
    dates = prices.dates[-len(x) - horizon :]
    return Task(x, future[-len(x) :].float(), dates[:-horizon], dates[horizon:])


def walk_forward(task: Task, starts: Sequence[str], *, end: str | None = None, validation: int = 0) -> list[Split]:
    """Return one split for each start: test on the days up to the next start, train on all that was known before.

    Between one part and the next the horizon is purged: a row is used only if its target was known *before* the first
    day of the part that follows (López de Prado, 2018, chapter 7).

    Args:
        task: of n rows.
        starts: first days of the test parts, as ``"2007-07-01"``, in order.
        end: the day after the last test part; otherwise all rows that are left.
        validation: how many of the last rows before a test part are kept from training, to tune on.

    Raises:
        ValueError: the days are not in order, or a part would be empty or too short.
    """
    if validation < 0:
        raise ValueError(f"validation must be >= 0, got {validation}")
    edges = np.array([*starts, end or task.dates[-1] + 1], dtype="datetime64[D]")
    if len(starts) == 0 or not bool((np.diff(edges).astype(int) > 0).all()):
        raise ValueError(f"starts and end must be in order, got {', '.join(map(str, edges))}")
    splits = []
    for start, stop in itertools.pairwise(edges):
        test = np.flatnonzero((task.dates >= start) & (task.dates < stop))
        known = _known_before(task, test)
        val = known[max(0, len(known) - validation) :]
        train = _known_before(task, val) if validation else known
        if min(len(train), len(test)) == 0 or len(val) != validation:
            sizes = f"{len(train)} to train, {len(val)} of {validation} to validate, {len(test)} to test"
            raise ValueError(f"every part must hold rows, got {sizes} from {start} to {stop}")
        splits.append(Split(*(torch.from_numpy(rows) for rows in (train, val, test))))
    return splits


def standardize(x: Tensor, rows: Tensor) -> Tensor:
    """Return all of ``x`` with the columns' mean and standard deviation over some rows, of training, taken out.

    Args:
        x: (n, ..., columns).
        rows: (k,) integers, k > 1, the only rows that are looked at.

    Raises:
        ValueError: a column is constant over these rows.
    """
    known = x[rows].flatten(0, -2)
    deviation = known.std(0)
    if not bool((deviation > 0).all()):
        raise ValueError(f"columns must vary over the rows, got a deviation of {deviation.min().item():.3g}")
    return (x - known.mean(0)) / deviation


def _known_before(task: Task, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the rows whose targets were known before the first day of these; none, if these are none."""
    return np.flatnonzero(task.until < task.dates[rows[0]]) if len(rows) else rows


def _returns(prices: Prices) -> Tensor:
    """Return daily log returns in percent: (n - 1, ...)."""
    return 100 * prices.close.log().diff(dim=0)


def _sum(daily: Tensor, days: int) -> Tensor:
    """Return sums over the last so many days, from the first day that has them: (n - days + 1, ...)."""
    return daily.unfold(0, days, 1).sum(-1)


def _log_volatility(prices: Prices, days: int) -> Tensor:
    """Return the logarithm of the volatility over the last so many days, from the first day that has them."""
    if prices.high is None or prices.low is None:
        variance = _returns(prices).square()
    else:
        variance = (100 * (prices.high / prices.low).log()[1:]).square() / (4 * math.log(2))
    return (_sum(variance, days) / days).sqrt().clamp_min(FLOOR).log()
