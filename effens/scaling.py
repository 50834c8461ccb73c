r"""Scaling out: independent trainings over any executor, each kept as a file as soon as it ends.

N trainings of t seconds on W workers, with s seconds that no worker can share, take

.. math:: T(W) = s + t \lceil N / W \rceil

What cannot be shared is Amdahl's (1967), "Validity of the single processor approach to achieving large scale computing
capabilities", doi:10.1145/1465482.1465560. Trainings of unequal times wait for the one that ends last.
"""

import io
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from effens.batches import Data, as_pair
from effens.ensembles.base import Ensemble, check_positive
from effens.ensembles.deep import DeepEnsemble
from effens.identity import describe, digest
from effens.inputs import each
from effens.storage import load, save
from effens.training import fit
from effens.tuning import OF_FIT, Settings, build

Source = Data | Callable[[], Data]
ALONE = threading.Lock()  # PyTorch's random numbers are one stream a process: workers that are threads take turns


def fit_each(
    make_net: Callable[..., nn.Module],
    data: Source,
    seeds: Iterable[int],
    *,
    folder: str | os.PathLike[str],
    settings: Iterable[Settings] | None = None,
    executor: Executor | None = None,
    threads: int = 1,
    checkpoints: bool = False,
    progress: bool = True,
    name: str | None = None,
    **options: Any,
) -> list[nn.Module]:
    """Train a network from each seed, wherever an executor runs it: on the cores of a machine, or on many machines.

    Each training depends on its seed and settings alone, so that the networks are those of training one by one, to the
    last bit on processors of one kind. Each is kept in the folder, in a file of its own, by the worker that trained it.
    A second call trains what is missing: after a kill, or with more seeds. A file is found again by the seed, the
    settings, the options, the data and ``make_net``. A function that stands in a module is known by its name: where its
    code changes, take another folder. For a lambda, or a function made inside another, give a ``name`` that says what
    it makes.

    Workers that are processes import ``make_net`` by its name, so it must stand in a module: not in a notebook, no
    lambda; `functools.partial` of one that does, ``partial(nn.Linear, 196, 10)``, will do. (Dask sends functions
    by value, so there it may stand anywhere.) Workers that are threads of one process train one after the other.

    Args:
        make_net: returns a fresh network, or an ensemble to be trained on its own: ``partial(effens.SWAG, make)``, for
            a MultiSWAG. It gets all settings but ``lr`` and ``weight_decay``.
        data: as of `effens.fit`, sent to each training; or a function that returns them, called where they are needed,
            so that nothing large travels.
        seeds: of starts and shuffles, one for each training.
        folder: keeps the weights. All workers must see it: on many machines a shared one.
        settings: of each training, for candidates of a hyperparameter ensemble; by default there are none.
        executor: any `concurrent.futures.Executor`: a `ProcessPoolExecutor`; Dask's ``client.get_executor()``. By
            default the trainings run here, one by one.
        threads: of a training on a CPU, the same wherever it runs, because sums depend on it in their last bits.
        checkpoints: whether each training keeps a checkpoint in the folder as long as it lasts, so that one that was
            killed goes on from there, on the same worker or on another.
        progress: whether to show a progress bar when it takes longer than two seconds.
        name: what ``make_net``, and ``data`` if that is a function, are known by; needed where they stand in no module.
        options: of `effens.fit`: ``epochs``, ``batch_size``, ``lr``, ``weight_decay``, ``optimizer``,
            ``likelihood``, ``device`` and ``precision``.

    Returns:
        The trained networks, or ensembles, in the order of the seeds: `DeepEnsemble.of` puts them side by side.

    Raises:
        ValueError: there are no seeds, or not one of the settings for each; two trainings are the same; a process
            could not import ``make_net`` or ``data``; or one of them holds what cannot be told from others, a lock say.
        FileNotFoundError: a worker keeps its files elsewhere.
        Exception: what the first failed training raised, a worker's death included, after all others have ended.

    Example:
        >>> from functools import partial
        >>> make_net = partial(nn.Linear, 3, 2)
        >>> data, folder = (torch.randn(50, 3), torch.randint(2, (50,))), tempfile.mkdtemp()
        >>> networks = fit_each(make_net, data, range(3), folder=folder, epochs=2, progress=False)
        >>> len(list(Path(folder).iterdir()))  # kept
        3
        >>> effens.DeepEnsemble.of(networks)(torch.randn(10, 3)).shape
        torch.Size([3, 10, 2])
    """
    seeds = list(seeds)
    each = [dict(chosen) for chosen in settings] if settings is not None else [{} for _ in seeds]
    if not seeds or len(each) != len(seeds):
        raise ValueError(f"seeds must hold at least one, and settings one for each, got {len(seeds)} and {len(each)}")
    check_positive(threads=threads)
    if isinstance(executor, ProcessPoolExecutor):
        check_importable(make_net=make_net, data=data if callable(data) else None, options=options)
    sent = pack_data(data)
    known = (name or make_net, name if name and callable(data) else data)
    facts = describe([*known, {key: value for key, value in options.items() if key != "device"}])
    names = [f"seed-{seed}-{digest([facts, own])}.safetensors" for seed, own in zip(seeds, each, strict=True)]
    paths = [Path(folder).resolve() / file for file in names]
    if len(set(paths)) < len(paths):
        raise ValueError(f"trainings must differ in seed or settings, got {len(paths) - len(set(paths))} twice")
    Path(folder).mkdir(parents=True, exist_ok=True)
    jobs = [
        (make_net, sent, own, seed, path, threads, checkpoints, options)
        for seed, own, path in zip(seeds, each, paths, strict=True)
    ]
    run([job for job, path in zip(jobs, paths, strict=True) if not path.is_file()], executor, progress)
    networks = []
    for seed, own, path in zip(seeds, each, paths, strict=True):
        if not path.is_file():
            raise FileNotFoundError(f"folder must be one that every worker sees, got {folder}, without {path.name}")
        networks.append(build(make_net, own, seed, options).eval())
        load(networks[-1], path)
    return networks


