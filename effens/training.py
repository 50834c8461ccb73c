"""The one training loop and the one way to predict, for every method."""

import math
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from effens.ensembles.base import Ensemble
from effens.ensembles.deep import DeepEnsemble, LoopedLayer
from effens.ensembles.layers import MemberLayer
from effens.likelihoods import Categorical, Likelihood
from effens.storage import Checkpoint

Batch = tuple[bool, Tensor, Tensor, Tensor | None]
Data = tuple[Tensor, Tensor] | Dataset[Any] | DataLoader[Any]
MakeOptimizer = Callable[..., torch.optim.Optimizer]
FUSED = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)
KEPT = (
    *("epoch", "finished", "losses", "lrs", "seconds", "begun", "taken"),
    *("tensors", "optimizer", "groups", "random", "loader"),
)  # what a checkpoint holds
GRAPHS = 10_000_000  # weights: up to here a GPU waits for its next kernel, and a compiled network runs as a CUDA graph


@dataclass(frozen=True)
class History:
    """What happened in training.

    Attributes:
        losses: mean loss of each network at each step, ``(steps, streams)``, in nats.
        lrs: the learning rate of each step, ``(steps,)``; with rates of the members' own ``(steps, streams)``.
        seconds: training time, that of runs which were cut short and continued included.

    Example:
        >>> ensemble = effens.DeepEnsemble(lambda: nn.Linear(3, 2), members=2)
        >>> history = effens.fit(ensemble, (torch.randn(8, 3), torch.randint(2, (8,))), epochs=3, progress=False)
        >>> history.losses.shape  # 3 steps of 2 networks
        torch.Size([3, 2])
    """

    losses: Tensor
    lrs: Tensor
    seconds: float

    @property
    def steps(self) -> int:
        """How many steps the optimizer took."""
        return len(self.lrs)

    def __repr__(self) -> str:
        last = self.losses[-1].mean().item() if self.steps else math.nan
        return f"History(steps={self.steps}, last loss={last:.4g}, seconds={self.seconds:.1f})"


