r"""Deep ensembles: M networks, each from its own random start and with its own shuffling of all the data.

.. math:: p(y \mid x) = \frac{1}{M} \sum_m p_{\theta_m}(y \mid x)

Lakshminarayanan, Pritzel and Blundell (2017), "Simple and scalable predictive uncertainty estimation using deep
ensembles", arXiv:1612.01474. There is no bagging: every member sees every example.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from effens.ensembles.base import Ensemble, MakeNet, call_make_net, check_positive
from effens.ensembles.layers import (
    ALL,
    GEOMETRY,
    MemberLayer,
    Outputs,
    Plain,
    RowEnsemble,
    WeightLayer,
    has_hooks,
    is_large,
    is_rowwise,
    join,
    rows_each,
)
from effens.inputs import Inputs, call, each, split_inputs, tensors_of


class DeepEnsemble(RowEnsemble):
    """Independent networks, trained and asked as one batched computation where their layers allow it.

    Layers that stand in (nested) `nn.Sequential`s are stacked: `nn.Linear` becomes one batched matrix product,
    `nn.Conv2d` a grouped convolution, activations, pooling and dropout take all members' rows at once. Every other
    module, a network with a `forward` of its own included, is looped over: exact, as fast as M networks.

    Args:
        make_net: () -> nn.Module, a fresh network at each call.
        members: how many networks.
        trunk: a network that all members share: see `Ensemble`.

    Raises:
        ValueError: ``members`` is below 1, or ``make_net`` returns the same network twice or networks that differ.

    Shape:
        - ``ensemble(x)``: ``(batch, ...)`` to ``(members, batch, outputs)``
        - ``ensemble.forward_members(xs)``: ``(members, batch, ...)`` to ``(members, batch, outputs)``

    Example:
        >>> ensemble = DeepEnsemble(lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), members=4)
        >>> ensemble(torch.randn(10, 3)).shape
        torch.Size([4, 10, 2])
    """

    def __init__(self, make_net: MakeNet, members: int = 5, *, trunk: nn.Module | None = None) -> None:
        check_positive(members=members)
        networks = [call_make_net(make_net) for _ in range(members)]
        check_fresh(networks)
        super().__init__(stack(networks), members, trunk=trunk)

    @classmethod
    def of(cls, networks: Iterable[nn.Module], *, trunk: nn.Module | None = None) -> Ensemble:
        """Put any networks or ensembles side by side, as an equal mixture of all their members.

        Plain networks may differ from each other, and can be trained further, if none is given twice. Ensembles (of
        SWAGs, say: MultiSWAG) are trained before they are put together.

        Args:
            networks: plain networks, or ensembles.
            trunk: of plain networks, one that all share: see `Ensemble`.

        Raises:
            ValueError: there are none, or plain networks are mixed with ensembles.
            TypeError: there is anything else among them.
        """
        networks = list(networks)
        if not networks:
            raise ValueError("networks must hold at least one network, got none")
        if strange := [network for network in networks if not isinstance(network, nn.Module)]:
            raise TypeError(f"networks must be nn.Modules, got {type(strange[0]).__name__}")
        ensembles = [network for network in networks if isinstance(network, Ensemble)]
        if len(ensembles) == len(networks):
            if trunk is not None:
                raise ValueError("trunk must be given to each of the ensembles when it is made, got one for all")
            return Mixture(ensembles)
        if ensembles:
            raise ValueError(f"networks must be all plain or all ensembles, got {len(ensembles)} of {len(networks)}")
        ensemble = cls.__new__(cls)
        RowEnsemble.__init__(ensemble, LoopedLayer(networks), len(networks), trunk=trunk)
        return ensemble

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return the optimizer's one group; raise `ValueError` if a network is there twice."""
        if isinstance(self.network, LoopedLayer) and len({*self.network.layers}) < self.members:
            raise ValueError("networks must be different objects where they are trained, got the same network twice")
        return super().parameter_groups(lr, weight_decay)

    def gradients(self) -> list[list[Tensor]]:
        """Return each member's gradients, which are clipped by themselves, and the trunk's."""
        return member_gradients(self)

    @torch.no_grad()
    def put(self, m: int, network: nn.Module) -> None:
        """Copy a plain network's weights and buffers into member ``m``, in place: the reverse of `member`.

        Args:
            m: which member.
            network: a network of the member's architecture, on any device.

        Raises:
            IndexError: there is no such member.
            ValueError: the network's weights and buffers have other names or shapes, or what all members share, frozen
                weights say, has other values; then nothing is copied.
        """
        slots, tensors = member_tensors(self.network, self.check_member(m)), named_tensors(network)
        expected, got = ({name: tuple(t.shape) for name, t in named.items()} for named in (slots, tensors))
        if got != expected:
            raise ValueError(f"the network must have member {m}'s architecture, {expected}, got {got}")
        others = member_tensors(self.network, (m + 1) % self.members) if self.members > 1 else {}
        shared = [name for name in others.keys() & slots if others[name].data_ptr() == slots[name].data_ptr()]
        if changed := [name for name in shared if not torch.equal(slots[name], tensors[name].to(slots[name]))]:
            raise ValueError(f"what members share must be equal in the network, got other values of {changed}")
        for name in slots.keys() - shared:
            slots[name].copy_(tensors[name])


