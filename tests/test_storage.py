"""What was saved comes back bit by bit, and anything else leaves the ensemble, and the old file, as they were."""

import errno
import os
import pickle
import pickletools
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import effens
from effens import storage

Method = type[effens.DeepEnsemble] | type[effens.BatchEnsemble]
METHODS = [effens.DeepEnsemble, effens.BatchEnsemble]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def trained(method: Method, members: int = 3) -> effens.Ensemble:
    """An ensemble whose weights and batch-norm statistics are not those of a fresh one."""
    ensemble = method(net, members)
    with torch.no_grad():
        for tensor in ensemble.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape).mul(10))
    return ensemble


def state(ensemble: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in ensemble.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "ensemble.safetensors"
    effens.save(trained(effens.DeepEnsemble), path)
    return path


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [str, Path])
def test_every_weight_and_buffer_comes_back_bit_by_bit(
    method: Method, kind: Callable[[Path], str | Path], tmp_path: Path
) -> None:
    ensemble, other = trained(method), method(net, 3)
    path = kind(tmp_path / "ensemble.safetensors")
    assert not same(state(ensemble), state(other))
    effens.save(ensemble, path)
    effens.load(other, path)
    assert same(state(ensemble), state(other))
    assert any("running_var" in name for name in state(other))
    x = torch.randn(5, 4)
    assert torch.equal(ensemble.eval()(x), other.eval()(x))


def test_loading_keeps_parameters_and_what_is_frozen_and_leaves_eval_mode(saved: Path) -> None:
    ensemble = effens.DeepEnsemble(net, 3)
    assert ensemble.training
    parameters = list(ensemble.parameters())
    parameters[0].requires_grad_(False)
    effens.load(ensemble, saved)
    assert all(a is b for a, b in zip(parameters, ensemble.parameters(), strict=True))
    assert [p.requires_grad for p in ensemble.parameters()] == [False] + [True] * (len(parameters) - 1)
    assert not any(module.training for module in ensemble.modules())


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        network[2].register_parameter("weight", network[0].get_parameter("weight"))
        return network

    ensemble, other = effens.BatchEnsemble(tied, 2), effens.BatchEnsemble(tied, 2)
    effens.save(ensemble, tmp_path / "tied")
    effens.load(other, tmp_path / "tied")
    assert same(state(ensemble), state(other))
    first, last = (other.get_parameter(f"network.{i}.weight") for i in (0, 2))
    assert first is last


def test_a_plain_network_can_be_saved_too(tmp_path: Path) -> None:
    network, other = net(), net()
    effens.save(network, tmp_path / "network")
    effens.load(other, tmp_path / "network")
    assert same(state(network), state(other))


def test_weights_load_into_another_precision(saved: Path) -> None:
    half, double = (effens.DeepEnsemble(net, 3).to(dtype) for dtype in (torch.float16, torch.float64))
    full = effens.DeepEnsemble(net, 3)
    for ensemble in (half, double, full):
        effens.load(ensemble, saved)
    for name, tensor in full.state_dict().items():
        assert torch.equal(half.state_dict()[name], tensor.to(half.state_dict()[name].dtype))
        assert torch.equal(double.state_dict()[name], tensor.to(double.state_dict()[name].dtype))
    assert half.get_parameter("network.0.weight").dtype == torch.float16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_weights_load_onto_another_device_and_back(saved: Path, tmp_path: Path) -> None:
    ensemble, other = effens.DeepEnsemble(net, 3).cuda(), effens.DeepEnsemble(net, 3)
    effens.load(ensemble, saved)
    assert all(tensor.is_cuda for tensor in ensemble.state_dict().values())
    effens.save(ensemble, tmp_path / "again")
    effens.load(other, tmp_path / "again")
    assert same(state(ensemble.cpu()), state(other))


def test_noncontiguous_weights_are_saved_as_they_are_meant(tmp_path: Path) -> None:
    network = nn.Conv2d(3, 4, 3)
    network.weight.data = network.weight.data.contiguous(memory_format=torch.channels_last)
    other = nn.Conv2d(3, 4, 3)
    effens.save(network, tmp_path / "network")
    effens.load(other, tmp_path / "network")
    assert same(state(network), state(other))


def test_the_file_holds_no_pickle(saved: Path) -> None:
    content = saved.read_bytes()
    assert content[:1] != b"\x80"
    assert content[:2] != b"PK"  # a zip, as torch.save writes
    header = int.from_bytes(content[:8], "little")
    assert content[8 : 8 + header].strip().startswith(b"{")
    with pytest.raises(ValueError):  # noqa: PT011, whatever pickle says
        list(pickletools.genops(content))


def refused(ensemble: nn.Module, path: Path, error: type[Exception], message: str) -> None:
    """Loading must fail with this message, and leave the ensemble as it was."""
    before = state(ensemble)
    with pytest.raises(error, match=message):
        effens.load(ensemble, path)
    assert same(state(ensemble), before)