def device() -> torch.device:
    """Return the best device at hand: cuda, then mps, then cpu.

    Example:
        >>> device().type in ("cuda", "mps", "cpu")
        True
    """
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@torch.inference_mode(False)  # with gradients, whatever mode it is called in
def fit(
    ensemble: Ensemble,
    data: Data,
    *,
    epochs: int = 20,
    batch_size: int = 128,
    lr: float | Sequence[float] = 1e-3,
    weight_decay: float | Sequence[float] = 0.0,
    optimizer: MakeOptimizer = torch.optim.AdamW,
    likelihood: Likelihood | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool = True,
    precision: str = "float32",
    compile: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int | None = None,
) -> History:
    """Train an ensemble. What makes a method is in its hooks: see `Ensemble`.

    With a ``checkpoint``, a run that was killed goes on where that was last written, when it is called again in the
    same way, and ends bit by bit as if it had never stopped: weights, buffers, optimizer, schedule, every source of
    random numbers that PyTorch has (on the same machine, with as many threads). A finished run returns at once.
    What is no tensor, such as a counter that a network keeps in an attribute, is not kept, nor are the random states of
    NumPy and Python: a `Dataset` that draws must draw from PyTorch.

    Args:
        ensemble: any ensemble; it is moved to ``device`` and stays there, in eval mode.
        data: tensors ``(x, y)``, a map-style `Dataset`, or a `DataLoader`, which is used as it is given.
        epochs: passes over the data.
        batch_size: examples in a step; a `DataLoader` has its own.
        lr: the highest learning rate; `Ensemble.schedule` moves it at every step. Members of a `DeepEnsemble` can
            have rates of their own, one for each, with `torch.optim.AdamW` or `torch.optim.SGD`.
        weight_decay: the optimizer's, for all but an ensemble's fast weights; or one for each member, likewise.
        optimizer: called with parameter groups, ``lr`` and ``weight_decay``.
        likelihood: what the outputs mean; `Categorical` by default.
        device: where to train; by default `effens.device`.
        seed: of the shuffles and of dropout. The global random state is left as it was.
        progress: whether to show a progress bar when training takes longer than two seconds.
        precision: ``"float32"``: every product in the weights' own precision. ``"bfloat16"``: `torch.autocast`, which
            takes the products in bfloat16 and leaves weights, losses and the optimizer as they are. Faster on a GPU
            from Ampere on, and on CPUs with instructions for it; elsewhere slower.
        compile: whether to compile the network with `torch.compile`, which takes some seconds at the first step of each
            shape, and on a CPU a C++ compiler. On a GPU a small network then runs as a CUDA graph.
        checkpoint: a file, by custom ``*.safetensors``, in which the run is kept as it goes, and from which it goes on.
            It is replaced once the new one is complete, and belongs to one run at a time.
        every: steps from one checkpoint to the next; by default there is one after each epoch.

    Returns:
        The losses, the rates and the time taken.

    Raises:
        ValueError: there are no examples, labels are out of range, or targets or outputs are not one per example (but
            one for each pixel, say); or there are rates or decays for each member where there cannot be, or not one for
            each; or ``checkpoint`` is no whole file, or of another call: other settings, shapes, numbers in tensors
            ``data``, version of PyTorch ...
        FloatingPointError: a loss is not finite. No checkpoint is written after it.
        OSError: the checkpoint cannot be written, the disk is full, say. The last one is kept.
        TypeError: ``ensemble`` is none, but a plain network, say.

    Example:
        >>> ensemble = effens.DeepEnsemble(lambda: nn.Linear(3, 2), members=4)
        >>> x, y = torch.randn(50, 3), torch.randint(2, (50,))
        >>> history = fit(ensemble, (x, y), epochs=2, progress=False)
        >>> history.steps
        2
    """
    check_ensemble(ensemble)
    check_positive(epochs=epochs, batch_size=batch_size)
    likelihood = Categorical() if likelihood is None else likelihood
    place = place_of(device)
    ensemble.to(place)
    batches = Batches(ensemble, data, batch_size, place, torch.Generator().manual_seed(seed))
    if not any(parameter.requires_grad for parameter in ensemble.parameters()):
        raise ValueError("the ensemble must have weights to train, got none that require gradients")
    descent: torch.optim.Optimizer | PerMember
    if isinstance(lr, Sequence) or isinstance(weight_decay, Sequence):
        descent = PerMember(ensemble, optimizer, lr, weight_decay)
    else:
        groups = ensemble.parameter_groups(lr, weight_decay)
        descent = make_optimizer(optimizer, groups, lr, weight_decay, sparse=has_sparse(ensemble))
    highest = [group["lr"] for group in descent.param_groups]
    steps = epochs * len(batches)
    forwards = {
        shared: asker(forward, ensemble, place, precision, compile)
        for shared, forward in ((True, ensemble), (False, ensemble.forward_members))
    }
    run = Run(ensemble, descent.optimizer if isinstance(descent, PerMember) else descent, batches)
    if checkpoint is not None:
        settings = dict(epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay, seed=seed)
        how = dict(likelihood=repr(likelihood), precision=precision, compile=compile)
        run.keep_in(checkpoint, every, {**settings, **how})
    elif every is not None:
        raise ValueError(f"every must be None without a checkpoint, got {every}")
    with seeded(seed, place), bar(steps, progress) as shown:
        run.resume()
        shown.update(len(run.lrs))
        for _ in range(run.epoch, epochs):
            ensemble.train()
            for shared, xs, ys, unchecked in batches:
                step = len(run.lrs)
                multiplier = ensemble.schedule(step, steps)
                for group, top in zip(descent.param_groups, highest, strict=True):
                    group["lr"] = top * multiplier
                descent.zero_grad()
                outputs = forwards[shared](xs)
                if unchecked is not None:
                    likelihood.check(outputs, unchecked)
                each = losses_of(likelihood, outputs, ys)  # (streams, batch)
                ensemble.reduce(each).backward()
                descent.step()
                ensemble.collect(step, steps)
                run.losses.append(each.detach().mean(1))
                run.lrs.append([r * multiplier for r in lr] if isinstance(lr, Sequence) else lr * multiplier)
                run.after_step()
                shown.update()
            check_finite(run.losses, len(batches))
            run.after_epoch()
        if not run.finished:
            ensemble.eval()
            ensemble.finish(batches.inputs())
            run.finish()
    return History(torch.stack(run.losses).cpu(), torch.tensor(run.lrs), run.seconds)


