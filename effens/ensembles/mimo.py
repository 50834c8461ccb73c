r"""MIMO: one network reads M inputs at once and gives M answers, one for each, so that M predictors share its capacity.

.. math:: (y_1, \ldots, y_M) = f_\theta([x_1, \ldots, x_M]), \qquad L = \sum_m -\log p_\theta(y_m \mid x_1, \ldots, x_M)

In training the inputs are different examples; in prediction all M are the same one. Only the first layer is wider, on
its input, and the last one, on its output: input m goes into *slot* m, answer m comes from *head* m. Havasi, Jenatton,
Fort et al. (2021), "Training independent subnetworks for robust prediction", arXiv:2010.06610.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from effens.ensembles.base import Ensemble, MakeNet, eval_mode, made
from effens.ensembles.layers import MemberLayer, RowEnsemble, chain, has_hooks, refusal, replace_layers, split_rows

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
WIDENED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

# Modules that mix the rows that stand side by side, or are networks of their own: in front of the first layer and
# behind the last one, these rows belong to different slots.
MIXING = (
    *(_BatchNorm, nn.RNNBase, nn.RNNCellBase),
    *(nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer),
)

CHECKING = Lock()  # threads that ask first at the same time would record each other's calls


class MIMO(RowEnsemble):
    """One network whose first layer reads M inputs side by side and whose last layer gives M answers.

    The first and the last `nn.Linear` or convolution (`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`) are widened, and their
    weights drawn anew, each as the layer's own ``reset_parameters`` draws them at its new size: PyTorch's default
    initialization, in the first layer at M times the fan-in. All other weights stay as ``make_net`` drew them. With one
    member the network is left as it is.

    In nested `nn.Sequential`s the order of calls is known. In any other network the layer registered first and the one
    registered last are taken, and the first call of the ensemble makes sure that they are called so. Inputs are joined
    where the first layer reads them: layers in front of it treat each input, layers behind the last one each answer.

    Args:
        make_net: () -> nn.Module, a fresh network.
        members: how many inputs and answers.
        share: fraction of the examples of a step that is the same in every slot: 0 independent, 1 identical.
        repeats: how many times each example of a batch is seen in a step.
        first: name of the layer to widen on its input; found by default.
        last: name of the layer to widen on its output; found by default.

    Raises:
        ValueError: a number is out of range, there are no two layers to widen, or a layer cannot be one of them.

    Shape:
        - ``ensemble(x)``: ``(batch, ...)`` to ``(members, batch, outputs)``
        - ``ensemble.forward_members(xs)``: ``(members, batch, ...)`` to ``(members, batch, outputs)``

    Example:
        >>> ensemble = MIMO(lambda: nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 2)), members=3)
        >>> ensemble(torch.randn(10, 3)).shape
        torch.Size([3, 10, 2])
    """

    def __init__(
        self,
        make_net: MakeNet,
        members: int = 3,
        share: float = 0.0,
        repeats: int = 1,
        *,
        first: str | None = None,
        last: str | None = None,
    ) -> None:
        if members < 1:
            raise ValueError(f"members must be >= 1, got {members}")
        if not 0 <= share <= 1:
            raise ValueError(f"share must be in 0 ... 1, got {share}")
        if repeats < 1:
            raise ValueError(f"repeats must be >= 1, got {repeats}")
        network = made(make_net)
        route = Route(network, first, last) if members > 1 else None
        super().__init__(route.widen(network, members) if route else network, members)
        self.share = share
        self.repeats = repeats
        self._unchecked = route if route and not route.known else None

    def forward(self, x: Tensor) -> Tensor:
        """Answer with every head: ``(batch, ...)``, put into every slot, to ``(members, batch, outputs)``.

        A first layer that stands in nested `nn.Sequential`s sums its slots' weights and reads ``x`` once, so that
        asking costs what one network does.
        """
        if self._unchecked and len(x):
            self._check_route(torch.stack([x[[0, 0]]] * self.members))
        return super().forward(x)

    def forward_members(self, xs: Tensor) -> Tensor:
        """Give each slot its own batch: ``(members, batch, ...)`` to ``(members, batch, outputs)``."""
        if self._unchecked and xs.numel():
            self._check_route(self.check_streams(xs)[:, [0, 0]])
        return super().forward_members(xs)

    @torch.no_grad()
    def _check_route(self, xs: Tensor) -> None:
        """See, before its first call, whether an unknown network goes the way that it was widened for."""
        with CHECKING, eval_mode(self):
            if self._unchecked:
                self._answers(self._unchecked.watch(self.network, xs.flatten(0, 1)), 2)
        self._unchecked = None

    def batches(self, n: int, batch_size: int, generator: torch.Generator | None = None) -> Iterable[Tensor]:
        """Give each slot the examples of each batch in an order of its own: ``(members, batch * repeats)``.

        A batch is repeated and shuffled; then each slot shuffles the first ``1 - share`` of it once more.
        """
        for batch in torch.randperm(n, generator=generator).split(batch_size):
            index = batch.repeat(self.repeats)
            index = index[torch.randperm(len(index), generator=generator)]
            own = int(len(index) * (1 - self.share) + 1e-9)  # 10 * (1 - 0.9) is 1, rounded or not
            slots = [index[:own][torch.randperm(own, generator=generator)] for _ in range(self.members)]
            yield torch.stack([torch.cat([slot, index[own:]]) for slot in slots])

    def answering(self) -> tuple[Ensemble, list[float]]:
        """Return a copy whose first layer reads one input for all slots, the weights that meet it summed."""
        layers = [layer for layer in self.network.modules() if isinstance(layer, FirstLayer)]
        network = copy.deepcopy(self.network, {id(layer): layer.member(0) for layer in layers})
        return Heads(network, self.members), [1.0] * self.members

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"members={self.members}, share={self.share}, repeats={self.repeats}"


class Heads(RowEnsemble):
    """A network that reads one input and answers with all members' rows: MIMO, its first layer summed."""

    def forward(self, x: Tensor) -> Tensor:
        """Answer with every head: ``(batch, ...)`` to ``(members, batch, outputs)``."""
        return self._answers(self.network(x.clone()), len(x))


