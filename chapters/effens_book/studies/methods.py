"""One setting of a method at a time: how many cycles, how fast a tail, how wide a network, how strong a decay."""

from dataclasses import replace
from functools import partial

import torch
from torch import nn

from effens import scores
from effens.ensembles.base import Ensemble
from effens.ensembles.deep import DeepEnsemble
from effens.ensembles.hyper import HyperEnsemble, greedy_select
from effens.ensembles.mimo import MIMO
from effens.ensembles.snapshot import SnapshotEnsemble
from effens.ensembles.swag import SWAG
from effens.training import predict
from effens_book.benchmark import TASKS, Task
from effens_book.benchmark.methods import MOMENTUM_SGD, candidate, train_one, trial_settings
from effens_book.benchmark.predictions import log_likelihoods, score, take_members
from effens_book.benchmark.tasks import Settings
from effens_book.studies import running
from effens_book.studies.running import Row, study


@study(
    8,
    {"kind": ["snapshot"], "parts": [1, 2, 4, 8]},
    {"kind": ["triangular"], "parts": [4]},
    {"kind": ["independent"], "parts": [2, 4, 8]},
    {"kind": ["single"], "parts": [8, 4, 2, 1, 0.5]},
)
def cycles(kind: str, parts: float, seed: int) -> list[Row]:
    """Divide the budget of one network on digits: into cycles, or into independent networks; or train one with less.

    A part is B / ``parts`` epochs, of B in the whole budget; half a part is one network with twice the budget. The
    triangular cycles of Fast Geometric Ensembling share the last fifth of the budget.
    """
    task = TASKS["digits"]
    brief = replace(task, epochs=round(task.epochs / parts))
    if kind in ("snapshot", "triangular"):
        schedule = "cosine" if kind == "snapshot" else kind
        make = partial(SnapshotEnsemble, task.make_net, int(parts), schedule=schedule)
        ensemble = running.train(task, make, running.tuned_settings("snapshot"), seed)
    elif kind == "independent":
        ensemble = running.train(
            brief, lambda: DeepEnsemble(task.make_net, int(parts)), running.tuned_settings("deep, short"), seed
        )
    else:
        ensemble = running.train(brief, lambda: DeepEnsemble(task.make_net, 1), running.tuned_settings("single"), seed)
    fitted = running.score_ensemble(task, ensemble, seed, "train")
    return [{**running.score_ensemble(task, ensemble, seed), "fit": fitted["member_nll"], "fit_of_mean": fitted["nll"]}]


# Rank and scale; rank 0, the diagonal form, comes last, because deviations are forgotten for it.
FORMS = ((20, 0.0), (20, 0.5), (20, 2.0), (20, 8.0), (0, 1.0))


@study(10, {"lr": [0.003, 0.01, 0.03, 0.1], "tail_lr": [0.03, 0.1, 0.3, 1.0]})
def tails(lr: float, tail_lr: float, seed: int) -> list[Row]:
    """Change the rate of SWAG's tail, on the curve with the gap in batches of 16, so that SGD has noise.

    One training, and all forms drawn from its moments: a row for each rank and scale; and one for the last weights.
    """
    task = replace(TASKS["gap"], batch_size=16, epochs=200)
    settings = {"lr": lr, "weight_decay": 1e-4}
    rows = []
    try:
        ensemble = running.train(task, lambda: SWAG(task.make_net, 30, tail_lr=tail_lr), settings, seed, MOMENTUM_SGD)
    except FloatingPointError:
        return [{"rank": rank, "scale": scale, "diverged": 1} for rank, scale in FORMS]
    assert isinstance(ensemble, SWAG)
    last = DeepEnsemble.of([ensemble.network])
    rows.append({"rank": -1, "scale": 0.0, **gap_scores(task, last, seed)})
    for rank, scale in FORMS:
        if rank == 0:
            ensemble.deviations.zero_()
        ensemble.scale = scale
        ensemble.finish([])
        row = {"rank": rank, "scale": scale}
        try:
            rows.append({**row, **gap_scores(task, ensemble, seed)})
        except FloatingPointError:
            rows.append({**row, "diverged": 1})
    return rows


