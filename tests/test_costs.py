"""Counts are exact by formula; times are only times; measuring changes nothing."""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import effens
import effens_book.nets
from effens import costs

INPUTS, WIDTH, CLASSES, MEMBERS = 20, 32, 3, 4
PER_EXAMPLE = 2 * (INPUTS * WIDTH + WIDTH * CLASSES)  # floating-point operations of one network
FLOAT = 4  # bytes
LONG = 8


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small steps are slower on more threads, much slower where something else runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))


class Own(nn.Module):
    """The same network with a forward of its own, which cannot be stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.first(x).relu())
        return logits


def data(n: int = 10) -> tuple[Tensor, Tensor]:
    return torch.randn(n, INPUTS), torch.arange(n) % CLASSES


def measured(ensemble: nn.Module, n: int = 10) -> effens.Costs:
    return effens.measure(ensemble, *data(n), seconds=0)


ENSEMBLES = {
    "one network": (lambda: effens.DeepEnsemble.of([net()]), 1),
    "deep": (lambda: effens.DeepEnsemble(net, MEMBERS), MEMBERS),
    "deep, one member": (lambda: effens.DeepEnsemble(net, 1), 1),
    "deep, looped": (lambda: effens.DeepEnsemble(Own, MEMBERS), MEMBERS),
    "batch": (lambda: effens.BatchEnsemble(net, MEMBERS), MEMBERS),
    "batch, split": (lambda: effens.BatchEnsemble(net, MEMBERS, split=True), MEMBERS),
    "batch, own forward": (lambda: effens.BatchEnsemble(Own, MEMBERS), MEMBERS),
    "mixture of one": (lambda: effens.DeepEnsemble.of([net(), Own()]), 2),
    "snapshot": (lambda: fitted(effens.SnapshotEnsemble(net, MEMBERS)), MEMBERS),
    "SWAG": (lambda: fitted(effens.SWAG(net, MEMBERS)), MEMBERS),
    "hyper": (lambda: effens.HyperEnsemble([net(), Own(), net()], [2, 0, 2]).chosen, 2),
}


def fitted(ensemble: effens.Ensemble) -> effens.Ensemble:
    effens.fit(ensemble, data(), epochs=MEMBERS, device="cpu")
    return ensemble


@pytest.mark.parametrize("name", ENSEMBLES)
def test_every_method_counts_the_same_operations_for_a_member(name: str) -> None:
    make, members = ENSEMBLES[name]
    assert measured(make()).flops == members * PER_EXAMPLE


@pytest.mark.parametrize(("make_net", "slots"), [(net, 1), (Own, MEMBERS)])
def test_mimo_computes_one_network_with_more_heads(make_net: Callable[[], nn.Module], slots: int) -> None:
    """Of a network with a forward of its own, the first layer reads every slot."""
    found = measured(effens.MIMO(make_net, MEMBERS))
    more = 2 * WIDTH * (MEMBERS - 1) * CLASSES + 2 * INPUTS * WIDTH * (slots - 1)
    assert found.flops == PER_EXAMPLE + more  # also where it was never called before
    more = (MEMBERS - 1) * (INPUTS * WIDTH + WIDTH * CLASSES + CLASSES)
    assert found.parameters == INPUTS * WIDTH + WIDTH + WIDTH * CLASSES + CLASSES + more
    assert found.stored_bytes == FLOAT * found.parameters


def test_what_snapshots_and_swag_store() -> None:
    one = INPUTS * WIDTH + WIDTH + WIDTH * CLASSES + CLASSES
    snapshot = measured(fitted(effens.SnapshotEnsemble(net, MEMBERS)))
    assert snapshot.parameters == one  # those that are trained
    assert snapshot.stored_bytes == FLOAT * one * (MEMBERS + 1) + LONG  # and how many there are
    swag = measured(fitted(effens.SWAG(net, MEMBERS, rank=20)))
    assert swag.parameters == one
    assert swag.stored_bytes == FLOAT * one * (MEMBERS + 1 + 20 + 2) + 2 * LONG  # two counters


def test_what_cannot_be_trained_as_one_says_what_to_measure() -> None:
    with pytest.raises(RuntimeError, match="trained already, each with its own settings: effens.search"):
        measured(effens.HyperEnsemble([net(), net()], [0, 1]))


def test_operations_of_convolutions_are_counted_grouped_or_not() -> None:
    def cnn() -> nn.Module:
        return effens_book.nets.cnn(10, channels=4, size=8)

    one = 2 * (8 * 8 * 4 * 9 + 4 * 4 * 8 * 4 * 9 + 8 * 2 * 2 * 10)
    x, y = torch.rand(3, 1, 8, 8), torch.arange(3)
    for ensemble in (
        effens.DeepEnsemble.of([cnn()]),
        effens.DeepEnsemble(cnn, MEMBERS),
        effens.BatchEnsemble(cnn, MEMBERS),
    ):
        assert effens.measure(ensemble, x, y, seconds=0).flops == ensemble.members * one


def test_parameters_and_stored_bytes_are_counted_by_hand() -> None:
    one = INPUTS * WIDTH + WIDTH + WIDTH * CLASSES + CLASSES
    single, deep, batch = (measured(ENSEMBLES[name][0]()) for name in ("one network", "deep", "batch"))
    assert single.parameters == one
    assert deep.parameters == MEMBERS * one
    shared = INPUTS * WIDTH + WIDTH * CLASSES
    assert batch.parameters == shared + MEMBERS * (INPUTS + 2 * WIDTH + WIDTH + 2 * CLASSES)
    for found in (single, deep, batch):
        assert found.stored_bytes == FLOAT * found.parameters


def test_buffers_are_stored_but_not_trained_and_so_are_frozen_weights() -> None:
    def normalized() -> nn.Module:
        return nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, CLASSES))

    trained = INPUTS * WIDTH + WIDTH + 2 * WIDTH + WIDTH * CLASSES + CLASSES
    found = measured(effens.DeepEnsemble.of([normalized()]))
    assert found.parameters == trained
    assert found.stored_bytes == FLOAT * (trained + 2 * WIDTH) + LONG  # two statistics and a count

    ensemble = effens.DeepEnsemble.of([normalized()])
    for parameter in list(ensemble.parameters())[:2]:
        parameter.requires_grad_(False)
    frozen = measured(ensemble)
    assert frozen.parameters == trained - INPUTS * WIDTH - WIDTH
    assert frozen.stored_bytes == found.stored_bytes


def test_half_precision_is_stored_in_half_the_bytes() -> None:
    x, y = data()
    ensemble = effens.DeepEnsemble(net, MEMBERS)
    full = effens.measure(ensemble, x, y, seconds=0)
    half = effens.measure(ensemble.bfloat16(), x.bfloat16(), y, seconds=0)
    assert full.stored_bytes == 2 * half.stored_bytes
    assert full.flops == half.flops


def test_saved_bytes_are_counted_by_hand() -> None:
    """Kept are x, the result of ReLU (the next layer reads it too), log-probabilities, labels, and the total weight."""
    batch = costs.TRAIN_BATCH
    found = measured(effens.DeepEnsemble.of([net()])).saved_bytes
    assert found == FLOAT * batch * (INPUTS + WIDTH + CLASSES) + LONG * batch + FLOAT


def test_saved_bytes_grow_with_members_where_each_has_its_own_batch() -> None:
    rows = costs.TRAIN_BATCH * MEMBERS
    found = measured(effens.DeepEnsemble(net, MEMBERS)).saved_bytes
    assert found == FLOAT * rows * (INPUTS + WIDTH + CLASSES) + LONG * rows + FLOAT


def test_a_split_batch_keeps_less_than_a_tiled_one() -> None:
    tiled, split = (measured(ENSEMBLES[name][0]()).saved_bytes for name in ("batch", "batch, split"))
    assert split < tiled


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(INPUTS, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, CLASSES))


@pytest.mark.parametrize("make", [net, wide])
@pytest.mark.parametrize("method", [effens.DeepEnsemble, effens.BatchEnsemble])
def test_the_peak_holds_what_is_saved_and_all_gradients_and_does_not_grow(
    make: Callable[[], nn.Module], method: type[effens.DeepEnsemble] | type[effens.BatchEnsemble]
) -> None:
    ensemble = method(make, 3)
    first, *later = (measured(ensemble) for _ in range(3))
    batch = (FLOAT * INPUTS + LONG) * costs.TRAIN_BATCH * 3  # is saved, but was there before the step
    assert first.peak_bytes >= first.saved_bytes - batch
    assert first.peak_bytes >= FLOAT * first.parameters
    assert [again.peak_bytes for again in later] == [first.peak_bytes] * 2
    assert [again.saved_bytes for again in later] == [first.saved_bytes] * 2


def test_the_peak_of_a_known_step() -> None:
    kept: list[Tensor] = []

    def step() -> None:
        first = torch.ones(1000)
        second = first + first  # 8,000 bytes alive
        del first
        third = torch.cat([second, second])  # 12,000
        del second, third
        torch.ones(1500)

    for _ in range(2):
        assert costs.peak_bytes(step, torch.device("cpu")) == 12_000
    assert costs.peak_bytes(lambda: None, torch.device("cpu")) == 0
    assert costs.peak_bytes(lambda: kept.append(torch.ones(10)), torch.device("cpu")) == 40
    assert costs.peak_bytes(kept.clear, torch.device("cpu")) == 0


def test_measuring_changes_neither_ensemble_nor_gradients_nor_modes_nor_random_state() -> None:
    def noisy() -> nn.Module:
        return nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(), nn.Linear(WIDTH, CLASSES))

    x, y = data()
    for ensemble in (effens.DeepEnsemble(noisy, 2), effens.BatchEnsemble(noisy, 2, split=True)):
        ensemble(x).sum().backward()
        ensemble.train()
        next(ensemble.children()).eval()
        modes = [module.training for module in ensemble.modules()]
        state, random = copy.deepcopy(ensemble.state_dict()), torch.get_rng_state()
        gradients = [None if p.grad is None else p.grad.clone() for p in ensemble.parameters()]
        x_before, y_before = x.clone(), y.clone()
        effens.measure(ensemble, x, y, seconds=0)
        assert torch.equal(torch.get_rng_state(), random)
        assert [module.training for module in ensemble.modules()] == modes
        assert all(torch.equal(tensor, state[name]) for name, tensor in ensemble.state_dict().items())
        for parameter, gradient in zip(ensemble.parameters(), gradients, strict=True):
            assert parameter.requires_grad
            assert (parameter.grad is None) == (gradient is None)
            assert gradient is None or (parameter.grad is not None and torch.equal(parameter.grad, gradient))
        assert torch.equal(x, x_before)
        assert torch.equal(y, y_before)


def test_times_are_positive_in_order_and_for_both_batches() -> None:
    found = measured(effens.DeepEnsemble(net, 2))
    assert found.train_seconds > 0
    assert set(found.latency_p50) == set(found.latency_p99) == {1, 256}
    assert all(0 < found.latency_p50[size] <= found.latency_p99[size] for size in (1, 256))
    assert found.threads == torch.get_num_threads()
    assert found.device == "cpu"


def test_durations_call_until_the_time_is_up_and_ten_times_at_least() -> None:
    calls: list[int] = []
    place = torch.device("cpu")
    assert len(costs.durations(lambda: calls.append(1), 0.0, place)) == 10
    assert len(calls) == 13
    times = costs.durations(lambda: None, 0.01, place)
    assert times.dtype == torch.float64
    assert times.sum() >= 0.01


@pytest.mark.parametrize("n", [1, 7, 300])
def test_any_number_of_rows_gives_the_same_counts(n: int) -> None:
    few, many = measured(effens.DeepEnsemble(net, 2), n), measured(effens.DeepEnsemble(net, 2), 128)
    counts = ("parameters", "stored_bytes", "saved_bytes", "flops")
    assert [getattr(few, name) for name in counts] == [getattr(many, name) for name in counts]


@pytest.mark.parametrize(("likelihood", "outputs"), [(effens.Gaussian(), 2), (effens.StudentT(), 3)])
def test_regression_is_measured_with_its_own_likelihood(likelihood: effens.Likelihood, outputs: int) -> None:
    def regression() -> nn.Module:
        return nn.Linear(INPUTS, outputs)

    found = effens.measure(
        effens.DeepEnsemble(regression, 2), torch.randn(9, INPUTS), torch.randn(9), likelihood=likelihood, seconds=0
    )
    assert found.flops == 2 * 2 * INPUTS * outputs
    assert found.saved_bytes > 0


def test_a_plain_network_is_timed_as_it_is() -> None:
    """The baseline of all costs: what is in between a network and its user is not the network's cost."""
    calls: list[type] = []

    class Seen(nn.Linear):
        def __call__(self, x: Tensor) -> Tensor:
            calls.append(type(self))
            result: Tensor = super().__call__(x)
            return result

    class Watched(nn.Sequential):
        def __call__(self, x: Tensor) -> Tensor:
            calls.append(type(self))
            result: Tensor = super().__call__(x)
            return result

    found, one = (
        measured(Watched(Seen(INPUTS, CLASSES))),
        measured(effens.DeepEnsemble.of([nn.Linear(INPUTS, CLASSES)])),
    )
    assert (found.parameters, found.stored_bytes, found.flops) == (one.parameters, one.stored_bytes, one.flops)
    assert found.saved_bytes == one.saved_bytes
    assert set(found.latency_p50) == {1, 256}
    assert calls[-2:] == [Watched, Seen]  # the last prediction: nothing but the network and its layer


