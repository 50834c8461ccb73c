"""A network that all members share, in front of what each has for itself."""

import copy
from typing import Any

import torch
from torch import nn

from effens.inputs import Inputs, call, tensors_of


class Trunk(nn.Module):
    """A network whose features all members read. Frozen, it stays in eval mode and keeps no gradients.

    Args:
        network: it is taken over, not copied; frozen if none of its weights requires gradients.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"trunk must be an nn.Module, got {type(network).__name__}")
        self.network, self.training = network, network.training
        if self.frozen:
            self.eval()

    @property
    def frozen(self) -> bool:
        """Whether nothing in it is trained."""
        return not any(parameter.requires_grad for parameter in self.network.parameters())

    def train(self, mode: bool = True) -> "Trunk":
        """Set the mode; a frozen trunk stays in eval mode."""
        return super().train(mode and not self.frozen)

    def forward(self, x: Inputs, share: float = 1.0) -> Inputs:
        """Return the features of inputs; ``share`` is the part of their gradients that the trunk gets."""
        if self.frozen:
            with torch.no_grad():
                return call(self.network, x)
        features = call(self.network, x)
        if share != 1 and torch.is_grad_enabled():
            for part in tensors_of(features):
                if part.requires_grad:
                    part.register_hook(lambda gradient: share * gradient)
        return features


class OnTrunk(nn.Module):
    """A trunk, and a network or an ensemble that reads its features."""

    def __init__(self, trunk: Trunk, head: nn.Module) -> None:
        super().__init__()
        self.trunk, self.head, self.training = copy.deepcopy(trunk), head, head.training

    def forward(self, *x: Any, **named: Any) -> Any:
        """Answer for inputs of the trunk."""
        features = self.trunk(named or (x[0] if len(x) == 1 else x))
        return call(self.head, features)
