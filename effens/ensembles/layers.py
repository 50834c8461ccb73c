"""Layers with weights for each member, the networks made of them, and how plain layers are exchanged for them."""

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from threading import Lock
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from effens.ensembles.base import Ensemble, MakeNet, call_make_net
from effens.inputs import Inputs, call, count_rows, each, logits_of, rows_at, tensors_of

GEOMETRY = ("stride", "padding", "dilation", "groups")
ALL = slice(None)
Plain = nn.Linear | nn.Conv1d | nn.Conv2d  # what has member layers of its own
CHECKING = Lock()  # of several threads that ask first, one checks


class MemberLayer(nn.Module):
    """A layer with weights for each member. Its rows are member-major: all of member 0's, then all of member 1's ..."""

    members: int

    def forward_each(self, x: Tensor) -> Tensor:
        """Map each member's batch, or one for all, ``(members or 1, batch, ...)``, to ``(members, batch, ...)``."""
        raise NotImplementedError(f"a member layer must override forward_each, got none in {type(self).__name__}")

    def forward(self, input: Tensor) -> Tensor:  # the name that PyTorch's layers have for it
        """Map ``(members * batch, ...)`` to ``(members * batch, ...)``, each member its own rows."""
        return self.forward_each(split_rows(input, self.members)).flatten(0, 1)

    def forward_shared(self, x: Tensor) -> Tensor:
        """Map ``(batch, ...)``, the same for all members, to ``(members * batch, ...)``."""
        return self.forward_each(x[None]).flatten(0, 1)

    def one(self, m: int, x: Any) -> Any:
        """Map member ``m``'s rows alone, ``(batch, ...)`` to ``(batch, ...)``."""
        raise NotImplementedError(f"a member layer must override one, got none in {type(self).__name__}")

    def member(self, m: int) -> nn.Module:
        """Return a copy of member ``m``'s layer as a plain one."""
        raise NotImplementedError(f"a member layer must override member, got none in {type(self).__name__}")


class WeightLayer(MemberLayer):
    """A linear layer, or a convolution, of which each member has a weight of its own.

    Attributes:
        bias: ``(members, out)`` or None.
        geometry: stride, padding, dilation and groups of a convolution; None: the layer is linear.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    geometry: dict[str, Any] | None

    def weights(self, which: slice = ALL) -> Tensor:
        """Return members' weights, ``(members, out, in)``, or of kernels ``(members, out, in / groups, *kernel)``."""
        raise NotImplementedError(f"a weight layer must override weights, got none in {type(self).__name__}")

    def forward_each(self, x: Tensor) -> Tensor:
        """Map ``(members or 1, batch, ...)`` to ``(members, batch, ...)``, as one batched computation."""
        if self.geometry is None:
            if x.dim() < 3:
                raise ValueError(f"x must be (batch, ..., features), got shape {tuple(x.shape[1:])}")
            return linear_each(x, self.weights(), self.bias)
        return conv_each(x, self.weights(), self.bias, **self.geometry)

    def one(self, m: int, x: Tensor) -> Tensor:
        """Run member ``m``'s layer on its own rows."""
        weight, bias = self.weights(slice(m, m + 1))[0], None if self.bias is None else self.bias[m]
        return F.linear(x, weight, bias) if self.geometry is None else convolve(x, weight, bias, **self.geometry)

    def member(self, m: int) -> nn.Module:
        """Return a copy of member ``m`` as a plain linear layer or convolution: frozen, or in training, if this is."""
        weight, biased = self.weights(slice(m, m + 1))[0].detach().clone(), self.bias is not None
        outputs, inputs = weight.shape[:2]
        plain: Plain
        if self.geometry is None:
            plain = nn.Linear(inputs, outputs, biased, device="meta")  # which costs nothing
        else:
            inputs, kernel = inputs * self.geometry["groups"], tuple(weight.shape[2:])
            kind: Any = nn.Conv1d if len(kernel) == 1 else nn.Conv2d
            plain = kind(inputs, outputs, kernel, bias=biased, device="meta", **self.geometry)
        plain.weight = nn.Parameter(weight, self.weight.requires_grad)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias[m].detach().clone(), self.bias.requires_grad)
        return plain.train(self.training)

    def extra_repr(self) -> str:
        """Describe the layer as PyTorch's plain one does."""
        dims = 2 + (0 if self.geometry is None else len(self.geometry["stride"]))
        outputs, inputs, *kernel = self.weight.shape[-dims:]
        size = f", kernel_size={tuple(kernel)}" if self.geometry else ""
        inputs *= self.geometry["groups"] if self.geometry else 1
        return f"{inputs}, {outputs}{size}, members={self.members}, bias={self.bias is not None}"


