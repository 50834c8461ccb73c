"""BatchEnsemble: layers against explicit matrices, conversion of networks, and the mistakes people make."""

import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from scenarios import cnn, generator, images, mlp, normed, relative, residual, vectors
from torch import Tensor, nn
from torch.nn import functional as F

import effens
import effens_book.nets
from effens import BatchEnsemble, BatchEnsembleConv2d, BatchEnsembleLinear
from effens.ensembles.batch import RankOneLayer
from effens.ensembles.layers import runs_apart

MEMBERS = 3


def linear(**options: Any) -> BatchEnsembleLinear:
    return BatchEnsembleLinear(6, 5, MEMBERS, init="normal", **options).double()


def convolution(**options: Any) -> BatchEnsembleConv2d:
    return BatchEnsembleConv2d(4, 6, 3, MEMBERS, init="normal", **options).double()


def explicit_linear(layer: BatchEnsembleLinear, m: int, x: Tensor) -> Tensor:
    """Member m as a dense layer: W_m = W * outer(s_m, r_m), then its bias."""
    weight = layer.weight * torch.outer(layer.s[m], layer.r[m])
    return x @ weight.T + (0 if layer.bias is None else layer.bias[m])


def explicit_convolution(layer: Any, m: int, x: Tensor) -> Tensor:
    """Member m's inputs scaled, a plain convolution, its outputs scaled, then its bias."""
    y: Tensor = F.conv2d(x * layer.r[m][:, None, None], layer.weight, **layer.geometry) * layer.s[m][:, None, None]
    return y + (0 if layer.bias is None else layer.bias[m][:, None, None])


def compare(layer: Any, explicit: Callable[[Any, int, Tensor], Tensor], xs: Tensor, shared: bool = False) -> None:
    """Hold outputs, and gradients of x and of all weights, against explicit members on xs (members, batch, ...)."""
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    xs.requires_grad_()
    parts = [xs[0]] * MEMBERS if shared else list(xs)
    expected = torch.cat([explicit(layer, m, part) for m, part in enumerate(parts)])
    outputs = layer.forward_shared(xs[0]) if shared else layer(xs.flatten(0, 1))
    assert relative(outputs, expected) < 1e-12
    upstream = torch.randn_like(expected)
    wanted = [xs, *layer.parameters()]
    mine, its = (torch.autograd.grad(y, wanted, upstream, retain_graph=True) for y in (outputs, expected))
    for a, b in zip(mine, its, strict=True):
        assert relative(a, b) < 1e-12


