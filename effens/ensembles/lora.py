r"""LoRA ensembles: one pretrained network, frozen, and for each member its own low-rank change of some layers.

.. math:: W_m = W + B_m A_m

Hu et al. (2022), "LoRA: low-rank adaptation of large language models", arXiv:2106.09685; as an ensemble, Wang,
Aitchison and Rudolph (2023), "LoRA ensembles for large language model fine-tuning", arXiv:2310.00035. B starts at 0, so
that every member starts as the pretrained network, and A is drawn for each member, which lets them part.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from effens.ensembles.attention import MemberAttention, call_layers, linear, why_no_attention
from effens.ensembles.base import MakeNet, check_positive
from effens.ensembles.deep import member_gradients, stack
from effens.ensembles.layers import MemberLayer, RowEnsemble, fresh_network, linear_each, names_of, replace_layers


class LoRAEnsemble(RowEnsemble):
    """A frozen network with a low-rank change of some linear layers, and a head, for each member.

    Args:
        make_net: () -> nn.Module, the pretrained network.
        members: how many members.
        rank: of each member's change.
        layers: names of linear layers or attention modules, or the last parts of names, ``("query", "value")`` say;
            None: every `nn.MultiheadAttention`.
        heads: names of modules that are trained whole, one a member, or the last parts of names.
        trunk: a network that all members share: see `Ensemble`.

    Raises:
        ValueError: a number is out of range, a name fits nothing, or a layer is of another kind.

    Shape:
        - ``ensemble(x)``: ``(batch, ...)`` to ``(members, batch, outputs)``
        - ``ensemble.forward_members(xs)``: ``(members, batch, ...)`` to ``(members, batch, outputs)``

    Example:
        >>> network = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> ensemble = LoRAEnsemble(lambda: network, members=4, rank=2, layers=("0",), heads=("2",))
        >>> ensemble(torch.randn(10, 3)).shape
        torch.Size([4, 10, 2])
    """

    def __init__(
        self,
        make_net: MakeNet,
        members: int = 4,
        *,
        rank: int = 8,
        layers: str | Sequence[str] | None = None,
        heads: str | Sequence[str] = ("head",),
        trunk: nn.Module | None = None,
    ) -> None:
        check_positive(members=members, rank=rank)
        network = fresh_network(make_net).requires_grad_(False)
        adapted, whole = chosen_layers(network, layers, heads)

        def low_rank(plain: nn.Linear) -> LoRALinear:
            return LoRALinear(plain, members, rank)

        def replace(name: str, module: nn.Module) -> nn.Module | None:
            if name in whole:
                return stack([copy.deepcopy(module).requires_grad_() for _ in range(members)])
            call_layers(module)
            if isinstance(module, _BatchNorm):
                module.eval()  # and stays so: it is frozen
            if name not in adapted:
                return None
            if isinstance(module, nn.MultiheadAttention):
                return MemberAttention(module, members, low_rank)
            assert isinstance(module, nn.Linear)
            return low_rank(module)

        network = replace_layers(network, replace)
        remedy = "rows must be the first axis, and layers called through their forward"
        super().__init__(network, members, remedy, trunk)

    def gradients(self) -> list[list[Tensor]]:
        """Return each member's gradients, which are clipped by themselves, and the trunk's."""
        return member_gradients(self)

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"members={self.members}"


def chosen_layers(
    network: nn.Module, layers: str | Sequence[str] | None, heads: str | Sequence[str]
) -> tuple[list[str], list[str]]:
    """Return the full names of the layers that get a low-rank change, and of the heads; raise `ValueError` if wrong."""
    heads, layers = names_of(heads), None if layers is None else names_of(layers)
    adapted, whole, used = list[str](), list[str](), set[str]()
    for name, module in network.named_modules():
        if not name or any(name.startswith(f"{outer}.") for outer in [*adapted, *whole]):
            continue
        fits_heads, fits_layers = (
            [each for each in wanted if name == each or name.endswith(f".{each}")] for wanted in (heads, layers or ())
        )
        used.update(fits_heads or fits_layers)
        attention = isinstance(module, nn.MultiheadAttention)
        if fits_heads:
            whole.append(name)
        elif attention if layers is None else fits_layers:
            reason = why_no_attention(module) if isinstance(module, nn.MultiheadAttention) else ""
            if reason or not (attention or type(module) is nn.Linear):
                raise ValueError(f"layers must be nn.Linear or attention, got {name!r}, {reason or module}")
            adapted.append(name)
    have = [name for name, _ in network.named_modules() if name]
    if unknown := [name for name in (*heads, *(layers or ())) if name not in used]:
        raise ValueError(f"layers and heads must name modules of the network, got {unknown}, have {have}")
    if not adapted:
        raise ValueError(f"the network must have nn.MultiheadAttention, or layers= name linear layers, have {have}")
    return adapted, whole


class LoRALinear(MemberLayer):
    """A frozen linear layer and each member's change of it: a ``(members, rank, in)``, b ``(members, out, rank)``."""

    def __init__(self, plain: nn.Linear, members: int, rank: int) -> None:
        super().__init__()
        self.members = members
        self.weight, self.bias = plain.weight.requires_grad_(False), plain.bias
        bound = plain.in_features**-0.5
        self.a = nn.Parameter(torch.empty(members, rank, plain.in_features).uniform_(-bound, bound).to(plain.weight))
        self.b = nn.Parameter(plain.weight.new_zeros(members, plain.out_features, rank))
        self.train(plain.training)

    def forward_each(self, x: Tensor) -> Tensor:
        """Map ``(members or 1, batch, ..., in)`` to ``(members, batch, ..., out)``."""
        return F.linear(x, self.weight, self.bias) + linear_each(linear_each(x, self.a, None), self.b, None)

    def member(self, m: int) -> nn.Linear:
        """Return a copy of member ``m``'s layer as a plain one, its change added in."""
        return linear(self.weight + self.b[m] @ self.a[m], self.bias, True).train(self.training)

    def extra_repr(self) -> str:
        """Describe the layer."""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, members={self.members}, rank={self.a.shape[1]}"


