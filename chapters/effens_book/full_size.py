"""Every method at full size: the 60,000 images of Fashion-MNIST, 28 x 28 pixels, and a network four times as wide.

That wants a GPU. Where CUDA is found, `show` trains; elsewhere it shows what a GPU found before. The images are
torchvision's copy, or the four files in the folder that ``EFFENS_DATA`` names.

``python -m effens_book.full_size`` trains every method on the GPU at hand and keeps what it found among the results.
"""

import gzip
import json
import os
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from effens.training import predict
from effens_book.benchmark import RESULTS, shipped
from effens_book.benchmark.methods import METHODS
from effens_book.benchmark.predictions import score
from effens_book.benchmark.run import provenance, write_json
from effens_book.benchmark.tasks import TASKS, Sets
from effens_book.tables import Table

NAMES = ("single", "deep ensemble", "BatchEnsemble", "snapshot", "SWAG", "MIMO", "hyper")
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
WIDTH, VALIDATION = 64, 5000  # channels; images of the training set on which a hyperparameter ensemble chooses


@cache
def images() -> Sets:
    """Load the images, in [0, 1], to train, choose and test on.

    Raises:
        FileNotFoundError: they are neither in the folder nor to be had from torchvision.
    """
    folder = os.environ.get("EFFENS_DATA")
    if folder is None:
        try:
            from torchvision.datasets import FashionMNIST
        except ImportError as error:
            raise FileNotFoundError(f"EFFENS_DATA must name a folder that holds {', '.join(FILES)}") from error
        folder = str(Path.home() / ".cache/effens")
        for train in (True, False):
            FashionMNIST(folder, train=train, download=True)
        folder += "/FashionMNIST/raw"
    x, y, x_test, y_test = (read(Path(folder) / name) for name in FILES)
    x, x_test = (part[:, None].float() / 255 for part in (x, x_test))
    return {
        "train": (x[VALIDATION:], y[VALIDATION:].long()),
        "val": (x[:VALIDATION], y[:VALIDATION].long()),
        "test": (x_test, y_test.long()),
    }


def read(path: Path) -> Tensor:
    """Read a file of MNIST's format, packed by gzip or not.

    Raises:
        FileNotFoundError: there is neither.
    """
    packed = path.with_suffix(".gz")
    if not path.exists() and not packed.exists():
        raise FileNotFoundError(f"EFFENS_DATA must name a folder that holds {path.name}, got {path.parent} without it")
    content = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
    axes = content[3]
    shape = np.frombuffer(content, ">i4", axes, offset=4)
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape).copy())


def train(name: str, device: str = "cuda", share: float = 1.0) -> dict[str, Any]:
    """Train a method once, with the settings that were tuned on smaller images, and return what was found.

    They are those of fashion, where the method has its row there, and else those of digits.

    Args:
        name: of the method.
        device: to train on.
        share: of the images, and of the width.
    """
    sets = {
        key: (x[: round(share * len(x))], y if y is None else y[: round(share * len(x))])
        for key, (x, y) in images().items()
    }
    task = replace(TASKS["fashion"], width=max(4, round(share * WIDTH)), load=lambda seed: sets, device=device)
    x, y = sets["train"]
    assert y is not None
    smaller = "fashion" if shipped().path("fashion", name).exists() else "digits"
    torch.manual_seed(0)
    began = time.perf_counter()
    ensemble = METHODS[name].train(task, (x, y), shipped().settings(smaller, name), 0)
    seconds = time.perf_counter() - began
    found = score(predict(ensemble, sets["test"][0].to(device)).cpu(), sets["test"][1])  # type: ignore[arg-type]
    card = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    kept = {key: found[key] for key in ("nll", "accuracy")}
    return {**kept, "seconds": seconds, **provenance(), "device": card}


def show(name: str) -> Any:
    """Return a method's result beside one network's: trained now on a GPU, or as it was stored."""
    if torch.cuda.is_available():
        found = {each: train(each) for each in ("single", name)}
    else:
        path = RESULTS / "full-size.json"
        found = json.loads(path.read_text("utf-8")) if path.exists() else {}
        if name not in found:
            print(f"No GPU was found here, and no result of {name} at full size is stored yet.")
            return None
    rows = {
        {"single": "one network"}.get(each, each): {
            "NLL": found[each]["nll"],
            "accuracy (%)": found[each]["accuracy"],
            "seconds to train": found[each]["seconds"],
        }
        for each in ("single", name)
    }
    where = f"{found[name]['device']}, {found[name]['date']}, one seed"
    digits = {"accuracy (%)": 1, "seconds to train": 0}
    return Table(rows, caption="Fashion-MNIST at full size, test set", digits=digits, note=where)


def run() -> None:
    """Train every method on the GPU at hand, those that are not kept yet."""
    path = RESULTS / "full-size.json"
    for name in NAMES:
        kept = json.loads(path.read_text("utf-8")) if path.exists() else {}
        if name not in kept:
            write_json(path, kept | {name: train(name)})


if __name__ == "__main__":
    run()