@pytest.fixture
def formulas(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Note, call by call, whether a layer folds."""
    noted: list[bool] = []
    folds = RankOneLayer.folds

    def noting(layer: Any, x: Tensor) -> bool:
        noted.append(folds(layer, x))
        return noted[-1]

    monkeypatch.setattr(RankOneLayer, "folds", noting)
    return noted


# batch * (in + out) >= 8 * in * out: with 6 -> 5, from a batch of 22 on; shared by all members, from 11 on.
@pytest.mark.parametrize(("batch", "fold"), [(1, False), (21, False), (22, True), (40, True)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_explicit_matrices(batch: int, fold: bool, bias: bool, formulas: list[bool]) -> None:
    compare(linear(bias=bias), explicit_linear, torch.randn(MEMBERS, batch, 6, dtype=torch.float64))
    assert formulas == ([True] if fold else [])  # of few rows nothing is asked


@pytest.mark.parametrize(("batch", "fold"), [(1, False), (10, False), (11, True), (40, True)])
@pytest.mark.parametrize("bias", [True, False])
def test_shared_linear_is_explicit_matrices(batch: int, fold: bool, bias: bool, formulas: list[bool]) -> None:
    compare(linear(bias=bias), explicit_linear, torch.randn(MEMBERS, batch, 6, dtype=torch.float64), shared=True)
    assert formulas[0] == fold


@pytest.mark.parametrize("shape", [(2, 3), (5, 4), (2, 3, 4)])
@pytest.mark.parametrize("shared", [True, False])
def test_tokens_are_rows(shape: tuple[int, ...], shared: bool) -> None:
    compare(linear(), explicit_linear, torch.randn(MEMBERS, *shape, 6, dtype=torch.float64), shared)


GEOMETRIES: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"stride": 2, "padding": 1},
    {"padding": "same", "dilation": 2},
    {"groups": 2},
    {"groups": 2, "stride": (1, 2), "bias": False},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize(("batch", "side", "fold"), [(1, 5, False), (9, 9, True)])
def test_convolution_is_explicit_kernels(
    geometry: dict[str, Any], batch: int, side: int, fold: bool, formulas: list[bool]
) -> None:
    xs = torch.randn(MEMBERS, batch, 4, side, side, dtype=torch.float64)
    compare(convolution(**geometry), explicit_convolution, xs)
    assert formulas == [fold]
    compare(convolution(**geometry), explicit_convolution, xs.detach(), shared=True)


def test_a_convolution_folds_from_eight_numbers_a_weight_on() -> None:
    layer = convolution()  # 4 to 6 channels, 3 x 3: 216 weights; a pixel reads 4 numbers and writes 6
    assert [layer.folds(torch.zeros(MEMBERS, 1, 4, 1, pixels)) for pixels in (172, 173)] == [False, True]


def test_convolution_with_one_channel_per_group() -> None:
    layer = BatchEnsembleConv2d(4, 8, 3, MEMBERS, groups=4, init="normal").double()
    compare(layer, explicit_convolution, torch.randn(MEMBERS, 7, 4, 9, 9, dtype=torch.float64))


@pytest.mark.parametrize("make", [linear, convolution])
@pytest.mark.parametrize("options", [{}, {"bias": False}], ids=str)
def test_members_are_plain_layers(make: Callable[..., Any], options: dict[str, Any]) -> None:
    layer = make(**options)
    rows = torch.randn(MEMBERS, 2, *((6,) if make is linear else (4, 7, 7)), dtype=torch.float64)
    outputs = layer(rows.flatten(0, 1)).unflatten(0, (MEMBERS, 2))
    for m in range(MEMBERS):
        assert type(layer.member(m)) is (nn.Linear if make is linear else nn.Conv2d)
        assert relative(layer.member(m)(rows[m]), outputs[m]) < 1e-12
    with torch.no_grad():
        assert all(parameter.requires_grad for parameter in layer.member(0).parameters())


@pytest.mark.parametrize("make", [linear, convolution])
def test_no_rows(make: Callable[..., Any]) -> None:
    layer = make()
    x = torch.zeros(0, *((6,) if make is linear else (4, 7, 7)), dtype=torch.float64)
    assert layer(x).shape == layer.forward_shared(x).shape == (0, *((5,) if make is linear else (6, 5, 5)))


def test_rows_must_be_divisible() -> None:
    for batch in (4, 100):
        with pytest.raises(ValueError, match=f"rows must be divisible by members, got {batch} rows and 3 members"):
            linear()(torch.zeros(batch, 6).double())
        with pytest.raises(ValueError, match=f"rows must be divisible by members, got {batch} rows and 3 members"):
            convolution()(torch.zeros(batch, 4, 9, 9).double())


def test_layers_refuse_what_they_cannot_do() -> None:
    with pytest.raises(ValueError, match="members must be >= 1, got 0"):
        BatchEnsembleLinear(3, 2, members=0)
    with pytest.raises(
        ValueError, match="init must be 'signs', 'normal', 'ones' or a standard deviation >= 0, got 'zeros'"
    ):
        BatchEnsembleLinear(3, 2, init="zeros")
    with pytest.raises(ValueError, match="padding_mode must be 'zeros', got 'reflect'"):
        BatchEnsembleConv2d(3, 2, 3, padding_mode="reflect")


def test_starts() -> None:
    torch.manual_seed(0)
    signs, normal = (BatchEnsembleLinear(100, 200, 50, init=init) for init in ("signs", "normal"))
    for factors in (signs.r, signs.s):
        assert set(factors.unique().tolist()) == {-1.0, 1.0}
        assert abs(float(factors.detach().mean())) < 0.05
    for factors in (normal.r, normal.s):
        assert abs(float(factors.detach().mean()) - 1) < 0.03
        assert abs(float(factors.detach().std()) - 0.5) < 0.03
    assert bool((BatchEnsembleLinear(3, 2, init="ones").r == 1).all())


def test_signs_keep_the_size_of_what_a_layer_gives() -> None:
    """W_m has the plain layer's initialization: signs change no magnitude."""
    layer = BatchEnsembleLinear(6, 5, MEMBERS)
    for m in range(MEMBERS):
        assert torch.equal(layer.member(m).get_parameter("weight").abs(), layer.weight.abs())


def test_stacked_layers_keep_one_pass_per_member() -> None:
    """The seed of many faulty implementations: two layers that each add an axis give (M, M, batch, out)."""
    rows = nn.Sequential(linear(), BatchEnsembleLinear(5, 2, MEMBERS).double())(torch.zeros(3 * 7, 6).double())
    assert rows.shape == (3 * 7, 2)


class TestEnsemble:
    @pytest.mark.parametrize("make_net", [mlp, residual, cnn, normed])
    def test_is_explicit_members(self, make_net: Callable[[], nn.Module]) -> None:
        data = vectors if make_net in (mlp, residual) else images
        ensemble = BatchEnsemble(make_net, MEMBERS, init="normal").eval()
        for n in (2, 200):
            x, _ = data(n)
            assert relative(ensemble(x), torch.stack([ensemble.member(m)(x) for m in range(MEMBERS)])) < 1e-12
        xs = data(MEMBERS * 4)[0].unflatten(0, (MEMBERS, 4))
        expected = torch.stack([ensemble.member(m)(part) for m, part in enumerate(xs)])
        assert relative(ensemble.forward_members(xs), expected) < 1e-12

    @pytest.mark.parametrize("init", ["signs", "normal"])
    def test_members_start_apart(self, init: str) -> None:
        assert len(BatchEnsemble(mlp, 4, init=init)(vectors()[0]).flatten(1).unique(dim=0)) == 4

    def test_reduces_to_the_mean_over_members(self) -> None:
        """The gradient of the shared weight is the mean of the members', not M times as large."""
        ensemble, (x, y) = BatchEnsemble(mlp, MEMBERS), vectors()
        shared = next(p for name, p in ensemble.named_parameters() if name.endswith("weight"))
        outputs = ensemble(x)
        ensemble.reduce(effens.Categorical().nll(outputs, y)).backward(retain_graph=True)
        each = [
            torch.autograd.grad(F.cross_entropy(outputs[m], y), shared, retain_graph=True)[0] for m in range(MEMBERS)
        ]
        assert shared.grad is not None
        assert relative(shared.grad, torch.stack(each).mean(0)) < 1e-12

    def test_fast_weights_have_a_rate_of_their_own_and_no_decay(self) -> None:
        ensemble = BatchEnsemble(mlp, MEMBERS, fast_lr=0.25)
        names = {id(parameter): name for name, parameter in ensemble.named_parameters()}
        slow, fast = ensemble.parameter_groups(0.1, 0.3)
        assert (slow["lr"], slow["weight_decay"]) == (0.1, 0.3)
        assert (fast["lr"], fast["weight_decay"]) == (0.025, 0.0)
        assert {names[id(p)].rsplit(".", 1)[1] for p in fast["params"]} == {"r", "s"}
        assert {names[id(p)].rsplit(".", 1)[1] for p in slow["params"]} == {"weight", "bias"}

    def test_decay_and_rate_reach_the_optimizer(self) -> None:
        """With a loss whose gradient is zero, only decay moves the weights: r and s stay."""
        ensemble, (x, y) = BatchEnsemble(mlp, MEMBERS), vectors()
        before = copy.deepcopy(ensemble.state_dict())

        class Nothing(effens.Categorical):
            def nll(self, outputs: Tensor, y: Tensor) -> Tensor:
                return 0 * super().nll(outputs, y)

        effens.fit(
            ensemble, (x, y), epochs=1, batch_size=len(x), lr=0.1, weight_decay=0.3, likelihood=Nothing(), device="cpu"
        )
        for name, tensor in ensemble.state_dict().items():
            factor = 1.0 if name.endswith((".r", ".s")) else 1 - 0.1 * 0.3
            assert relative(tensor, factor * before[name]) < 1e-12

    def test_frozen_layers_stay_as_they_are(self) -> None:
        def half_frozen() -> nn.Module:
            network = mlp()
            network.get_submodule("0").requires_grad_(False)
            return network

        ensemble = BatchEnsemble(half_frozen, MEMBERS)
        before = copy.deepcopy(ensemble.state_dict())
        assert type(ensemble.get_submodule("network.0")) is nn.Linear  # shared, and not named: nobody would train it
        effens.fit(ensemble, vectors(), epochs=2, device="cpu", weight_decay=0.1)
        changed = {name.split(".")[1] for name, t in ensemble.state_dict().items() if not torch.equal(t, before[name])}
        assert changed == {"2", "4"}


class TestBatches:
    def test_tiled(self) -> None:
        steps = list(BatchEnsemble(mlp, 4).batches(10, 4, generator()))
        assert [index.shape for index in steps] == [(4,), (4,), (2,)]  # all members see the same
        assert torch.cat(steps).sort().values.tolist() == list(range(10))

    def test_split(self) -> None:
        ensemble = BatchEnsemble(mlp, 4, split=True)
        steps = list(ensemble.batches(23, 8, generator()))
        assert [index.shape for index in steps] == [(4, 2), (4, 2), (4, 1)]
        assert len(torch.cat(steps, 1).unique()) == 20  # disjoint; 3 of 23 are left out
        every = [index for seed in range(9) for index in ensemble.batches(11, 11, generator(seed))]
        assert set(torch.cat(every).flatten().tolist()) == set(range(11))
        assert list(ensemble.batches(3, 8)) == []

    def test_a_split_step_costs_what_a_plain_one_does(self) -> None:
        seen: list[int] = []
        ensemble, (x, y) = BatchEnsemble(mlp, 4, split=True), vectors(35)
        ensemble(x)  # the first call compares the ensemble with its members
        ensemble.network.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
        history = effens.fit(ensemble, (x, y), epochs=1, batch_size=18, device="cpu")
        assert seen == [16, 16]  # 4 members, 4 examples each; 35 // 4 = 8 for each member in 2 steps
        assert history.losses.shape == (2, 4)

    def test_too_few_to_split(self) -> None:
        for n, size, rule in ((22, 3, "example or more for each member.*got 3 for 4"), (3, 9, "one example for each")):
            with pytest.raises(ValueError, match=rule):
                effens.fit(BatchEnsemble(mlp, 4, split=True), vectors(n), batch_size=size, device="cpu")

    def test_a_loader_whose_batches_are_too_small_to_split(self) -> None:
        data = torch.utils.data.TensorDataset(*vectors(11))
        ensemble = BatchEnsemble(mlp, 4, split=True)
        loader = torch.utils.data.DataLoader(data, batch_size=8)
        assert effens.fit(ensemble, loader, epochs=2, device="cpu").steps == 2  # the last 3 are left out
        with pytest.raises(ValueError, match="at least one example for each member"):
            effens.fit(ensemble, torch.utils.data.DataLoader(data, batch_size=2), device="cpu")


class TestMistakes:
    """What goes wrong in practice, each shown."""

    @pytest.mark.parametrize("split", [False, True])
    def test_ones_stay_identical_on_a_tiled_batch(self, split: bool) -> None:
        ensemble, (x, y) = BatchEnsemble(mlp, 4, init="ones", split=split), vectors()
        effens.fit(ensemble, (x, y), epochs=25, batch_size=8, lr=0.01, device="cpu")
        apart = float((ensemble(x) - ensemble(x)[:1]).detach().abs().max())
        assert apart > 1e-3 if split else apart < 1e-10

    def test_dropout_breaks_the_tie_of_ones(self) -> None:
        ensemble, (x, y) = BatchEnsemble(partial(mlp, dropout=0.2), 4, init="ones"), vectors()
        effens.fit(ensemble, (x, y), epochs=5, batch_size=8, lr=0.01, device="cpu")
        assert float((ensemble(x) - ensemble(x)[:1]).detach().abs().max()) > 1e-3

    def test_a_bias_before_s_is_another_model(self) -> None:
        layer = linear()
        x = torch.randn(1, 6).double()
        assert layer.bias is not None
        wrong = F.linear(x * layer.r[0], layer.weight, layer.bias[0]) * layer.s[0]
        assert relative(layer(x.repeat(MEMBERS, 1))[:1], wrong) > 0.01


class Twice(nn.Module):
    """One module in two places, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.head = nn.Sequential(nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        head: Tensor = self.head(self.again(self.first(x).tanh()).tanh())
        return head


class Language(nn.Module):
    """An embedding and a head with the same weight, and two layers that share another."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner, self.outer, self.head = (
            *(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 4)),
            nn.Linear(4, 7, bias=False),
        )
        self.head.weight = self.embedding.weight
        self.outer.weight, self.outer.bias = self.inner.weight, self.inner.bias

    def forward(self, x: Tensor) -> Tensor:
        head: Tensor = self.head(self.outer(self.inner(self.embedding(x)).tanh())).mean(1)
        return head


