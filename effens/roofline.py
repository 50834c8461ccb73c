r"""The roofline of one layer: what members cost is a matter of whether the machine waits for weights or for arithmetic.

.. math:: t = t_0 + \max\Bigl(\frac{\text{bytes of weights}}{\text{bandwidth}}, \frac{\text{FLOPs}}{\text{peak}}\Bigr)

Williams, Waterman and Patterson (2009), "Roofline: an insightful visual performance model for multicore architectures",
doi:10.1145/1498765.1498785. One number each is measured: the peak, from a large product; the bandwidth of each level of
memory, from products with one row, which read every weight once and compute next to nothing; the time of an empty call.
``python -m effens.roofline`` measures them, and then the layers that they are to predict, and keeps both in the bank.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from effens import ledger
from effens.ensembles.batch import BatchEnsemble
from effens.ensembles.deep import DeepEnsemble

WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096)
BATCHES = (1, 4, 16, 64, 256)
MEMBERS = (1, 2, 4, 8, 16)
LARGEST = 2**28  # numbers in the weights of a layer that is timed: 1 GiB
SECONDS = 0.6  # for each point


@dataclass(frozen=True)
class Machine:
    """What is known about a machine.

    Attributes:
        peak: floating-point operations in a second, of a product with many rows.
        call: seconds of a call with next to no work.
        bandwidths: (bytes of weights, bytes in a second) pairs, ascending: what is read again and again from there.
    """

    peak: float
    call: float
    bandwidths: tuple[tuple[float, float], ...]

    def bandwidth(self, size: float) -> float:
        """Return the bandwidth for weights of this size in bytes: that of the nearest size measured, on a log scale."""
        return min(self.bandwidths, key=lambda pair: abs(torch.tensor(pair[0] / size).log().item()))[1]

    def predict(self, width: int, batch: int, members: int, shared: bool) -> float:
        """Return the predicted seconds of one square layer.

        Args:
            width: inputs and outputs.
            batch: rows of each member.
            members: how many.
            shared: whether all members read the same weights, as in BatchEnsemble, or each their own.
        """
        size = 4 * width**2 * (1 if shared else members)
        work = 2 * width**2 * batch * members
        return self.call + max(size / self.bandwidth(size), work / self.peak)

    def knee(self, width: int) -> float:
        """Return the number of rows (members times batch, of shared weights) beyond which arithmetic rules."""
        size = 4 * width**2
        return self.peak / self.bandwidth(size) * 4 / 2


def measured() -> Machine:
    """Measure this machine, on the threads that PyTorch uses now; it takes some ten seconds."""
    with torch.inference_mode():
        x, w = torch.randn(2048, 2048), torch.randn(2048, 2048)
        peak = 2 * 2048**3 / one(partial(F.linear, x, w), 2.0)
        tiny, small = torch.randn(1, 1), torch.randn(1, 1)
        call = one(partial(F.linear, tiny, small), 0.5)
        pairs = []
        for width in WIDTHS:
            x, w = torch.randn(1, width), torch.randn(width, width)
            seconds = one(partial(F.linear, x, w), 1.0)
            pairs.append((4.0 * width**2, 4 * width**2 / max(seconds - call, 0.05 * seconds)))
    return Machine(peak, call, tuple(pairs))


def one(call: Any, seconds: float) -> float:
    """Return the median time of a call."""
    return ledger.interleaved({"it": call}, seconds)["it"]


def points() -> Iterable[tuple[int, int, int]]:
    """Yield the (width, batch, members) that are timed."""
    for width in WIDTHS:
        for batch in BATCHES:
            for members in MEMBERS:
                if width**2 * members <= LARGEST and width**2 * batch * members <= 2**34:
                    yield width, batch, members


def run() -> None:
    """Measure the machine and every point, unless that is kept already."""
    path = ledger.BANK / "roofline.json"
    if path.exists():
        return
    torch.set_num_threads(1)
    machine = measured()
    rows = []
    for width, batch, members in points():
        make = partial(nn.Linear, width, width)
        x = torch.randn(batch, width)
        layers = {"deep ensemble": DeepEnsemble(make, members), "BatchEnsemble": BatchEnsemble(make, members)}
        with torch.inference_mode():
            times = ledger.interleaved({name: partial(layer, x) for name, layer in layers.items()}, SECONDS)
        rows += [[name, width, batch, members, float(f"{t:.4g}")] for name, t in times.items()]
    facts = {"peak": machine.peak, "call": machine.call, "bandwidths": machine.bandwidths, "threads": 1}
    ledger.write_json(path, {**facts, "rows": rows, **ledger.provenance()})
    read.cache_clear()


@cache
def read() -> tuple[Machine, dict[tuple[str, int, int, int], float]]:
    """Return the machine of the bank, and the measured seconds by (method, width, batch, members).

    Raises:
        FileNotFoundError: they were not measured.
    """
    path = ledger.BANK / "roofline.json"
    if not path.exists():
        raise FileNotFoundError("the bank must hold the roofline, got none: run python -m effens.roofline")
    kept = json.loads(path.read_text())
    machine = Machine(kept["peak"], kept["call"], tuple((size, speed) for size, speed in kept["bandwidths"]))
    return machine, {(name, width, batch, members): t for name, width, batch, members, t in kept["rows"]}


if __name__ == "__main__":
    run()