class RowEnsemble(Ensemble):
    """An ensemble computed as one network of member layers, through which all members' rows pass together.

    Args:
        network: a network in which some layers are member layers. Rows are member-major, so that any other layer
            that treats examples one by one can stand between them.
        members: how many members these layers have.
        remedy: what to do where the network does not treat rows one by one; None: it is known to. Else the first call
            compares the answers with those of the members alone.
        trunk: a network that all members share: see `Ensemble`.
    """

    def __init__(
        self, network: nn.Module, members: int, remedy: str | None = None, trunk: nn.Module | None = None
    ) -> None:
        super().__init__(members, trunk=trunk)
        self.network = network
        self._remedy = remedy

    def forward(self, x: Inputs) -> Tensor:
        """Answer with every member: ``(batch, ...)`` to ``(members, batch, outputs)``."""
        batch, x = count_rows(x), self.features(x)
        self._check_first_call(x)
        return self._answers(self._run(x), batch)

    def forward_members(self, xs: Inputs) -> Tensor:
        """Give each member its own batch: ``(members, batch, ...)`` to ``(members, batch, outputs)``."""
        xs = self.stream_features(xs)
        first = rows_at(xs, 0)
        self._check_first_call(first)
        return self._answers(self._run_each(xs), count_rows(first))

    def _run(self, x: Inputs) -> Any:
        """Run what all members are given through the network, to rows; one after the other where that is faster."""
        if runs_apart(x, self.network):
            return join([run_member(self.network, m, x.clone()) for m in range(self.members)])  # it may change in place
        return run_shared(self.network, x, self.members)

    def _run_each(self, xs: Inputs) -> Any:
        """Run a batch for each member through the network, to rows; one after the other where that is faster."""
        if isinstance(xs, Tensor) and runs_apart(xs[0], self.network):
            return join([run_member(self.network, m, x.clone()) for m, x in enumerate(xs)])
        return call(self.network, each(lambda part: part.flatten(0, 1), xs))

    def _check_first_call(self, x: Inputs) -> None:
        """Compare the ensemble with its members, once, before it answers for the first time."""
        if self._remedy is None or torch.compiler.is_compiling():
            return
        own = Tensor.__torch_dispatch__
        if not all(type(part).__torch_dispatch__ == own and len(part) and not part.is_meta for part in tensors_of(x)):
            return  # what is traced has no values
        with CHECKING:
            if self._remedy is not None and (
                check_members(self, rows_at(x, [0, -1]), self._remedy) or check_members(self, x, self._remedy)
            ):
                self._remedy = None

    def _answers(self, rows: Any, batch: int) -> Tensor:
        """View what the network returned, rows, as ``(members, batch, outputs)``."""
        rows = torch.cat([logits_of(row) for row in rows]) if isinstance(rows, Outputs) else logits_of(rows)
        if rows.dim() < 2 or rows.shape[0] != self.members * batch:
            rule = f"the network must return one row of outputs per example, ({self.members * batch}, outputs)"
            raise ValueError(f"{rule}, got {tuple(rows.shape)}")
        answers: Tensor = rows.view(self.members, batch, *rows.shape[1:])
        return answers

    def member(self, m: int) -> nn.Module:
        """Return a copy of member ``m`` as a plain network, equal to ``ensemble(x)[m]``."""
        return self.on_trunk(self._plain(self.check_member(m)))

    def _plain(self, m: int) -> nn.Module:
        """Return a copy of what member ``m`` has behind the trunk."""
        layers = [layer for layer in self.network.modules() if isinstance(layer, MemberLayer)]
        return copy.deepcopy(self.network, {id(layer): layer.member(m) for layer in layers})


class Outputs(list[Any]):
    """What M modules returned, one after the other, where that is no tensor: a recurrent module's tuples, say."""


def join(outputs: list[Any]) -> Any:
    """Join tensors, one a member, to member-major rows; keep anything else apart."""
    return torch.cat(outputs) if all(isinstance(output, Tensor) for output in outputs) else Outputs(outputs)