def test_a_file_that_was_cut_anywhere_is_refused(saved: Path) -> None:
    content, ensemble = saved.read_bytes(), effens.DeepEnsemble(net, 3)
    for length in [*range(12), *range(12, len(content), 97), len(content) - 1]:
        saved.write_bytes(content[:length])
        refused(ensemble, saved, ValueError, r"ensemble\.safetensors must be a whole safetensors file")
    saved.write_bytes(content)
    effens.load(ensemble, saved)


def test_a_file_that_grew_is_refused(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes() + b"\0")
    refused(effens.DeepEnsemble(net, 3), saved, ValueError, "must be a whole safetensors file")


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"trap": Trap()}, tmp_path / "pickle")
    refused(net(), tmp_path / "pickle", ValueError, "pickle must be a whole safetensors file")
    assert not (tmp_path / "sprung").exists()


def test_a_safetensors_file_of_another_program_is_refused(tmp_path: Path) -> None:
    network = net()
    save_file(network.state_dict(), tmp_path / "foreign")
    refused(network, tmp_path / "foreign", ValueError, r"foreign must hold \{'format': 'effens 1'.*'format': None")
    save_file(network.state_dict(), tmp_path / "foreign", metadata={"format": "pt"})
    refused(network, tmp_path / "foreign", ValueError, "got {'format': 'pt'")


def test_a_path_without_a_file_is_refused(tmp_path: Path) -> None:
    refused(net(), tmp_path / "none", FileNotFoundError, "path must be a file that effens.save wrote, got none, which")
    refused(net(), tmp_path, FileNotFoundError, "path must be a file that effens.save wrote")


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5))


def deeper() -> nn.Module:
    return nn.Sequential(net(), nn.Linear(3, 3))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: effens.BatchEnsemble(net, 3), "'kind': 'BatchEnsemble'.*got {'kind': 'DeepEnsemble'}"),
        (lambda: effens.DeepEnsemble(net, 2), "'members': '2'.*got {'members': '3'}"),
        (lambda: net(), "'kind': 'Sequential'.*got {'kind': 'DeepEnsemble', 'members': '3'}"),
        (lambda: effens.DeepEnsemble(wide, 3), r"network\.3\.weight must have shape \(3, 5, 6\), got \(3, 3, 6\)"),
        (lambda: effens.DeepEnsemble(deeper, 3), r"must hold its weights, got other names: \['network\.0"),
    ],
)
def test_another_ensemble_is_refused(other: Callable[[], nn.Module], message: str, saved: Path) -> None:
    refused(other(), saved, ValueError, message)


class Buffer(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("early", value.new_zeros(3, dtype=torch.float32))
        self.register_buffer("value", value)


def test_real_numbers_are_not_cut_to_integers(tmp_path: Path) -> None:
    effens.save(Buffer(torch.tensor([1.5])), tmp_path / "real")
    message = r"value must fit torch\.int64, got torch\.float32"
    refused(Buffer(torch.tensor([1])), tmp_path / "real", ValueError, message)


def test_a_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"steps": 3}

        def set_extra_state(self, state: object) -> None:
            pass

    with pytest.raises(TypeError, match=r"must hold nothing but tensors, got \['_extra_state'\]"):
        effens.save(Extra(2, 2), tmp_path / "extra")
    assert not list(tmp_path.iterdir())


