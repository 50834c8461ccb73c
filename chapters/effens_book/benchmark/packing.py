"""How results are kept: one file for each task and method, with the predictions of all seeds.

Probabilities of classes are kept in 8 bits, as the square root of each in steps of 1/255: wrong by at most 0.004. The
probability that each member gave to the right label is kept exactly, and log likelihoods of examples in steps of 1/4096
nat. Parameters of distributions are kept as they were found, in half precision.
"""

import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from effens.likelihoods import Categorical, Likelihood
from effens.storage import write_whole
from effens_book.benchmark.predictions import from_half, take_members

Array = NDArray[Any]
Targets = Callable[[int, str], Tensor | None]
STEPS = 255  # of the square root of a probability
PER_NAT = 4096  # steps of a log likelihood


@dataclass(frozen=True)
class Row:
    """What a method did on a task.

    Attributes:
        facts: by seed: settings, versions, device, date.
        predictions: by (set, seed): of all members.
        logs: by (set, seed): of a large task, the log likelihood of each example, (n,), of the mean of the members.
    """

    facts: dict[int, dict[str, Any]]
    predictions: dict[tuple[str, int], Any]
    logs: dict[tuple[str, int], Tensor]


def encode(numbers: Array, y: Tensor | None, likelihood: Likelihood) -> dict[str, Array]:
    """Return the arrays that are kept of predictions of one set.

    Args:
        numbers: what `predictions.to_half` gave for all members of all seeds, (members, n, classes or parameters).
        y: the right answer of each example to each of them, (members, n), if there are any.
        likelihood: what the numbers mean.
    """
    if not isinstance(likelihood, Categorical):
        changes = np.diff(numbers.view(np.uint16).transpose(2, 1, 0), axis=-1, prepend=np.uint16(0))
        return {"bits": planes(changes)}  # from member to member, for they are alike
    probs = from_half(torch.from_numpy(numbers).float(), likelihood)
    codes = (STEPS * probs.sqrt()).round().byte()
    if y is None:
        return {"codes": codes.permute(1, 2, 0).numpy()}
    labels = y.long()[..., None]
    right = probs.gather(2, labels)
    return {"codes": codes.scatter(2, labels, 0).permute(1, 2, 0).numpy(), "right": planes(right[..., 0].numpy())}


def decode(kept: Mapping[str, Array], y: Tensor | None, likelihood: Likelihood) -> Any:
    """Return the prediction of all members of all seeds that `encode` made arrays of."""
    if "bits" in kept:
        numbers = np.cumsum(whole(kept["bits"], np.uint16), axis=-1, dtype=np.uint16).transpose(2, 1, 0)
        return from_half(torch.from_numpy(np.ascontiguousarray(numbers).view(np.float16)).float(), likelihood)
    probs = (torch.from_numpy(kept["codes"]).permute(2, 0, 1).float() / STEPS).square() + 1e-12
    if y is None:
        return probs / probs.sum(-1, keepdim=True)
    labels = y.long()[..., None]
    right = torch.from_numpy(whole(kept["right"], np.float32))[..., None]
    others = probs.scatter(2, labels, 0)
    return (others * ((1 - right) / others.sum(-1, keepdim=True))).scatter(2, labels, right)


def planes(array: Array) -> Array:
    """Return the first bytes of all numbers, then their second bytes, ...: so they are compressed better."""
    flat = np.ascontiguousarray(array)[..., None].view(np.uint8)
    return np.moveaxis(flat, -1, 0)


def whole(bytes_: Array, kind: Any) -> Array:
    """Return the numbers of these bytes: the inverse of `planes`."""
    numbers: Array = np.ascontiguousarray(np.moveaxis(bytes_, 0, -1)).view(kind)[..., 0]
    return numbers


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write a file that `numpy.load` reads, compressed as LZMA does, whole or not at all."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_LZMA) as archive:
        for name, array in arrays.items():
            part = io.BytesIO()
            np.lib.format.write_array(part, np.asarray(array, order="C"), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), part.getvalue(), zipfile.ZIP_LZMA)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content.getvalue())


