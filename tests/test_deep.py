"""Deep ensembles: together equals one by one, and every layer equals the loop over its members."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from scenarios import cnn, images, indices, mlp, normed, plain_loop, relative, remembered, residual, tokens, vectors
from torch import Tensor, nn
from torch.nn import functional as F

import effens
import effens_book.nets
from effens.ensembles.deep import DeepEnsemble, LoopedLayer, StackedConv2d, StackedLinear
from effens.ensembles.layers import conv_each, linear_each, runs_apart

MEMBERS = 3
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


class Add(nn.Module):
    """Add a learned vector, in a forward that changes its input in place."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(size))

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.shift)


class Last(nn.Module):
    """Take the last step of what a recurrent layer returns."""

    def __init__(self, axis: int = 1) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, output: tuple[Tensor, Any]) -> Tensor:
        return output[0].select(self.axis, -1)


class Center(nn.Module):
    """Subtract the batch's mean: a layer that mixes rows."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Turn(nn.Module):
    """Exchange batch and time."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1)


class Tied(nn.Module):
    """Two layers, one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.outer.weight = self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        head: Tensor = self.head(self.outer(self.inner(x).tanh()).tanh())
        return head


class Pair(nn.Module):
    """A bilinear layer of the input with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        pair: Tensor = self.bilinear(x, x)
        return pair


def twice() -> nn.Module:
    """One activation object in two places."""
    activation = nn.ReLU()
    return nn.Sequential(nn.Linear(4, 8), activation, nn.Linear(8, 8), activation, nn.Linear(8, 3))


def tied_sequence() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 3))


def hooked() -> nn.Module:
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    network[1].register_forward_hook(lambda module, args, output: 2 * output)
    return network


def hooked_outside() -> nn.Module:
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    network.register_forward_pre_hook(lambda module, args: (3 * args[0],))
    return network


def parametrized() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 3))


def partly_frozen() -> nn.Module:
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    network[0].weight.requires_grad_(False)
    return network


