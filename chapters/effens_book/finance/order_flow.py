r"""Decisions that must be quick: what an order flow is worth to one who is late, and how late each method is.

An event's signal is worth less the later it is acted upon, and every trade costs:

.. math:: \text{profit} = d \, s \, 2^{-t / h} - c \, |d|

with the side and size d in [-1, 1], the signal s of `data.orders`, the delay t from the event to the answer, its
half-life h and the cost c. ``python -m effens_book.finance.order_flow`` times one decision of every method in every
way of serving, and keeps the times among the results; it takes some minutes, and needs a C++ compiler.
"""

import copy
import ctypes
import io
import json
import math
import subprocess
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from effens import serving
from effens.likelihoods import Likelihood
from effens.storage import write_whole
from effens_book.benchmark import RESULTS, TASKS, shipped
from effens_book.benchmark.methods import train_one
from effens_book.benchmark.run import plain, provenance
from effens_book.data import orders as flows

COST, HALF_LIFE = 0.5, 100e-6  # ticks a trade; seconds
METHODS = ("single", "wide", "deep ensemble", "BatchEnsemble", "snapshot", "SWAG", "MIMO")
WAYS = ("eager", "ONNX Runtime", "AOTInductor", "AOTInductor, C++")
CALLS = 20_000
KEPT = 2000  # times of each that are kept, equally spaced in rank


# ---- Decisions. ----


def profit(side: Tensor, signal: Tensor, delay: Tensor | float = 0.0) -> Tensor:
    """Return the expected profit of each event, in ticks, (n,).

    Args:
        side: (n,) in [-1, 1]: short, nothing, long.
        signal: (n,) ticks, the expected move at the event; a realised move has the same mean, and more noise.
        delay: (n,) seconds from the event to the answer, or one for all.

    Raises:
        ValueError: a side is beyond 1.
    """
    if bool((side.abs() > 1 + 1e-6).any()):
        raise ValueError(f"sides must be in [-1, 1], got {side.abs().max().item():.4g}")
    left = torch.as_tensor(0.5, dtype=torch.float64) ** (torch.as_tensor(delay, dtype=torch.float64) / HALF_LIFE)
    result: Tensor = side * signal * left - COST * side.abs()
    return result


def threshold(value: Tensor, moves: Tensor) -> float:
    """Return the bound on |value| above which it pays most to trade in its direction, judged by realised moves.

    Args:
        value: (n,) forecasts, in ticks.
        moves: (n,) what happened, in ticks: of validation data, as the signal is known to nobody.

    Returns:
        One of the |value|; infinite if no trade pays.
    """
    bounds, order = value.abs().sort(descending=True)
    gains = (value.sign() * moves - COST)[order].double().cumsum(0)
    gains[:-1][bounds[:-1] == bounds[1:]] = -torch.inf  # a bound lets in all that are as large
    best = int(gains.argmax())
    return float(bounds[best]) if float(gains[best]) > 0 else float("inf")


def sides(forecast: Tensor, bound: float, delay: Tensor | float = 0.0) -> Tensor:
    """Return 1, 0 or -1 for each event, (n,): trade where what is left of the forecast after a delay is large enough.

    Args:
        forecast: (n,) ticks.
        bound: ticks, of `threshold`.
        delay: (n,) seconds, or one for all, known to the trader; infinite where an event was dropped.
    """
    left = torch.as_tensor(0.5, dtype=torch.float64) ** (torch.as_tensor(delay, dtype=torch.float64) / HALF_LIFE)
    return forecast.sign() * (forecast.abs() * left >= bound)


def queue(arrivals: Tensor, service: Tensor) -> Tensor:
    r"""Return the time from each event to its prediction, (n,): one server, in order, that never drops an event.

    .. math:: w_{i+1} = \max(0, w_i + b_i - (a_{i+1} - a_i)), \qquad t_i = w_i + b_i

    (Lindley, 1952, doi:10.1017/S0305004100027638). Events arrive whether or not the server is free: latencies that are
    measured one call at a time leave this waiting out.

    Args:
        arrivals: (n,) seconds, ascending.
        service: (n,) seconds that each prediction takes.
    """
    _check_lengths(arrivals, service)
    slack = torch.cat([torch.zeros(1, dtype=torch.float64), (service[:-1] - arrivals.diff()).double()]).cumsum(0)
    waits = slack - torch.minimum(slack.cummin(0).values, torch.zeros(1, dtype=torch.float64))
    return waits + service


def conflate(arrivals: Tensor, service: Tensor) -> Tensor:
    """Return the time from each event to its prediction, (n,): whenever the server is free it takes the newest event.

    Those that it passes over are dropped, and their time is infinite.

    Args:
        arrivals: (n,) seconds, ascending.
        service: (n,) seconds that each prediction takes.
    """
    _check_lengths(arrivals, service)
    times, takes = arrivals.tolist(), service.tolist()
    found = [math.inf] * len(times)
    event, free = 0, -math.inf  # the first event that the server has not seen, and when it is free
    while event < len(times):
        start = max(free, times[event])
        event = bisect_right(times, start, lo=event) - 1  # the newest at that time
        free = start + takes[event]
        found[event] = free - times[event]
        event += 1
    return torch.tensor(found, dtype=torch.float64)


def _check_lengths(arrivals: Tensor, service: Tensor) -> None:
    if len(arrivals) != len(service):
        raise ValueError(f"arrivals and service must have the same length, got {len(arrivals)} and {len(service)}")


