"""Where a hyperparameter ensemble's candidates come from: a search over settings, and a few of them trained again."""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from effens.ensembles.base import made
from effens.ensembles.deep import DeepEnsemble
from effens.ensembles.hyper import log_likelihoods
from effens.storage import load, save
from effens.training import Data, check_positive, fit, place_of, predict, seeded

if TYPE_CHECKING:
    import optuna

Settings = Mapping[str, float]
Space = Mapping[str, tuple[float, float]]
SPACE: Space = {"rate": (3e-4, 3e-2), "weight_decay": (1e-4, 1.0), "dropout": (0.0, 0.5), "width": (16, 256)}
OF_FIT = ("rate", "weight_decay")  # settings that `effens.fit` gets; all others are `make_net`'s
FAILURES = (FloatingPointError, torch.OutOfMemoryError)  # what a poor choice of settings can raise


@dataclass(frozen=True)
class Candidates:
    """Trained networks to choose from, and what finding them cost.

    Attributes:
        networks: in eval mode.
        settings: of each network.
        probs: what they say about the validation data, as `effens.predict` returns it: (candidates, n, classes), or a
            distribution of batch shape (candidates, n).
        losses: validation NLL of each, (candidates,), in nats.
        failed: settings whose training diverged, or did not fit into memory.
        seconds: time of all trainings, those that failed included.
    """

    networks: list[nn.Module]
    settings: list[dict[str, float]]
    probs: Any
    losses: Tensor
    failed: list[dict[str, float]]
    seconds: float

    @property
    def trainings(self) -> int:
        """How many networks were trained, those that failed included."""
        return len(self.networks) + len(self.failed)

    def __repr__(self) -> str:
        best = f"lowest validation NLL={self.losses.min().item():.4g}"
        return f"Candidates({len(self.networks)} of {self.trainings} trainings, {best}, seconds={self.seconds:.1f})"


def search(
    make_net: Callable[..., nn.Module],
    data: Data,
    validation: tuple[Tensor, Tensor],
    *,
    default: Settings,
    space: Space = SPACE,
    trials: int = 20,
    sampler: str = "random",
    storage: "str | optuna.storages.BaseStorage | None" = None,
    name: str = "search",
    folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Candidates:
    """Train networks with settings from an Optuna study. Trial 0 has the default ones.

    What a trial samples, where its network starts and how it shuffles depend on the seed and the trial's number, and
    with ``"tpe"`` on the trials before it. So a search that stopped goes on as if it had not: call it again with the
    same storage and folder; a trial that was cut off is lost. Several processes, on any machines that share the two,
    share the trials.

    Args:
        make_net: (width=..., dropout=...) -> nn.Module: gets all settings but ``rate`` and ``weight_decay``.
        data: to train on, as of `effens.fit`.
        validation: (x, y), to judge the trials by, and to select with.
        default: settings of trial 0, inside the space, and those that are not searched.
        space: name to (lowest, highest): integers where both are; on a log scale where the lowest is above 0.
        trials: how many in all, those that a storage already holds and those that fail included.
        sampler: ``"random"``, as in the paper, or ``"tpe"``, which looks where trials were good.
        storage: any Optuna storage, or its address, ``"sqlite:///search.db"`` say; by default the study is in memory.
        name: of the study in the storage.
        folder: where the weights are kept, a file for each trial; a storage needs one.
        seed: of everything.
        progress: whether to show a progress bar when the search takes longer than two seconds.
        options: of `effens.fit`: ``epochs``, ``batch_size``, ``optimizer``, ``likelihood``, ``device``.

    Returns:
        The trained networks in the order of their trials.

    Raises:
        ImportError: Optuna is not installed.
        ValueError: ``default`` is outside the space, a storage has no folder, it holds another search by this name.
        FloatingPointError: every trial failed.
    """
    try:
        from optuna.trial import TrialState
    except ImportError as error:
        raise ImportError("effens.search needs Optuna: python -m pip install optuna") from error
    check_positive(trials=trials)
    default = checked_default(default, space)
    if storage is not None and folder is None:
        raise ValueError("a storage needs a folder that keeps the weights, got folder=None")
    facts = {"default": default, "space": space, "sampler": sampler, "seed": seed}
    budget = {key: options[key] for key in ("epochs", "batch_size") if key in options}
    study = open_study(storage, name, json.dumps({**facts, **budget}, sort_keys=True))
    if not any(trial.state != TrialState.RUNNING for trial in study.trials):  # one left running may have been killed
        study.enqueue_trial(default)
    networks: dict[int, nn.Module] = {}
    with tqdm(total=trials, desc="search", unit="trial", delay=2, leave=False, disable=not progress) as shown:
        while (done := sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))) < trials:
            shown.update(done - shown.n)
            trial = study.ask()
            sampling, starting = seeds_of(seed, trial.number)
            study.sampler = make_sampler(sampler, sampling)
            settings = {**default, **suggested(trial, space)}
            began = time.perf_counter()
            loss = None
            try:
                network, loss = train(make_net, data, validation, settings, starting, options)
            except FAILURES as error:
                trial.set_user_attr("error", str(error))
            trial.set_user_attr("seconds", time.perf_counter() - began)
            if loss is None:
                study.tell(trial, state=TrialState.FAIL)
                continue
            networks[trial.number] = network
            if folder is not None:  # before the trial counts as done
                Path(folder).mkdir(parents=True, exist_ok=True)
                save(network, weights_of(folder, name, trial.number))
            study.tell(trial, loss)
    trained, failed = (
        {trial.number: {**default, **trial.params} for trial in study.get_trials(states=(state,))}
        for state in (TrialState.COMPLETE, TrialState.FAIL)
    )
    for number in trained.keys() - networks.keys():
        assert folder is not None
        networks[number] = build(make_net, trained[number], seeds_of(seed, number)[1], options).eval()
        load(networks[number], weights_of(folder, name, number))
    seconds = sum(trial.user_attrs.get("seconds", 0.0) for trial in study.trials)
    ordered = [networks[number] for number in trained]
    return judged(ordered, list(trained.values()), list(failed.values()), seconds, validation, options)


