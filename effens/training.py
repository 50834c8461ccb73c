"""The one training loop and the one way to predict, for every method."""

import math
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from effens.ensembles.base import Ensemble, MemberLayer
from effens.ensembles.deep import DeepEnsemble, LoopedLayer
from effens.likelihoods import Categorical, Likelihood

Data = tuple[Tensor, Tensor] | Dataset[Any] | DataLoader[Any]
MakeOptimizer = Callable[..., torch.optim.Optimizer]
FUSED = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)


@dataclass(frozen=True)
class History:
    """What happened in training.

    Attributes:
        losses: mean loss of each network at each step, ``(steps, streams)``, in nats.
        rates: rate at each step, ``(steps,)``; with rates of the members' own ``(steps, streams)``.
        seconds: training time.
    """

    losses: Tensor
    rates: Tensor
    seconds: float

    @property
    def steps(self) -> int:
        """How many steps the optimizer took."""
        return len(self.rates)

    def __repr__(self) -> str:
        last = self.losses[-1].mean().item() if self.steps else math.nan
        return f"History(steps={self.steps}, last loss={last:.4g}, seconds={self.seconds:.1f})"


def device() -> torch.device:
    """Return the best device at hand: cuda, then mps, then cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def fit(
    ensemble: Ensemble,
    data: Data,
    *,
    epochs: int = 20,
    batch_size: int = 128,
    rate: float | Sequence[float] = 1e-3,
    weight_decay: float | Sequence[float] = 0.0,
    optimizer: MakeOptimizer = torch.optim.AdamW,
    likelihood: Likelihood | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> History:
    """Train an ensemble. What makes a method is in its hooks: see `Ensemble`.

    Args:
        ensemble: any ensemble; it is moved to ``device`` and stays there, in eval mode.
        data: tensors ``(x, y)``, a map-style `Dataset`, or a `DataLoader`, which is used as it is given.
        epochs: passes over the data.
        batch_size: examples in a step; a `DataLoader` has its own.
        rate: the highest learning rate; `Ensemble.schedule` moves it at every step. Members of a `DeepEnsemble` can
            have rates of their own, one for each, with `torch.optim.AdamW` or `torch.optim.SGD`.
        weight_decay: the optimizer's, for all but an ensemble's fast weights; or one for each member, likewise.
        optimizer: called with parameter groups, ``lr`` and ``weight_decay``.
        likelihood: what the outputs mean; `Categorical` by default.
        device: where to train; by default `effens.device`.
        seed: of the shuffles and of dropout. The global random state is left as it was.
        progress: whether to show a progress bar when training takes longer than two seconds.

    Returns:
        The losses, the rates and the time taken.

    Raises:
        ValueError: there are no examples, labels are out of range, or targets are not one per example; or there are
            rates or decays for each member where there cannot be, or not one for each.
        FloatingPointError: a loss is not finite.
        TypeError: ``ensemble`` is none, but a plain network, say.
    """
    check_ensemble(ensemble)
    check_positive(epochs=epochs, batch_size=batch_size)
    likelihood = Categorical() if likelihood is None else likelihood
    place = place_of(device)
    ensemble.to(place)
    batches = Batches(ensemble, data, batch_size, place, torch.Generator().manual_seed(seed))
    if not any(parameter.requires_grad for parameter in ensemble.parameters()):
        raise ValueError("the ensemble must have weights to train, got none that require gradients")
    descent: torch.optim.Optimizer | PerMember
    if isinstance(rate, Sequence) or isinstance(weight_decay, Sequence):
        descent = PerMember(ensemble, optimizer, rate, weight_decay)
    else:
        descent = make_optimizer(optimizer, ensemble.parameter_groups(rate, weight_decay), rate, weight_decay)
    highest = [group["lr"] for group in descent.param_groups]
    steps = epochs * len(batches)
    losses: list[Tensor] = []
    rates: list[Any] = []
    began = time.perf_counter()
    with seeded(seed, place), bar(steps, progress) as shown:
        for _ in range(epochs):
            ensemble.train()
            for xs, ys, unchecked in batches:
                step = len(rates)
                multiplier = ensemble.schedule(step, steps)
                for group, top in zip(descent.param_groups, highest, strict=True):
                    group["lr"] = top * multiplier
                outputs = ensemble(xs) if ensemble.shared_batch else ensemble.forward_members(xs)
                if unchecked is not None:
                    likelihood.check(outputs, unchecked)
                each = likelihood.nll(outputs, ys)  # (streams, batch)
                descent.zero_grad()
                ensemble.reduce(each).backward()
                descent.step()
                ensemble.collect(step, steps)
                losses.append(each.detach().mean(1))
                rates.append([r * multiplier for r in rate] if isinstance(rate, Sequence) else rate * multiplier)
                shown.update()
            check_finite(losses, len(batches))
        ensemble.eval()
        ensemble.finish(batches.inputs())
    return History(torch.stack(losses).cpu(), torch.tensor(rates), time.perf_counter() - began)


@torch.no_grad()
def predict(ensemble: Ensemble, x: Tensor, *, likelihood: Likelihood | None = None, chunk: int = 1024) -> Any:
    """Ask every member, in eval mode, without gradients, in chunks of rows.

    Args:
        ensemble: any ensemble; it is asked on its own device, and left in the mode it was in.
        x: inputs ``(batch, ...)``.
        likelihood: what the outputs mean; `Categorical` by default.
        chunk: rows in a chunk.

    Returns:
        With `Categorical` probabilities ``(members, batch, classes)``; with `Gaussian` or `StudentT` a
        `torch.distributions` object of batch shape ``(members, batch)``; either on the device of ``x``.
    """
    check_ensemble(ensemble)
    check_positive(chunk=chunk)
    likelihood = Categorical() if likelihood is None else likelihood
    modes = [(module, module.training) for module in ensemble.modules()]
    home = next(chain(ensemble.parameters(), ensemble.buffers()), x).device
    ensemble.eval()
    try:
        outputs = torch.cat([ensemble(part.to(home)).to(x.device) for part in x.split(chunk)], dim=1)
    finally:
        for module, mode in modes:
            module.training = mode
    return likelihood.predict(outputs)


class Batches:
    """The batches of an epoch: ``(xs, ys, unchecked)``; ``unchecked`` are targets nobody has looked at yet, or None.

    ``xs`` is ``(streams, batch, ...)``; or ``(batch, ...)`` where an ensemble's streams share one batch.
    """

    def __init__(
        self, ensemble: Ensemble, data: Data, batch_size: int, place: torch.device, generator: torch.Generator
    ) -> None:
        self.ensemble, self.batch_size, self.place, self.generator = ensemble, batch_size, place, generator
        self.data = data
        self.tensors: tuple[Tensor, Tensor] | None = None
        if isinstance(data, tuple | list):
            x, y = as_pair(data)
            if len(x) != len(y):
                raise ValueError(f"x and y must have the same length, got {len(x)} and {len(y)}")
            self.tensors = x.to(place), y.to(place)
        elif not isinstance(data, Sized):
            raise ValueError(f"data must have a length, got {type(data).__name__} without one")
        if len(self) == 0:
            raise ValueError("data must hold at least one example for each member, got none")
        self.looked = False

    def __len__(self) -> int:
        """Return how many steps an epoch has."""
        n = len(self.tensors[0]) if self.tensors else len(cast(Sized, self.data))
        if isinstance(self.data, DataLoader) or n == 0:
            return n
        if self.ensemble.order_within_batch:
            return math.ceil(n / self.batch_size)
        return math.ceil(self.ensemble.examples(n) / self.ensemble.examples(self.batch_size))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        if isinstance(self.data, DataLoader):
            for batch in self.data:
                x, y = as_pair(batch)
                index = self.choose(self.ensemble.order(len(x), generator=self.generator))
                if index.numel():  # a last batch may be too small to be split
                    yield x[index].to(self.place), y[index].to(self.place), y
        else:
            for index in self.indices():
                yield self.fetch(self.choose(index))

    def indices(self) -> Iterator[Tensor]:
        """Yield indices ``(streams, batch)`` into the data, for one epoch."""
        n = len(self.tensors[0]) if self.tensors else len(cast(Sized, self.data))
        if self.ensemble.order_within_batch:
            for part in torch.randperm(n, generator=self.generator).split(self.batch_size):
                yield part[self.ensemble.order(len(part), generator=self.generator)]
        else:
            order = self.ensemble.order(n, generator=self.generator)
            yield from order.split(self.ensemble.examples(self.batch_size), dim=1)

    def choose(self, index: Tensor) -> Tensor:
        """Return ``(batch,)`` of indices ``(streams, batch)`` where the streams share a batch."""
        return index[0] if self.ensemble.shared_batch else index

    def fetch(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return inputs and targets at ``index``."""
        if self.tensors:
            unchecked = None if self.looked else self.tensors[1]
            self.looked = True
            x, y = (tensor[index.to(self.place)] for tensor in self.tensors)
            return x, y, unchecked
        dataset = cast(Dataset[Any], self.data)
        x, y = as_pair(default_collate([dataset[i] for i in index.flatten().tolist()]))
        return x.unflatten(0, index.shape).to(self.place), y.unflatten(0, index.shape).to(self.place), y

    def inputs(self) -> Iterator[Tensor]:
        """Yield every training input once, in batches, for `Ensemble.finish`."""
        if self.tensors:
            yield from self.tensors[0].split(self.batch_size)
        elif isinstance(self.data, DataLoader):
            for batch in self.data:
                yield as_pair(batch)[0].to(self.place)
        else:
            for part in torch.arange(len(cast(Sized, self.data))).split(self.batch_size):
                yield self.fetch(part)[0]


