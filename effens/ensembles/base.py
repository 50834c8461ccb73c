"""What every ensemble shares: it answers with all its members, and differs from plain training in a few small hooks.

``ensemble(x)`` maps ``(batch, ...)`` to ``(members, batch, outputs)``, never to an average: the reader writes the mean.
One training loop (`effens.fit`) serves all methods, because each overrides only the hooks it needs.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

MakeNet = Callable[[], nn.Module]
MODES: WeakKeyDictionary[nn.Module, tuple[int, list[tuple[nn.Module, bool]]]] = WeakKeyDictionary()
MODES_LOCK = Lock()  # networks in `eval_mode`: how many threads ask for it, and the modes of before


class Ensemble(nn.Module):
    """Base class of every method. A new method overrides `forward`, `member`, and those hooks in which it differs.

    Args:
        members: how many predictions an input gets.
        streams: how many networks are trained at once: ``members``, or 1 where a single network is trained.

    Raises:
        ValueError: ``members`` is below 1.

    Example:
        >>> ensemble = effens.DeepEnsemble(lambda: nn.Linear(3, 2), members=4)
        >>> isinstance(ensemble, Ensemble), ensemble.members
        (True, 4)
    """

    def __init__(self, members: int, streams: int | None = None) -> None:
        super().__init__()
        check_positive(members=members)
        self.members = members
        self.streams = members if streams is None else streams
        self.still: list[nn.Module] = []  # that stay in eval mode when `effens.fit` trains

    def forward(self, x: Tensor) -> Tensor:
        """Answer with every member: ``(batch, ...)`` to ``(members, batch, outputs)``."""
        raise NotImplementedError(f"an ensemble must override forward, got none in {type(self).__name__}")

    def forward_members(self, xs: Tensor) -> Tensor:
        """Give each network its own batch: ``(streams, batch, ...)`` to ``(streams, batch, outputs)``."""
        raise NotImplementedError(f"an ensemble must override forward_members, got none in {type(self).__name__}")

    def member(self, m: int) -> nn.Module:
        """Return a copy of member ``m`` as a plain network, equal to ``ensemble(x)[m]``."""
        raise NotImplementedError(f"an ensemble must override member, got none in {type(self).__name__}")

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

    def finish(self, batches: Iterable[Tensor]) -> None:
        """Do, once, what is to be done at the end of training with the training inputs. By default: nothing."""

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

    def check_streams(self, xs: Tensor) -> Tensor:
        """Return ``xs`` if it holds one batch per network trained at once; raise `ValueError` if not."""
        if xs.dim() < 2 or xs.shape[0] != self.streams:
            raise ValueError(
                f"xs must be (streams, batch, ...) with {self.streams} streams, got shape {tuple(xs.shape)}"
            )
        return xs


class OneNetwork(Ensemble):
    """An ensemble that trains one network, ``network``, and derives its members from it.

    Args:
        members: how many members are derived. What holds them is never trained: it stays in eval mode.
    """

    network: nn.Module

    def __init__(self, members: int) -> None:
        super().__init__(members, streams=1)
        self.ready = False  # whether there are members yet

    def derived(self) -> Ensemble:
        """Return the ensemble of the members, which `forward`, `member` and `answering` ask."""
        raise NotImplementedError(f"an ensemble must override derived, got none in {type(self).__name__}")

    def forward(self, x: Tensor) -> Tensor:
        """Answer with every member: ``(batch, ...)`` to ``(members, batch, outputs)``."""
        self.check_ready()
        return self.derived().forward(x)

    def member(self, m: int) -> nn.Module:
        """Return a copy of member ``m`` as a plain network, equal to ``ensemble(x)[m]``, that can be trained."""
        self.check_ready()
        member = self.derived().member(m)
        for parameter, trained in zip(member.parameters(), self.network.parameters(), strict=True):
            parameter.requires_grad_(trained.requires_grad)
        return member

    def answering(self) -> tuple[Ensemble, list[float]]:
        """Return the members without the network that was trained."""
        self.check_ready()
        return self.derived().answering()

    def check_ready(self) -> None:
        """Raise `RuntimeError` unless there are members."""
        if not self.ready:
            raise RuntimeError("no members yet: call effens.fit")

    def get_extra_state(self) -> Tensor:
        """Return whether there are members, for the state dict."""
        return torch.tensor(self.ready)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over whether there are members."""
        self.ready = bool(state)

    def forward_members(self, xs: Tensor) -> Tensor:
        """Give the network in training its batch: ``(1, batch, ...)`` to ``(1, batch, outputs)``."""
        outputs = self.network(self.check_streams(xs)[0])
        if not isinstance(outputs, Tensor):
            raise ValueError(f"the network must return a tensor of outputs, got {type(outputs).__name__}")
        return outputs[None]

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the network; members stay as they are, in eval mode."""
        super().train(mode)
        for part in self.children():
            part.train(mode and part is self.network)
        return self


def call_make_net(make_net: MakeNet) -> nn.Module:
    """Return what ``make_net`` makes; raise `TypeError` unless it is a function that returns a network."""
    if isinstance(make_net, nn.Module):
        raise TypeError(f"make_net must be a function that returns a fresh network, got a {type(make_net).__name__}")
    network = make_net()
    if not isinstance(network, nn.Module):
        raise TypeError(f"make_net must return an nn.Module, got {type(network).__name__}")
    return network


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Put a network into eval mode; when the last thread that asked for it is done, put all modules back as before."""
    with MODES_LOCK:
        if network not in MODES:
            MODES[network] = 0, [(module, module.training) for module in network.modules()]
            network.eval()
        count, modes = MODES[network]
        MODES[network] = count + 1, modes
    try:
        yield
    finally:
        with MODES_LOCK:
            count, modes = MODES.pop(network)
            if count > 1:
                MODES[network] = count - 1, modes
            else:
                for module, mode in modes:
                    module.training = mode


def check_positive(**values: int) -> None:
    """Raise `ValueError` unless every value is at least 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
