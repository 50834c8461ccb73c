"""Numbers in the chapters' prose: each is what the ledger says, what the page prints, or is known from elsewhere.

Sentences that rest on the ledger, numbers in words included, stand in `CLAIMS` beside the expression that must agree.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pytest
import torch
from rerun import ROOT, chapters

import effens
from effens import gpu, ledger, orders, risk, rivals, roofline, scores, studies

NUMBER = re.compile(r"(?<![\w.])(?:\d+\.\d+|\d+(?=x\b|\s?%))(?:x\b|\s?%)?")
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
PARTS = {2: "half", 3: "third", 4: "quarter", 5: "fifth", 10: "tenth", 20: "twentieth"}
TESTED = [name for name in ledger.names() if name != "single, temperature"]
PLANE = ("single", "deep ensemble", "BatchEnsemble", "snapshot", "SWAG", "MIMO", "hyper", "MC dropout", "Laplace")
REAL = ("digits", "diamonds")


def word(value: float) -> str:
    return WORDS[round(value)]


def part(value: float) -> str:
    return PARTS[round(1 / value)]


def cost(task: str, name: str, key: str) -> float:
    return ledger.relative_costs(task, name)[key]


def verdict(task: str, a: str, b: str) -> str:
    return ledger.compare(task, a, b).verdict


def mean(task: str, name: str, metric: str = "nll", split: str = "test") -> float:
    return ledger.values(task, name, metric, split).mean().item()


def best(task: str, key: str, budget: float) -> str:
    fits = [name for name in ledger.names() if cost(task, name, key) <= 1.1 * budget]
    return min(fits, key=lambda name: mean(task, name))


@cache
def left_by_tuning() -> list[ledger.Interval]:
    """How much lower each method's loss is at the best decay of the study than as tuned, the same five seeds."""
    found = []
    for task in REAL:
        for method in studies.DECAYED:
            where = {"task": task, "method": method}
            losses = [
                studies.values("decay", "nll", **where, weight_decay=d) for d in (0.003, 0.03, 0.1, 0.3, 1.0, 3.0)
            ]
            lowest = min(losses, key=lambda each: each.mean().item())
            found.append(ledger.interval(lowest - ledger.values(task, method)[:5]))
    return found


@cache
def calibrated(name: str) -> torch.Tensor:
    """The NLL on digits at the temperature of validation data, (seeds,)."""
    found = []
    for seed in range(ledger.TASKS["digits"].seeds):
        said = {split: ledger.predictions("digits", name, seed, split) for split in ("val", "test")}
        heat = scores.temperature(said["val"], ledger.targets("digits", seed, "val"))
        tempered = scores.temper(said["test"], heat)
        found.append(scores.nll(tempered, ledger.targets("digits", seed, "test")))
    return torch.stack(found)


def calibrated_verdict(name: str) -> str:
    gap = ledger.interval(calibrated(name) - calibrated("deep ensemble"))
    return "lower" if gap.mean + gap.half < 0 else "higher" if gap.mean - gap.half > 0 else "unresolved"


def losses(task: str, members: int) -> dict[str, float]:
    points = {name: ledger.at_members(task, name, members) for name in PLANE}
    return {name: loss - gain for name, (loss, gain) in points.items()}


def first_brings_most(task: str) -> bool:
    grown = [[ledger.at_members(task, name, m)[1] for m in range(1, 5)] for name in PLANE]
    return all(b - a >= max(c - b, d - c) for a, b, c, d in grown)


@cache
def knee_ratios() -> dict[int, float]:
    """The measured rows of twice the time, over those predicted, by width."""
    machine, times = roofline.read()
    result = {}
    for width in roofline.WIDTHS:
        seen = roofline.by_rows(times, width)
        said = {rows: machine.predict(width, rows, 1, True) for rows in seen}
        result[width] = roofline.doubled(seen) / roofline.doubled(said)
    return result


def layer_ratios(name: str) -> torch.Tensor:
    machine, times = roofline.read()
    shared = name == "BatchEnsemble"
    return torch.tensor([t / machine.predict(w, b, m, shared) for (n, w, b, m), t in times.items() if n == name])