def stratify(
    make_net: Callable[..., nn.Module],
    data: Data,
    validation: tuple[Tensor, Tensor],
    settings: Iterable[Settings],
    *,
    seeds: Iterable[int],
    progress: bool = True,
    **options: Any,
) -> Candidates:
    """Train given settings again, each from several seeds: select from these, and settings and starts both differ.

    Args:
        make_net: (width=..., dropout=...) -> nn.Module, as of `search`.
        data: to train on, as of `effens.fit`.
        validation: (x, y), to select with.
        settings: those that `greedy_select` chose, say.
        seeds: of starts and shuffles; each of the settings gets all of them.
        progress: whether to show a progress bar when it takes longer than two seconds.
        options: of `effens.fit`: ``epochs``, ``batch_size``, ``optimizer``, ``likelihood``, ``device``.

    Returns:
        The trained networks: all seeds of the first settings, then those of the second, and so on.

    Raises:
        ValueError: there are no settings, or no seeds.
        FloatingPointError: every training failed.
    """
    seeds = list(seeds)
    pairs = [(dict(each), seed) for each in settings for seed in seeds]
    if not pairs:
        raise ValueError(f"there must be settings and seeds, got {len(seeds)} seeds and nothing to train")
    networks: list[nn.Module] = []
    kept: list[dict[str, float]] = []
    failed: list[dict[str, float]] = []
    began = time.perf_counter()
    for each, seed in tqdm(pairs, desc="stratify", unit="training", delay=2, leave=False, disable=not progress):
        try:
            networks.append(train(make_net, data, validation, each, seed, options)[0])
            kept.append(each)
        except FAILURES:
            failed.append(each)
    return judged(networks, kept, failed, time.perf_counter() - began, validation, options)


