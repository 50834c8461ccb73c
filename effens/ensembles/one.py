"""What methods share that train one network and derive their members from it."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from effens.ensembles.base import Ensemble, MakeNet, call_make_net
from effens.ensembles.deep import DeepEnsemble, copy_trained
from effens.inputs import Inputs, call, logits_of, rows_at


class OneNetwork(Ensemble):
    """An ensemble that trains one network, ``network``, and derives its members from it.

    Args:
        make_net: () -> nn.Module, a fresh network; it is called once.
        members: how many members are derived. What holds them is never trained: it stays in eval mode.
    """

    network: nn.Module
    ready = 0  # how many members there are; fewer than planned where training was stopped early

    def __init__(self, make_net: MakeNet, members: int, trunk: nn.Module | None = None) -> None:
        super().__init__(members, streams=1, trunk=trunk)
        self.network = call_make_net(make_net)
        self.trained = {name: tuple(p.shape) for name, p in self.network.named_parameters() if p.requires_grad}

    @property
    def members(self) -> int:
        """How many members there are, or will be."""
        return self.ready or self.planned

    @members.setter
    def members(self, members: int) -> None:
        self.planned = members

    def copies(self) -> DeepEnsemble:
        """Return the network so many times as there are members, to be filled; what is frozen is there once."""
        return DeepEnsemble(lambda: copy_trained(self.network), self.planned).eval().requires_grad_(False)

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return the optimizer's one group; raise `ValueError` if it holds weights that the members share."""
        freed = {name for name, p in self.network.named_parameters() if p.requires_grad} - self.trained.keys()
        if freed:
            rule = "weights that were frozen when the ensemble was made must stay so, for its members share them"
            raise ValueError(f"{rule}: make another ensemble around its network, got {sorted(freed)}")
        return super().parameter_groups(lr, weight_decay)

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
            raise RuntimeError(
                "no members yet: call effens.fit; in its callback, predict with DeepEnsemble.of([network])"
            )

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
