r"""Deep ensembles: M networks, each from its own random start and with its own shuffling of all the data.

.. math:: p(y \mid x) = \frac{1}{M} \sum_m p_{\theta_m}(y \mid x)

Lakshminarayanan, Pritzel and Blundell (2017), "Simple and scalable predictive uncertainty estimation using deep
ensembles", arXiv:1612.01474. There is no bagging: every member sees every example.
"""

import copy
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from effens.ensembles.base import Ensemble, MakeNet, call_make_net, check_positive
from effens.ensembles.layers import GEOMETRY, MemberLayer, RowEnsemble, WeightLayer, has_hooks, is_rowwise, rows_each


class DeepEnsemble(RowEnsemble):
    """Independent networks, trained and asked as one batched computation where their layers allow it.

    Layers that stand in (nested) `nn.Sequential`s are stacked: `nn.Linear` becomes one batched matrix product,
    `nn.Conv2d` a grouped convolution, activations, pooling and dropout take all members' rows at once. Every other
    module, a network with a `forward` of its own included, is looped over: exact, as fast as M networks.

    Args:
        make_net: () -> nn.Module, a fresh network at each call.
        members: how many networks.

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

    def __init__(self, make_net: MakeNet, members: int = 5) -> None:
        check_positive(members=members)
        networks = [call_make_net(make_net) for _ in range(members)]
        check_fresh(networks)
        super().__init__(stack(networks), members)

    @classmethod
    def of(cls, networks: Iterable[nn.Module]) -> Ensemble:
        """Put any networks or ensembles side by side, as an equal mixture of all their members.

        Plain networks may differ from each other, and can be trained further. Ensembles (of SWAGs, say: MultiSWAG) are
        trained before they are put together.

        Args:
            networks: plain networks, or ensembles.

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
            return Mixture(ensembles)
        if ensembles:
            raise ValueError(
                f"networks must be all plain or all ensembles, got {len(ensembles)} ensembles of {len(networks)}"
            )
        ensemble = cls.__new__(cls)
        RowEnsemble.__init__(ensemble, LoopedLayer(networks), len(networks))
        return ensemble

    @torch.no_grad()
    def put(self, m: int, network: nn.Module) -> None:
        """Copy a plain network's weights and buffers into member ``m``, in place: the reverse of `member`.

        Args:
            m: which member.
            network: a network of the member's architecture, on any device.

        Raises:
            IndexError: there is no such member.
            ValueError: the network's weights and buffers have other names or shapes; then nothing is copied.
        """
        slots, tensors = member_tensors(self.network, self.check_member(m)), named_tensors(network)
        expected, got = ({name: tuple(t.shape) for name, t in named.items()} for named in (slots, tensors))
        if got != expected:
            raise ValueError(f"the network must have member {m}'s architecture, {expected}, got {got}")
        for name, slot in slots.items():
            slot.copy_(tensors[name])


class Mixture(Ensemble):
    """Ensembles side by side: the members of the first, then those of the second, and so on."""

    def __init__(self, ensembles: Sequence[Ensemble]) -> None:
        super().__init__(sum(ensemble.members for ensemble in ensembles))
        self.ensembles = nn.ModuleList(ensembles)

    def forward(self, x: Tensor) -> Tensor:
        """Answer with every member of every ensemble: ``(batch, ...)`` to ``(members, batch, outputs)``."""
        return torch.cat([ensemble(x) for ensemble in self.ensembles])

    def forward_members(self, xs: Tensor) -> Tensor:
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
        for ensemble in self.ensembles:
            assert isinstance(ensemble, Ensemble)
            if m < ensemble.members:
                return ensemble.member(m)
            m -= ensemble.members
        raise AssertionError("unreachable")


class StackedLayer(WeightLayer):
    """M plain layers as one, their weights and biases stacked along a new first axis."""

    def __init__(self, layers: Sequence[nn.Linear | nn.Conv2d]) -> None:
        super().__init__()
        self.members = len(layers)
        self.weight = stack_parameters([layer.weight for layer in layers])
        biases = [layer.bias for layer in layers if layer.bias is not None]
        self.bias = stack_parameters(biases) if biases else None
        first = layers[0]
        self.geometry = {name: getattr(first, name) for name in GEOMETRY} if isinstance(first, nn.Conv2d) else None
        self.train(first.training)

    def weights(self) -> Tensor:
        """Return every member's weight."""
        return self.weight


