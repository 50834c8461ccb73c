"""What an ensemble costs on this machine: counted where counting is exact, timed where it is not."""

import copy
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from effens.ensembles.base import Ensemble
from effens.inputs import Inputs, call, count_rows, each, logits_of, rows_at
from effens.likelihoods import Categorical, Likelihood
from effens.training import example_losses, make_optimizer

TRAIN_BATCH = 128
BATCHES = (1, 256)


class Alone(Ensemble):
    """A plain network as an ensemble of one, with nothing in between."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(1)
        self.network = network

    def batches(self, n: int, batch_size: int, generator: torch.Generator | None = None) -> Iterable[Tensor]:
        """One network sees one batch."""
        yield from torch.randperm(n, generator=generator).split(batch_size)

    def forward(self, x: Inputs) -> Tensor:
        """Answer as the network does: ``(batch, ...)`` to ``(1, batch, outputs)``."""
        return logits_of(call(self.network, x))[None]


@dataclass(frozen=True)
class Costs:
    """What was counted and timed.

    Attributes:
        parameters: numbers that are trained.
        stored_bytes: all weights and buffers, as `effens.save` writes them.
        saved_bytes: what a forward pass at batch 128 keeps for the backward pass, parameters not counted.
        peak_bytes: the most memory allocated at once in a training step at batch 128, gradients included, beyond the
            weights, the optimizer's state and the batch; 0 on mps, where PyTorch cannot tell.
        train_seconds: median time of a training step at batch 128, AdamW included.
        latency_p50: seconds of one prediction at batch 1 and at batch 256, median.
        latency_p99: the same, 99th percentile.
        flops: floating-point operations of one prediction at batch 1, of matrix products and convolutions, two for
            each multiply-add; elementwise work counts 0, and so does `torch.mv`.
        threads: CPU threads that PyTorch used.
        device: where it ran.

    Example:
        >>> ensemble = effens.BatchEnsemble(lambda: nn.Linear(3, 2), members=4)
        >>> found = effens.measure(ensemble, torch.randn(20, 3), torch.randint(2, (20,)), seconds=0.01)
        >>> sorted(found.latency_p50)
        [1, 256]
    """

    parameters: int
    stored_bytes: int
    saved_bytes: int
    peak_bytes: int
    train_seconds: float
    latency_p50: dict[int, float]
    latency_p99: dict[int, float]
    flops: int
    threads: int
    device: str


def measure(
    ensemble: nn.Module, x: Inputs, y: Tensor, *, likelihood: Likelihood | None = None, seconds: float = 0.5
) -> Costs:
    """Count and time an ensemble where it is, without changing it, its gradients or the global random state.

    Args:
        ensemble: any ensemble; or one plain network, which is timed as it is, by a loop and a call without `effens`.
        x: inputs (n, ...); rows are repeated where fewer than a batch are given.
        y: their targets (n,).
        likelihood: what the outputs mean; `Categorical` by default.
        seconds: how long to time each of the three: a training step, and predictions at batch 1 and 256.

    Returns:
        The counts and times.

    Raises:
        ValueError: there are no examples, or labels are out of range.
        RuntimeError: the ensemble has no members yet, or cannot be trained as one: of a `HyperEnsemble`, measure
            ``chosen``.

    Example:
        >>> ensemble = effens.DeepEnsemble(lambda: nn.Linear(3, 2), members=4)
        >>> found = measure(ensemble, torch.randn(20, 3), torch.randint(2, (20,)), seconds=0.01)
        >>> found.parameters
        32
    """
    if not 0 < len(y) == count_rows(x):
        raise ValueError(f"x and y must have the same length >= 1, got {count_rows(x)} and {len(y)}")
    if not any(parameter.requires_grad for parameter in ensemble.parameters()):
        raise ValueError("the ensemble must have weights to train, got none that require gradients")
    likelihood = Categorical() if likelihood is None else likelihood
    asked = copy.deepcopy(ensemble)
    ensemble = asked if isinstance(asked, Ensemble) else Alone(asked)
    place = next(ensemble.parameters()).device
    x, y = each(lambda part: part.to(place), x), y.to(place)
    first = rows_at(x, slice(1))
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        ensemble.eval()
        with torch.no_grad():
            ensemble(first)  # a first call may look the network over
            with FlopCounterMode(display=False) as counter:
                outputs = ensemble(first)
        likelihood.check(outputs, y)

        ensemble.train()
        step = training_step(ensemble, x, y, likelihood)
        train = durations(step, seconds, place)
        peak = peak_bytes(step, place)
        saved = saved_bytes(ensemble, x, y, likelihood)

        ensemble.eval()
        ask = asked if isinstance(x, Tensor) or asked is ensemble else partial(call, asked)
        latency: dict[int, Tensor] = {}
        with torch.inference_mode():
            for size in BATCHES:
                rows = rows_at(x, torch.arange(size, device=place) % len(y))
                latency[size] = durations(partial(ask, rows), seconds, place)
    return Costs(
        parameters=sum(p.numel() for p in ensemble.parameters() if p.requires_grad),
        stored_bytes=sum(t.numel() * t.element_size() for t in ensemble.state_dict().values()),
        saved_bytes=saved,
        peak_bytes=peak,
        train_seconds=train.median().item(),
        latency_p50={size: times.median().item() for size, times in latency.items()},
        latency_p99={size: times.quantile(0.99).item() for size, times in latency.items()},
        flops=counter.get_total_flops(),
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
    )


def loss_at_batch(
    ensemble: Ensemble, x: Inputs, y: Tensor, likelihood: Likelihood, batch: int = TRAIN_BATCH
) -> Callable[[], Tensor]:
    """Return a function that computes the loss of a batch of examples, as `effens.fit` does."""
    rows = torch.arange(batch) % len(y)
    index, *_ = ensemble.batches(batch, batch)
    chosen = rows[index].to(y.device)
    xs, ys = rows_at(x, chosen), y[chosen]
    forward = ensemble if index.dim() == 1 else ensemble.forward_members

    def loss() -> Tensor:
        return ensemble.reduce(example_losses(likelihood, forward(xs), ys))

    return loss


def training_step(
    ensemble: Ensemble, x: Inputs, y: Tensor, likelihood: Likelihood, batch: int = TRAIN_BATCH
) -> Callable[[], None]:
    """Return a function that takes one step of AdamW, with a rate of 0, and leaves no gradients."""
    loss = loss_at_batch(ensemble, x, y, likelihood, batch)
    optimizer = make_optimizer(torch.optim.AdamW, ensemble.parameter_groups(0.0, 0.0), 0.0, 0.0)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def saved_bytes(ensemble: Ensemble, x: Inputs, y: Tensor, likelihood: Likelihood) -> int:
    """Return the bytes of all storages that a forward pass keeps for the backward pass, parameters not counted."""
    return kept_bytes(loss_at_batch(ensemble, x, y, likelihood), ensemble)


def kept_bytes(forward: Callable[[], object], module: nn.Module) -> int:
    """Return the bytes of all storages that are kept for the backward pass, a module's parameters not counted."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = forward()  # while the graph lives, no storage is used a second time
    del alive
    return sum(kept.values())


def peak_bytes(step: Callable[[], object], place: torch.device) -> int:
    """Return the most memory that a step has allocated at once, beyond what was there before it."""
    if place.type == "cuda":
        torch.cuda.synchronize(place)
        before = torch.cuda.memory_allocated(place)
        torch.cuda.reset_peak_memory_stats(place)
        step()
        return torch.cuda.max_memory_allocated(place) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would print that it starts and stops
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(sizes.cumsum(0).max().clamp_min(0)) if len(sizes) else 0


def durations(run: Callable[[], object], seconds: float, place: torch.device) -> Tensor:
    """Time calls for about ``seconds``, at least 10 of them, after three to warm up; returns seconds, float64."""

    def now() -> float:
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        elif place.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    for _ in range(3):
        run()
    times = [now()]
    while len(times) <= 10 or times[-1] - times[0] < seconds:
        run()
        times.append(now())
    return torch.tensor(times, dtype=torch.float64).diff()
