"""Every tensor carries its device: checked on a made-up accelerator without a GPU, and on a GPU where there is one.

So is what is there for a GPU's sake: products in bfloat16, compiled networks, transfers that nobody waits
for. Each has its plain form on a CPU.

The made-up accelerator stores nothing, and raises where tensors of two devices meet. It changes the process that it is
in, so that its cases run in one of their own: ``python tests/test_device.py``. It does not see everything (convolution
weights left on the CPU, fused optimizers, generators): that is left to the tests marked ``gpu``.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import scenarios
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import effens
import effens_book.nets
from effens import batches

DEVICE = "fakeacc"


def layers() -> None:
    linear = effens.BatchEnsembleLinear(4, 8, members=3)
    convolution = effens.BatchEnsembleConv2d(2, 4, 3, members=3, groups=2)
    for batch in (2, 200):  # both formulas
        linear(torch.randn(3 * batch, 4, device=DEVICE)).sum().backward()
        linear.forward_shared(torch.randn(batch, 4, device=DEVICE)).sum().backward()
        convolution(torch.randn(3 * batch, 2, 9, 9, device=DEVICE)).sum().backward()
        convolution.forward_shared(torch.randn(batch, 2, 9, 9, device=DEVICE)).sum().backward()


def train(ensemble: effens.Ensemble, x: Tensor) -> None:
    """Two steps as the training loop takes them, and a prediction."""
    y = torch.zeros(len(x), dtype=torch.int64, device=DEVICE)
    descent = torch.optim.AdamW(ensemble.parameter_groups(1e-3, 0.1))
    for ask in (lambda: ensemble(x), lambda: ensemble.forward_members(torch.stack([x] * ensemble.streams))):
        outputs = ask()
        ensemble.reduce(effens.Categorical().nll(outputs, y)).backward()
        descent.step()
        assert outputs.device.type == DEVICE
    assert all(p.grad is not None and p.grad.device.type == DEVICE for p in ensemble.parameters())
    assert effens.predict(ensemble, x, chunk=3).device.type == DEVICE


def take_member(ensemble: effens.Ensemble, x: Tensor) -> None:
    """A member as a plain network stands where the ensemble stands."""
    member = ensemble.member(1)
    assert all(parameter.device.type == DEVICE for parameter in member.parameters())
    assert member(x).device.type == DEVICE


def mlp() -> nn.Module:
    return effens_book.nets.mlp(4, 3, dropout=0.1)


def cnn() -> nn.Module:
    return effens_book.nets.cnn(3, size=8)


def deep() -> None:
    for make_net, x in ((mlp, torch.randn(5, 4, device=DEVICE)), (cnn, torch.randn(5, 1, 8, 8, device=DEVICE))):
        ensemble = effens.DeepEnsemble(make_net, 3)
        train(ensemble, x)
        take_member(ensemble, x)
    looped = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    train(effens.DeepEnsemble.of([looped, mlp()]), torch.randn(5, 4, device=DEVICE))


# Snapshots and SWAG copy their network, which tensors of a made-up device do not allow: see the tests on a GPU.
def mimo() -> None:
    for make_net, x in ((mlp, torch.randn(5, 4, device=DEVICE)), (cnn, torch.randn(5, 1, 8, 8, device=DEVICE))):
        for share in (0.0, 0.5):
            train(effens.MIMO(make_net, 3, share=share), x)


def batch() -> None:
    for make_net, x in ((mlp, torch.randn(5, 4, device=DEVICE)), (cnn, torch.randn(5, 1, 8, 8, device=DEVICE))):
        for init in ("signs", "normal", "ones"):
            ensemble = effens.BatchEnsemble(make_net, 3, init=init)
            train(ensemble, x)
            take_member(ensemble, x)


def likelihoods() -> None:
    y = torch.randn(5, device=DEVICE)
    outputs = torch.randn(3, 5, 2, device=DEVICE, requires_grad=True)
    effens.Gaussian().nll(outputs, y).sum().backward()
    whole = effens.mixture(effens.Gaussian().predict(outputs))
    for tensor in (whole.log_prob(y), whole.mean, whole.variance):
        assert tensor.device.type == DEVICE
    classes = torch.randn(3, 5, 4, device=DEVICE, requires_grad=True)
    effens.Categorical().nll(classes, torch.zeros(5, dtype=torch.int64, device=DEVICE)).sum().backward()


def mistakes() -> None:
    """The made-up accelerator tells: a CPU tensor that meets one of its own is an error."""
    for make in (effens.DeepEnsemble, effens.BatchEnsemble):
        ensemble = make(mlp, 3)
        try:
            ensemble(torch.randn(5, 4, device="cpu"))
        except RuntimeError as error:
            assert "device" in str(error), error  # noqa: PT017, no pytest in this process
        else:
            raise AssertionError("a CPU tensor went through an ensemble on another device")


CASES: dict[str, Callable[[], None]] = {
    case.__name__: case for case in (layers, deep, batch, mimo, likelihoods, mistakes)
}


@pytest.fixture(scope="module")
def reports() -> dict[str, str]:
    """What went wrong in each case, if anything."""
    root = Path(effens.__file__).parents[1]
    command, environment = (
        [sys.executable, __file__],
        os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "chapters")])},
    )
    found = subprocess.run(command, cwd=root, env=environment, text=True, stdout=subprocess.PIPE, check=True).stdout
    return dict(json.loads(found.splitlines()[-1]))


@pytest.mark.parametrize("case", CASES)
def test_on_a_made_up_accelerator(case: str, reports: dict[str, str]) -> None:
    assert reports[case] == ""


@pytest.fixture
def cuda() -> torch.device:
    """A GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")