# ---- Ways of serving. ----


class Locations(Likelihood):
    """A regression's answer as a decision needs it: the mean of the members' means, and how far they disagree."""

    def predict(self, outputs: Tensor) -> Tensor:
        """Return ``(members, batch)``."""
        return outputs[..., 0]


def eager(network: nn.Module) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return what PyTorch does without a compiler: an ensemble's mean and spread, or one plain network's mean."""

    def answer(x: Tensor) -> tuple[Tensor, Tensor]:
        means = network(x)[..., 0]  # (members, batch), or (batch,)
        if means.dim() == 1:
            return means, torch.zeros_like(means)
        return means.mean(0), means.std(0, correction=0)

    return answer


def time_calls(call: Callable[[Tensor], Any], x: Tensor, calls: int) -> NDArray[np.float64]:
    """Return the seconds of each call, on one row at a time."""
    rows = list(x.split(1))
    times = np.empty(calls)
    with torch.inference_mode():
        for i in range(-200, calls):
            row = rows[i % len(rows)]
            began = time.perf_counter()
            call(row)
            if i >= 0:
                times[i] = time.perf_counter() - began
    return times


@cache
def clock() -> Callable[..., int]:
    """Compile the clock that has no Python in it, and return it.

    Raises:
        RuntimeError: it does not compile.
    """
    from torch.utils import cpp_extension

    folder = Path(tempfile.mkdtemp())
    library = folder / "clock.so"
    libraries = Path(torch.__file__).with_name("lib")
    command = ["g++", "-O2", "-std=c++20", "-shared", "-fPIC", str(Path(__file__).with_name("clock.cpp"))]
    command += [f"-I{path}" for path in cpp_extension.include_paths()]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", f"-L{libraries}"]
    command += ["-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}", "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603 - only file names of our own
    if done.returncode:
        raise RuntimeError(f"the clock must compile, got {done.stderr[-500:]}")
    function: Callable[..., int] = ctypes.CDLL(str(library)).effens_clock
    return function


def time_calls_without_python(path: Path, x: Tensor, calls: int) -> NDArray[np.float64]:
    """Return the seconds of each call of a compiled file, timed in C++."""
    rows = x.float().contiguous()
    times = np.empty(calls)
    pointers = (ctypes.c_void_p(rows.data_ptr()), ctypes.c_long(len(x)), ctypes.c_long(x.shape[1]))
    failed = clock()(str(path).encode(), *pointers, ctypes.c_long(calls), times.ctypes.data_as(ctypes.c_void_p))
    if failed:
        raise RuntimeError(f"the compiled file must run in C++, got error {failed}")
    return times


def run(looks: int = 5) -> None:
    """Time every method in every way, in turns, unless that is kept already."""
    path = RESULTS / "serving.npz"
    if path.exists():
        return
    task = TASKS["orders"]
    brief = replace(task, pool=task.members, epochs=task.members)
    x = flows.order_flow()["test"].x[:500]
    calls: dict[tuple[str, str], Callable[[int], NDArray[np.float64]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in tqdm(METHODS, desc="exporting"):
            ensemble, _ = train_one(brief, name, shipped().settings("orders", name), 0)
            ensemble.eval()
            calls[name, "eager"] = partial(time_calls, eager(plain(copy.deepcopy(ensemble))), x)
            for way, backend in (("ONNX Runtime", "onnx"), ("AOTInductor", "aoti")):
                file = Path(folder) / f"{len(calls)}.pt2"
                served = serving.export(ensemble, x[:1], file, backend, likelihood=Locations())
                calls[name, way] = partial(time_calls, served.run, x)
                if backend == "aoti":
                    calls[name, WAYS[3]] = partial(time_calls_without_python, file, x)
        found: dict[tuple[str, str], list[NDArray[np.float64]]] = {key: [] for key in calls}
        for _ in tqdm(range(looks), desc="timing"):
            for key, call in calls.items():
                found[key].append(call(CALLS // looks))
    at = (np.arange(KEPT) + 0.5) / KEPT
    arrays: dict[str, Any] = {
        f"{name} | {way}": np.quantile(np.concatenate(times), at).astype(np.float32)
        for (name, way), times in found.items()
    }
    facts = {"threads": torch.get_num_threads(), "calls": CALLS, "members": task.members, **provenance()}
    content = io.BytesIO()
    np.savez_compressed(content, facts=np.array(json.dumps(facts)), **arrays)
    write_whole(path, content.getvalue())
    read.cache_clear()


@cache
def read() -> dict[tuple[str, str], Tensor]:
    """Return the kept times of one decision by (method, way), ascending, in seconds, float64.

    Raises:
        FileNotFoundError: they were not measured.
    """
    path = RESULTS / "serving.npz"
    if not path.exists():
        raise FileNotFoundError(
            "results must hold the times of serving, got none: run python -m effens_book.finance.order_flow"
        )
    with np.load(path, allow_pickle=False) as file:
        pairs = [key.partition(" | ")[::2] for key in file.files if key != "facts"]
        return {(name, way): torch.from_numpy(file[f"{name} | {way}"]).double() for name, way in pairs}


def draw_times(method: str, way: str, n: int, seed: int = 0) -> Tensor:
    """Draw n service times of a method in a way of serving, as if independent, (n,) seconds."""
    times = read()[method, way]
    return times[torch.randint(len(times), (n,), generator=torch.Generator().manual_seed(seed))]


if __name__ == "__main__":
    torch.set_num_threads(1)
    run()
