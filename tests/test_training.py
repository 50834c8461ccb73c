"""The training loop: what is reported, what is refused, and that it does what the obvious loop does."""

import copy
import math
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scenarios import generator, images, indices, mlp, normed, plain_loop, relative, remembered, residual, vectors
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import effens
import effens_book.nets
from effens import checkpoint, training
from effens.checkpoint import fixed_seed


class Recorder(effens.DeepEnsemble):
    """A deep ensemble that writes down what the training loop asks and gives."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[Tensor] = []
        self.collected: list[tuple[int, int]] = []
        self.finished: list[Tensor] = []

    def forward_members(self, xs: Tensor) -> Tensor:
        self.seen.append(xs.clone())
        return super().forward_members(xs)

    def collect(self, step: int, steps: int) -> None:
        self.collected.append((step, steps))

    def finish(self, batches: Iterable[Tensor]) -> None:
        assert not self.training
        self.finished = list(batches)


class WithinBatch(Recorder):
    """The same, with an order within each batch."""

    def batches(self, n: int, batch_size: int, generator: torch.Generator | None = None) -> Iterable[Tensor]:
        for part in torch.randperm(n, generator=generator).split(batch_size):
            yield torch.stack([part[torch.randperm(len(part), generator=generator)] for _ in range(self.streams)])


def numbered(n: int = 22) -> tuple[Tensor, Tensor]:
    """Inputs that are their own index."""
    return torch.arange(n, dtype=torch.float64)[:, None].repeat(1, 4), torch.zeros(n, dtype=torch.int64)


class TestHistory:
    def test_losses_rates_and_steps(self) -> None:
        ensemble, (x, y) = effens.DeepEnsemble(mlp, 3), vectors(22)
        with torch.no_grad():
            first = indices(ensemble, 22, 8, 1)[0]
            expected = effens.Categorical().nll(ensemble.forward_members(x[first]), y[first]).mean(1)
        history = effens.fit(ensemble, (x, y), epochs=3, batch_size=8, lr=0.01, device="cpu")
        assert history.steps == 9  # the last batch of an epoch holds 6, and counts
        assert history.losses.shape == (9, 3)
        assert torch.allclose(history.losses[0], expected)
        cosine = [0.01 * 0.5 * (1 + math.cos(math.pi * step / 9)) for step in range(9)]
        assert torch.allclose(history.lrs, torch.tensor(cosine))
        assert not history.losses.requires_grad
        assert 0 < history.seconds < 60

    def test_says_the_last_loss(self) -> None:
        history = effens.History(torch.tensor([[3.0, 3.0], [1.0, 2.0]]), torch.zeros(2), 1.26)
        assert repr(history) == "History(steps=2, last loss=1.5, seconds=1.3)"


class TestLoop:
    @pytest.mark.parametrize(
        "optimizer",
        [
            torch.optim.AdamW,
            torch.optim.Adam,
            torch.optim.SGD,
            partial(torch.optim.SGD, momentum=0.9),
            torch.optim.RMSprop,
        ],
    )
    def test_optimizers(self, optimizer: Any) -> None:
        network, (x, y) = mlp(), vectors(22)
        ensemble = effens.DeepEnsemble.of([network])
        plain = ensemble.member(0)
        options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "optimizer": optimizer}
        effens.fit(ensemble, (x, y), epochs=2, batch_size=8, device="cpu", **options)
        plain_loop(plain, x, y, [index[0] for index in indices(ensemble, 22, 8, 2)], **options)
        assert relative(network(x), plain(x)) < 1e-9

    def test_every_group_follows_the_schedule(self) -> None:
        lrs: list[list[float]] = []

        class Spy(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                lrs.append([group["lr"] for group in self.param_groups])
                return super().step(closure)

        ensemble = effens.BatchEnsemble(mlp, 3, fast_lr=0.25)
        effens.fit(ensemble, vectors(22), epochs=2, batch_size=11, lr=0.1, optimizer=Spy, device="cpu")
        expected = [[0.1 * ensemble.schedule(step, 4), 0.025 * ensemble.schedule(step, 4)] for step in range(4)]
        assert np.allclose(lrs, expected)

    def test_each_member_sees_every_example_once_an_epoch(self) -> None:
        ensemble = Recorder(mlp, 3)
        effens.fit(ensemble, numbered(22), epochs=2, batch_size=8, device="cpu")
        assert [batch.shape[1] for batch in ensemble.seen] == [8, 8, 6] * 2
        for epoch in (ensemble.seen[:3], ensemble.seen[3:]):
            for seen in torch.cat(epoch, dim=1)[..., 0]:
                assert seen.sort().values.tolist() == list(range(22))
        first, second = (torch.cat(epoch, dim=1) for epoch in (ensemble.seen[:3], ensemble.seen[3:]))
        assert not torch.equal(first, second)  # shuffled anew

    def test_order_within_a_batch(self) -> None:
        ensemble = WithinBatch(mlp, 3)
        effens.fit(ensemble, numbered(22), epochs=1, batch_size=8, device="cpu")
        assert [batch.shape[1] for batch in ensemble.seen] == [8, 8, 6]
        for batch in ensemble.seen:
            rows = batch[..., 0]
            assert len(rows.unique(dim=0)) == 3
            assert len(rows.sort(1).values.unique(dim=0)) == 1  # the same examples, in orders of their own
        seen = torch.cat([batch[0, :, 0] for batch in ensemble.seen])
        assert seen.sort().values.tolist() == list(range(22))

    def test_hooks_are_called(self) -> None:
        for data in (
            numbered(22),
            TensorDataset(*numbered(22)),
            DataLoader(TensorDataset(*numbered(22)), batch_size=8),
        ):
            ensemble = Recorder(mlp, 2)
            effens.fit(ensemble, data, epochs=2, batch_size=8, device="cpu")
            assert ensemble.collected == [(step, 6) for step in range(6)]
            assert torch.cat(ensemble.finished)[:, 0].sort().values.tolist() == list(range(22))
            assert [len(batch) for batch in ensemble.finished] == [8, 8, 6]

    def test_a_loader_s_batches_are_permuted_within(self) -> None:
        ensemble = Recorder(mlp, 3)
        effens.fit(ensemble, DataLoader(TensorDataset(*numbered(22)), batch_size=5), epochs=1, device="cpu")
        for i, batch in enumerate(ensemble.seen):
            expected = [float(j) for j in range(5 * i, min(5 * i + 5, 22))]
            assert all(row.sort().values.tolist() == expected for row in batch[..., 0])
        assert len(ensemble.seen[0][..., 0].unique(dim=0)) == 3

    def test_a_loader_that_shuffles_is_reproducible(self) -> None:
        seen = []
        for seed in (3, 3, 4):
            ensemble = Recorder(mlp, 2)
            data = DataLoader(TensorDataset(*numbered(22)), batch_size=5, shuffle=True)
            effens.fit(ensemble, data, epochs=1, device="cpu", seed=seed)
            seen.append(ensemble.seen[0])
        assert torch.equal(seen[0], seen[1])
        assert not torch.equal(seen[0], seen[2])

    def test_a_dataset_of_arrays_and_numbers(self) -> None:
        class Pairs(Dataset[Any]):
            def __len__(self) -> int:
                return 7

            def __getitem__(self, i: int) -> tuple[Any, int]:
                return np.full(4, i, dtype=np.float64), i % 3

        ensemble = Recorder(mlp, 2)
        effens.fit(ensemble, Pairs(), epochs=1, batch_size=4, device="cpu")
        assert torch.cat(ensemble.seen, dim=1)[0, :, 0].sort().values.tolist() == list(range(7))

    def test_dropout_follows_the_seed(self) -> None:
        losses = []
        for seed, noise in ((1, 10), (1, 11), (2, 10)):
            torch.manual_seed(0)
            ensemble = effens.DeepEnsemble(partial(mlp, dropout=0.5), 2)
            torch.manual_seed(noise)
            losses.append(effens.fit(ensemble, vectors(22), epochs=2, device="cpu", seed=seed).losses)
        assert torch.equal(losses[0], losses[1])
        assert not torch.equal(losses[0], losses[2])

    def test_random_state_is_left_when_training_fails(self) -> None:
        torch.manual_seed(0)
        before = torch.get_rng_state()
        with pytest.raises(FloatingPointError):
            effens.fit(effens.DeepEnsemble.of([mlp()]), (vectors()[0] * math.nan, vectors()[1]), device="cpu")
        torch.manual_seed(0)
        assert torch.equal(before, torch.get_rng_state())

    def test_training_on_a_cpu_seeds_no_other_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeded the GPUs"))
        with fixed_seed(3, torch.device("cpu")):
            assert torch.equal(torch.rand(3), torch.rand(3, generator=generator(3)))

    def test_training_goes_on_where_it_stopped(self) -> None:
        ensemble, data = effens.DeepEnsemble(mlp, 2), vectors(100)
        first = effens.fit(ensemble, data, epochs=20, lr=0.01, device="cpu")
        second = effens.fit(ensemble, data, epochs=20, lr=0.01, device="cpu")
        assert bool((second.losses[0] < first.losses[0]).all())

    @pytest.mark.slow
    def test_a_bar_is_shown_after_two_seconds(self, capfd: pytest.CaptureFixture[str]) -> None:
        class Slow(Recorder):
            def collect(self, step: int, steps: int) -> None:
                time.sleep(0.4)

        effens.fit(Slow(mlp, 1), vectors(22), epochs=3, batch_size=8, device="cpu", progress=False)
        assert capfd.readouterr() == ("", "")
        effens.fit(Slow(mlp, 1), vectors(22), epochs=3, batch_size=8, device="cpu")
        assert "step" in capfd.readouterr().err


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_trains_also_where_gradients_are_off(mode: Any) -> None:
    x, y = vectors()
    options: dict[str, Any] = {"epochs": 2, "batch_size": 8, "device": "cpu", "lr": 0.1}
    answers = []
    for context in (mode, nullcontext):
        torch.manual_seed(0)
        ensemble = effens.DeepEnsemble(mlp, 2)
        with context():
            effens.fit(ensemble, (x, y), **options)
            effens.fit(ensemble, (x.clone(), y.clone()), **options)
        answers.append(ensemble(x))
    assert torch.equal(*answers)


@pytest.mark.parametrize("ask", [effens.predict, effens.summarize])
def test_arrays_are_refused(ask: Any) -> None:
    with pytest.raises(TypeError, match=r"x must be .*a tensor.*, got ndarray"):
        ask(effens.DeepEnsemble(mlp, 2), np.zeros((3, 4)))


def test_sparse_gradients() -> None:
    make, plain = remembered(lambda: nn.EmbeddingBag(10, 3, sparse=True), 2)
    x, y = torch.randint(10, (22, 4), generator=generator()), vectors()[1]
    ensemble = effens.DeepEnsemble(make, 2)
    options: dict[str, Any] = {"lr": 0.3, "optimizer": torch.optim.SGD}
    effens.fit(ensemble, (x, y), epochs=2, batch_size=8, device="cpu", **options)
    for m, network in enumerate(plain):
        plain_loop(network, x, y, [index[m] for index in indices(ensemble, 22, 8, 2)], weight_decay=0.0, **options)
        assert relative(ensemble.member(m)(x), network(x)) < 1e-6


@pytest.mark.parametrize(("n", "steps"), [(18, 2), (20, 3), (16, 2)])
def test_a_last_batch_too_small_to_be_split_is_no_step_of_the_schedule(n: int, steps: int) -> None:
    ensemble = effens.BatchEnsemble(mlp, 4, split=True)
    loader = DataLoader(TensorDataset(*vectors(n)), batch_size=8)
    history = effens.fit(ensemble, loader, epochs=3, lr=1.0, device="cpu", progress=False)
    assert history.steps == 3 * steps
    assert history.lrs.tolist() == pytest.approx([ensemble.schedule(step, 3 * steps) for step in range(3 * steps)])


@pytest.mark.parametrize("fused", [True, False])
def test_one_rate_is_the_plain_loop_bit_for_bit(fused: bool) -> None:
    make, _ = remembered(mlp, 3)
    ensemble, (x, y) = effens.DeepEnsemble(make, 3), vectors(22)
    plain = copy.deepcopy(ensemble)
    optimizer: Any = torch.optim.AdamW if fused else partial(torch.optim.AdamW, fused=False)
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.3, "optimizer": optimizer}
    effens.fit(ensemble, (x, y), epochs=5, batch_size=8, device="cpu", **options)
    descent = torch.optim.AdamW(plain.parameters(), lr=0.02, weight_decay=0.3, fused=fused)
    steps = indices(ensemble, 22, 8, 5)
    for step, index in enumerate(steps):
        descent.param_groups[0]["lr"] = 0.02 * (0.5 * (1 + math.cos(math.pi * step / len(steps))))
        loss = effens.Categorical().nll(plain.forward_members(x[index]), y[index]).mean(1).sum()
        descent.zero_grad()
        loss.backward()
        descent.step()
    for p, q in zip(ensemble.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


class TestMistakes:
    @pytest.mark.parametrize(("name", "value"), [("epochs", 0), ("batch_size", 0), ("epochs", -1)])
    def test_sizes(self, name: str, value: int) -> None:
        options: dict[str, Any] = {name: value}
        with pytest.raises(ValueError, match=f"{name} must be >= 1, got {value}"):
            effens.fit(effens.DeepEnsemble(mlp, 2), vectors(), device="cpu", **options)

    @pytest.mark.parametrize(
        ("y", "message"),
        [
            (torch.tensor([0, 1, 2, 3]), r"labels must be in 0 ... 2, got 0 ... 3"),
            (torch.tensor([0, 1, -1, 2]), r"labels must be in 0 ... 2, got -1 ... 2"),
            (torch.tensor([0.0, 1, 2, 2]), r"labels must be integers, got torch.float32"),
            (torch.tensor([[0], [1], [2], [2]]), r"targets must have shape \(4,\), one per example, got \(2, 4, 1\)"),
            (torch.eye(4, 3).long(), r"targets must have shape \(4,\), one per example, got \(2, 4, 3\)"),
            (torch.tensor([0, 1, 2]), r"x and y must have the same length, got 4 and 3"),
        ],
    )
    @pytest.mark.parametrize("kind", [lambda x, y: (x, y), lambda x, y: TensorDataset(x, y)])
    def test_labels(self, y: Tensor, message: str, kind: Any) -> None:
        x = torch.randn(4, 4).double()
        if len(x) != len(y) and not isinstance(kind(x, x), tuple):
            pytest.skip("no such dataset can be made")
        with pytest.raises(ValueError, match=message):
            effens.fit(effens.DeepEnsemble(mlp, 2), kind(x, y), device="cpu")

    def test_labels_of_examples_that_come_late(self) -> None:
        """Tensors are looked at once, whole: a bad label in the last batch is found before the first step."""
        x, y = vectors(50)
        y[-1] = 3
        ensemble = effens.DeepEnsemble(mlp, 2)
        before = [parameter.clone() for parameter in ensemble.parameters()]
        with pytest.raises(ValueError, match=r"labels must be in 0 ... 2"):
            effens.fit(ensemble, (x, y), batch_size=2, device="cpu")
        assert all(torch.equal(a, b) for a, b in zip(before, ensemble.parameters(), strict=True))

    @pytest.mark.parametrize("likelihood", [effens.Gaussian(), effens.StudentT()])
    def test_regression_targets(self, likelihood: effens.Likelihood) -> None:
        x = torch.randn(6, 4)
        for y, message in (
            (torch.randn(6, 1), r"targets must have shape \(6,\), one per example, got \(2, 6, 1\)"),
            (torch.tensor([0, 1, math.nan, 0, math.inf, 1]), "targets must be finite, .*, got 1 that are not"),
        ):
            ensemble = effens.DeepEnsemble(lambda: nn.Linear(4, likelihood.outputs or 0), 2)
            with pytest.raises(ValueError, match=message):
                effens.fit(ensemble, (x, y), likelihood=likelihood, device="cpu")
        with pytest.raises(ValueError, match=f"needs {likelihood.outputs} outputs, got 5"):
            effens.fit(
                effens.DeepEnsemble(lambda: nn.Linear(4, 5), 2), (x, x[:, 0]), likelihood=likelihood, device="cpu"
            )

    @pytest.mark.parametrize(
        "data",
        [
            (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)),
            TensorDataset(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)),
            DataLoader(TensorDataset(torch.zeros(3, 4), torch.zeros(3)), batch_size=4, drop_last=True),
        ],
        ids=["tensors", "dataset", "loader"],
    )
    def test_no_data(self, data: Any) -> None:
        with pytest.raises(ValueError, match="data must hold at least one example for each member, got none"):
            effens.fit(effens.DeepEnsemble(mlp, 2), data, device="cpu")

    @pytest.mark.parametrize("of", [effens.DeepEnsemble, effens.BatchEnsemble, effens.SnapshotEnsemble])
    @pytest.mark.parametrize("sequence", [4, 6])
    def test_outputs_for_each_position(self, of: Any, sequence: int) -> None:
        x = torch.zeros(4, sequence, 3)
        for y in (torch.zeros(4).long(), torch.zeros(4, 5).long(), torch.zeros(sequence).long()[:4]):
            with pytest.raises(ValueError, match=r"targets must have shape \(4, .\), one per example, pixel or token"):
                effens.fit(of(lambda: nn.Linear(3, 2), 2), (x, y), epochs=2, device="cpu")

    def test_a_target_for_each_example_is_not_one_for_each_position(self) -> None:
        x = torch.zeros(4, 4, 3)
        ensemble = effens.BatchEnsemble(lambda: nn.Linear(3, 2), 2)
        with pytest.raises(ValueError, match=r"targets must have shape \(4, 4\), one per example, pixel or token, got"):
            effens.fit(ensemble, (x, x[:, 0, 0]), likelihood=effens.Gaussian(), device="cpu")

    def test_no_data_and_too_little_to_be_split(self) -> None:
        x, y = vectors(1)
        for n, message in ((0, "data must hold at least one example"), (1, "data must hold at least one")):
            with pytest.raises(ValueError, match=message):
                effens.fit(effens.BatchEnsemble(mlp, 2, split=True), (x[:n], y[:n]), device="cpu")

    @pytest.mark.parametrize(
        ("data", "got"),
        [
            ((np.zeros((3, 4)), np.zeros(3)), r"\['ndarray', 'ndarray'\]"),
            ((torch.zeros(3, 4),), r"\['Tensor'\]"),
            (TensorDataset(torch.zeros(3, 4)), r"\['Tensor'\]"),
            (DataLoader(TensorDataset(*[torch.zeros(3, 4)] * 3)), "'Tensor', 'Tensor', 'Tensor'"),
        ],
        ids=["arrays", "one tensor", "dataset of inputs", "loader of triples"],
    )
    def test_data_that_is_no_pairs(self, data: Any, got: str) -> None:
        with pytest.raises(ValueError, match=rf"data must give pairs of tensors \(x, y\), .* got .*{got}"):
            effens.fit(effens.DeepEnsemble(mlp, 2), data, device="cpu")

    def test_data_without_a_length(self) -> None:
        class Stream(IterableDataset[Any]):
            def __iter__(self) -> Iterator[Any]:
                return iter([])

        stream: Any = Stream()
        with pytest.raises(
            ValueError,
            match="data must be a map-style Dataset with a length; a stream goes into a DataLoader, got Stream",
        ):
            effens.fit(effens.DeepEnsemble(mlp, 2), stream, device="cpu")

    def test_nothing_to_train(self) -> None:
        frozen = effens.DeepEnsemble(lambda: mlp().requires_grad_(False), 2)
        with pytest.raises(ValueError, match="must have weights to train, got none"):
            effens.fit(frozen, vectors(), device="cpu")

    def test_inputs_that_are_no_numbers(self) -> None:
        x, y = vectors(16)
        x[3, 1] = math.nan
        with pytest.raises(
            FloatingPointError, match=r"losses must be finite, got \[.*nan.*\] at step [01]: lower the learning rate"
        ):
            effens.fit(effens.DeepEnsemble(mlp, 2), (x, y), batch_size=8, device="cpu")

    def test_divergence(self) -> None:
        x, y = vectors()
        with pytest.raises(FloatingPointError, match="losses must be finite"):
            effens.fit(effens.DeepEnsemble(mlp, 2), (1e6 * x, y), lr=1e300, optimizer=torch.optim.SGD, device="cpu")

    @pytest.mark.parametrize("bad", [0, 2, 7])
    def test_the_step_that_diverged_is_named(self, bad: int) -> None:
        class Broken(effens.Categorical):
            steps = -1

            def nll(self, outputs: Tensor, y: Tensor) -> Tensor:
                Broken.steps += 1
                return super().nll(outputs, y) * (math.inf if Broken.steps == bad else 1)

        with pytest.raises(FloatingPointError, match=rf"got \[inf, inf\] at step {bad}"):
            effens.fit(effens.DeepEnsemble(mlp, 2), vectors(), batch_size=8, likelihood=Broken(), device="cpu")

    def test_a_plain_network(self) -> None:
        network: Any = mlp()
        for ask in (lambda: effens.predict(network, vectors()[0]), lambda: effens.fit(network, vectors())):
            with pytest.raises(TypeError, match=r"must be an Ensemble .*DeepEnsemble.of.*, got Sequential"):
                ask()

    def test_predict(self) -> None:
        x, _ = vectors()
        with pytest.raises(ValueError, match="chunk must be >= 1, got 0"):
            effens.predict(effens.DeepEnsemble(mlp, 2), x, chunk=0)
        with pytest.raises(ValueError, match="Gaussian needs 2 outputs, got 3"):
            effens.predict(effens.DeepEnsemble(mlp, 2), x, likelihood=effens.Gaussian())


class Constant(nn.Module):
    """A network that says the same whatever x is: the best it can do has a closed form."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = nn.Parameter(torch.zeros(outputs, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs.expand(len(x), -1)