@torch.no_grad()
def predict(
    ensemble: Ensemble,
    x: Tensor,
    *,
    likelihood: Likelihood | None = None,
    chunk: int = 1024,
    precision: str = "float32",
    compile: bool = False,
) -> Any:
    """Ask every member, in eval mode, without gradients, in chunks of rows.

    Args:
        ensemble: any ensemble; it is asked on its own device, and left in the mode it was in.
        x: inputs ``(batch, ...)``.
        likelihood: what the outputs mean; `Categorical` by default.
        chunk: rows in a chunk.
        precision: ``"float32"``, the weights' own, or ``"bfloat16"``, as of `fit`; outputs are never below float32.
        compile: whether to compile the network, as of `fit`: it pays where the same shape is asked often.

    Returns:
        With `Categorical` probabilities ``(members, batch, classes)``; with `Gaussian` or `StudentT` a
        `torch.distributions` object of batch shape ``(members, batch)``; either on the device of ``x``.

    Raises:
        TypeError: ``ensemble`` is none, or ``x`` is no tensor, but an array, say.
        ValueError: ``chunk`` is below 1, or ``precision`` is unknown.

    Example:
        >>> ensemble = effens.DeepEnsemble(lambda: nn.Linear(3, 2), members=4)
        >>> predict(ensemble, torch.randn(10, 3)).shape  # probabilities
        torch.Size([4, 10, 2])
        >>> predict(ensemble, torch.randn(10, 3), likelihood=effens.Gaussian()).batch_shape
        torch.Size([4, 10])
    """
    check_ensemble(ensemble)
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    check_positive(chunk=chunk)
    likelihood = Categorical() if likelihood is None else likelihood
    modes = [(module, module.training) for module in ensemble.modules()]
    home = next(chain(ensemble.parameters(), ensemble.buffers()), x).device
    ask = asker(ensemble, ensemble, home, precision, compile)
    ensemble.eval()
    try:
        parts = [returned(ask(moved(part, home)), x.device) for part in x.split(chunk)]
    finally:
        for module, mode in modes:
            module.training = mode
    if home.type == "cuda":
        torch.cuda.current_stream(home).synchronize()  # the last answers may still be on their way
    return likelihood.predict(torch.cat(parts, dim=1))


def asker(
    ask: Callable[[Tensor], Tensor], ensemble: Ensemble, place: torch.device, precision: str, compile: bool
) -> Callable[[Tensor], Tensor]:
    """Return a function that asks an ensemble in this precision, compiled or not; what it returns is to be used up.

    The outputs of a CUDA graph are overwritten when it runs again.
    """
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision must be 'float32' or 'bfloat16', got {precision!r}")
    if compile:
        small = sum(parameter.numel() for parameter in ensemble.parameters()) <= GRAPHS
        ask = torch.compile(ask, mode="reduce-overhead" if place.type == "cuda" and small else "default")

    def call(x: Tensor) -> Tensor:
        if compile and place.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        if precision == "float32":
            return ask(x)
        with torch.autocast(place.type, torch.bfloat16):
            outputs = ask(x)
        return outputs.float() if outputs.dtype == torch.bfloat16 else outputs

    return call


def losses_of(likelihood: Likelihood, outputs: Tensor, ys: Tensor) -> Tensor:
    """Return the loss of each example, ``(streams, batch)``; raise `ValueError` if there is not one for each."""
    losses = likelihood.nll(outputs, ys)
    if losses.shape != outputs.shape[:2]:
        rule = "outputs must be (members, batch, outputs), with one loss for each"
        raise ValueError(f"{rule}, got outputs {tuple(outputs.shape)} and losses {tuple(losses.shape)}")
    return losses


def moved(tensor: Tensor, place: torch.device) -> Tensor:
    """Return a tensor on this device; on its way to a GPU from memory that stays put, so that nobody waits for it."""
    if place.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(place, non_blocking=True)
    return tensor.to(place)


