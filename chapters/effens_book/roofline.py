r"""The roofline of one layer: what members cost is a matter of whether the machine waits for weights or for arithmetic.

.. math:: t = t_0 + \max\Bigl(\frac{\text{bytes of weights}}{\text{bandwidth}}, \frac{\text{FLOPs}}{\text{peak}}\Bigr)

Williams, Waterman and Patterson (2009), "Roofline: an insightful visual performance model for multicore architectures",
doi:10.1145/1498765.1498785. One number each is measured: the peak, from a large product; the bandwidth of each level of
memory, from products with one row, which read every weight once and compute next to nothing; the time of an empty call.
``python -m effens_book.roofline`` measures them and the layers that they are to predict, and keeps both.
"""

import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from effens.ensembles.base import Ensemble
from effens.ensembles.batch import BatchEnsemble
from effens.ensembles.deep import DeepEnsemble
from effens_book.benchmark import METHODS, RESULTS, TASKS, shipped
from effens_book.benchmark.results import names
from effens_book.benchmark.run import plain, provenance, time_in_turns, write_json

WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)  # weights of 16 KB to 268 MB: from the nearest cache to memory
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


def one(call: Any, seconds: float) -> float:
    """Return the median time of a call."""
    return time_in_turns({"it": call}, seconds)["it"]


def measure_machine(timed: Callable[[Any, float], float] = one) -> Machine:
    """Measure this machine, on the threads that PyTorch uses now; it takes some ten seconds.

    Args:
        timed: (call, seconds) -> the median time of the call, timed for so long.
    """
    with torch.inference_mode():
        x, w = torch.randn(2048, 2048), torch.randn(2048, 2048)
        peak = 2 * 2048**3 / timed(partial(F.linear, x, w), 2.0)
        tiny, small = torch.randn(1, 1), torch.randn(1, 1)
        call = timed(partial(F.linear, tiny, small), 0.5)
    return Machine(peak, call, tuple((4.0 * width**2, read_speed(width, call, timed)) for width in WIDTHS))


def read_speed(width: int, call: float, timed: Callable[[Any, float], float] = one) -> float:
    """Return the bytes in a second at which a product with one row reads its weights; ``call`` is an empty one's."""
    x, w = torch.randn(1, width), torch.randn(width, width)
    with torch.inference_mode():
        seconds = timed(partial(F.linear, x, w), 1.0)
    return 4 * width**2 / max(seconds - call, 0.05 * seconds)


def points() -> Iterable[tuple[int, int, int]]:
    """Yield the (width, batch, members) that are timed."""
    for width in WIDTHS:
        for batch in BATCHES:
            for members in MEMBERS:
                if width**2 * members <= LARGEST and width**2 * batch * members <= 2**34:
                    yield width, batch, members


def run() -> None:
    """Measure the machine and every point; what is kept already is not measured again."""
    path = RESULTS / "roofline.json"
    torch.set_num_threads(1)
    if path.exists():
        machine, times = read()
    else:
        machine, times = measure_machine(), {}
    sizes = dict(machine.bandwidths)
    speeds = tuple((4.0 * w**2, sizes.get(4.0 * w**2) or read_speed(w, machine.call)) for w in WIDTHS)
    missing = [point for point in points() if ("deep ensemble", *point) not in times]
    if not missing and speeds == machine.bandwidths:
        return
    for width, batch, members in missing:
        make = partial(nn.Linear, width, width)
        x = torch.randn(batch, width)
        layers = {"deep ensemble": DeepEnsemble(make, members), "BatchEnsemble": BatchEnsemble(make, members)}
        with torch.inference_mode():
            found = time_in_turns({name: partial(layer, x) for name, layer in layers.items()}, SECONDS)
        times |= {(name, width, batch, members): float(f"{t:.4g}") for name, t in found.items()}
    facts = {"peak": machine.peak, "call": machine.call, "bandwidths": speeds, "threads": 1}
    rows = [[*key, t] for key, t in times.items()]
    write_json(path, {**facts, "rows": rows, **provenance()})
    read.cache_clear()


@cache
def read() -> tuple[Machine, dict[tuple[str, int, int, int], float]]:
    """Return the machine that was measured, and the measured seconds by (method, width, batch, members).

    Raises:
        FileNotFoundError: they were not measured.
    """
    path = RESULTS / "roofline.json"
    if not path.exists():
        raise FileNotFoundError("results must hold the roofline, got none: run python -m effens_book.roofline")
    kept = json.loads(path.read_text())
    machine = Machine(kept["peak"], kept["call"], tuple((size, speed) for size, speed in kept["bandwidths"]))
    return machine, {(name, width, batch, members): t for name, width, batch, members, t in kept["rows"]}