class TestRegression:
    def test_gaussian_learns_mean_and_variance(self) -> None:
        y = 3 + 0.7 * torch.randn(100, generator=generator(), dtype=torch.float64)
        ensemble = effens.DeepEnsemble(lambda: Constant(2), 2)
        data = (torch.zeros(100, 1).double(), y)
        history = effens.fit(
            ensemble, data, epochs=300, batch_size=100, lr=0.3, likelihood=effens.Gaussian(), device="cpu"
        )
        found = effens.predict(ensemble, data[0][:1], likelihood=effens.Gaussian())
        assert torch.allclose(found.mean, y.mean(), rtol=1e-3)
        assert torch.allclose(found.variance, y.var(correction=0), rtol=1e-3)
        entropy = 0.5 * math.log(2 * math.pi * math.e * float(y.var(correction=0)))  # the least loss there can be
        assert float(history.losses[-1].mean()) == pytest.approx(entropy, abs=1e-4)

    def test_student_t_learns_what_scipy_finds(self) -> None:
        sample = stats.t.rvs(4, loc=1, scale=0.5, size=400, random_state=0)
        data = (torch.zeros(400, 1).double(), torch.tensor(sample))
        ensemble = effens.DeepEnsemble(lambda: Constant(3), 1)
        effens.fit(ensemble, data, epochs=250, batch_size=400, lr=0.3, likelihood=effens.StudentT(), device="cpu")
        found = effens.predict(ensemble, data[0][:1], likelihood=effens.StudentT())
        df, location, scale = stats.t.fit(sample)
        assert [found.df.item(), found.loc.item(), found.scale.item()] == pytest.approx([df, location, scale], rel=1e-2)

    def test_noise_that_depends_on_x(self) -> None:
        x = torch.tensor([-1.0, 1.0]).double().repeat(100)[:, None]
        y = x[:, 0] + (0.3 + 0.2 * x[:, 0]) * torch.randn(200, generator=generator(), dtype=torch.float64)
        torch.manual_seed(0)
        ensemble = effens.DeepEnsemble(lambda: effens_book.nets.mlp(1, 2).double(), 3)
        effens.fit(ensemble, (x, y), epochs=300, batch_size=200, lr=1e-2, likelihood=effens.Gaussian(), device="cpu")
        found = effens.predict(ensemble, x[:2], likelihood=effens.Gaussian())
        assert found.batch_shape == (3, 2)
        groups = y.view(100, 2)
        assert torch.allclose(found.mean, groups.mean(0), atol=0.01)
        assert torch.allclose(found.stddev, groups.std(0, correction=0), rtol=0.02)
        total = effens.mixture(found)
        assert torch.allclose(total.variance, found.variance.mean(0) + found.mean.var(0, correction=0))


