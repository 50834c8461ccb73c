"""Snapshot ensembles: the rate's shape, what is copied and when, and the same path as the obvious loop."""

import copy
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from scenarios import cnn, images, indices, mlp, normed, relative, remembered, residual, vectors
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import effens
import effens_book.nets
from effens.ensembles.deep import StackedLinear
from effens.ensembles.snapshot import triangular

LENGTHS = [(200, 5), (200, 6), (40, 40), (41, 40), (97, 7), (10, 1), (1, 1)]
MOMENTUM: Any = lambda groups, lr, weight_decay: torch.optim.SGD(  # noqa: E731
    groups, lr=lr, momentum=0.9, weight_decay=weight_decay
)


def starts(steps: int, cycles: int) -> list[int]:
    return [math.floor(c * steps / cycles) for c in range(cycles + 1)]


def loop(
    network: nn.Module, x: Tensor, y: Tensor, batches: list[Tensor], lrs: list[float], make_optimizer: Any
) -> list[nn.Module]:
    """Train one network with these rates, as everyone does; return copies of it after each step."""
    descent, copies = make_optimizer(network.parameters(), lr=lrs[0], weight_decay=0.1), []
    for index, lr in zip(batches, lrs, strict=True):
        for group in descent.param_groups:
            group["lr"] = lr
        loss = F.cross_entropy(network(x[index]), y[index])
        descent.zero_grad()
        loss.backward()
        descent.step()
        copies.append(copy.deepcopy(network).eval())
    return copies


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two networks have the same weights and statistics, to rounding."""
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(
        mine == its and torch.allclose(value, other, rtol=1e-10, atol=1e-12) for (mine, value), (its, other) in pairs
    )


@pytest.mark.parametrize(("steps", "cycles"), LENGTHS)
def test_each_cycle_is_half_a_cosine(steps: int, cycles: int) -> None:
    bounds = starts(steps, cycles)
    expected = [
        0.5 * (1 + math.cos(math.pi * i / (end - first))) for first, end in pairwise(bounds) for i in range(end - first)
    ]
    assert [effens.cyclic_cosine(step, steps, cycles) for step in range(steps)] == pytest.approx(expected, abs=1e-15)


def test_the_rate_is_the_paper_s_where_cycles_divide_the_steps() -> None:
    steps, cycles = 200, 5
    length = math.ceil(steps / cycles)
    for t in range(1, steps + 1):
        paper = 0.5 * (math.cos(math.pi * ((t - 1) % length) / length) + 1)
        assert effens.cyclic_cosine(t - 1, steps, cycles) == pytest.approx(paper, abs=1e-15)
    assert effens.cyclic_cosine(0, steps, cycles) == 1
    assert effens.cyclic_cosine(60, steps, cycles) == pytest.approx(0.5)


@pytest.mark.parametrize("cycles", [1, 3, 5, 6, 7, 9])
def test_every_cycle_ends_low(cycles: int) -> None:
    """Of 200 steps in 6 cycles of ceil(200 / 6), the last would end at 0.038."""
    bounds = starts(200, cycles)
    assert all(effens.cyclic_cosine(first, 200, cycles) == 1 for first in bounds[:-1])
    assert all(effens.cyclic_cosine(end - 1, 200, cycles) < 0.006 for end in bounds[1:])


def test_one_cycle_is_the_plain_schedule() -> None:
    plain = effens.DeepEnsemble(mlp, 1)
    assert all(effens.cyclic_cosine(step, 37, 1) == plain.schedule(step, 37) for step in range(37))


def test_cyclic_cosine_refuses() -> None:
    for step in (-1, 10):
        with pytest.raises(ValueError, match=rf"step must be in 0 \.\.\. 9, got {step}"):
            effens.cyclic_cosine(step, 10, 2)
    with pytest.raises(ValueError, match="cycles must be >= 1, got 0"):
        effens.cyclic_cosine(0, 10, 0)
    with pytest.raises(ValueError, match="steps must be >= 3 for 3 cycles, got 2"):
        effens.cyclic_cosine(0, 2, 3)
    with pytest.raises(ValueError, match="steps must be >= 1 for 1 cycles, got 0"):
        effens.cyclic_cosine(0, 0, 1)


def test_triangular_is_the_paper_s() -> None:
    """alpha(i) of Garipov et al. (2018), with cycles of an even number c of steps, up to the last minimum."""
    high, low, c, cycles = 0.5, 0.1, 8, 4
    steps = c * cycles - c // 2

    def paper(i: int) -> float:
        t = ((i - 1) % c + 1) / c
        return (1 - 2 * t) * high + 2 * t * low if t <= 0.5 else (2 - 2 * t) * low + (2 * t - 1) * high

    lrs = [triangular(step, steps, cycles, 0.0, (high, low)) for step in range(steps)]
    assert lrs == pytest.approx([paper(i) for i in range(1, steps + 1)])
    collected = [i - 1 for i in range(1, steps + 1) if i % c == c // 2]
    ensemble = effens.SnapshotEnsemble(mlp, cycles, schedule="triangular", pretrain=0.0)
    assert ensemble.collected_after(steps) == collected


@pytest.mark.parametrize("steps", [100, 101, 333, 45])
def test_triangular_cycles_follow_pretraining_and_are_collected_at_their_minima(steps: int) -> None:
    ensemble = effens.SnapshotEnsemble(mlp, 5, schedule="triangular", lrs=(0.4, 0.01))
    lrs = [ensemble.schedule(step, steps) for step in range(steps)]
    first = int(0.8 * steps)
    assert lrs[:first] == [effens.cyclic_cosine(step, first, 1) for step in range(first)]
    assert min(lrs[first:]) == 0.01
    assert max(lrs[first:]) == 0.4
    minima = [step for step in range(first, steps) if lrs[step] == 0.01]
    assert ensemble.collected_after(steps) == minima
    assert minima[-1] == steps - 1
    gaps = [b - a for a, b in pairwise(minima)]
    assert max(gaps) - min(gaps) <= 1


def test_triangular_needs_steps_for_its_cycles_before_it_starts() -> None:
    ensemble, (x, y) = effens.SnapshotEnsemble(mlp, 5, schedule="triangular"), vectors()
    weights = copy.deepcopy(ensemble.network)
    with pytest.raises(ValueError, match="steps must be >= 41 for 5 cycles, got 40: train for longer"):
        effens.fit(ensemble, (x, y), epochs=40, batch_size=22, device="cpu")  # 32 steps before, 8 for 9 ways
    assert same(ensemble.network, weights)
    effens.fit(ensemble, (x, y), epochs=45, batch_size=22, device="cpu")


@pytest.mark.parametrize("make_optimizer", [torch.optim.AdamW, MOMENTUM], ids=["AdamW", "momentum"])
@pytest.mark.parametrize(("net", "data"), [(mlp, vectors), (normed, images), (residual, vectors), (cnn, images)])
@pytest.mark.parametrize("schedule", ["cosine", "triangular"])
def test_snapshots_are_the_plain_loop_s_networks(net: Any, data: Any, schedule: str, make_optimizer: Any) -> None:
    """15 steps, which 4 cycles do not divide; the last 3 are kept, and moments live on from cycle to cycle."""
    make_net, (network,) = remembered(net, 1)
    ensemble = effens.SnapshotEnsemble(make_net, 4, last=3, schedule=schedule, pretrain=0.3)
    x, y = data()
    options: dict[str, Any] = {"weight_decay": 0.1, "optimizer": make_optimizer, "device": "cpu", "seed": 3}
    history = effens.fit(ensemble, (x, y), epochs=5, batch_size=8, lr=1e-2, **options)
    if schedule == "cosine":
        lrs, ends = [1e-2 * effens.cyclic_cosine(step, 15, 4) for step in range(15)], [6, 10, 14]
    else:  # 4 steps of pretraining, 11 for 7 ways of 1, 2, 1, 2, 1, 2 and 2
        lrs, ends = [1e-2 * triangular(step, 15, 4, 0.3, (0.5, 0.1)) for step in range(15)], [7, 10, 14]
    assert torch.equal(history.lrs, torch.tensor(lrs))
    batches = [index[0] for index in indices(ensemble, len(x), 8, 5, seed=3)]
    copies = loop(network, x, y, batches, lrs, make_optimizer)
    assert [same(ensemble.member(m), copies[end]) for m, end in enumerate(ends)] == [True] * 3
    assert not same(ensemble.member(0), copies[5])
    assert same(ensemble.network, copies[-1])
    assert relative(ensemble(x), torch.stack([copies[end](x) for end in ends])) < 1e-9


def test_the_last_snapshots_alone_can_be_kept() -> None:
    x, y = vectors()
    torch.manual_seed(0)
    start = mlp()
    every = effens.SnapshotEnsemble(lambda: copy.deepcopy(start), 5)
    last = effens.SnapshotEnsemble(lambda: copy.deepcopy(start), 5, last=2)
    for ensemble in (every, last):
        effens.fit(ensemble, (x, y), epochs=5, batch_size=8, device="cpu")
    assert torch.equal(every(x)[3:], last(x))
    assert len(every(x).unique(dim=0)) == 5


def test_statistics_of_batch_norm_travel() -> None:
    x, y = images()
    ensemble = effens.SnapshotEnsemble(normed, 3)
    effens.fit(ensemble, (x, y), epochs=6, batch_size=11, device="cpu")
    networks = [ensemble.member(m) for m in range(3)]
    assert [int(network.get_buffer("1.num_batches_tracked")) for network in networks] == [4, 8, 12]
    assert len(torch.stack([network.get_buffer("1.running_mean") for network in networks]).unique(dim=0)) == 3


def test_buffers_that_no_file_keeps_travel() -> None:
    class Counting(nn.Module):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3).double()
            self.register_buffer("calls", torch.tensor(0), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += self.training
            outputs: Tensor = self.linear(x)
            return outputs

    ensemble = effens.SnapshotEnsemble(Counting, 3)
    effens.fit(ensemble, vectors(), epochs=6, batch_size=11, device="cpu")
    assert [int(ensemble.member(m).get_buffer("calls")) for m in range(3)] == [4, 8, 12]


def test_one_network_is_made_and_trained() -> None:
    make_net, _ = remembered(mlp, 1)  # a second call would raise StopIteration
    ensemble = effens.SnapshotEnsemble(make_net, 4)
    weights = [p for group in ensemble.parameter_groups(1.0, 0.0) for p in group["params"]]
    assert [id(p) for p in weights] == [id(p) for p in ensemble.network.parameters()]
    assert not any(p.requires_grad for p in ensemble.snapshots.parameters())
    assert [index.shape for index in ensemble.batches(22, 22)] == [(1, 22)]
    x, _ = vectors()
    assert torch.equal(ensemble.forward_members(x[None])[0], ensemble.network(x))


def test_snapshots_are_answered_together() -> None:
    ensemble = effens.SnapshotEnsemble(mlp, 3)
    first = next(ensemble.snapshots.network.children())
    assert isinstance(first, StackedLinear)
    assert first.weight.shape == (3, 8, 4)


def test_snapshots_do_not_change_in_training_mode() -> None:
    x, y = images()
    ensemble = effens.SnapshotEnsemble(normed, 3)
    effens.fit(ensemble, (x, y), epochs=3, device="cpu")
    expected, state = ensemble(x), copy.deepcopy(ensemble.snapshots.state_dict())
    assert ensemble.train() is ensemble
    assert ensemble.network.training
    assert torch.equal(ensemble(x), expected)
    assert not ensemble.member(0).training
    assert all(torch.equal(tensor, state[name]) for name, tensor in ensemble.snapshots.state_dict().items())


def test_frozen_weights_stay_frozen_in_members() -> None:
    def make_net() -> nn.Module:
        network = mlp()
        next(network.parameters()).requires_grad_(False)
        return network

    ensemble = effens.SnapshotEnsemble(make_net, 2)
    effens.fit(ensemble, vectors(), epochs=2, device="cpu")
    assert [p.requires_grad for p in ensemble.member(1).parameters()] == [False] + [True] * 5


def test_there_are_no_members_before_training(tmp_path: Path) -> None:
    ensemble, fresh, (x, _) = effens.SnapshotEnsemble(mlp, 3), effens.SnapshotEnsemble(mlp, 3), vectors()
    effens.save(ensemble, tmp_path / "untrained.safetensors")
    effens.load(fresh, tmp_path / "untrained.safetensors")
    for untrained in (ensemble, fresh, copy.deepcopy(ensemble)):
        for ask in (lambda e: e(x), lambda e: e.member(0), lambda e: effens.predict(e, x)):
            with pytest.raises(RuntimeError, match="^no members yet: call effens.fit"):
                ask(untrained)


def test_a_training_that_broke_off_has_the_members_it_has_made() -> None:
    ensemble, (x, y) = effens.SnapshotEnsemble(mlp, 3), vectors()
    effens.fit(ensemble, (x, y), epochs=6, device="cpu")

    class Breaks(TensorDataset):
        asked = 0

        def __getitem__(self, i: Any) -> Any:
            self.asked += 1
            if self.asked > 4 * 22:
                raise KeyboardInterrupt
            return x[i], y[i]

    with pytest.raises(KeyboardInterrupt):
        effens.fit(ensemble, Breaks(x, y), epochs=6, batch_size=22, device="cpu")
    again = effens.SnapshotEnsemble(mlp, 3)
    again.load_state_dict(ensemble.state_dict())
    for each in (ensemble, again):
        assert len(each(x)) == each.members == 2  # of the cycles that end after 2, 4 and 6 steps
        assert torch.equal(each(x)[1], each.member(1)(x))
        with pytest.raises(IndexError, match="member must be in 0 ... 1, got 2"):
            each.member(2)
    effens.fit(again, (x, y), epochs=6, device="cpu")
    assert len(again(x)) == 3


def test_a_training_that_is_stopped_before_the_first_snapshot_keeps_the_network() -> None:
    ensemble, (x, y) = effens.SnapshotEnsemble(mlp, 3), vectors()
    effens.fit(ensemble, (x, y), epochs=9, device="cpu", callback=lambda epoch, *_: epoch == 1)
    assert ensemble.members == 1
    assert torch.equal(ensemble(x)[0], ensemble.network(x))


def test_fitting_again_collects_anew_from_where_it_was() -> None:
    ensemble, (x, y) = effens.SnapshotEnsemble(mlp, 3), vectors()
    effens.fit(ensemble, (x, y), epochs=6, device="cpu")
    continued = effens.SnapshotEnsemble(lambda: copy.deepcopy(ensemble.network), 3)
    for each in (ensemble, continued):
        effens.fit(each, (x, y), epochs=6, device="cpu", seed=5)
    assert torch.equal(ensemble(x), continued(x))


@pytest.mark.parametrize(("net", "data"), [(mlp, vectors), (normed, images)])
def test_members_are_saved_and_loaded(net: Any, data: Any, tmp_path: Path) -> None:
    ensemble, (x, y) = effens.SnapshotEnsemble(net, 4, last=3), data()
    effens.fit(ensemble, (x, y), epochs=4, device="cpu")
    effens.save(ensemble, tmp_path / "snapshots.safetensors")
    for fresh in (effens.SnapshotEnsemble(net, 3), effens.SnapshotEnsemble(net, 3, schedule="triangular")):
        effens.load(fresh, tmp_path / "snapshots.safetensors")
        assert torch.equal(fresh.eval()(x), ensemble(x))
        assert same(fresh.network, ensemble.network)


def test_side_by_side(tmp_path: Path) -> None:
    x, y = vectors()
    parts = [effens.SnapshotEnsemble(mlp, 3) for _ in range(2)]
    both = effens.DeepEnsemble.of(parts)
    with pytest.raises(RuntimeError, match="no members yet"):
        both(x)
    for part in parts:
        effens.fit(part, (x, y), epochs=3, device="cpu")
    effens.save(both, tmp_path / "both.safetensors")
    fresh = effens.DeepEnsemble.of([effens.SnapshotEnsemble(mlp, 3) for _ in range(2)])
    effens.load(fresh, tmp_path / "both.safetensors")
    assert torch.equal(fresh(x), torch.cat([part(x) for part in parts]))


def test_a_loader_sets_the_cycles() -> None:
    x, y = vectors()
    ensemble = effens.SnapshotEnsemble(mlp, 3)
    history = effens.fit(ensemble, DataLoader(TensorDataset(x, y), batch_size=5), epochs=2, device="cpu")
    assert history.lrs.tolist() == pytest.approx([1e-3 * effens.cyclic_cosine(step, 10, 3) for step in range(10)])
    assert ensemble(x).shape == (3, 22, 3)


def test_regression() -> None:
    x, _ = vectors()
    ensemble = effens.SnapshotEnsemble(lambda: effens_book.nets.mlp(4, 2, width=8).double(), 3)
    likelihood = effens.Gaussian()
    effens.fit(ensemble, (x, x[:, 0]), epochs=3, likelihood=likelihood, device="cpu")
    assert effens.predict(ensemble, x, likelihood=likelihood).batch_shape == (3, 22)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": 0}, "members must be >= 1, got 0"),
        ({"members": 2, "last": 3}, "last must be in 1 ... members, got 3 of 2 members"),
        ({"members": 2, "last": 0}, "last must be in 1 ... members, got 0 of 2 members"),
        ({"schedule": "step"}, "schedule must be 'cosine' or 'triangular', got 'step'"),
        ({"pretrain": 1.0}, r"pretrain must be in \[0, 1\), got 1.0"),
        ({"pretrain": -0.1}, r"pretrain must be in \[0, 1\), got -0.1"),
        ({"pretrain": math.nan}, r"pretrain must be in \[0, 1\), got nan"),
        ({"lrs": (0.1, 0.5)}, r"lrs must be high and low with 1 >= high >= low >= 0, got \(0.1, 0.5\)"),
        ({"lrs": (2.0, 0.5)}, "lrs must be high and low"),
        ({"lrs": (0.5, -0.5)}, "lrs must be high and low"),
        ({"lrs": (0.5,)}, "lrs must be high and low"),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        effens.SnapshotEnsemble(mlp, **options)


@pytest.mark.parametrize("options", [{"lrs": (1.0, 0.5)}, {"lrs": (0.3, 0.3)}, {"lrs": (0.5, 0.0)}, {"pretrain": 0.0}])
def test_limits_are_allowed(options: dict[str, Any]) -> None:
    ensemble = effens.SnapshotEnsemble(mlp, 2, schedule="triangular", **options)
    assert {key: getattr(ensemble, key) for key in options} == options


def test_a_network_is_no_make_net() -> None:
    with pytest.raises(TypeError, match="make_net must be a function"):
        effens.SnapshotEnsemble(mlp())


def test_there_must_be_a_step_for_each_cycle() -> None:
    x, y = vectors()
    with pytest.raises(ValueError, match="steps must be >= 3 for 3 cycles, got 2: train for longer"):
        effens.fit(effens.SnapshotEnsemble(mlp, 3), (x, y), epochs=2, batch_size=22, device="cpu")


def test_a_lazy_network_is_refused() -> None:
    with pytest.raises(ValueError, match="the network's weights must exist"):
        effens.SnapshotEnsemble(lambda: nn.Sequential(nn.LazyLinear(3)), 3)


def test_members_of_an_earlier_training_are_forgotten_when_the_next_one_begins() -> None:
    x, y = vectors()
    ensemble = effens.SnapshotEnsemble(mlp, 2)
    effens.fit(ensemble, (x, y), epochs=2, batch_size=22, device="cpu")
    with pytest.raises(FloatingPointError, match="losses must be finite"):
        effens.fit(ensemble, (x * math.nan, y), epochs=4, batch_size=22, device="cpu")  # the first cycle has two steps
    with pytest.raises(RuntimeError, match="^no members yet: call effens.fit"):
        ensemble(x)


def test_it_says_its_settings() -> None:
    assert effens.SnapshotEnsemble(mlp, 4, last=3).extra_repr() == "members=4, last=3, schedule='cosine'"
    triangular = effens.SnapshotEnsemble(mlp, 3, schedule="triangular", pretrain=0.5, lrs=(0.4, 0.1))
    assert triangular.extra_repr() == "members=3, last=3, schedule='triangular', pretrain=0.5, lrs=(0.4, 0.1)"
