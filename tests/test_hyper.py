"""Hyperparameter ensembles: the greedy path against the obvious loop, and the weighted mixture."""

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scenarios import generator, relative, vectors
from torch import Tensor, nn
from torch.distributions import Normal
from torch.distributions import StudentT as StudentTDistribution

import effens
import effens_book.nets

# ---- Greedy selection. ----


def library(seed: int, candidates: int, n: int, classes: int = 3) -> tuple[Tensor, Tensor]:
    """Random candidates, some a little better than chance; some of them twice in the library."""
    source = generator(seed)
    y = torch.randint(classes, (n,), generator=source)
    logits = 2 * torch.randn(candidates, n, classes, generator=source, dtype=torch.float64)
    logits += 2 * torch.rand(candidates, 1, 1, generator=source) * nn.functional.one_hot(y, classes)
    again = torch.randint(candidates, (candidates,), generator=source)
    return logits.softmax(-1)[torch.cat([torch.arange(candidates), again[: candidates // 3]])], y


def by_hand(probs: Tensor, y: Tensor, size: int) -> list[int]:
    """Try every candidate at every step, and score the mean from the start; of equals take the first."""
    chosen: list[int] = []
    lowest = math.inf
    while len(set(chosen)) < size:
        best, best_loss = -1, lowest
        for i in range(len(probs)):
            mean = [sum(float(probs[k, j, y[j]]) for k in [*chosen, i]) / (len(chosen) + 1) for j in range(len(y))]
            loss = -math.fsum(math.log(p) for p in mean) / len(y)
            if loss < best_loss - 1e-12:
                best, best_loss = i, loss
        if best < 0:
            break
        chosen.append(best)
        lowest = best_loss
    return chosen


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("seed", range(8))
def test_greedy_is_the_obvious_loop(seed: int, size: int) -> None:
    probs, y = library(seed, candidates=7, n=6 + 2 * seed)
    assert effens.greedy_select(probs, y, size) == by_hand(probs, y, size)


def test_greedy_repeats_are_weights() -> None:
    paths = [effens.greedy_select(*library(seed, 7, 12), 6) for seed in range(8)]
    assert any(len(path) > len(set(path)) for path in paths)  # so that the loop above has seen repeats, too


def test_greedy_lowers_the_nll_at_every_step() -> None:
    for seed in range(20):
        probs, y = library(seed, 12, 25)
        path = effens.greedy_select(probs, y, 8)
        losses = [float(effens.nll(probs[path[:k]], y)) for k in range(1, len(path) + 1)]
        assert losses[0] == min(float(effens.nll(probs[i : i + 1], y)) for i in range(len(probs)))
        assert all(after < before for before, after in itertools.pairwise(losses))
        assert len(set(path)) == 8 or all(
            float(effens.nll(probs[[*path, i]], y)) > losses[-1] - 1e-12 for i in range(len(probs))
        )


def test_greedy_stops_as_soon_as_all_are_in() -> None:
    for seed in range(20):
        probs, y = library(seed, 12, 25)
        for size in (1, 2, 3, 5):
            path = effens.greedy_select(probs, y, size)
            assert len(set(path)) <= size
            assert path[-1] not in path[:-1] or len(set(path)) < size
            assert path == effens.greedy_select(probs, y, 8)[: len(path)]


def test_greedy_of_size_one_is_the_best_and_not_the_worst() -> None:
    probs = torch.tensor([[[0.5, 0.5]], [[0.9, 0.1]], [[0.2, 0.8]]])
    assert effens.greedy_select(probs, torch.tensor([0]), 1) == [1]
    assert effens.greedy_select(probs, torch.tensor([1]), 1) == [2]


def test_greedy_stops_when_nothing_helps() -> None:
    probs = torch.tensor([[[0.6, 0.4], [0.4, 0.6]], [[0.9, 0.1], [0.1, 0.9]]])
    assert effens.greedy_select(probs, torch.tensor([0, 1]), 2) == [1]  # a weaker candidate is never added
    assert effens.greedy_select(probs[:1], torch.tensor([0, 1]), 5) == [0]


def test_greedy_finds_the_weights_in_closed_form() -> None:
    p = torch.full((2, 3, 2), 0.5)
    p[0] = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # two of three right, one worth nothing
    p[1] = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    path = effens.greedy_select(p, torch.tensor([0, 0, 0]), 3)  # -2/3 log w - 1/3 log (1 - w) is lowest at w = 2/3
    assert path == [0, 1, 0]


def test_greedy_takes_the_first_of_equals() -> None:
    probs, y = library(3, 6, 20)
    path = effens.greedy_select(probs, y, 4)
    assert effens.greedy_select(probs.repeat(3, 1, 1), y, 4) == path
    assert effens.greedy_select(torch.full((5, 4, 2), 0.5), torch.zeros(4).long(), 3) == [0]


def test_greedy_is_as_good_in_half_precision() -> None:
    probs, y = library(1, 9, 400)
    assert effens.greedy_select(probs.half(), y, 3) == effens.greedy_select(probs, y, 3)


def test_greedy_ends_where_each_step_helps_ever_less() -> None:
    p = torch.tensor([[0.5, 0.5], [0.94, 0.26], [0.26, 0.94], [0.3, 0.3]])  # of the label, at two examples
    path = effens.greedy_select(torch.stack([p, 1 - p], 2), torch.tensor([0, 0]), 4)
    assert path == [0, *[1, 2] * 500][:1000]  # the first is best alone; the next two, without it, better still


@pytest.mark.parametrize("name", ["Normal", "StudentT"])
def test_greedy_of_densities_is_the_obvious_loop(name: str) -> None:
    y = torch.randn(15, generator=generator(1), dtype=torch.float64)
    location = y + torch.randn(6, 15, generator=generator(2), dtype=torch.float64)
    scale = 0.3 + torch.rand(6, 15, generator=generator(3), dtype=torch.float64)
    made: Any = Normal(location, scale) if name == "Normal" else StudentTDistribution(4.0, location, scale)
    path = effens.greedy_select(made, y, 4)
    chosen: list[int] = []
    for _ in path:
        chosen.append(min(range(6), key=lambda i: mixed_nll(made, y, [*chosen, i])))
    assert path == chosen
    assert len(path) > len(set(path)) > 1
    assert min(mixed_nll(made, y, [*path, i]) for i in range(6)) >= mixed_nll(made, y, path)


def mixed_nll(distribution: Any, y: Tensor, index: list[int]) -> float:
    return float(-distribution.log_prob(y).exp()[index].mean(0).log().mean())


def test_greedy_sees_the_density_at_many_degrees_of_freedom() -> None:
    """In float32 its normalizer loses digits, by which the better candidate would look worse."""
    df = torch.tensor([[1e6], [8.0]]).expand(2, 4)
    said = StudentTDistribution(df, torch.zeros(2, 4), torch.ones(2, 4), validate_args=False)
    assert effens.greedy_select(said, torch.tensor([0.5, -0.5, 0.2, 0.1]), 1) == [0]


@pytest.mark.parametrize("size", [0, -1])
def test_greedy_needs_a_size(size: int) -> None:
    with pytest.raises(ValueError, match=f"size must be >= 1, got {size}"):
        effens.greedy_select(*library(0, 3, 5), size)


def test_greedy_refuses_what_is_no_prediction() -> None:
    probs, y = library(0, 3, 5)
    y1 = torch.zeros(5, 1)
    wrong: list[tuple[Any, Tensor, str]] = [
        (probs[0], y, "probs must be"),
        (probs[:0], y, "probs must be"),
        (probs, y[:-1], "y must be"),
        (probs, y + 3, "labels must be in"),
        (probs.log(), y, "probs must be >= 0"),
        (probs * math.nan, y, "probs must be >= 0, got nan"),
        (Normal(torch.zeros(3, 5), 1.0), y1, "predictions must be"),
        (Normal(torch.zeros(5), 1.0), y1[:, 0], "predictions must be"),
        (Normal(torch.zeros(3, 5), 1.0), y1[:, 0] * math.inf, "must be"),
    ]
    for prediction, target, message in wrong:
        if isinstance(prediction, Normal):
            prediction = Normal(prediction.loc, prediction.scale, validate_args=False)
        with pytest.raises(ValueError, match=message):
            effens.greedy_select(prediction, target, 2)


# ---- The ensemble. ----


class Counted(nn.Module):
    """A network that counts how often it is asked."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = effens_book.nets.mlp(4, 3, width=width, dropout=0.5).double()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        answer: Tensor = self.inner(x)
        return answer


def networks(seed: int = 0) -> list[nn.Module]:
    """Four networks of different architectures."""
    torch.manual_seed(seed)
    return [Counted(width) for width in (4, 8, 16, 8)]


INDEX = [2, 0, 2, 3, 2]


def test_ensemble_has_a_row_per_entry() -> None:
    x, _ = vectors()
    made = networks()
    ensemble = effens.HyperEnsemble(made, INDEX).eval()
    answers = ensemble(x)
    assert answers.shape == (5, len(x), 3)
    for row, i in zip(answers, INDEX, strict=True):
        assert torch.equal(row, made[i](x))
    assert (ensemble.members, list(ensemble.index)) == (5, INDEX)


def test_ensemble_s_mean_is_the_weighted_mean() -> None:
    x, _ = vectors()
    made = [network.eval() for network in networks()]
    weighted = sum(w * made[i](x).softmax(-1) for i, w in ((2, 3 / 5), (0, 1 / 5), (3, 1 / 5)))
    assert isinstance(weighted, Tensor)
    assert relative(effens.predict(effens.HyperEnsemble(made, INDEX), x).mean(0), weighted) < 1e-12


def test_ensemble_computes_and_stores_each_network_once() -> None:
    x, _ = vectors()
    made = networks()
    ensemble = effens.HyperEnsemble(made, INDEX)
    ensemble(x)
    assert [network.calls for network in made if isinstance(network, Counted)] == [1, 0, 1, 1]
    expected = sum(p.numel() for i in (0, 2, 3) for p in made[i].parameters())
    assert sum(p.numel() for p in ensemble.parameters()) == expected
    assert next(made[0].parameters()) is next(p for p in ensemble.parameters() if p.shape == (4, 4))


def test_ensemble_repeats_an_answer_in_training_mode_too() -> None:
    x, _ = vectors()
    ensemble = effens.HyperEnsemble(networks(), INDEX).train()
    torch.manual_seed(0)
    answers = ensemble(x)
    assert torch.equal(answers[0], answers[2])
    assert not torch.equal(answers, ensemble.eval()(x))
    assert not any(module.training for module in ensemble.modules())


def test_ensemble_has_gradients_that_add_up() -> None:
    x, _ = vectors()
    made = networks()
    effens.HyperEnsemble(made, INDEX).eval()(x).sum().backward()
    other = copy.deepcopy(made[2])
    other.zero_grad()
    other(x).sum().backward()
    for p, q in zip(made[2].parameters(), other.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.allclose(p.grad, 3 * q.grad)


def test_ensemble_s_member_is_a_plain_copy() -> None:
    x, _ = vectors()
    ensemble = effens.HyperEnsemble(networks(), INDEX).eval()
    before = ensemble(x)
    for m in range(5):
        network = ensemble.member(m)
        assert type(network) is Counted
        assert torch.equal(network(x), before[m])
        for parameter in network.parameters():
            parameter.data.zero_()
    assert torch.equal(ensemble(x), before)
    for m in (-1, 5):
        with pytest.raises(IndexError, match=f"member must be in 0 ... 4, got {m}"):
            ensemble.member(m)


def test_ensemble_is_trained_already() -> None:
    x, y = vectors()
    ensemble = effens.HyperEnsemble(networks(), INDEX)
    before = copy.deepcopy(ensemble.state_dict())
    with pytest.raises(RuntimeError, match="trained already"):
        ensemble.forward_members(torch.stack([x] * 5))
    with pytest.raises(RuntimeError, match="trained already"):
        effens.fit(ensemble, (x, y), epochs=1, device="cpu")
    assert all(torch.equal(tensor, before[name]) for name, tensor in ensemble.state_dict().items())


def test_ensemble_reaches_everything_with_to() -> None:
    x, _ = vectors()
    ensemble = effens.HyperEnsemble(networks(), INDEX).eval()
    expected = ensemble(x)
    single = ensemble.float()
    assert single(x.float()).dtype == torch.float32
    assert relative(single(x.float()).double(), expected) < 1e-4


def test_ensemble_is_saved_and_loaded(tmp_path: Path) -> None:
    x, _ = vectors()
    ensemble = effens.HyperEnsemble(networks(), INDEX).eval()
    effens.save(ensemble, tmp_path / "weights.safetensors")
    for load in (
        lambda fresh: effens.load(fresh, tmp_path / "weights.safetensors"),
        lambda fresh: fresh.load_state_dict(ensemble.state_dict()),
    ):
        fresh = effens.HyperEnsemble(networks(1), INDEX).eval()
        assert not torch.equal(fresh(x), ensemble(x))
        load(fresh)
        assert torch.equal(fresh(x), ensemble(x))
    assert torch.equal(copy.deepcopy(ensemble)(x), ensemble(x))


@pytest.mark.parametrize("index", [[2, 0, 0, 3, 2], [0, 2, 0, 3, 0], [2, 0, 2, 3], [2, 0, 2, 2, 2], [1, 0, 1, 3, 1]])
def test_ensemble_refuses_the_weights_of_another_index(index: list[int], tmp_path: Path) -> None:
    made = [effens_book.nets.mlp(4, 3, width=8) for _ in range(4)]  # all alike: only the index tells
    effens.save(effens.HyperEnsemble(made, INDEX), tmp_path / "weights.safetensors")
    state = effens.HyperEnsemble(made, INDEX).state_dict()
    other = effens.HyperEnsemble([effens_book.nets.mlp(4, 3, width=8) for _ in range(4)], index)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="must"):
        effens.load(other, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"state must be of index \[.*\], got one of \[2, 0, 2, 3, 2\]"):
        other.load_state_dict(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_ensemble_takes_what_selection_returns() -> None:
    x, y = vectors()
    made = networks()
    probs = effens.predict(effens.DeepEnsemble.of(made), x)
    index = effens.greedy_select(probs, y, 3)
    mixed = effens.predict(effens.HyperEnsemble(made, index), x)
    assert torch.equal(mixed, probs[index])
    assert isinstance(effens.HyperEnsemble(made, torch.tensor(index)), effens.Ensemble)


def test_ensemble_of_ensembles_of_hyperparameters() -> None:
    x, _ = vectors()
    parts = [effens.HyperEnsemble(networks(seed), INDEX).eval() for seed in range(2)]
    assert torch.equal(effens.DeepEnsemble.of(parts)(x), torch.cat([part(x) for part in parts]))


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ([], ValueError, "at least one entry, got none"),
        ([0, 4], ValueError, "index must be in 0 ... 3, got 4"),
        ([0, -1], ValueError, "index must be in 0 ... 3, got -1"),
        ([0.5], TypeError, "'float' object cannot be interpreted as an integer"),
    ],
)
def test_ensemble_refuses_an_index(index: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        effens.HyperEnsemble(networks(), index)


def test_ensemble_refuses_what_is_no_plain_network() -> None:
    strange: list[Any] = [networks, effens.DeepEnsemble(lambda: nn.Linear(4, 3), 2)]
    for network, name in zip(strange, ("function", "DeepEnsemble"), strict=True):
        with pytest.raises(TypeError, match=f"networks must be plain nn.Modules, got {name}"):
            effens.HyperEnsemble([network], [0])
    with pytest.raises(ValueError, match="networks must hold at least one, got none"):
        effens.HyperEnsemble([], [0])
