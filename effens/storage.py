"""Weights and checkpoints on disk: files that hold numbers, and nothing that runs when they are read."""

import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

FORMAT = "effens 1"
CHECKPOINT = "effens checkpoint 3"  # to be raised when a step of training, or what is kept of it, changes


def save(ensemble: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write every weight and buffer of an ensemble to one file, whole or not at all.

    Args:
        ensemble: any ensemble, or any network.
        path: where to; by custom ``*.safetensors``. A file that is there is replaced once the new one is complete.

    Raises:
        FileNotFoundError: the folder does not exist.
        TypeError: the state holds more than tensors (a module has an extra state).

    Example:
        >>> path = Path(tempfile.mkdtemp()) / "ensemble.safetensors"
        >>> save(effens.DeepEnsemble(lambda: nn.Linear(3, 2), members=4), path)
        >>> path.stat().st_size < 1000
        True
    """
    check_folder("path", Path(path))
    if others := [name for name, value in ensemble.state_dict().items() if not isinstance(value, Tensor)]:
        raise TypeError(f"the state must hold nothing but tensors, got {others}")
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in ensemble.state_dict().items()}
    write_whole(Path(path), to_bytes(tensors, metadata={"format": FORMAT, **kind(ensemble)}))


def load(ensemble: nn.Module, path: str | os.PathLike[str]) -> None:
    """Read weights that `save` wrote into an ensemble of the same kind, members and network: all of them, or none.

    It is left in eval mode, ready to predict.

    Args:
        ensemble: made as the saved one was; it stays on its device.
        path: what `save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file was cut or was not written by `save`, or holds another kind of ensemble, other names, other
            shapes, numbers of another kind (real ones for integers), or a `HyperEnsemble` of another index.

    Example:
        >>> make = lambda: effens.DeepEnsemble(lambda: nn.Linear(3, 2), members=4)
        >>> path, trained, again = Path(tempfile.mkdtemp()) / "ensemble.safetensors", make(), make()
        >>> effens.save(trained, path)
        >>> load(again, path)
        >>> x = torch.randn(5, 3)
        >>> torch.equal(again(x), trained(x))
        True
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path must be a file that effens.save wrote, got {path.name}, which is no file")
    tensors, found = read_whole(path)
    expected = {"format": FORMAT, **kind(ensemble)}
    if wrong := {key: found.get(key) for key in expected if found.get(key) != expected[key]}:
        raise ValueError(f"{path.name} must hold {expected}, got {wrong}")
    state = ensemble.state_dict()
    if tensors.keys() != state.keys():
        raise ValueError(f"{path.name} must hold its weights, got other names: {sorted(tensors.keys() ^ state.keys())}")
    for name, tensor in state.items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(f"{path.name}: {name} must have shape {(*tensor.shape,)}, got {(*tensors[name].shape,)}")
        if not torch.can_cast(tensors[name].dtype, tensor.dtype):
            raise ValueError(f"{path.name}: {name} must fit {tensor.dtype}, got {tensors[name].dtype}")
    for prefix, module in ensemble.named_modules():  # first, for a module may refuse its extra state
        if (name := f"{prefix}._extra_state".lstrip(".")) in tensors:
            module.set_extra_state(tensors[name])
    ensemble.eval().load_state_dict(tensors)


def kind(ensemble: nn.Module) -> dict[str, str]:
    """Return what must agree between the ensemble that was saved and the one that is loaded."""
    members = getattr(ensemble, "planned", getattr(ensemble, "members", 1))
    return {"kind": type(ensemble).__name__, "members": str(members)}


class Checkpoint:
    """The state of a training run in one file, as `torch.save` writes it and `torch.load` reads it, weights only.

    Args:
        path: of the file, which one run writes at a time.
        call: what decides the run. A file that another call wrote is refused.

    Raises:
        FileNotFoundError: the folder does not exist.
        IsADirectoryError: ``path`` is a folder.

    Example:
        >>> path = Path(tempfile.mkdtemp()) / "run.pt"
        >>> Checkpoint(path, {"epochs": 5}).write({"step": 3, "weights": [torch.zeros(2)]})
        >>> Checkpoint(path, {"epochs": 5}).read()
        {'step': 3, 'weights': [tensor([0., 0.])]}
    """

    def __init__(self, path: str | os.PathLike[str], call: dict[str, Any]) -> None:
        self.path = Path(path)
        self.call = json.loads(re.sub(r" at 0x[0-9a-f]+", "", json.dumps(call, default=repr)))  # as it will be read
        check_folder("checkpoint", self.path)
        if self.path.is_dir():
            raise IsADirectoryError(f"checkpoint must name a file, got the folder {self.path}")

    def write(self, state: Any) -> None:
        """Replace the file by one that holds this state, whole or not at all.

        Args:
            state: tensors, numbers, strings and None, in dicts, lists and tuples.

        Raises:
            pickle.UnpicklingError: there is anything else in it.
            OSError: it cannot be written, the disk is full, say; then the file is as it was.
        """
        content = io.BytesIO()
        torch.save({"format": CHECKPOINT, "call": self.call, "state": state}, content)
        if not self.path.exists():  # what cannot be read again is refused at once
            torch.load(io.BytesIO(content.getvalue()), weights_only=True)
        try:
            write_whole(self.path, content.getvalue(), "run")  # what a killed run left is written over
        except OSError as error:
            left = "what it held before is kept" if self.path.exists() else "there is none yet"
            rule = f"checkpoint {self.path.name} must be written ({len(content.getvalue()):,} bytes)"
            raise OSError(error.errno, f"{rule}, got {error.strerror}: {left}") from error

    def read(self) -> Any:
        """Return the state that was written, each tensor on the kind of device where it was; None if there is no file.

        Raises:
            ValueError: the file was cut or was not written by `write`, in this version; or another call wrote it.
        """
        if not self.path.exists():
            return None
        name = self.path.name
        try:
            found = torch.load(self.path, weights_only=True)
        except Exception as error:  # of many kinds, for a file of anything
            raise ValueError(f"{name} must be a whole checkpoint, got one that cannot be read: {error}") from None
        if not isinstance(found, dict) or found.get("format") != CHECKPOINT:
            raise ValueError(f"{name} must hold {CHECKPOINT!r}, got another file")
        call = {key: self.call[key] for key in self.call if key in found["call"]}  # an older version wrote fewer
        if different := list(differences(call, found["call"])):
            more = f", and {len(different) - 3} more" if len(different) > 3 else ""
            raise ValueError(f"{name} must be a checkpoint of the same call, got {'; '.join(different[:3])}{more}")
        return found["state"]


def differences(expected: Any, found: Any, name: str = "") -> Iterator[str]:
    """Say where nested values differ."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in {**expected, **found}:
            yield from differences(expected.get(key), found.get(key), f"{name}.{key}" if name else key)
    elif expected != found:
        yield f"{name} {found} instead of {expected}"


def read_whole(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file, and its metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path.name} must be a whole safetensors file, got {error}") from None


def check_folder(name: str, path: Path) -> None:
    """Raise `FileNotFoundError` unless there is a folder for this file."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{name} must be in a folder that exists, got {path}")


def write_whole(path: Path, content: bytes, token: str = "") -> None:
    """Write a file under another name first, so that a killed run leaves the old file or the new one."""
    part = path.with_name(f".{path.name}.{token or uuid4().hex}.part")  # processes of two machines can have one number
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
