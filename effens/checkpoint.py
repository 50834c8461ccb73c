"""A training that is killed and continued: what decides it, where it is, and the file in which it is kept."""

import os
import time
import zlib
from collections.abc import Iterator, Sized
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from effens.batches import Batches
from effens.ensembles.base import Ensemble, check_positive
from effens.storage import Checkpoint

KEPT = (
    *("epoch", "finished", "losses", "lrs", "seconds", "begun", "taken"),
    *("tensors", "optimizer", "groups", "random", "loader"),
)  # what a checkpoint holds


class Run:
    """Where a training run is, and the checkpoint, if any, in which it is kept.

    Args:
        ensemble: that is trained.
        optimizer: that trains it.
        batches: on which it is trained.

    Attributes:
        epoch: how many epochs were finished when it was resumed.
        finished: whether there was nothing left to do.
        losses: of every step, each ``(streams,)``.
        lrs: of every step.
    """

    def __init__(self, ensemble: Ensemble, optimizer: torch.optim.Optimizer, batches: Batches) -> None:
        self.ensemble, self.optimizer, self.batches = ensemble, optimizer, batches
        self.epoch, self.finished = 0, False
        self.losses: list[Tensor] = []
        self.lrs: list[float] = []
        self.began = time.perf_counter()
        self.checkpoint: Checkpoint | None = None
        self.every: int | None = None

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return time.perf_counter() - self.began

    def keep_in(self, path: str | os.PathLike[str], every: int | None, settings: dict[str, Any]) -> None:
        """Keep it in this file, every so many steps; the settings, and all else that decides it, must stay the same."""
        if every is not None:
            check_positive(every=every)
            if isinstance(self.batches.data, DataLoader):
                raise ValueError(f"every must be None with a DataLoader, which is kept between epochs, got {every}")
        if others := [name for name, value in self.tensors().items() if not isinstance(value, Tensor)]:
            raise TypeError(f"the state must hold nothing but tensors, got {others}")
        self.every = every
        call = {
            "torch": torch.__version__,
            "device": self.batches.place.type,
            **settings,
            "data": fingerprint(self.batches),
            "modules": {name: f"{type(m).__name__}({m.extra_repr()})" for name, m in self.ensemble.named_modules()},
            "geometry": {name: m.geometry for name, m in self.ensemble.named_modules() if hasattr(m, "geometry")},
            "tensors": {name: summary(tensor) for name, tensor in self.tensors().items()},
            "trained": [name for name, p in self.ensemble.named_parameters() if p.requires_grad],
            "optimizer": type(self.optimizer).__name__,
            "groups": [{**group, "params": len(group["params"])} for group in self.optimizer.param_groups],
        }
        self.checkpoint = Checkpoint(path, call)

    def resume(self) -> None:
        """Go on where the checkpoint was written, if there is one."""
        kept = self.checkpoint.read() if self.checkpoint else None
        if kept is None:
            return
        if missing := [name for name in KEPT if name not in kept]:
            raise ValueError(f"checkpoint must hold a whole state, got one without {missing}")
        self.epoch, self.finished = kept["epoch"], kept["finished"]
        self.losses, self.lrs = list(kept["losses"].to(self.batches.place)), kept["lrs"].tolist()
        self.began -= kept["seconds"]
        self.batches.begun, self.batches.taken, self.batches.epoch = kept["begun"], kept["taken"], None
        self.ensemble.load_state_dict({name: kept["tensors"][name] for name in self.ensemble.state_dict()})
        for name, buffer in self.ensemble.named_buffers():
            buffer.copy_(kept["tensors"][name])
        self.ensemble.eval()
        for group, values in zip(self.optimizer.param_groups, kept["groups"], strict=True):
            group.update(values)
        for parameter, values in zip(self.parameters(), kept["optimizer"], strict=True):
            if values:
                self.optimizer.state[parameter] = {name: beside(parameter, value) for name, value in values.items()}
        for source, state in zip(self.sources(), kept["random"], strict=True):
            source.set_rng_state(state)
        for generator, state in zip(self.generators(), kept["loader"], strict=True):
            generator.set_state(state)

    def after_step(self) -> None:
        """Keep it, if it is time to."""
        if self.checkpoint and self.every and len(self.lrs) % self.every == 0:
            check_finite(self.losses, self.every)
            self.write()

    def after_epoch(self) -> None:
        """Keep it, unless it is kept every so many steps."""
        self.epoch += 1
        if self.checkpoint and not self.every:
            self.write()

    def finish(self) -> None:
        """Keep what came out."""
        self.finished = True
        if self.checkpoint:
            self.write()

    def write(self) -> None:
        """Write the checkpoint."""
        assert self.checkpoint
        state = {
            "epoch": self.epoch,
            "finished": self.finished,
            "losses": torch.stack(self.losses),
            "lrs": torch.tensor(self.lrs, dtype=torch.float64),
            "seconds": self.seconds,
            "begun": self.batches.begun,
            "taken": self.batches.taken,
            "tensors": self.tensors(),
            "optimizer": [self.optimizer.state.get(parameter, {}) for parameter in self.parameters()],
            "groups": [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups],
            "random": [source.get_rng_state() for source in self.sources()],
            "loader": [generator.get_state() for generator in self.generators()],
        }
        self.checkpoint.write(state)

    def tensors(self) -> dict[str, Any]:
        """Return the ensemble's weights and buffers, also those that `effens.save` does not keep."""
        return {**self.ensemble.state_dict(), **dict(self.ensemble.named_buffers())}

    def parameters(self) -> list[Tensor]:
        """Return what the optimizer moves."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def sources(self) -> list[Any]:
        """Return where the CPU and the device get random numbers from."""
        return random_sources(self.batches.place)

    def generators(self) -> list[torch.Generator]:
        """Return the generators of a `DataLoader`."""
        data = self.batches.data
        if not isinstance(data, DataLoader):
            return []
        found = [data.generator, getattr(data.sampler, "generator", None)]
        for holder in (data.batch_sampler, getattr(data.batch_sampler, "sampler", None)):
            if (generator := getattr(holder, "generator", None)) not in found:
                found.append(generator)
        return [generator for generator in found if generator is not None]


def fingerprint(batches: Batches) -> dict[str, str]:
    """Describe the data: of tensors the shape and a check sum, of anything else the length."""
    if batches.tensors is None:
        return {"kind": type(batches.data).__name__, "length": str(len(cast(Sized, batches.data)))}
    return {
        name: f"{summary(t)}, CRC {zlib.crc32(t.cpu().contiguous().flatten().view(torch.uint8).numpy().data):08x}"
        for name, t in zip("xy", batches.tensors, strict=True)
    }


def summary(tensor: Tensor) -> str:
    """Return a tensor's dtype and shape."""
    return f"{tensor.dtype} {tuple(tensor.shape)}".removeprefix("torch.")


def beside(parameter: Tensor, value: Any) -> Any:
    """Return what an optimizer remembered of a parameter; what has its shape, where and as it is in memory."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


@contextmanager
def seeded(seed: int, place: torch.device) -> Iterator[None]:
    """Seed the CPU's and the device's random numbers; at the end, put both back as they were."""
    devices = random_sources(place)
    with torch.cuda.device(place) if place.type == "cuda" else nullcontext():
        states = [device.get_rng_state() for device in devices]
        try:
            torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would reach every other device, too
            for device in devices[1:]:
                device.manual_seed(seed)
            yield
        finally:
            for device, state in zip(devices, states, strict=True):
                device.set_rng_state(state)


def random_sources(place: torch.device) -> list[Any]:
    """Return the modules that have the random state of the CPU and, if that is another, of the device."""
    return [torch.random] if place.type == "cpu" else [torch.random, torch.get_device_module(place)]


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