def spectral() -> nn.Module:
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 3)))


def hooked() -> nn.Module:
    network = nn.Sequential(nn.Linear(4, 3))
    network[0].register_forward_hook(lambda module, args, output: 2 * output)
    return network


class TestConversion:
    def test_at_any_depth(self) -> None:
        network = nn.Sequential(nn.Sequential(nn.ModuleDict({"a": nn.Linear(4, 4)})["a"], residual()), nn.Linear(3, 3))
        ensemble = BatchEnsemble(lambda: network, 2)
        kinds = [type(module) for module in ensemble.modules()]
        assert kinds.count(BatchEnsembleLinear) == 4
        assert nn.Linear not in kinds

    def test_the_whole_network_is_a_layer(self) -> None:
        assert type(BatchEnsemble(lambda: nn.Linear(4, 3), 2).network) is BatchEnsembleLinear
        assert BatchEnsemble(lambda: nn.Conv2d(1, 3, 3), 2)(torch.zeros(5, 1, 9, 9)).shape == (2, 5, 3, 7, 7)

    def test_weights_are_taken_over(self) -> None:
        network = mlp()
        plain = copy.deepcopy(network)
        ensemble = BatchEnsemble(lambda: network, 2, init="ones")
        x, _ = vectors()
        assert relative(ensemble(x), plain(x).expand(2, -1, -1)) < 1e-12
        assert ensemble(x).dtype == torch.float64

    @pytest.mark.parametrize("skip", ["head", ("head",), ["head.0"]])
    def test_skipped_modules_stay_shared(self, skip: Any) -> None:
        ensemble = BatchEnsemble(Twice, 2, skip=skip)
        assert type(ensemble.get_submodule("network.head.0")) is nn.Linear
        assert type(ensemble.get_submodule("network.first")) is BatchEnsembleLinear

    def test_a_module_in_two_places_stays_one(self) -> None:
        ensemble = BatchEnsemble(Twice, 2).double()
        first, again = (ensemble.get_submodule(f"network.{name}") for name in ("first", "again"))
        assert first is again
        x, _ = vectors()
        assert relative(ensemble(x), torch.stack([ensemble.member(m)(x) for m in range(2)])) < 1e-12
        member = ensemble.member(0)
        assert member.get_submodule("first") is member.get_submodule("again")

    def test_an_activation_in_two_places(self) -> None:
        activation = nn.Tanh()
        network = nn.Sequential(nn.Linear(4, 4), activation, nn.Linear(4, 4), activation).double()
        plain = copy.deepcopy(network)
        x, _ = vectors()
        assert relative(BatchEnsemble(lambda: network, 1, init="ones")(x)[0], plain(x)) < 1e-12

    def test_tied_weights_stay_tied(self) -> None:
        with pytest.warns(UserWarning, match=r"all members share \['embedding'\], 26% of all weights"):
            ensemble = BatchEnsemble(Language, 2)
        modules = {name: ensemble.get_submodule(f"network.{name}") for name in ("embedding", "inner", "outer", "head")}
        assert modules["head"].weight is modules["embedding"].weight
        assert modules["outer"].weight is modules["inner"].weight
        assert modules["outer"].bias is modules["inner"].bias
        assert modules["outer"].r is not modules["inner"].r
        x = torch.randint(0, 7, (5, 6))
        ensemble(x).sum().backward()
        ensemble.double()
        assert modules["head"].weight is modules["embedding"].weight
        assert relative(ensemble(x), torch.stack([ensemble.member(m)(x) for m in range(2)])) < 1e-12

    @pytest.mark.parametrize(
        ("make_net", "message"),
        [
            (lambda: nn.Sequential(nn.MultiheadAttention(4, 2)), "'0', MultiheadAttention without batch_first=True"),
            (lambda: nn.TransformerEncoderLayer(4, 2), "'self_attn', MultiheadAttention without batch_first=True"),
            (
                lambda: nn.Sequential(nn.MultiheadAttention(4, 2, kdim=3, batch_first=True)),
                "'0', MultiheadAttention with",
            ),
            (lambda: nn.Sequential(nn.LSTM(4, 3)), "'0', LSTM, a recurrent module"),
            (lambda: nn.ModuleDict({"cell": nn.GRUCell(4, 3)}), "'cell', GRUCell, a recurrent module"),
            (
                lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))),
                "'0', a parametrized Linear, whose weight is computed anew",
            ),
            (spectral, "'0', Linear with hooks"),
            (hooked, "'0', Linear with hooks"),
            (
                lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular")),
                "'0', Conv2d with padding_mode 'circular', where only 'zeros' is supported",
            ),
        ],
    )
    def test_refused_by_name_unless_skipped(self, make_net: Callable[[], nn.Module], message: str) -> None:
        with pytest.raises(ValueError, match=f"BatchEnsemble cannot take {message}"):
            BatchEnsemble(make_net, 2)
        name = message.split("'")[1]
        if name != "the network":
            with pytest.raises(ValueError, match=r"leave it shared with skip=\('" + name):
                BatchEnsemble(make_net, 2)
            ensemble = BatchEnsemble(lambda: nn.ModuleDict({"odd": make_net(), "head": nn.Linear(4, 3)}), 2, skip="odd")
            assert type(ensemble.get_submodule("network.head")) is BatchEnsembleLinear

    def test_subclasses_are_left_alone(self) -> None:
        class Special(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x).square()

        with pytest.warns(UserWarning, match=r"all members share \['1'\], 27% of all weights, .* name them in"):
            ensemble = BatchEnsemble(lambda: nn.Sequential(nn.Linear(4, 4), Special(4, 3)), 2)
        BatchEnsemble(lambda: nn.Sequential(nn.Linear(4, 4), Special(4, 3)), 2, skip="1")  # says nothing
        assert type(ensemble.get_submodule("network.1")) is Special

    def test_nothing_to_convert(self) -> None:
        with pytest.raises(
            ValueError, match=r"must have a trained nn.Linear, nn.Conv1d or nn.Conv2d to convert, got Sequential"
        ):
            BatchEnsemble(lambda: nn.Sequential(nn.ReLU()), 2)
        with pytest.raises(ValueError, match="to convert"):
            BatchEnsemble(lambda: nn.Sequential(nn.Linear(4, 3)), 2, skip="0")

    def test_unknown_skip(self) -> None:
        with pytest.raises(
            ValueError, match=r"skip must name modules, or the network's own parameters, got \['tail'\], have \['first'"
        ):
            BatchEnsemble(Twice, 2, skip=("tail", "head"))

    def test_no_members(self) -> None:
        with pytest.raises(ValueError, match="members must be >= 1, got 0"):
            BatchEnsemble(mlp, 0)

    def test_a_network_for_make_net(self) -> None:
        with pytest.raises(TypeError, match="function that returns a fresh network, got a Sequential"):
            BatchEnsemble(mlp(), 2)

    def test_batch_norm_sees_the_rows_of_all_members(self) -> None:
        ensemble, (x, _) = BatchEnsemble(normed, 2), images()
        norm = ensemble.get_submodule("network.1")
        rows = ensemble.get_submodule("network.0")(torch.cat([x, x]))
        ensemble.train()(x)
        assert relative(norm.get_buffer("running_mean"), 0.1 * rows.mean((0, 2, 3))) < 1e-12