class Mixture(Ensemble):
    """Ensembles side by side: the members of the first, then those of the second, and so on."""

    def __init__(self, ensembles: Sequence[Ensemble]) -> None:
        super().__init__(sum(ensemble.members for ensemble in ensembles))
        self.ensembles = nn.ModuleList(ensembles)

    @property
    def members(self) -> int:
        """How many members its parts have, or will have."""
        return sum(part.members for part in self.parts()) if hasattr(self, "ensembles") else self.planned

    @members.setter
    def members(self, members: int) -> None:
        self.planned = members

    def forward(self, x: Inputs) -> Tensor:
        """Answer with every member of every ensemble: ``(batch, ...)`` to ``(members, batch, outputs)``."""
        return torch.cat([ensemble(x) for ensemble in self.ensembles])

    def forward_members(self, xs: Inputs) -> Tensor:
        """Refuse: ensembles are trained one by one, before they are put side by side."""
        raise RuntimeError("ensembles side by side are not trained together: call effens.fit on each of them first")

    def parts(self) -> list[Ensemble]:
        """Return the ensembles."""
        return [part for part in self.ensembles if isinstance(part, Ensemble)]

    def answering(self) -> tuple[Ensemble, list[float]]:
        """Return what answers in each of them, side by side."""
        ensembles, weights = zip(*(part.answering() for part in self.parts()), strict=True)
        return Mixture(ensembles), [weight for each in weights for weight in each]

    def member(self, m: int) -> nn.Module:
        """Return a copy of member ``m`` as a plain network, equal to ``ensemble(x)[m]``."""
        m = self.check_member(m)
        parts = [(part, i) for part in self.parts() for i in range(part.members)]
        return parts[m][0].member(parts[m][1])


class StackedLayer(WeightLayer):
    """M plain layers as one, their weights and biases stacked along a new first axis."""

    def __init__(self, layers: Sequence[Plain]) -> None:
        super().__init__()
        self.members = len(layers)
        self.weight = stack_parameters([layer.weight for layer in layers])
        biases = [layer.bias for layer in layers if layer.bias is not None]
        self.bias = stack_parameters(biases) if biases else None
        first = layers[0]
        self.geometry = None if isinstance(first, nn.Linear) else {name: getattr(first, name) for name in GEOMETRY}
        self.train(first.training)

    def weights(self, which: slice = ALL) -> Tensor:
        """Return every member's weight."""
        return self.weight[which]


class StackedLinear(StackedLayer):
    """M `nn.Linear` as one: weight ``(members, out, in)``, bias ``(members, out)``."""


class StackedConv1d(StackedLayer):
    """M `nn.Conv1d` as one: weight ``(members, out, in / groups, length)``, bias ``(members, out)``."""


class StackedConv2d(StackedLayer):
    """M `nn.Conv2d` as one: weight ``(members, out, in / groups, height, width)``, bias ``(members, out)``."""


