"""The one training loop and the one way to predict, for every method."""

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from effens.batches import Batches, Data, to_device
from effens.checkpoint import Run, check_finite, fingerprint, fixed_seed, source_of
from effens.ensembles.base import Ensemble, check_positive
from effens.inputs import Inputs, call, count_rows, each, rows_at, tensors_of
from effens.likelihoods import Categorical, Likelihood
from effens.modes import eval_mode

MakeOptimizer = Callable[..., torch.optim.Optimizer]
Callback = Callable[[int, Ensemble, "History"], object]
FUSED = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)


@dataclass(frozen=True)
class History:
    """What happened in training.

    Attributes:
        losses: mean loss of each network at each step, ``(steps, streams)``, in nats.
        lrs: the learning rate of each step, ``(steps,)``.
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
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    optimizer: MakeOptimizer = torch.optim.AdamW,
    likelihood: Likelihood | None = None,
    clip: float | None = None,
    callback: Callback | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool = True,
    precision: str = "float32",
    checkpoint: str | os.PathLike[str] | None = None,
) -> History:
    """Train an ensemble. What makes a method is in its hooks: see `Ensemble`.

    With a ``checkpoint``, a run that was killed goes on after its last whole epoch, when it is called again in the same
    way, and ends bit by bit as if it had never stopped: weights, buffers, optimizer, schedule, every source of random
    numbers that PyTorch has (on the same machine, with as many threads). A finished run returns at once.
    What is no tensor, such as a counter that a network keeps in an attribute, is not kept, nor are the random states of
    NumPy and Python: a `Dataset` that draws must draw from PyTorch.

    Args:
        ensemble: any ensemble; it is moved to ``device`` and stays there, in eval mode.
        data: tensors ``(x, y)``, a map-style `Dataset`, or a `DataLoader`, which is used as it is given. Where the
            network takes several tensors, x is a tuple, list or dict of them, ``((numbers, kinds), y)`` say, and the
            call is ``net(*x)`` or ``net(**x)``. Batches of a `DataLoader` may also be dicts with ``labels``.
        epochs: passes over the data.
        batch_size: examples in a step; a `DataLoader` has its own.
        lr: the highest learning rate; `Ensemble.schedule` moves it at every step.
        weight_decay: the optimizer's, for all but an ensemble's fast weights.
        optimizer: called with parameter groups, ``lr`` and ``weight_decay``.
        likelihood: what the outputs mean; `Categorical` by default.
        clip: the largest norm of a gradient: of each member by itself, or of all weights where members share them.
        callback: called after each epoch, from 0, as ``callback(epoch, ensemble, history)``; a true value ends the
            training, and what was collected by then can predict.
        device: where to train; by default `effens.device`.
        seed: of the shuffles and of dropout. The global random state is left as it was.
        progress: whether to show a progress bar when training takes longer than two seconds.
        precision: ``"float32"``: every product in the weights' own precision. ``"bfloat16"``: `torch.autocast`, which
            takes the products in bfloat16 and leaves weights, losses and the optimizer as they are. Faster on a GPU
            from Ampere on, and on CPUs with instructions for it; elsewhere slower.
        checkpoint: a file, by convention ``*.pt``, to which the run is written after every epoch, and from
            which it goes on. It is replaced once the new one is complete, and belongs to one run at a time.

    Returns:
        The losses, the rates and the time taken.

    Raises:
        ValueError: there are no examples, labels are out of range, or targets or outputs are not one per example (but
            one for each pixel, say); or ``checkpoint`` is no whole file, or of another call: other settings, shapes,
            numbers in tensors ``data``, version of PyTorch ...
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
    lr, weight_decay = float(lr), float(weight_decay)
    likelihood = check_likelihood(likelihood)
    check_precision(precision)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be > 0, got {clip}")
    device = resolve_device(device)
    ensemble.to(device)
    batches = Batches(ensemble, data, batch_size, device, torch.Generator().manual_seed(seed))
    if not any(parameter.requires_grad for parameter in ensemble.parameters()):
        raise ValueError("the ensemble must have weights to train, got none that require gradients")
    groups = ensemble.parameter_groups(lr, weight_decay)
    descent = make_optimizer(optimizer, groups, lr, weight_decay, sparse=has_sparse(ensemble))
    if ensemble.noisy and not isinstance(descent, torch.optim.SGD):
        rule = f"{type(ensemble).__name__} reads the noise of plain SGD: pass optimizer=torch.optim.SGD"
        scale = "a learning rate of its own, 0.3 to 30 times AdamW's"
        warnings.warn(f"{rule} with {scale}, got {type(descent).__name__}", stacklevel=2)
    highest = [group["lr"] for group in descent.param_groups]
    length = len(batches)
    steps = epochs * length
    run = Run(ensemble, descent, batches)
    if checkpoint is not None:
        settings = dict(epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay, seed=seed, clip=clip)
        held = f"{likelihood} {fingerprint(vars(likelihood))} {source_of(type(likelihood))}"
        run.write_to(checkpoint, {**settings, "likelihood": held, "precision": precision})
    with fixed_seed(seed, device):
        check_single(ensemble, batches)
    with fixed_seed(seed, device), progress_bar(steps, progress) as shown:
        run.resume()
        shown.update(len(run.lrs))
        if run.epoch:
            length = len(run.lrs) // run.epoch
            steps = min(steps, length * epochs)
        fed = run.finished or batches.keep_features()  # whether batches hold the trunk's features
        ended, gaps = True, False  # whether the schedule has ended; whether targets are missing
        for epoch in range(epochs if run.finished or run.stopped else run.epoch, epochs):
            ensemble.train()
            if not run.lrs:
                warn_of_eval(ensemble)
            before = len(run.lrs)
            for shared, xs, ys, unchecked in batches:
                step = min(len(run.lrs), steps - 1)  # a loader may give more batches than it says
                ended = step == steps - 1
                multiplier = ensemble.schedule(step, steps)
                for group, top in zip(descent.param_groups, highest, strict=True):
                    group["lr"] = top * multiplier
                descent.zero_grad()
                with feeding(ensemble) if fed else nullcontext():
                    outputs = in_precision(precision, ensemble if shared else ensemble.forward_members, xs)
                if unchecked is not None:
                    likelihood.check(outputs, unchecked)
                    gaps = has_gaps(likelihood, unchecked)
                losses = example_losses(likelihood, outputs, ys, gaps)  # (streams, batch)
                ensemble.reduce(losses).backward()
                if clip is not None:
                    clip_gradients(ensemble, clip)
                descent.step()
                ensemble.collect(step, steps)
                run.losses.append(losses.detach().mean(1))
                run.lrs.append(lr * multiplier)
                shown.update()
            taken = len(run.lrs) - before
            check_finite(run.losses, taken)
            run.epoch += 1
            if taken != length:
                rule = f"data must give as many batches as its length says, {length}, got {taken}"
                then = "the schedule ends sooner" if taken < length else "steps after its end keep the last lr"
                warnings.warn(f"{rule}: {then}", stacklevel=2)
                length, steps = taken, min(steps, len(run.lrs) + (epochs - run.epoch) * taken)
            let_go(ensemble)
            run.stopped = callback is not None and bool(callback(epoch, ensemble, history_of(run)))
            if {p for p in ensemble.parameters() if p.requires_grad} - {*run.parameters()}:
                raise ValueError("a callback must not unfreeze weights: end the training and call fit again, got some")
            run.write()
            if run.stopped:
                ended = True
                break
        if not run.finished:
            if not ended:  # the data ended before the schedule did
                ensemble.collect(steps - 1, steps)
            ensemble.eval()
            with feeding(ensemble) if fed else nullcontext():
                ensemble.finish(batches.inputs())
            run.finished = True
            run.write()
    return history_of(run)


