"""What every ensemble shares."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from scenarios import cnn, generator, mlp, relative, vectors
from torch import Tensor, nn

import effens
from effens.ensembles.layers import MemberLayer, RowEnsemble, chain, has_hooks, run_shared, split_rows
from effens_book.baselines import LastLayerLaplace, MCDropout


class Shift(MemberLayer):
    """Member m adds m: the simplest layer with members."""

    def __init__(self, members: int) -> None:
        super().__init__()
        self.members = members
        self.calls: list[str] = []

    def forward(self, rows: Tensor) -> Tensor:
        self.calls.append("rows")
        shifts = torch.arange(self.members).repeat_interleave(len(rows) // self.members)
        return rows + shifts.view(-1, *[1] * (rows.dim() - 1))

    def forward_shared(self, x: Tensor) -> Tensor:
        self.calls.append("shared")
        return torch.cat([x + m for m in range(self.members)])

    def member(self, m: int) -> nn.Module:
        plain = nn.Linear(1, 1)
        nn.init.ones_(plain.weight)
        nn.init.constant_(plain.bias, m)
        return plain


class Whole(nn.Module):
    """A network whose forward is its own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


def expected(x: Tensor, members: int) -> Tensor:
    return torch.stack([x + m for m in range(members)])


class TestRows:
    @pytest.mark.parametrize(
        ("wrap", "way"),
        [
            (lambda layer: layer, "shared"),
            (lambda layer: nn.Sequential(layer, nn.Identity()), "shared"),
            (lambda layer: nn.Sequential(nn.Identity(), nn.Flatten(), nn.Sequential(nn.Sequential(layer))), "shared"),
            (lambda layer: nn.Sequential(nn.Hardtanh(-99, 99), layer), "rows"),
            (lambda layer: Whole(layer), "rows"),
            (lambda layer: nn.Sequential(Whole(layer)), "rows"),
        ],
    )
    def test_the_first_layer_reads_x_once(self, wrap: Any, way: str) -> None:
        layer, x = Shift(3), torch.randn(5, 1)
        ensemble = RowEnsemble(wrap(layer), 3)
        assert torch.equal(ensemble(x), expected(x, 3))
        assert layer.calls == [way]
        assert torch.equal(ensemble.forward_members(torch.stack([x] * 3)), expected(x, 3))

    def test_a_layer_in_two_places(self) -> None:
        layer, x = Shift(2), torch.randn(5, 1)
        assert torch.equal(RowEnsemble(nn.Sequential(layer, nn.ReLU(), layer), 2)(x)[1], (x + 1).relu() + 1)

    def test_nothing_at_all(self) -> None:
        x = torch.randn(5, 2)
        assert torch.equal(RowEnsemble(nn.Sequential(), 3)(x), x.expand(3, 5, 2))
        assert torch.equal(RowEnsemble(nn.Sequential(nn.Flatten(), nn.Identity()), 3)(x), x.expand(3, 5, 2))

    def test_hooks_on_a_sequence_are_called(self) -> None:
        layer, x = Shift(2), torch.randn(5, 1)
        network = nn.Sequential(nn.Sequential(layer))
        network[0].register_forward_hook(lambda module, args, output: 2 * output)
        assert torch.equal(RowEnsemble(network, 2)(x), 2 * expected(x, 2))

    def test_subclasses_of_sequential_keep_their_forward(self) -> None:
        class Double(nn.Sequential):
            def forward(self, x: Tensor) -> Any:
                return 2 * super().forward(x)

        x = torch.randn(5, 1)
        assert torch.equal(RowEnsemble(Double(Shift(2)), 2)(x), 2 * expected(x, 2))

    def test_member_replaces_every_member_layer(self) -> None:
        layer = Shift(2)
        ensemble = RowEnsemble(nn.Sequential(nn.Sequential(layer), nn.ReLU(), layer), 2)
        member = ensemble.member(1)
        x = torch.randn(5, 1)
        assert not any(isinstance(module, MemberLayer) for module in member.modules())
        assert torch.equal(member(x), ensemble(x)[1])
        assert member.get_submodule("0.0") is member.get_submodule("2")

    @pytest.mark.parametrize("outputs", [lambda x: x.sum(), lambda x: x[:3], lambda x: (x, x), lambda x: x[:, 0]])
    def test_the_network_must_return_rows(self, outputs: Any) -> None:
        class Odd(nn.Module):
            def forward(self, x: Tensor) -> Any:
                return outputs(x)

        ensemble = RowEnsemble(Odd(), 2)
        for ask in (lambda: ensemble(torch.zeros(4, 3)), lambda: ensemble.forward_members(torch.zeros(2, 4, 3))):
            with pytest.raises(
                ValueError,
                match=r"one row of outputs per example, \(8, outputs\), got|a tensor of outputs, .* got tuple",
            ):
                ask()

    def test_one_example_s_vector_is_no_batch(self) -> None:
        with pytest.raises(ValueError, match=r"must return one row of outputs per example, \(6, outputs\), got \(6,\)"):
            RowEnsemble(nn.Identity(), 2)(torch.zeros(3))

    @pytest.mark.parametrize("shape", [(3, 5, 1), (2,), (1, 5, 1)])
    def test_streams(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"xs must be \(streams, batch, ...\) with 2 streams, got shape"):
            RowEnsemble(nn.Identity(), 2).forward_members(torch.zeros(shape))