def run(jobs: Sequence[tuple[Any, ...]], executor: Executor | None, progress: bool) -> None:
    """Train what is missing; raise the first error once everything else has ended, so that nothing else is lost."""
    errors: list[BaseException] = []
    with tqdm(total=len(jobs), desc="fit", unit="training", delay=2, leave=False, disable=not progress) as shown:
        if executor is None:
            for job in jobs:
                try:
                    train_one(*job)
                except Exception as error:
                    errors.append(error)
                shown.update()
        else:
            futures = [executor.submit(train_one, *job) for job in jobs]
            try:
                for future in as_completed(futures):
                    if (failure := future.exception()) is not None:
                        errors.append(failure)
                    shown.update()
            finally:  # whoever interrupts wants no more to begin
                for future in futures:
                    future.cancel()
    if errors:
        errors[0].add_note(
            f"{len(errors)} of {len(jobs)} trainings failed; what ended is kept: call again for the rest"
        )
        raise errors[0]


def train_one(
    make_net: Callable[..., nn.Module],
    sent: Any,
    settings: Settings,
    seed: int,
    path: Path,
    threads: int,
    checkpoints: bool,
    options: dict[str, Any],
) -> None:
    """Train one network and write its file, wherever this runs; do nothing where the file is there already."""
    if path.is_file():  # from a worker that was thought to be dead
        return
    own: dict[str, Any] = {key: settings[key] for key in OF_FIT if key in settings}
    if checkpoints:
        own["checkpoint"] = path.with_suffix(".checkpoint")
    with ALONE:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            network = build(make_net, settings, seed, options)
            ensemble = network if isinstance(network, Ensemble) else DeepEnsemble.of([network])
            fit(ensemble, unpack_data(sent), seed=seed, progress=False, **own, **options)
            save(network, path)
            path.with_suffix(".checkpoint").unlink(missing_ok=True)
        except Exception as error:
            error.add_note(f"in the training of seed {seed} with settings {dict(settings)}")
            raise
        finally:
            torch.set_num_threads(before)


def pack_data(data: Source) -> Any:
    """Return what is sent to a worker: tensors ``(x, y)`` as bytes, anything else as it is."""
    if not isinstance(data, tuple):
        return data
    content = io.BytesIO()
    torch.save(each(lambda part: part.cpu(), as_pair(data)), content)
    return content.getvalue()


def unpack_data(sent: Any) -> Data:
    """Return the data from what was sent: bytes, or a function that returns them, or the data themselves."""
    data: Data = sent() if callable(sent) else sent
    return torch.load(io.BytesIO(sent), weights_only=True) if isinstance(sent, bytes) else data


def check_importable(**values: Any) -> None:
    """Raise `ValueError` unless another process can import what it is sent."""
    notebook = not hasattr(sys.modules["__main__"], "__file__")
    for name, value in values.items():
        try:
            sent = pickle.dumps(value)
            if notebook and b"__main__" in sent:
                raise pickle.PicklingError("it stands in a notebook")
        except Exception as error:
            rule = f"{name} must stand in a module that a process can import (a file, no notebook, no lambda)"
            raise ValueError(f"{rule}, got {getattr(value, '__qualname__', value)}") from error
