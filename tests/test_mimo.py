"""MIMO: the widened network against M explicit slots and heads, finding the two layers, and what must be refused."""

import copy
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from scenarios import cnn, generator, images, mlp, normed, relative, residual, tokens, vectors
from torch import Tensor, nn
from torch.nn import functional as F

import effens
import effens_book.nets
from effens import MIMO

MEMBERS = 3


class Block(nn.Module):
    """A residual block as wide residual networks have it: normalization and ReLU before each convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Any:
        rectified = self.norm1(x).relu()
        x = x if isinstance(self.skip, nn.Identity) else rectified
        return self.skip(x) + self.conv2(self.norm2(self.conv1(rectified)).relu())


class WideResNet(nn.Module):
    """A wide residual network for images of 32 x 32 pixels (Zagoruyko and Komodakis, 2016)."""

    def __init__(self, depth: int, width: int, classes: int = 10) -> None:
        super().__init__()
        sizes = [16, 16 * width, 32 * width, 64 * width]
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        blocks = [Block(sizes[i], sizes[i + 1], 1 if i == 0 else 2) for i in range(3)]
        more = (depth - 4) // 6 - 1
        groups = [
            nn.Sequential(b, *(Block(sizes[i + 1], sizes[i + 1], 1) for _ in range(more))) for i, b in enumerate(blocks)
        ]
        self.groups = nn.Sequential(*groups)
        self.norm = nn.BatchNorm2d(sizes[3])
        self.head = nn.Linear(sizes[3], classes)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.norm(self.groups(self.stem(x))).relu().mean((2, 3)))


class Own(nn.Module):
    """A network with a forward of its own: layers are registered in the order of `names`, called in that of `calls`."""

    def __init__(self, names: str = "stem middle head", calls: str = "stem middle head") -> None:
        super().__init__()
        for name in names.split():
            self.add_module(name, nn.Linear(4, 3 if name == "head" else 4))
        self.calls = calls.split()

    def forward(self, x: Tensor) -> Any:
        for name in self.calls:
            x = getattr(self, name)(x)
        return x


def own(*args: str) -> nn.Module:
    return Own(*args).double()


def sequential(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).double()


def token_net() -> nn.Module:
    """A network that reads sequences of vectors, with attention between its first and last layers."""
    attention = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    pool = nn.Sequential(nn.AdaptiveAvgPool2d((1, 8)), nn.Flatten())
    return sequential(nn.Linear(4, 8), attention, pool, nn.Linear(8, 3))


def sequences(n: int = 22) -> tuple[Tensor, Tensor]:
    x, y = tokens(n)
    return x.mT.contiguous(), y  # (batch, channels, length)


def conv1d() -> nn.Module:
    return sequential(nn.Conv1d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3))


def volumes(n: int = 22) -> tuple[Tensor, Tensor]:
    x, y = images(n)
    return x[:, :, None].expand(-1, 2, 2, -1, -1), y


def conv3d() -> nn.Module:
    return sequential(nn.Conv3d(2, 4, 2, stride=2, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))


def circular() -> nn.Module:
    first = nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular")
    return sequential(nn.Identity(), first, nn.ReLU(), nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def flat() -> nn.Module:
    return sequential(nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3), nn.LogSoftmax(1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]]]] = {
    "linear": (mlp, vectors),
    "convolutions": (cnn, images),
    "batch norm": (normed, images),
    "1-d convolution": (conv1d, sequences),
    "3-d convolution": (conv3d, volumes),
    "circular padding, convolution last": (circular, images),
    "layers in front and behind": (flat, images),
    "attention between": (token_net, tokens),
    "own forward": (own, vectors),
}


@pytest.fixture(params=NETWORKS.values(), ids=list(NETWORKS))
def case(request: pytest.FixtureRequest) -> Any:
    return request.param


def build(make_net: Callable[[], nn.Module], **options: Any) -> MIMO:
    torch.manual_seed(0)
    return MIMO(make_net, MEMBERS, **options)


def rows_of(x: Tensor) -> Tensor:
    """A different batch for each member, of shape (members, batch, ...)."""
    return torch.stack([x.roll(m, 0) for m in range(MEMBERS)])


def explicit(ensemble: MIMO, xs: Tensor) -> Tensor:
    """The obvious loop for mlp(): slot m's block of the first weight reads input m; head m's rows answer."""
    weight, bias = ensemble.state_dict()["network.0.layer.weight"], ensemble.state_dict()["network.0.layer.bias"]
    hidden = bias + sum(xs[m] @ weight[:, 4 * m : 4 * m + 4].T for m in range(MEMBERS))
    for layer in list(ensemble.network.children())[1:-1]:
        hidden = layer(hidden)
    weight, bias = ensemble.state_dict()["network.4.layer.weight"], ensemble.state_dict()["network.4.layer.bias"]
    return torch.stack([hidden @ weight[3 * m : 3 * m + 3].T + bias[3 * m : 3 * m + 3] for m in range(MEMBERS)])


def test_each_slot_and_head_has_its_own_block_of_weights() -> None:
    ensemble, (x, _) = build(mlp), vectors()
    assert relative(ensemble.forward_members(rows_of(x)), explicit(ensemble, rows_of(x))) < 1e-12


def test_convolutions_read_inputs_side_by_side() -> None:
    ensemble, (x, _) = build(cnn), images()
    plain = nn.Conv2d(MEMBERS, 4, 3, padding=1).double()
    plain.load_state_dict({name: ensemble.state_dict()[f"network.0.layer.{name}"] for name in ("weight", "bias")})
    hidden = nn.Sequential(plain, *list(ensemble.network.children())[1:-1])(rows_of(x)[:, :, 0].transpose(0, 1))
    last = nn.Linear(hidden.shape[1], 3 * MEMBERS).double()
    last.load_state_dict({name: ensemble.state_dict()[f"network.7.layer.{name}"] for name in ("weight", "bias")})
    expected = last(hidden).unflatten(1, (MEMBERS, 3)).transpose(0, 1)
    assert relative(ensemble.forward_members(rows_of(x)), expected) < 1e-12


def test_asking_puts_the_same_input_into_every_slot(case: Any) -> None:
    make_net, data = case
    ensemble, (x, _) = build(make_net).eval(), data()
    assert relative(ensemble(x), ensemble.forward_members(torch.stack([x] * MEMBERS))) < 1e-12
    assert ensemble(x).shape == (MEMBERS, len(x), 3)
    assert relative(ensemble(x[:9]), ensemble(x)[:, :9]) < 1e-12  # also if there are rows for every slot
    assert ensemble(x[:1]).shape == ensemble.forward_members(rows_of(x[:1])).shape == (MEMBERS, 1, 3)


def test_members_are_plain_networks(case: Any) -> None:
    make_net, data = case
    ensemble, (x, _) = build(make_net).eval(), data()
    for m in range(MEMBERS):
        assert relative(ensemble.member(m)(x), ensemble(x)[m]) < 1e-12
        assert str(ensemble.member(m)) == str(make_net())


def test_slots_of_one_example_do_not_see_other_examples(case: Any) -> None:
    make_net, data = case
    ensemble, (x, _) = build(make_net).eval(), data()
    xs = rows_of(x)
    changed = xs.clone()
    changed[1, 5] += torch.randn(x.shape[1:], generator=generator(1), dtype=x.dtype)
    moved = (ensemble.forward_members(changed) - ensemble.forward_members(xs)).abs().amax(2) > 1e-9
    assert moved[:, 5].all()  # every head reads every slot, before training has told them apart
    assert moved.sum() == MEMBERS


def test_a_head_reads_its_own_weights_only() -> None:
    ensemble, (x, _) = build(mlp), vectors()
    weight = dict(ensemble.named_parameters())["network.4.layer.weight"]
    for m, answer in enumerate(ensemble.forward_members(rows_of(x))):
        (grad,) = torch.autograd.grad(answer.square().sum(), weight, retain_graph=True)
        rows = grad.unflatten(0, (MEMBERS, 3)).abs().sum((1, 2)) > 0
        assert rows.tolist() == [m == i for i in range(MEMBERS)]


def test_a_slot_without_weights_moves_no_head() -> None:
    ensemble, (x, _) = build(mlp), vectors()
    xs = rows_of(x)
    changed = xs.clone()
    changed[1] += 1
    with torch.no_grad():
        dict(ensemble.named_parameters())["network.0.layer.weight"][:, 4:8] = 0
    assert torch.equal(ensemble.forward_members(changed), ensemble.forward_members(xs))
    changed[2] += 1
    assert not torch.equal(ensemble.forward_members(changed), ensemble.forward_members(xs))


def test_trained_heads_listen_to_their_own_slot() -> None:
    x, y = vectors(400)
    torch.manual_seed(0)
    ensemble = MIMO(lambda: effens_book.nets.mlp(4, 3, width=64), MEMBERS)
    effens.fit(ensemble, (x.float(), y), epochs=60, batch_size=64, lr=1e-2, device="cpu")
    xs = rows_of(x.float())
    with torch.no_grad():
        before = ensemble.forward_members(xs).softmax(-1)
        for j in range(MEMBERS):
            changed = xs.clone()
            changed[j] = x.float().roll(100, 0)
            moved = (ensemble.forward_members(changed).softmax(-1) - before).abs().mean((1, 2))
            assert moved[j] > 3 * moved[[i for i in range(MEMBERS) if i != j]].max()


def test_the_loss_is_the_sum_of_the_heads_and_the_mean_of_the_batch() -> None:
    ensemble, (x, y) = build(mlp, repeats=2), vectors()
    (index,) = ensemble.batches(len(x), len(x), generator())
    ensemble.reduce(effens.Categorical().nll(ensemble.forward_members(x[index]), y[index])).backward()
    mine = [p.grad for p in ensemble.parameters()]
    ensemble.zero_grad()
    outputs = ensemble.forward_members(x[index])
    total = torch.stack([F.cross_entropy(outputs[m], y[index[m]]) for m in range(MEMBERS)]).sum()
    total.backward()
    for p, grad in zip(ensemble.parameters(), mine, strict=True):
        assert p.grad is not None
        assert grad is not None
        assert relative(grad, p.grad) < 1e-12


@pytest.mark.parametrize(
    ("make_net", "first", "last"),
    [(mlp, nn.Linear(12, 8), nn.Linear(8, 9)), (cnn, nn.Conv2d(3, 4, 3, padding=1), nn.Linear(32, 9))],
)
def test_widened_layers_start_as_their_own_wider_layer_would(make_net: Any, first: Any, last: Any) -> None:
    torch.manual_seed(4)
    plain = make_net()
    first.double().reset_parameters()
    last.double().reset_parameters()
    expected = nn.Sequential(first, *list(plain)[1:-1], last)
    torch.manual_seed(4)
    ensemble = MIMO(make_net, MEMBERS)
    assert [type(layer).__name__ for layer in ensemble.network.children()][:: len(plain) - 1] == [
        "FirstLayer",
        "LastLayer",
    ]
    for mine, its in zip(ensemble.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, its)
    assert [m for m in str(ensemble.network).split() if "=" in m] == [m for m in str(expected).split() if "=" in m]


def test_a_wide_residual_network_gains_13684_parameters() -> None:
    with torch.device("meta"):
        plain, ensemble = WideResNet(28, 10), MIMO(lambda: WideResNet(28, 10), 3)
    count = [sum(p.numel() for p in network.parameters()) for network in (plain, ensemble)]
    assert count[1] - count[0] == 2 * 3 * 16 * 9 + 2 * (640 + 1) * 10 == 13_684
    assert 36.4e6 < count[0] < 36.6e6
    x = torch.randn(2, 3, 32, 32, device="meta")
    assert ensemble(x).shape == (3, 2, 10)
    assert ensemble.forward_members(torch.stack([x] * 3)).shape == (3, 2, 10)


def test_a_residual_network_with_a_forward_of_its_own() -> None:
    ensemble, x = build(lambda: WideResNet(10, 1)).eval(), torch.randn(4, 3, 32, 32, generator=generator())
    assert relative(ensemble(x), ensemble.forward_members(torch.stack([x] * MEMBERS))) < 1e-5
    assert relative(ensemble.member(2)(x), ensemble(x)[2]) < 1e-5


def test_what_is_frozen_stays_frozen() -> None:
    def make_net() -> nn.Module:
        network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 3))
        network[2].requires_grad_(False)
        return network.eval()

    ensemble = build(make_net)
    assert [name for name, p in ensemble.named_parameters() if not p.requires_grad] == ["network.2.weight"]
    member = ensemble.member(0)
    assert [p.requires_grad for p in member.parameters()] == [True, True, False, True, True]
    assert not any(module.training for module in member.modules())


def test_one_member_is_the_network_as_it_was_made() -> None:
    network = sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
    state, (x, _) = copy.deepcopy(network.state_dict()), vectors()
    ensemble = MIMO(lambda: network, 1)
    assert ensemble.network is network
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert torch.equal(ensemble.eval()(x)[0], network(x))
    assert torch.equal(ensemble.forward_members(x[None])[0], network(x))


# Who sees which example


def test_a_batch_is_repeated() -> None:
    ensemble = build(mlp, repeats=4)
    (index,) = ensemble.batches(10, 10, generator())
    assert index.shape == (MEMBERS, 40)
    for row in index:
        assert row.bincount().tolist() == [4] * 10
    assert not torch.equal(index[0], index[1])


@pytest.mark.parametrize(("share", "shared"), [(0.0, 0), (0.25, 5), (0.6, 12), (0.9, 18), (1.0, 20)])
def test_slots_share_a_fraction(share: float, shared: int) -> None:
    ensemble, source = build(mlp, share=share, repeats=2), generator()
    same = torch.zeros(20)
    for _ in range(400):
        (index,) = ensemble.batches(10, 10, source)
        assert all(row.bincount().tolist() == [2] * 10 for row in index)
        same += (index == index[0]).all(0)
    assert same[20 - shared :].tolist() == [400] * shared  # the rest is shared, always
    assert (same[: 20 - shared] < 200).all()  # the front only by chance


def test_slots_are_as_independent_as_two_shuffles() -> None:
    ensemble, source = build(mlp, share=0.0), generator()
    same = sum(int((index[0] == index[1]).sum()) for _ in range(400) for index in ensemble.batches(50, 50, source))
    assert abs(same - 400) < 100  # two shuffles meet in one place on average: 400 +- 20


def test_sharing_all_gives_every_slot_the_same_inputs() -> None:
    ensemble, (x, _) = build(mlp, share=1.0), vectors()
    xs = x[next(iter(ensemble.batches(len(x), len(x), generator())))]
    assert all(torch.equal(xs[m], xs[0]) for m in range(MEMBERS))


@pytest.mark.parametrize("repeats", [1, 3])
def test_every_step_permutes_one_batch(repeats: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(22.0)[:, None].expand(22, 4).double()
    ensemble = build(mlp, repeats=repeats)
    seen: list[Tensor] = []
    check = ensemble.check_streams

    def spy(xs: Tensor) -> Any:
        seen.append(xs[..., 0].long())
        return check(xs)

    monkeypatch.setattr(ensemble, "check_streams", spy)
    history = effens.fit(ensemble, (x, vectors()[1]), epochs=1, batch_size=8, lr=0.0, device="cpu")
    assert history.losses.shape == (3, MEMBERS)
    assert [xs.shape for xs in seen] == [(MEMBERS, repeats * n) for n in (8, 8, 6)]
    for xs in seen:
        assert all(torch.equal(row.sort().values, xs[0].sort().values) for row in xs)
        assert xs[0].unique(return_counts=True)[1].tolist() == [repeats] * (xs.shape[1] // repeats)
    assert sorted(torch.cat([xs[0] for xs in seen]).unique().tolist()) == list(range(22))


# Finding the layers


def test_named_layers() -> None:
    names = "head middle stem"
    ensemble, (x, _) = build(partial(own, names), first="stem", last="head"), vectors()
    shapes = {name: tuple(p.shape) for name, p in ensemble.named_parameters() if name.endswith("weight")}
    assert shapes == {
        "network.head.layer.weight": (9, 4),
        "network.middle.weight": (4, 4),
        "network.stem.layer.weight": (4, 12),
    }
    assert relative(ensemble(x), ensemble.forward_members(torch.stack([x] * MEMBERS))) < 1e-12


def test_named_layers_may_have_layers_around_them() -> None:
    ensemble, (x, _) = build(own, first="middle"), vectors()
    assert dict(ensemble.named_parameters())["network.middle.layer.weight"].shape == (4, 12)
    assert relative(ensemble(x), ensemble.forward_members(torch.stack([x] * MEMBERS))) < 1e-12
    assert build(mlp, first="2")(x).shape == (MEMBERS, 22, 3)


def asks() -> list[Any]:
    return [lambda e, x: e(x), lambda e, x: e.forward_members(rows_of(x))]


@pytest.mark.parametrize("ask", asks(), ids=["same input", "own inputs"])
@pytest.mark.parametrize("batch", [1, 2, 9, 22])
@pytest.mark.parametrize(
    "make_net",
    [
        residual,
        partial(own, "head middle stem"),
        partial(own, "stem middle head", "stem stem middle head"),
        partial(own, "spare stem head", "stem head"),
    ],
    ids=["residual", "last before first", "first twice", "never called"],
)
def test_a_network_that_goes_another_way_is_refused_at_its_first_call(make_net: Any, batch: int, ask: Any) -> None:
    ensemble, (x, _) = build(make_net), vectors(batch)
    for _ in range(2):  # and at every other
        with pytest.raises(ValueError, match="MIMO must answer as its members do alone: .*first= and last= name these"):
            ask(ensemble, x)


def test_layers_in_front_of_the_first_treat_each_input() -> None:
    ensemble, (x, _) = build(partial(own, "middle stem head")), vectors()
    assert relative(ensemble(x), torch.stack([ensemble.member(m)(x) for m in range(MEMBERS)])) < 1e-12


def test_the_first_call_changes_nothing_but_its_answer() -> None:
    def make_net() -> nn.Module:
        return sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), Own())

    ensemble, (x, _) = build(make_net), vectors()
    ensemble.network.get_submodule("1").eval()
    modes, state = [m.training for m in ensemble.modules()], copy.deepcopy(ensemble.state_dict())
    torch.manual_seed(1)
    first = ensemble(x)
    torch.manual_seed(1)
    assert torch.equal(ensemble(x), first)
    assert [m.training for m in ensemble.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in ensemble.state_dict().items())
    assert not any(m._forward_hooks for m in ensemble.modules())


def test_a_wrong_input_is_not_the_network_s_fault() -> None:
    ensemble, (x, _) = build(own), vectors()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            ensemble.forward_members(rows_of(x)[..., :2])
    assert ensemble(x).shape == (MEMBERS, 22, 3)


def test_no_rows_tell_nothing() -> None:
    ensemble, (x, _) = build(residual), vectors()
    ensemble.forward_members(rows_of(x)[:, :0])
    ensemble(x[:0])
    with pytest.raises(ValueError, match="MIMO must answer as its members do alone"):
        ensemble.forward_members(rows_of(x))


def test_threads_may_ask_first_at_the_same_time() -> None:
    ensemble, (x, _) = build(own), vectors()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: ensemble(x).detach(), range(16)))
    assert all(torch.equal(each, ensemble(x)) for each in found)


def test_copies_ask_alone() -> None:
    ensemble, (x, _) = build(own), vectors()
    other = copy.deepcopy(ensemble)
    with torch.no_grad():
        next(other.parameters()).zero_()
    assert not torch.equal(other(x), ensemble(x))
    assert torch.equal(copy.deepcopy(ensemble)(x), ensemble(x))


def test_asking_costs_what_one_network_does() -> None:
    x, y = vectors()
    one, many = MIMO(mlp, 1), MIMO(mlp, MEMBERS)
    flops = [effens.measure(ensemble, x, y, seconds=0.0).flops for ensemble in (one, many)]
    assert flops[1] - flops[0] == 2 * 8 * 3 * (MEMBERS - 1)  # the heads; the first layer reads its input once


# What cannot be right


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"members": 0}, "members must be >= 1, got 0"),
        ({"share": -0.1}, "share must be in 0 ... 1, got -0.1"),
        ({"share": 1.5}, "share must be in 0 ... 1, got 1.5"),
        ({"share": math.nan}, "share must be in 0 ... 1, got nan"),
        ({"repeats": 0}, "repeats must be >= 1, got 0"),
        ({"first": "stem"}, r"first must name a module of the network, got 'stem', have \['0', '1'"),
        ({"last": "stem"}, r"last must name a module of the network, got 'stem', have \['0', '1'"),
        ({"first": "1"}, "MIMO cannot widen '1', SiLU, where nn.Linear or a convolution .* name another with first="),
        ({"last": ""}, "MIMO cannot widen 'the network', Sequential, .*: name another with last="),
        ({"first": "4"}, "first and last must be two layers, got '4' for both"),
    ],
)
def test_options_are_checked(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        MIMO(mlp, **options)


def test_make_net_must_be_a_function() -> None:
    with pytest.raises(TypeError, match="make_net must be a function that returns a fresh network, got a Sequential"):
        MIMO(mlp())


def hooked() -> nn.Module:
    network = mlp()
    network.get_submodule("0").register_forward_hook(lambda *_: None)
    return network


def tied() -> nn.Module:
    network = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
    network[2].weight = network[0].weight
    return network


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no layers": (lambda: nn.Sequential(nn.Tanh()), "must have linear or convolutional layers to widen, got Seq"),
    "one layer": (lambda: nn.Linear(4, 3), "first and last must be two layers, got '' for both"),
    "batch norm in front": (
        lambda: nn.Sequential(nn.BatchNorm1d(4), *mlp().children()),
        "MIMO cannot have '0', BatchNorm1d, before '1': it would mix the members",
    ),
    "batch norm behind": (
        lambda: nn.Sequential(*mlp().children(), nn.BatchNorm1d(3)),
        "MIMO cannot have '5', BatchNorm1d, after '4': it would mix the members",
    ),
    "attention first": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8), nn.Linear(4, 3)),
        "MIMO cannot widen '0.self_attn.out_proj', part of '0', TransformerEncoderLayer, which reads .* first=",
    ),
    "attention last": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2, 8)),
        "MIMO cannot widen '1.linear2', part of '1', TransformerEncoderLayer, which reads .* last=",
    ),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 3)), "the network's weights must exist"),
    "parametrized": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), nn.Linear(8, 3)),
        "MIMO cannot widen '0', a parametrized Linear",
    ),
    "hooks": (hooked, "MIMO cannot widen '0', Linear with hooks"),
    "groups": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(4, 3)),
        "MIMO cannot widen '0', Conv2d with groups=2, where only groups=1 can be widened",
    ),
    "transposed": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (4, 1, 1)), nn.ConvTranspose2d(4, 1, 3)),
        "MIMO cannot widen '2', ConvTranspose2d, where nn.Linear or a convolution",
    ),
    "tied": (tied, "MIMO cannot widen '0', Linear, whose weights another layer has, too"),
}


@pytest.mark.parametrize(("make_net", "match"), REFUSED.values(), ids=list(REFUSED))
def test_networks_are_refused_by_name(make_net: Callable[[], nn.Module], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        MIMO(make_net)


def test_inputs_are_checked() -> None:
    ensemble = build(mlp)
    with pytest.raises(ValueError, match=r"must return one row of outputs per example, \(12, outputs\), got \(9,\)"):
        ensemble(torch.randn(4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"xs must be \(streams, batch, ...\) with 3 streams, got shape \(2, 5, 4\)"):
        ensemble.forward_members(torch.randn(2, 5, 4, dtype=torch.float64))
    with pytest.raises(IndexError, match="member must be in 0 ... 2, got 3"):
        ensemble.member(3)


def test_layers_may_stand_deep_inside() -> None:
    inner = lambda: nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(4, 8)), nn.ReLU()), nn.Linear(8, 3))  # noqa: E731
    ensemble = effens.MIMO(inner, 2, first="0.0.0", last="1")
    assert ensemble(torch.randn(5, 4)).shape == (2, 5, 3)
    assert ensemble.get_parameter("network.0.0.0.layer.weight").shape == (8, 8)


def test_it_says_its_settings() -> None:
    assert effens.MIMO(mlp, members=3, share=0.25, repeats=2).extra_repr() == "members=3, share=0.25, repeats=2"