def as_pair(batch: Any) -> tuple[Tensor, Tensor]:
    """Return a batch as ``(x, y)``; raise `ValueError` if it is anything else."""
    parts = batch if isinstance(batch, tuple | list) else [batch]
    if len(parts) != 2 or not all(isinstance(part, Tensor) for part in parts):
        raise ValueError(f"data must give pairs of tensors (x, y), got {[type(part).__name__ for part in parts]}")
    return parts[0], parts[1]


def place_of(name: torch.device | str | None) -> torch.device:
    """Return the named device, or the best at hand."""
    return device() if name is None else torch.device(name)


def make_optimizer(
    optimizer: MakeOptimizer, groups: list[dict[str, Any]], rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Make the optimizer, fused where PyTorch can: for many small parameters most of its time is overhead."""
    floating = all(p.is_floating_point() for group in groups for p in group["params"])
    options = {"fused": True} if optimizer in FUSED and floating else {}
    return optimizer(groups, lr=rate, weight_decay=weight_decay, **options)


class PerMember:
    """One optimizer for all members of a `DeepEnsemble`, who have rates and decays of their own.

    But for the decay, a step of AdamW, or of SGD, is the rate times something that depends on no weight and on no
    rate. So the optimizer moves zeros, at the schedule's rate, and each weight moves by that times its member's rate.

    Args:
        ensemble: on the device on which it is trained.
        optimizer: `torch.optim.AdamW` or `torch.optim.SGD`, or a partial of one.
        rate: one for all, or one for each member.
        weight_decay: likewise.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        optimizer: MakeOptimizer,
        rate: float | Sequence[float],
        weight_decay: float | Sequence[float],
    ) -> None:
        rule = optimizer.func if isinstance(optimizer, partial) else optimizer
        if rule not in (torch.optim.AdamW, torch.optim.SGD):
            name = getattr(rule, "__name__", type(rule).__name__)
            raise ValueError(f"optimizer must be AdamW or SGD for rates or decays of the members' own, got {name}")
        owners = members_of(ensemble)
        rates = torch.tensor(one_each("rate", rate, ensemble.members), dtype=torch.float64)
        decays = torch.tensor(one_each("weight_decay", weight_decay, ensemble.members), dtype=torch.float64)
        self.coupled = rule is torch.optim.SGD  # the decay goes through the momentum
        self.weights = list(owners)
        self.rates = [rates[owner].to(p.dtype).to(p.device) for p, owner in owners.items()]
        self.decays = [decays[owner].to(p.dtype).to(p.device) for p, owner in owners.items()]
        self.moves = [torch.zeros_like(p) for p in owners]
        self.optimizer = make_optimizer(optimizer, [{"params": self.moves}], 1.0, 0.0)
        self.param_groups = self.optimizer.param_groups

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for weight in self.weights:
            weight.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Move every weight."""
        for weight, move, decay in zip(self.weights, self.moves, self.decays, strict=True):
            move.grad = weight.grad
            if self.coupled and move.grad is not None:
                move.grad.addcmul_(weight, decay)
        self.optimizer.step()
        multiplier = self.param_groups[0]["lr"]
        for weight, move, rate, decay in zip(self.weights, self.moves, self.rates, self.decays, strict=True):
            if weight.grad is None:  # not asked in this step: it neither moves nor decays
                continue
            if not self.coupled:
                weight.mul_(1 - multiplier * rate * decay)
            weight.addcmul_(move, rate)
            move.zero_()


def members_of(ensemble: Ensemble) -> dict[nn.Parameter, Tensor]:
    """Return which member each weight belongs to: its number, or all numbers along a stacked weight's first axis."""
    owners: dict[nn.Parameter, Tensor] = {}
    if not isinstance(ensemble, DeepEnsemble):
        rule = "only members of a DeepEnsemble can have rates or decays of their own"
        raise ValueError(f"{rule}, got a {type(ensemble).__name__}")
    for layer in ensemble.network.modules():
        if isinstance(layer, LoopedLayer):
            pairs = [(p, torch.tensor(m)) for m, network in enumerate(layer.layers) for p in network.parameters()]
        elif isinstance(layer, MemberLayer):
            pairs = [(p, torch.arange(len(p)).view(-1, *[1] * (p.dim() - 1))) for p in layer.parameters()]
        else:
            continue
        for p, owner in pairs:
            if not torch.equal(owners.setdefault(p, owner), owner):
                raise ValueError("members with rates or decays of their own must share no weights, got shared ones")
    return {p: owner for p, owner in owners.items() if p.requires_grad}