def by_rows(times: Mapping[tuple[str, int, int, int], float], width: int) -> dict[int, float]:
    """Return the measured seconds of a layer whose members share weights, by rows (members times batch), ascending.

    Several members with few rows each and few with many have the same rows: of these, the median.
    """
    found: dict[int, list[float]] = {}
    for (name, w, batch, members), seconds in times.items():
        if name == "BatchEnsemble" and w == width:
            found.setdefault(batch * members, []).append(seconds)
    return {rows: statistics.median(found[rows]) for rows in sorted(found)}


def doubling_rows(seconds: Mapping[int, float]) -> float:
    """Return the rows at which the time is twice that of the fewest, on straight lines between the points, log-log.

    Infinite where it is never reached.
    """
    points = sorted(seconds.items())
    target = 2 * points[0][1]
    for (r0, t0), (r1, t1) in itertools.pairwise(points):
        if t1 >= target:
            return float(r0 * (r1 / r0) ** (math.log(target / t0) / math.log(t1 / t0)))
    return math.inf


def words(size: float) -> str:
    """Return a number of bytes as people say it."""
    return f"{size / 1e6:.0f} MB" if size >= 1e6 else f"{size / 1e3:.0f} KB"


@dataclass(frozen=True)
class Forward:
    """What one prediction asks of a machine.

    Attributes:
        calls: operators that PyTorch starts.
        reads: the bytes of the tensors that each operator reads and writes; views move none.
        work: its floating-point operations, of products and convolutions, one number for each operator.
    """

    calls: int
    reads: tuple[int, ...]
    work: tuple[int, ...]

    def predict(self, machine: Machine) -> tuple[float, float, float]:
        """Return the seconds of calls, of what waits for memory, and of what waits for arithmetic.

        Each operator waits for the slower of its two; the prediction is the sum of all three.
        """
        memory = compute = 0.0
        for size, flops in zip(self.reads, self.work, strict=True):
            read, count = (size / machine.bandwidth(size) if size else 0.0), flops / machine.peak
            memory, compute = (memory + read, compute) if read >= count else (memory, compute + count)
        return self.calls * machine.call, memory, compute


class Watched(TorchDispatchMode):
    """Notes each operator's bytes and operations while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        flops = count(*args, **(kwargs or {}), out_val=out) if count else 0
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        size = 0 if func.is_view else sum(t.numel() * t.element_size() for t in tensors)
        self.notes.append((size, int(flops)))
        return out


def count_operations(call: Callable[[], object]) -> Forward:
    """Run a call and return what it asks of a machine, counted and not timed."""
    with Watched() as seen:
        call()
    sizes, work = zip(*seen.notes, strict=True) if seen.notes else ((), ())
    return Forward(len(seen.notes), sizes, work)


def brief(task: str, name: str) -> Ensemble:
    """Train a method for as many steps as it has members: what a prediction costs does not depend on how good it is.

    Raises:
        ValueError: the method is one whose networks a search chooses.
    """
    method = METHODS[name]
    if not method.tuned:
        raise ValueError(f"name must be a method whose networks are known beforehand, got {name!r}")
    full = TASKS[task]
    x, y = full.load(0)["train"]
    assert y is not None
    few = slice(full.batch_size)
    short = replace(full, pool=full.members, epochs=full.members)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return method.train(short, (x[few], y[few]), shipped().settings(task, name), 0).eval()


def forward(task: str, name: str, batch: int) -> Forward:
    """Return what one prediction of a method of the benchmark asks of a machine."""
    asked = plain(brief(task, name))
    x, _ = TASKS[task].load(0)["train"]
    rows = x[torch.arange(batch) % len(x)]
    with torch.no_grad():
        asked(rows)  # a first call may look the network over
        return count_operations(partial(asked, rows))


def count() -> None:
    """Count what the predictions of the benchmark's methods ask, and keep it: run it where their costs are measured."""
    methods = [name for name in names() if name in METHODS and METHODS[name].tuned]
    measured = [task for task in TASKS if shipped().costs_path(task, "cpu").exists()]
    keys = itertools.product(measured, methods, (1, 256))
    found = {", ".join(map(str, key)): forward(*key) for key in keys}
    write_json(RESULTS / "forwards.json", {key: [each.calls, each.reads, each.work] for key, each in found.items()})
    forwards.cache_clear()


@cache
def forwards() -> dict[tuple[str, str, int], Forward]:
    """Return what a prediction asked of a machine, by (task, method, batch), in the code whose costs were measured."""
    kept = json.loads((RESULTS / "forwards.json").read_text())
    found = {}
    for key, (calls, reads, work) in kept.items():
        task, name, batch = key.split(", ")
        found[task, name, int(batch)] = Forward(calls, tuple(reads), tuple(work))
    return found


if __name__ == "__main__":
    run()
    count()
