"""What methods share that train one network and derive their members from it."""

from typing import Self

import torch
from torch import Tensor, nn

from effens.ensembles.base import Ensemble
from effens.inputs import Inputs, call, logits_of, rows_at


class OneNetwork(Ensemble):
    """An ensemble that trains one network, ``network``, and derives its members from it.

    Args:
        members: how many members are derived. What holds them is never trained: it stays in eval mode.
    """

    network: nn.Module
    ready = 0  # how many members there are; fewer than planned where training was stopped early

    def __init__(self, members: int, trunk: nn.Module | None = None) -> None:
        super().__init__(members, streams=1, trunk=trunk)

    @property
    def members(self) -> int:
        """How many members there are, or will be."""
        return self.ready or self.planned

    @members.setter
    def members(self, members: int) -> None:
        self.planned = members

    def derived(self) -> Ensemble:
        """Return the ensemble of the members, which `forward`, `member` and `answering` ask."""
        raise NotImplementedError(f"an ensemble must override derived, got none in {type(self).__name__}")

    def forward(self, x: Inputs) -> Tensor:
        """Answer with every member: ``(batch, ...)`` to ``(members, batch, outputs)``."""
        self.check_ready()
        return self.derived().forward(self.features(x))[: self.ready]

    def member(self, m: int) -> nn.Module:
        """Return a copy of member ``m`` as a plain network, equal to ``ensemble(x)[m]``, that can be trained."""
        self.check_ready()
        member = self.derived().member(self.check_member(m))
        for parameter, trained in zip(member.parameters(), self.network.parameters(), strict=True):
            parameter.requires_grad_(trained.requires_grad)
        return self.on_trunk(member)

    def answering(self) -> tuple[Ensemble, list[float]]:
        """Return the members without the network that was trained."""
        self.check_ready()
        ensemble, weights = self.derived().answering()
        return self.answer_on_trunk(ensemble), [weight * (m < self.ready) for m, weight in enumerate(weights)]

    def check_ready(self) -> None:
        """Raise `RuntimeError` unless there are members."""
        if not self.ready:
            raise RuntimeError("no members yet: call effens.fit")

    def get_extra_state(self) -> Tensor:
        """Return how many members there are, for the state dict."""
        return torch.tensor(self.ready)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over how many members there are."""
        self.ready = int(state)

    def forward_members(self, xs: Inputs) -> Tensor:
        """Give the network in training its batch: ``(1, batch, ...)`` to ``(1, batch, outputs)``."""
        return logits_of(call(self.network, rows_at(self.stream_features(xs), 0)))[None]

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the network; members stay as they are, in eval mode."""
        super().train(mode)
        for part in self.children():
            if part is not self.network and part is not self.trunk:
                part.eval()
        return self
