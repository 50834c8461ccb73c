"""Where a hyperparameter ensemble's candidates come from: a search over settings, and a few of them trained again."""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from effens.ensembles.base import check_positive, made
from effens.ensembles.deep import DeepEnsemble
from effens.ensembles.hyper import log_likelihoods
from effens.identity import described, digest
from effens.joint import Lenient, OwnOrders, PerMember
from effens.likelihoods import Categorical
from effens.storage import load, save
from effens.training import fit, predict, resolve_device

if TYPE_CHECKING:
    import optuna

Settings = Mapping[str, float]
Space = Mapping[str, tuple[float, float]]
Pair = tuple[Settings, int]  # and the seed of start and shuffles
SPACE: Space = {"lr": (3e-4, 3e-2), "weight_decay": (1e-4, 1.0), "dropout": (0.0, 0.5), "width": (16, 256)}
OF_FIT = ("lr", "weight_decay")  # settings that `effens.fit` gets; all others are `make_net`'s
DEFAULTS = (("lr", 1e-3), ("weight_decay", 0.0))  # of `effens.fit`
FAILURES = (FloatingPointError, torch.OutOfMemoryError)  # what a poor choice of settings can raise
TOGETHER = 64  # networks that are trained as one batched computation, at most


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
    batched: bool = False,
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
    same storage and folder; a trial that was cut off is lost, save that of the default settings, which is tried again
    at the end. Several processes, on any machines that share the two, share the trials.

    With ``batched``, up to 64 trials are drawn at once, and those that agree in all but rate and decay are trained as
    one `DeepEnsemble`. Each network is the one that it would be alone, to rounding, save where dropout, or a loader
    that shuffles, draws for all of them. It pays for small networks, whose steps are mostly overhead: on one thread 16
    multilayer perceptrons took a fifth of the time at width 32 and two thirds at width 256, and convolutional networks
    of 32 channels as long as one by one. And it pays in a space of rate and decay, or with few other settings:
    widths drawn from 16 ... 256 hardly ever agree. A group that is cut off is lost as a whole, and a process that joins
    draws as many trials as are not finished yet, up to 64.

    Args:
        make_net: (width=..., dropout=...) -> nn.Module: gets all settings but ``lr`` and ``weight_decay``.
        data: to train on, as of `effens.fit`.
        validation: (x, y), to judge the trials by, and to select with.
        default: settings of trial 0, inside the space, and those that are not searched.
        space: name to (lowest, highest): integers where both are; on a log scale where the lowest is above 0.
        trials: how many in all, those that a storage already holds and those that fail included.
        sampler: ``"random"``, as in the paper, or ``"tpe"``, which looks where trials were good.
        batched: whether to train trials together; with ``"random"`` only, for ``"tpe"`` waits for each.
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
            (of other data, say, or options; ``make_net``, ``trials``, ``batched`` and ``device`` may differ);
            or ``batched`` with ``"tpe"``, with an optimizer other than AdamW or SGD, with networks that share weights.
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
    default = checked_default(default, space)
    if storage is not None and folder is None:
        raise ValueError("a storage needs a folder that keeps the weights, got folder=None")
    if batched and sampler == "tpe":
        raise ValueError("sampler must be 'random' for a batched search, got 'tpe', which waits for each trial")
    facts = {"default": default, "space": space, "sampler": sampler, "seed": seed}
    if storage is not None:
        facts |= {"data": digest(data), "validation": digest(validation)}
        facts |= described({key: value for key, value in options.items() if key != "device"})
    study = open_study(storage, name, json.dumps(facts, sort_keys=True), default)
    networks: dict[int, nn.Module] = {}
    with tqdm(total=trials, desc="search", unit="trial", delay=2, leave=False, disable=not progress) as shown:
        while (done := sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))) < trials:
            shown.update(done - shown.n)
            asked: list[optuna.Trial] = []
            pairs: list[Pair] = []
            size = min(trials - done, TOGETHER) if batched else 1
            if done + size == trials and lost(study, default, space):
                study.enqueue_trial(default)
            for _ in range(size):
                asked.append(study.ask())
                sampling, starting = seeds_of(seed, asked[-1].number)
                study.sampler = make_sampler(sampler, sampling)
                pairs.append(({**default, **suggested(asked[-1], space)}, starting))
            for i, training in trainings(make_net, data, validation, pairs, options, batched):
                trial = asked[i]
                trial.set_user_attr("seconds", training.seconds)
                if training.network is None:
                    trial.set_user_attr("error", training.error)
                    study.tell(trial, state=TrialState.FAIL)
                    continue
                networks[trial.number] = training.network
                if folder is not None:  # before the trial counts as done
                    Path(folder).mkdir(parents=True, exist_ok=True)
                    save(training.network, weights_of(folder, name, trial.number))
                study.tell(trial, training.loss)
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
    batched: bool = False,
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
        batched: whether to train together what agrees in all but rate and decay, as `search` can, all seeds at once.
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
    began = time.perf_counter()
    runs = trainings(make_net, data, validation, pairs, options, batched)
    with tqdm(runs, "stratify", len(pairs), unit="training", delay=2, leave=False, disable=not progress) as shown:
        ended = dict(shown)
    networks = {i: network for i in range(len(pairs)) if (network := ended[i].network) is not None}
    kept, failed = ([pairs[i][0] for i in range(len(pairs)) if (i in networks) is good] for good in (True, False))
    return judged(list(networks.values()), kept, failed, time.perf_counter() - began, validation, options)


