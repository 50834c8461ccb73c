"""Run the benchmark: ``python -m effens_book.benchmark``, called in `chapters/`, runs what is missing.

Every trial and every run is written as soon as it is done, so that it may be killed at any time. When all seeds of a
method are done they become one file, its row. Costs are measured last: let nothing else run then.
"""

import argparse
import datetime
import io
import json
import math
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from effens import scores
from effens.costs import durations, measure
from effens.ensembles.base import Ensemble
from effens.ensembles.batch import BatchEnsemble
from effens.ensembles.deep import DeepEnsemble
from effens.ensembles.hyper import HyperEnsemble
from effens.inputs import rows_at
from effens.storage import write_whole
from effens.training import predict
from effens_book.benchmark.methods import METHODS, candidate, train_one, trial_settings
from effens_book.benchmark.packing import write_row
from effens_book.benchmark.predictions import (
    count_members,
    from_half,
    groups,
    log_likelihoods,
    log_mean,
    score,
    take_members,
    tempered,
    to_half,
)
from effens_book.benchmark.report import Benchmark
from effens_book.benchmark.results import BASELINES
from effens_book.benchmark.tasks import PRIMARY, TASKS, TUNING_SEEDS, Sets, Settings, Task

UNFINISHED = "unfinished"  # the folder, beside the rows, of what is not packed yet


def run_row(benchmark: Benchmark, task: Task, name: str) -> None:
    """Tune a method and run it with every seed of a task, unless that was done; what was done already is used."""
    path, files = benchmark.path(task.name, name), folder(benchmark, task, name)
    settings = tune(benchmark, task, name)
    if is_done(benchmark, task, name):
        return
    runs = [files / f"{seed}.npz" for seed in range(task.seeds)]
    for seed, file in enumerate(runs):
        if not file.exists():
            run_seed(file, task, name, settings, seed)
    write_row(path, runs, task.digest, lambda seed, key: task.load(seed)[key][1], task.likelihood)
    shutil.rmtree(files)
    benchmark.forget(task.name, name)


def is_done(benchmark: Benchmark, task: Task, name: str) -> bool:
    """Say whether there is a row, of the settings that all its trials choose."""
    if not benchmark.path(task.name, name).exists():
        return False
    where, method = task.tuned_on or task.name, METHODS[name]
    tuned = (method.like or (name,)) if method.tuned else ()
    ready = all(finalists(TASKS[where], benchmark.trials(where, other)) for other in tuned)
    return ready and benchmark.row(task.name, name).facts[0]["settings"] == benchmark.settings(task.name, name)


def folder(benchmark: Benchmark, task: Task, name: str) -> Path:
    """Return where a method's trials and runs are kept until they are packed."""
    return benchmark.folder / UNFINISHED / task.name / name.replace(" ", "-")


def tune(benchmark: Benchmark, task: Task, name: str) -> Settings:
    """Return the settings with the lowest validation score, after running the trials that are missing.

    A variant takes the settings of the methods that it is like, or those with the second lowest score if it says so.

    Raises:
        FloatingPointError: all trials diverged.
    """
    method, task = METHODS[name], TASKS[task.tuned_on] if task.tuned_on else task
    for other in (method.like or (name,)) if method.tuned else ():
        run_trials(benchmark, task, other)
        scores = benchmark.trial_scores(task.name, other)
        if not any(map(math.isfinite, scores)):
            rule = f"at least one trial of {other} on {task.name} must not diverge"
            raise FloatingPointError(f"{rule}, got {len(scores)} of {len(scores)} that did")
    return benchmark.settings(task.name, name)


