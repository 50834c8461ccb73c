r"""BatchEnsemble: members share one weight matrix, and each scales its rows and columns by vectors of its own.

.. math:: W_m = W \odot (s_m r_m^\top), \qquad y_m = ((x \odot r_m) W^\top) \odot s_m + b_m

Wen, Tran and Ba (2020), "BatchEnsemble: an alternative approach to efficient ensemble and lifelong learning",
arXiv:2002.06715. PyTorch's weight is ``(out, in)``, so r scales inputs and s outputs; the bias comes after s.

Two formulas give the same result. *Fold* builds the M matrices and multiplies once, batched; *scale* multiplies the
rows by r, makes one plain product, and multiplies by s. Folding touches M weights per weight, scaling M activations per
activation, so the layers fold when ``activations >= 4 * weights`` for each member, the rule that was measured fastest.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effens.ensembles.base import Ensemble, MakeNet, made
from effens.ensembles.deep import StackedConv2d
from effens.ensembles.layers import (
    MemberLayer,
    RowEnsemble,
    filled,
    member_conv2d,
    member_linear,
    refusal,
    replace_layers,
    rows_each,
    shared_conv2d,
    shared_linear,
    slices,
    split_rows,
)


class BatchEnsemble(RowEnsemble):
    """A network whose linear and convolutional layers are shared by all members but for rank-1 factors.

    Every exact `nn.Linear` and `nn.Conv2d` of the network, at any depth, is replaced by its BatchEnsemble layer with
    the same weight; all other layers are shared, normalization included. Layers must be called through their `forward`.

    Args:
        make_net: () -> nn.Module, a fresh network.
        members: how many members.
        skip: names of modules that stay shared, with all that is inside them; or one name.
        split: False: every member sees every example (tiled). True: each batch is divided among the members, as in the
            paper: a step costs what a single network's does, and each member sees ``1 / members`` of the examples.
        init: how r and s start: ``"signs"`` (random +1 and -1), ``"normal"`` (mean 1, standard deviation 0.5) or
            ``"ones"`` (members that start identical, and stay so on a tiled batch without dropout).
        fast_lr: the learning rate of r and s, as a multiple of the learning rate; they have no weight decay.

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
        init: str = "signs",
        fast_lr: float = 0.5,
    ) -> None:
        if members < 1:
            raise ValueError(f"members must be >= 1, got {members}")
        if not 0 <= fast_lr < math.inf:
            raise ValueError(f"fast_lr must be >= 0 and finite, got {fast_lr}")
        super().__init__(convert(made(make_net), members, skip, init), members)
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

    def exported(self, network: nn.Module) -> Ensemble:
        """Return what passes all members' rows through this network together."""
        return Together(network, self.members)

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"members={self.members}, split={self.split}, fast_lr={self.fast_lr}"

    def reduce(self, losses: Tensor) -> Tensor:
        """Reduce losses ``(members, batch)`` to their mean over both.

        The weights are shared: a sum over members would multiply their gradient by M against its decay.
        """
        return losses.mean()


class RankOneLayer(MemberLayer):
    """What both BatchEnsemble layers have: weight, r ``(members, in)``, s and bias ``(members, out)``."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    size: int  # how many weights
    touched: int  # how many numbers a row, or a pixel, reads and writes

    def exported(self, first: bool) -> nn.Module:
        """Return a layer that scales its rows and never builds a member's weights."""
        return Scaled(copy.deepcopy(self))

    def _set(self, weight: Tensor, bias: Tensor | None, inputs: int, members: int, init: str) -> None:
        """Take over a plain layer's weight, the same object, and copy its bias for each member."""
        if members < 1:
            raise ValueError(f"members must be >= 1, got {members}")
        self.members = members
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
        self.r = nn.Parameter(start(init, members, inputs).to(weight))
        self.s = nn.Parameter(start(init, members, weight.shape[0]).to(weight))
        self.bias = None if bias is None else nn.Parameter(bias.detach().repeat(members, 1), bias.requires_grad)
        self.size, self.touched = weight.numel(), sum(weight.shape[:2])

    def folds(self, activations: int) -> bool:
        """Say whether to build each member's weights: if each member reads and writes 4 numbers or more per weight."""
        return activations >= 4 * self.size