@dataclass(frozen=True)
class Training:
    """How a training ended: with a network and its validation NLL, or with an error.

    Attributes:
        network: in eval mode; None if it diverged, or did not fit into memory.
        loss: in nats.
        error: what went wrong.
        seconds: its time; of networks that were trained together, each one's share.
    """

    network: nn.Module | None
    loss: float
    error: str
    seconds: float


def trainings(
    make_net: Callable[..., nn.Module],
    data: Data,
    validation: tuple[Tensor, Tensor],
    pairs: Sequence[Pair],
    options: dict[str, Any],
    batched: bool,
) -> Iterator[tuple[int, Training]]:
    """Train each of the settings from its seed; give each place in ``pairs`` and its training as soon as it ended."""
    groups: dict[Any, list[int]] = {}
    for i, (settings, _) in enumerate(pairs):
        alike = tuple(sorted((key, value) for key, value in settings.items() if key not in OF_FIT)) if batched else i
        groups.setdefault(alike, []).append(i)
    for group in groups.values():
        for start in range(0, len(group), TOGETHER):
            part = group[start : start + TOGETHER]
            chosen = [pairs[i] for i in part]
            ended: Iterable[Training] | None = None
            if batched and len(part) > 1:
                ended = train_together(make_net, data, validation, chosen, options)
            if ended is None:
                ended = (train(make_net, data, validation, pair, options) for pair in chosen)
            yield from zip(part, ended, strict=True)


def train(
    make_net: Callable[..., nn.Module],
    data: Data,
    validation: tuple[Tensor, Tensor],
    pair: Pair,
    options: dict[str, Any],
) -> Training:
    """Train one network."""
    settings, seed = pair
    lrs: dict[str, Any] = {key: settings[key] for key in OF_FIT if key in settings}
    began = time.perf_counter()
    try:
        network = build(make_net, settings, seed, options)
        fit(DeepEnsemble.of([network]), data, seed=seed, progress=False, **lrs, **options)
        loss = validation_loss(network, validation, options)
    except FAILURES as error:
        return Training(None, math.nan, str(error), time.perf_counter() - began)
    return Training(network, loss, "", time.perf_counter() - began)