@torch.no_grad()
def predict(
    ensemble: Ensemble,
    x: Inputs,
    *,
    likelihood: Likelihood | None = None,
    chunk: int = 1024,
    precision: str = "float32",
) -> Any:
    """Predict with every member, in eval mode, without gradients, in chunks of rows.

    Args:
        ensemble: any ensemble; it stays on its device and in its mode.
        x: inputs ``(batch, ...)``; or a tuple, list or dict of them, as in `fit`, of which ``labels`` are left out.
        likelihood: what the outputs mean; `Categorical` by default.
        chunk: rows in a chunk.
        precision: ``"float32"``, the weights' own, or ``"bfloat16"``, as in `fit`; outputs are never below float32.

    Returns:
        With `Categorical` probabilities ``(members, batch, classes)``; with `Gaussian` or `StudentT` a
        `torch.distributions` object of batch shape ``(members, batch)``; either on the device of ``x``.

    Raises:
        TypeError: ``ensemble`` is none, or ``x`` holds no tensor, but an array, say.
        ValueError: ``chunk`` is below 1, or ``precision`` is unknown.

    Example:
        >>> ensemble = effens.DeepEnsemble(lambda: nn.Linear(3, 2), members=4)
        >>> predict(ensemble, torch.randn(10, 3)).shape  # probabilities
        torch.Size([4, 10, 2])
        >>> predict(ensemble, torch.randn(10, 3), likelihood=effens.Gaussian()).batch_shape
        torch.Size([4, 10])
    """
    likelihood = check_likelihood(likelihood)
    return likelihood.predict(outputs_of(ensemble, x, chunk, precision))