def write_row(path: Path, runs: Sequence[Path], digest: str, targets: Targets, likelihood: Likelihood) -> None:
    """Pack the files of single runs, one a seed, into a method's row of a task.

    Args:
        path: the row's file.
        runs: the files that `run.run` wrote.
        digest: of the task.
        targets: (seed, set) to the right answers (n,), or None where there are none.
        likelihood: the task's.
    """
    facts, found = [], list[dict[str, Array]]()
    for file in runs:
        with np.load(file, allow_pickle=False) as run:
            facts.append(json.loads(str(run["facts"])))
            found.append({key: run[key] for key in run.files if key != "facts"})
    sets = [key for key in found[0] if not key.endswith(" logs")]
    for fact, run in zip(facts, found, strict=True):
        fact["members"] = fact.get("members") or len(run[sets[0]])
    arrays = {}
    for key in [key for key in found[0] if key not in sets]:
        numbers = np.concatenate([run[key] for run in found])
        arrays[key] = planes((PER_NAT * numbers).round().astype(np.int32) if key.endswith(" logs") else numbers)
    for key in sets:
        having = [i for i, run in enumerate(found) if key in run]  # of a large task only the first seed
        numbers = np.concatenate([found[i][key] for i in having])
        kept = encode(numbers, answers([facts[i] for i in having], key, targets), likelihood)
        arrays |= {f"{key} {part}": array for part, array in kept.items()}
    same = {key: facts[0][key] for key in ("task", "method")}
    seeds = [{key: value for key, value in fact.items() if key not in same} for fact in facts]
    arrays["facts"] = np.array(json.dumps({**same, "digest": digest, "seeds": seeds}))
    write_arrays(path, arrays)


def read_row(path: Path, digest: str, targets: Targets, likelihood: Likelihood) -> Row:
    """Read what `write_row` wrote.

    Raises:
        ValueError: it was made for a task of another definition.
    """
    with np.load(path, allow_pickle=False) as file:
        facts = json.loads(str(file["facts"]))
        arrays = {key: file[key] for key in file.files if key != "facts"}
    if facts["digest"] != digest:
        task, row = facts["task"], facts["method"]
        raise ValueError(f"results must be of the task {task} as it is defined now, got {row} of another definition")
    seeds = [(fact["seed"], fact["members"]) for fact in facts["seeds"]]
    kept: dict[str, dict[str, Array]] = {}
    for key, array in arrays.items():
        name, _, part = key.rpartition(" ")
        kept.setdefault(name, {})[part] = array
    row = Row({fact["seed"]: fact for fact in facts["seeds"]}, {}, {})
    for name, parts in kept.items():
        if "logs" in parts:
            steps = torch.from_numpy(whole(parts.pop("logs"), np.int32)).double() / PER_NAT
            row.logs.update(
                {(name, seed): own for (seed, _), own in zip(seeds, steps.float().view(len(seeds), -1), strict=True)}
            )
        if parts:
            having = facts["seeds"][:1] if "scores" in facts["seeds"][0] else facts["seeds"]
            everyone = decode(parts, answers(having, name, targets), likelihood)
            at = 0
            for seed, members in seeds[: len(having)]:
                rows = torch.tensor(row.facts[seed].get("rows", range(members))) + at
                row.predictions[name, seed] = take_members(everyone, rows)  # one that is chosen three times is three
                at += members
    return row


def answers(facts: Sequence[Mapping[str, Any]], key: str, targets: Targets) -> Tensor | None:
    """Return the right answers to every member of every seed, (members, n), or None."""
    found = [targets(fact["seed"], key) for fact in facts]
    rows = [y.expand(fact["members"], len(y)) for fact, y in zip(facts, found, strict=True) if y is not None]
    return torch.cat(rows) if rows else None
