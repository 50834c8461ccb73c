r"""BatchEnsemble: members share one weight matrix, and each scales its rows and columns by vectors of its own.

.. math:: W_m = W \odot (s_m r_m^\top), \qquad y_m = ((x \odot r_m) W^\top) \odot s_m + b_m

Wen, Tran and Ba (2020), "BatchEnsemble: an alternative approach to efficient ensemble and lifelong learning",
arXiv:2002.06715. PyTorch's weight is ``(out, in)``, so r scales inputs and s outputs; the bias comes after s.

Two formulas give the same result. *Fold* builds the M matrices and multiplies once, batched; *scale* multiplies the
rows by r, makes one plain product, and multiplies by s. Folding touches M weights per weight, scaling M activations per
activation, so the layers fold when ``activations >= 8 * weights`` for each member, the rule that was measured fastest.
"""

import copy
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from effens.ensembles.attention import MemberAttention, call_layers, why_no_attention
from effens.ensembles.base import Ensemble, MakeNet, check_positive
from effens.ensembles.deep import stack
from effens.ensembles.layers import (
    ALL,
    GEOMETRY,
    MemberLayer,
    Plain,
    RowEnsemble,
    WeightLayer,
    convolve,
    fresh_network,
    names_of,
    refusal,
    replace_layers,
    split_rows,
)
from effens.modes import is_frozen