class FirstLayer(MemberLayer):
    """A layer that reads M inputs side by side on its channels: ``(members * batch, ...)`` rows to ``(batch, ...)``."""

    def __init__(self, plain: Layer, members: int) -> None:
        super().__init__()
        self.members = members
        self.layer = resize(plain, torch.cat([plain.weight] * members, dim=1), plain.bias)
        self.layer.reset_parameters()

    def forward(self, rows: Tensor) -> Tensor:
        """Give each slot its own rows."""
        slots = split_rows(rows, self.members).unbind()  # members of (batch, ..., channels, ...)
        y: Tensor = self.layer(torch.cat(slots, channel_axis(self.layer)))
        return y

    def forward_shared(self, x: Tensor) -> Tensor:
        """Give every slot the same ``x``: ``(batch, ...)`` to ``(batch, ...)``."""
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, self.summed(), self.layer.bias)
        y: Tensor = self.layer._conv_forward(x, self.summed(), self.layer.bias)
        return y

    def summed(self) -> Tensor:
        """Return the weight that meets an input which is in every slot."""
        return torch.unflatten(self.layer.weight, 1, (self.members, -1)).sum(1)

    def member(self, m: int) -> nn.Module:
        """Return a plain copy, the same for every member, that reads one input for all slots."""
        return resize(self.layer, self.summed(), self.layer.bias)