def test_device_is_there() -> None:
    assert torch.zeros(1, device=effens.device()).device.type in ("cuda", "mps", "cpu")


def test_a_history_says_its_last_loss() -> None:
    history = effens.History(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0.1, 0.0]), 2.04)
    assert repr(history) == "History(steps=2, last loss=3.5, seconds=2.0)"
    one = effens.History(torch.tensor([[1.0, 2.0]]), torch.tensor([0.1]), 0.0)
    assert repr(one) == "History(steps=1, last loss=1.5, seconds=0.0)"


def test_the_bar_is_shown_where_it_is_wanted() -> None:
    for progress in (True, False):
        with training.progress_bar(5, progress) as shown:
            assert shown.disable is not progress
            assert shown.total == 5


def test_losses_that_are_not_finite_are_told_to_four_digits() -> None:
    losses = [torch.tensor([0.123456, 1.0]), torch.tensor([0.123456, math.inf])]
    with pytest.raises(FloatingPointError, match=r"got \[0.1235, inf\] at step 1: lower the learning rate"):
        checkpoint.check_finite(losses, 2)


def test_the_bar_moves_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    make = training.progress_bar

    def kept(steps: int, progress: bool) -> Any:
        shown.append(make(steps, progress))
        return shown[-1]

    monkeypatch.setattr(training, "progress_bar", kept)
    effens.fit(effens.DeepEnsemble(mlp, 2), vectors(), epochs=3, batch_size=6, device="cpu")
    assert [bar.n for bar in shown] == [12]


