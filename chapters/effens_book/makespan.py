"""How long trainings last that several machines share."""

import heapq
from collections.abc import Iterable

from effens.ensembles.base import check_positive


def makespan(seconds: Iterable[float], workers: int) -> float:
    """Return when the last of some trainings ends, where each worker that is free takes the longest one that is left.

    It is at most 4/3 of the best there could be (Graham, 1969, "Bounds on multiprocessing timing anomalies",
    doi:10.1137/0117039).

    Args:
        seconds: of each training.
        workers: how many run at once.

    Example:
        >>> makespan([60.0] * 12, workers=11)  # as long as on six
        120.0
    """
    check_positive(workers=workers)
    ends = [0.0] * workers
    for each in sorted(seconds, reverse=True):
        heapq.heappush(ends, heapq.heappop(ends) + each)
    return max(ends)