@study(8, {"samples": [1, 2, 4, 8, 16, 30]})
def samples(samples: int, seed: int) -> list[Row]:
    """Draw more samples from SWAG on digits."""
    task = TASKS["digits"]
    settings = running.tuned_settings("SWAG")

    def make() -> Ensemble:
        return SWAG(task.make_net, samples, tail_lr=settings["tail_lr"], seed=seed)

    return [running.score_ensemble(task, running.train(task, make, settings, seed, MOMENTUM_SGD), seed)]


@study(8, {"tail_lr": [0.1, 0.3, 1.0]})
def tail_on_digits(tail_lr: float, seed: int) -> list[Row]:
    """Raise the rate of SWAG's tail on digits, with all else tuned: are the draws one network because they fit?"""
    task, settings = TASKS["digits"], running.tuned_settings("SWAG")
    ensemble = running.train(
        task, lambda: SWAG(task.make_net, task.members, tail_lr=tail_lr, seed=seed), settings, seed, MOMENTUM_SGD
    )
    fitted = running.score_ensemble(task, ensemble, seed, "train")
    return [{"fit": fitted["member_nll"], **running.score_ensemble(task, ensemble, seed)}]


@study(
    5,
    {"width": [8, 16, 32, 64], "members": [1], "share": [0.0]},
    {"width": [8, 16, 32, 64], "members": [2, 3], "share": [0.0, 0.5, 0.9]},
)
def capacity(width: int, members: int, share: float, seed: int) -> list[Row]:
    """Give MIMO more or less room on digits; one member is the plain network. Tuned at width 16, and kept."""
    task = replace(TASKS["digits"], width=width)
    settings = running.tuned_settings("MIMO" if members > 1 else "single")
    ensemble = running.train(task, lambda: MIMO(task.make_net, members, share), settings, seed)
    return [
        {
            **running.score_ensemble(task, ensemble, seed),
            "fit": running.score_ensemble(task, ensemble, seed, "train")["member_nll"],
        }
    ]


BUDGET = 20  # trainings


@study(8, {"task": ["digits", "gap"]})
def search(task: str, seed: int) -> list[Row]:
    """Spend 20 trainings in four ways: a row for each; selected on validation data, scored on test data.

    Greedy and top: chosen among 20 candidates. Best, retrained: the best of the first 16, or of fewer where the
    ensemble is larger, trained again from M seeds. Stratified: those that are chosen greedily of the first 10, trained
    again with the rest of the budget, and chosen from all.
    """
    of = TASKS[task]
    x, y = of.load(seed)["val"]
    assert y is not None
    points = trial_settings(of, "hyper", seed, BUDGET)
    start = 1000 + 3 * BUDGET * seed

    def trained(number: int, settings: Settings) -> nn.Module:
        """Train a candidate; one that diverges is as good as one that was not trained."""
        try:
            make = partial(candidate, of, settings)
            ensemble = running.train(of, lambda: DeepEnsemble.of([make()]), settings, start + number, draw=seed)
        except FloatingPointError:
            return candidate(of, settings)
        return ensemble.member(0).eval()

    networks = [trained(i, settings) for i, settings in enumerate(points)]
    said = predict(DeepEnsemble.of(networks), x, likelihood=of.likelihood)
    ranked = (-log_likelihoods(said, y).mean(1)).argsort().tolist()
    first = next(i for i in ranked if i < BUDGET - of.members)
    best = [trained(BUDGET + m, points[first]) for m in range(of.members)]
    half = BUDGET // 2
    few = sorted(set(greedy_select(take_members(said, torch.arange(half)), y, of.members)))
    again = [trained(2 * BUDGET + j, points[few[j % len(few)]]) for j in range(half)]
    pool = [*networks[:half], *again]
    mixed = greedy_select(predict(DeepEnsemble.of(pool), x, likelihood=of.likelihood), y, of.members)
    ways: dict[str, Ensemble] = {
        "greedy": HyperEnsemble(networks, greedy_select(said, y, of.members)),
        "top": HyperEnsemble(networks, ranked[: of.members]),
        "best, retrained": DeepEnsemble.of(best),
        "stratified": HyperEnsemble(pool, mixed),
        "best, alone": DeepEnsemble.of([networks[ranked[0]]]),
    }
    return [
        {
            "way": way,
            "unique": len(set(getattr(ensemble, "index", range(ensemble.members)))),
            "val": running.score_ensemble(of, ensemble, seed, "val")["nll"],
            **running.score_ensemble(of, ensemble, seed),
        }
        for way, ensemble in ways.items()
    ]