def test_another_index_within_a_mixture_loads_nothing(tmp_path: Path) -> None:
    def mixed(index: list[int]) -> effens.Ensemble:
        chosen = effens.HyperEnsemble([net(), net()], index)
        return effens.DeepEnsemble.of([effens.DeepEnsemble(net, 2), chosen])

    saved, other = mixed([0, 1, 0]), mixed([0, 1, 1])
    effens.save(saved, tmp_path / "mixed")
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"state must be of index \[0, 1, 1\], got one of \[0, 1, 0\]"):
        effens.load(other, tmp_path / "mixed")
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    again = mixed([0, 1, 0])
    effens.load(again, tmp_path / "mixed")
    assert all(torch.equal(tensor, saved.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_a_checkpoint_gives_back_what_it_was_given(tmp_path: Path) -> None:
    path, call = tmp_path / "run", {"lr": 0.1, "betas": (0.9, 0.99), "function": test_tied_weights_stay_tied}
    assert storage.Checkpoint(path, call).read() is None
    big = torch.arange(6.0).view(2, 3).T
    state: dict[Any, Any] = {
        "numbers": (1, 0.1, float("inf"), True, None, "text", []),
        3: {"whole": big, "part": big[:2], "none": big[:0], "one": torch.tensor(True)},
    }
    storage.Checkpoint(path, call).write(state)
    found = storage.Checkpoint(path, call).read()
    assert found["numbers"] == state["numbers"]
    assert isinstance(found["numbers"], tuple)
    assert same(found[3], state[3])
    with pytest.raises(ValueError, match=r"run must be a checkpoint of the same call, got lr 0\.1 instead of 0\.2$"):
        storage.Checkpoint(path, {**call, "lr": 0.2}).read()
    before = path.read_bytes()
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        storage.Checkpoint(tmp_path / "other", call).write({"a": [0, Full(None)]})
    assert path.read_bytes() == before
    assert not (tmp_path / "other").exists()


def test_what_an_older_version_did_not_write_is_not_compared(tmp_path: Path) -> None:
    storage.Checkpoint(tmp_path / "run", {"lr": 0.1}).write([1])
    assert storage.Checkpoint(tmp_path / "run", {"lr": 0.1, "new": 3}).read() == [1]
    with pytest.raises(ValueError, match="got lr 0.1 instead of None"):
        storage.Checkpoint(tmp_path / "run", {"new": 3}).read()


def test_many_differences_are_counted(tmp_path: Path) -> None:
    storage.Checkpoint(tmp_path / "run", {str(i): 0 for i in range(9)}).write([])
    with pytest.raises(ValueError, match="got 0 0 instead of 1; 1 0 instead of 1; 2 0 instead of 1, and 6 more$"):
        storage.Checkpoint(tmp_path / "run", {str(i): 1 for i in range(9)}).read()


class Full:
    """A file on a disk that is full after 100 bytes."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __enter__(self) -> "Full":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, content: bytes) -> int:
        self.file.write(content[:100])
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    faults = [(os, "replace", refuse), (os, "fsync", refuse), (storage, "open", lambda *a: Full(open(*a)))]  # noqa: SIM115
    for place, name, fault in faults:
        with monkeypatch.context() as patch:
            patch.setattr(place, name, fault, raising=False)
            with pytest.raises(OSError, match="error|No space left"):
                effens.save(trained(effens.DeepEnsemble), saved)
        assert saved.read_bytes() == before
        assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_folder_that_is_not_there_is_an_error_and_no_litter(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="path must be in a folder that exists, got .*/none/network$"):
        effens.save(net(), tmp_path / "none" / "network")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        effens.save(net(), tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_reader_never_sees_a_file_half_written(tmp_path: Path) -> None:
    path = tmp_path / "ensemble.safetensors"
    ensembles = [trained(effens.DeepEnsemble) for _ in range(2)]
    effens.save(ensembles[0], path)
    done = threading.Event()

    def write() -> None:
        try:
            for i in range(50):
                effens.save(ensembles[i % 2], path)
        finally:
            done.set()

    writer = threading.Thread(target=write)
    writer.start()
    reader, states = effens.DeepEnsemble(net, 3), [state(ensemble) for ensemble in ensembles]
    while not done.is_set():
        effens.load(reader, path)
        assert any(same(state(reader), each) for each in states)
    writer.join()


def test_writers_on_two_machines_do_not_break_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In two containers both may have the process number 1, and both write to a shared folder."""
    path, fsync, nested = tmp_path / "shared", os.fsync, [b"second"]

    def overtaken(file: int) -> None:
        fsync(file)
        if nested:
            storage.write_whole(path, nested.pop())
            assert path.read_bytes() == b"second"

    monkeypatch.setattr(os, "getpid", lambda: 1)
    monkeypatch.setattr(os, "fsync", overtaken)
    storage.write_whole(path, b"the first")
    assert path.read_bytes() == b"the first"
    assert [file.name for file in tmp_path.iterdir()] == ["shared"]


SAVE_FOREVER = """
import sys, torch, effens
from torch import nn
ensemble = effens.DeepEnsemble(lambda: nn.Linear(300, 300, bias=False), 3)
value = 0
while True:
    value += 1
    for parameter in ensemble.parameters():
        torch.nn.init.constant_(parameter, value)
    effens.save(ensemble, sys.argv[1])
    print(value, flush=True)
"""


@pytest.mark.slow
def test_a_run_killed_while_it_saves_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "ensemble.safetensors"
    ensemble = effens.DeepEnsemble(lambda: nn.Linear(300, 300, bias=False), 3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        with subprocess.Popen([sys.executable, "-c", SAVE_FOREVER, str(path)], stdout=subprocess.PIPE) as run:
            assert run.stdout is not None
            run.stdout.readline()  # a first file is there
            time.sleep(torch.rand((), generator=generator).item() / 20)
            run.send_signal(signal.SIGKILL)
            printed = run.stdout.read().split()
        effens.load(ensemble, path)
        (weight,) = ensemble.parameters()
        assert weight.min() == weight.max() >= (int(printed[-1]) if printed else 1)
