"""A run that was cut short goes on where it was kept, and ends bit by bit as if it had never stopped."""

import errno
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from scenarios import cnn, generator, images, mlp, normed, residual, vectors
from test_contract import METHODS, Method, build
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Subset, TensorDataset

import effens
import effens_book.nets
from effens import storage
from effens_book.baselines import LastLayerLaplace, MCDropout

FIT: dict[str, Any] = {"epochs": 3, "batch_size": 8, "lr": 3e-3, "weight_decay": 0.1, "device": "cpu"}  # 9 steps


class Killed(BaseException):
    """What stands for a kill where the process goes on."""


class Noisy(Dataset[Any]):
    """Examples with noise that is drawn when they are asked for."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i] + 0.1 * torch.randn_like(self.x[i]), self.y[i]


def everything(ensemble: nn.Module) -> dict[str, Tensor]:
    return {**ensemble.state_dict(), **dict(ensemble.named_buffers())}


def differing(one: nn.Module, two: nn.Module) -> list[str]:
    """The names of weights and buffers that are not the same, bit by bit."""
    mine, its = everything(one), everything(two)
    return [name for name in mine.keys() | its.keys() if not torch.equal(mine[name], its[name])]


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch, ensemble: effens.Ensemble, data: Any, **options: Any) -> None:
    """Call `effens.fit` and stop it in that step (from 0, in this call), after its batch was drawn."""
    steps, backward = iter(range(step)), Tensor.backward

    def stop(loss: Tensor) -> None:
        if next(steps, None) is None:
            raise Killed
        backward(loss)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "backward", stop)
        with pytest.raises(Killed):
            effens.fit(ensemble, data, **options)


def resumes(
    make: Callable[[], effens.Ensemble],
    data: Callable[[], Any],
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kills: tuple[int, ...] = (4, 3),
    **options: Any,
) -> None:
    """A run that is cut short at these steps, counted from where each part begins, must end as an uninterrupted one."""
    options = {**FIT, **options}
    ensembles = []
    for seed in range(len(kills) + 2):  # all but the first two start elsewhere, and take their weights from the file
        torch.manual_seed(max(seed - 1, 0))
        ensembles.append(make())
    whole, *parts, last = ensembles
    expected = effens.fit(whole, data(), **options)
    for step, part in zip(kills, parts, strict=True):
        killed_at(step, monkeypatch, part, data(), checkpoint=path, **options)
    torch.manual_seed(1234)  # the numbers drawn in between do not matter, and are left as they are
    before = torch.get_rng_state()
    found = effens.fit(last, data(), checkpoint=path, **options)
    assert torch.equal(torch.get_rng_state(), before)
    assert differing(last, whole) == []
    assert torch.equal(found.losses, expected.losses)
    assert torch.equal(found.lrs, expected.lrs)
    assert not any(module.training for module in last.modules() if not isinstance(last, MCDropout))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_ends_as_if_it_had_never_stopped(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method: Method = METHODS[name]
    make = lambda: method.make(method.net, 3)  # noqa: E731
    resumes(make, method.data, tmp_path / "run", monkeypatch)
    x, _ = method.data()
    whole, again = build(method), build(method, seed=1)
    effens.fit(whole, method.data(), **FIT)
    effens.fit(again, method.data(), checkpoint=tmp_path / "run", **FIT)
    assert torch.equal(effens.predict(again, x), effens.predict(whole, x))
    assert torch.equal(again.member(1)(x), whole.member(1)(x))


def test_the_networks_of_a_hyper_ensemble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen() -> effens.Ensemble:
        return effens.HyperEnsemble([mlp(), effens_book.nets.mlp(4, 3, width=5).double(), residual()], [2, 0, 2]).chosen

    resumes(chosen, vectors, tmp_path / "run", monkeypatch)


@pytest.mark.parametrize("name", ["MC dropout", "Laplace"])
def test_baselines(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> effens.Ensemble:
        if name == "Laplace":
            return LastLayerLaplace(mlp, 2).double()
        return MCDropout(partial(mlp, dropout=0.5), 2)

    resumes(make, vectors, tmp_path / "run", monkeypatch)
    again = make()
    effens.fit(again, vectors(), checkpoint=tmp_path / "run", **FIT)
    assert effens.predict(again, vectors()[0]).shape == (2, 22, 3)


OPTIMIZERS = {
    "SGD": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "Adam": partial(torch.optim.Adam, amsgrad=True),
    "AdamW, one by one": partial(torch.optim.AdamW, foreach=False),
    "NAdam": torch.optim.NAdam,
    "RMSprop": partial(torch.optim.RMSprop, centered=True, momentum=0.5),
    "Adagrad": torch.optim.Adagrad,
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_every_optimizer(optimizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = lambda: effens.BatchEnsemble(cnn, 2)  # noqa: E731
    resumes(make, images, tmp_path / "run", monkeypatch, optimizer=optimizer)


def seeded_loader() -> DataLoader[Any]:
    return DataLoader(Noisy(*vectors()), batch_size=8, shuffle=True, generator=generator(5))


def sampled_loader() -> DataLoader[Any]:
    data = TensorDataset(*vectors())
    sampler = BatchSampler(RandomSampler(data, generator=generator(5)), 8, drop_last=False)
    return DataLoader(data, batch_sampler=sampler)


DATA: dict[str, Callable[[], Any]] = {
    "tensors": vectors,
    "dataset": lambda: TensorDataset(*vectors()),
    "noisy dataset": lambda: Noisy(*vectors()),
    "loader": lambda: DataLoader(Noisy(*vectors()), batch_size=8, shuffle=True),
    "loader with a generator": seeded_loader,
    "loader with a sampler of batches": sampled_loader,
}


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("method", [effens.DeepEnsemble, effens.MIMO])
def test_data_and_dropout_draw_the_same_numbers(
    kind: str, method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = partial(mlp, dropout=0.5)
    resumes(lambda: method(net, 2), DATA[kind], tmp_path / "run", monkeypatch)


noisy = partial(mlp, dropout=0.5)


class Unkept(nn.Linear):
    """A layer with a buffer that no state dict has: how often it was called."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__(4, 3, dtype=torch.float64)
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return super().forward(x) / self.calls.sqrt()