def train_together(
    make_net: Callable[..., nn.Module],
    data: Data,
    validation: tuple[Tensor, Tensor],
    pairs: Sequence[Pair],
    options: dict[str, Any],
) -> list[Training] | None:
    """Train networks as one batched computation; return None where they are to be trained one by one after all.

    Their settings differ in nothing but rate and decay. One that diverges leaves the others as they are. Where memory
    does not suffice for all of them, it may for each.
    """
    began = time.perf_counter()
    lrs, decays = ([settings.get(key, options.get(key, default)) for settings, _ in pairs] for key, default in DEFAULTS)
    rule = options.get("optimizer", torch.optim.AdamW)
    likelihood = Lenient(options.get("likelihood") or Categorical())
    try:
        networks = [build(make_net, settings, seed, options) for settings, seed in pairs]
        ensemble = OwnOrders(networks, [seed for _, seed in pairs])
        how = {**options, "likelihood": likelihood, "lr": 1.0, "weight_decay": 0.0}
        how["optimizer"] = lambda groups, **_: PerMember(ensemble, rule, lrs, decays)
        fit(ensemble, data, seed=pairs[0][1], progress=False, **how)
    except FAILURES:
        return None
    share = (time.perf_counter() - began) / len(pairs)
    ended: list[Training] = []
    for m, diverged in enumerate(likelihood.diverged.tolist()):
        try:
            if diverged:
                raise FloatingPointError("losses must be finite, got one that is not: lower the learning rate")
            network = ensemble.member(m)
            ended.append(Training(network, validation_loss(network, validation, options), "", share))
        except FAILURES as error:
            ended.append(Training(None, math.nan, str(error), share))
    return ended


def validation_loss(network: nn.Module, validation: tuple[Tensor, Tensor], options: dict[str, Any]) -> float:
    """Return a network's validation NLL, or raise `FloatingPointError` if what it predicts is not finite."""
    x, y = validation
    prediction = predict(DeepEnsemble.of([network]), x, likelihood=options.get("likelihood"))
    values = prediction if isinstance(prediction, Tensor) else prediction.log_prob(y)
    if not bool(values.isfinite().all()):
        raise FloatingPointError(f"predictions must be finite, got {int((~values.isfinite()).sum())} that are not")
    return -log_likelihoods(prediction, y).mean().item()


def build(make_net: Callable[..., nn.Module], settings: Settings, seed: int, options: dict[str, Any]) -> nn.Module:
    """Make the network of these settings, from a seed, on the device on which it is trained."""
    place = resolve_device(options.get("device"))
    with fixed_seed(seed, place):
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
        raise FloatingPointError(f"one training at least must end well, got {len(failed)} that failed: lower `lr`")
    x, y = validation
    probs = predict(DeepEnsemble.of(networks), x, likelihood=options.get("likelihood"))
    return Candidates(networks, settings, probs, -log_likelihoods(probs, y).mean(1), failed, seconds)


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
        place = open_storage(storage) if isinstance(storage, str) else storage
        try:
            study = optuna.create_study(storage=place, study_name=name)
            study.enqueue_trial(dict(first))
        except optuna.exceptions.DuplicatedStudyError:
            assert place is not None
            study = optuna.load_study(storage=place, study_name=name)
            for _ in range(20):  # whoever made it may not have queued the first settings yet
                if "search" in study.user_attrs:
                    break
                time.sleep(0.1)
    finally:
        optuna.logging.set_verbosity(level)
    if (held := study.user_attrs.get("search", facts)) != facts:
        raise ValueError(f"the study {name!r} must be of this search, {facts}, got {held}: give it another name")
    study.set_user_attr("search", facts)
    return study


def lost(study: "optuna.Study", default: Settings, space: Space) -> bool:
    """Say whether the trial of the default settings neither waits nor ended: whoever had it was killed, it seems."""
    from optuna.trial import TrialState

    first = {key: default[key] for key in space}
    trials = study.get_trials(deepcopy=False)
    return not any(t.state == TrialState.WAITING or (t.state.is_finished() and t.params == first) for t in trials)


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
