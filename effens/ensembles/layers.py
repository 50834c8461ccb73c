"""Layers with weights for each member, the networks made of them, and how plain layers are exchanged for them."""

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from effens.ensembles.base import Ensemble

PlainLayer = TypeVar("PlainLayer", nn.Linear, nn.Conv2d)


class MemberLayer(nn.Module):
    """A layer with weights for each member. Its rows are member-major: all of member 0's, then all of member 1's ..."""

    members: int
    convolves = False  # whether the layer is a convolution
    geometry: dict[str, Any]  # of a convolution: stride, padding, dilation, groups

    def apart(self) -> list[Callable[[Tensor], Any]]:
        """Return what the layer does to each member's rows, as a function for each."""
        raise NotImplementedError(f"a member layer must override apart, got none in {type(self).__name__}")

    def forward_shared(self, x: Tensor) -> Tensor:
        """Map ``(batch, ...)``, the same for all members, to ``(members * batch, ...)``."""
        raise NotImplementedError(f"a member layer must override forward_shared, got none in {type(self).__name__}")

    def exported(self, first: bool) -> nn.Module | None:
        """Return a layer that does the same where nothing is trained any more; None: this one is best.

        ``first``: whether it reads the input, which is then the same for all members.
        """
        return None

    def member(self, m: int) -> nn.Module:
        """Return a copy of member ``m``'s layer as a plain one."""
        raise NotImplementedError(f"a member layer must override member, got none in {type(self).__name__}")


class RowEnsemble(Ensemble):
    """An ensemble computed as one network of member layers, through which all members' rows pass together.

    Args:
        network: a network in which some layers are member layers. Rows are member-major, so that any other layer
            that treats examples one by one can stand between them.
        members: how many members these layers have.
    """

    def __init__(self, network: nn.Module, members: int) -> None:
        super().__init__(members)
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Answer with every member: ``(batch, ...)`` to ``(members, batch, outputs)``."""
        if x.dim() < 2:
            raise ValueError(f"x must be (batch, ...), got shape {tuple(x.shape)}")
        if self.runs_apart(x):
            return self.run_apart([x.clone() for _ in range(self.members)])  # a first layer may change it in place
        return self._answers(run_shared(self.network, x, self.members), x.shape[0])

    def forward_members(self, xs: Tensor) -> Tensor:
        """Give each member its own batch: ``(members, batch, ...)`` to ``(members, batch, outputs)``."""
        rows = self.check_streams(xs).flatten(0, 1)
        if self.runs_apart(xs[0]):
            return self.run_apart(row_parts(rows, self.members))
        return self._answers(self.network(rows), xs.shape[1])

    def runs_apart(self, x: Tensor) -> bool:
        """Say whether to run the members one after the other: on a CPU, with convolutions, from 8,192 numbers each.

        There the calls that batching saves were measured to cost less than rearranging images for it, and one
        member's numbers stay in the cache. Every layer must be a member layer, or treat each row by itself.
        """
        if x.device.type != "cpu" or x.numel() < 8192:
            return False
        layers = list(chain(self.network))
        convolves = any(isinstance(layer, MemberLayer) and layer.convolves for layer in layers)
        each = all((isinstance(layer, MemberLayer) and not has_hooks(layer)) or is_rowwise(layer) for layer in layers)
        return convolves and each

    def run_apart(self, inputs: Sequence[Tensor]) -> Tensor:
        """Run each member by itself through the whole network, with its part of the weights."""
        layers = list(chain(self.network))
        members = [layer.apart() if isinstance(layer, MemberLayer) else [layer] * self.members for layer in layers]
        outputs = []
        for x, *path in zip(inputs, *members, strict=True):
            for layer in path:
                x = layer(x)
            outputs.append(x)
        return self._answers(joined(outputs), len(inputs[0]))

    def _answers(self, rows: Any, batch: int) -> Tensor:
        """View what the network returned, rows, as ``(members, batch, outputs)``."""
        if not isinstance(rows, Tensor) or rows.dim() < 2 or rows.shape[0] != self.members * batch:
            got = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            rule = f"the network must return one row of outputs per example, ({self.members * batch}, outputs)"
            raise ValueError(f"{rule}, got {got}")
        return rows.view(self.members, batch, *rows.shape[1:])

    def exported(self, network: nn.Module) -> Ensemble:
        """Return an ensemble that answers with this network, whose layers are those of `MemberLayer.exported`."""
        return RowEnsemble(network, self.members)

    def member(self, m: int) -> nn.Module:
        """Return a copy of member ``m`` as a plain network, equal to ``ensemble(x)[m]``."""
        self.check_member(m)
        layers = [layer for layer in self.network.modules() if isinstance(layer, MemberLayer)]
        return copy.deepcopy(self.network, {id(layer): layer.member(m) for layer in layers})


def chain(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of nested `nn.Sequential`s in the order in which they are called.

    Any other network is a chain of one link, for only its own `forward` knows in which order its layers are called.
    """
    if type(network) is nn.Sequential and not has_hooks(network):
        for layer in network:
            yield from chain(layer)
    else:
        yield network