def test_buffers_that_no_state_dict_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resumes(lambda: effens.DeepEnsemble(Unkept, 2), vectors, tmp_path / "run", monkeypatch)


def tied() -> nn.Module:
    network = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3)).double()
    network[2].register_parameter("weight", network[0].get_parameter("weight"))
    return network


def test_tied_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, method in enumerate((effens.DeepEnsemble, effens.BatchEnsemble)):
        resumes(partial(method, tied, 2), vectors, tmp_path / str(i), monkeypatch)


def channels_last() -> nn.Module:
    network = normed()
    for parameter in network.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return network


def test_channels_last_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resumes(lambda: effens.SnapshotEnsemble(channels_last, 2), images, tmp_path / "run", monkeypatch)


def test_a_finished_run_returns_at_once_with_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Noisy(*images())
    for method in (effens.SnapshotEnsemble, effens.SWAG):
        first, again = method(normed, 2), method(normed, 2)
        path = tmp_path / method.__name__
        whole = effens.fit(first, data, checkpoint=path, **FIT)
        with monkeypatch.context() as patch:
            patch.delattr(Noisy, "__getitem__")
            patch.delattr(Tensor, "backward")
            found = effens.fit(again, data, checkpoint=path, **FIT)
        assert torch.equal(found.losses, whole.losses)
        assert torch.equal(found.lrs, whole.lrs)
        assert differing(first, again) == []
        assert torch.equal(effens.predict(again, data.x), effens.predict(first, data.x))
        assert found.seconds < whole.seconds + 1