class StackedBatchNorm(MemberLayer, _BatchNorm):
    """M batch norms as one of all members' channels; affine weights and statistics are ``(members, channels)``.

    If the momentum is None, for a cumulative average, members have seen as many batches as each other.
    """

    def __init__(self, layers: Sequence[_BatchNorm]) -> None:
        first = layers[0]
        tracked = first.running_mean is not None
        _BatchNorm.__init__(self, first.num_features, first.eps, first.momentum, first.affine, tracked)
        self.members, self.kind = len(layers), type(first)
        if first.bias is None:
            self.bias = None
        for name, tensor in named_tensors(first).items():
            parts = [named_tensors(layer)[name].detach() for layer in layers]
            together = torch.stack(parts)
            setattr(self, name, nn.Parameter(together, tensor.requires_grad) if name in AFFINE else together)
        self.train(first.training)

    def forward_each(self, x: Tensor) -> Tensor:
        """Map ``(members or 1, batch, channels, ...)`` to ``(members, batch, channels, ...)``."""
        self.kind._check_input_dim(self, x[0])
        x = x.expand(self.members, *x.shape[1:])
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            factor = 1 / float(self.num_batches_tracked[0]) if self.momentum is None else self.momentum
        fresh = self.training or self.running_mean is None
        held = (self.running_mean, self.running_var, self.weight, self.bias)
        if is_large(x[0]):
            columns: list[Any] = [[None] * self.members if part is None else part.unbind() for part in held]
            parts = zip(x.unbind(), *columns, strict=True)
            each = [F.batch_norm(part, mean, var, w, b, fresh, factor, self.eps) for part, mean, var, w, b in parts]
            return torch.stack(each)
        mean, variance, weight, bias = (None if part is None else part.view(-1) for part in held)
        y = F.batch_norm(x.transpose(0, 1).flatten(1, 2), mean, variance, weight, bias, fresh, factor, self.eps)
        return torch.unflatten(y, 1, (self.members, -1)).transpose(0, 1)

    def one(self, m: int, x: Tensor) -> Tensor:
        """Run member ``m``'s layer on its own rows."""
        self.kind._check_input_dim(self, x)
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked[m].add_(1)
            factor = 1 / float(self.num_batches_tracked[m]) if self.momentum is None else self.momentum
        held = (self.running_mean, self.running_var, self.weight, self.bias)
        mean, variance, weight, bias = (None if part is None else part[m] for part in held)
        fresh = self.training or self.running_mean is None
        return F.batch_norm(x, mean, variance, weight, bias, fresh, factor, self.eps)

    def member(self, m: int) -> nn.Module:
        """Return a copy of member ``m``'s layer as a plain one."""
        plain = self.kind(self.num_features, self.eps, self.momentum, self.affine, self.track_running_stats)
        if self.bias is None:
            plain.bias = None
        for name, tensor in member_tensors(self, m).items():
            value = tensor.detach().clone()
            setattr(plain, name, nn.Parameter(value, tensor.requires_grad) if name in AFFINE else value)
        return plain.train(self.training)

    def extra_repr(self) -> str:
        """Describe the layer as PyTorch's plain one does."""
        return f"{_BatchNorm.extra_repr(self)}, members={self.members}"


class LoopedLayer(MemberLayer):
    """M modules of any kind, each called on its own rows: the exact way for whatever cannot be stacked.

    Modules may change their rows in place, and may return other things than tensors to the modules that follow.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = len(layers)
        self.layers = nn.ModuleList(layers)

    def forward(self, *rows: Any, **named: Any) -> Any:
        """Give member m's rows to module m."""
        if rows and isinstance(rows[0], Outputs):
            return join([layer(part) for layer, part in zip(self.layers, rows[0], strict=True)])
        for tensor in tensors_of((rows, named)):
            rows_each(tensor, self.members)
        parts = zip(split_inputs(rows, self.members), split_inputs(named, self.members), strict=True)
        return join([layer(*own, **by_name) for layer, (own, by_name) in zip(self.layers, parts, strict=True)])

    def one(self, m: int, x: Any) -> Any:
        """Call module ``m`` on its own rows."""
        return self.layers[m](x)

    def forward_shared(self, x: Inputs) -> Any:
        """Give the same ``x`` to every module, each a copy of its own."""
        return join([call(layer, each(Tensor.clone, x)) for layer in self.layers])

    def member(self, m: int) -> nn.Module:
        """Return a copy of module ``m``."""
        return copy.deepcopy(self.layers[m])


def stack(networks: Sequence[nn.Module]) -> nn.Module:
    """Make one network of M, taking them over: stacked where their layers allow it, looped over elsewhere."""
    first = networks[0]
    if not are_alike(networks):
        return LoopedLayer(networks)
    if type(first) is nn.Sequential and not (first._parameters or first._buffers):
        columns = zip(*(network._modules.items() for network in networks), strict=True)  # a layer may stand there twice
        return nn.Sequential(OrderedDict((column[0][0], stack([child for _, child in column])) for column in columns))
    if is_rowwise(first):
        return first
    if shares_all(networks):
        return first
    usual = getattr(first, "padding_mode", "zeros") == "zeros" and (
        not isinstance(first, _BatchNorm) or first.track_running_stats is (first.running_mean is not None)
    )
    return STACKED[type(first)](networks) if type(first) in STACKED and usual else LoopedLayer(networks)


def member_gradients(ensemble: RowEnsemble) -> list[list[Tensor]]:
    """Return the gradients of each member, all of whose weights are its own; and those of the trunk, if any."""
    found: list[list[Tensor]] = [[] for _ in range(ensemble.members)]
    for parameter, owner in owned(ensemble.network):
        if parameter.grad is not None:
            for m in range(ensemble.members) if owner is None else [owner]:
                found[m].append(parameter.grad[m] if owner is None else parameter.grad)
    shared = [] if ensemble.trunk is None else [p.grad for p in ensemble.trunk.parameters() if p.grad is not None]
    return [*found, shared] if shared else found


