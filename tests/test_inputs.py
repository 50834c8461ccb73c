"""Inputs, outputs and targets as people have them, against networks asked one by one."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scenarios import generator, indices
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import effens
from effens.inputs import count_rows, each, join_inputs, logits_of, rows_at, split_inputs

FIT: dict[str, Any] = {"epochs": 3, "batch_size": 8, "lr": 1e-2, "device": "cpu"}


class Mixed(nn.Module):
    """A network of numbers and kinds, which it takes by position or by name."""

    def __init__(self, wrap: Callable[[Tensor], Any] = lambda logits: logits) -> None:
        super().__init__()
        self.numbers, self.kinds, self.head = nn.Linear(4, 6), nn.Embedding(5, 6), nn.Linear(6, 3)
        self.wrap = wrap

    def forward(self, numbers: Tensor, kinds: Tensor) -> Any:
        return self.wrap(self.head((self.numbers(numbers) + self.kinds(kinds)).relu()))


class Answer:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def mixed() -> nn.Module:
    return Mixed().double()


def data(n: int = 22) -> tuple[Tensor, Tensor, Tensor]:
    source = generator()
    numbers = torch.randn(n, 4, generator=source, dtype=torch.float64)
    kinds = torch.randint(5, (n,), generator=source)
    return numbers, kinds, (numbers[:, 0] > 0).long() + (kinds > 2).long()


FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda numbers, kinds: (numbers, kinds),
    "list": lambda numbers, kinds: [numbers, kinds],
    "dict": lambda numbers, kinds: {"numbers": numbers, "kinds": kinds},
}
METHODS: dict[str, Callable[..., effens.Ensemble]] = {
    "deep": effens.DeepEnsemble,
    "deep, of": lambda net, members: effens.DeepEnsemble.of([net() for _ in range(members)]),
    "batch": lambda net, members: effens.BatchEnsemble(net, members, skip="kinds"),
    "snapshot": effens.SnapshotEnsemble,
    "swag": effens.SWAG,
    "hyper": lambda net, members: effens.HyperEnsemble([net() for _ in range(members)], range(members)),
    "lora": lambda net, members: effens.LoRAEnsemble(net, members, rank=2, layers=("numbers",)),
}


def trained(method: str, x: Any, y: Tensor, net: Callable[[], nn.Module] = mixed) -> effens.Ensemble:
    torch.manual_seed(0)
    ensemble = METHODS[method](net, 3)
    if method != "hyper":
        effens.fit(ensemble, (x, y), **FIT)
    return ensemble


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
def test_several_tensors(method: str, form: str) -> None:
    numbers, kinds, y = data()
    x = FORMS[form](numbers, kinds)
    ensemble = trained(method, x, y)
    probs = effens.predict(ensemble, x, chunk=5)
    expected = torch.stack([ensemble.member(m)(numbers, kinds) for m in range(3)])
    torch.testing.assert_close(probs, expected.softmax(-1))
    torch.testing.assert_close(ensemble(x), expected)
    if ensemble.streams == 3 and method != "hyper":
        xs = each(lambda part: torch.stack([part, part.flip(0), part.roll(1, 0)]), x)
        found = ensemble.forward_members(xs)
        for m in range(3):
            torch.testing.assert_close(found[m], ensemble.member(m)(*FORMS["tuple"](xs_of(xs, 0)[m], xs_of(xs, 1)[m])))
    mean, spread = effens.summarize(ensemble, x, chunk=4)
    torch.testing.assert_close(mean, probs.mean(0))
    assert spread.shape == mean.shape


def xs_of(xs: Any, place: int) -> Tensor:
    found: Tensor = list(xs.values())[place] if isinstance(xs, dict) else xs[place]
    return found


def test_together_is_one_by_one() -> None:
    numbers, kinds, y = data()
    torch.manual_seed(0)
    ensemble = effens.DeepEnsemble(mixed, 2)
    alone = [ensemble.member(m) for m in range(2)]
    effens.fit(ensemble, ((numbers, kinds), y), weight_decay=0.0, **FIT)
    steps = indices(effens.DeepEnsemble(mixed, 2), 22, 8, 3)
    for m, network in enumerate(alone):
        descent = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.0)
        for step, index in enumerate(steps):
            descent.param_groups[0]["lr"] = 0.5 * 1e-2 * (1 + math.cos(math.pi * step / len(steps)))
            loss = F.cross_entropy(network(numbers[index[m]], kinds[index[m]]), y[index[m]])
            descent.zero_grad()
            loss.backward()
            descent.step()
        torch.testing.assert_close(ensemble((numbers, kinds))[m], network(numbers, kinds))


class Named(Dataset[Any]):
    """Examples as dicts, with labels among them."""

    def __init__(self, labels: str = "labels") -> None:
        self.numbers, self.kinds, self.y = data()
        self.labels = labels

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"numbers": self.numbers[i], "kinds": self.kinds[i], self.labels: self.y[i]}


@pytest.mark.parametrize("method", METHODS)
def test_batches_of_dicts_with_labels(method: str) -> None:
    numbers, kinds, y = data()
    if method == "hyper":
        pytest.skip("is not trained")
    answers = []
    pairs = TensorDataset(torch.arange(22), y)

    def collate(rows: list[tuple[Tensor, Tensor]]) -> Any:
        index = torch.stack([row[0] for row in rows])
        return {"numbers": numbers[index], "kinds": kinds[index]}, y[index]

    for loader in (DataLoader(Named(), 8), DataLoader(pairs, 8, collate_fn=collate)):
        torch.manual_seed(0)
        ensemble = METHODS[method](mixed, 3)
        effens.fit(ensemble, loader, epochs=3, lr=1e-2, device="cpu")
        answers.append(ensemble((numbers, kinds)))
    assert torch.equal(*answers)


def test_a_map_style_dataset_of_dicts() -> None:
    numbers, kinds, y = data()
    answers = []
    for source in (Named(), ({"numbers": numbers, "kinds": kinds}, y)):
        torch.manual_seed(0)
        ensemble = effens.DeepEnsemble(mixed, 2)
        effens.fit(ensemble, source, **FIT)
        answers.append(ensemble((numbers, kinds)))
    assert torch.equal(*answers)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Named("target"), r"pairs of tensors \(x, y\), .*dicts with labels; .*got \['dict'\]"),
        (DataLoader(TensorDataset(*data())), r"several inputs are packed together, \(\(x1, x2\), y\), got .*'Tensor'"),
        ((data()[0].numpy(), data()[2].numpy()), "torch.as_tensor makes of arrays"),
        (((data()[0], data()[1][:-1]), data()[2]), r"same batch, got shape \(22, 4\) and \(21,\)"),
    ],
    ids=["no labels", "triples", "arrays", "rows"],
)
def test_other_data_are_refused_with_the_remedy(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        effens.fit(effens.DeepEnsemble(mixed, 2), source, **FIT)


@pytest.mark.parametrize("wrap", [Answer, lambda logits: {"logits": logits, "hidden": None}], ids=["object", "dict"])
@pytest.mark.parametrize("method", METHODS)
def test_outputs_with_logits(method: str, wrap: Any) -> None:
    numbers, kinds, y = data()
    plain = trained(method, (numbers, kinds), y)
    wrapped = trained(method, (numbers, kinds), y, lambda: Mixed(wrap).double())
    assert torch.equal(plain((numbers, kinds)), wrapped((numbers, kinds)))
    assert torch.equal(logits_of(wrapped.member(1)(numbers, kinds)), plain.member(1)(numbers, kinds))


def test_ids_alone() -> None:
    _, kinds, y = data()
    for make in (effens.DeepEnsemble, effens.SnapshotEnsemble, effens.SWAG):
        ensemble = make(lambda: nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 3)), 3)
        effens.fit(ensemble, (kinds, y), **FIT)
        assert effens.predict(ensemble, kinds).shape == (3, 22, 3)
        torch.testing.assert_close(ensemble(kinds)[2], ensemble.member(2)(kinds))


def pixels() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 3, 1)).double()


@pytest.mark.parametrize(
    "make", [effens.DeepEnsemble, effens.BatchEnsemble, effens.SnapshotEnsemble, effens.SWAG, effens.MIMO]
)
def test_a_class_for_each_pixel(make: Any) -> None:
    source = generator()
    x = torch.randn(12, 1, 5, 6, generator=source, dtype=torch.float64)
    y = (x[:, 0] > 0).long() + (x[:, 0] > 1).long()
    y[:, 0, ::2] = -100
    torch.manual_seed(0)
    ensemble = make(pixels, 3)
    likelihood = effens.Categorical(axis=1)
    effens.fit(ensemble, (x, y), epochs=30, batch_size=6, lr=2e-2, likelihood=likelihood, device="cpu")
    probs = effens.predict(ensemble, x, likelihood=likelihood)
    assert probs.shape == (3, 12, 5, 6, 3)
    torch.testing.assert_close(probs[1], ensemble.member(1)(x).softmax(1).movedim(1, -1))
    there = y != -100
    flat, labels = probs[:, there], y[there]
    scores: Any = [effens.nll, effens.member_nll, effens.diversity_gain, effens.brier, effens.accuracy, effens.ece]
    for score in scores:
        assert torch.equal(score(probs, y), score(flat, labels))
    assert effens.temperature(probs, y) == effens.temperature(flat, labels)
    assert effens.total_entropy(probs).shape == effens.disagreement(probs).shape == (12, 5, 6)
    torch.testing.assert_close(effens.total_entropy(probs)[there], effens.total_entropy(flat))
    assert effens.accuracy(probs, y) > 0.6


def test_the_loss_of_tokens_is_pytorch_s() -> None:
    x, y = torch.randn(8, 5, 4, dtype=torch.float64), torch.randint(3, (8, 5))
    y[0], y[3, 2:] = -100, -100
    network = nn.Linear(4, 3).double()
    ensemble = effens.DeepEnsemble.of([copy.deepcopy(network)])
    history = effens.fit(ensemble, (x, y), epochs=1, batch_size=8, lr=0.0, device="cpu")
    expected = F.cross_entropy(network(x).flatten(0, 1), y.flatten(), ignore_index=-100)
    torch.testing.assert_close(history.losses[0, 0], expected)


def test_several_and_missing_numbers() -> None:
    x = torch.randn(40, 4, generator=generator(), dtype=torch.float64)
    y = torch.stack([x[:, 0], x[:, 1] - x[:, 2]], 1)
    holes = y.clone()
    holes[::4, 0], holes[1::4, 1] = math.nan, math.nan
    gaussian = effens.Gaussian()
    torch.manual_seed(0)
    ensemble = effens.DeepEnsemble(lambda: nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (2, 2))), 3).double()
    history = effens.fit(ensemble, (x, holes), epochs=80, batch_size=20, lr=3e-2, likelihood=gaussian, device="cpu")
    assert bool(history.losses.isfinite().all())
    said = effens.predict(ensemble, x, likelihood=gaussian)
    assert said.batch_shape == (3, 40, 2)
    mixture = effens.mixture(said)
    assert mixture.batch_shape == (40, 2)
    there = ~holes.isnan()
    assert (mixture.mean - y)[there].square().mean().sqrt() < 0.3
    flat = torch.distributions.Normal(said.loc[:, there], said.scale[:, there])
    torch.testing.assert_close(effens.crps(said, holes), effens.crps(flat, holes[there]))


def test_trees_of_tensors() -> None:
    x: Any = {"a": torch.arange(6), "b": (torch.zeros(6, 2), None)}
    assert count_rows(x) == 6
    parts = split_inputs(x, 3)
    assert [part["a"].tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
    joined = join_inputs(parts)
    assert torch.equal(joined["a"], x["a"])
    assert joined["b"][0].shape == (6, 2)
    assert joined["b"][1] is None
    assert rows_at(x, [0, -1])["a"].tolist() == [0, 5]
    with pytest.raises(TypeError, match="x must be a tensor, .*, got list"):
        count_rows([1, 2])
    with pytest.raises(ValueError, match=r"x must be \(batch, ...\), .* got shape \(\)"):
        count_rows(torch.tensor(1))
    with pytest.raises(ValueError, match="an object or dict with a tensor logits, got dict"):
        logits_of({"scores": torch.zeros(2)})