def test_the_time_of_all_parts_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr("effens.checkpoint.time.perf_counter", lambda: next(clock))
    path, make = tmp_path / "run", partial(effens.DeepEnsemble, mlp, 2)
    killed_at(5, monkeypatch, make(), vectors(), checkpoint=path, **FIT)
    assert next(clock) == 2  # it began at 0, and looked when it wrote after the first epoch
    assert effens.fit(make(), vectors(), checkpoint=path, **FIT).seconds == 1 + 4


# ---- Refused. ----


def refused(path: Path, error: type[Exception], message: str, **options: Any) -> None:
    """A call with this checkpoint must fail with this message, and leave the file and the ensemble as they are."""
    before = path.read_bytes() if path.is_file() else None
    ensemble = options.pop("ensemble", effens.MIMO(mlp, 2))
    weights = {name: tensor.clone() for name, tensor in ensemble.state_dict().items()}
    with pytest.raises(error, match=message):
        effens.fit(ensemble, options.pop("data", vectors()), **{**FIT, "checkpoint": path, **options})
    assert all(torch.equal(tensor, weights[name]) for name, tensor in ensemble.state_dict().items())
    assert (path.read_bytes() if path.is_file() else None) == before


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint after five steps of nine."""
    path = tmp_path / "run.pt"
    killed_at(5, monkeypatch, effens.MIMO(mlp, 2), vectors(), checkpoint=path, **FIT)
    return path


class Negative(effens.Categorical):
    pass


def frozen() -> effens.Ensemble:
    ensemble = effens.MIMO(mlp, 2)
    next(ensemble.parameters()).requires_grad_(False)
    return ensemble


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "epochs": ({"epochs": 4}, "epochs 3 instead of 4"),
    "batch size": ({"batch_size": 7}, "batch_size 8 instead of 7"),
    "lr": ({"lr": 1e-3}, r"lr 0\.003 instead of 0\.001"),
    "decay": ({"weight_decay": 0.2}, r"weight_decay 0\.1 instead of 0\.2"),
    "seed": ({"seed": 1}, "seed 0 instead of 1"),
    "likelihood": ({"likelihood": Negative()}, r"likelihood Categorical\(axis=-1\) .* instead of Negative\(axis=-1\)"),
    "optimizer": ({"optimizer": torch.optim.Adam}, "optimizer AdamW instead of Adam"),
    "optimizer's options": ({"optimizer": partial(torch.optim.AdamW, betas=(0.8, 0.99))}, r"groups \[\{.*0\.9, .*0\.8"),
    "more data": ({"data": vectors(23)}, r"data\.x float64 \(22, 4\), CRC .* instead of float64 \(23, 4\)"),
    "other data": (
        {"data": vectors(22, seed=1)},
        r"data\.x float64 \(22, 4\), CRC .* instead of float64 \(22, 4\), CRC",
    ),
    "a dataset": ({"data": TensorDataset(*vectors())}, "data.kind None instead of TensorDataset"),
    "method": ({"ensemble": effens.DeepEnsemble(mlp, 2)}, r"modules\. MIMO\(.*\) instead of DeepEnsemble\(\)"),
    "members": ({"ensemble": effens.MIMO(mlp, 3)}, "members=2.* instead of MIMO.members=3"),
    "share": ({"ensemble": effens.MIMO(mlp, 2, share=0.0)}, r"share=0\.5.* instead of MIMO.*share=0\.0"),
    "dropout": (
        {"ensemble": effens.MIMO(partial(mlp, dropout=0.5), 2)},
        r"modules\.network\.\d .* instead of Dropout\(p=0\.5",
    ),
    "shape": (
        {"ensemble": effens.MIMO(lambda: effens_book.nets.mlp(4, 3, width=9).double(), 2)},
        r"out_features=8.* instead of .*out_features=9",
    ),
    "dtype": ({"ensemble": effens.MIMO(mlp, 2).float()}, r"tensors\.network.* float64 .* instead of float32"),
    "frozen": ({"ensemble": frozen()}, "trained "),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_another_call_is_refused(other: str, kept: Path) -> None:
    options, message = OTHERS[other]
    refused(kept, ValueError, "run.pt must be a checkpoint of the same call, got .*" + message, **options)


def test_a_checkpoint_of_another_version_is_refused(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.0.0")
        refused(kept, ValueError, r"must be a checkpoint of the same call, got torch .* instead of 9\.0\.0")
    with monkeypatch.context() as patch:
        patch.setattr(storage, "CHECKPOINT", "effens checkpoint 4")
        refused(kept, ValueError, "run.pt must hold 'effens checkpoint 4', got another file")


def test_settings_of_snapshots_and_swag_are_part_of_the_call(tmp_path: Path) -> None:
    pairs: list[tuple[Any, dict[str, Any], str]] = [
        (effens.SnapshotEnsemble, {"last": 1}, "last=2, .* instead of .*last=1"),
        (effens.SnapshotEnsemble, {"schedule": "triangular", "pretrain": 0.5}, "'cosine'.* instead of .*'triangular'"),
        (effens.SWAG, {"scale": 1.0}, r"scale=0\.5.* instead of .*scale=1\.0"),
        (effens.BatchEnsemble, {"split": True}, "split=False.* instead of .*split=True"),
        (effens.BatchEnsemble, {"fast_lr": 0.1}, r"groups .*0\.0015.* instead of .*0\.0003"),
    ]
    for i, (method, options, message) in enumerate(pairs):
        path = tmp_path / str(i)
        effens.fit(method(mlp, 2), vectors(), checkpoint=path, **FIT)
        refused(path, ValueError, message, ensemble=method(mlp, 2, **options))


def pooled(**geometry: Any) -> nn.Module:
    layers = [nn.Conv2d(1, 4, 3, **geometry), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("method", [effens.DeepEnsemble, effens.BatchEnsemble])
@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        ({"stride": 2}, r"attributes\.network\.0\.geometry\.stride \[1, 1\] instead of \[2, 2\]"),
        ({"padding": "same", "dilation": 2}, r"padding \[0, 0\] instead of same; .*dilation \[1, 1\] instead of"),
    ],
)
def test_a_convolution_s_geometry_is_part_of_the_call(
    method: Any, geometry: dict[str, Any], message: str, tmp_path: Path
) -> None:
    data = images()
    effens.fit(method(pooled, 2), data, checkpoint=tmp_path / "run", **FIT)
    refused(tmp_path / "run", ValueError, message, ensemble=method(partial(pooled, **geometry), 2), data=data)


def test_settings_of_baselines_are_part_of_the_call(tmp_path: Path) -> None:
    student = LastLayerLaplace(mlp, likelihood=effens.StudentT())
    pairs: list[tuple[Any, Any, str]] = [
        (LastLayerLaplace(mlp), LastLayerLaplace(mlp, precision=2.0), r"precision=1\.0.* instead of .*precision=2\.0"),
        (LastLayerLaplace(mlp), LastLayerLaplace(mlp, seed=3), r"seed=0.* instead of .*seed=3"),
        (LastLayerLaplace(mlp), student, r"categorical_fisher.* instead of .*student_fisher"),
        (MCDropout(noisy), MCDropout(noisy, 3), r"members=30\) instead of MCDropout\(members=3\)"),
    ]
    for i, (first, second, message) in enumerate(pairs):
        effens.fit(first, vectors(), checkpoint=tmp_path / str(i), **FIT)
        refused(tmp_path / str(i), ValueError, message, ensemble=second)


def test_a_file_that_was_cut_anywhere_is_refused(kept: Path) -> None:
    content = kept.read_bytes()
    for length in [*range(0, 12, 3), *range(12, len(content), 997), len(content) - 1]:
        kept.write_bytes(content[:length])
        refused(kept, ValueError, r"run\.pt must be a whole checkpoint, got one that cannot be read")
    kept.write_bytes(content)
    assert effens.fit(effens.MIMO(mlp, 2), vectors(), checkpoint=kept, **FIT).steps == 9


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    torch.save(mlp().state_dict(), tmp_path / "pickle")
    refused(tmp_path / "pickle", ValueError, "pickle must hold 'effens checkpoint 3', got another file")
    effens.save(effens.MIMO(mlp, 2), tmp_path / "weights")
    refused(tmp_path / "weights", ValueError, "weights must be a whole checkpoint")


def test_a_checkpoint_is_no_file_for_load(kept: Path) -> None:
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        effens.load(effens.MIMO(mlp, 2), kept)


def test_a_path_that_cannot_be_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Tensor, "backward")
    refused(tmp_path, IsADirectoryError, "checkpoint must name a file, got the folder")
    refused(tmp_path / "none" / "run", FileNotFoundError, "checkpoint must be in a folder that exists, got .*none")


class Extra(nn.Identity):
    def get_extra_state(self) -> dict[str, int]:
        return {"steps": 3}

    def set_extra_state(self, state: object) -> None:
        pass


def test_state_that_is_no_tensor_is_refused_before_the_first_step(tmp_path: Path) -> None:
    ensemble = effens.MIMO(lambda: nn.Sequential(nn.Linear(4, 4), Extra(), nn.Linear(4, 3)).double(), 2)
    message = r"must hold nothing but tensors, got \['network\.1\._extra_state'\]"
    with pytest.raises(TypeError, match=message):
        effens.fit(ensemble, vectors(), checkpoint=tmp_path / "run", **FIT)
    assert not list(tmp_path.iterdir())


def test_a_call_that_fails_leaves_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run"
    together = effens.DeepEnsemble.of([effens.MIMO(mlp, 2), effens.DeepEnsemble(mlp, 2)])
    refused(path, RuntimeError, "ensembles side by side are not trained together", ensemble=together)
    x, y = vectors()
    refused(path, ValueError, "labels must be in 0 ... 2, got 2 ... 3", data=(x, y.clamp(1) + 1))
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_is_never_kept(tmp_path: Path) -> None:
    (x, y), path = vectors(), tmp_path / "run"
    weights = effens.DeepEnsemble(mlp, 2)
    x[torch.randperm(22, generator=generator())[9]] = torch.inf  # member 0 meets it in step 1
    with pytest.raises(FloatingPointError, match="got .* at step "):
        effens.fit(weights, (x, y), checkpoint=path, **FIT)
    losses = None
    if path.exists():
        losses = torch.load(path, weights_only=True)["state"]["losses"]
    assert losses is None or bool(losses.isfinite().all())


# ---- A full disk. ----


def test_a_full_disk_is_an_error_and_the_last_checkpoint_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, writes = tmp_path / "run", []

    def full(file: int, fsync: Any = os.fsync) -> None:
        writes.append(file)
        if len(writes) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    torch.manual_seed(0)
    ensemble, whole = effens.MIMO(mlp, 2), effens.MIMO(mlp, 2)
    torch.manual_seed(0)
    whole = effens.MIMO(mlp, 2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        message = (
            r"checkpoint run must be written \([\d,]+ bytes\), got No space left on device: what it held before is"
        )
        with pytest.raises(OSError, match=message) as caught:
            effens.fit(ensemble, vectors(), checkpoint=path, **FIT)
    assert caught.value.errno == errno.ENOSPC
    assert [file.name for file in tmp_path.iterdir()] == ["run"]
    assert len(torch.load(path, weights_only=True)["state"]["losses"]) == 6
    again = effens.MIMO(mlp, 2)
    effens.fit(again, vectors(), checkpoint=path, **FIT)
    effens.fit(whole, vectors(), **FIT)
    assert differing(again, whole) == []


def test_a_disk_that_is_full_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="got No space left on device: there is none yet"):
        effens.fit(effens.MIMO(mlp, 2), vectors(), checkpoint=tmp_path / "run", **FIT)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_write_left_is_removed(kept: Path) -> None:
    left, other = kept.with_name(".run.pt.run.part"), kept.with_name(".run.pt.2.part")
    for path in (left, other):
        path.touch()
    effens.fit(effens.MIMO(mlp, 2), vectors(), checkpoint=kept, **FIT)
    assert other.exists()
    assert not left.exists()


def test_nothing_in_a_file_runs_when_it_is_read(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Mine:
        def __reduce__(self) -> Any:
            return ran.touch, ()

    torch.save({"format": storage.CHECKPOINT, "call": {}, "state": Mine()}, tmp_path / "run")
    refused(tmp_path / "run", ValueError, "run must be a whole checkpoint, got one that cannot be read")
    assert not ran.exists()


# ---- Processes that are killed. ----

RUNS: dict[str, tuple[Callable[[], effens.Ensemble], Callable[[], Any]]] = {
    "deep": (lambda: effens.DeepEnsemble(partial(mlp, dropout=0.2), 3), vectors),
    "deep, of networks": (lambda: effens.DeepEnsemble.of([mlp(), residual()]), vectors),
    "batch": (lambda: effens.BatchEnsemble(partial(mlp, dropout=0.2), 3), lambda: Noisy(*vectors())),
    "batch, split": (lambda: effens.BatchEnsemble(mlp, 3, split=True), vectors),
    "snapshot": (lambda: effens.SnapshotEnsemble(normed, 2), images),
    "snapshot, triangular": (lambda: effens.SnapshotEnsemble(mlp, 2, schedule="triangular", pretrain=0.4), vectors),
    "swag": (lambda: effens.SWAG(normed, 3, rank=2), lambda: TensorDataset(*images())),
    "mimo": (lambda: effens.MIMO(partial(mlp, dropout=0.2), 3, share=0.3), lambda: Noisy(*vectors())),
    "hyper": (lambda: effens.HyperEnsemble([mlp(), residual(), mlp()], [1, 2, 1]).chosen, vectors),
}


def train(name: str, path: Path, start: int) -> None:
    """One run, or what is left of it, in a process of its own."""
    make, data = RUNS[name]
    torch.manual_seed(start)
    effens.fit(make(), data(), checkpoint=path, progress=False, **FIT)


def kill_at(moment: int, patch: pytest.MonkeyPatch) -> None:
    """Let this process kill itself at a moment: before a step, in the middle of a file, after one; -1 for never."""
    moments, fsync, replace, backward = iter(range(moment)), os.fsync, os.replace, Tensor.backward

    def tick(before: Callable[[], object] = lambda: None) -> None:
        if moment >= 0 and next(moments, None) is None:
            before()
            os.kill(os.getpid(), 9)

    def killing_fsync(file: int) -> None:
        tick(lambda: os.ftruncate(file, os.fstat(file).st_size // 2))
        fsync(file)

    def killing_replace(one: Any, two: Any) -> None:
        replace(one, two)
        tick()

    def killing_backward(loss: Tensor) -> None:
        tick()
        backward(loss)

    patch.setattr(os, "fsync", killing_fsync)
    patch.setattr(os, "replace", killing_replace)
    patch.setattr(Tensor, "backward", killing_backward)


def killed(name: str, path: Path, start: int, moment: int = -1) -> bool:
    """Train in a forked process that kills itself at a moment, or never; say whether it was killed."""
    if (child := os.fork()) == 0:
        kill_at(moment, pytest.MonkeyPatch())
        train(name, path, start)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, 9), f"a run ended with status {status}"
    return status == 9


def kill_runs(folder: Path, kills: int) -> None:
    """Train every method once without a kill, and as often as it takes for so many kills; keep all checkpoints."""
    torch.set_num_threads(1)
    train("swag", folder / "warm", 0)  # what PyTorch imports at first need, each fork would import again
    for number, name in enumerate(RUNS):
        (folder / name).mkdir()
        source, run, left = generator(number), 0, kills
        assert not killed(name, folder / name / "whole", start=0)
        while left:
            path = folder / name / f"run {run}"
            while not path.exists() or not finished(path):
                moment = int(torch.randint(14, (), generator=source)) if left else -1
                left -= killed(name, path, 5 if path.exists() else 0, moment)
            run += 1


def finished(path: Path) -> bool:
    return torch.load(path, weights_only=True)["state"]["finished"] is True


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_runs_killed_at_random_end_as_if_they_had_never_stopped(kills: int, tmp_path: Path) -> None:
    here = Path(__file__).parent
    folders = [str(here), str(here.parent), str(here.parent / "chapters")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    subprocess.run([sys.executable, __file__, str(tmp_path), str(kills)], env=environment, check=True)
    for name in RUNS:
        whole = flat(torch.load(tmp_path / name / "whole", weights_only=True))
        runs = list((tmp_path / name).glob("run *"))
        assert runs
        for path in runs:
            found = flat(torch.load(path, weights_only=True))
            assert found.keys() == whole.keys()
            assert [key for key in found if key != "/state/seconds" and not same(found[key], whole[key])] == []


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """All that a checkpoint holds, by where it is."""
    if isinstance(value, dict | list | tuple):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: part for inner, each in parts for key, part in flat(each, f"{name}/{inner}").items()}
    return {name: value}


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


if __name__ == "__main__":
    kill_runs(Path(sys.argv[1]), int(sys.argv[2]))


NETWORK = """
from torch import nn

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3).double()

    def forward(self, x):
        return self.inner(x){change}
