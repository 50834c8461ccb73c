"""Every tensor carries its device: checked on a made-up accelerator without a GPU, and on a GPU where there is one.

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
from pathlib import Path
from typing import Any

import pytest
import scenarios
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import effens

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
    return effens.nets.mlp(4, 3, dropout=0.1)


def cnn() -> nn.Module:
    return effens.nets.cnn(3, size=8)


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
    command, environment = [sys.executable, __file__], os.environ | {"PYTHONPATH": str(root)}
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
        effens.fit(ensembles[-1], (x, y), epochs=3, batch_size=8, rate=0.01, weight_decay=0.1, device=device)
    return ensembles


ENSEMBLES: list[Callable[[], effens.Ensemble]] = [
    lambda: effens.DeepEnsemble(lambda: effens.nets.mlp(4, 3), 3),
    lambda: effens.DeepEnsemble(scenarios.residual, 3),
    lambda: effens.BatchEnsemble(lambda: effens.nets.mlp(4, 3), 3),
    lambda: effens.BatchEnsemble(lambda: effens.nets.mlp(4, 3), 3, split=True),
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
        ensemble = effens.DeepEnsemble(lambda: effens.nets.mlp(4, 3, dropout=0.5).double(), 2)
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
        ensemble = effens.BatchEnsemble(lambda: effens.nets.mlp(4, 3).double(), 3)
        assert effens.fit(ensemble, kind, epochs=1, batch_size=8, device=cuda).steps == 3


@pytest.mark.gpu
@pytest.mark.parametrize("likelihood", [effens.Gaussian(), effens.StudentT()], ids=str)
def test_regression_on_a_gpu(likelihood: effens.Likelihood, cuda: torch.device) -> None:
    x, _ = scenarios.vectors()
    ensemble = effens.DeepEnsemble(lambda: effens.nets.mlp(4, likelihood.outputs or 0).double(), 3)
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