def picked(tensor: Tensor, index: Tensor) -> Tensor:
    """Return ``tensor[index]``, whole rows copied at a time: of images five times sooner than number by number."""
    rows = tensor.index_select(0, index.flatten())
    return rows.view(*index.shape, *rows.shape[1:])


def returned(outputs: Tensor, place: torch.device) -> Tensor:
    """Return outputs on this device, in memory of their own; from a GPU they may still be on their way."""
    if outputs.device == place:
        return outputs.clone()
    return outputs.to(place, non_blocking=outputs.device.type == "cuda")


class Batches:
    """The batches of an epoch: ``(shared, xs, ys, unchecked)``.

    ``xs`` is ``(streams, batch, ...)``; or ``(batch, ...)`` where ``shared``: all streams see the same. ``unchecked``
    are targets nobody has looked at yet, or None.
    """

    def __init__(
        self, ensemble: Ensemble, data: Data, batch_size: int, place: torch.device, generator: torch.Generator
    ) -> None:
        self.ensemble, self.batch_size, self.place, self.generator = ensemble, batch_size, place, generator
        self.data = data
        self.skipped = 0
        self.tensors: tuple[Tensor, Tensor] | None = None
        if isinstance(data, tuple | list):
            x, y = as_pair(data)
            if len(x) != len(y):
                raise ValueError(f"x and y must have the same length, got {len(x)} and {len(y)}")
            self.tensors = x.to(place), y.to(place)
        elif isinstance(data, DataLoader):
            self.skipped = skipped(data, ensemble)
        elif not isinstance(data, Sized):
            raise ValueError(f"data must have a length, got {type(data).__name__} without one")
        self.looked = False
        self.begun, self.taken = generator.get_state(), 0  # this epoch's random state, and how many batches it gave
        self.epoch: list[Tensor] | None = None  # the indices of this epoch's batches
        self.steps = len(data) - self.skipped if isinstance(data, DataLoader) else len(self.indices())
        if self.steps == 0:
            raise ValueError("data must hold at least one example for each member, got none")

    def __len__(self) -> int:
        """Return how many steps an epoch has."""
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of this epoch that were not taken yet."""
        loaded = isinstance(self.data, DataLoader)
        for batch in self.loaded() if loaded else map(self.fetch, self.indices()[self.taken :]):
            self.taken += 1
            yield batch
        self.begun, self.taken, self.epoch = self.generator.get_state(), 0, None

    def loaded(self) -> Iterator[Batch]:
        """Yield what a `DataLoader` gives."""
        self.generator.set_state(self.begun)
        for batch in cast(DataLoader[Any], self.data):
            x, y = as_pair(batch)
            for index in parts_of(self.ensemble, len(x), self.generator):
                index = moved(index, self.place)
                yield index.dim() == 1, picked(moved(x, self.place), index), moved(y, self.place)[index], y

    def indices(self) -> list[Tensor]:
        """Return this epoch's indices into the data, a step each, as `Ensemble.batches` has them."""
        if self.epoch is None:
            self.generator.set_state(self.begun)
            n = len(self.tensors[0]) if self.tensors else len(cast(Sized, self.data))
            self.epoch = [index for index in self.ensemble.batches(n, self.batch_size, self.generator) if index.numel()]
        return self.epoch

    def fetch(self, index: Tensor) -> Batch:
        """Return inputs and targets at ``index``."""
        if self.tensors:
            unchecked = None if self.looked else self.tensors[1]
            self.looked = True
            index = moved(index, self.place)
            return index.dim() == 1, picked(self.tensors[0], index), self.tensors[1][index], unchecked
        dataset = cast(Dataset[Any], self.data)
        x, y = as_pair(default_collate([dataset[i] for i in index.flatten().tolist()]))
        xs, ys = (moved(part, self.place).unflatten(0, index.shape) for part in (x, y))
        return index.dim() == 1, xs, ys, y

    def inputs(self) -> Iterator[Tensor]:
        """Yield a copy of every training input once, in batches, for `Ensemble.finish`, which may change it."""
        if self.tensors:
            yield from (part.clone() for part in self.tensors[0].split(self.batch_size))
        elif isinstance(self.data, DataLoader):
            for batch in self.data:
                yield moved(as_pair(batch)[0], self.place).clone()
        else:
            for part in torch.arange(len(cast(Sized, self.data))).split(self.batch_size):
                yield self.fetch(part)[1]

    def look(self) -> dict[str, str]:
        """Describe the data: of tensors the shape and a check sum, of anything else the length."""
        if self.tensors is None:
            return {"kind": type(self.data).__name__, "length": str(len(cast(Sized, self.data)))}
        return {
            name: f"{summary(t)}, CRC {zlib.crc32(t.cpu().contiguous().flatten().view(torch.uint8).numpy().data):08x}"
            for name, t in zip("xy", self.tensors, strict=True)
        }


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

    def __init__(self, ensemble: Ensemble, optimizer: torch.optim.Optimizer, batches: "Batches") -> None:
        self.ensemble, self.optimizer, self.batches = ensemble, optimizer, batches
        self.epoch, self.finished = 0, False
        self.losses: list[Tensor] = []
        self.lrs: list[Any] = []
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
            "data": self.batches.look(),
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