def peak_share(width: int) -> float:
    machine, times = roofline.read()
    return 2 * width**2 * 16 / roofline.by_rows(times, width)[16] / machine.peak


def calls_share(name: str, batch: int) -> float:
    calls, *others = roofline.forward("digits", name, batch).predict(roofline.read()[0])
    return calls / (calls + sum(others))


def of_networks(task: str, members: int) -> float:
    return ledger.curve(task, [members]).mean().item()


def tuned() -> list[str]:
    return [name for name in ledger.names() if name in ledger.METHODS and ledger.METHODS[name].tuned]


def layer(method: str, batch: int) -> dict[int, float]:
    """What a layer of four members costs, of one plain layer, by its width."""
    rows = json.loads((ledger.BANK / "layers.json").read_text())["rows"]
    seconds = {(row["method"], row["width"]): row["seconds"] for row in rows if row["batch"] == batch}
    return {width: t / seconds["single", width] for (name, width), t in seconds.items() if name == method}


def growth(network: str) -> float:
    """What four times as many members cost, from 64 on, on a GPU."""
    steps = gpu.read()["steps"]
    return float(steps[network, 256, "float32"] / steps[network, 64, "float32"])


def of_float32(network: str, members: int, way: str) -> float:
    steps = gpu.read()["steps"]
    return float(steps[network, members, way] / steps[network, members, "float32"])


@cache
def daily(task: str, name: str) -> torch.Tensor:
    """Each day's negative log likelihood, a mean over the seeds, (days,)."""
    y = ledger.targets(task, 0, "test")
    if name in rivals.RIVALS[task]:
        said = [rivals.forecast(name)]
    else:
        said = [ledger.predictions(task, name, seed) for seed in range(ledger.TASKS[task].seeds)]
    return -torch.stack([ledger.mixed(ledger.log_likelihoods(each, y)) for each in said]).mean(0)


def beats_garch(name: str) -> bool:
    test = risk.diebold_mariano(daily("returns", name), daily("returns", "GARCH-t"))
    return test.difference < 0 and test.p_value < 0.05


def set_of_confidence(task: str, names: Iterable[str]) -> set[str]:
    losses = {name: daily(task, name) for name in names}
    p_values = risk.model_confidence_set(torch.stack(list(losses.values())), draws=1000)
    return {name for name, p in zip(losses, p_values, strict=True) if p > 0.1}


def trial_score(name: str, i: int) -> float:
    return ledger.trial(ledger.TASKS["returns"], name, i, ledger.trial_settings(name)[i])


def turned_over(source: str) -> float:
    """What a retraining of sixteen networks turns over, of what it does with one."""
    many, one = (studies.values("panel", "turnover", source=source, kind="deep", members=m).mean() for m in (16, 1))
    return float(many / one)


def hit_too_often(name: str) -> bool:
    y = ledger.targets("returns", 0, "test").double()
    said = [ledger.predictions("returns", name, seed) for seed in range(5)]
    hits = [y < -risk.value_at_risk(each, 0.95) for each in said]
    return all(risk.kupiec(each, 0.95).p_value < 0.05 and each.double().mean() > 0.05 for each in hits)


def answers(name: str, way: str, share: float) -> float:
    """Microseconds in which this share of answers is there."""
    return 1e6 * orders.read()[name, way].quantile(share).item()


COMPILED = ("AOTInductor", "AOTInductor, C++")
NETWORKS = ("deep ensemble", "deep, as single", "BatchEnsemble", "snapshot", "SWAG", "MIMO", "hyper")