def add_lora(
    network: nn.Module,
    rank: int = 8,
    *,
    layers: str | Sequence[str] | None = None,
    heads: str | Sequence[str] = ("head",),
) -> nn.Module:
    """Return a network that is frozen but for a low-rank change of some layers, and its heads: for `SWAG`, say.

    What is frozen is shared by all copies that these methods make. To have one plain network again, its change added
    in, call `torch.nn.utils.parametrize.remove_parametrizations` with each changed layer.

    Args:
        network: a pretrained network; it is copied.
        rank: of the change.
        layers: as of `LoRAEnsemble`.
        heads: as of `LoRAEnsemble`.

    Raises:
        ValueError: as of `LoRAEnsemble`.

    Example:
        >>> network = add_lora(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), 2, layers="0", heads="2")
        >>> sum(weight.numel() for weight in network.parameters() if weight.requires_grad)
        40
        >>> ensemble = effens.SnapshotEnsemble(lambda: network, members=4)
    """
    check_positive(rank=rank)
    adapted, whole = chosen_layers(fresh_network(lambda: network), layers, heads)
    network = copy.deepcopy(network).requires_grad_(False)
    for name in whole:
        network.get_submodule(name).requires_grad_()
    for module in network.modules():
        if isinstance(module, _BatchNorm) and not any(p.requires_grad for p in module.parameters()):
            module.eval()  # and stays so: it is frozen
    for name in adapted:
        layer = network.get_submodule(name)
        if isinstance(layer, nn.MultiheadAttention):
            change(layer, "in_proj_weight", rank, parts=3)
            change(layer.out_proj, "weight", rank)
        else:
            change(layer, "weight", rank)
    return network


def change(layer: nn.Module, name: str, rank: int, parts: int = 1) -> None:
    """Give a weight of a layer a low-rank change."""
    parametrize.register_parametrization(layer, name, LowRank(getattr(layer, name), rank, parts))


class LowRank(nn.Module):
    """A change of a weight ``(out, in)``, or of several in one, as attention has them: of rank ``rank`` in each."""

    def __init__(self, weight: Tensor, rank: int, parts: int = 1) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        bound = inputs**-0.5
        self.a = nn.Parameter(weight.new_empty(parts, rank, inputs).uniform_(-bound, bound))
        self.b = nn.Parameter(weight.new_zeros(parts, outputs // parts, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with its change."""
        return weight + (self.b @ self.a).flatten(0, 1)
