"""Weights on disk: safetensors, so that a file can hold numbers and nothing that runs."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

FORMAT = "effens 1"


def save(ensemble: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write every weight and buffer of an ensemble to one file, whole or not at all.

    Args:
        ensemble: any ensemble, or any network.
        path: where to; by custom ``*.safetensors``. A file that is there is replaced once the new one is complete.

    Raises:
        TypeError: the state holds more than tensors (a module has an extra state).
    """
    if others := [name for name, value in ensemble.state_dict().items() if not isinstance(value, Tensor)]:
        raise TypeError(f"the state must hold nothing but tensors, got {others}")
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in ensemble.state_dict().items()}
    write_whole(Path(path), to_bytes(tensors, metadata={"format": FORMAT, **kind(ensemble)}))


def load(ensemble: nn.Module, path: str | os.PathLike[str]) -> None:
    """Read weights that `save` wrote into an ensemble of the same kind, members and network: all of them, or none.

    Args:
        ensemble: made as the saved one was; it stays on its device.
        path: what `save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file was cut or was not written by `save`, or holds another kind of ensemble, other names, other
            shapes, or numbers of another kind (real ones for integers).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path must be a file that effens.save wrote, got {path.name}, which is no file")
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except SafetensorError as error:
        raise ValueError(
            f"{path.name} must be a whole safetensors file, got one that cannot be read: {error}"
        ) from None
    expected = {"format": FORMAT, **kind(ensemble)}
    if wrong := {key: found.get(key) for key in expected if found.get(key) != expected[key]}:
        raise ValueError(f"{path.name} must hold {expected}, got {wrong}")
    state = ensemble.state_dict()
    if tensors.keys() != state.keys():
        raise ValueError(
            f"{path.name} must hold the ensemble's weights, got other names: {sorted(tensors.keys() ^ state.keys())}"
        )
    for name, tensor in state.items():
        if tensor.shape != tensors[name].shape:
            shapes = tuple(tensor.shape), tuple(tensors[name].shape)
            raise ValueError(f"{path.name}: {name} must have shape {shapes[0]}, got {shapes[1]}")
        if not torch.can_cast(tensors[name].dtype, tensor.dtype):
            raise ValueError(f"{path.name}: {name} must fit {tensor.dtype}, got {tensors[name].dtype}")
    ensemble.load_state_dict(tensors)


def kind(ensemble: nn.Module) -> dict[str, str]:
    """Return what must agree between the ensemble that was saved and the one that is loaded."""
    facts: dict[str, Any] = {"kind": type(ensemble).__name__, "members": getattr(ensemble, "members", 1)}
    return {key: str(value) for key, value in facts.items()}


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under another name first, so that a killed run leaves the old file or the new one."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