# Layers without weights that treat each row by itself, whatever rows stand beside it.
ROWWISE = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout),
    *(
        nn.ReLU,
        nn.LeakyReLU,
        nn.ELU,
        nn.SELU,
        nn.GELU,
        nn.SiLU,
        nn.Mish,
        nn.Tanh,
        nn.Sigmoid,
        nn.Softplus,
        nn.Hardswish,
    ),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.ZeroPad2d, nn.Upsample),
)


def is_rowwise(layer: nn.Module) -> bool:
    """Say whether a layer has no weights and treats each row by itself."""
    return type(layer) in ROWWISE or (type(layer) is nn.Flatten and layer.start_dim >= 1)


def run_shared(network: nn.Module, x: Tensor, members: int) -> Any:
    """Run ``x`` (batch, ...), the same for all members, to rows (members * batch, ...).

    Where the network begins with a member layer, that layer reads ``x`` once; else ``x`` is repeated, in memory of its
    own also for one member or one row: the network may change it in place.
    """
    layers = deque(chain(network))
    while layers and type(layers[0]) in (nn.Flatten, nn.Identity):
        x = layers.popleft()(x)
    if layers and isinstance(first := layers[0], MemberLayer) and not has_hooks(first):
        layers.popleft()
        rows = first.forward_shared(x)
    else:
        rows = torch.cat([x] * members)
    for layer in layers:
        rows = layer(rows)
    return rows


def has_hooks(module: nn.Module) -> bool:
    """Say whether anything is hooked to the module, so that calling it is more than its `forward`."""
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def filled(plain: PlainLayer, layer: Any, m: int, weight: Tensor) -> PlainLayer:
    """Give a plain layer copies of this weight and of a layer's bias ``m``; it is frozen, or in training, if that is.

    The plain layer may stand on the meta device, so that it costs nothing.
    """
    plain.weight = nn.Parameter(weight.detach().clone(), layer.weight.requires_grad)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias[m].detach().clone(), layer.bias.requires_grad)
    return plain.train(layer.training)


class Apart(list[Any]):
    """What M modules returned, one after the other, where that is no tensor: a recurrent module's tuples, say."""


def joined(outputs: list[Any]) -> Any:
    """Join tensors, one a member, to member-major rows; keep anything else apart."""
    return torch.cat(outputs) if all(isinstance(output, Tensor) for output in outputs) else Apart(outputs)


def row_parts(rows: Tensor, members: int) -> Sequence[Tensor]:
    """Divide member-major rows into each member's; unlike those of `unbind`, the parts may be changed in place."""
    return torch.unsafe_split_with_sizes(rows, [rows_each(rows, members)] * members)


def rows_each(rows: Tensor, members: int) -> int:
    """Return how many of the rows are each member's."""
    if rows.shape[0] % members:
        raise ValueError(f"rows must be divisible by members, got {rows.shape[0]} rows and {members} members")
    return rows.shape[0] // members


def split_rows(rows: Tensor, members: int) -> Tensor:
    """View member-major rows ``(members * batch, ...)`` as ``(members, batch, ...)``."""
    return rows.view(members, rows_each(rows, members), *rows.shape[1:])