class BatchEnsembleLinear(RankOneLayer):
    r"""A linear layer with a shared weight and rank-1 factors for each member.

    .. math:: y_m = ((x_m \odot r_m) W^\top) \odot s_m + b_m

    Args:
        in_features: size of each input row.
        out_features: size of each output row.
        members: how many members.
        bias: whether to add a bias, one per member.
        init: how r and s start: ``"signs"``, ``"normal"`` or ``"ones"``.

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
        self, in_features: int, out_features: int, members: int = 4, bias: bool = True, *, init: str = "signs"
    ) -> None:
        super().__init__()
        plain = nn.Linear(in_features, out_features, bias=bias)
        self._set(plain.weight, plain.bias, in_features, members, init)

    @classmethod
    def from_linear(cls, plain: nn.Linear, members: int, *, init: str = "signs") -> "BatchEnsembleLinear":
        """Make the layer out of a plain one, whose weight it shares and whose bias every member starts with."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._set(plain.weight, plain.bias, plain.in_features, members, init)
        return layer.train(plain.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(members * batch, ..., in)`` to ``(members * batch, ..., out)``, each member its own rows."""
        *rows, inputs = x.shape
        if rows == [self.members]:  # one row each: the factors fit as they are, and views would take half the time
            return scaled(F.linear(x * self.r, self.weight), self.s, self.bias)
        each = rows_each(x, self.members) * math.prod(rows[1:])
        if self.folds(each * self.touched):
            return member_linear(x, self.weights(), self.bias)
        return self._scale(x.reshape(self.members, each, inputs), rows)

    def forward_shared(self, x: Tensor) -> Tensor:
        """Map ``(batch, ..., in)``, the same for all members, to ``(members * batch, ..., out)``."""
        batch, *rows, inputs = x.shape
        each = batch * math.prod(rows)
        if self.folds(2 * each * self.touched):  # x is read once: folding pays sooner
            return shared_linear(x, self.weights(), self.bias)
        return self._scale(x.reshape(1, each, inputs), [self.members * batch, *rows])

    def _scale(self, x: Tensor, rows: list[int]) -> Tensor:
        """Map ``(members or 1, each, in)`` to ``(*rows, out)``, with one product."""
        s, bias = self.s, self.bias
        y = F.linear(x * self.r.unsqueeze(1), self.weight)  # (members, each, out)
        y = scaled(y, s.unsqueeze(1), None if bias is None else bias.unsqueeze(1))
        return y.view(*rows, y.shape[-1])

    def apart(self) -> list[Callable[[Tensor], Any]]:
        """Return each member's own map, which scales: it builds no matrix of its own."""
        factors = zip(self.r.unbind(), slices(self.s, self.bias), strict=True)
        return [partial(self._of_member, r=r, s=s, bias=bias) for r, (s, bias) in factors]

    def _of_member(self, x: Tensor, r: Tensor, s: Tensor, bias: Tensor | None) -> Tensor:
        return scaled(F.linear(x * r, self.weight), s, bias)

    def weights(self) -> Tensor:
        """Return every member's weight, ``(members, out, in)``."""
        return self.weight * self.r[:, None] * self.s[:, :, None]

    def member(self, m: int) -> nn.Linear:
        """Return member ``m`` as a plain `nn.Linear`, its factors folded into the weight."""
        plain = nn.Linear(self.r.shape[1], self.s.shape[1], bias=self.bias is not None, device="meta")
        return filled(plain, self, m, self.weight * self.r[m] * self.s[m][:, None])

    def extra_repr(self) -> str:
        """Describe the layer as `nn.Linear` does."""
        out_features, in_features = self.weight.shape
        return f"{in_features}, {out_features}, members={self.members}, bias={self.bias is not None}"


class BatchEnsembleConv2d(RankOneLayer):
    r"""A convolution with shared kernels and rank-1 factors over input and output channels for each member.

    .. math:: y_m = \mathrm{conv}(x_m \odot r_m, W) \odot s_m + b_m

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: height and width of the kernels.
        members: how many members.
        bias: whether to add a bias, one per member and output channel.
        init: how r and s start: ``"signs"``, ``"normal"`` or ``"ones"``.
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

    convolves = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        members: int = 4,
        bias: bool = True,
        *,
        init: str = "signs",
        **geometry: Any,
    ) -> None:
        super().__init__()
        self._take(nn.Conv2d(in_channels, out_channels, kernel_size, bias=bias, **geometry), members, init)

    def _take(self, plain: nn.Conv2d, members: int, init: str) -> None:
        if plain.padding_mode != "zeros":
            raise ValueError(f"padding_mode must be 'zeros', got {plain.padding_mode!r}")
        self._set(plain.weight, plain.bias, plain.in_channels, members, init)
        names = ("stride", "padding", "dilation", "groups")
        self.geometry = {name: getattr(plain, name) for name in names}

    @classmethod
    def from_conv2d(cls, plain: nn.Conv2d, members: int, *, init: str = "signs") -> "BatchEnsembleConv2d":
        """Make the layer out of a plain one, whose kernels it shares and whose bias every member starts with."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take(plain, members, init)
        return layer.train(plain.training)

    def exported(self, first: bool) -> nn.Module:
        """Return a layer of all members' kernels where it reads the input; else one that scales its rows."""
        if first:
            return StackedConv2d([self.member(m) for m in range(self.members)])
        return super().exported(first)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(members * batch, in, height, width)`` to ``(members * batch, out, height', width')``."""
        batch = x.shape[0] // self.members
        if self.folds(batch * math.prod(x.shape[2:]) * self.touched):
            return member_conv2d(x, self.weights(), self.bias, **self.geometry)
        x = split_rows(x, self.members)  # (members, batch, in, height, width)
        y = F.conv2d((x * across(self.r, x, axis=2)).flatten(0, 1), self.weight, **self.geometry)
        y, s = split_rows(y, self.members), across(self.s, x, axis=2)
        return scaled(y, s, None if self.bias is None else across(self.bias, x, axis=2)).flatten(0, 1)

    def forward_shared(self, x: Tensor) -> Tensor:
        """Map ``(batch, in, height, width)``, the same for all members, to ``(members * batch, out, ...)``."""
        return shared_conv2d(x, self.weights(), self.bias, **self.geometry)

    def apart(self) -> list[Callable[[Tensor], Any]]:
        """Return each member's own convolution, which folds: kernels are small beside images."""
        parts = slices(self.weights(), self.bias)
        return [partial(F.conv2d, weight=weight, bias=bias, **self.geometry) for weight, bias in parts]

    def weights(self) -> Tensor:
        """Return every member's kernels, ``(members, out, in / groups, height, width)``."""
        out, inner = self.weight.shape[:2]
        groups = self.geometry["groups"]
        r = self.r.view(self.members, groups, 1, inner).expand(-1, -1, out // groups, -1).flatten(1, 2)
        return self.weight * (r * self.s[:, :, None])[..., None, None]

    def member(self, m: int) -> nn.Conv2d:
        """Return member ``m`` as a plain `nn.Conv2d`, its factors folded into the kernels."""
        height, width = self.weight.shape[2:]
        inputs, out, bias = self.r.shape[1], self.s.shape[1], self.bias is not None
        plain = nn.Conv2d(inputs, out, (height, width), bias=bias, device="meta", **self.geometry)
        return filled(plain, self, m, self.weights()[m])

    def extra_repr(self) -> str:
        """Describe the layer as `nn.Conv2d` does."""
        out_channels, in_channels = self.s.shape[1], self.r.shape[1]
        kernel = tuple(self.weight.shape[2:])
        return (
            f"{in_channels}, {out_channels}, kernel_size={kernel}, members={self.members}, bias={self.bias is not None}"
        )


def across(factors: Tensor, x: Tensor, axis: int = -1) -> Tensor:
    """View ``(members, size)`` so that it multiplies ``axis`` of ``x`` (members, batch, ...)."""
    shape = [1] * x.dim()
    shape[0], shape[axis] = factors.shape
    return factors.view(shape)


def scaled(y: Tensor, s: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``y * s + bias``, for s and bias that broadcast to y."""
    if y.dtype != s.dtype:  # under autocast y is shorter than s, and stays so, as a plain layer's result
        s, bias = s.to(y.dtype), None if bias is None else bias.to(y.dtype)
    if bias is None:
        return y * s
    return y * s + bias if y.requires_grad else torch.addcmul(bias, y, s)  # its backward would multiply twice more


def start(init: str, members: int, size: int) -> Tensor:
    """Draw factors ``(members, size)`` as ``init`` says."""
    if init == "signs":
        return torch.randint(0, 2, (members, size)) * 2.0 - 1
    if init == "normal":
        return 1 + 0.5 * torch.randn(members, size)
    if init == "ones":
        return torch.ones(members, size)
    raise ValueError(f"init must be 'signs', 'normal' or 'ones', got {init!r}")


def convert(network: nn.Module, members: int, skip: str | Sequence[str], init: str) -> nn.Module:
    """Replace, in place, every exact `nn.Linear` and `nn.Conv2d` that is not skipped. Tied weights stay tied."""
    skip = (skip,) if isinstance(skip, str) else skip
    modules = dict(network.named_modules(remove_duplicate=False))
    if unknown := [name for name in skip if name not in modules]:
        raise ValueError(
            f"skip must name modules of the network, got {unknown}, have {[name for name in modules if name]}"
        )
    skipped = {modules[name] for name in skip}
    biases: dict[int, nn.Parameter] = {}

    def replace(name: str, module: nn.Module) -> nn.Module | None:
        if module in skipped:
            return module
        if reason := refusal(module):
            remedy = f": leave it shared with skip=({name!r},)" if name else ""
            raise ValueError(f"BatchEnsemble cannot take {name or 'the network'!r}, {reason}{remedy}")
        if type(module) is nn.Linear:
            layer: RankOneLayer = BatchEnsembleLinear.from_linear(module, members, init=init)
        elif type(module) is nn.Conv2d:
            layer = BatchEnsembleConv2d.from_conv2d(module, members, init=init)
        else:
            return None
        if layer.bias is not None:
            layer.bias = biases.setdefault(id(module.bias), layer.bias)
        return layer

    network = replace_layers(network, replace)
    if not any(isinstance(module, RankOneLayer) for module in network.modules()):
        raise ValueError(f"the network must have an nn.Linear or nn.Conv2d to convert, got {network}")
    return network


class Together(RowEnsemble):
    """BatchEnsemble, compiled: all members' rows pass every layer together, however many they are."""

    def runs_apart(self, x: Tensor) -> bool:
        """Never."""
        return False


class Scaled(MemberLayer):
    """A BatchEnsemble layer that always scales its rows by r and s, and never builds a member's weights."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.members = layer.members
        self.layer = layer

    def forward(self, rows: Tensor) -> Tensor:
        """Map ``(members * batch, ...)`` to ``(members * batch, ...)``."""
        return self.scale(split_rows(rows, self.members))

    def forward_shared(self, x: Tensor) -> Tensor:
        """Map ``(batch, ...)``, the same for all members, to ``(members * batch, ...)``."""
        return self.scale(x[None])

    def scale(self, x: Tensor) -> Tensor:
        """Map ``(members or 1, batch, ...)`` to ``(members * batch, ...)``."""
        layer = self.layer
        if isinstance(layer, BatchEnsembleConv2d):
            rows = (x * across(layer.r, x, -3)).flatten(0, 1)
            y, axis = split_rows(F.conv2d(rows, layer.weight, **layer.geometry), self.members), -3
        else:
            y, axis = F.linear(x * across(layer.r, x), layer.weight), -1
        y = y * across(layer.s, y, axis)
        return (y if layer.bias is None else y + across(layer.bias, y, axis)).flatten(0, 1)