def on_both(make: Callable[[], effens.Ensemble], x: Tensor, y: Tensor, place: torch.device) -> list[effens.Ensemble]:
    """The same ensemble trained on the CPU and on the device."""
    ensembles = []
    for device in ("cpu", place):
        torch.manual_seed(0)
        ensembles.append(make().double())
        effens.fit(ensembles[-1], (x, y), epochs=3, batch_size=8, lr=0.01, weight_decay=0.1, device=device)
    return ensembles


ENSEMBLES: list[Callable[[], effens.Ensemble]] = [
    lambda: effens.DeepEnsemble(lambda: effens_book.nets.mlp(4, 3), 3),
    lambda: effens.DeepEnsemble(scenarios.residual, 3),
    lambda: effens.BatchEnsemble(lambda: effens_book.nets.mlp(4, 3), 3),
    lambda: effens.BatchEnsemble(lambda: effens_book.nets.mlp(4, 3), 3, split=True),
    lambda: effens.DeepEnsemble(cnn, 3),
    lambda: effens.DeepEnsemble(scenarios.normed, 3),
    lambda: effens.BatchEnsemble(cnn, 3),
    lambda: effens.SnapshotEnsemble(cnn, 3),
    lambda: effens.SWAG(cnn, 3, rank=4),
    lambda: effens.MIMO(cnn, 3, share=0.5),
]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("make", "data"), list(zip(ENSEMBLES, [scenarios.vectors] * 4 + [scenarios.images] * 6, strict=True))
)
def test_trains_and_predicts_on_a_gpu_as_on_a_cpu(make: Any, data: Any, cuda: torch.device) -> None:
    x, y = data()
    on_cpu, on_gpu = on_both(make, x, y, cuda)
    assert all(tensor.is_cuda for tensor in on_gpu.state_dict().values())
    expected = effens.predict(on_cpu, x)
    for place in ("cpu", cuda):  # the answer comes back to where x is
        probs = effens.predict(on_gpu, x.to(place))
        assert probs.device == x.to(place).device
        assert torch.allclose(probs.cpu(), expected, rtol=1e-6, atol=1e-8)
    assert on_gpu.member(0)(x.to(cuda)).is_cuda


