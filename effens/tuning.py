"""Where a hyperparameter ensemble's candidates come from: a search over settings, and a few of them trained again."""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from effens.batches import Data
from effens.checkpoint import fixed_seed
from effens.ensembles.base import call_make_net, check_positive
from effens.ensembles.deep import DeepEnsemble
from effens.identity import describe, digest
from effens.likelihoods import Categorical
from effens.scores import exact
from effens.storage import load, save
from effens.training import example_losses, fit, has_gaps, outputs_of, resolve_device

if TYPE_CHECKING:
    import optuna

Settings = Mapping[str, float]
Space = Mapping[str, tuple[float, float]]
SPACE: Space = {"lr": (3e-4, 3e-2), "weight_decay": (1e-4, 1.0), "dropout": (0.0, 0.5), "width": (16, 256)}
OF_FIT = ("lr", "weight_decay")  # settings that `effens.fit` gets; all others are `make_net`'s
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

    Example:
        >>> make_net = lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x, y = torch.randn(60, 3), torch.randint(2, (60,))
        >>> settings = [{"lr": 1e-2, "weight_decay": 0.1}]
        >>> found = effens.stratify(make_net, (x, y), (x, y), settings, seeds=[0, 1, 2], epochs=1, progress=False)
        >>> index = effens.greedy_select(found.probs, y, size=2)
        >>> ensemble = effens.HyperEnsemble(found.networks, index)
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
    same storage and folder; a trial that was cut off is lost. Several processes, on any machines that share the
    two, share the trials.

    Args:
        make_net: (width=..., dropout=...) -> nn.Module: gets all settings but ``lr`` and ``weight_decay``.
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
        ValueError: ``default`` is outside the space, a storage has no folder, it holds another search by this name
            (of other data, say, or options; ``make_net``, ``trials`` and ``device`` may differ).
        FloatingPointError: every trial failed.

    Example:
        >>> make_net = lambda dropout: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 2))
        >>> x, y = torch.randn(60, 3), torch.randint(2, (60,))
        >>> default = {"lr": 1e-2, "weight_decay": 0.1, "dropout": 0.1}
        >>> space = {"lr": (1e-3, 1e-1), "dropout": (0.0, 0.5)}
        >>> found = search(make_net, (x, y), (x, y), default=default, space=space, trials=3, epochs=1, progress=False)
        >>> len(found.networks), found.trainings
        (3, 3)
    """
    try:
        from optuna.trial import TrialState
    except ImportError as error:
        raise ImportError("effens.search needs Optuna: python -m pip install optuna") from error
    check_positive(trials=trials)
    default = check_default(default, space)
    if storage is not None and folder is None:
        raise ValueError("a storage needs a folder that keeps the weights, got folder=None")
    facts = {"default": default, "space": space, "sampler": sampler, "seed": seed}
    if storage is not None:
        facts |= {"data": digest(data), "validation": digest(validation)}
        facts |= describe({key: value for key, value in options.items() if key != "device"})
    study = open_study(storage, name, json.dumps(facts, sort_keys=True), default)
    recipe = Recipe(make_net, data, validation, options)
    ended: dict[int, Training] = {}
    with tqdm(total=trials, desc="search", unit="trial", delay=2, leave=False, disable=not progress) as shown:
        while (done := sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))) < trials:
            shown.update(done - shown.n)
            trial = study.ask()
            sampling, starting = seeds_of(seed, trial.number)
            study.sampler = make_sampler(sampler, sampling)
            training = recipe.train({**default, **suggest(trial, space)}, starting)
            ended[trial.number] = training
            trial.set_user_attr("seconds", training.seconds)
            if training.network is None:
                trial.set_user_attr("error", training.error)
                study.tell(trial, state=TrialState.FAIL)
                continue
            if folder is not None:  # before the trial counts as done
                Path(folder).mkdir(parents=True, exist_ok=True)
                save(training.network, weights_file(folder, name, trial.number))
            study.tell(trial, training.loss)
    for kept in study.get_trials(states=(TrialState.COMPLETE, TrialState.FAIL)):
        if kept.number in ended:
            continue
        settings, network = {**default, **kept.params}, None
        if kept.state == TrialState.COMPLETE:
            assert folder is not None
            network = build(make_net, settings, seeds_of(seed, kept.number)[1], options).eval()
            load(network, weights_file(folder, name, kept.number))
        ended[kept.number] = Training(settings, network, "", kept.user_attrs.get("seconds", 0.0))
    return recipe.candidates([ended[number] for number in sorted(ended)])


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

    Example:
        >>> make_net = lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x, y = torch.randn(60, 3), torch.randint(2, (60,))
        >>> settings = [{"lr": 1e-2, "weight_decay": 0.1}, {"lr": 1e-3, "weight_decay": 1.0}]
        >>> found = stratify(make_net, (x, y), (x, y), settings, seeds=[0, 1], epochs=1, progress=False)
        >>> found.trainings
        4
    """
    seeds = list(seeds)
    pairs = [(dict(each), seed) for each in settings for seed in seeds]
    if not pairs:
        raise ValueError(f"there must be settings and seeds, got {len(seeds)} seeds and nothing to train")
    recipe = Recipe(make_net, data, validation, options)
    with tqdm(pairs, "stratify", unit="training", delay=2, leave=False, disable=not progress) as shown:
        return recipe.candidates([recipe.train(*pair) for pair in shown])


