r"""MIMO: one network reads M inputs at once and gives M answers, one for each, so that M predictors share its capacity.

.. math:: (y_1, \ldots, y_M) = f_\theta([x_1, \ldots, x_M]), \qquad L = \sum_m -\log p_\theta(y_m \mid x_1, \ldots, x_M)

In training the inputs are different examples; in prediction all M are the same one. Only the first layer is wider, on
its input, and the last one, on its output: input m goes into *slot* m, answer m comes from *head* m. Havasi, Jenatton,
Fort et al. (2021), "Training independent subnetworks for robust prediction", arXiv:2010.06610.
"""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from effens.ensembles.base import Ensemble, MakeNet, check_positive
from effens.ensembles.layers import (
    MemberLayer,
    RowEnsemble,
    chain,
    fresh_network,
    has_hooks,
    refusal,
    replace_layers,
    split_rows,
)
from effens.inputs import Inputs, call, count_rows, each

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
WIDENED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class MIMO(RowEnsemble):
    """One network whose first layer reads M inputs side by side and whose last layer gives M answers.

    The first and the last `nn.Linear` or convolution (`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`) are widened, and their
    weights drawn anew, each as the layer's own ``reset_parameters`` draws them at its new size: PyTorch's default
    initialization, in the first layer at M times the fan-in. All other weights stay as ``make_net`` drew them. With one
    member the network is left as it is.

    The layer registered first and the one registered last are taken, unless others are named; the first call makes sure
    that each head answers as its member alone. Inputs are joined where the first layer reads them: layers in front of
    it treat each input, layers behind the last one each answer.

    Args:
        make_net: () -> nn.Module, a fresh network.
        members: how many inputs and answers.
        share: fraction of the examples of a step that is the same in every slot: 0 independent, as in the paper, 1
            identical. Small networks want half or more.
        repeats: how many times each example of a batch is seen in a step.
        first: name of the layer to widen on its input; found by default.
        last: name of the layer to widen on its output; found by default.
        trunk: a network that all members share: see `Ensemble`.

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
        share: float = 0.5,
        repeats: int = 1,
        *,
        first: str | None = None,
        last: str | None = None,
        trunk: nn.Module | None = None,
    ) -> None:
        check_positive(members=members, repeats=repeats)
        if not 0 <= share <= 1:
            raise ValueError(f"share must be in 0 ... 1, got {share}")
        network = fresh_network(make_net)
        remedy = "it must be widened where it reads its input and where it answers; first= and last= name these layers"
        super().__init__(widen(network, members, first, last) if members > 1 else network, members, remedy, trunk)
        self.share = share
        self.repeats = repeats

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
        return self.answer_on_trunk(Heads(network, self.members)), [1.0] * self.members

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"members={self.members}, share={self.share}, repeats={self.repeats}"


class Heads(RowEnsemble):
    """A network that reads one input and answers with all members' rows: MIMO, its first layer summed."""

    def forward(self, x: Inputs) -> Tensor:
        """Answer with every head: ``(batch, ...)`` to ``(members, batch, outputs)``."""
        x = self.features(x)
        return self._answers(call(self.network, each(Tensor.clone, x)), count_rows(x))


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


def widen(network: nn.Module, members: int, first: str | None, last: str | None) -> nn.Module:
    """Widen the first layer, on its input, and the last one, on its output, in place."""
    modules = dict(network.named_modules(remove_duplicate=False))
    names = [name for name, module in network.named_modules() if isinstance(module, (nn.Linear, _ConvNd))]
    if not names:
        raise ValueError(f"the network must have linear or convolutional layers to widen, got {network}")
    first, last = names[0] if first is None else first, names[-1] if last is None else last
    new: dict[nn.Module, nn.Module] = {}
    for role, name, kind in (("first", first, FirstLayer), ("last", last, LastLayer)):
        if name not in modules:
            have = [name for name in modules if name]
            raise ValueError(f"{role} must name a module of the network, got {name!r}, have {have}")
        if reason := why_not_wide(modules, name):
            raise ValueError(f"MIMO cannot widen {name or 'the network'!r}, {reason}: name another with {role}=")
        layer = modules[name]
        if layer in new:
            raise ValueError(f"first and last must be two layers, got {name!r} for both")
        assert isinstance(layer, WIDENED)
        new[layer] = kind(layer, members)
    links = list(chain(network))  # in the order in which they are called
    place = {name: links.index(module) for name, module in modules.items() if module in links}
    start, end = place.get(first, 0), place.get(last, len(links))
    for name, i in place.items():
        if isinstance(modules[name], _BatchNorm) and not start <= i <= end:
            side = f"before {first!r}" if i < start else f"after {last!r}"
            what = f"{name!r}, {type(modules[name]).__name__}, {side}"
            raise ValueError(f"MIMO cannot have {what}: it would mix the members")
    return replace_layers(network, lambda _, module: new.get(module))


def why_not_wide(modules: dict[str, nn.Module], name: str) -> str:
    """Say why a module cannot be widened, or nothing if it can."""
    parts = name.split(".")
    for outer in (".".join(parts[:i]) for i in range(len(parts))):
        reason = refusal(modules[outer])
        if isinstance(modules[outer], nn.MultiheadAttention | nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            reason = f"{type(modules[outer]).__name__}, which reads its layers' weights without calling them"
        if reason:
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
    if not all(parameter.requires_grad for parameter in layer.parameters()):
        return f"{type(layer).__name__}, which is frozen, where its weights are drawn anew"
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
