"""Fair times: contestants take turns in one process, so that a busy moment hits all alike, and are compared in pairs.

Seconds are the thread's own processor time, system calls included: on one thread of a quiet machine they are those of
the clock, and elsewhere they leave out the time in which others had the core.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

BLOCK = 5e-4  # seconds: quicker calls are timed many at a time
LEAST = 11  # rounds


def rounds(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Return the seconds of each call in each round, for about ``seconds`` in all and at least 11 rounds.

    A round times a block of each call; the order goes round, too.
    """
    sizes = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        sizes[name] = max(1, math.ceil(BLOCK / block(call, 3)))
    names, times = list(calls), {name: list[float]() for name in calls}
    began = time.perf_counter()
    while len(times[names[0]]) < LEAST or time.perf_counter() - began < seconds:
        for name in names:
            times[name].append(block(calls[name], sizes[name]))
        names.append(names.pop(0))
    return times


def block(call: Callable[[], object], size: int) -> float:
    """Return the seconds of a call, of ``size`` in a row."""
    collecting = gc.isenabled()
    gc.disable()
    start = time.thread_time()
    for _ in range(size):
        call()
    seconds = (time.thread_time() - start) / size
    if collecting:
        gc.enable()
    return seconds


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95% interval of a median that the sign test gives: two of the sorted values, however distributed."""
    ordered, n = sorted(values), len(values)
    k, tail = 0, 1  # of 2**n ways in which values can lie about the median, those with k or fewer below it
    while 40 * (tail + math.comb(n, k + 1)) <= 2**n:  # 2.5% on either side
        k += 1
        tail += math.comb(n, k)
    return ordered[k], ordered[n - 1 - k]


def compare(calls: Mapping[str, Callable[[], object]], seconds: float, *, to: str = "") -> dict[str, Any]:
    """Time contestants; return their median seconds, and median ratios of paired times with their intervals.

    The ratios are those of effens' time to each other's; or, with ``to``, those of each one's time to that one's.
    """
    times = rounds(calls, seconds)
    ratios = {}
    for name in times:
        above, below = (name, to) if to else ("effens", name)
        if above != below:
            pairs = [a / b for a, b in zip(times[above], times[below], strict=True)]
            ratios[name] = [brief(value) for value in (statistics.median(pairs), *interval(pairs))]
    return {"seconds": {name: brief(statistics.median(found)) for name, found in times.items()}, "ratios": ratios}


def brief(value: float) -> float:
    """Return a number with the digits that a timing has."""
    return float(f"{value:.4g}")