class StackedLinear(StackedLayer):
    """M `nn.Linear` as one: weight ``(members, out, in)``, bias ``(members, out)``."""


class StackedConv2d(StackedLayer):
    """M `nn.Conv2d` as one: weight ``(members, out, in / groups, height, width)``, bias ``(members, out)``."""


class Outputs(list[Any]):
    """What M modules returned, one after the other, where that is no tensor: a recurrent module's tuples, say."""


class LoopedLayer(MemberLayer):
    """M modules of any kind, each called on its own rows: the exact way for whatever cannot be stacked.

    Modules may change their rows in place, and may return other things than tensors to the modules that follow.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = len(layers)
        self.layers = nn.ModuleList(layers)

    def forward(self, rows: Any) -> Any:
        """Give member m's rows to module m."""
        if not isinstance(rows, Outputs):  # unlike those of `unbind`, these parts may be changed in place
            rows = torch.unsafe_split_with_sizes(rows, [rows_each(rows, self.members)] * self.members)
        return join([layer(part) for layer, part in zip(self.layers, rows, strict=True)])

    def forward_shared(self, x: Tensor) -> Any:
        """Give the same ``x`` to every module, each a copy of its own."""
        return join([layer(x.clone()) for layer in self.layers])

    def member(self, m: int) -> nn.Module:
        """Return a copy of module ``m``."""
        return copy.deepcopy(self.layers[m])


def join(outputs: list[Any]) -> Any:
    """Join tensors, one a member, to member-major rows; keep anything else apart."""
    return torch.cat(outputs) if all(isinstance(output, Tensor) for output in outputs) else Outputs(outputs)


def stack(networks: Sequence[nn.Module]) -> nn.Module:
    """Make one network of M, taking them over: stacked where their layers allow it, looped over elsewhere."""
    first = networks[0]
    if not are_alike(networks):
        return LoopedLayer(networks)
    if type(first) is nn.Sequential:
        columns = zip(*(network._modules.items() for network in networks), strict=True)  # a layer may stand there twice
        return nn.Sequential(OrderedDict((column[0][0], stack([child for _, child in column])) for column in columns))
    if is_rowwise(first):
        return first
    if type(first) is nn.Linear:
        return StackedLinear([layer for layer in networks if isinstance(layer, nn.Linear)])
    if type(first) is nn.Conv2d and first.padding_mode == "zeros":
        return StackedConv2d([layer for layer in networks if isinstance(layer, nn.Conv2d)])
    return LoopedLayer(networks)


def member_tensors(network: nn.Module, m: int) -> dict[str, Tensor]:
    """Return the parts of what `stack` made that are member ``m``'s, by the names they have in its plain network."""
    if isinstance(network, LoopedLayer):
        return named_tensors(network.layers[m])
    if isinstance(network, StackedLayer):
        return {name: parameter[m] for name, parameter in network.named_parameters()}
    return {
        f"{name}.{inner}": tensor
        for name, layer in network.named_children()
        for inner, tensor in member_tensors(layer, m).items()
    }


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

    plain = not any(has_hooks(module) for network in networks for module in network.modules())
    untied = len(list(networks[0].parameters())) == len(looks(networks[0])[1])
    return plain and untied and all(looks(network) == looks(networks[0]) for network in networks[1:])


def stack_parameters(parameters: Sequence[Tensor]) -> nn.Parameter:
    """Stack parameters along a new first axis, the members'."""
    return nn.Parameter(torch.stack([p.detach() for p in parameters]), requires_grad=parameters[0].requires_grad)


def check_fresh(networks: Sequence[nn.Module]) -> None:
    """Raise `ValueError` unless the networks share no weights and have weights of the same names and shapes."""
    if lazy := [layer for network in networks for layer in network.modules() if isinstance(layer, LazyModuleMixin)]:
        raise ValueError(f"the network's weights must exist: call it once on a batch in make_net, got {lazy[0]}")
    shapes = [{name: tuple(p.shape) for name, p in network.state_dict().items()} for network in networks]
    seen: dict[nn.Parameter, int] = {}
    for m, network in enumerate(networks):
        if again := [seen[p] for p in network.parameters() if p in seen]:
            raise ValueError(
                f"make_net must return a fresh network at each call, got call {again[0]}'s weights again at call {m}"
            )
        seen.update(dict.fromkeys(network.parameters(), m))
        if shapes[m] != shapes[0]:
            raise ValueError(
                f"make_net must return the same architecture at each call, got {shapes[0]} then {shapes[m]}"
            )