class Wide(nn.Module):
    """A wide residual block: two normalizations, two convolutions, and a third where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)])
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else nn.Identity()


def wide_resnet() -> nn.Module:
    """The layers of WRN-28-10 for CIFAR-10, on a device that stores nothing."""
    with torch.device("meta"):
        widths = [16, 160, 320, 640]
        blocks = [
            Wide(before if i == 0 else after, after, 1 if i or after == 160 else 2)
            for before, after in pairwise(widths)
            for i in range(4)
        ]
        stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        return nn.Sequential(stem, *blocks, nn.BatchNorm2d(640), nn.Linear(640, 10))


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_parameters_of_the_published_network() -> None:
    """Wen et al. (2020): WRN-28-10 with 4 members has 36,557,548 parameters, where one has 36,479,194."""
    with torch.device("meta"):
        ensemble = BatchEnsemble(wide_resnet, 4)
    assert (count(wide_resnet()), count(ensemble)) == (36_479_194, 36_557_548)


@pytest.mark.parametrize("make_net", [mlp, cnn, residual])
def test_members_cost_their_factors_and_biases(make_net: Callable[[], nn.Module]) -> None:
    plain = [module for module in make_net().modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    factors = sum(layer.weight.shape[0] + layer.weight.shape[1] for layer in plain)
    biases = sum(layer.bias.numel() for layer in plain if layer.bias is not None)
    for members in (1, 4, 9):
        extra = count(BatchEnsemble(make_net, members)) - count(make_net())
        assert extra == members * factors + (members - 1) * biases


@pytest.mark.parametrize("batch", [1, 128], ids=["scale", "fold"])
def test_images_have_the_gradients_of_each_member_alone(batch: int) -> None:
    torch.manual_seed(0)
    ensemble = effens.BatchEnsemble(cnn, members=3, init="normal").double()
    networks = [ensemble.member(m) for m in range(3)]
    xs = torch.randn(3, batch, 1, 8, 8, dtype=torch.float64)
    outputs = ensemble.forward_members(xs)
    torch.testing.assert_close(outputs, torch.stack([network(x) for network, x in zip(networks, xs, strict=True)]))
    torch.testing.assert_close(ensemble(xs[0]), torch.stack([network(xs[0]) for network in networks]))

    weight, r = ensemble.get_parameter("network.3.weight"), ensemble.get_parameter("network.3.r")
    s = ensemble.get_parameter("network.3.s")
    found = torch.autograd.grad(outputs.square().sum(), [weight, r, s])
    alone = [network.get_parameter("3.weight") for network in networks]  # (out, in, 3, 3) each
    losses = sum(network(x).square().sum() for network, x in zip(networks, xs, strict=True))
    gradients = torch.stack(torch.autograd.grad(losses, alone))  # of each member's own weight
    factors = s[:, :, None] * r[:, None]  # (members, out, in)
    by_chain_rule = [
        torch.einsum("moikl,moi->oikl", gradients, factors),
        torch.einsum("moikl,oikl,mo->mi", gradients, weight, s),
        torch.einsum("moikl,oikl,mi->mo", gradients, weight, r),
    ]
    torch.testing.assert_close(found, tuple(by_chain_rule))


class Bound(nn.Module):
    """Keeps its layer's bound method, which stays the plain layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.call = self.inner.forward

    def forward(self, x: Tensor) -> Any:
        return self.head(self.call(x).tanh())