def fresh_network(make_net: MakeNet) -> nn.Module:
    """Return what ``make_net`` makes; raise `ValueError` if an ensemble has taken it over already."""
    network = call_make_net(make_net)
    if any(isinstance(layer, MemberLayer) for layer in network.modules()):
        raise ValueError("make_net must return a fresh network, got one that is another ensemble's already")
    held = [layer.in_proj_weight for layer in network.modules() if isinstance(layer, nn.MultiheadAttention)]
    if len({*held} - {None}) < sum(weight is not None for weight in held):
        raise ValueError("attention modules that share weights must be one module, got several")
    return network


@torch.inference_mode(False)
@torch.no_grad()
def check_members(ensemble: RowEnsemble, x: Inputs, remedy: str) -> bool:
    """Raise `ValueError` unless an ensemble answers as its members do alone, through the forward of all its layers.

    It is a copy that is asked for the first and the last member, in eval mode, made more different than they may start.
    False says that nothing could be compared, because members fail on these inputs or answer with NaN.
    """
    kept: dict[int, Any] = {id(ensemble.trunk): None, id(ensemble.still): []}
    ensemble, x = copy.deepcopy(ensemble, kept).eval(), each(Tensor.clone, x)
    ensemble._remedy = None
    layers = {name: layer for name, layer in ensemble.network.named_modules() if isinstance(layer, MemberLayer)}
    generator = torch.Generator().manual_seed(0)
    for parameter in ensemble.network.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        parameter.mul_(1 + 0.2 * noise) if parameter.any() else parameter.add_(0.1 * noise)
    checked = sorted({0, ensemble.members - 1})
    members = [ensemble._plain(m) for m in checked]

    def answers() -> Tensor:
        return torch.stack([logits_of(call(member, each(Tensor.clone, x))) for member in members])

    try:
        expected = answers()
    except Exception:  # the input is wrong, or the network returns no tensor: the call itself says so best
        return False
    if not bool(expected.isfinite().all()):
        return False
    called: set[str] = set()
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *_, name=name: called.add(name))
    problem: Exception | None = None
    got = ""
    try:
        found = ensemble.forward(x)[checked]
        far = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
        if far > torch.finfo(expected.dtype).eps ** 0.5 and torch.equal(expected, answers()):  # not random
            got = f"outputs that differ by {far:.2g} of the largest"
    except Exception as error:
        problem, got = error, f"{type(error).__name__}: {error}"
    missed = [name for name in layers if name not in called]
    if missed:
        when = ", or not before an error" if problem else ""
        got = f"layers that are never called through their forward{when}: {missed}"
    if got:
        rule = f"{type(ensemble).__name__} must answer as its members do alone: {remedy}"
        raise ValueError(f"{rule}, got {got}") from problem
    return True


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
ROWWISE = {
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU),
    *(nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Hardswish, nn.MaxPool2d, nn.AvgPool2d),
    *(nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.ZeroPad2d, nn.Upsample),
}


def is_rowwise(layer: nn.Module) -> bool:
    """Say whether a layer has no weights and treats each row by itself."""
    return type(layer) in ROWWISE or (type(layer) is nn.Flatten and layer.start_dim >= 1)


def run_shared(network: nn.Module, x: Inputs, members: int) -> Any:
    """Run ``x`` (batch, ...), the same for all members, to rows (members * batch, ...).

    Where the network begins with a member layer, that layer reads ``x`` once; else ``x`` is repeated, in memory of its
    own also for one member or one row: the network may change it in place.
    """
    if not isinstance(x, Tensor):
        return call(network, each(lambda part: torch.cat([part] * members), x))
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


def runs_apart(x: Inputs, network: nn.Module) -> TypeGuard[Tensor]:
    """Say whether members run faster one after the other: with convolutions, on a CPU, from a few images on.

    Together they need fewer calls, but their images must be rearranged, and no longer fit into the processor's cache.
    Apart was measured faster from about 10,000 numbers a member on. What the members share must hold no statistics.
    """
    if not isinstance(x, Tensor) or x.device.type != "cpu" or x.numel() <= 10_000 or torch.compiler.is_compiling():
        return False
    layers = list(chain(network))
    return any(isinstance(layer, WeightLayer) and layer.geometry for layer in layers) and not any(
        has_hooks(layer) or type(layer).one is MemberLayer.one if isinstance(layer, MemberLayer) else has_state(layer)
        for layer in layers
    )


def has_state(layer: nn.Module) -> bool:
    """Say whether a layer holds more than weights, or has hooks: then all rows must pass through it together."""
    return has_hooks(layer) or next(layer.buffers(), None) is not None


def run_member(network: nn.Module, m: int, x: Any) -> Any:
    """Run member ``m`` alone on its rows."""
    for layer in chain(network):
        x = layer.one(m, x) if isinstance(layer, MemberLayer) else layer(x)
    return x


