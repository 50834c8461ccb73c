"""Those who do the same: the loop that the book grew from, and two packages, each in the layout of its own."""

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LoopLinear(nn.Module):
    """BatchEnsemble as a loop over members: the layer that the book grew from, its bias each member's own, after s."""

    def __init__(self, inputs: int, outputs: int, members: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        nn.init.xavier_uniform_(self.weight)
        self.r, self.s, self.bias = rank_one(members, inputs, outputs)

    def forward(self, xs: Tensor) -> Tensor:
        """Map ``(members, batch, in)`` to ``(members, batch, out)``."""
        factors = zip(xs, self.r, self.s, self.bias, strict=True)
        return torch.stack([F.linear(x * r, self.weight) * s + b for x, r, s, b in factors])


class LoopConv2d(nn.Module):
    """The same loop for a convolution of 3 x 3."""

    def __init__(self, inputs: int, outputs: int, members: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 3, 3))
        nn.init.xavier_uniform_(self.weight)
        self.r, self.s, self.bias = rank_one(members, inputs, outputs)

    def forward(self, xs: Tensor) -> Tensor:
        """Map ``(members, batch, in, height, width)`` to ``(members, batch, out, height, width)``."""
        factors = zip(xs, *(f[..., None, None] for f in (self.r, self.s, self.bias)), strict=True)
        return torch.stack([F.conv2d(x * r, self.weight, padding=1) * s + b for x, r, s, b in factors])


def rank_one(members: int, inputs: int, outputs: int) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """Return r, s and a bias: ``(members, in)``, ``(members, out)``, ``(members, out)``."""
    r, s = torch.randn(members, inputs), torch.randn(members, outputs)
    return nn.Parameter(r), nn.Parameter(s), nn.Parameter(torch.zeros(members, outputs))


def found(name: str) -> bool:
    """Say whether a package is installed."""
    return importlib.util.find_spec(name) is not None


def uncertainty(name: str) -> Any:
    """Import a module of torch-uncertainty alone: its packages, imported whole, want a training framework and images.

    Args:
        name: of the module, ``"layers.batch_ensemble"``, say.
    """
    spec = importlib.util.find_spec("torch_uncertainty")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    place = spec.submodule_search_locations[0]
    parts = ["torch_uncertainty", *name.split(".")]
    for i in range(1, len(parts)):
        package = ModuleType(".".join(parts[:i]))
        package.__path__ = ["/".join([place, *parts[1:i]])]
        package.__spec__ = spec
        sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(".".join(parts))


def tabular(kind: str, inputs: int, outputs: int, *, members: int) -> nn.Module:
    """Return a layer of tabm for rows ``(batch, members, in)``: ``"LinearBatchEnsemble"`` or ``"LinearEnsemble"``."""
    options: dict[str, Any] = {"scaling_init": "random-signs"} if kind == "LinearBatchEnsemble" else {}
    layer: nn.Module = getattr(importlib.import_module("tabm"), kind)(inputs, outputs, k=members, **options)
    return layer