def owned(network: nn.Module) -> Iterator[tuple[nn.Parameter, int | None]]:
    """Yield the parameters of what `stack` made, and whose they are; None: all members', along their first axis."""
    for layer in network.modules():
        if isinstance(layer, LoopedLayer):
            yield from ((parameter, m) for m, module in enumerate(layer.layers) for parameter in module.parameters())
        elif isinstance(layer, MemberLayer):
            yield from ((parameter, None) for parameter in layer.parameters(recurse=False))


def member_tensors(network: nn.Module, m: int) -> dict[str, Tensor]:
    """Return the parts of what `stack` made that are member ``m``'s, by the names they have in its plain network."""
    if isinstance(network, LoopedLayer):
        return named_tensors(network.layers[m])
    if isinstance(network, StackedLayer | StackedBatchNorm):
        return {name: tensor[m] for name, tensor in named_tensors(network).items()}
    if not any(network.children()):
        return named_tensors(network)  # shared by all members
    return {
        f"{name}.{inner}": tensor
        for name, layer in network.named_children()
        for inner, tensor in member_tensors(layer, m).items()
    }


STACKED: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    nn.Linear: StackedLinear,
    nn.Conv1d: StackedConv1d,
    nn.Conv2d: StackedConv2d,
    nn.BatchNorm1d: StackedBatchNorm,
    nn.BatchNorm2d: StackedBatchNorm,
}
AFFINE = ("weight", "bias")


def shares_all(layers: Sequence[nn.Module]) -> bool:
    """Say whether layers with weights, and nothing else to keep, have the very same ones."""
    held = [list(layer.parameters()) for layer in layers]
    same = all(own is one for other in held[1:] for own, one in zip(other, held[0], strict=True))
    return same and bool(held[0]) and type(layers[0]) in (nn.Linear, nn.Conv1d, nn.Conv2d) and len(layers) > 1


def copy_trained(network: nn.Module) -> nn.Module:
    """Return a copy of a network that shares what is frozen with it."""
    return copy.deepcopy(network, {id(p): p for p in network.parameters() if not p.requires_grad})


def named_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return a network's weights and buffers, also those that no file keeps; a tied one under each of its names."""
    return {
        **dict(network.named_parameters(remove_duplicate=False)),
        **dict(network.named_buffers(remove_duplicate=False)),
    }


def are_alike(networks: Sequence[nn.Module]) -> bool:
    """Say whether networks are the same but for the values of their weights, with no hooks and no tied weights."""

    def looks(network: nn.Module) -> tuple[str, list[tuple[str, bool]], list[dict[str, Any]]]:
        parameters = [(name, p.requires_grad) for name, p in network.named_parameters(remove_duplicate=False)]
        shared = [vars(module) for module in network.modules() if is_rowwise(module)]  # a repr leaves settings out
        public = [{name: value for name, value in each.items() if name[0] != "_"} for each in shared]
        return str(network), parameters, public

    plain = not any(has_hooks(m) or "forward" in vars(m) for network in networks for m in network.modules())
    buffers = (len(list(networks[0].named_buffers(remove_duplicate=each))) for each in (True, False))
    untied = len(list(networks[0].parameters())) == len(looks(networks[0])[1]) and len({*buffers}) == 1
    return plain and untied and all(looks(network) == looks(networks[0]) for network in networks[1:])


def stack_parameters(parameters: Sequence[Tensor]) -> nn.Parameter:
    """Stack parameters along a new first axis, the members'."""
    return nn.Parameter(torch.stack([p.detach() for p in parameters]), requires_grad=parameters[0].requires_grad)


def check_fresh(networks: Sequence[nn.Module]) -> None:
    """Raise `ValueError` unless the networks share no weights and have weights of the same names and shapes."""
    shapes = [{name: tuple(p.shape) for name, p in network.state_dict().items()} for network in networks]
    seen: dict[nn.Parameter, int] = {}
    for m, network in enumerate(networks):
        if again := [seen[p] for p in network.parameters() if p in seen and p.requires_grad]:
            rule = "make_net must return a fresh network at each call"
            raise ValueError(f"{rule}, got call {again[0]}'s weights again at call {m}")
        seen.update(dict.fromkeys(network.parameters(), m))
        if shapes[m] != shapes[0]:
            raise ValueError(f"make_net must return the same architecture at each call, got {shapes[0]}, {shapes[m]}")
