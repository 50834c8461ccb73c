"""Networks that are trained together as one batched computation, each with settings and shuffles of its own."""

import math
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from effens.ensembles.deep import DeepEnsemble, owned
from effens.likelihoods import Likelihood
from effens.training import MakeOptimizer, make_optimizer


class PerMember:
    """One optimizer for all members of a `DeepEnsemble`, who have rates and decays of their own.

    But for the decay, a step of AdamW, or of SGD, is the rate times something that depends on no weight and on no
    rate. So the optimizer moves zeros, at the schedule's rate, and each weight moves by that times its member's rate.

    Args:
        ensemble: on the device on which it is trained.
        optimizer: `torch.optim.AdamW` or `torch.optim.SGD`, or a partial of one.
        lrs: one for each member.
        decays: one for each member.

    Raises:
        ValueError: there is not one of each for each member, one is out of range, members share weights, or the
            optimizer is another one.
    """

    def __init__(
        self, ensemble: DeepEnsemble, optimizer: MakeOptimizer, lrs: Sequence[float], decays: Sequence[float]
    ) -> None:
        rule = optimizer.func if isinstance(optimizer, partial) else optimizer
        if rule not in (torch.optim.AdamW, torch.optim.SGD):
            name = getattr(rule, "__name__", type(rule).__name__)
            raise ValueError(f"optimizer must be AdamW or SGD for rates or decays of the members' own, got {name}")
        owners = members_of(ensemble)
        each = [one_each("lr", lrs, ensemble.members), one_each("weight_decay", decays, ensemble.members)]
        self.coupled = rule is torch.optim.SGD  # the decay goes through the momentum
        self.weights = list(owners)
        self.lrs, self.decays = (
            [values[owner].to(p.dtype).to(p.device) for p, owner in owners.items()] for values in each
        )
        self.moves = [torch.zeros_like(p) for p in owners]
        self.optimizer = make_optimizer(optimizer, [{"params": self.moves}], 1.0, 0.0)
        self.param_groups = self.optimizer.param_groups
        self.sign = -1 if self.param_groups[0]["maximize"] else 1  # of the gradient that the optimizer follows

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
                move.grad.addcmul_(weight, decay, value=self.sign)
        self.optimizer.step()
        multiplier = self.param_groups[0]["lr"]
        for weight, move, lr, decay in zip(self.weights, self.moves, self.lrs, self.decays, strict=True):
            if weight.grad is None:  # not asked in this step: it neither moves nor decays
                continue
            if not self.coupled:
                weight.mul_(1 - multiplier * lr * decay)
            weight.addcmul_(move, lr)
            move.zero_()


def members_of(ensemble: DeepEnsemble) -> dict[nn.Parameter, Tensor]:
    """Return which member each weight belongs to: its number, or all numbers along a stacked weight's first axis."""
    owners: dict[nn.Parameter, Tensor] = {}
    for p, m in owned(ensemble.network):
        owner = torch.arange(len(p)).view(-1, *[1] * (p.dim() - 1)) if m is None else torch.tensor(m)
        if not torch.equal(owners.setdefault(p, owner), owner):
            raise ValueError("members with rates or decays of their own must share no weights, got shared ones")
    return {p: owner for p, owner in owners.items() if p.requires_grad}


def one_each(name: str, values: Sequence[float], members: int) -> Tensor:
    """Return a value for each member; raise `ValueError` unless there are so many, and all are rates, or decays."""
    if len(values) != members:
        raise ValueError(f"{name} must hold one value for each of {members} members, got {len(values)}")
    least, low = (">", math.ulp(0.0)) if name == "lr" else (">=", 0.0)
    if wrong := [value for value in values if not low <= value < math.inf]:
        raise ValueError(f"{name} must be {least} 0 and finite, got {wrong[0]}")
    return torch.tensor(values, dtype=torch.float64)


class OwnOrders(DeepEnsemble):
    """Networks that are trained together, each with the shuffles that it would have alone: those of its seed."""

    def __init__(self, networks: Sequence[nn.Module], seeds: Sequence[int]) -> None:
        super().__init__(partial(next, iter(networks)), len(networks))
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def batches(self, n: int, batch_size: int, generator: torch.Generator | None = None) -> Iterable[Tensor]:
        """Return the batches of one shuffle a network, each ``(members, batch)``."""
        shuffles = torch.stack([torch.randperm(n, generator=own) for own in self.generators])
        yield from shuffles.split(batch_size, dim=1)


class Lenient(Likelihood):
    """A likelihood under which a network that diverges has no loss any more, so that the others are trained on.

    Each network's gradients depend on its own loss alone: what is not finite stays with the network that made it.

    Attributes:
        diverged: whether each network's outputs or loss were once not finite, ``(streams,)``.
    """

    def __init__(self, likelihood: Likelihood) -> None:
        self.likelihood = likelihood
        self.diverged = torch.tensor(False)

    def nll(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the negative log likelihood of each target, ``(streams, batch, ...)``; 0 for those that diverged."""

        def without(values: Tensor) -> Tensor:
            return values.masked_fill(self.diverged.view(-1, *[1] * (values.dim() - 1)), 0.0)

        self.diverged = self.diverged.to(outputs.device) | ~outputs.detach().isfinite().flatten(1).all(1)
        losses = self.likelihood.nll(without(outputs), y)
        self.diverged = self.diverged | ~losses.detach().flatten(1).mean(1).isfinite()
        return without(losses)

    def missing(self, y: Tensor) -> Tensor | None:
        """Return which targets are not there."""
        return self.likelihood.missing(y)

    def check(self, outputs: Tensor, y: Tensor) -> None:
        """Raise `ValueError` unless these targets can be read with these outputs."""
        self.likelihood.check(outputs, y)