# (chapter, a part of its prose, what the ledger says): text for the braces, or whether it is so.
CLAIMS: list[tuple[str, str, Callable[[], str | bool]]] = [
    ("cost_comparison", "Six methods and {} baselines", lambda: word(len(ledger.names()) - 6)),
    ("cost_comparison", "with the same {} trials", lambda: word(ledger.TRIALS)),
    ("cost_comparison", "all {} of the members", lambda: word(ledger.TASKS["digits"].members)),
    (
        "cost_comparison",
        "On digits a member of BatchEnsemble is the worst of all, and four of them have the second lowest loss",
        lambda: (
            max(losses("digits", 1), key=losses("digits", 1).__getitem__) == "BatchEnsemble"
            and sorted(losses("digits", 4), key=losses("digits", 4).__getitem__)[1] == "BatchEnsemble"
        ),
    ),
    (
        "cost_comparison",
        "On both tasks the first added member brings the most",
        lambda: all(map(first_brings_most, REAL)),
    ),
    (
        "cost_comparison",
        "On the data the best are within a {} of a nat",
        lambda: "twentieth" if min(mean("gap", name, "divergence") for name in TESTED) < 1 / 20 else "?",
    ),
    (
        "cost_comparison",
        "no method's band of 95% holds the truth nearly as often",
        lambda: max(mean("gap", name, "coverage", "gap") for name in TESTED) < 80,
    ),
    (
        "cost_comparison",
        "On diamonds it has the lowest loss of all",
        lambda: min(ledger.names(), key=lambda name: mean("diamonds", name)) == "deep ensemble",
    ),
    ("cost_comparison", "Every interval is of {} seeds", lambda: word(ledger.TASKS["digits"].seeds)),
    (
        "cost_comparison",
        "The wide network, SWAG and Laplace gain most",
        lambda: (
            set(sorted(TESTED, key=lambda n: calibrated(n).mean().item() - mean("digits", n))[:3])
            == {"wide", "SWAG", "Laplace"}
        ),
    ),
    (
        "cost_comparison",
        "No verdict changes",
        lambda: all(
            calibrated_verdict(n) == verdict("digits", n, "deep ensemble") for n in TESTED if n != "deep ensemble"
        ),
    ),
    ("cost_comparison", "From the pool of {} networks on digits", lambda: str(ledger.pool_size(ledger.pool("digits")))),
    (
        "cost_comparison",
        "measured times are more than one and a half times as long in the median",
        lambda: all(1.5 < layer_ratios(n).median() < 1.8 for n in ("deep ensemble", "BatchEnsemble")),
    ),
    (
        "cost_comparison",
        "a quarter of BatchEnsemble's are {} times as long or more",
        lambda: word(layer_ratios("BatchEnsemble").quantile(0.75).item()),
    ),
    ("cost_comparison", "it comes at a {} of the rows predicted", lambda: part(knee_ratios()[2048])),
    ("cost_comparison", "of the rows predicted, or a {},", lambda: part(knee_ratios()[8192])),
    (
        "cost_comparison",
        "reach less than half of the peak",
        lambda: max(map(peak_share, (1024, 2048, 4096, 8192))) < 1 / 2,
    ),
    (
        "cost_comparison",
        "off by up to a factor of five in one direction, and of ten in the other",
        lambda: 4 < max(knee_ratios().values()) < 6 and 8 < 1 / min(knee_ratios().values()) < 12,
    ),
    (
        "cost_comparison",
        "The two largest weights are read at half the speed of the next or less",
        lambda: (
            max(speed for _, speed in roofline.read()[0].bandwidths[-2:]) < 0.53 * roofline.read()[0].bandwidths[-3][1]
        ),
    ),
    (
        "cost_comparison",
        "At batch 1 calls are most of what most methods wait for on digits",
        lambda: {name for name in TESTED if name != "hyper" and calls_share(name, 1) < 0.5} == {"wide", "MC dropout"},
    ),
    (
        "cost_comparison",
        "four networks cost about three times one, and they cost more than that",
        lambda: cost("digits", "deep ensemble", "batch 1") > 3.3,
    ),
    (
        "cost_comparison",
        "BatchEnsemble, which has more calls, is slower than separate networks",
        lambda: cost("digits", "BatchEnsemble", "batch 1") > cost("digits", "deep ensemble", "batch 1"),
    ),
    (
        "cost_comparison",
        "and four members cost {} times, shared or not",
        lambda: (
            "four"
            if {word(cost("digits", n, "batch 256")) for n in ("deep ensemble", "BatchEnsemble")} == {"four"}
            else "?"
        ),
    ),
    ("cost_comparison", "(M = T = {})", lambda: str(ledger.TASKS["digits"].members)),
    (
        "cost_comparison",
        "the training time of one network buys nothing that can be told from one network",
        lambda: all(
            verdict("digits", n, "single") != "lower" for n in ledger.names() if cost("digits", n, "training") <= 1.1
        ),
    ),
    (
        "cost_comparison",
        "Four times that buys BatchEnsemble or four networks, which cannot be told from each other",
        lambda: (
            best("digits", "training", 4) == "BatchEnsemble"
            and verdict("digits", "BatchEnsemble", "deep ensemble") == "unresolved"
        ),
    ),
    (
        "cost_comparison",
        "eight times buys eight networks, which are better still",
        lambda: of_networks("digits", 8) < min(mean("digits", "BatchEnsemble"), mean("digits", "deep ensemble")),
    ),
    (
        "cost_comparison",
        "whose search is its training, costs more than that",
        lambda: cost("digits", "hyper", "training") > 8.8,
    ),
    (
        "cost_comparison",
        "four networks answer in about {} the time of one",
        lambda: {2: "twice"}[round(cost("diamonds", "deep ensemble", "batch 1"))],
    ),
    (
        "cost_comparison",
        "so the deep ensemble is the best from twice the latency on, and from twice the training time on",
        lambda: all(best("diamonds", key, n) == "deep ensemble" for key in ("batch 1", "training") for n in (2, 4, 8)),
    ),
    (
        "cost_comparison",
        "with less time to answer it is the best itself",
        lambda: best("diamonds", "batch 1", 1) == "single, temperature",
    ),
    (
        "cost_comparison",
        "In {} of ten cases it is within its interval of nothing",
        lambda: word(sum(abs(left.mean) <= left.half + 5e-4 for left in left_by_tuning())),
    ),
    (
        "cost_comparison",
        "in the others it is up to {} nats",
        lambda: f"{-min(left.mean for left in left_by_tuning()):.3f}",
    ),
    (
        "cost_comparison",
        "On rotated digits MC dropout and the hyperparameter ensemble",
        lambda: (
            set(sorted(TESTED, key=lambda n: mean("digits", n, "nll", "rotated"))[:2]) == {"MC dropout", "hyper"}
            and mean("digits", "deep ensemble", "nll", "rotated") > mean("digits", "single", "nll", "rotated")
        ),
    ),
    (
        "cost_comparison",
        "Letters are told from digits best by BatchEnsemble and the deep ensemble",
        lambda: (
            sorted(TESTED, key=lambda n: -mean("digits", n, "auroc", "letters"))[:2]
            == ["BatchEnsemble", "deep ensemble"]
        ),
    ),
    (
        "cost_comparison",
        "MIMO's bands miss in every seed, and BatchEnsemble and snapshots",
        lambda: (
            bool(ledger.values("diamonds", "MIMO", "nll", "heavy").min() > 10)
            and set(sorted(TESTED, key=lambda n: mean("diamonds", n, "nll", "heavy"))[:2])
            == {"BatchEnsemble", "snapshot"}
        ),
    ),
    (
        "cost_comparison",
        "is about {} times larger than on the processor of the ledger",
        lambda: {30: "thirty"}[10 * round(0.1 * 50e12 / 1e12 * 2 / roofline.read()[0].knee(1024))],
    ),
    (
        "finance",
        "four networks have a *higher* loss than one",
        lambda: verdict("returns", "deep ensemble", "single") == "higher",
    ),
    (
        "finance",
        "One network beats GARCH, by little; so do BatchEnsemble, MIMO and the hyperparameter ensemble",
        lambda: (
            {n for n in ("single", *NETWORKS) if beats_garch(n)}
            == {"single", "deep, as single", "BatchEnsemble", "MIMO", "hyper"}
        ),
    ),
    (
        "finance",
        "on five hundred days, decided on settings that cost twenty times as much",
        lambda: (
            15
            < ledger.compare("returns", "deep ensemble", "deep, as single").difference.mean
            / (trial_score("deep ensemble", 2) - trial_score("deep ensemble", 4))
            < 25
        ),
    ),
    (
        "finance",
        "BatchEnsemble took the same rate and decay as the single network",
        lambda: all(
            ledger.tune(ledger.TASKS["returns"], "BatchEnsemble")[key] == value
            for key, value in ledger.tune(ledger.TASKS["returns"], "single").items()
        ),
    ),
    (
        "finance",
        "HAR goes, and nothing else does",
        lambda: (
            set_of_confidence(
                "volatility", ["HAR", "GARCH", "single", *(n for n in NETWORKS if n != "deep, as single")]
            )
            == {"GARCH", "single", *NETWORKS} - {"deep, as single"}
        ),
    ),
    (
        "finance",
        "At 95% nearly every model is hit too often in every seed. FHS is not, nor the deep ensemble",
        lambda: {n for n in ("single", *NETWORKS) if not hit_too_often(n)} == {"deep ensemble"},
    ),
    (
        "finance",
        "With sixteen of them a retraining turns over about a third of what it does with one",
        lambda: all(0.27 < turned_over(source) < 0.37 for source in ("R2 0.002", "R2 0.01", "R2 0.05")),
    ),
    ("finance", "on the stocks less than half", lambda: 0.37 < turned_over("stocks") < 0.5),
    (
        "finance",
        "In eager PyTorch every method fits 100 microseconds in the median, and none in the tail",
        lambda: all(answers(n, "eager", 0.5) < 100 < answers(n, "eager", 0.99) for n in orders.METHODS),
    ),
    (
        "finance",
        "Compiled, every one of them fits in 99.9% of calls, and a compiled ensemble answers long before one network",
        lambda: all(
            answers(n, way, 0.999) < 100 and answers(n, way, 0.5) < answers("single", "eager", 0.5) / 10
            for n in orders.METHODS
            for way in COMPILED
        ),
    ),
    (
        "finance",
        "BatchEnsemble answers sooner than four separate networks, though later than one",
        lambda: all(
            answers("single", way, 0.5) < answers("BatchEnsemble", way, 0.5) < answers("deep ensemble", way, 0.5)
            for way in COMPILED
        ),
    ),
    (
        "finance",
        "MIMO is the quickest ensemble",
        lambda: all(min(orders.METHODS[2:], key=lambda n: answers(n, way, 0.5)) == "MIMO" for way in orders.WAYS),
    ),
    (
        "hyper_ensembles",
        "Training counts all twelve candidates; they are narrower than the single network, or it would be {}x.",
        lambda: str(ledger.TRIALS),
    ),
    (
        "batch_ensemble",
        "up to {}x for both",
        lambda: "4" if {round(max(layer(n, 256).values())) for n in ("deep ensemble", "BatchEnsemble")} == {4} else "?",
    ),
    (
        "batch_ensemble",
        "at width 64 it costs about three and a half times one layer, and four stacked networks cost less",
        lambda: (
            all(round(2 * layer("BatchEnsemble", batch)[64]) == 7 for batch in (1, 16))
            and all(layer("deep ensemble", batch)[64] < layer("BatchEnsemble", batch)[64] for batch in (1, 16))
        ),
    ),
    (
        "batch_ensemble",
        "does sharing pay much, as in the rows of width 1024 and 4096 at batch 1 and 16",
        lambda: all(
            layer("BatchEnsemble", batch)[width] < 0.75 * layer("deep ensemble", batch)[width]
            for batch in (1, 16)
            for width in (1024, 4096)
        ),
    ),
    ("introduction", "within {} nats", lambda: str(ledger.MARGIN)),
    (
        "introduction",
        "SWAG, said to need 1.2 times the memory, keeps {} vectors of weights",
        lambda: str(inspect.signature(effens.SWAG).parameters["rank"].default + 2),
    ),
    (
        "mimo",
        "Training at {}x is what an equal number of steps costs",
        lambda: f"{cost('digits', 'MIMO', 'training'):.0f}",
    ),
    ("scaling_out", "Its {} tuned methods on digits", lambda: word(len(tuned()))),
    ("scaling_out", "{} trials with two seeds each", lambda: word(ledger.TRIALS)),
    ("scaling_out", "then {} seeds with the best settings", lambda: word(ledger.TASKS["digits"].seeds)),
    (
        "scaling_out",
        "From ten members to eleven, a thousandth of a nat",
        lambda: 0.0005 < of_networks("digits", 10) - of_networks("digits", 11) < 0.0015,
    ),
    (
        "scaling_out",
        "no faster than {}, which have one trial each",
        lambda: str(len(tuned()) * ledger.TRIALS * len(ledger.TUNING_SEEDS)),
    ),
    (
        "scaling_out",
        "of the two longest here, BatchEnsemble's and the deep ensemble's",
        lambda: (
            set(sorted(tuned(), key=lambda name: ledger.costs("digits", name)["train_seconds"])[-2:])
            == {"BatchEnsemble", "deep ensemble"}
        ),
    ),
    (
        "scaling_out",
        "The convolutions are there between 64 members and 256; the perceptron of width 512 is not there yet",
        lambda: growth("convolutions") > 3.8 and growth("perceptron") < 3,
    ),
    (
        "scaling_out",
        "it pays at 256 members",
        lambda: all(of_float32(n, 256, "bfloat16") < 0.95 and of_float32(n, 16, "bfloat16") > 1 for n in gpu.NETWORKS),
    ),
    (
        "scaling_out",
        "Plain `torch.compile` brought nothing here",
        lambda: all(of_float32(n, 16, w) > 1 for n in gpu.NETWORKS for w in gpu.WAYS if "compiled" in w),
    ),
    ("swag", "Training at {}x is confirmed", lambda: f"{cost('digits', 'SWAG', 'training'):.0f}"),
    ("swag", "The memory is not 1.2x", lambda: cost("digits", "SWAG", "memory") > 2),
]

