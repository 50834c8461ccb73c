"""A training that is killed and continued: what decides it, where it is, and the file in which it is kept."""

import inspect
import json
import os
import time
import zlib
from collections.abc import Iterator, Sized
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from effens.batches import Batches
from effens.ensembles.base import Ensemble
from effens.storage import Checkpoint


class Run:
    """Where a training run is, and the checkpoint, if any, to which it is written.

    Args:
        ensemble: that is trained.
        optimizer: that trains it.
        batches: on which it is trained.

    Attributes:
        epoch: how many epochs are finished.
        stopped: whether a callback has ended it.
        finished: whether nothing is left to do.
        losses: of every step, each ``(streams,)``.
        lrs: of every step.
    """

    def __init__(self, ensemble: Ensemble, optimizer: torch.optim.Optimizer, batches: Batches) -> None:
        self.ensemble, self.optimizer, self.batches = ensemble, optimizer, batches
        self.epoch, self.stopped, self.finished = 0, False, False
        self.losses: list[Tensor] = []
        self.lrs: list[float] = []
        self.began = time.perf_counter()
        self.checkpoint: Checkpoint | None = None

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return time.perf_counter() - self.began

    def write_to(self, path: str | os.PathLike[str], settings: dict[str, Any]) -> None:
        """Write the run to this file. The settings, and all else that decides it, must stay the same."""
        if others := [name for name, value in self.tensors().items() if not isinstance(value, Tensor)]:
            raise TypeError(f"the state must hold nothing but tensors, got {others}")
        call = {
            "torch": torch.__version__,
            "device": self.batches.device.type,
            **settings,
            "data": fingerprint(
                (self.batches.tensors and dict(zip("xy", self.batches.tensors, strict=True))) or self.batches.data
            ),
            "modules": {name: f"{type(m).__name__}({m.extra_repr()})" for name, m in self.ensemble.named_modules()},
            "sources": {kind.__qualname__: source_of(kind) for kind in map(type, self.ensemble.modules())},
            "attributes": {name: attributes(m) for name, m in self.ensemble.named_modules()},
            "tensors": {name: summary(tensor) for name, tensor in self.tensors().items()},
            "trained": [name for name, p in self.ensemble.named_parameters() if p.requires_grad],
            "optimizer": type(self.optimizer).__name__,
            "groups": [{**group, "params": len(group["params"])} for group in self.optimizer.param_groups],
        }
        self.checkpoint = Checkpoint(path, call)

    def resume(self) -> None:
        """Go on where the checkpoint was written, if there is one."""
        state = self.checkpoint.read() if self.checkpoint else None
        if state is None:
            return
        self.epoch, self.stopped, self.finished = state["epoch"], state["stopped"], state["finished"]
        self.losses, self.lrs = list(state["losses"].to(self.batches.device)), state["lrs"].tolist()
        self.began -= state["seconds"]
        self.batches.epoch = None  # the next epoch is drawn again
        self.ensemble.load_state_dict({name: state["tensors"][name] for name in self.ensemble.state_dict()})
        for name, buffer in self.ensemble.named_buffers():
            buffer.copy_(state["tensors"][name])
        self.ensemble.eval()
        for group, values in zip(self.optimizer.param_groups, state["groups"], strict=True):
            group.update(values)
        for parameter, values in zip(self.parameters(), state["optimizer"], strict=True):
            if values:
                self.optimizer.state[parameter] = {name: laid_out_as(parameter, each) for name, each in values.items()}
        for source, numbers in zip(random_sources(self.batches.device), state["random"], strict=True):
            source.set_rng_state(numbers)
        for generator, numbers in zip(self.generators(), state["generators"], strict=True):
            generator.set_state(numbers)

    def write(self) -> None:
        """Write the checkpoint, if there is one to be written."""
        if not self.checkpoint:
            return
        state = {
            "epoch": self.epoch,
            "stopped": self.stopped,
            "finished": self.finished,
            "losses": torch.stack(self.losses),
            "lrs": torch.tensor(self.lrs, dtype=torch.float64),
            "seconds": self.seconds,
            "tensors": self.tensors(),
            "optimizer": [self.optimizer.state.get(parameter, {}) for parameter in self.parameters()],
            "groups": [
                {k: plain(v) for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups
            ],
            "random": [source.get_rng_state() for source in random_sources(self.batches.device)],
            "generators": [generator.get_state() for generator in self.generators()],
        }
        self.checkpoint.write(state)

    def tensors(self) -> dict[str, Any]:
        """Return the ensemble's weights and buffers, also those that `effens.save` does not keep."""
        return {**self.ensemble.state_dict(), **dict(self.ensemble.named_buffers())}

    def parameters(self) -> list[Tensor]:
        """Return what the optimizer moves."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def generators(self) -> list[torch.Generator]:
        """Return the generators that shuffle: that of the batches, and those of a `DataLoader`."""
        data = self.batches.data
        found = [self.batches.generator]
        if isinstance(data, DataLoader):
            holders = (data, data.sampler, data.batch_sampler, getattr(data.batch_sampler, "sampler", None))
            others = [getattr(holder, "generator", None) for holder in holders]
            found += list(dict.fromkeys(generator for generator in others if generator is not None))
        return found


def fingerprint(data: Any) -> Any:
    """Describe data as far as they can be seen without drawing from them: what tensors and arrays hold, and lengths."""
    match data:
        case Tensor():
            content = data.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            return f"{summary(data)}, CRC {zlib.crc32(content):08x}"
        case np.ndarray():
            numbers: Any = repr(data.tolist()).encode() if data.dtype.hasobject else np.ascontiguousarray(data)
            return f"{data.dtype} {data.shape}, CRC {zlib.crc32(numbers):08x}"
        case dict():
            return {str(name): fingerprint(part) for name, part in data.items()}
        case tuple() | list():
            parts = json.dumps([fingerprint(part) for part in data])
            return f"{len(data)} parts, CRC {zlib.crc32(parts.encode()):08x}"
        case DataLoader():
            how = {name: getattr(data, name) for name in ("batch_size", "drop_last")}
            how |= {name: fingerprint(part) for name, part in vars(data.sampler).items() if isinstance(part, Tensor)}
            return {**how, "sampler": type(data.sampler).__name__, "dataset": fingerprint(data.dataset)}
        case Dataset():
            seen = (Tensor, np.ndarray, tuple, list, dict, Dataset)  # counters may change
            held = {name: fingerprint(part) for name, part in vars(data).items() if isinstance(part, seen)}
            picked = fingerprint(list(data.indices)) if isinstance(data, Subset) else ""
            length = len(data) if isinstance(data, Sized) else None
            return {"kind": type(data).__name__, "length": length, **held, "picked": picked}
    return repr(data) if isinstance(data, bool | int | float | str) else type(data).__name__


def plain(value: Any) -> Any:
    """Return a number of NumPy's as Python's."""
    return value.item() if isinstance(value, np.generic) else value


def attributes(module: nn.Module) -> dict[str, Any]:
    """Return the settings of a layer of PyTorch's, which not all tell in their repr, or a convolution's geometry."""
    known = type(module).__module__.startswith("torch.")
    named = {key: value for key, value in vars(module).items() if known and key[0] != "_" and key != "training"}
    return named | {"geometry": getattr(module, "geometry", None)}


def source_of(kind: type) -> str:
    """Return a check sum of a class's source text, where it is the reader's own and can be read."""
    if kind.__module__.split(".")[0] in ("torch", "effens"):
        return ""
    try:
        return f"CRC {zlib.crc32(inspect.getsource(kind).encode()):08x}"
    except (OSError, TypeError):  # typed at a prompt
        return "unknown"


def summary(tensor: Tensor) -> str:
    """Return a tensor's dtype and shape."""
    return f"{tensor.dtype} {tuple(tensor.shape)}".removeprefix("torch.")


def laid_out_as(parameter: Tensor, value: Any) -> Any:
    """Return what an optimizer remembered of a parameter; what has its shape, where and as it is in memory."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


@contextmanager
def fixed_seed(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the CPU's and the device's random numbers; at the end, put both back as they were."""
    sources = random_sources(device)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        states = [source.get_rng_state() for source in sources]
        try:
            torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would reach every other device, too
            for source in sources[1:]:
                source.manual_seed(seed)
            yield
        finally:
            for source, state in zip(sources, states, strict=True):
                source.set_rng_state(state)


def random_sources(device: torch.device) -> list[Any]:
    """Return the modules that have the random state of the CPU and, if that is another, of the device."""
    return [torch.random] if device.type == "cpu" else [torch.random, torch.get_device_module(device)]


def check_finite(losses: list[Tensor], last: int) -> None:
    """Raise `FloatingPointError` if one of the last losses is not finite; called rarely, for it makes a GPU wait."""
    if not losses:
        raise ValueError("a batch must hold at least one example for each member, got none that does")
    finite = torch.stack(losses[-last:]).isfinite().all(1)
    if not bool(finite.all()):
        step = len(losses) - len(finite) + int((~finite).int().argmax())
        loss = [round(value, 4) for value in losses[step].tolist()]
        raise FloatingPointError(
            f"losses must be finite, got {loss} at step {step}: lower the learning rate, or look at the data"
        )