def run_trials(benchmark: Benchmark, task: Task, name: str) -> None:
    """Run a method's trials, each on the tuning seeds, and add them to the task's file of trials."""
    path = benchmark.folder / task.name / "tuning.json"

    def kept() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
        return found

    before = kept().get(name, [])
    if finalists(task, before) is not None:
        return
    points = trial_settings(task, name)
    files = [folder(benchmark, task, name) / f"trial-{i}.json" for i in range(len(points))]
    for i, (file, settings) in enumerate(zip(files, points, strict=True)):
        if not file.exists():
            write_json(file, before[i] if before else {"settings": settings, PRIMARY: []})
        run_trial(file, task, name, TUNING_SEEDS)
    while finalists(task, trials := [json.loads(file.read_text("utf-8")) for file in files]) is None:
        run_trial(files[next_finalists(task, trials)[0]], task, name, tuning_seeds(task))
    write_json(path, kept() | {name: trials})


def run_trial(file: Path, task: Task, name: str, seeds: Sequence[int]) -> None:
    """Run a trial on the seeds that it lacks, and write each score, None where training diverged, and its time."""
    trial = json.loads(file.read_text("utf-8"))
    for seed in seeds[len(trial[PRIMARY]) :]:
        began = time.perf_counter()
        value = validation_score(task, name, trial["settings"], seed)
        trial[PRIMARY].append(value if math.isfinite(value) else None)
        trial["seconds"] = round(trial.get("seconds", 0.0) + time.perf_counter() - began, 1)
        write_json(file, {**trial, **provenance()})


def tuning_seeds(task: Task) -> list[int]:
    """Return the seeds on which a finalist is run."""
    return [*TUNING_SEEDS, *task.more_seeds]


def finalists(task: Task, trials: Sequence[Mapping[str, Any]]) -> list[int] | None:
    """Return the numbers of the trials that ran on all seeds, or None while there are others to run.

    The best trials on the first seeds are run on more. One that diverges on any of them makes room for the next best,
    so that a setting is chosen that never diverged; unless there is none.
    """
    done = [i for i, trial in enumerate(trials) if len(trial[PRIMARY]) == len(tuning_seeds(task))]
    sound = [i for i in done if None not in trials[i][PRIMARY]]
    return done if trials and (len(sound) >= task.finalists or not next_finalists(task, trials)) else None