def train(
    make_net: Callable[..., nn.Module],
    data: Data,
    validation: tuple[Tensor, Tensor],
    settings: Settings,
    seed: int,
    options: dict[str, Any],
) -> tuple[nn.Module, float]:
    """Train one network; return it and its validation NLL, or raise `FloatingPointError` if it diverged."""
    network = build(make_net, settings, seed, options)
    one = DeepEnsemble.of([network])
    rates: dict[str, Any] = {key: settings[key] for key in OF_FIT if key in settings}
    fit(one, data, seed=seed, progress=False, **rates, **options)
    x, y = validation
    prediction = predict(one, x, likelihood=options.get("likelihood"))
    values = prediction if isinstance(prediction, Tensor) else prediction.log_prob(y)
    if not bool(values.isfinite().all()):
        raise FloatingPointError(f"predictions must be finite, got {int((~values.isfinite()).sum())} that are not")
    return network, -log_likelihoods(prediction, y).mean().item()


def build(make_net: Callable[..., nn.Module], settings: Settings, seed: int, options: dict[str, Any]) -> nn.Module:
    """Make the network of these settings, from a seed, on the device on which it is trained."""
    place = place_of(options.get("device"))
    with seeded(seed, place):
        network = made(partial(make_net, **{key: value for key, value in settings.items() if key not in OF_FIT}))
    return network.to(place)


def judged(
    networks: list[nn.Module],
    settings: list[dict[str, float]],
    failed: list[dict[str, float]],
    seconds: float,
    validation: tuple[Tensor, Tensor],
    options: dict[str, Any],
) -> Candidates:
    """Ask all networks about the validation data."""
    if not networks:
        raise FloatingPointError(f"one training at least must end well, got {len(failed)} that failed: lower the rate")
    x, y = validation
    probs = predict(DeepEnsemble.of(networks), x, likelihood=options.get("likelihood"))
    return Candidates(networks, settings, probs, -log_likelihoods(probs, y).mean(1), failed, seconds)


def open_study(storage: "str | optuna.storages.BaseStorage | None", name: str, facts: str) -> "optuna.Study":
    """Make a study, or open the one of this name if it is of the same search; Optuna's log stays quiet."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
    finally:
        optuna.logging.set_verbosity(level)
    if (held := study.user_attrs.get("search", facts)) != facts:
        raise ValueError(f"the study {name!r} must be of this search, {facts}, got {held}: give it another name")
    study.set_user_attr("search", facts)
    return study


def make_sampler(sampler: str, seed: int) -> "optuna.samplers.BaseSampler":
    """Return a sampler that starts from a seed."""
    import optuna

    if sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed, multivariate=False)  # each setting is drawn when it is asked for
    raise ValueError(f"sampler must be 'random' or 'tpe', got {sampler!r}")


def suggested(trial: "optuna.Trial", space: Space) -> dict[str, float]:
    """Draw a trial's settings."""
    return {
        key: trial.suggest_int(key, int(low), int(high), log=low > 0)
        if are_integers(low, high)
        else trial.suggest_float(key, low, high, log=low > 0)
        for key, (low, high) in space.items()
    }


def are_integers(*values: float) -> bool:
    """Say whether all values are integers."""
    return all(isinstance(value, int) for value in values)


def checked_default(default: Settings, space: Space) -> dict[str, float]:
    """Return the default settings if they lie in the space; raise `ValueError` if not."""
    for key, bounds in space.items():
        low, high = bounds
        if not low <= high:
            raise ValueError(f"space must go from low to high, got {key}: {bounds}")
        if not low <= default.get(key, math.nan) <= high or (are_integers(*bounds) and not are_integers(default[key])):
            kind = "an integer " if are_integers(*bounds) else ""
            raise ValueError(f"default must have {kind}{key} in {low} ... {high}, got {default.get(key)}")
    return dict(default)


def seeds_of(seed: int, number: int) -> tuple[int, int]:
    """Return the seeds of a trial's settings and of its training; those of other searches have nothing in common."""
    sampling, starting = np.random.SeedSequence((seed, number)).generate_state(2)
    return int(sampling), int(starting)


def weights_of(folder: str | os.PathLike[str], name: str, number: int) -> Path:
    """Return the file that keeps a trial's weights."""
    return Path(folder) / f"{name}-{number}.safetensors"