class ReadsWeights(Bound):
    def forward(self, x: Tensor) -> Any:
        return self.head(F.linear(x, self.inner.weight).tanh())


class TimeFirst(Bound):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.inner(x).cumsum(0))


@pytest.mark.parametrize(
    ("make_net", "match"),
    [
        (Bound, r"layers that are never called through their forward: \['inner'\]"),
        (ReadsWeights, r"layers that are never called through their forward: \['inner'\]"),
        (TimeFirst, "outputs that differ by"),
    ],
)
@pytest.mark.parametrize("init", ["signs", "ones"])
def test_networks_that_would_answer_something_else_are_refused_before_training(
    make_net: Callable[[], nn.Module], match: str, init: str
) -> None:
    ensemble, (x, y) = BatchEnsemble(make_net, 3, init=init), vectors()
    state = copy.deepcopy(ensemble.state_dict())
    for _ in range(2):
        with pytest.raises(ValueError, match=f"BatchEnsemble must answer as its members do alone: .*{match}"):
            effens.fit(ensemble, (x.float(), y), epochs=1, device="cpu")
    assert all(torch.equal(tensor, state[name]) for name, tensor in ensemble.state_dict().items())


def test_what_draws_at_random_is_not_compared() -> None:
    class Noisy(Bound):
        def forward(self, x: Tensor) -> Any:
            return self.head(self.inner(x + torch.randn_like(x)))

    assert BatchEnsemble(Noisy, 3)(torch.randn(5, 4)).shape == (3, 5, 3)


