"""Claims of papers about ensembles: each is a grid of settings on which it would have to show."""

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn

from effens import scores
from effens.ensembles.base import Ensemble, MakeNet
from effens.ensembles.batch import BatchEnsemble
from effens.ensembles.deep import DeepEnsemble
from effens.ensembles.mimo import MIMO
from effens.ensembles.snapshot import SnapshotEnsemble
from effens.training import predict
from effens_book.benchmark import TASKS, Task
from effens_book.benchmark.methods import train_one, width_of_flops, width_of_weights
from effens_book.benchmark.predictions import score, take_members
from effens_book.benchmark.tasks import TUNING_SEEDS, Sets, Settings, flight_task
from effens_book.studies import running
from effens_book.studies.running import Row, study

THREE = ["digits", "diamonds", "airtime"]


@study(
    4,
    {"task": THREE, "start": ["independent"], "members": [1, 4, 8]},
    {"task": THREE, "start": ["signs", "normal", 0.1], "members": [4, 8]},
)
def starts(task: str, start: str | float, members: int, seed: int) -> list[Row]:
    """Start BatchEnsemble's vectors in three ways, beside as many independent networks.

    Is it a single model? (Zamyatin et al., 2026, arXiv:2601.16936.) All is as tuned for four members.
    """
    of = TASKS[task]
    if start == "independent":
        settings = running.tuned_settings("single" if members == 1 else "deep ensemble", task)
        return [scores_and_alarms(of, running.train(of, lambda: DeepEnsemble(of.make_net, members), settings, seed))]
    settings = running.tuned_settings("BatchEnsemble", task)

    def make() -> Ensemble:
        return BatchEnsemble(of.make_net, members, init=start, fast_lr=settings["fast_lr"], norms="own")

    return [scores_and_alarms(of, running.train(of, make, settings, seed))]


@study(4, {"task": ["fashion", "airtime"], "members": [1, 4, 8], "budget": [1, 2, 4]})
def newest(task: str, members: int, budget: int, seed: int) -> list[Row]:
    """Train snapshots for the budget of one, two or four networks; a row for the last snapshot, the last two, ...

    One snapshot is the network itself, with its own tuned settings.
    """
    of = replace(TASKS[task], epochs=budget * TASKS[task].epochs)
    settings = running.tuned_settings("single" if members == 1 else "snapshot", task)
    ensemble = running.train(of, lambda: SnapshotEnsemble(of.make_net, members), settings, seed)
    x, y = of.load(seed)["test"]
    assert y is not None
    said = predict(ensemble, x, likelihood=of.likelihood)
    sizes = [last for last in (1, 2, 4, 8) if last <= members]
    return [{"last": last, **score(take_members(said, torch.arange(members - last, members)), y)} for last in sizes]


@study(
    4,
    {"budget": [1, 2], "task": ["airtime", "fashion"], "members": [1, 8]},
    {"budget": [4], "task": ["airtime"], "members": [1, 8]},
)
def longer(budget: int, task: str, members: int, seed: int) -> list[Row]:
    """Train one network, or eight snapshots, for the budget of one, two or four, with a weight decay for each budget.

    A longer training overfits more, so that it wants more weight decay. All else is as tuned for the usual budget. Both
    choose among the same decays: what was tuned for either, their geometric mean, and three times the larger.
    """
    of, settings = longer_settings(budget, task, members)
    ensemble = running.train(of, lambda: SnapshotEnsemble(of.make_net, members), settings, seed)
    return [{"weight_decay": settings["weight_decay"], **running.score_ensemble(of, ensemble, seed)}]


@cache
def longer_settings(budget: int, task: str, members: int) -> tuple[Task, Settings]:
    """Return the task with that budget, and settings whose weight decay has the lowest validation loss."""
    of = replace(TASKS[task], epochs=budget * TASKS[task].epochs)
    one, snapshot = (running.tuned_settings(name, task) for name in ("single", "snapshot"))
    low, high = sorted((one["weight_decay"], snapshot["weight_decay"]))
    decays = (low, math.sqrt(low * high), high, 3 * high)
    points = [{**(one if members == 1 else snapshot), "weight_decay": decay} for decay in decays]
    losses = []
    for settings in points:
        ensemble = running.train(of, lambda: SnapshotEnsemble(of.make_net, members), settings, TUNING_SEEDS[0])
        losses.append(running.score_ensemble(of, ensemble, TUNING_SEEDS[0], "val")["nll"])
    return of, points[losses.index(min(losses))]


