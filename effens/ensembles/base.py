"""What every ensemble shares: it answers with all its members, and differs from plain training in a few small hooks.

``ensemble(x)`` maps ``(batch, ...)`` to ``(members, batch, outputs)``, never to an average: the reader writes the mean.
Where a network takes several tensors, ``x`` is a tuple, list or dict of them, all with the batch as their first axis.
One training loop (`effens.fit`) serves all methods, because each overrides only the hooks it needs.
"""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from effens.ensembles.trunk import OnTrunk, Trunk
from effens.inputs import Inputs, count_rows, each, tensors_of
from effens.modes import still_modules

MakeNet = Callable[[], nn.Module]


class Ensemble(nn.Module):
    """Base class of every method. A new method overrides `forward`, `member`, and those hooks in which it differs.

    Args:
        members: how many predictions an input gets.
        streams: how many networks are trained at once: ``members``, or 1 where a single network is trained.
        trunk: a network that all members share: member m is ``make_net()(trunk(x))``. Frozen, it is run once for each
            row, and once for all epochs where `effens.fit` gets tensors.

    Raises:
        ValueError: ``members`` is below 1.

    Example:
        >>> ensemble = effens.DeepEnsemble(lambda: nn.Linear(3, 2), members=4)
        >>> isinstance(ensemble, Ensemble), ensemble.members
        (True, 4)
    """

    noisy = False  # whether the noise of SGD is what it reads

    def __init__(self, members: int, streams: int | None = None, trunk: nn.Module | None = None) -> None:
        super().__init__()
        check_positive(members=members)
        self.trunk = None if trunk is None else Trunk(trunk)
        self.fed = False  # whether the inputs are the trunk's features
        self.members = members
        self.streams = members if streams is None else streams
        self.still: list[nn.Module] = []  # that stay in eval mode in training

    def train(self, mode: bool = True) -> Self:
        """Set the mode; what the network has put into eval mode by itself, frozen batch norm say, stays in it."""
        before = [] if self.training else [module for module in self.still if not module.training]
        self.still = list(dict.fromkeys([*before, *still_modules(self)]))
        super().train(mode)
        for module in self.still:
            module.training = False
        return self

    def forward(self, x: Inputs) -> Tensor:
        """Answer with every member: ``(batch, ...)`` to ``(members, batch, outputs)``."""
        raise NotImplementedError(f"an ensemble must override forward, got none in {type(self).__name__}")

    def forward_members(self, xs: Inputs) -> Tensor:
        """Give each network its own batch: ``(streams, batch, ...)`` to ``(streams, batch, outputs)``."""
        raise NotImplementedError(f"an ensemble must override forward_members, got none in {type(self).__name__}")

    def member(self, m: int) -> nn.Module:
        """Return a copy of member ``m`` as a plain network, equal to ``ensemble(x)[m]``."""
        raise NotImplementedError(f"an ensemble must override member, got none in {type(self).__name__}")

    def features(self, x: Inputs) -> Inputs:
        """Return what the members read: the trunk's features, or the inputs themselves."""
        if self.trunk is None or self.fed:
            return x
        if self.trunk.frozen or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.trunk(x)
        return self.trunk(x, 1 / float(self.reduce(torch.ones(self.streams, 1))))

    def stream_features(self, xs: Inputs) -> Inputs:
        """Return what each network reads of its own batch, ``(streams, batch, ...)``."""
        xs = self.check_streams(xs)
        if self.trunk is None or self.fed:
            return xs
        shape = tensors_of(xs)[0].shape[:2]
        found = self.features(each(lambda part: part.flatten(0, 1), xs))
        return each(lambda part: part.unflatten(0, shape), found)

    def on_trunk(self, network: nn.Module) -> nn.Module:
        """Return a network that reads inputs in place of features."""
        return network if self.trunk is None else OnTrunk(self.trunk, network)

    def answer_on_trunk(self, ensemble: "Ensemble") -> "Ensemble":
        """Return an ensemble of features as one of inputs."""
        if self.trunk is not None:
            ensemble = copy.copy(ensemble)
            ensemble._modules = dict(ensemble._modules)
            ensemble.trunk = self.trunk
        return ensemble

    def batches(self, n: int, batch_size: int, generator: torch.Generator | None = None) -> Iterable[Tensor]:
        """Say who sees which of ``n`` examples, and when: the indices of each step of an epoch.

        They are ``(streams, batch)``: each stream's own, which `forward_members` gets. Or ``(batch,)`` where all see
        the same batch, which `forward` then gets once. By default each stream has a shuffle of its own. With a
        `DataLoader` this is called for each of its batches, with ``batch_size`` equal to ``n``.
        """
        shuffles = torch.stack([torch.randperm(n, generator=generator) for _ in range(self.streams)])
        yield from shuffles.split(batch_size, dim=1)

    def schedule(self, step: int, steps: int) -> float:
        """Return the multiplier of the learning rate at ``step`` (from 0) of ``steps``: half a cosine, from 1 to 0."""
        return 0.5 * (1 + math.cos(math.pi * step / steps))

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups, each with its own rate and decay."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [{"params": parameters, "lr": lr, "weight_decay": weight_decay}]

    def reduce(self, losses: Tensor) -> Tensor:
        """Reduce losses ``(streams, batch)`` to a scalar: the mean over the batch, summed over streams.

        The sum gives each network exactly the gradient that it would have alone.
        """
        return losses.mean(1).sum()

    def collect(self, step: int, steps: int) -> None:
        """Keep what the method keeps, after ``step`` (from 0) of ``steps``. By default: nothing."""

    def finish(self, batches: Iterable[Inputs]) -> None:
        """Do, once, what is to be done at the end of training with the training inputs. By default: nothing."""

    def gradients(self) -> list[list[Tensor]]:
        """Return the gradients that are clipped together: by default all, in one list."""
        return [[parameter.grad for parameter in self.parameters() if parameter.grad is not None]]

    def answering(self) -> tuple["Ensemble", list[float]]:
        """Return what computes the answers, and how much each of its members counts. By default: itself, all alike.

        It is what `effens.export` writes, so it holds what the answers need and nothing else.
        """
        return self, [1.0] * self.members

    def check_member(self, m: int) -> int:
        """Return ``m`` if there is such a member; raise `IndexError` if not."""
        if not 0 <= m < self.members:
            raise IndexError(f"member must be in 0 ... {self.members - 1}, got {m}")
        return m

    def check_streams(self, xs: Inputs) -> Inputs:
        """Return ``xs`` if it holds one batch per network trained at once; raise `ValueError` if not."""
        if count_rows(xs) != self.streams or any(part.dim() < 2 for part in tensors_of(xs)):
            shapes = " and ".join(str(tuple(part.shape)) for part in tensors_of(xs))
            raise ValueError(f"xs must be (streams, batch, ...) with {self.streams} streams, got shape {shapes}")
        return xs


def call_make_net(make_net: MakeNet) -> nn.Module:
    """Return what ``make_net`` makes; raise unless it is a function that returns a network with all its weights."""
    if isinstance(make_net, nn.Module):
        raise TypeError(f"make_net must be a function that returns a fresh network, got a {type(make_net).__name__}")
    network = make_net()
    if not isinstance(network, nn.Module):
        raise TypeError(f"make_net must return an nn.Module, got {type(network).__name__}")
    if lazy := [layer for layer in network.modules() if isinstance(layer, LazyModuleMixin)]:
        raise ValueError(f"the network's weights must exist: call it once on a batch in make_net, got {lazy[0]}")
    return network


def check_positive(**values: int) -> None:
    """Raise `ValueError` unless every value is at least 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