@pytest.mark.parametrize("method", [BatchEnsemble, effens.MIMO])
def test_a_network_that_another_ensemble_has_taken_is_refused(method: Any) -> None:
    network = mlp()
    method(lambda: network, 2)
    with pytest.raises(ValueError, match="must return a fresh network, got one that is another ensemble's already"):
        method(lambda: network, 3)


class TestTrainedWeights:
    """Starts that keep what a network has learned."""

    def test_a_small_spread_keeps_the_accuracy_and_lets_members_part(self) -> None:
        x = torch.randn(600, 4, generator=generator(), dtype=torch.float64)
        y = (x[:, :3] + x[:, 1:].roll(1, 1)).argmax(1)
        torch.manual_seed(0)
        known = effens_book.nets.mlp(4, 3, width=64).double()
        options: dict[str, Any] = {"epochs": 20, "lr": 1e-2, "device": "cpu"}
        effens.fit(effens.DeepEnsemble.of([known]), (x, y), **options)
        accuracy = float((known(x).argmax(1) == y).double().mean())
        assert accuracy > 0.95
        ensemble = BatchEnsemble(lambda: copy.deepcopy(known), 4, init=0.05)
        probs = effens.predict(ensemble, x)
        assert float(effens.accuracy(probs, y)) > accuracy - 0.01
        assert min(float(effens.accuracy(member[None], y)) for member in probs) > accuracy - 0.03
        assert float(probs.std(0).max()) > 1e-3
        effens.fit(ensemble, (x, y), **options)
        assert float(effens.accuracy(effens.predict(ensemble, x), y)) > accuracy - 0.01
        signs = BatchEnsemble(lambda: copy.deepcopy(known), 4)
        assert float(effens.accuracy(effens.predict(signs, x), y)) < accuracy - 0.1

    def test_numbers_are_the_spread_around_one(self) -> None:
        torch.manual_seed(0)
        layer = BatchEnsembleLinear(300, 300, 40, init=0.2)
        for factors in (layer.r, layer.s):
            assert float(factors.detach().mean()) == pytest.approx(1, abs=0.01)
            assert float(factors.detach().std()) == pytest.approx(0.2, rel=0.03)