class LastLayer(MemberLayer):
    """A layer with M heads: ``(batch, ...)`` rows to ``(members * batch, ...)``, member-major."""

    def __init__(self, plain: Layer, members: int) -> None:
        super().__init__()
        self.members = members
        bias = None if plain.bias is None else torch.cat([plain.bias] * members)
        self.layer = resize(plain, torch.cat([plain.weight] * members), bias)
        self.layer.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Answer with every head."""
        return torch.cat(self.layer(x).chunk(self.members, channel_axis(self.layer)))

    def member(self, m: int) -> nn.Module:
        """Return a copy of head ``m`` as a plain layer."""
        bias = None if self.layer.bias is None else self.layer.bias.chunk(self.members)[m]
        return resize(self.layer, self.layer.weight.chunk(self.members)[m], bias)


class Route:
    """The way through a plain network: which layer reads the input, which one gives the answer, and what is between.

    Args:
        network: a plain network.
        first: name of the first layer; found if None.
        last: name of the last layer; found if None.

    Attributes:
        known: whether the order of calls is known without a call, and was found right.
    """

    def __init__(self, network: nn.Module, first: str | None, last: str | None) -> None:
        modules = dict(network.named_modules(remove_duplicate=False))
        self.watched = [name for name, m in network.named_modules() if isinstance(m, (nn.Linear, _ConvNd, *MIXING))]
        self.mixing = {name: type(modules[name]).__name__ for name in self.watched if isinstance(modules[name], MIXING)}
        self.found = {"first": first is None, "last": last is None}
        layers = [name for name in self.watched if name not in self.mixing]
        if not layers:
            raise ValueError(f"the network must have linear or convolutional layers to widen, got {network}")
        self.first = layers[0] if first is None else first
        self.last = layers[-1] if last is None else last
        for role, name in (("first", self.first), ("last", self.last)):
            if name not in modules:
                have = [name for name in modules if name]
                raise ValueError(f"{role} must name a module of the network, got {name!r}, have {have}")
            if reason := why_not_wide(modules, name):
                raise ValueError(f"MIMO cannot widen {name or 'the network'!r}, {reason}: name another with {role}=")
        if modules[self.first] is modules[self.last]:
            raise ValueError(f"first and last must be two layers, got {self.first!r} for both")
        names = {module: name for name, module in reversed(modules.items())}
        self.first, self.last = names[modules[self.first]], names[modules[self.last]]  # a layer may have two names
        links = list(chain(network))
        self.known = all(isinstance(link, MIXING) or not list(link.children()) for link in links)
        if self.known:
            self.check([names[link] for link in links if names[link] in self.watched])

    def widen(self, network: nn.Module, members: int) -> nn.Module:
        """Widen both layers, in place."""
        first, last = (network.get_submodule(name) for name in (self.first, self.last))
        assert isinstance(first, WIDENED)
        assert isinstance(last, WIDENED)
        new: dict[nn.Module, nn.Module] = {first: FirstLayer(first, members), last: LastLayer(last, members)}
        return replace_layers(network, lambda _, module: new.get(module))

    def watch(self, network: nn.Module, rows: Tensor) -> Any:
        """Call the widened network, and raise `ValueError` if the layers are not called as they must be."""
        with record_calls(network, self.watched) as calls:
            try:
                outputs = network(rows)
            except (RuntimeError, ValueError) as error:
                if self.first not in calls:
                    raise  # the input itself was wrong
                rule = f"the network must read its input through {self.first!r} only, and answer through {self.last!r}"
                raise ValueError(f"{rule} (first= and last= name others), got: {error}") from error
        self.check(calls)
        return outputs

    def check(self, calls: Sequence[str]) -> None:
        """Raise `ValueError` unless first and last are called once, in this order, with nothing wrong around them."""
        for role, name in (("first", self.first), ("last", self.last)):
            if calls.count(name) != 1:
                rule = f"{role} must be a layer that the network calls once"
                raise ValueError(f"{rule}, got {name!r}, called {calls.count(name)} times: name another with {role}=")
        start, end = calls.index(self.first), calls.index(self.last)
        if start > end:
            rule = "first must be called before last: name them with first= and last="
            raise ValueError(f"{rule}, got first={self.first!r}, last={self.last!r}, called in the order {calls}")
        self._check_outside(calls[:start], "first", f"before {self.first!r}")
        self._check_outside(calls[end + 1 :], "last", f"after {self.last!r}")

    def _check_outside(self, calls: Sequence[str], role: str, where: str) -> None:
        """Refuse what mixes rows of different slots; and other layers, unless the reader wanted them there."""
        for name in calls:
            if name in self.mixing:
                raise ValueError(f"MIMO cannot have {name!r}, {self.mixing[name]}, {where}: it would mix the members")
            if self.found[role]:
                rule = f"{role} must be the {role} linear or convolutional layer that is called: name it with {role}="
                raise ValueError(f"{rule}, got {name!r} called {where}")


def why_not_wide(modules: dict[str, nn.Module], name: str) -> str:
    """Say why a module cannot be widened, or nothing if it can."""
    parts = name.split(".")
    for outer in (".".join(parts[:i]) for i in range(len(parts))):
        if reason := refusal(modules[outer]):
            return f"part of {outer or 'the network'!r}, {reason}"
    layer = modules[name]
    if type(layer) not in WIDENED:
        return (
            refusal(layer) or f"{type(layer).__name__}, where nn.Linear or a convolution (nn.Conv1d, 2d, 3d) is needed"
        )
    if has_hooks(layer):
        return f"{type(layer).__name__} with hooks, which may change its weight or its result"
    if isinstance(layer, _ConvNd) and layer.groups > 1:
        return f"{type(layer).__name__} with groups={layer.groups}, where only groups=1 can be widened"
    weights = {id(parameter) for parameter in layer.parameters()}
    if any(id(p) in weights for other in {*modules.values()} - {layer} for p in other.parameters(recurse=False)):
        return f"{type(layer).__name__}, whose weights another layer has, too"
    return ""


def channel_axis(layer: Layer) -> int:
    """Return the axis of a layer's channels, counted from the end: -1 if linear, -3 if it convolves images."""
    return 1 - layer.weight.dim()


def resize(layer: Layer, weight: Tensor, bias: Tensor | None) -> Layer:
    """Return a copy of a layer with another weight and bias, of any size; it is frozen, or in training, if that is."""
    instead = {id(layer.weight): nn.Parameter(weight.detach().clone(), layer.weight.requires_grad)}
    if layer.bias is not None and bias is not None:
        instead[id(layer.bias)] = nn.Parameter(bias.detach().clone(), layer.bias.requires_grad)
    new = copy.deepcopy(layer, instead)
    outputs, inputs = weight.shape[:2]
    if isinstance(new, nn.Linear):
        new.out_features, new.in_features = outputs, inputs
    else:
        new.out_channels, new.in_channels = outputs, inputs
    return new


@contextmanager
def record_calls(network: nn.Module, names: Sequence[str]) -> Iterator[list[str]]:
    """Record which of the named modules are called, in the order in which they return."""
    calls: list[str] = []
    hooks = []
    for name in names:
        record = partial(lambda name, *_: calls.append(name), name)
        hooks.append(network.get_submodule(name).register_forward_hook(record))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