def one_each(name: str, values: float | Sequence[float], members: int) -> list[float]:
    """Return a value for each member; raise `ValueError` unless there are so many, and all are rates, or decays."""
    each = list(values) if isinstance(values, Sequence) else [values] * members
    if len(each) != members:
        raise ValueError(f"{name} must hold one value for each of {members} members, got {len(each)}")
    least, low = (">", math.ulp(0.0)) if name == "rate" else (">=", 0.0)
    if wrong := [value for value in each if not low <= value < math.inf]:
        raise ValueError(f"{name} must be {least} 0 and finite, got {wrong[0]}")
    return each


def bar(steps: int, progress: bool) -> "tqdm[Any]":
    """Return a progress bar that shows up after two seconds."""
    return tqdm(total=steps, desc="fit", unit="step", delay=2, leave=False, disable=not progress)


def check_ensemble(ensemble: nn.Module) -> None:
    """Raise `TypeError` unless this is an ensemble."""
    if not isinstance(ensemble, Ensemble):
        rule = "ensemble must be an Ensemble (one network: effens.DeepEnsemble.of([network]))"
        raise TypeError(f"{rule}, got {type(ensemble).__name__}")


def check_positive(**values: int) -> None:
    """Raise `ValueError` unless every value is at least 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")


@contextmanager
def seeded(seed: int, place: torch.device) -> Iterator[None]:
    """Seed the CPU's and the device's random numbers; at the end, put both back as they were."""
    devices: list[Any] = [torch.random] if place.type == "cpu" else [torch.random, torch.get_device_module(place)]
    with torch.cuda.device(place) if place.type == "cuda" else nullcontext():
        states = [device.get_rng_state() for device in devices]
        try:
            torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would reach every other device, too
            for device in devices[1:]:
                device.manual_seed(seed)
            yield
        finally:
            for device, state in zip(devices, states, strict=True):
                device.set_rng_state(state)


def check_finite(losses: list[Tensor], last: int) -> None:
    """Raise `FloatingPointError` if one of the last losses is not finite; called rarely, for it makes a GPU wait."""
    if not losses:
        raise ValueError("a batch must hold at least one example for each member, got none that does")
    finite = torch.stack(losses[-last:]).isfinite().all(1)
    if not bool(finite.all()):
        step = len(losses) - len(finite) + int((~finite).int().argmax())
        loss = [round(value, 4) for value in losses[step].tolist()]
        raise FloatingPointError(
            f"losses must be finite, got {loss} at step {step}: lower the rate, or look at the data"
        )