@pytest.mark.gpu
def test_training_on_a_gpu_leaves_its_random_state(cuda: torch.device) -> None:
    losses = []
    for noise in (5, 6):
        torch.manual_seed(0)
        ensemble = effens.DeepEnsemble(lambda: effens_book.nets.mlp(4, 3, dropout=0.5).double(), 2)
        torch.manual_seed(noise)
        states = torch.get_rng_state(), torch.cuda.get_rng_state()
        losses.append(effens.fit(ensemble, scenarios.vectors(), epochs=2, device=cuda).losses)
        assert torch.equal(states[0], torch.get_rng_state())
        assert torch.equal(states[1], torch.cuda.get_rng_state())
    assert torch.equal(losses[0], losses[1])  # dropout on the GPU follows the seed, too
    assert not losses[0].is_cuda


@pytest.mark.gpu
def test_data_of_every_kind_reaches_a_gpu(cuda: torch.device) -> None:
    x, y = scenarios.vectors()
    data = TensorDataset(x, y)
    for kind in ((x.to(cuda), y.to(cuda)), (x, y.to(cuda)), data, DataLoader(data, batch_size=8, pin_memory=True)):
        ensemble = effens.BatchEnsemble(lambda: effens_book.nets.mlp(4, 3).double(), 3)
        assert effens.fit(ensemble, kind, epochs=1, batch_size=8, device=cuda).steps == 3


@pytest.mark.gpu
@pytest.mark.parametrize("likelihood", [effens.Gaussian(), effens.StudentT()], ids=str)
def test_regression_on_a_gpu(likelihood: effens.Likelihood, cuda: torch.device) -> None:
    x, _ = scenarios.vectors()
    ensemble = effens.DeepEnsemble(lambda: effens_book.nets.mlp(4, likelihood.outputs or 0).double(), 3)
    effens.fit(ensemble, (x, x[:, 0]), epochs=2, likelihood=likelihood, device=cuda)
    found = effens.predict(ensemble, x.to(cuda), likelihood=likelihood)
    whole = effens.mixture(found)
    assert whole.log_prob(x[:, 0].to(cuda)).is_cuda
    assert torch.allclose(
        whole.mean.cpu(), effens.mixture(effens.predict(ensemble.cpu(), x, likelihood=likelihood)).mean
    )


@pytest.mark.gpu
def test_scores_on_a_gpu(cuda: torch.device) -> None:
    probs, y = torch.rand(3, 50, 4).double().softmax(-1), torch.randint(0, 4, (50,))
    for score in (effens.nll, effens.brier, effens.ece, effens.accuracy, effens.member_nll, effens.diversity_gain):
        assert float(score(probs.to(cuda), y.to(cuda))) == pytest.approx(float(score(probs, y)))
    for uncertainty in (effens.total_entropy, effens.expected_entropy, effens.mutual_information):
        assert uncertainty(probs.to(cuda)).is_cuda


# ---- Products in bfloat16. ----

PLACES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def place(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, or a GPU where there is one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)