def next_finalists(task: Task, trials: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the trials that lack seeds and did not diverge on the first, the lowest mean on these first."""
    first = {i: trial[PRIMARY][: len(TUNING_SEEDS)] for i, trial in enumerate(trials)}
    lacking = [i for i, trial in enumerate(trials) if len(trial[PRIMARY]) < len(tuning_seeds(task))]
    return sorted((i for i in lacking if None not in first[i]), key=lambda i: float(np.mean(first[i])))


def validation_score(task: Task, name: str, settings: Settings, seed: int) -> float:
    """Train, and score on validation data; infinite where a loss, or a prediction, is not finite."""
    try:
        ensemble, sets = train_one(task, name, settings, seed)
        x, y = sets["val"]
        prediction = ask(task, ensemble, x, seed)
        to_half(prediction)  # fails on what could not be kept
    except FloatingPointError:
        return math.inf
    assert y is not None
    return -log_mean(log_likelihoods(prediction, y)).mean().item()


def run_seed(path: Path, task: Task, name: str, settings: Settings, seed: int) -> None:
    """Train a method with one seed and write its members' predictions of every set."""
    ensemble, sets = train_one(task, name, settings, seed)
    facts: dict[str, Any] = {"task": task.name, "method": name, "seed": seed, "settings": settings, **provenance()}
    if isinstance(ensemble, HyperEnsemble):  # what is chosen three times is kept once
        facts["rows"] = ensemble.rows
    control = METHODS[name].control and name not in task.everywhere
    arrays: dict[str, Any] = {}
    for key, (x, y) in sets.items():
        if key == "test" or (key != "train" and not control):
            if key == "test" and task.refits is not None:
                numbers = refit(task, name, settings, seed)
                said = from_half(torch.from_numpy(numbers).float(), task.likelihood)
            else:
                said = ask(task, once(ensemble), x, seed)
                numbers = to_half(said)
            if task.large:
                keep_scores(facts, task, name, sets, key, said)
                if key == "test":
                    facts["members"] = count_members(said)
                    arrays["test logs"] = facts.pop("logs").float().numpy()
                if seed or control or (y is not None and key not in ("test", "val")):
                    continue
            arrays[key] = numbers
    facts.pop("said", None)
    content = io.BytesIO()
    np.savez_compressed(content, facts=np.array(json.dumps(facts)), **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content.getvalue())


def keep_scores(facts: dict[str, Any], task: Task, name: str, sets: Sets, key: str, said: Any) -> None:
    """Put a set's scores among the facts; of one network also those with its confidence set on validation data.

    Of the test set also the log likelihood of each example; of a pool, the mean over its groups.

    Of a set without right answers the score is how well total entropy tells it from the test set, in percent.
    """
    kept: dict[Any, Any] = facts.setdefault("said", {})  # by version and set
    everyone = take_members(said, torch.tensor(facts["rows"])) if "rows" in facts else said
    versions = {"scores": everyone}
    y_val = sets["val"][1]
    if name in BASELINES.values() and key != "val" and y_val is not None:
        versions["tempered"] = tempered(everyone, kept["scores", "val"], y_val)
    for version, prediction in versions.items():
        kept[version, key] = prediction
        found = facts.setdefault(version, {})
        y = sets[key][1]
        if y is None:
            entropies = (scores.total_entropy(kept[version, split]) for split in ("test", key))
            found[key] = {"auroc": 100 * float(scores.auroc(*entropies))}
        else:
            parts = groups(prediction, task.members) if name == "deep ensemble" else [prediction]
            rows = [score(part, y) for part in parts]
            found[key] = {metric: float(np.mean([row[metric] for row in rows])) for metric in rows[0]}
            if (version, key) == ("scores", "test"):
                facts["logs"] = torch.stack([log_mean(log_likelihoods(part, y)) for part in parts]).mean(0)


def once(ensemble: Ensemble) -> Ensemble:
    """Return the ensemble with every network once, where some are chosen several times."""
    return ensemble.chosen if isinstance(ensemble, HyperEnsemble) else ensemble


def refit(task: Task, name: str, settings: Settings, seed: int) -> NDArray[np.float16]:
    """Train anew for every part of the test set, on what was known before it, and return all their predictions."""
    assert task.refits is not None
    found = []
    for sets in task.refits():
        ensemble, _ = train_one(replace(task, load=partial(same_for_all, sets)), name, settings, seed)
        found.append(to_half(ask(task, once(ensemble), sets["test"][0], seed)))
    return np.concatenate(found, axis=1)


def same_for_all(sets: Sets, seed: int) -> Sets:
    """Return the same sets for every seed."""
    return sets


def ask(task: Task, ensemble: Ensemble, x: Tensor, seed: int) -> Any:
    """Return every member's prediction; the seed decides what a network answers whose dropout stays on."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return predict(ensemble, x, likelihood=task.likelihood)


def estimate(task: Task, name: str) -> str:
    """Say how many trainings a row takes, and about how long they last: from one short training."""
    trials, runs = 0, task.seeds * (1 if task.refits is None else 1 + len(task.refits()))
    if METHODS[name].tuned and not METHODS[name].like:
        points = len(trial_settings(task, name))
        trials = points * len(TUNING_SEEDS) + min(points, task.finalists) * len(task.more_seeds)
    brief = replace(task, epochs=task.members)
    start = time.perf_counter()
    settings = trial_settings(task, (METHODS[name].like or [name])[-1])[0]  # of a variant those of what it is like
    train_one(brief, name, settings, TUNING_SEEDS[0])
    seconds = (time.perf_counter() - start) * task.epochs / task.members
    minutes = math.ceil(seconds * (trials + runs) / 60)
    return f"{task.name}, {name}: {trials} trainings to tune and {runs} to keep, about {minutes} min"


def run_costs(benchmark: Benchmark, task: Task, names: Iterable[str], device: str = "cpu") -> None:
    """Measure what the methods cost that were not measured before, in turns, beside the single network.

    What others cost stays as it is: times are kept as multiples of the single network's time of today, times its time
    that is kept.
    """
    path = benchmark.costs_path(task.name, device)
    kept: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    missing = [name for name in names if not METHODS[name].control and name not in kept]
    if not missing:
        return
    found = measure_costs(
        benchmark, task, dict.fromkeys(["single", *missing]), device, 0.4 if device == "cpu" else 0.05
    )
    now = found["single"]
    before = kept.get("single", now)
    for name in missing:
        kept[name] = {**provenance(), **as_if(found[name], now, before)}
    write_json(path, kept)


def as_if(costs: Mapping[str, Any], now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Return costs with every time changed as the single network's time changed from ``now`` to ``before``."""
    found = {**costs, "train_seconds": costs["train_seconds"] * before["train_seconds"] / now["train_seconds"]}
    for key in ("latency_p50", "latency_p99"):
        found[key] = {size: seconds * before[key][size] / now[key][size] for size, seconds in costs[key].items()}
    return found


def measure_costs(
    benchmark: Benchmark, task: Task, names: Iterable[str], device: str, seconds: float
) -> dict[str, dict[str, Any]]:
    """Return what each method's ensemble costs on a device: the fields of `effens.Costs`.

    They are measured in turns, and each time is the median of five: one long measurement of each would compare
    different moments of the machine. They are trained on the CPU, for some epochs only: no weight changes a cost.
    """
    brief = replace(task, pool=task.members, epochs=task.members)  # an epoch for each cycle
    if task.prepare is not None:  # whose rows take long
        brief = replace(brief, prepare=partial(few_rows, task.prepare))
    ensembles: dict[str, Ensemble] = {}
    searches: dict[str, Ensemble] = {}  # of which the ensemble is a part: all of it is trained
    for name in names:
        ensemble, _ = train_one(brief if METHODS[name].tuned else task, name, tune(benchmark, task, name), 0)
        if isinstance(ensemble, HyperEnsemble):
            ensemble = ensemble.chosen
            candidates = [candidate(task, settings) for settings in trial_settings(task, name)]
            searches[name] = DeepEnsemble.of(candidates).to(device)
        ensembles[name] = ensemble.to(device)
    x, y = task.sets(0)["train"]
    assert y is not None
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in ensembles}
    for _ in range(5 if task.trunk is None else 1):
        for name, ensemble in ensembles.items():
            found = asdict(measure(plain(ensemble), x, y, likelihood=task.likelihood, seconds=seconds))
            if name in searches:
                whole = measure(searches[name], x, y, likelihood=task.likelihood, seconds=seconds)
                found["train_seconds"] = whole.train_seconds
            rounds[name].append(found)
    middles = {}
    for name, each in rounds.items():
        middles[name] = dict(each[0])
        longer = task.members if METHODS[name].long else 1  # a step costs the same, and there are more
        middles[name]["train_seconds"] = longer * float(np.median([one["train_seconds"] for one in each]))
        for key in ("latency_p50", "latency_p99"):
            middles[name][key] = {size: float(np.median([one[key][size] for one in each])) for size in each[0][key]}
    result: dict[str, dict[str, Any]] = json.loads(json.dumps(middles))  # as they are read again
    add_trunk(task, result, device)
    return result