@torch.no_grad()
def outputs_of(ensemble: Ensemble, x: Inputs, chunk: int = 1024, precision: str = "float32") -> Tensor:
    """Return what the networks answer, ``(members, batch, outputs)``, on the device of ``x``: see `predict`."""
    check_ensemble(ensemble)
    check_positive(chunk=chunk)
    check_precision(precision)
    if isinstance(x, Mapping):  # a batch as `fit` takes it
        x = {name: part for name, part in x.items() if name != "labels"}
    n, first, outputs = count_rows(x), tensors_of(x)[0], []
    home = next(chain(ensemble.parameters(), ensemble.buffers()), first).device
    with eval_mode(ensemble):
        for start in range(0, max(n, 1), chunk):
            rows = each(lambda part: to_device(part, home), rows_at(x, slice(start, start + chunk)))
            outputs.append(in_precision(precision, ensemble, rows).to(first.device))
    return torch.cat(outputs, dim=1)


def in_precision(precision: str, forward: Callable[[Inputs], Tensor], x: Inputs) -> Tensor:
    """Return ``forward(x)``, its products taken in this precision; outputs are never below float32."""
    if precision == "float32":
        return forward(x)
    with torch.autocast(tensors_of(x)[0].device.type, torch.bfloat16):
        outputs = forward(x)
    return outputs.float() if outputs.dtype == torch.bfloat16 else outputs


def check_precision(precision: str) -> None:
    """Raise `ValueError` unless the precision is known."""
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision must be 'float32' or 'bfloat16', got {precision!r}")


def example_losses(likelihood: Likelihood, outputs: Tensor, ys: Tensor, gaps: bool = False) -> Tensor:
    """Return the loss of each example, ``(streams, batch)``: of several targets, the mean.

    Args:
        likelihood: what the outputs mean.
        outputs: ``(streams, batch, ..., outputs)``.
        ys: ``(batch, ...)`` or ``(streams, batch, ...)``.
        gaps: whether targets are missing. Then losses are weighted so that the mean over examples is the mean over all
            targets of the batch that are there.

    Raises:
        ValueError: there is not one loss for each target.
    """
    missing = likelihood.missing(ys) if gaps else None
    losses = likelihood.nll(outputs, ys if missing is None else ys.masked_fill(missing, 0))
    if losses.shape[:2] != outputs.shape[:2]:
        rule = "outputs must be (members, batch, outputs), with one loss for each"
        raise ValueError(f"{rule}, got outputs {tuple(outputs.shape)} and losses {tuple(losses.shape)}")
    if missing is not None:
        there = (~missing).expand_as(losses)
        share = there.flatten(1).to(losses.dtype).mean(1).clamp_min(1e-12)
        losses = losses * there / share.view(-1, *[1] * (losses.dim() - 1))
    return losses.flatten(2).mean(2) if losses.dim() > 2 else losses


def has_gaps(likelihood: Likelihood, y: Tensor) -> bool:
    """Say whether targets are missing."""
    missing = likelihood.missing(y)
    return missing is not None and bool(missing.any())


def clip_gradients(ensemble: Ensemble, clip: float) -> None:
    """Scale gradients down to this norm, each list that `Ensemble.gradients` gives by itself."""
    for gradients in ensemble.gradients():
        scale = (clip / (nn.utils.get_total_norm(gradients) + 1e-6)).clamp_max(1)
        for gradient in gradients:
            gradient.mul_(scale)