def test_rows_are_member_major() -> None:
    rows = torch.arange(6)[:, None]
    assert split_rows(rows, 2)[..., 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match="rows must be divisible by members, got 6 rows and 4 members"):
        split_rows(rows, 4)


def test_chain_is_the_order_of_calls() -> None:
    a, b, c = nn.ReLU(), nn.Tanh(), Whole(nn.Sequential(nn.ReLU()))
    assert list(chain(nn.Sequential(a, nn.Sequential(b, nn.Sequential(), a), c))) == [a, b, a, c]
    assert list(chain(c)) == [c]


def test_hooks_are_seen() -> None:
    ways = ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
    for way in ways:
        module = nn.ReLU()
        assert not has_hooks(module)
        handle = getattr(module, f"register_{way}")(lambda *args: None)
        assert has_hooks(module)
        handle.remove()
        assert not has_hooks(module)


class TestEnsemble:
    def test_defaults(self) -> None:
        ensemble = effens.Ensemble(3)
        assert (ensemble.members, ensemble.streams) == (3, 3)
        assert [index.shape for index in effens.Ensemble(3, streams=1).batches(10, 8)] == [(1, 8), (1, 2)]

    def test_what_a_method_must_bring(self) -> None:
        ensemble, layer, likelihood, x = effens.Ensemble(3), MemberLayer(), effens.Likelihood(), torch.zeros(2, 1)
        layer.members = 2
        asks: dict[str, Callable[[], object]] = {
            "an ensemble must override forward, got none in Ensemble": lambda: ensemble(x),
            "an ensemble must override forward_members, got none in Ensemble": lambda: ensemble.forward_members(x),
            "an ensemble must override member, got none in Ensemble": lambda: ensemble.member(0),
            "a member layer must override forward_each, got none in MemberLayer": lambda: layer(x),
            "a member layer must override member, got none in MemberLayer": lambda: layer.member(0),
            "a likelihood must override nll, got none in Likelihood": lambda: likelihood.nll(x, x),
            "a likelihood must override predict, got none in Likelihood": lambda: likelihood.predict(x),
        }
        for message, ask in asks.items():
            with pytest.raises(NotImplementedError, match=f"^{message}$"):
                ask()

    @pytest.mark.parametrize("members", [0, -2])
    def test_members(self, members: int) -> None:
        with pytest.raises(ValueError, match=f"members must be >= 1, got {members}"):
            effens.Ensemble(members)

    def test_batches_are_those_of_a_shuffle_for_each_stream(self) -> None:
        order = torch.cat(list(effens.Ensemble(4).batches(30, 8, generator())), 1)
        assert torch.equal(order.sort(1).values, torch.arange(30).expand(4, 30))
        assert len(order.unique(dim=0)) == 4

    def test_schedule_is_half_a_cosine(self) -> None:
        ensemble = effens.Ensemble(1)
        assert [ensemble.schedule(step, 4) for step in range(4)] == pytest.approx(
            [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
        )
        assert ensemble.schedule(0, 1) == 1

    def test_the_sum_over_streams_gives_each_its_own_gradient(self) -> None:
        losses = torch.rand(3, 5, dtype=torch.float64, requires_grad=True)
        effens.Ensemble(3).reduce(losses).backward()
        assert losses.grad is not None
        assert torch.equal(losses.grad, torch.full_like(losses, 1 / 5))


def test_a_method_is_a_few_hooks() -> None:
    """What the book shows: a method of one's own, here one whose streams all see the same order."""

    class Aligned(effens.DeepEnsemble):
        def batches(self, n: int, batch_size: int, generator: torch.Generator | None = None) -> Any:
            return [index[:1].expand(self.members, -1) for index in super().batches(n, batch_size, generator)]

    network, (x, y) = mlp(), vectors()
    ensemble = Aligned.of([network, effens.DeepEnsemble.of([network]).member(0)])
    assert isinstance(ensemble, Aligned)
    effens.fit(ensemble, (x, y), epochs=2, batch_size=8, device="cpu")
    assert relative(ensemble(x)[1], ensemble(x)[0]) < 1e-12


class Centers(nn.Module):
    """A network that changes its input in a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5
        head: Tensor = self.last(self.first(x).tanh())
        return head


def rectified() -> nn.Module:
    layers = nn.ReLU(inplace=True), nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)
    return nn.Sequential(nn.Flatten(), *layers)


CHANGING: dict[str, Any] = {
    "deep": effens.DeepEnsemble,
    "batch": effens.BatchEnsemble,
    "mimo": effens.MIMO,
    "snapshot": effens.SnapshotEnsemble,
    "swag": partial(effens.SWAG, rank=0),
    "MC dropout": MCDropout,
    "Laplace": LastLayerLaplace,
}


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("make_net", [rectified, Centers])
@pytest.mark.parametrize("name", CHANGING)
def test_a_network_that_changes_its_input_leaves_the_reader_s_alone(name: str, make_net: Any, members: int) -> None:
    if make_net is Centers and name in ("MC dropout", "Laplace"):
        pytest.skip("takes no such network")
    ensemble = CHANGING[name](make_net, members)
    x, y = vectors()
    x = x.float()
    before = x.clone()
    if name in ("deep", "batch", "mimo"):  # whose first call may be this one
        CHANGING[name](make_net, members)(x)
        assert torch.equal(x, before)
    effens.fit(ensemble, (x, y), epochs=2, batch_size=11, device="cpu", progress=False)
    assert torch.equal(x, before)
    for rows in (1, 22):
        answers = ensemble(x[:rows])
        assert torch.equal(x, before)
        if name != "MC dropout":
            assert torch.equal(ensemble(x[:rows]), answers)
            torch.testing.assert_close(effens.predict(ensemble, x)[:, :rows], answers.softmax(-1))


@pytest.mark.parametrize("of", [effens.DeepEnsemble, effens.BatchEnsemble])
@pytest.mark.parametrize("shape", [(5, 4), (200, 1, 8, 8)])
def test_hooks_on_the_first_layer_are_called(of: Any, shape: tuple[int, ...]) -> None:
    net: Any = mlp if len(shape) == 2 else cnn
    ensemble, x, seen = of(net, 2), torch.randn(shape, generator=generator()).double(), []
    expected = ensemble(x)
    handle = ensemble.network[0].register_forward_hook(lambda _, args, outputs: seen.append(len(outputs)))
    assert relative(ensemble(x), expected) < 1e-12
    assert relative(ensemble.forward_members(torch.stack([x, x])), expected) < 1e-12
    assert seen == [2 * len(x)] * 2
    handle.remove()
    assert torch.equal(ensemble(x), expected)


@pytest.mark.parametrize("x", [torch.zeros(4, 3), torch.zeros(0, 3)])
def test_run_shared_repeats_x_where_it_must(x: Tensor) -> None:
    assert torch.equal(run_shared(nn.ReLU(), x, 3), torch.cat([x] * 3))


@pytest.mark.parametrize("of", [effens.SnapshotEnsemble, effens.SWAG])
def test_a_network_that_returns_no_tensor_is_named(of: Any) -> None:
    class Two(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x

    data = torch.randn(20, 3), torch.zeros(20).long()
    with pytest.raises(ValueError, match="the network must return a tensor of outputs, .* got tuple"):
        effens.fit(of(lambda: Two(3, 2), 2), data, epochs=2, progress=False)
