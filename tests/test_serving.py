"""An exported ensemble answers as the ensemble does, from one file, and refuses whatever it was not made for."""

import importlib.util
import json
import math
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from scenarios import generator
from torch import Tensor, nn

import effens
import effens_book.nets
from effens import costs, serving
from effens.ensembles.deep import Mixture
from effens.ensembles.layers import MemberLayer
from effens_book.baselines import MCDropout

Make = Callable[[Callable[[], nn.Module]], effens.Ensemble]
MISSING = [package for package in serving.PACKAGES if importlib.util.find_spec(package) is None]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
BACKENDS = [pytest.param("aoti", marks=pytest.mark.slow), pytest.param("onnx", marks=needs_onnx)]
FIT: dict[str, Any] = {"epochs": 1, "batch_size": 8, "lr": 0.1, "device": "cpu", "progress": False}
LIKELIHOODS = {"classes": effens.Categorical(), "gaussian": effens.Gaussian(), "student": effens.StudentT()}


def answering(ensemble: effens.Ensemble) -> effens.Ensemble:
    """What is exported of an ensemble."""
    return ensemble.answering()[0]


class Location(effens.Likelihood):
    """The members' own answers, whose spread is how far they disagree."""

    def predict(self, outputs: Tensor) -> Tensor:
        return outputs[..., 0]