Init = str | float
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class BatchEnsemble(RowEnsemble):
    """A network whose linear and convolutional layers are shared by all members but for rank-1 factors.

    Every exact `nn.Linear`, `nn.Conv1d` and `nn.Conv2d` of the network, at any depth, is replaced by its BatchEnsemble
    layer with the same weight, and so are the projections of `nn.MultiheadAttention` (``batch_first=True``). All other
    layers are shared, and so are those that are frozen, which stay as they are. A warning names what stays shared and
    has weights to train, but for normalization and what ``skip`` names. Rows must be the first axis and layers called
    through their `forward`: the first call compares the ensemble with its members.

    Around a network that is trained already, ``init=0.05`` keeps what it knows and lets the members part; ``"signs"``
    would undo it.

    Args:
        make_net: () -> nn.Module, a fresh network.
        members: how many members.
        skip: names of modules that stay shared, with all that is inside them, or of its own parameters; or one name.
        split: False: every member sees every example (tiled). True: each batch is divided among the members, as in the
            paper: a step costs what a single network's does, and each member sees ``1 / members`` of the examples.
        init: how r and s start: ``"signs"`` (random +1 and -1), ``"normal"`` (mean 1, standard deviation 0.5),
            ``"ones"`` (members that start identical, and stay so on a tiled batch without dropout), or a number: mean
            1 and that standard deviation.
        norms: ``"shared"``, or ``"own"``: every member has its own affine weights and statistics of normalization,
            but where it is frozen.
        fast_lr: the learning rate of r and s, as a multiple of the learning rate; they have no weight decay.
        trunk: a network that all members share: see `Ensemble`.

    Raises:
        ValueError: ``members`` is below 1, ``fast_lr`` is negative, ``skip`` names no module, a module must be
            refused, or nothing is converted.

    Shape:
        - ``ensemble(x)``: ``(batch, ...)`` to ``(members, batch, outputs)``
        - ``ensemble.forward_members(xs)``: ``(members, batch, ...)`` to ``(members, batch, outputs)``

    Example:
        >>> ensemble = BatchEnsemble(lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), members=4)
        >>> ensemble(torch.randn(10, 3)).shape
        torch.Size([4, 10, 2])
    """

    def __init__(
        self,
        make_net: MakeNet,
        members: int = 5,
        *,
        skip: str | Sequence[str] = (),
        split: bool = False,
        init: Init = "signs",
        norms: str = "shared",
        fast_lr: float = 0.5,
        trunk: nn.Module | None = None,
    ) -> None:
        check_positive(members=members)
        if not 0 <= fast_lr < math.inf:
            raise ValueError(f"fast_lr must be >= 0 and finite, got {fast_lr}")
        remedy = "rows must be the first axis, and layers called through their forward; skip= leaves some shared"
        if norms not in ("shared", "own"):
            raise ValueError(f"norms must be 'shared' or 'own', got {norms!r}")
        network = convert(fresh_network(make_net), members, skip, init, own_norms=norms == "own")
        super().__init__(network, members, remedy, trunk)
        self.split = split
        self.fast_lr = fast_lr

    def batches(self, n: int, batch_size: int, generator: torch.Generator | None = None) -> Iterable[Tensor]:
        """One shuffle: tiled, all members see each batch ``(batch,)``; split, each its part ``(members, batch)``."""
        shuffle = torch.randperm(n, generator=generator)
        if not self.split:
            yield from shuffle.split(batch_size)
        elif n >= self.members:
            if batch_size < self.members:
                rule = "split needs one example or more for each member, in the data and in a batch"
                raise ValueError(f"{rule}, got {batch_size} for {self.members} members")
            parts = shuffle[: n // self.members * self.members].view(-1, self.members).T  # neighbors part
            yield from parts.split(batch_size // self.members, dim=1)

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return two groups: shared weights and biases; and r and s, with their own rate and no decay."""
        layers = [layer for layer in self.modules() if isinstance(layer, RankOneLayer)]
        fast = [p for layer in layers for p in (layer.r, layer.s) if p.requires_grad]
        names = {id(p) for p in fast}
        slow = [p for p in self.parameters() if p.requires_grad and id(p) not in names]
        groups = [
            {"params": slow, "lr": lr, "weight_decay": weight_decay},
            {"params": fast, "lr": lr * self.fast_lr, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def answering(self) -> tuple[Ensemble, list[float]]:
        """Return a copy whose shared weights lie in memory as products of a few rows read them fastest."""
        ensemble, weights = copy.deepcopy(self), [1.0] * self.members
        for layer in ensemble.modules():
            if isinstance(layer, BatchEnsembleLinear):
                layer.weight.data = layer.weight.mT.contiguous().mT
        return ensemble, weights

    def extra_repr(self) -> str:
        """Show the settings, and how much of the weights all members share unchanged."""
        own = {p for layer in self.network.modules() if isinstance(layer, MemberLayer) for p in layer.parameters()}
        total = sum(p.numel() for p in self.network.parameters())
        left = sum(p.numel() for p in self.network.parameters() if p not in own) / total
        shared = f", left shared={left:.0%} of the weights" if left else ""
        return f"members={self.members}, split={self.split}, fast_lr={self.fast_lr}{shared}"

    def reduce(self, losses: Tensor) -> Tensor:
        """Reduce losses ``(members, batch)`` to their mean over both.

        The weights are shared: a sum over members would multiply their gradient by M against its decay.
        """
        return losses.mean()


class RankOneLayer(WeightLayer):
    """What both BatchEnsemble layers are: a shared weight, r ``(members, in)``, s and bias ``(members, out)``.

    Args:
        plain: `nn.Linear`, `nn.Conv1d` or `nn.Conv2d`, whose weight it shares and whose bias every member starts with.
        members: how many members.
        init: how r and s start.
    """

    def __init__(self, plain: Plain, members: int, init: Init) -> None:
        super().__init__()
        check_positive(members=members)
        self.members, self.geometry = members, None
        inputs, bias = plain.weight.shape[1], plain.bias
        if not isinstance(plain, nn.Linear):
            if plain.padding_mode != "zeros":
                raise ValueError(f"padding_mode must be 'zeros', got {plain.padding_mode!r}")
            inputs, self.geometry = plain.in_channels, {name: getattr(plain, name) for name in GEOMETRY}
        self.weight = plain.weight if isinstance(plain.weight, nn.Parameter) else nn.Parameter(plain.weight)
        trained = plain.weight.requires_grad  # else it stays as it is
        self.r, self.s = (
            nn.Parameter(init_factors(init if trained else "ones", members, size).to(plain.weight), trained)
            for size in (inputs, len(plain.weight))
        )
        self.bias = None if bias is None else nn.Parameter(bias.detach().repeat(members, 1), bias.requires_grad)
        outputs, inner = plain.weight.shape[:2]  # of x's numbers, for each member, from which on folding pays
        self.fold_from = 8 * plain.weight.numel() * inputs / (outputs + inner)
        self.train(plain.training)

    @classmethod
    def of(cls, plain: Plain, members: int, *, init: Init = "signs") -> Self:
        """Make the layer out of a plain one, whose weight it shares and whose bias every member starts with."""
        layer = cls.__new__(cls)
        RankOneLayer.__init__(layer, plain, members, init)
        return layer

    def weights(self, which: slice = ALL) -> Tensor:
        """Return members' weights: the shared one, its rows and columns scaled."""
        r, s = (self.r, self.s) if which is ALL else (self.r[which], self.s[which])
        if self.geometry is None:
            return self.weight * r.unsqueeze(1) * s.unsqueeze(2)
        outputs, groups = len(self.weight), self.geometry["groups"]
        r = r.view(len(r), groups, 1, -1).expand(-1, -1, outputs // groups, -1).flatten(1, 2)
        factors = r * s[:, :, None]
        return self.weight * factors.view(*factors.shape, *[1] * (self.weight.dim() - 2))

    def forward_each(self, x: Tensor) -> Tensor:
        """Map ``(members or 1, batch, ...)`` to ``(members, batch, ...)``: fold or scale, whichever is faster."""
        if self.folds(x):
            return super().forward_each(x)
        if self.geometry is not None:
            shape = (self.members, 1, -1, *[1] * (self.weight.dim() - 2))
            r, s, bias = self.r.view(shape), self.s.view(shape), None if self.bias is None else self.bias.view(shape)
            y = convolve((x * r).flatten(0, 1), self.weight, None, **self.geometry)
            return scale_and_shift(split_rows(y, self.members), s, bias)
        if x.dim() > 3:
            return self.forward_each(x.flatten(1, -2)).view(self.members, *x.shape[1:-1], len(self.weight))
        y = F.linear(x * self.r.unsqueeze(1), self.weight)
        return scale_and_shift(y, self.s.unsqueeze(1), None if self.bias is None else self.bias.unsqueeze(1))

    def folds(self, x: Tensor) -> bool:
        """Say whether to build each member's weight: if it reads and writes 8 numbers or more per weight, or 4 of x."""
        return x.numel() >= self.fold_from * (self.members if len(x) == self.members else 0.5)


class BatchEnsembleLinear(RankOneLayer):
    r"""A linear layer with a shared weight and rank-1 factors for each member.

    .. math:: y_m = ((x_m \odot r_m) W^\top) \odot s_m + b_m

    Args:
        in_features: size of each input row.
        out_features: size of each output row.
        members: how many members.
        bias: whether to add a bias, one per member.
        init: how r and s start, as of `BatchEnsemble`.

    Shape:
        - ``layer(x)``: ``(members * batch, ..., in)``, member-major, to ``(members * batch, ..., out)``
        - ``layer.forward_shared(x)``: ``(batch, ..., in)`` to ``(members * batch, ..., out)``

    Raises:
        ValueError: ``members`` is below 1, ``init`` is unknown, or the rows are not divisible by ``members``.

    Example:
        >>> BatchEnsembleLinear(3, 8, members=4)(torch.randn(4 * 10, 3)).shape
        torch.Size([40, 8])
    """

    def __init__(
        self, in_features: int, out_features: int, members: int = 4, bias: bool = True, *, init: Init = "signs"
    ) -> None:
        super().__init__(nn.Linear(in_features, out_features, bias=bias), members, init)

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(members * batch, ..., in)`` to ``(members * batch, ..., out)``, each member its own rows."""
        members, shape = self.members, input.shape
        if len(shape) != 2 or shape[0] % members or input.numel() >= self.fold_from * members:
            return super().forward(input)
        s, bias = self.s, self.bias  # rows in the plain way, in as few calls as there can be
        if shape[0] == members:
            return scale_and_shift(F.linear(input * self.r, self.weight), s, bias)
        y = F.linear(input.view(members, -1, shape[1]) * self.r.unsqueeze(1), self.weight)
        return scale_and_shift(y, s.unsqueeze(1), None if bias is None else bias.unsqueeze(1)).flatten(0, 1)


class BatchEnsembleConv1d(RankOneLayer):
    """A convolution of series: what `BatchEnsembleConv2d` is to images, made by `of`."""


class BatchEnsembleConv2d(RankOneLayer):
    r"""A convolution with shared kernels and rank-1 factors over input and output channels for each member.

    .. math:: y_m = \mathrm{conv}(x_m \odot r_m, W) \odot s_m + b_m

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: height and width of the kernels.
        members: how many members.
        bias: whether to add a bias, one per member and output channel.
        init: how r and s start, as of `BatchEnsemble`.
        geometry: stride, padding, dilation, groups, padding_mode, as of `nn.Conv2d`.

    Shape:
        - ``layer(x)``: ``(members * batch, in, height, width)``, member-major, to ``(members * batch, out, ...)``
        - ``layer.forward_shared(x)``: ``(batch, in, height, width)`` to ``(members * batch, out, ...)``

    Raises:
        ValueError: ``members`` is below 1, ``init`` is unknown, or the rows are not divisible by ``members``.

    Example:
        >>> BatchEnsembleConv2d(1, 8, 3, members=4, padding=1)(torch.randn(4 * 10, 1, 14, 14)).shape
        torch.Size([40, 8, 14, 14])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        members: int = 4,
        bias: bool = True,
        *,
        init: Init = "signs",
        **geometry: Any,
    ) -> None:
        super().__init__(nn.Conv2d(in_channels, out_channels, kernel_size, bias=bias, **geometry), members, init)


def scale_and_shift(y: Tensor, s: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``y * s + bias``, for s and bias that broadcast to y."""
    if y.dtype != s.dtype:  # under autocast y is shorter than s, and stays so, as a plain layer's result
        s, bias = s.to(y.dtype), None if bias is None else bias.to(y.dtype)
    if bias is None:
        return y * s
    return y * s + bias if y.requires_grad else torch.addcmul(bias, y, s)  # its backward would multiply twice more


def init_factors(init: Init, members: int, size: int) -> Tensor:
    """Draw factors ``(members, size)`` as ``init`` says."""
    if isinstance(init, int | float) and 0 <= init < math.inf:
        return 1 + init * torch.randn(members, size)
    if init == "signs":
        return torch.randint(0, 2, (members, size)) * 2.0 - 1
    if init == "normal":
        return 1 + 0.5 * torch.randn(members, size)
    if init == "ones":
        return torch.ones(members, size)
    raise ValueError(f"init must be 'signs', 'normal', 'ones' or a standard deviation >= 0, got {init!r}")


def convert(
    network: nn.Module, members: int, skip: str | Sequence[str], init: Init, *, own_norms: bool = False
) -> nn.Module:
    """Replace, in place, every layer that has a member layer and is not skipped. Tied weights stay tied."""
    skip, modules = names_of(skip), dict(network.named_modules(remove_duplicate=False))
    parameters = dict(network.named_parameters(recurse=False))
    if unknown := [name for name in skip if name not in modules and name not in parameters]:
        have = [name for name in modules if name]
        raise ValueError(f"skip must name modules, or the network's own parameters, got {unknown}, have {have}")
    skipped = {modules[name] for name in skip if name in modules}
    biases: dict[nn.Parameter, nn.Parameter] = {}  # of tied layers
    refused: dict[str, str] = {}

    def member_layer(plain: Any) -> RankOneLayer:
        layer = LAYERS[type(plain)].of(plain, members, init=init)
        if layer.bias is not None:
            layer.bias = biases.setdefault(plain.bias, layer.bias)
        return layer

    def replace(name: str, module: nn.Module) -> nn.Module | None:
        if module in skipped or is_frozen(module):
            return module
        call_layers(module)
        attention = module if isinstance(module, nn.MultiheadAttention) else None
        if reason := why_no_attention(attention) if attention else refusal(module):
            refused[name] = reason
            return module
        if attention:
            return MemberAttention(attention, members, member_layer)
        if type(module) in LAYERS:
            return member_layer(module)
        if own_norms and isinstance(module, NORMS):
            return stack([copy.deepcopy(module) for _ in range(members)])
        return None

    network = replace_layers(network, replace)
    if lost := [name for name in skip if name in modules and modules[name] not in set(network.modules())]:
        raise ValueError(f"skip must name all of an attention module, got parts {lost}")
    if refused:
        reasons = "; ".join(f"{name or 'the network'!r}, {reason}" for name, reason in refused.items())
        remedy = f": leave it shared with skip={tuple(refused)}" if all(refused) else ""
        raise ValueError(f"BatchEnsemble cannot take {reasons}{remedy}")
    if not any(isinstance(module, RankOneLayer) and module.r.requires_grad for module in network.modules()):
        raise ValueError(f"the network must have a trained nn.Linear, nn.Conv1d or nn.Conv2d to convert, got {network}")
    if not own_norms and init == "signs" and any(isinstance(m, _BatchNorm) and m.affine for m in network.modules()):
        rule = "BatchEnsemble's members share batch norm, and train slowly where their signs differ"
        warnings.warn(f"{rule}: norms='own' gives each its own", stacklevel=3)
    meant = {p for module in skipped for p in module.parameters()} | {parameters[n] for n in skip if n in parameters}
    left: dict[str, int] = {}  # numbers of a module's own parameters
    for name, module in network.named_modules():
        for key, p in [] if isinstance(module, (MemberLayer, *NORMS)) else module.named_parameters(recurse=False):
            if p.requires_grad and p not in meant:
                left[name or key] = left.get(name or key, 0) + p.numel()
    if left:
        share = sum(left.values()) / sum(parameter.numel() for parameter in network.parameters())
        rule = f"all members share {list(left)}, {share:.0%} of all weights, which cannot be converted"
        warnings.warn(f"{rule}: name them in skip= if that is wanted", stacklevel=3)
    return network


LAYERS: dict[type[nn.Module], type[RankOneLayer]] = {
    nn.Linear: BatchEnsembleLinear,
    nn.Conv1d: BatchEnsembleConv1d,
    nn.Conv2d: BatchEnsembleConv2d,
}