@contextmanager
def feeding(ensemble: Ensemble) -> Iterator[None]:
    """Tell an ensemble that its inputs are the trunk's features."""
    ensemble.fed = True
    try:
        yield
    finally:
        ensemble.fed = False


def check_single(ensemble: Ensemble, batches: Batches) -> None:
    """Raise `ValueError` if a network is to be trained on a single example that its batch norm cannot take.

    It is tried on a copy, if there is batch norm and a last batch of one.
    """
    if not any(isinstance(module, _BatchNorm) for module in ensemble.modules()):
        return
    single = batches.single()
    if single is None:
        return
    try:
        trial = copy.deepcopy(ensemble)
    except (RuntimeError, TypeError):  # the network keeps what cannot be copied
        return
    trial.train()
    shared, xs = single
    try:
        call(trial.member(0), xs) if shared else trial.forward_members(xs)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        rule = "a batch must hold more than one example where batch norm is trained, got a last batch of one"
        raise ValueError(f"{rule}: choose another batch_size, or drop_last=True in a DataLoader") from error


def warn_of_eval(ensemble: Ensemble) -> None:
    """Warn where weights are trained in eval mode: of a pretrained network, say, which was left in it."""
    named = ((name, m) for name, m in ensemble.named_modules() if m in ensemble.still and not isinstance(m, _BatchNorm))
    if names := [name for name, m in named if any(p.requires_grad for p in m.parameters(recurse=False))]:
        rule = f"modules in eval mode stay in it, without dropout and with batch norm as it is: {names[:3]}"
        warnings.warn(f"{rule}. If that is not meant, call .train() on the network in make_net", stacklevel=3)


def let_go(ensemble: Ensemble) -> None:
    """Detach activations that networks keep in attributes: they hold on to the last step, and cannot be copied."""
    for module in ensemble.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                vars(module)[name] = value.detach()


def history_of(run: Run) -> History:
    """Return what has happened so far."""
    losses = torch.stack(run.losses).cpu() if run.losses else torch.zeros(0, run.ensemble.streams)
    return History(losses, torch.tensor(run.lrs), run.seconds)


def resolve_device(name: torch.device | str | None) -> torch.device:
    """Return the named device, or the best at hand."""
    return device() if name is None else torch.device(name)


def make_optimizer(
    optimizer: MakeOptimizer, groups: list[dict[str, Any]], lr: float, weight_decay: float, *, sparse: bool = False
) -> torch.optim.Optimizer:
    """Make the optimizer, fused where PyTorch can: for many small parameters most of its time is overhead."""
    if not callable(optimizer):
        raise TypeError(f"optimizer must be a class, torch.optim.AdamW say, or a partial of one, got {optimizer!r}")
    given = optimizer.keywords.keys() & {"lr", "weight_decay"} if isinstance(optimizer, partial) else set()
    if given:
        raise ValueError(f"optimizer must leave {' and '.join(sorted(given))} to fit's own arguments, got {optimizer}")
    floating = all(p.is_floating_point() for group in groups for p in group["params"])
    options = {"fused": True} if optimizer in FUSED and floating and not sparse else {}
    return optimizer(groups, lr=lr, weight_decay=weight_decay, **options)


def has_sparse(ensemble: nn.Module) -> bool:
    """Say whether an embedding has sparse gradients, which no fused optimizer takes."""
    return any(isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.sparse for m in ensemble.modules())


def progress_bar(steps: int, progress: bool) -> "tqdm[Any]":
    """Return a progress bar that shows up after two seconds."""
    return tqdm(total=steps, desc="fit", unit="step", delay=2, leave=False, disable=not progress)


def check_likelihood(likelihood: Likelihood | None) -> Likelihood:
    """Return the likelihood, `Categorical` where there is none; raise `TypeError` if it is anything else."""
    if likelihood is not None and not isinstance(likelihood, Likelihood):
        got = getattr(likelihood, "__name__", type(likelihood).__name__)
        raise TypeError(f"likelihood must be a Likelihood, effens.Categorical() say, which holds the loss, got {got}")
    return likelihood or Categorical()


def check_ensemble(ensemble: nn.Module) -> None:
    """Raise `TypeError` unless this is an ensemble."""
    if not isinstance(ensemble, Ensemble):
        rule = "ensemble must be an Ensemble (one network: effens.DeepEnsemble.of([network]))"
        raise TypeError(f"{rule}, got {type(ensemble).__name__}")