def test_norms_of_each_member_s_own() -> None:
    def network() -> nn.Module:
        layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(144, 5)]
        return nn.Sequential(*layers, nn.LayerNorm(5), nn.Linear(5, 3)).double()

    torch.manual_seed(0)
    ensemble, (x, y) = BatchEnsemble(network, MEMBERS, norms="own"), images()
    effens.fit(ensemble, (x, y), epochs=3, device="cpu")
    members = [ensemble.member(m) for m in range(MEMBERS)]
    for name in ("1.weight", "1.running_mean", "2.bias", "5.weight"):
        values = [member.state_dict()[name] for member in members]
        assert not torch.equal(values[0], values[1])
    for m, member in enumerate(members):
        assert relative(ensemble(x)[m], member(x)) < 1e-12
    with pytest.raises(ValueError, match="norms must be 'shared' or 'own', got 'none'"):
        BatchEnsemble(network, MEMBERS, norms="none")


def test_a_refusal_names_all_layers_at_once() -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.GRU(4, 4), nn.Linear(4, 4), nn.LSTM(4, 3))

    with pytest.raises(ValueError, match=r"'0', GRU.*; '2', LSTM.*: leave it shared with skip=\('0', '2'\)"):
        BatchEnsemble(network, 2)


def test_what_stays_shared_is_in_its_description() -> None:
    ensemble = BatchEnsemble(lambda: nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3, bias=False)), 2, skip="0")
    assert "left shared=" in repr(ensemble)
    assert "left shared" not in repr(BatchEnsemble(mlp, 2))


