"""Networks with a skewed head: one and four, trained as the benchmark trains them with a symmetric one.

``python -m effens_book.finance.heads`` trains them on the returns of the S&P 500, with the settings of the deep
ensemble, and keeps what they said of each day; it takes some minutes.
"""

import io
import json
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from effens.ensembles.deep import DeepEnsemble
from effens.storage import write_whole
from effens.training import predict
from effens_book.benchmark import RESULTS, TASKS, shipped
from effens_book.benchmark.predictions import log_mean
from effens_book.benchmark.run import provenance
from effens_book.benchmark.tasks import Task
from effens_book.data import markets
from effens_book.finance.skewed import SkewedT, SkewT
from effens_book.nets import mlp

MODELS = {"single": 1, "deep ensemble": 4}
FIELDS = ("df", "skew", "loc", "scale")


def head(task: Task) -> Task:
    """Return a market task whose networks have the skewed head."""

    def make(width: int, dropout: float = 0.0) -> torch.nn.Module:
        return mlp(len(markets.FEATURES), 4, width=width, dropout=dropout)

    return replace(task, likelihood=SkewedT(), make=make)


def run() -> None:
    """Train both, with every seed and in every year, and keep what they said, unless that is kept already."""
    path = RESULTS / "skewed.npz"
    if path.exists():
        return
    task = head(TASKS["returns"])
    settings = shipped().settings("returns", "deep ensemble")
    y = task.load(0)["test"][1]
    assert task.refits is not None
    assert y is not None
    arrays: dict[str, Any] = {"facts": np.array(json.dumps({"settings": settings, **provenance()}))}
    for name, members in MODELS.items():
        losses = []
        for seed in tqdm(range(task.seeds), desc=name):
            parts = []
            for sets in task.refits():
                x, target = sets["train"]
                assert target is not None
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    ensemble = task.fit(DeepEnsemble(task.make_net, members), (x, target), settings, seed)
                parts.append(predict(ensemble, sets["test"][0], likelihood=task.likelihood))
            whole = [torch.cat([getattr(part, field) for part in parts], 1) for field in FIELDS]
            losses.append(-log_mean(SkewT(*whole).log_prob(y)).float())
            if seed == 0:
                arrays[name] = torch.stack(whole).half().numpy()
        arrays[f"{name} nll"] = torch.stack(losses).numpy()
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_whole(path, content.getvalue())
    read.cache_clear()


@cache
def read() -> dict[str, Tensor]:
    """Return what is kept: by model the first seed's parameters, (4, members, days), and losses, (seeds, days).

    Raises:
        FileNotFoundError: the networks were not trained.
    """
    path = RESULTS / "skewed.npz"
    if not path.exists():
        raise FileNotFoundError("results must hold the skewed heads, got none: run python -m effens_book.finance.heads")
    with np.load(path, allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files if key != "facts"}


def forecast(name: str) -> SkewT:
    """Return what ``"single"`` or ``"deep ensemble"`` said with the first seed, of batch shape (members, days)."""
    return SkewT(*read()[name].float())


if __name__ == "__main__":
    torch.set_num_threads(1)
    run()