class Residual(nn.Module):
    """A network with a forward of its own, over sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        head: Tensor = self.head((x + self.inner(x).tanh()).mean(1))
        return head


def mlp(outputs: int = 3) -> nn.Module:
    return effens_book.nets.mlp(4, outputs, width=8, dropout=0.2)


def cnn(outputs: int = 3) -> nn.Module:
    """Two convolutions, the second one grouped, with batch norm."""
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, outputs)),
    )


def hyper(net: Callable[[], nn.Module]) -> effens.Ensemble:
    return effens.HyperEnsemble([net() for _ in range(3)], [2, 0, 2, 2])


def multiswag(net: Callable[[], nn.Module]) -> effens.Ensemble:
    return effens.DeepEnsemble.of([effens.SWAG(net, 2, rank=2), effens.SWAG(net, 3, rank=2)])


METHODS: dict[str, Make] = {
    "one": lambda net: effens.DeepEnsemble(net, 1),
    "deep": lambda net: effens.DeepEnsemble(net, 3),
    "deep of networks": lambda net: effens.DeepEnsemble.of([net(), net()]),
    "batch": lambda net: effens.BatchEnsemble(net, 3, init="normal"),
    "snapshot": lambda net: effens.SnapshotEnsemble(net, 2),
    "swag": lambda net: effens.SWAG(net, 3, rank=2),
    "mimo": lambda net: effens.MIMO(net, 3),
    "hyper": hyper,
    "multiswag": multiswag,
    "mixed": lambda net: effens.DeepEnsemble.of([hyper(net), effens.BatchEnsemble(net, 2)]),
}
SHAPES = {mlp: (4,), cnn: (1, 8, 8), Residual: (5, 4)}


def inputs(net: Any, rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, *SHAPES[net], generator=generator(seed))


@cache
def trained(method: str, net: Any = mlp, outputs: int = 3) -> effens.Ensemble:
    """An ensemble with members, whose weights and batch-norm statistics are not those of a fresh one."""
    torch.manual_seed(0)
    ensemble = METHODS[method]((lambda: net(outputs)) if net is not Residual else Residual)
    for part in ensemble.parts() if isinstance(ensemble, Mixture) else [ensemble]:
        if not isinstance(part, effens.HyperEnsemble):
            x = inputs(net, 32)
            effens.fit(part, (x, torch.randint(0, 2, (32,))), likelihood=None if outputs == 3 else REGRESSION, **FIT)
    return ensemble


class Loss(effens.Likelihood):
    """Something to train two outputs on, of integers."""

    def nll(self, outputs: Tensor, y: Tensor) -> Tensor:
        return effens.Gaussian().nll(outputs, y.float())


REGRESSION = Loss()


def expected(ensemble: effens.Ensemble, x: Tensor, likelihood: effens.Likelihood) -> tuple[Tensor, Tensor]:
    """The mean and the spread as `effens.predict` has them, in the obvious way."""
    answer = effens.predict(ensemble, x, likelihood=likelihood)
    if isinstance(answer, Tensor):
        return answer.mean(0), answer.std(0, correction=0)
    return effens.mixture(answer).mean, effens.mixture(answer).stddev


def far(served: serving.Served, ensemble: effens.Ensemble, x: Tensor, likelihood: effens.Likelihood) -> float:
    """How far an answer is from that of the ensemble, of the larger of 1 and its size: rounding grows with a number.

    Student's t with hardly more than 2 degrees of freedom has a spread of 25 where outputs are near 1, and PyTorch's
    own answer is then off by some 1e-4 in float32.
    """
    pairs = list(zip(served(x), expected(ensemble, x, likelihood), strict=True))
    assert all(mine.shape == its.shape and mine.dtype == its.dtype for mine, its in pairs)
    return max(float(((mine - its).abs() / its.abs().clamp_min(1)).max()) for mine, its in pairs)


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> tuple[serving.Served, Path]:
    """The one compiled file that the quick tests share."""
    path = tmp_path_factory.mktemp("served") / "batch.pt2"
    return serving.export(trained("batch"), inputs(mlp, 2), path), path


@pytest.mark.slow
def test_a_compiled_file_answers_as_the_ensemble(batch: tuple[serving.Served, Path]) -> None:
    for seed in range(5):
        assert far(batch[0], trained("batch"), inputs(mlp, 2, seed), effens.Categorical()) < 1e-6


def test_it_says_what_it_is(batch: tuple[serving.Served, Path]) -> None:
    served, path = batch
    assert (served.backend, tuple(served.shape), served.dtype) == ("aoti", (2, 4), torch.float32)
    assert repr(serving.load_served(path)) == repr(served) == "Served('aoti', (2, 4), members=3, Categorical(axis=-1))"


def test_nothing_is_written_beside_it(batch: tuple[serving.Served, Path]) -> None:
    assert os.listdir(batch[1].parent) == ["batch.pt2"]


def test_layouts_and_gradients_of_the_input_change_nothing(batch: tuple[serving.Served, Path]) -> None:
    served, x = batch[0], inputs(mlp, 2)
    turned = x.T.contiguous().T
    assert not turned.is_contiguous()
    for other in (turned, x.clone().requires_grad_(), nn.Parameter(x)):
        for mine, its in zip(served(other), served(x), strict=True):
            assert torch.equal(mine, its)
            assert not mine.requires_grad


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.zeros(3, 4), r"shape \(2, 4\).*got shape \(3, 4\)"),
        (torch.zeros(2, 5), r"got shape \(2, 5\)"),
        (torch.zeros(4), r"got shape \(4,\)"),
        (torch.zeros(2, 4, dtype=torch.float64), "float32.*got.*float64"),
        (torch.zeros(2, 4, device="meta"), "on cpu, got.*on meta"),
        ([[0.0] * 4] * 2, "x must be a tensor, got list"),
    ],
    ids=["rows", "features", "dimensions", "dtype", "device", "list"],
)
def test_other_inputs_are_refused(batch: tuple[serving.Served, Path], x: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        batch[0](x)


def test_answers_stay_when_it_is_asked_again(batch: tuple[serving.Served, Path]) -> None:
    mean, spread = batch[0](inputs(mlp, 2))
    before = mean.clone(), spread.clone()
    batch[0](inputs(mlp, 2, seed=1))
    assert torch.equal(mean, before[0])
    assert torch.equal(spread, before[1])


def asked_by_threads(served: serving.Served, net: Any, rows: int) -> bool:
    """Whether four threads that ask at a time get what one gets."""
    xs = [inputs(net, rows, seed) for seed in range(4)]
    alone = [served(x) for x in xs]
    wrong = []

    def ask(x: Tensor, its: tuple[Tensor, Tensor]) -> None:
        for _ in range(200):
            if not all(torch.equal(a, b) for a, b in zip(served(x), its, strict=True)):
                wrong.append(x)

    threads = [threading.Thread(target=ask, args=pair) for pair in zip(xs, alone, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return not wrong


def test_several_threads_may_ask(batch: tuple[serving.Served, Path]) -> None:
    assert asked_by_threads(batch[0], mlp, 2)


def answers_elsewhere(path: Path, x: Tensor) -> list[list[Any]]:
    """What the file answers in a new process, started in another folder, that makes no ensemble."""
    code = (
        "import sys, json, torch; from effens import serving;"
        f"served = serving.load_served({str(path)!r});"
        f"print(json.dumps([t.tolist() for t in served(torch.tensor({x.tolist()}))]))"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(effens.__file__).parents[1])}
    ran = subprocess.run([sys.executable, "-c", code], cwd="/", env=env, capture_output=True, text=True, check=True)
    answer: list[list[Any]] = json.loads(ran.stdout)
    return answer


@pytest.mark.slow
def test_a_new_process_gets_the_same_answers(batch: tuple[serving.Served, Path]) -> None:
    x = inputs(mlp, 2)
    assert answers_elsewhere(batch[1], x) == [answer.tolist() for answer in batch[0](x)]


def test_the_ensemble_is_left_as_it_was() -> None:
    ensemble = trained("batch").train()
    before = {name: tensor.clone() for name, tensor in ensemble.state_dict().items()}
    strides = [p.stride() for p in ensemble.parameters()]
    serving.Summary(ensemble, effens.Categorical()).eval().requires_grad_(False)
    assert all(module.training for module in ensemble.modules())
    assert all(p.requires_grad for p in ensemble.parameters())
    assert [p.stride() for p in ensemble.parameters()] == strides
    assert all(torch.equal(tensor, before[name]) for name, tensor in ensemble.state_dict().items())


@pytest.mark.parametrize("likelihood", [*LIKELIHOODS, "location"])
@pytest.mark.parametrize("net", [mlp, cnn])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [1, 3])
def test_what_is_exported_equals_predict(method: str, net: Any, likelihood: str, rows: int) -> None:
    meaning = LIKELIHOODS.get(likelihood, Location())
    ensemble, x = trained(method, net, meaning.outputs or 3), inputs(net, rows)
    summary = serving.Summary(ensemble, meaning).eval()
    with torch.no_grad():
        pairs = zip(summary(x), expected(ensemble, x, meaning), strict=True)
    assert all(torch.allclose(mine, its, rtol=1e-5, atol=1e-6) for mine, its in pairs)


# Each method once, both networks, every likelihood: compiling takes seconds. The whole product runs uncompiled above.
@pytest.mark.parametrize(
    ("method", "net", "likelihood"),
    list(zip(METHODS, [mlp, cnn] * 5, ["classes", "classes", "gaussian", "gaussian", "student"] * 2, strict=True)),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_method_and_likelihood(backend: str, method: str, net: Any, likelihood: str, tmp_path: Path) -> None:
    meaning = LIKELIHOODS[likelihood]
    ensemble = trained(method, net, meaning.outputs or 3)
    path = tmp_path / "served"
    served = serving.export(ensemble, inputs(net, 3), path, backend, likelihood=meaning)
    assert far(served, ensemble, inputs(net, 3, seed=1), meaning) < 1e-5
    assert far(serving.load_served(path), ensemble, inputs(net, 3, seed=2), meaning) < 1e-5
    assert os.listdir(tmp_path) == ["served"]


@pytest.mark.parametrize("method", ["deep", "batch", "swag"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_row_and_sequences_through_a_forward_of_its_own(backend: str, method: str, tmp_path: Path) -> None:
    ensemble, x = trained(method, Residual), inputs(Residual, 1)
    served = serving.export(ensemble, x, tmp_path / "served", backend)
    assert far(served, ensemble, inputs(Residual, 1, seed=1), effens.Categorical()) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_precision(backend: str, tmp_path: Path) -> None:
    ensemble, x = effens.DeepEnsemble(lambda: mlp().double(), 3), inputs(mlp, 2).double()
    served = serving.export(ensemble, x, tmp_path / "served", backend)
    assert far(served, ensemble, x, effens.Categorical()) < 1e-14


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_in_double_precision(backend: str, tmp_path: Path) -> None:
    ensemble = effens.HyperEnsemble([mlp().double(), mlp().double()], [0, 0, 1])
    x = inputs(mlp, 2).double()
    assert far(serving.export(ensemble, x, tmp_path / "served", backend), ensemble, x, effens.Categorical()) < 1e-14


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_more_of_a_compiled_and_an_interpreted_file(backend: str, tmp_path: Path) -> None:
    ensemble, x, path = trained("deep", cnn), inputs(cnn, 2), tmp_path / "served"
    served = serving.export(ensemble, x, path, backend)
    assert answers_elsewhere(path, x) == [answer.tolist() for answer in served(x)]
    assert asked_by_threads(served, cnn, 2)
    with pytest.raises(ValueError, match=r"got shape \(3, 1, 8, 8\)"):
        served(inputs(cnn, 3))


def test_a_likelihood_is_named_as_everywhere() -> None:
    export: Any = serving.export
    with pytest.raises(TypeError, match="positional"):
        export(trained("deep"), inputs(mlp, 2), "served", "onnx", effens.Gaussian())


def weights(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.state_dict().values())


def test_only_what_answers_is_exported() -> None:
    plain = weights(mlp())
    sizes = {
        method: weights(serving.Summary(trained(method), effens.Categorical()))
        for method in ("one", "deep", "snapshot", "swag", "mimo")
    }
    assert sizes["one"] == plain
    assert sizes["deep"] == 3 * plain
    assert sizes["snapshot"] == 2 * plain  # not the network in training
    assert sizes["swag"] == 3 * plain  # no moments, no deviations
    assert sizes["mimo"] == plain + 2 * (8 + 1) * 3  # one network, and two more heads


def test_a_repeated_network_is_exported_once() -> None:
    summary = serving.Summary(trained("hyper"), effens.Categorical())
    assert summary.ensemble.members == 2
    assert summary.weights is not None
    assert summary.weights.tolist() == [0.75, 0.25]


def test_no_first_layer_of_mimo_is_left() -> None:
    layers = [layer for layer in answering(trained("mimo")).modules() if isinstance(layer, MemberLayer)]
    assert [type(layer).__name__ for layer in layers] == ["LastLayer"]


@pytest.mark.parametrize("members", [1, 2])
def test_a_served_network_that_changes_its_input_leaves_the_reader_s_alone(members: int) -> None:
    make = lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))  # noqa: E731
    x = torch.randn(22, 4)
    before = x.clone()
    answering(effens.MIMO(make, members))(x)
    assert torch.equal(x, before)


@needs_onnx
def test_a_file_holds_little_more_than_weights(tmp_path: Path) -> None:
    net = lambda: effens_book.nets.mlp(20, 3, width=128)  # noqa: E731
    size = 4 * weights(net())
    for ensemble, times in (
        (effens.BatchEnsemble(net, 4), 1.0),
        (effens.MIMO(net, 4), 1.0),
        (effens.DeepEnsemble(net, 4), 4.0),
    ):
        serving.export(ensemble, torch.randn(1, 20), tmp_path / "served", "onnx")
        assert os.path.getsize(tmp_path / "served") < times * size + 40_000


@needs_onnx
def test_a_file_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    serving.export(trained("deep"), inputs(mlp, 1), tmp_path / "served", "onnx")
    content = (tmp_path / "served").read_bytes()
    assert b"site-packages" not in content
    assert str(Path(effens.__file__).parent).encode() not in content


def test_student_t_has_the_spread_of_its_mixture() -> None:
    outputs = torch.tensor([[[1.0, 0.5, 0.2]], [[3.0, 0.1, 4.0]]])
    dist = effens.StudentT().predict(outputs)
    mean, spread = serving.moments(dist, None)
    assert torch.allclose(mean, torch.tensor([2.0]))
    assert torch.allclose(spread, effens.mixture(dist).stddev)


def test_a_heavy_tail_has_no_spread() -> None:
    dist = torch.distributions.StudentT(torch.tensor([[1.5], [3.0]]), torch.zeros(2, 1), torch.ones(2, 1))
    assert serving.moments(dist, None)[1].item() == math.inf


@pytest.mark.parametrize("method", ["snapshot", "swag"])
def test_without_members_nothing_is_written(method: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no members yet: call effens.fit"):
        serving.export(METHODS[method](mlp), inputs(mlp, 2), tmp_path / "served")
    assert not os.listdir(tmp_path)


def test_an_unknown_backend_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="backend must be 'aoti' or 'onnx', got 'tensorrt'"):
        serving.export(trained("deep"), inputs(mlp, 2), tmp_path / "served", "tensorrt")


@pytest.mark.parametrize("x", [torch.zeros(4), torch.zeros(0, 4)])
def test_inputs_need_rows(x: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x must be \(batch, ...\) with at least one row, got shape"):
        serving.export(trained("deep"), x, tmp_path / "served")


def test_inputs_must_be_finite(tmp_path: Path) -> None:
    x = torch.tensor([[0, torch.nan, torch.inf, 0]])
    with pytest.raises(ValueError, match="x must be finite, as answers are checked on it, got 2 numbers that are not"):
        serving.export(trained("deep"), x, tmp_path / "served")


def test_members_that_are_drawn_anew_are_refused(tmp_path: Path) -> None:
    mixed = effens.DeepEnsemble.of(
        [MCDropout(lambda: nn.Sequential(nn.Linear(4, 5), nn.Dropout(), nn.Linear(5, 3)), 2)]
    )
    with pytest.raises(ValueError, match="members must be the same at each call, got those of MCDropout"):
        serving.export(mixed, torch.zeros(2, 4), tmp_path / "served")
    assert not os.listdir(tmp_path)


def test_no_folder_is_said_before_anything_is_compiled(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="path must be in a folder that exists, got .*/none/served"):
        serving.export(trained("deep"), inputs(mlp, 2), tmp_path / "none" / "served")


def test_without_a_compiler_it_says_so(tmp_path: Path) -> None:
    from torch._inductor import config

    none = config.patch({"cpp.cxx": ("no-such-compiler",)})
    with none, pytest.raises(Exception, match=r"No working C\+\+ compiler found .*no-such-compiler"):
        serving.export(trained("deep"), inputs(mlp, 2), tmp_path / "served")


def test_without_packages_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "PACKAGES", ("torch", "no_such_package"))
    with pytest.raises(ModuleNotFoundError, match="missing no_such_package: pip install no_such_package"):
        serving.export(trained("deep"), inputs(mlp, 2), tmp_path / "served", "onnx")


def test_a_file_that_answers_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = serving.Served(
        "aoti",
        {"shape": [2, 4], "dtype": "float32", "device": "cpu", "members": 3, "likelihood": ""},
        lambda x: (torch.zeros(2, 3), torch.zeros(2, 3)),
    )
    monkeypatch.setattr(serving, "compile_package", lambda *_: b"")
    monkeypatch.setattr(serving, "load_content", lambda *_: wrong)
    (tmp_path / "served").write_text("the last good one")
    with pytest.raises(RuntimeError, match="the exported mean must equal the ensemble's"):
        serving.export(trained("deep"), inputs(mlp, 2), tmp_path / "served")
    assert (tmp_path / "served").read_text() == "the last good one"
    assert os.listdir(tmp_path) == ["served"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="got nothing.pt2, which is no file"):
        serving.load_served(tmp_path / "nothing.pt2")


@needs_onnx
@pytest.mark.parametrize("content", [b"", b"not a file of ours", b"PK\x03\x04 and no archive"])
def test_foreign_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"foreign must be a whole file that effens\.export wrote, got one"):
        serving.load_served(path)


def test_cut_files_and_other_archives_are_refused(batch: tuple[serving.Served, Path], tmp_path: Path) -> None:
    content = batch[1].read_bytes()
    (tmp_path / "cut").write_bytes(content[: len(content) // 2])
    with zipfile.ZipFile(tmp_path / "archive", "w") as archive:
        archive.writestr("data", "no model")
    for name in ("cut", "archive"):
        with pytest.raises(ValueError, match=rf"{name} must be a whole file that effens\.export wrote, got one"):
            serving.load_served(tmp_path / name)


def test_importing_effens_imports_no_backend() -> None:
    code = "import sys, effens.serving; print([m for m in sys.modules if m.split('.')[0].startswith('onnx')])"
    env = {**os.environ, "PYTHONPATH": str(Path(effens.__file__).parents[1])}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


# A summary without a file


@pytest.mark.parametrize("likelihood", LIKELIHOODS.values(), ids=LIKELIHOODS.keys())
@pytest.mark.parametrize("rows", [0, 1, 7, 10])
def test_a_summary_is_the_mean_and_spread_of_all_answers(likelihood: effens.Likelihood, rows: int) -> None:
    ensemble = effens.DeepEnsemble(lambda: mlp(likelihood.outputs or 3), 5)
    x = torch.randn(rows, 4)
    found = effens.summarize(ensemble, x, likelihood=likelihood, chunk=5)
    expected = serving.moments(effens.predict(ensemble, x, likelihood=likelihood), None)
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, its)
    assert ensemble.training, "dropout is off in a prediction only"


def test_the_memory_of_a_summary_does_not_grow_with_the_rows() -> None:
    """100,000 rows by 32 members: beyond the result as much as a tenth of the rows, and far less than all answers."""
    ensemble = effens.DeepEnsemble(mlp, 32)
    needed = []
    for rows in (10_000, 100_000):
        x = torch.randn(rows, 4)
        peak = costs.peak_bytes(partial(effens.summarize, ensemble, x), x.device)
        needed.append(peak - 2 * 4 * 3 * rows)
    assert 0 < needed[1] <= needed[0]
    assert needed[1] < 4 * 3 * 32 * 100_000 / 2


def test_a_summary_needs_a_chunk() -> None:
    with pytest.raises(ValueError, match=r"chunk must be >= 1, got 0"):
        effens.summarize(effens.DeepEnsemble(mlp, 2), torch.randn(3, 4), chunk=0)