def slices(weight: Tensor, bias: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    """Return each member's weight (or s) and bias, unbound: a slice alone would have a gradient of full size."""
    biases = [None] * len(weight) if bias is None else bias.unbind()
    return list(zip(weight.unbind(), biases, strict=True))


def member_linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply each member's linear map to its own rows, as one batched matrix product.

    Args:
        rows: (members * batch, ..., in).
        weight: (members, out, in).
        bias: (members, out) or None.

    Returns:
        (members * batch, ..., out)
    """
    x = split_rows(rows, weight.shape[0])  # (members, batch, ..., in)
    if x.dim() > 3:
        x = x.flatten(1, -2)  # (members, batch * ..., in)
    return product(x, weight, bias).view(*rows.shape[:-1], weight.shape[1])


def shared_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply every member's linear map to the same ``x`` (batch, ..., in), as one batched matrix product.

    One plain product with all rows of ``weight`` would have to be rearranged, which costs more than it saves.

    Returns:
        (members * batch, ..., out), member-major.
    """
    members, out, _ = weight.shape
    rows = x if x.dim() == 2 else x.flatten(0, -2)  # (batch * ..., in)
    rows = rows.expand(members, -1, -1)  # no copy
    return product(rows, weight, bias).view(members * x.shape[0], *x.shape[1:-1], out)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x @ weight.mT + bias``, of x (members, rows, in), weight (members, out, in), bias (members, out)."""
    if x.shape[-1] == 1:  # numbers times numbers: a batched product of so little was measured to take twice as long
        return x * weight.mT if bias is None else torch.addcmul(bias[:, None], x, weight.mT)
    return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias[:, None], x, weight.mT)


def member_conv2d(rows: Tensor, weight: Tensor, bias: Tensor | None, **geometry: Any) -> Tensor:
    """Convolve each member's rows with its own kernels: one grouped convolution, or one call a member.

    On a CPU, a grouped convolution was measured faster only while a member's result is small: beyond
    65,536 numbers rearranging them costs more than the calls it saves.

    Args:
        rows: (members * batch, in, height, width).
        weight: (members, out, in / groups, kernel height, kernel width).
        bias: (members, out) or None.
        geometry: stride, padding, dilation, groups, as of `torch.nn.functional.conv2d`.

    Returns:
        (members * batch, out, height', width')
    """
    members, out = weight.shape[:2]
    x = split_rows(rows, members)
    if rows.device.type == "cpu" and x[0].numel() // x.shape[2] * out > 65_536:
        parts = zip(x.unbind(), slices(weight, bias), strict=True)
        return torch.cat([F.conv2d(part, *own, **geometry) for part, own in parts])
    groups = geometry.pop("groups", 1) * members
    wide = x.transpose(0, 1).flatten(1, 2)  # (batch, members * in, height, width)
    y = F.conv2d(wide, weight.flatten(0, 1), None if bias is None else bias.flatten(), groups=groups, **geometry)
    return torch.unflatten(y, 1, (members, out)).transpose(0, 1).flatten(0, 1)


def shared_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, **geometry: Any) -> Tensor:
    """Convolve the same ``x`` (batch, in, height, width) with every member's kernels, as one plain convolution.

    Returns:
        (members * batch, out, height', width'), member-major.
    """
    if geometry.get("groups", 1) > 1:
        return member_conv2d(x.expand(weight.shape[0], *x.shape).flatten(0, 1), weight, bias, **geometry)
    y = F.conv2d(x, weight.flatten(0, 1), None if bias is None else bias.flatten(), **geometry)
    return torch.unflatten(y, 1, weight.shape[:2]).transpose(0, 1).flatten(0, 1)


def refusal(module: nn.Module) -> str:
    """Say why a module must not be converted, or nothing if it may."""
    if isinstance(module, nn.MultiheadAttention | nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        return f"{type(module).__name__}, an attention module that reads its layers' weights without calling them"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return f"{type(module).__name__}, a recurrent module that reads its weights without layers"
    if isinstance(module, LazyModuleMixin):
        return f"{type(module).__name__}, a lazy module whose weights do not exist before its first call"
    if parametrize.is_parametrized(module):
        return f"a parametrized {type(module).__bases__[0].__name__}, whose weight is computed anew at each call"
    if type(module) in (nn.Linear, nn.Conv2d) and has_hooks(module):
        return f"{type(module).__name__} with hooks, which may change its weight or its result"
    if type(module) is nn.Conv2d and module.padding_mode != "zeros":
        return f"Conv2d with padding_mode {module.padding_mode!r}, where only 'zeros' is supported"
    return ""


def replace_layers(
    network: nn.Module,
    replace: Callable[[str, nn.Module], nn.Module | None],
    name: str = "",
    done: dict[nn.Module, nn.Module] | None = None,
) -> nn.Module:
    """Exchange, in place, each module for which ``replace(name, module)`` gives another; None means: look inside.

    A module that is used in two places is exchanged once, and stays one module. Returns the network, which is a new
    object only where the whole network was exchanged.
    """
    done = {} if done is None else done
    if network not in done:
        new = replace(name, network)
        done[network] = network if new is None else new
        if new is None:
            for key, child in list(network._modules.items()):  # `named_children` would leave out a second use
                if child is not None:
                    inner = replace_layers(child, replace, f"{name}.{key}".lstrip("."), done)
                    network.add_module(key, inner)
    return done[network]