def plain(ensemble: Ensemble) -> nn.Module:
    """Return what costs are measured of: of a deep ensemble of one its network, as plain PyTorch trains and asks it."""
    return ensemble.member(0) if isinstance(ensemble, DeepEnsemble) and ensemble.members == 1 else ensemble


def few_rows(prepare: Callable[[Sets], Sets], sets: Sets) -> Sets:
    """Return the prepared training set alone, cut to 128 rows."""
    x, y = prepare(sets)["train"]
    return {"train": (rows_at(x, slice(128)), None if y is None else y[:128])}


def add_trunk(task: Task, costs: Mapping[str, dict[str, Any]], device: str) -> None:
    """Add the trunk to predictions and to what is stored; it runs once for all members. Training keeps its states."""
    if task.trunk is None:
        return
    trunk, (x, _) = task.trunk().to(device), task.load(0)["train"]
    stored = sum(tensor.numel() * tensor.element_size() for tensor in trunk.state_dict().values())
    for size in (1, 256):
        with torch.inference_mode():
            times = durations(partial(trunk, x[:size].to(device)), 0.4, torch.device(device))
        for found in costs.values():
            for key, time_ in {"latency_p50": times.median(), "latency_p99": times.quantile(0.99)}.items():
                found[key][str(size)] += time_.item()
    for found in costs.values():
        found["stored_bytes"] += stored