@study(4, {"times": [0.25, 0.5, 1.0], "repeats": [1, 4]})
def repetition(times: float, repeats: int, seed: int) -> list[Row]:
    """Repeat each example of a batch on fashion with MIMO, as published, at the tuned learning rate and below it.

    A step reads as many rows as without: its batch holds a quarter of the examples, each of them four times. So there
    are four times the steps, at four times the cost.
    """
    of = replace(TASKS["fashion"], batch_size=TASKS["fashion"].batch_size // repeats)
    tuned = running.tuned_settings("MIMO", "fashion")
    settings = {**tuned, "lr": times * tuned["lr"]}

    def make() -> Ensemble:
        return MIMO(of.make_net, int(settings["slots"]), share=1 - settings["own"], repeats=repeats)

    try:
        ensemble = running.train(of, make, settings, seed)
        val = running.score_ensemble(of, ensemble, seed, "val")["nll"]
        return [{"val": val, **running.score_ensemble(of, ensemble, seed)}]
    except FloatingPointError:
        return [{"diverged": 1}]


@study(8, {"method": ["single", "deep ensemble", "BatchEnsemble"]})
def delay(method: str, seed: int) -> list[Row]:
    """Predict by how much flights arrive late, with what was tuned for the time in the air.

    Little of a delay can be known at departure, so that little is left for an ensemble to improve.
    """
    of = replace(flight_task("delay"), pool=4)
    ensemble, _ = train_one(of, method, running.tuned_settings(method, "airtime"), seed)
    return [running.score_ensemble(of, ensemble, seed)]


class Colluding(DeepEnsemble):
    """Networks that are trained on the loss of their average, on their own losses, or on something between.

    Args:
        joint: the weight of the average's loss: 0 is a deep ensemble whose members see the same batches.
    """

    def __init__(self, make_net: MakeNet, members: int, joint: float) -> None:
        super().__init__(make_net, members)
        self.joint = joint

    def batches(self, n: int, batch_size: int, generator: torch.Generator | None = None) -> Iterable[Tensor]:
        """Give all members the same examples, because an average needs them."""
        shuffle = torch.randperm(n, generator=generator)
        yield from shuffle.expand(self.members, n).split(batch_size, dim=1)

    def reduce(self, losses: Tensor) -> Tensor:
        """Weigh the two losses of a batch; the average's likelihood is the mean of the members' likelihoods."""
        of_mean = math.log(self.members) - (-losses).logsumexp(0)
        return self.members * ((1 - self.joint) * losses.mean() + self.joint * of_mean.mean())


@study(5, {"task": ["digits", "airtime"], "joint": [0.0, 0.25, 0.5, 0.75, 0.9, 1.0]})
def collusion(task: str, joint: float, seed: int) -> list[Row]:
    """Train four networks on the loss of their average, more or less (Jeffares et al., 2023, arXiv:2301.11323)."""
    of = TASKS[task]
    settings = running.tuned_settings("deep ensemble", task)
    ensemble = running.train(of, lambda: Colluding(of.make_net, of.members, joint), settings, seed)
    fitted = running.score_ensemble(of, ensemble, seed, "train")
    return [
        {
            **running.score_ensemble(of, ensemble, seed),
            "fit": fitted["nll"],
            "fit_of_members": fitted["member_nll"],
            "fit_gain": fitted["diversity_gain"],
        }
    ]


SPLIT_DECAYS = (0.03, 0.3, 3.0)
SPLIT_TIMES = (0.125, 0.25, 0.5, 1.0, 2.0)  # of the learning rate that was tuned for one network
COUNTS = [1, 2, 4, 8, 16]


@study(
    4,
    {"task": ["airtime"], "equal": ["FLOPs"], "networks": COUNTS, "examples": [2500, 10000, 40000]},
    {"task": ["digits"], "equal": ["FLOPs", "weights"], "networks": COUNTS, "examples": [125, 500, 1000]},
)
def split(task: str, equal: str, networks: int, examples: int, seed: int) -> list[Row]:
    """Divide the FLOPs, or weights, of four networks among 1 to 16, which differ in width, and train on fewer examples.

    Epochs grow with the square root of what the examples shrink. The learning rate and the weight decay are chosen for
    each point on validation data of one seed, because a wide network wants other settings than a narrow one.
    """
    of = fewer(task, equal, examples, networks)
    settings = split_settings(task, equal, examples, networks)
    ensemble = running.train(of, lambda: DeepEnsemble(of.make_net, networks), settings, seed)
    weights = networks * sum(p.numel() for p in of.make_net().parameters())
    return [{"units": of.width, "weights": weights, **settings, **running.score_ensemble(of, ensemble, seed)}]


def fewer(task: str, equal: str, examples: int, networks: int) -> Task:
    """Return a task with fewer examples, and networks that share the FLOPs, or the weights, of the ensemble."""
    of = TASKS[task]
    x, y = of.load(0)["train"]
    assert y is not None
    keep = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:examples]

    def load(seed: int) -> Sets:
        return {**of.load(seed), "train": (x[keep], y[keep])}

    width_of = {"FLOPs": width_of_flops, "weights": width_of_weights}[equal]
    epochs = round(of.epochs * math.sqrt(len(y) / examples))
    return replace(of, load=load, epochs=epochs, width=width_of(task, of.members / networks))