@pytest.mark.parametrize("groups", [1, 2])
def test_many_images_are_given_to_one_member_after_the_other_and_nothing_changes(groups: int) -> None:
    def make_net() -> nn.Sequential:
        inner = nn.Sequential(nn.Conv2d(2, 4, 3, groups=groups), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
        return nn.Sequential(inner, nn.Flatten(), nn.Linear(144, 3))

    ensemble = effens.BatchEnsemble(make_net, 3, norms="own")
    alone = [ensemble.member(m) for m in range(3)]
    x = torch.randn(32, 2, 14, 14)
    assert runs_apart(x, ensemble.network)
    assert not runs_apart(x[:8], ensemble.network)
    with pytest.warns(match="share batch norm"):
        shared = effens.BatchEnsemble(make_net, 3)
    assert not runs_apart(x, shared.network)  # or its statistics would move three times a step
    for _ in range(2):  # two steps, each of which moves the statistics
        found = ensemble.train()(x)
        expected = torch.stack([network.train()(x) for network in alone])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.square().mean().backward()
    (expected.square().mean()).backward()
    (first, *_) = (layer for layer in ensemble.modules() if isinstance(layer, effens.BatchEnsembleConv2d))
    grads = torch.stack([g for n in alone if (g := n.get_parameter("0.0.weight").grad) is not None])
    factors = first.weights().detach() / first.weight.detach()
    torch.testing.assert_close(first.weight.grad, (grads * factors).sum(0), rtol=1e-3, atol=1e-5)
    for m, network in enumerate(alone):
        for name, buffer in network.named_buffers():
            torch.testing.assert_close(ensemble.member(m).get_buffer(name), buffer, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        ensemble.eval()(x), torch.stack([network.eval()(x) for network in alone]), rtol=1e-4, atol=1e-4
    )