TABLE = "a cell of the original table, which the chapter tests"
PUBLISHED = "a published figure, with its source"
LEVEL = "a level that was chosen"
# chapter: {a part of its prose: why its numbers are not of the ledger}
KNOWN: dict[str, dict[str, str]] = {
    "introduction": {
        "how wide is the 95% band": LEVEL,
        "with 95% intervals": LEVEL,
        "Intervals are 95% t intervals": LEVEL,
        "said to cost 1.1 times": TABLE,
        "SWAG, said to need 1.2 times the memory": TABLE,
        "the probabilities 0.9 and 0.1": "an exercise, which the solution computes",
        "| BatchEnsemble | 1.1× | 1.1× | 1.05× | good |": TABLE,
        "| Snapshot ensemble | 1× | M× | M× | moderate |": TABLE,
        "| SWAG | 1.1× | T× | 1.2× | good |": TABLE,
        "| MIMO | 1.2× | 1× | 1.1× | moderate |": TABLE,
    },
    "deep_ensembles": {
        "The shade holds 90% of the random subsets": LEVEL,
        "at 1x the memory and M times the time": "one member's memory is one network's, by definition",
    },
    "batch_ensemble": {
        "training 1.1x, inference 1.1x, memory 1.05x": TABLE,
        "Even there it is not 1.1x": TABLE,
        '"1.05x" is a statement': TABLE,
        "36.6 million parameters against 36.5, that is 1.002x": PUBLISHED,
        "0.319 ms an image against 0.079 on its accelerators: 4.0x": PUBLISHED,
        "5.4 hours against 1.2": PUBLISHED,
        "cost 1x a step, and about 1.5 times the epochs, in the paper": PUBLISHED,
        "more than 10%": LEVEL,
        "above 10% for layers": "arithmetic: 3 / 30",
    },
    "hyper_ensembles": {"83.0% on CIFAR-100 with four members, against 82.7%": PUBLISHED},
    "mimo": {"training 1.2x, inference 1x, memory 1.1x": TABLE, "*1.2x* would be": TABLE},
    "snapshot_ensembles": {"training 1x, inference Mx, memory Mx": TABLE},
    "swag": {
        "only at 0.003 did no training diverge": "a setting of a cell, and why it was chosen",
        "training 1.1x, inference as many times as samples are drawn, memory 1.2x": TABLE,
        "36.5 million weights": PUBLISHED,
    },
    "finance": {
        "inside the margin of 0.005 nats": "the ledger's margin, which another claim compares",
        "A p-value above 0.1 stays": LEVEL,
        "with a probability of 1% or 5%": LEVEL,
        "the losses of the worst 2.5%": LEVEL,
        "each test rejects at the 5% level": LEVEL,
        "1% and 5% of days were promised. At 95%": LEVEL,
        "and at 99% it fails": LEVEL,
        "At 99% one network": LEVEL,
        "At 95% nearly": LEVEL,
        "meant to be 5%, are not 5% either": LEVEL,
        "Coverage is of the 95% band": LEVEL,
        "At 95% the bell": LEVEL,
        "The chance of a hit is 1% on all days, and 15%": "settings of the cell below it",
        "to a rank correlation of 0.95": "an exercise",
        "Kupiec's test at 99% rejects": LEVEL,
    },
    "cost_comparison": {
        "below 0.05 a difference": LEVEL,
        "the claim of 1.1x": TABLE,
    },
    "speed": {"with 95% confidence": LEVEL},
}