DECAYED = ["single", "deep ensemble", "BatchEnsemble", "snapshot", "MIMO"]


@study(5, {"task": ["digits", "diamonds"], "method": DECAYED, "weight_decay": [0.003, 0.03, 0.1, 0.3, 1.0, 3.0]})
def decay(task: str, method: str, weight_decay: float, seed: int) -> list[Row]:
    """Change the weight decay alone, with all else tuned: does the order of the methods hold?"""
    settings = {**running.tuned_settings(method, task), "weight_decay": weight_decay}
    try:
        ensemble, _ = train_one(TASKS[task], method, settings, seed)
        return [running.score_ensemble(TASKS[task], ensemble, seed)]
    except FloatingPointError:
        return [{"diverged": 1}]


@study(8, {"method": ["single, SGD", "SWAG"]})
def draws(method: str, seed: int) -> list[Row]:
    """Draw more from SWAG on clothes, and nothing but its mean: a row each; and one network trained by SGD.

    Each row says how well entropy tells digits and letters from clothes, in percent, so that the draws are compared
    with what has the same optimizer.
    """
    of, settings = TASKS["fashion"], running.tuned_settings(method, "fashion")
    if method == "single, SGD":
        single = running.train(of, lambda: DeepEnsemble(of.make_net, 1), settings, seed, MOMENTUM_SGD)
        return [{"row": method, "samples": 1, **with_alarms(of, single, seed)}]

    def make() -> Ensemble:
        return SWAG(of.make_net, 30, tail_lr=settings["tail_lr"], seed=seed)

    ensemble = running.train(of, make, settings, seed, MOMENTUM_SGD)
    assert isinstance(ensemble, SWAG)
    found = [{"row": "SWAG", "samples": m, **with_alarms(of, ensemble, seed, m)} for m in (4, 30)]
    ensemble.scale = 0.0
    ensemble.finish(of.load(seed)["train"][0].split(of.batch_size))
    return [*found, {"row": "SWA", "samples": 1, **with_alarms(of, ensemble, seed, 1)}]


def with_alarms(of: Task, ensemble: Ensemble, seed: int, members: int | None = None) -> Row:
    """Score some members on test data, and say how well their entropy tells unknown inputs from it, in percent."""
    sets = of.load(seed)
    said = {
        key: take_members(predict(ensemble, x, likelihood=of.likelihood), torch.arange(members or ensemble.members))
        for key, (x, y) in sets.items()
        if key == "test" or y is None
    }
    y = sets["test"][1]
    assert y is not None
    row: Row = dict(score(said["test"], y))
    for key in said.keys() - {"test"}:
        parts = (scores.total_entropy(said[split]) for split in ("test", key))
        row[f"auroc@{key}"] = 100 * float(scores.auroc(*parts))
    return row


def gap_scores(task: Task, ensemble: Ensemble, seed: int) -> Row:
    """Score on test data and in the gap, and on validation data to choose by."""
    inside = running.score_ensemble(task, ensemble, seed, "gap")
    result = {
        **running.score_ensemble(task, ensemble, seed),
        "val": running.score_ensemble(task, ensemble, seed, "val")["nll"],
    }
    result["fit"] = running.score_ensemble(task, ensemble, seed, "train")["nll"]
    result |= {f"{key}@gap": inside[key] for key in ("nll", "coverage", "spread")}
    return result