def sequence(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A make_net for a sequence of freshly made layers."""
    return lambda: nn.Sequential(*(layer() for layer in layers))


L = partial(partial, nn.Linear)  # L(4, 3)() is nn.Linear(4, 3)
C = partial(partial, nn.Conv2d)
VECTORS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "no bias": sequence(partial(nn.Linear, 4, 8, bias=False), nn.Tanh, partial(nn.Linear, 8, 3, bias=False)),
    "one linear layer": L(4, 3),
    "nested": sequence(sequence(L(4, 8), sequence(nn.ReLU)), sequence(sequence(L(8, 3)))),
    "nothing to learn": sequence(nn.ReLU, L(4, 3), nn.Softplus),
    "flatten first": sequence(nn.Flatten, nn.Identity, L(4, 3)),
    "one activation twice": twice,
    "batch norm": sequence(partial(nn.Linear, 4, 8, bias=False), partial(nn.BatchNorm1d, 8), nn.ReLU, L(8, 3)),
    "batch norm first": sequence(partial(nn.BatchNorm1d, 4), L(4, 3)),
    "layer norm": sequence(L(4, 8), partial(nn.LayerNorm, 8), nn.GELU, L(8, 3)),
    "group norm": sequence(L(4, 8), partial(nn.GroupNorm, 2, 8), nn.SiLU, L(8, 3)),
    "learned activation": sequence(L(4, 8), nn.PReLU, L(8, 3)),
    "softmax over features": sequence(L(4, 8), partial(nn.Softmax, dim=1), L(8, 3)),
    "own forward": residual,
    "own forward inside": sequence(residual, nn.ReLU, L(3, 3)),
    "mixes rows": sequence(L(4, 8), Center, nn.ReLU, L(8, 3)),
    "mixes rows first": sequence(Center, L(4, 3)),
    "in place": sequence(L(4, 8), partial(nn.ReLU6, inplace=True), partial(nn.ReLU, inplace=True), L(8, 3)),
    "in place, own forward": sequence(L(4, 8), partial(Add, 8), L(8, 3)),
    "in place, first": partial(Add, 4),
    "tied": Tied,
    "tied in sequence": tied_sequence,
    "bilinear": Pair,
    "hook": hooked,
    "hook outside": hooked_outside,
    "parametrized": parametrized,
    "partly frozen": partly_frozen,
}
TOKENS: dict[str, Callable[[], nn.Module]] = {
    "linear on tokens": sequence(L(4, 8), nn.ReLU, L(8, 3), nn.Flatten),
    "recurrent": sequence(partial(nn.LSTM, 4, 6, batch_first=True), Last, L(6, 3)),
    "recurrent, nested": sequence(sequence(L(4, 4), partial(nn.GRU, 4, 6, batch_first=True)), sequence(Last), L(6, 3)),
    "recurrent, time first": sequence(Turn, partial(nn.RNN, 4, 6), sequence(nn.Identity), partial(Last, 0), L(6, 3)),
    "attention": sequence(partial(nn.TransformerEncoderLayer, 4, 2, 8, 0.0, batch_first=True), nn.Flatten, L(20, 3)),
    "convolution in time": sequence(partial(nn.Conv1d, 5, 2, 3), nn.ReLU, nn.Flatten, L(4, 3)),
}
IMAGES: dict[str, Callable[[], nn.Module]] = {
    "cnn": cnn,
    "batch norm": normed,
    "strides, dilation, no bias": sequence(
        C(1, 4, 3, stride=2, bias=False), nn.ReLU, C(4, 6, 2, dilation=2, padding=1), nn.Flatten, L(54, 3)
    ),
    "padding same": sequence(C(1, 2, 4, padding="same"), nn.ReLU, C(2, 2, 3, padding="valid"), nn.Flatten, L(72, 3)),
    "groups": sequence(C(1, 4, 3), nn.ReLU, C(4, 8, 3, groups=2), C(8, 8, 3, groups=8), nn.Flatten, L(32, 3)),
    "one convolution": sequence(C(1, 3, 8), nn.Flatten),
    "oblong kernels": sequence(C(1, 2, (1, 5), padding=(0, 2)), C(2, 1, (3, 2), stride=(2, 1)), nn.Flatten, L(21, 3)),
    "circular padding": sequence(C(1, 2, 3, padding=1, padding_mode="circular"), nn.Flatten, L(128, 3)),
    "pooling, group norm": sequence(
        C(1, 4, 3), partial(nn.GroupNorm, 2, 4), nn.ReLU, partial(nn.AdaptiveAvgPool2d, 1), nn.Flatten, L(4, 3)
    ),
    "transposed": sequence(partial(nn.ConvTranspose2d, 1, 2, 2, stride=2), nn.Flatten, L(512, 3)),
    "upsampled": sequence(partial(nn.Upsample, scale_factor=2), nn.Flatten, L(256, 3)),
}
PROBLEMS = [
    *(pytest.param(net, vectors, id=name) for name, net in VECTORS.items()),
    *(pytest.param(net, tokens, id=name) for name, net in TOKENS.items()),
    *(pytest.param(net, images, id=f"images, {name}") for name, net in IMAGES.items()),
]


def together(make_net: Callable[[], nn.Module], members: int = MEMBERS) -> tuple[effens.DeepEnsemble, list[nn.Module]]:
    """Return an ensemble in float64, and copies of the networks it was made of."""
    make, networks = remembered(lambda: make_net().double(), members)
    return effens.DeepEnsemble(make, members), networks


@pytest.mark.parametrize(("make_net", "data"), PROBLEMS)
def test_outputs_and_gradients_are_the_loop_s(make_net: Any, data: Any) -> None:
    ensemble, networks = together(make_net)
    x, _ = data(MEMBERS * 5)
    xs = x.unflatten(0, (MEMBERS, 5))
    outputs = ensemble.forward_members(xs.clone())
    expected = torch.stack([network(part.clone()) for network, part in zip(networks, xs, strict=True)])
    assert relative(outputs, expected) < 1e-12
    outputs.square().mean().backward()
    expected.square().mean().backward()
    with torch.no_grad():
        for parameter in ensemble.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    for m, network in enumerate(networks):  # each member's weights are its gradients now
        for (name, mine), its in zip(ensemble.member(m).named_parameters(), network.parameters(), strict=True):
            gradient = torch.zeros_like(its) if its.grad is None else its.grad
            assert torch.allclose(mine, gradient, rtol=1e-10, atol=1e-13), name


def images_net() -> nn.Module:
    """Convolutions, normalization that is looped over, a layer that changes its input in place, a linear layer."""
    layers = [nn.ReLU(inplace=True), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3, bias=False)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)).double()


@pytest.mark.parametrize("batch", [9, 512], ids=["one convolution", "one a member"])
def test_images_in_both_ways(batch: int) -> None:
    """512 images of 8 x 8 times 4 channels are more than the 65,536 numbers up to which there is one convolution."""
    torch.manual_seed(0)
    ensemble = effens.DeepEnsemble(images_net, members=3)
    networks = [ensemble.member(m) for m in range(3)]
    xs = torch.randn(3, batch, 1, 8, 8, dtype=torch.float64)
    outputs = ensemble.forward_members(xs.clone())
    looped = torch.stack([network(x.clone()) for network, x in zip(networks, xs, strict=True)])
    torch.testing.assert_close(outputs, looped)
    outputs.square().sum().backward()
    looped.square().sum().backward()
    for m, network in enumerate(networks):
        for (name, mine), (_, alone) in zip(ensemble.member(m).named_buffers(), network.named_buffers(), strict=True):
            torch.testing.assert_close(mine, alone, msg=name)
    convolution: Any = ensemble.get_submodule("network.1")
    gradients = [network.get_parameter("1.weight").grad for network in networks]
    torch.testing.assert_close(convolution.weight.grad, torch.stack([g for g in gradients if g is not None]))

    x = xs[0].clone()
    ensemble.eval()
    torch.testing.assert_close(ensemble(x), torch.stack([network.eval()(xs[0].clone()) for network in networks]))
    assert x.equal(xs[0]), "the input was changed"


@pytest.mark.parametrize(("make_net", "data"), PROBLEMS)
def test_a_shared_batch_goes_to_every_network(make_net: Any, data: Any) -> None:
    ensemble, networks = together(make_net)
    x, _ = data(7)
    for mode in (True, False):
        ensemble.train(mode)
        before = x.clone()
        outputs = ensemble(x)
        assert torch.equal(x, before), "the reader's x was changed in place"
        expected = torch.stack([network.train(mode)(x.clone()) for network in networks])
        assert relative(outputs, expected) < 1e-12


@pytest.mark.parametrize(("make_net", "data"), PROBLEMS)
def test_trained_together_is_trained_one_by_one(make_net: Any, data: Any) -> None:
    ensemble, networks = together(make_net)
    x, y = data()
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.3}
    effens.fit(ensemble, (x.clone(), y), epochs=3, batch_size=8, device="cpu", seed=7, **options)
    steps = indices(ensemble, len(x), 8, 3, seed=7)
    for m, network in enumerate(networks):
        plain_loop(network, x, y, [index[m] for index in steps], **options)
        assert relative(ensemble(x.clone())[m], network(x.clone())) < 1e-9
        for (name, mine), its in zip(
            ensemble.member(m).state_dict().items(), network.state_dict().values(), strict=True
        ):
            assert torch.allclose(mine, its, rtol=1e-9, atol=1e-11), name  # weights, and batch norm's statistics


@pytest.mark.parametrize(("make_net", "data"), PROBLEMS)
def test_a_network_is_put_into_a_member(make_net: Any, data: Any) -> None:
    ensemble, _ = together(make_net)
    network, (x, _) = make_net().double(), data(7)
    network(x.clone())  # moves the statistics of batch normalization
    before, places = ensemble.eval()(x.clone()), {name: t.data_ptr() for name, t in ensemble.state_dict().items()}
    ensemble.put(1, network)
    after = ensemble(x.clone())
    assert relative(after[1], network.eval()(x.clone())) < 1e-12
    assert torch.equal(after[::2], before[::2])
    assert {name: t.data_ptr() for name, t in ensemble.state_dict().items()} == places
    for (name, mine), its in zip(ensemble.member(1).state_dict().items(), network.state_dict().values(), strict=True):
        assert torch.equal(mine, its), name


def test_a_network_is_put_beside_others_of_other_architectures() -> None:
    networks = [mlp(), residual()]
    ensemble, network, (x, _) = effens.DeepEnsemble.of(networks), residual(), vectors()
    assert isinstance(ensemble, effens.DeepEnsemble)
    ensemble.put(1, network)
    assert torch.equal(ensemble(x), torch.stack([networks[0](x), network(x)]))
    with pytest.raises(ValueError, match="must have member 0's architecture"):
        ensemble.put(0, network)


@pytest.mark.parametrize(
    "network", [mlp(depth=3), effens_book.nets.mlp(4, 3, width=9), nn.Linear(4, 3), nn.Sequential(mlp()), normed()]
)
def test_only_a_network_of_its_architecture_is_put_into_a_member(network: nn.Module) -> None:
    ensemble = effens.DeepEnsemble(mlp, 2)
    state = copy.deepcopy(ensemble.state_dict())
    with pytest.raises(ValueError, match="the network must have member 1's architecture"):
        ensemble.put(1, network)
    for m in (-1, 2):
        with pytest.raises(IndexError, match=f"member must be in 0 ... 1, got {m}"):
            ensemble.put(m, mlp())
    assert all(torch.equal(tensor, state[name]) for name, tensor in ensemble.state_dict().items())


def test_members_have_orders_of_their_own() -> None:
    order = torch.cat(list(effens.DeepEnsemble(mlp, 4).batches(50, 20)), 1)
    assert len(order.unique(dim=0)) == 4
    assert torch.equal(order.sort(1).values, torch.arange(50).expand(4, 50))  # no bagging: all see all


def test_dropout_is_drawn_for_each_member() -> None:
    network = nn.Sequential(nn.Identity(), nn.Dropout(0.5))
    ensemble = effens.DeepEnsemble(lambda: nn.Sequential(nn.Linear(50, 50), *network), 4)
    with torch.no_grad():
        for parameter in ensemble.parameters():
            parameter.fill_(1.0)
    kept = ensemble.train()(torch.ones(6, 50)) > 0
    assert len(kept.flatten(1).unique(dim=0)) == 4
    assert 0.4 < float(kept.double().mean()) < 0.6
    assert len(ensemble.eval()(torch.ones(6, 50)).unique()) == 1


def test_layers_are_stacked_where_they_can_be() -> None:
    kinds = [type(layer) for layer in effens.DeepEnsemble(cnn, 2).network.children()]
    assert kinds == [StackedConv2d, nn.ReLU, nn.MaxPool2d] * 2 + [nn.Flatten, StackedLinear]
    assert type(effens.DeepEnsemble(residual, 2).network) is LoopedLayer


@pytest.mark.parametrize("shape", [(5, 3), (5, 7, 3), (5, 2, 7, 3), (0, 3), (5, 1), (5, 7, 1), (0, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_maps(shape: tuple[int, ...], bias: bool) -> None:
    weight = torch.randn(MEMBERS, 2, shape[-1], dtype=torch.float64)
    biases = torch.randn(MEMBERS, 2, dtype=torch.float64) if bias else None
    xs = torch.randn(MEMBERS, *shape, dtype=torch.float64)
    each = [F.linear(xs[m], weight[m], None if biases is None else biases[m]) for m in range(MEMBERS)]
    assert torch.allclose(linear_each(xs, weight, biases), torch.stack(each), rtol=1e-12)
    each = [F.linear(xs[0], weight[m], None if biases is None else biases[m]) for m in range(MEMBERS)]
    assert torch.allclose(linear_each(xs[:1], weight, biases), torch.stack(each), rtol=1e-12)


def test_linear_maps_of_rows_that_do_not_lie_in_order() -> None:
    weight = torch.randn(MEMBERS, 2, 3, dtype=torch.float64)
    x = torch.randn(7, 3, 2, MEMBERS, dtype=torch.float64).permute(3, 2, 0, 1)  # (members, batch, tokens, features)
    assert torch.allclose(linear_each(x, weight, None), linear_each(x.contiguous(), weight, None))


GEOMETRIES: list[dict[str, Any]] = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": "same"},
    {"dilation": (2, 1), "padding": (1, 2)},
    {"groups": 2},
    {"groups": 4, "stride": (1, 2), "padding": "valid"},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("side", [6, 68])  # 68 * 68 * 2 rows * 8 channels > 65,536: a call for each member
def test_convolutions(geometry: dict[str, Any], bias: bool, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(MEMBERS, 8, 4 // geometry.get("groups", 1), 3, 3, dtype=torch.float64)
    biases = torch.randn(MEMBERS, 8, dtype=torch.float64) if bias else None
    xs = torch.randn(MEMBERS, 2, 4, side, side, dtype=torch.float64, requires_grad=True)
    each = [F.conv2d(xs[m], weight[m], None if biases is None else biases[m], **geometry) for m in range(MEMBERS)]
    alike = [F.conv2d(xs[0], weight[m], None if biases is None else biases[m], **geometry) for m in range(MEMBERS)]
    calls, conv2d = [], F.conv2d

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs.get("groups", 1))
        return conv2d(*args, **kwargs)

    monkeypatch.setattr(F, "conv2d", counted)
    outputs = conv_each(xs, weight, biases, **geometry)
    groups = geometry.get("groups", 1)
    assert calls == ([MEMBERS * groups] if side == 6 else [groups] * MEMBERS)
    assert relative(outputs, torch.stack(each)) < 1e-12
    assert relative(conv_each(xs[:1], weight, biases, **geometry), torch.stack(alike)) < 1e-12
    mine, its = (torch.autograd.grad(y.square().sum(), xs)[0] for y in (outputs, torch.stack(each)))
    assert relative(mine, its) < 1e-12


def test_a_part_of_the_last_batch_is_a_batch() -> None:
    ensemble, networks = together(mlp)
    x, _ = vectors(MEMBERS)
    assert (
        relative(ensemble.forward_members(x[:, None]), torch.stack([n(x[m : m + 1]) for m, n in enumerate(networks)]))
        < 1e-12
    )


def test_layers_keep_the_training_mode_and_the_frozen_weights() -> None:
    ensemble = effens.DeepEnsemble(partly_frozen, 2)
    assert [p.requires_grad for p in ensemble.member(0).parameters()] == [False, True, True, True]
    ensemble.eval()
    list(ensemble.network.children())[2].train()
    assert [layer.training for layer in ensemble.member(0).children()] == [False, False, True]


def test_members_start_apart() -> None:
    assert len(effens.DeepEnsemble(mlp, 4)(vectors()[0]).flatten(1).unique(dim=0)) == 4


class TestOf:
    def test_networks_that_differ(self) -> None:
        x, y = vectors()
        networks = [mlp(), mlp(dropout=0.1), residual()]
        ensemble = effens.DeepEnsemble.of(networks).eval()
        assert torch.equal(ensemble(x), torch.stack([network(x) for network in networks]))
        effens.fit(ensemble, (x, y), epochs=1, device="cpu")
        assert torch.equal(ensemble(x), torch.stack([network(x) for network in networks]))  # taken over, not copied

    def test_ensembles(self) -> None:
        x, y = vectors()
        parts = [effens.DeepEnsemble(mlp, 2), effens.BatchEnsemble(mlp, 3), effens.DeepEnsemble.of([mlp()])]
        ensemble = effens.DeepEnsemble.of(part for part in parts).eval()
        assert ensemble.members == 6
        assert torch.equal(ensemble(x), torch.cat([part(x) for part in parts]))
        for m in range(6):
            assert relative(ensemble.member(m)(x), ensemble(x)[m]) < 1e-12
        assert effens.predict(ensemble, x).shape == (6, len(x), 3)
        with pytest.raises(RuntimeError, match=r"call effens.fit on each of them first"):
            effens.fit(ensemble, (x, y), device="cpu")

    def test_nothing(self) -> None:
        with pytest.raises(ValueError, match="networks must hold at least one network, got none"):
            effens.DeepEnsemble.of([])

    def test_mixed(self) -> None:
        with pytest.raises(ValueError, match="all plain or all ensembles, got 1 of 2"):
            effens.DeepEnsemble.of([mlp(), effens.DeepEnsemble(mlp, 2)])

    def test_no_network(self) -> None:
        functions: Any = [mlp]
        with pytest.raises(TypeError, match=r"networks must be nn.Modules, got function"):
            effens.DeepEnsemble.of(functions)


class TestMistakes:
    def test_no_members(self) -> None:
        with pytest.raises(ValueError, match="members must be >= 1, got 0"):
            effens.DeepEnsemble(mlp, members=0)

    @pytest.mark.parametrize("calls", [[0, 0], [0, 1, 1]])
    def test_the_same_network_again(self, calls: list[int]) -> None:
        networks = [mlp(), mlp()]
        again = iter(calls)
        with pytest.raises(
            ValueError, match=f"fresh network.*call {len(calls) - 2}'s weights again at call {len(calls) - 1}"
        ):
            effens.DeepEnsemble(lambda: networks[next(again)], members=len(calls))

    def test_another_architecture(self) -> None:
        networks = iter([mlp(), effens_book.nets.mlp(4, 3, width=9)])
        with pytest.raises(ValueError, match=r"same architecture.*\(8, 4\).*\(9, 4\)"):
            effens.DeepEnsemble(lambda: next(networks), members=2)

    def test_a_network_for_make_net(self) -> None:
        with pytest.raises(TypeError, match="function that returns a fresh network, got a Sequential"):
            effens.DeepEnsemble(mlp(), members=2)

    def test_no_network(self) -> None:
        number: Any = lambda: 3  # noqa: E731
        with pytest.raises(TypeError, match=r"make_net must return an nn.Module, got int"):
            effens.DeepEnsemble(number, members=2)

    def test_lazy_weights(self) -> None:
        with pytest.raises(ValueError, match=r"weights must exist.*LazyLinear"):
            effens.DeepEnsemble(lambda: nn.LazyLinear(3), members=2)

    def test_rank(self) -> None:
        with pytest.raises(ValueError, match=r"x must be \(batch, ..., features\), got shape \(4,\)"):
            effens.DeepEnsemble(mlp, 2)(torch.zeros(4))

    def test_rows(self) -> None:
        with pytest.raises(ValueError, match="divisible by members, got 7 rows and 2 members"):
            effens.DeepEnsemble(mlp, 2).network(torch.zeros(7, 4).double())

    @pytest.mark.parametrize("layers", [[nn.LSTM(4, 3)], [nn.Flatten(0)], [nn.Linear(4, 1), nn.Flatten(0)]], ids=str)
    def test_outputs_that_are_no_rows(self, layers: list[nn.Module]) -> None:
        with pytest.raises(
            ValueError, match=r"one row of outputs per example, \(6, outputs\), got|a tensor of outputs, .* tuple"
        ):
            effens.DeepEnsemble.of([nn.Sequential(*copy.deepcopy(layers)) for _ in range(2)])(torch.zeros(3, 4))


@pytest.mark.parametrize(
    ("layer", "setting"),
    [
        (partial(nn.AvgPool2d, 3, 1, 1), "count_include_pad"),
        (partial(nn.Upsample, scale_factor=2, mode="bilinear"), "align_corners"),
    ],
)
def test_settings_that_no_repr_shows_are_each_network_s_own(layer: Any, setting: str) -> None:
    def network(value: bool) -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 2, 3), layer(**{setting: value}), nn.Flatten(), nn.LazyLinear(3)).double()

    networks, (x, _) = [network(True), network(False)], images(5)
    expected = torch.stack([each(x) for each in networks])
    assert relative(effens.DeepEnsemble(partial(next, iter(networks)), 2)(x), expected) < 1e-12


@pytest.mark.parametrize("kind", ["plain", "momentum None", "in place", "own forward inside"])
def test_many_images_are_given_to_one_member_after_the_other_and_nothing_changes(kind: str) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(1))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    def make_net() -> nn.Sequential:
        norm = nn.BatchNorm2d(5, momentum=None if kind == "momentum None" else 0.1)
        first = [nn.ReLU(inplace=True)] if kind == "in place" else [Scaled()] if kind == "own forward inside" else []
        inner = nn.Sequential(nn.Conv2d(1, 5, 3, bias=False), norm, nn.ReLU(inplace=True), nn.MaxPool2d(2))
        return nn.Sequential(*first, inner, nn.Conv2d(5, 4, 3, groups=1), nn.Flatten(), nn.Linear(64, 3))

    ensemble = DeepEnsemble(make_net, 3)
    alone = [ensemble.member(m) for m in range(3)]
    xs = torch.randn(3, 64, 1, 14, 14)
    assert runs_apart(xs[0], ensemble.network)
    assert not runs_apart(xs[0, :8], ensemble.network)
    for _ in range(2):  # two steps, each of which moves the statistics
        found = ensemble.train().forward_members(xs.clone())
        expected = torch.stack([net.train()(x.clone()) for net, x in zip(alone, xs, strict=True)])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.square().mean().backward()
    expected.square().mean().backward()
    for m, net in enumerate(alone):
        of_member = ensemble.member(m)
        for name, buffer in net.named_buffers():
            torch.testing.assert_close(of_member.get_buffer(name), buffer, rtol=1e-4, atol=1e-5)
    grads = [p.grad for p in ensemble.parameters()]
    assert sum(float(g.square().sum()) for g in grads if g is not None) == pytest.approx(
        sum(float(p.grad.square().sum()) for net in alone for p in net.parameters() if p.grad is not None), rel=1e-3
    )
    x = xs[0]
    kept = x.clone()
    found = ensemble.eval()(x)
    torch.testing.assert_close(found, torch.stack([net.eval()(kept.clone()) for net in alone]), rtol=1e-4, atol=1e-4)
    assert torch.equal(x, kept)  # also where the first layer works in place