def singles(data: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    x, y = data()
    return x.float(), y


def made(make: Callable[[], effens.Ensemble]) -> effens.Ensemble:
    """The same ensemble at every call, in float32."""
    torch.manual_seed(0)
    return make().float()


SHORT: dict[str, Any] = {"epochs": 2, "batch_size": 8, "lr": 0.01, "weight_decay": 0.1}
EVERY = list(zip(ENSEMBLES, [scenarios.vectors] * 4 + [scenarios.images] * 6, strict=True))


class Spy(nn.Linear):
    """A layer that writes down in which precision it answers."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.seen.append(y.dtype)
        return y


@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_products_are_taken_in_the_precision_that_was_asked_for(place: torch.device) -> None:
    x, y = singles(scenarios.vectors)
    for precision, expected in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        spy = Spy()
        ensemble = effens.DeepEnsemble.of([spy])
        history = effens.fit(ensemble, (x, y), **SHORT, device=place, precision=precision)
        probs = effens.predict(ensemble, x, precision=precision)
        assert set(spy.seen) == {expected}
        assert len(spy.seen) == 7
        assert {probs.dtype, history.losses.dtype, *(p.dtype for p in ensemble.parameters())} == {torch.float32}
        assert torch.allclose(probs.sum(2), torch.ones(1, len(x)))  # in bfloat16 the sum would be 1% off
    with torch.autocast(place.type, torch.bfloat16):  # a reader's own is left alone
        effens.predict(ensemble, x)
    assert spy.seen[-1] == torch.bfloat16


@pytest.mark.parametrize("place", PLACES, indirect=True)
@pytest.mark.parametrize(("make", "data"), EVERY)
def test_bfloat16_costs_digits_and_nothing_else(make: Any, data: Any, place: torch.device) -> None:
    x, y = singles(data)
    full, half = made(make), made(make)
    expected = effens.fit(full, (x, y), **SHORT, device=place)
    found = effens.fit(half, (x, y), **SHORT, device=place, precision="bfloat16")
    assert torch.equal(found.lrs, expected.lrs)
    assert not torch.equal(found.losses, expected.losses)
    assert torch.allclose(found.losses, expected.losses, rtol=0.05, atol=0.05)
    assert all(p.dtype == torch.float32 for p in half.parameters())
    probs = effens.predict(full, x)
    assert torch.allclose(effens.predict(full, x, precision="bfloat16"), probs, atol=0.03)


@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_bfloat16_leaves_doubles_alone(place: torch.device) -> None:
    x, y = scenarios.vectors()
    losses = [
        effens.fit(made(ENSEMBLES[0]).double(), (x, y), **SHORT, device=place, precision=precision).losses
        for precision in ("float32", "bfloat16")
    ]
    assert torch.equal(*losses)


def test_an_unknown_precision_is_refused() -> None:
    ensemble, (x, y) = made(ENSEMBLES[0]), singles(scenarios.vectors)
    message = "precision must be 'float32' or 'bfloat16', got 'float16'"
    with pytest.raises(ValueError, match=message):
        effens.fit(ensemble, (x, y), precision="float16", device="cpu")
    with pytest.raises(ValueError, match=message):
        effens.predict(ensemble, x, precision="float16")


# ---- Compiled networks. ----


@pytest.mark.parametrize("make", [ENSEMBLES[0], ENSEMBLES[2], lambda: effens.MIMO(scenarios.mlp, 3)])
def test_networks_can_be_traced(make: Any) -> None:
    ensemble, (x, _) = made(make).to(torch.float64).eval(), scenarios.vectors()
    xs = torch.stack([x] * ensemble.streams)
    torch.compiler.reset()
    for ask, rows in ((ensemble, x), (ensemble.forward_members, xs)):
        found = torch.compile(ask, backend="eager", fullgraph=True)(rows)
        assert torch.allclose(found, ask(rows))


# ---- Transfers. ----


def test_on_a_cpu_nothing_is_moved() -> None:
    x, cpu = torch.randn(5, 3), torch.device("cpu")
    assert batches.to_device(x, cpu) is x


class Slow(Dataset[Any]):
    """Large examples, that take longer to copy than a step takes."""

    def __len__(self) -> int:
        return 96

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(i)
        return torch.randn(20_000, generator=generator), torch.tensor(i % 3)


@pytest.mark.gpu
def test_every_kind_of_data_trains_the_same(cuda: torch.device) -> None:
    data = Slow()
    x, y = (torch.stack(part) for part in zip(*[data[i] for i in range(len(data))], strict=True))
    options: dict[str, Any] = {"epochs": 3, "batch_size": 16, "lr": 1e-5, "optimizer": torch.optim.SGD}
    losses = []
    for kind in ((x, y), (x.to(cuda), y.to(cuda)), data):
        ensemble = made(lambda: effens.DeepEnsemble(lambda: nn.Linear(20_000, 3), 2))
        losses.append(effens.fit(ensemble, kind, **options, device=cuda).losses)
    for pinned in (False, True):
        loader = DataLoader(data, batch_size=16, pin_memory=pinned)
        ensemble = made(lambda: effens.BatchEnsemble(lambda: nn.Linear(20_000, 3), 2))
        losses.append(effens.fit(ensemble, loader, **options, device=cuda).losses)
    for one, other in ((0, 1), (0, 2), (3, 4)):
        assert torch.allclose(losses[one], losses[other], rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_answers_have_arrived_when_they_are_read(cuda: torch.device) -> None:
    ensemble = made(lambda: effens.DeepEnsemble(partial(effens_book.nets.mlp, 4, 10, width=512), 8)).to(cuda)
    x = torch.randn(50_000, 4)
    probs = effens.predict(ensemble, x, chunk=512)
    again = effens.predict(ensemble, x.to(cuda), chunk=512)
    assert again.is_cuda
    torch.testing.assert_close(probs, again.cpu(), rtol=0, atol=1e-6)  # each device has its own softmax
    assert torch.allclose(probs.sum(2), torch.ones(8, 50_000))


# ---- Checkpoints. ----


class Stopped(BaseException):
    pass


def resumed(make: Callable[[], effens.Ensemble], path: Path, place: torch.device, **options: Any) -> None:
    """A run that is stopped in its fourth step must end, once resumed, bit by bit as one that was not."""
    x, y = singles(scenarios.vectors)
    options = {**SHORT, **options, "device": place}
    whole, part, last = made(make), made(make), made(make)
    expected = effens.fit(whole, (x, y), **options)
    steps, backward = iter(range(3)), Tensor.backward

    def stop(loss: Tensor) -> None:
        if next(steps, None) is None:
            raise Stopped
        backward(loss)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "backward", stop)
        with pytest.raises(Stopped):
            effens.fit(part, (x, y), **options, checkpoint=path)
    found = effens.fit(last, (x, y), **options, checkpoint=path)
    assert torch.equal(found.losses, expected.losses)
    state = last.state_dict()
    assert [name for name, tensor in whole.state_dict().items() if not torch.equal(tensor, state[name])] == []


@pytest.mark.parametrize("place", PLACES, indirect=True)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "method", [effens.DeepEnsemble, effens.BatchEnsemble, effens.SnapshotEnsemble, effens.SWAG, effens.MIMO]
)
def test_a_run_resumes_on_its_device(method: Any, precision: str, place: torch.device, tmp_path: Path) -> None:
    net = partial(effens_book.nets.mlp, 4, 3, dropout=0.5)
    resumed(lambda: method(net, 2), tmp_path / "run", place, precision=precision)
    other = {"float32": "bfloat16", "bfloat16": "float32"}[precision]
    options: dict[str, Any] = {**SHORT, "device": place, "precision": other, "checkpoint": tmp_path / "run"}
    with pytest.raises(ValueError, match="must be a checkpoint of the same call, got precision"):
        effens.fit(method(net, 2), singles(scenarios.vectors), **options)


@pytest.mark.gpu
def test_a_run_of_a_gpu_is_not_continued_on_a_cpu(cuda: torch.device, tmp_path: Path) -> None:
    options: dict[str, Any] = {**SHORT, "checkpoint": tmp_path / "run"}
    data = singles(scenarios.vectors)
    effens.fit(made(ENSEMBLES[0]), data, **options, device=cuda)
    with pytest.raises(ValueError, match="must be a checkpoint of the same call, got device cuda instead of cpu"):
        effens.fit(made(ENSEMBLES[0]), data, **options, device="cpu")


def report(case: Callable[[], None]) -> str:
    """Run a case; return its traceback, if it has one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode(), torch.device(DEVICE):
            case()
    except Exception:
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(DEVICE)
    print(json.dumps({name: report(case) for name, case in CASES.items()}))