def test_threads_that_predict_at_once_get_what_one_gets() -> None:
    ensemble, (x, _) = effens.DeepEnsemble(lambda: mlp(dropout=0.5), 2), vectors(400)
    expected = effens.predict(ensemble, x)
    assert all(module.training for module in ensemble.modules())
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda chunk: effens.predict(ensemble, x, chunk=chunk), [1, 400] * 8))
    assert all(torch.allclose(each, expected, rtol=1e-12) for each in found)
    assert all(module.training for module in ensemble.modules())


@pytest.mark.parametrize("method", [effens.DeepEnsemble, effens.SnapshotEnsemble, effens.SWAG, effens.BatchEnsemble])
def test_modes_that_the_network_set_are_kept(method: Any) -> None:
    def make() -> nn.Module:
        body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double().requires_grad_(False).eval()
        return nn.Sequential(*body, nn.Dropout(0.5), nn.Linear(4, 3).double())

    ensemble, (x, y) = method(make, 2), vectors()
    for _ in range(2):  # also where it was trained before
        history = effens.fit(ensemble, (x + 3, y), epochs=3, batch_size=11, lr=1e-12, device="cpu")
        for m in range(2):
            assert not bool(ensemble.member(m).get_buffer("1.running_mean").any())
    assert len(history.losses[:, 0].unique()) == 6  # dropout was on