def skipped(loader: DataLoader[Any], ensemble: Ensemble) -> int:
    """Return how many batches of a loader's epoch are too small to be split among members: the last one, or none."""
    if not loader.batch_size or loader.drop_last or not isinstance(loader.sampler, Sized):
        return 0
    last = len(loader.sampler) % loader.batch_size
    return int(last > 0 and not parts_of(ensemble, last, torch.Generator()))


def parts_of(ensemble: Ensemble, n: int, generator: torch.Generator) -> list[Tensor]:
    """Return who sees what of a loader's batch of ``n`` examples; nothing where it is too small to be split."""
    return [index for index in ensemble.batches(n, n, generator) if index.numel()]


def summary(tensor: Tensor) -> str:
    """Return a tensor's dtype and shape."""
    return f"{tensor.dtype} {tuple(tensor.shape)}".removeprefix("torch.")


def beside(parameter: Tensor, value: Any) -> Any:
    """Return what an optimizer remembered of a parameter; what has its shape, where and as it is in memory."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def as_pair(batch: Any) -> tuple[Tensor, Tensor]:
    """Return a batch as ``(x, y)``; raise `ValueError` if it is anything else."""
    parts = batch if isinstance(batch, tuple | list) else [batch]
    if len(parts) != 2 or not all(isinstance(part, Tensor) for part in parts):
        raise ValueError(f"data must give pairs of tensors (x, y), got {[type(part).__name__ for part in parts]}")
    return parts[0], parts[1]


def place_of(name: torch.device | str | None) -> torch.device:
    """Return the named device, or the best at hand."""
    return device() if name is None else torch.device(name)


def make_optimizer(
    optimizer: MakeOptimizer,
    groups: list[dict[str, Any]],
    lr: float,
    weight_decay: float,
    *,
    sparse: bool = False,
) -> torch.optim.Optimizer:
    """Make the optimizer, fused where PyTorch can: for many small parameters most of its time is overhead."""
    floating = all(p.is_floating_point() for group in groups for p in group["params"])
    options = {"fused": True} if optimizer in FUSED and floating and not sparse else {}
    return optimizer(groups, lr=lr, weight_decay=weight_decay, **options)


def has_sparse(ensemble: nn.Module) -> bool:
    """Say whether an embedding has sparse gradients, which no fused optimizer takes."""
    return any(isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.sparse for m in ensemble.modules())


class PerMember:
    """One optimizer for all members of a `DeepEnsemble`, who have rates and decays of their own.

    But for the decay, a step of AdamW, or of SGD, is the rate times something that depends on no weight and on no
    rate. So the optimizer moves zeros, at the schedule's rate, and each weight moves by that times its member's rate.

    Args:
        ensemble: on the device on which it is trained.
        optimizer: `torch.optim.AdamW` or `torch.optim.SGD`, or a partial of one.
        lr: one for all, or one for each member.
        weight_decay: likewise.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        optimizer: MakeOptimizer,
        lr: float | Sequence[float],
        weight_decay: float | Sequence[float],
    ) -> None:
        rule = optimizer.func if isinstance(optimizer, partial) else optimizer
        if rule not in (torch.optim.AdamW, torch.optim.SGD):
            name = getattr(rule, "__name__", type(rule).__name__)
            raise ValueError(f"optimizer must be AdamW or SGD for rates or decays of the members' own, got {name}")
        owners = members_of(ensemble)
        lrs = torch.tensor(one_each("lr", lr, ensemble.members), dtype=torch.float64)
        decays = torch.tensor(one_each("weight_decay", weight_decay, ensemble.members), dtype=torch.float64)
        self.coupled = rule is torch.optim.SGD  # the decay goes through the momentum
        self.weights = list(owners)
        self.lrs = [lrs[owner].to(p.dtype).to(p.device) for p, owner in owners.items()]
        self.decays = [decays[owner].to(p.dtype).to(p.device) for p, owner in owners.items()]
        self.moves = [torch.zeros_like(p) for p in owners]
        self.optimizer = make_optimizer(optimizer, [{"params": self.moves}], 1.0, 0.0)
        self.param_groups = self.optimizer.param_groups
        self.sign = -1 if self.param_groups[0]["maximize"] else 1  # of the gradient that the optimizer follows

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for weight in self.weights:
            weight.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Move every weight."""
        for weight, move, decay in zip(self.weights, self.moves, self.decays, strict=True):
            move.grad = weight.grad
            if self.coupled and move.grad is not None:
                move.grad.addcmul_(weight, decay, value=self.sign)
        self.optimizer.step()
        multiplier = self.param_groups[0]["lr"]
        for weight, move, lr, decay in zip(self.weights, self.moves, self.lrs, self.decays, strict=True):
            if weight.grad is None:  # not asked in this step: it neither moves nor decays
                continue
            if not self.coupled:
                weight.mul_(1 - multiplier * lr * decay)
            weight.addcmul_(move, lr)
            move.zero_()


def members_of(ensemble: Ensemble) -> dict[nn.Parameter, Tensor]:
    """Return which member each weight belongs to: its number, or all numbers along a stacked weight's first axis."""
    owners: dict[nn.Parameter, Tensor] = {}
    if not isinstance(ensemble, DeepEnsemble):
        rule = "only members of a DeepEnsemble can have rates or decays of their own"
        raise ValueError(f"{rule}, got a {type(ensemble).__name__}")
    for layer in ensemble.network.modules():
        if isinstance(layer, LoopedLayer):
            pairs = [(p, torch.tensor(m)) for m, network in enumerate(layer.layers) for p in network.parameters()]
        elif isinstance(layer, MemberLayer):
            pairs = [(p, torch.arange(len(p)).view(-1, *[1] * (p.dim() - 1))) for p in layer.parameters()]
        else:
            continue
        for p, owner in pairs:
            if not torch.equal(owners.setdefault(p, owner), owner):
                raise ValueError("members with rates or decays of their own must share no weights, got shared ones")
    return {p: owner for p, owner in owners.items() if p.requires_grad}


def one_each(name: str, values: float | Sequence[float], members: int) -> list[float]:
    """Return a value for each member; raise `ValueError` unless there are so many, and all are rates, or decays."""
    each = list(values) if isinstance(values, Sequence) else [values] * members
    if len(each) != members:
        raise ValueError(f"{name} must hold one value for each of {members} members, got {len(each)}")
    least, low = (">", math.ulp(0.0)) if name == "lr" else (">=", 0.0)
    if wrong := [value for value in each if not low <= value < math.inf]:
        raise ValueError(f"{name} must be {least} 0 and finite, got {wrong[0]}")
    return each


def bar(steps: int, progress: bool) -> "tqdm[Any]":
    """Return a progress bar that shows up after two seconds."""
    return tqdm(total=steps, desc="fit", unit="step", delay=2, leave=False, disable=not progress)


def check_ensemble(ensemble: nn.Module) -> None:
    """Raise `TypeError` unless this is an ensemble."""
    if not isinstance(ensemble, Ensemble):
        rule = "ensemble must be an Ensemble (one network: effens.DeepEnsemble.of([network]))"
        raise TypeError(f"{rule}, got {type(ensemble).__name__}")


def check_positive(**values: int) -> None:
    """Raise `ValueError` unless every value is at least 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")


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