@dataclass(frozen=True)
class Training:
    """How a training ended: with a network and its validation NLL, or with an error.

    Attributes:
        settings: of the training.
        network: in eval mode; None if it diverged, or did not fit into memory.
        error: what went wrong.
        seconds: its time.
        loss: validation NLL in nats.
    """

    settings: Settings
    network: nn.Module | None
    error: str
    seconds: float
    loss: float = math.nan


@dataclass(frozen=True)
class Recipe:
    """All that a search's trainings share: see `search`."""

    make_net: Callable[..., nn.Module]
    data: Data
    validation: tuple[Tensor, Tensor]
    options: dict[str, Any]

    def train(self, settings: Settings, seed: int) -> Training:
        """Train one network."""
        own: dict[str, Any] = {key: settings[key] for key in OF_FIT if key in settings}
        began = time.perf_counter()
        try:
            network = build(self.make_net, settings, seed, self.options)
            fit(DeepEnsemble.of([network]), self.data, seed=seed, progress=False, **own, **self.options)
            loss = self.validation_loss(network)
        except FAILURES as error:
            return Training(settings, None, str(error), time.perf_counter() - began)
        return Training(settings, network, "", time.perf_counter() - began, loss)

    def validation_loss(self, network: nn.Module) -> float:
        """Return a network's validation loss, or raise `FloatingPointError` if what it answers is not finite."""
        outputs = outputs_of(DeepEnsemble.of([network]), self.validation[0])
        loss = self.losses(outputs).item()
        if not bool(outputs.isfinite().all()) or not math.isfinite(loss):
            raise FloatingPointError(f"validation losses must be finite, got {loss}")
        return loss

    def losses(self, outputs: Tensor) -> Tensor:
        """Return each network's validation loss by the likelihood with which it was trained."""
        likelihood, y = self.options.get("likelihood") or Categorical(), self.validation[1].to(outputs.device)
        gaps = has_gaps(likelihood, y)
        return example_losses(likelihood, exact(outputs), exact(y) if y.is_floating_point() else y, gaps).mean(1)

    def candidates(self, trainings: Sequence[Training]) -> Candidates:
        """Predict the validation data with all networks that were trained."""
        networks = [training.network for training in trainings if training.network is not None]
        settings, failed = (
            [dict(training.settings) for training in trainings if (training.network is not None) is good]
            for good in (True, False)
        )
        if not networks:
            raise FloatingPointError(f"one training at least must end well, got {len(failed)} that failed: lower `lr`")
        outputs = outputs_of(DeepEnsemble.of(networks), self.validation[0])
        probs = (self.options.get("likelihood") or Categorical()).predict(outputs)
        seconds = sum(training.seconds for training in trainings)
        return Candidates(networks, settings, probs, self.losses(outputs), failed, seconds)


def build(make_net: Callable[..., nn.Module], settings: Settings, seed: int, options: dict[str, Any]) -> nn.Module:
    """Make the network of these settings, from a seed, on the device on which it is trained."""
    device = resolve_device(options.get("device"))
    with fixed_seed(seed, device):
        network = call_make_net(
            partial(make_net, **{key: value for key, value in settings.items() if key not in OF_FIT})
        )
    return network.to(device)


def open_study(
    storage: "str | optuna.storages.BaseStorage | None", name: str, facts: str, first: Settings
) -> "optuna.Study":
    """Make a study, or open the one of this name if it is of the same search; Optuna's log stays quiet.

    Of processes that come at the same time one makes it, and queues the first settings.
    """
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        opened = open_storage(storage) if isinstance(storage, str) else storage
        try:
            study = optuna.create_study(storage=opened, study_name=name)
            study.enqueue_trial(dict(first))
        except optuna.exceptions.DuplicatedStudyError:
            assert opened is not None
            study = optuna.load_study(storage=opened, study_name=name)
            for _ in range(20):  # whoever made it may not have queued the first settings yet
                time.sleep(0.1 * ("search" not in study.user_attrs))
    finally:
        optuna.logging.set_verbosity(level)
    if (held := study.user_attrs.get("search", facts)) != facts:
        raise ValueError(f"the study {name!r} must be of this search, {facts}, got {held}: give it another name")
    study.set_user_attr("search", facts)
    return study


def open_storage(address: str) -> "optuna.storages.BaseStorage":
    """Open a storage. Processes that make the tables of a new one at the same time fail, all but one: try again."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    for seconds in (0.1, 0.3, 1.0, 3.0):
        try:
            return optuna.storages.get_storage(address)
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError):
            time.sleep(seconds)
    return optuna.storages.get_storage(address)


def make_sampler(sampler: str, seed: int) -> "optuna.samplers.BaseSampler":
    """Return a sampler that starts from a seed."""
    import optuna

    if sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed, multivariate=False)  # each setting is drawn when it is asked for
    raise ValueError(f"sampler must be 'random' or 'tpe', got {sampler!r}")


def suggest(trial: "optuna.Trial", space: Space) -> dict[str, float]:
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


def check_default(default: Settings, space: Space) -> dict[str, float]:
    """Return the default settings if they lie in the space; raise `ValueError` if not."""
    for key, bounds in space.items():
        if len(bounds) != 2 or not all(isinstance(bound, int | float) for bound in bounds):
            raise ValueError(f"space must have two numbers for each setting, low and high, got {key}: {bounds}")
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


def weights_file(folder: str | os.PathLike[str], name: str, number: int) -> Path:
    """Return the file that keeps a trial's weights."""
    return Path(folder) / f"{name}-{number}.safetensors"