@cache
def split_settings(task: str, equal: str, examples: int, networks: int) -> Settings:
    """Return the learning rate with the lowest validation loss, and then the best weight decay at it."""
    of, losses = fewer(task, equal, examples, networks), dict[tuple[float, float], float]()
    tuned, middle = running.tuned_settings("single", task)["lr"], SPLIT_DECAYS[1]

    def best(points: Iterable[tuple[float, float]]) -> tuple[float, float]:
        for lr, decay in points:
            try:
                settings = {"lr": lr, "weight_decay": decay}
                ensemble = running.train(of, lambda: DeepEnsemble(of.make_net, networks), settings, TUNING_SEEDS[0])
                losses[lr, decay] = running.score_ensemble(of, ensemble, TUNING_SEEDS[0], "val")["nll"]
            except FloatingPointError:
                continue
        return min(losses, key=lambda point: losses[point])

    lr, _ = best((times * tuned, middle) for times in SPLIT_TIMES)
    lr, decay = best((lr, decay) for decay in SPLIT_DECAYS if decay != middle)
    return {"lr": lr, "weight_decay": decay}


@study(
    5,
    {"task": ["gap"], "units": [16, 64, 256], "gain": [0.5, 1.0, 2.0]},
    {"task": ["digits"], "units": [4, 8, 16, 32, 64], "gain": [1.0]},
    {"task": ["digits"], "units": [16], "gain": [0.5, 2.0]},
)
def widths(task: str, units: int, gain: float, seed: int) -> list[Row]:
    """Make the networks of a deep ensemble wider, or multiply the weights that they start from.

    Does their disagreement shrink, and does it still rank what is unknown above what is known? (Kirsch, 2024,
    arXiv:2409.02628; Young, 2026, arXiv:2606.12646.)
    """
    of = TASKS[task]

    def make() -> nn.Module:
        network = of.make(units)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(gain)
        return network

    settings = running.tuned_settings("deep ensemble", task)
    ensemble = running.train(of, lambda: DeepEnsemble(make, of.members), settings, seed)
    row = scores_and_alarms(of, ensemble, seed)
    if "gap" in of.load(seed):
        inside = running.score_ensemble(of, ensemble, seed, "gap")
        row |= {f"{key}@gap": inside[key] for key in ("nll", "coverage", "spread")}
    return [row]


def scores_and_alarms(of: Task, ensemble: Ensemble, seed: int = 0) -> Row:
    """Score on test data; where there are letters, also say how well they are told from it, and by how much.

    ``mi`` and ``mi@letters`` are mutual information in nats; ``auroc`` and ``auroc_of_entropy`` are in percent.
    """
    row = running.score_ensemble(of, ensemble, seed)
    sets = of.load(seed)
    if "letters" not in sets:
        return row
    known, unknown = (predict(ensemble, sets[key][0], likelihood=of.likelihood) for key in ("test", "letters"))
    inside, outside = scores.mutual_information(known), scores.mutual_information(unknown)
    row |= {"mi": float(inside.mean()), "mi@letters": float(outside.mean())}
    row["auroc"] = 100 * float(scores.auroc(inside, outside))
    row["auroc_of_entropy"] = 100 * float(scores.auroc(scores.total_entropy(known), scores.total_entropy(unknown)))
    return row


CORRECTED = ["single", "deep ensemble", "LoRA ensemble", "BatchEnsemble, spread"]
PROMISE = 0.85  # how many of the automatic labels have to be right


def threshold(probs: Tensor, y: Tensor) -> float:
    """Return the lowest largest probability from which on as many labels are right as was promised."""
    sure, label = probs.mean(0).max(1)
    order = sure.argsort(descending=True)
    right = (label == y)[order].double().cumsum(0) / torch.arange(1, len(y) + 1)
    return float(sure[order][int((right >= PROMISE).nonzero().max())])


@study(5, {"method": CORRECTED})
def corrected(method: str, seed: int) -> list[Row]:
    """Fine-tune a pretrained network once more, correct the confidence on validation data, and label automatically."""
    of = TASKS["definitions"]
    ensemble, sets = train_one(of, method, running.tuned_settings(method, of.name), seed)
    said = {split: predict(ensemble, sets[split][0]) for split in ("val", "test", "branches", "typos")}
    y_val, y_test = sets["val"][1], sets["test"][1]
    assert y_val is not None
    assert y_test is not None
    heat = scores.temperature(said["val"], y_val)
    row: Row = {"temperature": float(heat)}
    for split in ("test", "branches", "typos"):
        y = sets[split][1]
        assert y is not None
        found, after = score(said[split], y), score(scores.temper(said[split], heat), y)
        end = "" if split == "test" else f"@{split}"
        row |= {f"{key}{end}": found[key] for key in ("nll", "member_nll", "diversity_gain", "ece")}
        row |= {f"corrected {key}{end}": after[key] for key in ("nll", "ece")}
    probs = scores.temper(said["test"], heat)[0]
    each = -probs[torch.arange(len(y_test)), y_test].log()
    row["corrected losses"] = [round(loss, 3) for loss in each.tolist()]  # of each test text
    sure, label = said["test"].mean(0).max(1)
    right, kept = label == y_test, sure >= threshold(said["val"], y_val)
    entropy = scores.total_entropy(said["test"])
    row["auroc of errors"] = 100 * float(scores.auroc(entropy[right], entropy[~right]))
    row |= {"labelled": 100 * float(kept.float().mean()), "right": 100 * float(right[kept].float().mean())}
    return [row]