"""


def test_a_class_of_another_source_is_another_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    options: dict[str, Any] = {"epochs": 2, "device": "cpu", "checkpoint": tmp_path / "run.pt"}
    for name, change in (("first", ""), ("second", "*2"), ("third", "")):
        (tmp_path / f"{name}.py").write_text(NETWORK.format(change=change))
        own = importlib.import_module(name).Own
        if change:
            with pytest.raises(ValueError, match=r"a checkpoint of the same call, got sources.Own CRC"):
                effens.fit(effens.DeepEnsemble(own, 2), vectors(), **options)
        else:
            effens.fit(effens.DeepEnsemble(own, 2), vectors(), **options)


@pytest.mark.parametrize("kind", ["tensors", "dataset", "loader", "subset", "named"])
def test_other_data_are_another_call(kind: str, tmp_path: Path) -> None:
    class Named(Dataset[Any]):
        def __init__(self, x: Tensor, y: Tensor) -> None:
            self.x, self.y, self.calls = x, y.numpy(), 0

        def __len__(self) -> int:
            return len(self.x)

        def __getitem__(self, i: int) -> Any:
            self.calls += 1  # which changes, and is no part of the data
            return self.x[i], int(self.y[i])

    makers: dict[str, Any] = {
        "tensors": lambda x, y: (x, y),
        "dataset": TensorDataset,
        "loader": lambda x, y: DataLoader(TensorDataset(x, y), 8),
        "subset": lambda x, y: Subset(TensorDataset(x, y), range(20)),
        "named": Named,
    }
    x, y = vectors()
    other = y.roll(1)
    options: dict[str, Any] = {"epochs": 2, "device": "cpu", "checkpoint": tmp_path / "run.pt"}
    data = makers[kind](x, y)
    for _ in range(2):  # the same goes on
        torch.manual_seed(0)
        effens.fit(effens.DeepEnsemble(mlp, 2), data, **options)
    with pytest.raises(ValueError, match=r"a checkpoint of the same call, got .*CRC .* instead of"):
        effens.fit(effens.DeepEnsemble(mlp, 2), makers[kind](x, other), **options)
    if kind == "subset":
        with pytest.raises(ValueError, match=r"a checkpoint of the same call, got data.picked"):
            effens.fit(effens.DeepEnsemble(mlp, 2), Subset(TensorDataset(x, y), range(2, 22)), **options)
    if kind == "loader":
        with pytest.raises(ValueError, match=r"a checkpoint of the same call, got data.batch_size"):
            effens.fit(effens.DeepEnsemble(mlp, 2), DataLoader(TensorDataset(x, y), 4), **options)