def test_a_network_that_is_wholly_in_eval_mode_is_trained() -> None:
    make = lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double().eval()  # noqa: E731
    ensemble, (x, y) = effens.DeepEnsemble(make, 2), vectors()
    effens.fit(ensemble, (x + 3, y), epochs=1, batch_size=11, device="cpu")
    assert bool(ensemble.member(0).get_buffer("1.running_mean").any())


@pytest.mark.parametrize("likelihood", [nn.CrossEntropyLoss(), F.cross_entropy, "categorical", effens.Categorical])
def test_what_is_no_likelihood_is_refused(likelihood: Any) -> None:
    ensemble, (x, y) = effens.DeepEnsemble(mlp, 2), vectors()
    for ask in (
        lambda: effens.fit(ensemble, (x, y), likelihood=likelihood),
        lambda: effens.predict(ensemble, x, likelihood=likelihood),
    ):
        with pytest.raises(TypeError, match=r"likelihood must be a Likelihood, effens.Categorical\(\) say"):
            ask()


@pytest.mark.parametrize(
    ("optimizer", "error", "match"),
    [
        ("adam", TypeError, "optimizer must be a class, .* got 'adam'"),
        (torch.optim.SGD([torch.zeros(1)], lr=0.1), TypeError, "optimizer must be a class, .* got SGD"),
        (partial(torch.optim.SGD, lr=0.1, weight_decay=0.1), ValueError, "must leave lr and weight_decay to fit's own"),
    ],
)
def test_what_is_no_optimizer_is_refused(optimizer: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        effens.fit(effens.DeepEnsemble(mlp, 2), vectors(), optimizer=optimizer)


class TestClipAndCallback:
    """Clipping, callbacks and what the last batch may be."""

    @pytest.mark.parametrize("make_net", [mlp, residual])
    def test_each_member_is_clipped_by_itself(self, make_net: Any) -> None:
        make, plain = remembered(make_net, 3)
        (x, y), ensemble = vectors(), effens.DeepEnsemble(make, 3)
        options: dict[str, Any] = {"epochs": 3, "batch_size": 8, "lr": 0.5, "optimizer": torch.optim.SGD}
        effens.fit(ensemble, (x, y), clip=0.1, device="cpu", **options)
        steps = indices(ensemble, 22, 8, 3)
        for m, network in enumerate(plain):
            descent = torch.optim.SGD(network.parameters(), lr=0.5)
            for step, index in enumerate(steps):
                descent.param_groups[0]["lr"] = 0.25 * (1 + math.cos(math.pi * step / len(steps)))
                descent.zero_grad()
                torch.nn.functional.cross_entropy(network(x[index[m]]), y[index[m]]).backward()
                nn.utils.clip_grad_norm_(network.parameters(), 0.1)
                descent.step()
            assert relative(ensemble.member(m)(x), network(x)) < 1e-6

    def test_shared_weights_are_clipped_together(self) -> None:
        x, y = vectors()
        moved = []
        for clip in (1e-3, None):
            torch.manual_seed(0)
            ensemble = effens.BatchEnsemble(mlp, 3, fast_lr=1.0)
            before = [parameter.clone() for parameter in ensemble.parameters()]
            effens.fit(ensemble, (x, y), epochs=1, batch_size=22, lr=1.0, optimizer=torch.optim.SGD, clip=clip)
            steps = [b - a for a, b in zip(before, ensemble.parameters(), strict=True)]
            moved.append(float(torch.cat([step.flatten() for step in steps]).norm().detach()))
        assert moved[0] == pytest.approx(1e-3, rel=1e-3)
        assert moved[1] > 1e-2

    @pytest.mark.parametrize("clip", [0.0, -1.0, math.nan])
    def test_a_norm_is_above_0(self, clip: float) -> None:
        with pytest.raises(ValueError, match=f"clip must be > 0, got {clip}"):
            effens.fit(effens.DeepEnsemble(mlp, 2), vectors(), clip=clip)

    @pytest.mark.parametrize(
        "make", [effens.DeepEnsemble, effens.BatchEnsemble, effens.SnapshotEnsemble, effens.SWAG, effens.MIMO]
    )
    def test_a_callback_sees_every_epoch_and_may_stop(self, make: Any) -> None:
        x, y = vectors()
        seen: list[tuple[int, int, int]] = []

        def watch(epoch: int, ensemble: Any, history: effens.History) -> bool:
            seen.append((epoch, history.steps, len(history.losses)))
            if ensemble.streams > 1:
                assert effens.predict(ensemble, x).shape == (3, 22, 3)
                assert ensemble.training
            return epoch == 4

        ensemble = make(mlp, 3)
        history = effens.fit(ensemble, (x, y), epochs=9, batch_size=11, device="cpu", callback=watch)
        assert seen == [(epoch, 2 * epoch + 2, 2 * epoch + 2) for epoch in range(5)]
        assert history.steps == 10
        assert not ensemble.training
        assert bool(effens.predict(ensemble, x).isfinite().all())

    def test_a_callback_that_only_looks_changes_nothing(self) -> None:
        answers = []
        for callback in (None, lambda *_: None):
            torch.manual_seed(0)
            ensemble = effens.DeepEnsemble(mlp, 2)
            effens.fit(ensemble, vectors(), epochs=3, device="cpu", callback=callback)
            answers.append(ensemble(vectors()[0]))
        assert torch.equal(*answers)

    def test_a_run_that_was_stopped_is_finished(self, tmp_path: Any) -> None:
        x, y = vectors()
        options: dict[str, Any] = {"epochs": 9, "device": "cpu", "checkpoint": tmp_path / "run.pt"}
        answers = []
        for _ in range(2):
            torch.manual_seed(0)
            ensemble = effens.SnapshotEnsemble(mlp, 3)
            history = effens.fit(ensemble, (x, y), callback=lambda epoch, *_: epoch == 3, **options)
            assert history.steps == 4
            answers.append(ensemble(x))
        assert torch.equal(*answers)
        assert len(answers[0]) == 1

    @pytest.mark.parametrize("kind", ["tensors", "dataset", "loader"])
    @pytest.mark.parametrize(
        "make", [effens.DeepEnsemble, effens.SnapshotEnsemble, effens.SWAG, effens.MIMO, effens.BatchEnsemble]
    )
    def test_a_last_batch_of_one_is_named_before_training(self, make: Any, kind: str) -> None:
        def batch_normed() -> nn.Module:
            return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()

        x, y = vectors(17)
        data: Any = {"tensors": (x, y), "dataset": TensorDataset(x, y)}.get(kind)
        ensemble = make(batch_normed, 2)
        before = copy.deepcopy(ensemble.state_dict())
        data = DataLoader(TensorDataset(x, y), 8) if data is None else data
        with pytest.raises(ValueError, match="got a last batch of one: choose another batch_size, or drop_last=True"):
            effens.fit(ensemble, data, epochs=1, batch_size=8, device="cpu")
        assert all(torch.equal(tensor, before[name]) for name, tensor in ensemble.state_dict().items())
        if kind == "loader":
            effens.fit(ensemble, DataLoader(TensorDataset(x, y), 8, drop_last=True), epochs=1, device="cpu")

    def test_a_last_batch_of_one_image_is_trained(self) -> None:
        x, y = images(17)
        effens.fit(effens.DeepEnsemble(normed, 2), (x, y), epochs=1, batch_size=8, device="cpu")

    def test_swag_asks_for_sgd(self) -> None:
        with pytest.warns(
            UserWarning, match="SWAG reads the noise of plain SGD: pass optimizer=torch.optim.SGD .*AdamW"
        ):
            effens.fit(effens.SWAG(mlp, 2), vectors(), epochs=1, device="cpu")


class Loader(DataLoader[Any]):
    """A loader of a length that it only says."""

    def __init__(self, batches: int, says: int | None) -> None:
        x, y = vectors(4 * batches)
        super().__init__(TensorDataset(x, y), 4)
        self.says = says

    def __len__(self) -> int:
        if self.says is None:
            raise TypeError("no length")
        return self.says


class TestLengths:
    """Loaders with a wrong length, or none: the rate never climbs again, the last step is taken, the user is told."""

    @pytest.mark.parametrize("says", [2, 5, 6, 8, 20])
    @pytest.mark.parametrize("epochs", [1, 4])
    def test_a_wrong_length(self, says: int, epochs: int) -> None:
        ensemble = effens.DeepEnsemble(mlp, 2)
        with pytest.warns(UserWarning, match=f"as its length says, {says}, got 6") if says != 6 else nullcontext():
            history = effens.fit(ensemble, Loader(6, says), epochs=epochs, device="cpu")
        assert history.steps == 6 * epochs
        assert bool((history.lrs.diff() <= 0).all())
        if says >= 6 and epochs > 1:
            assert history.lrs[-1] < 0.3 * history.lrs[0]

    @pytest.mark.parametrize("says", [2, 6, 20])
    @pytest.mark.parametrize("make", [effens.SnapshotEnsemble, effens.SWAG])
    def test_members_are_there_at_the_end(self, make: Any, says: int) -> None:
        ensemble = make(mlp, 2)
        with pytest.warns(UserWarning, match="as its length says") if says != 6 else nullcontext():
            effens.fit(ensemble, Loader(6, says), epochs=1, device="cpu")
        assert bool(effens.predict(ensemble, vectors()[0]).isfinite().all())
        if make is effens.SnapshotEnsemble:  # the newest is the network at the last step
            assert torch.equal(ensemble(vectors()[0])[-1], ensemble.network(vectors()[0]))

    def test_no_length(self) -> None:
        answers = []
        for says in (6, None):
            torch.manual_seed(0)
            ensemble = effens.DeepEnsemble(mlp, 2)
            with (
                nullcontext()
                if says
                else pytest.warns(UserWarning, match="data has no length: its batches are counted")
            ):
                effens.fit(ensemble, Loader(6, says), epochs=3, device="cpu")
            answers.append(ensemble(vectors()[0]))
        assert torch.equal(*answers)