def test_errors_say_the_rule_and_the_value() -> None:
    x, y = data()
    ensemble = effens.DeepEnsemble(net, 2)
    for wrong in ((x[:0], y[:0]), (x, y[:3])):
        message = f"x and y must have the same length >= 1, got {len(wrong[0])} and {len(wrong[1])}"
        with pytest.raises(ValueError, match=message):
            effens.measure(ensemble, *wrong)
    with pytest.raises(ValueError, match=r"labels must be in 0 \.\.\. 2, got 0 \.\.\. 3"):
        effens.measure(ensemble, x, torch.arange(10) % 4)
    with pytest.raises(ValueError, match=r"labels must be integers, got torch\.float32"):
        effens.measure(ensemble, x, y.float())
    with pytest.raises(ValueError, match="Gaussian needs 2 outputs, got 3"):
        effens.measure(ensemble, x, y.float(), likelihood=effens.Gaussian())
    with pytest.raises(ValueError, match="the ensemble must have weights to train, got none that require gradients"):
        effens.measure(effens.DeepEnsemble(nn.Softplus, 2), x, y)


def test_the_random_state_is_kept_where_measuring_fails() -> None:
    ensemble = effens.DeepEnsemble.of([nn.Sequential(nn.Dropout(), net())])
    x, y = data()
    random = torch.get_rng_state()
    with pytest.raises(ValueError, match="Gaussian needs"):
        effens.measure(ensemble, x, y.float(), likelihood=effens.Gaussian())
    assert torch.equal(torch.get_rng_state(), random)


QUIET = """
import torch, effens
from torch import nn
for _ in range(2):
    ensemble = effens.DeepEnsemble(lambda: nn.Linear(4, 3), 2)
    effens.measure(ensemble, torch.randn(5, 4), torch.zeros(5, dtype=torch.long), seconds=0)
"""


def test_nothing_is_printed() -> None:
    run = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True, check=True)
    assert run.stdout == ""
    assert run.stderr == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_counts_the_same() -> None:
    x, y = data()
    ensemble = effens.DeepEnsemble(net, MEMBERS)
    here, there = effens.measure(ensemble, x, y, seconds=0), effens.measure(ensemble.cuda(), x, y, seconds=0)
    for name in ("parameters", "stored_bytes", "saved_bytes", "flops"):
        assert getattr(here, name) == getattr(there, name)
    assert there.peak_bytes >= FLOAT * there.parameters
    assert there.device == torch.cuda.get_device_name()