def plain(text: str) -> str:
    """The words of Markdown: no code, formulas, addresses or keys of the bibliography."""
    text = re.sub(r"\{cite(:\w)?\}`[^`]*`|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\]\([^)]*\)", " ", text, flags=re.DOTALL)
    return re.sub(r"\s+", " ", text)


def prose(notebook: dict[str, Any]) -> str:
    return plain("\n\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown"))


def printed(notebook: dict[str, Any]) -> set[str]:
    """Every number that the chapter's cells print, as text, with x or % where it has one and without."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    text = "\n".join("".join(output.get("text", output.get("data", {}).get("text/plain", ""))) for output in outputs)
    found = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)(x\b|\s?%)?", text)
    return {number for number, _ in found if "." in number} | {number + unit.strip() for number, unit in found}


def spans(text: str, parts: Iterable[str]) -> list[range]:
    return [range(at.start(), at.end()) for part in parts for at in re.finditer(re.escape(plain(part)), text)]


def unexplained(text: str, known: Iterable[str], numbers: set[str]) -> list[str]:
    """The numbers of a text that no known part holds, and that are not among those printed."""
    covered = spans(text, known)
    found = [match for match in NUMBER.finditer(text) if not any(match.start() in span for span in covered)]
    lost = [m for m in found if m[0].replace(" ", "") not in numbers and m[0].rstrip("x% ") not in numbers - WHOLE]
    return [text[max(0, m.start() - 40) : m.end() + 20] for m in lost]


WHOLE = {str(i) for i in range(1000)}  # that a 4 is printed somewhere says nothing about 4x


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / f"chapters/{name}.ipynb").read_text("utf-8"))
    return found


def claimed(name: str) -> list[str]:
    return [
        text if isinstance(value := claim(), bool) else text.format(value) for n, text, claim in CLAIMS if n == name
    ]


@pytest.mark.parametrize(("name", "text", "claim"), CLAIMS, ids=[f"{name}: {text[:50]}" for name, text, _ in CLAIMS])
def test_the_prose_says_what_the_ledger_says(name: str, text: str, claim: Callable[[], str | bool]) -> None:
    value = claim()
    assert value is not False, f"{name} says {text!r}, and the ledger does not"
    assert plain(text if value is True else text.format(value)) in prose(read(name))


@pytest.mark.parametrize("name", [chapter.stem for chapter in chapters()])
def test_every_number_in_prose_comes_from_somewhere(name: str) -> None:
    notebook = read(name)
    assert unexplained(prose(notebook), [*claimed(name), *KNOWN.get(name, {})], printed(notebook)) == []


def test_what_is_known_is_said() -> None:
    stale = [part for name, parts in KNOWN.items() for part in parts if plain(part) not in prose(read(name))]
    assert stale == []


def test_another_number_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Four cost 3.9x here, or 41% of it; others 0.147."
    assert unexplained(text, ["cost 3.9x"], {"41%", "0.147"}) == []
    assert len(unexplained(text.replace("3.9x", "3.8x"), ["cost 3.9x"], {"41%", "0.147"})) == 1
    assert len(unexplained(text, ["cost 3.9x"], {"41", "0.148"})) == 2
    facts = ledger.relative_costs
    monkeypatch.setattr(ledger, "relative_costs", lambda *of: {key: 2 * value for key, value in facts(*of).items()})
    claim = next(claim for _, text, claim in CLAIMS if text.startswith("and four members cost"))
    assert claim() == "?"