def names_of(names: str | Sequence[str]) -> tuple[str, ...]:
    """Return names, of which one may be given alone."""
    return (names,) if isinstance(names, str) else tuple(names)


def has_hooks(module: nn.Module) -> bool:
    """Say whether anything is hooked to the module, so that calling it is more than its `forward`."""
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def rows_each(rows: Tensor, members: int) -> int:
    """Return how many of the rows are each member's."""
    if rows.shape[0] % members:
        raise ValueError(f"rows must be divisible by members, got {rows.shape[0]} rows and {members} members")
    return rows.shape[0] // members


def split_rows(rows: Tensor, members: int) -> Tensor:
    """View member-major rows ``(members * batch, ...)`` as ``(members, batch, ...)``."""
    return rows.view(members, rows_each(rows, members), *rows.shape[1:])


def linear_each(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply each member's linear map, as one batched matrix product.

    Args:
        x: (members or 1, batch, ..., in).
        weight: (members, out, in).
        bias: (members, out) or None.

    Returns:
        (members, batch, ..., out)
    """
    rows = x if x.dim() == 3 else x.flatten(1, -2)  # (members or 1, batch * ..., in)
    if len(rows) != len(weight):
        rows = rows.expand(len(weight), -1, -1)  # no copy
    if x.shape[-1] == 1:  # numbers times numbers: a batched product of so little was measured to take twice as long
        y = rows * weight.mT if bias is None else torch.addcmul(bias.unsqueeze(1), rows, weight.mT)
    else:
        y = torch.bmm(rows, weight.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, weight.mT)
    return y if x.dim() == 3 else y.view(*y.shape[:1], *x.shape[1:-1], y.shape[-1])


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, **geometry: Any) -> Tensor:
    """Convolve series ``(batch, in, length)`` or images ``(batch, in, height, width)``."""
    return (F.conv1d if weight.dim() == 3 else F.conv2d)(x, weight, bias, **geometry)


def is_large(x: Tensor, times: float = 1) -> bool:
    """Say whether a member's numbers, so many times, are too many to be rearranged beside the other members' on a CPU.

    One call for all members was measured faster only while it has up to 65,536 numbers for each.
    """
    return x.device.type == "cpu" and x.numel() * times > 65_536


def conv_each(x: Tensor, weight: Tensor, bias: Tensor | None, **geometry: Any) -> Tensor:
    """Convolve with each member's kernels: by one convolution of all channels, or, of much, by one a member.

    Args:
        x: (members or 1, batch, in, *size), of one dimension or two.
        weight: (members, out, in / groups, *kernel).
        bias: (members, out) or None.
        geometry: stride, padding, dilation, groups, as in `torch.nn.functional.conv2d`.

    Returns:
        (members, batch, out, *size')
    """
    members, outputs = weight.shape[:2]
    wide, groups = weight.flatten(0, 1), geometry.pop("groups", 1)
    if len(x) == 1 and groups == 1:  # all members read the same channels
        y = convolve(x[0], wide, None if bias is None else bias.flatten(), **geometry)
        return torch.unflatten(y, 1, (members, outputs)).transpose(0, 1)
    x = x.expand(members, *x.shape[1:])
    if is_large(x[0], outputs / x.shape[2]):
        biases = [None] * members if bias is None else bias.unbind()
        parts = zip(x.unbind(), weight.unbind(), biases, strict=True)
        return torch.stack([convolve(*part, groups=groups, **geometry) for part in parts])
    channels = x.transpose(0, 1).flatten(1, 2)  # (batch, members * in, height, width)
    y = convolve(channels, wide, None if bias is None else bias.flatten(), groups=groups * members, **geometry)
    return torch.unflatten(y, 1, (members, outputs)).transpose(0, 1)


def refusal(module: nn.Module) -> str:
    """Say why a module must not be converted, or nothing if it may."""
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return f"{type(module).__name__}, a recurrent module that reads its weights without layers"
    if parametrize.is_parametrized(module):
        return f"a parametrized {type(module).__bases__[0].__name__}, whose weight is computed anew at each call"
    if type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d) and has_hooks(module):
        return f"{type(module).__name__} with hooks, which may change its weight or its result"
    if isinstance(module, nn.Conv1d | nn.Conv2d) and module.padding_mode != "zeros":
        return f"{type(module).__name__} with padding_mode {module.padding_mode!r}, where only 'zeros' is supported"
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