LAYERS: dict[str, Any] = {"widths": (64, 256, 1024, 4096), "batches": (1, 16, 256), "members": 4}


def run_layer_costs(benchmark: Benchmark) -> None:
    """Time one linear layer, M of them, and BatchEnsemble's, over widths and batches, unless that is kept already."""
    path = benchmark.folder / "layers.json"
    if path.exists():
        return
    members = LAYERS["members"]
    rows = []
    for width in LAYERS["widths"]:
        make = partial(nn.Linear, width, width)
        layers = {
            "single": make(),
            "deep ensemble": DeepEnsemble(make, members),
            "BatchEnsemble": BatchEnsemble(make, members),
        }
        for batch in LAYERS["batches"]:
            x = torch.randn(batch, width)
            with torch.inference_mode():
                times = time_in_turns({name: partial(layer, x) for name, layer in layers.items()}, seconds=4.0)
            rows += [{"method": name, "width": width, "batch": batch, "seconds": t} for name, t in times.items()]
    write_json(path, {"members": members, "threads": torch.get_num_threads(), "rows": rows, **provenance()})


def time_in_turns(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Return the median time of each call, taken in turns, so that a busy moment hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    while len(times[next(iter(times))]) < 10 or time.perf_counter() - began < seconds:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(found[3:])) for name, found in times.items()}


def provenance() -> dict[str, str]:
    """Return where and when a run was made."""
    today = datetime.date.today().isoformat()
    return {"torch": torch.__version__, "python": platform.python_version(), "device": "cpu", "date": today}


def methods_of(task: Task) -> list[str]:
    """Return what is run on a task."""
    if task.rows:
        return list(task.rows)
    rows = [name for name, method in METHODS.items() if not method.only or task.name in method.only]
    return [name for name in rows if not METHODS[name].control or name in task.controls]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a small file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(content, separators=(",", ":")) + "\n").encode())


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m effens_book.benchmark", description=main.__doc__)
    parser.add_argument("--results", help="the folder of the results; the book's own by default")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--no-costs", action="store_true", help="measure no costs: another program is running")
    parser.add_argument("--gpu", action="store_true", help="only measure costs, of all methods, on the GPU at hand")
    chosen = parser.parse_args(arguments)
    if chosen.gpu and not torch.cuda.is_available():
        parser.error("--gpu needs a CUDA device, got none")
    torch.set_num_threads(1)  # so that numbers and times do not depend on how many cores there are
    benchmark = Benchmark(chosen.results)
    if chosen.gpu:
        for task in tqdm(chosen.tasks, desc="costs on the GPU", unit="task"):
            run_costs(benchmark, TASKS[task], chosen.methods, "cuda")
        for task in chosen.tasks:
            device = benchmark.costs(task, "single", "cuda")["device"]
            print(f"\n{task}: {device}\n{benchmark.cost_table(task, device='cuda')}")
        return
    pairs = [(TASKS[task], name) for task in chosen.tasks for name in chosen.methods if name in methods_of(TASKS[task])]
    pairs = [(task, name) for task, name in pairs if not is_done(benchmark, task, name)]
    for task, name in pairs:
        print(estimate(task, name))
    for task, name in tqdm(pairs, desc="benchmark", unit="row", disable=not pairs):
        run_row(benchmark, task, name)
    if not chosen.no_costs:
        for task in chosen.tasks:
            run_costs(benchmark, TASKS[task], chosen.methods)
        run_layer_costs(benchmark)
    if set(chosen.methods) == set(METHODS):
        for task in chosen.tasks:
            print(f"\n{task}: test set\n{benchmark.table(task)}")
