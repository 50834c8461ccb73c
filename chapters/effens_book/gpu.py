"""What members cost on a GPU: seconds of a training step, for members together and apart, and in fewer bits.

``python -m effens_book.gpu`` measures the GPU at hand and keeps what it found among the results.
"""

import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import nn

from effens.ensembles.deep import DeepEnsemble
from effens.scores import nll
from effens.training import fit, predict
from effens_book import data
from effens_book.benchmark import RESULTS
from effens_book.benchmark.run import provenance, write_json
from effens_book.nets import cnn, mlp

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {  # and the shape of the inputs
    "perceptron": (partial(mlp, 196, 10, width=512), (1280, 196)),
    "convolutions": (cnn, (1280, 1, 14, 14)),
}
MEMBERS = (1, 4, 16, 64, 256)
WAYS = ("float32", "TF32", "bfloat16", "compiled", "compiled bfloat16")
COMPILED = (16,)  # members for which it is compiled, which takes long
SEEDS = 8
PROCESSES = 4


def step_seconds(network: str, members: int, way: str, repeats: int = 3, device: str = "cuda") -> float:
    """Return the time of a training step of `effens.fit`, 128 examples for each member: the least of a few means."""
    make_net, shape = NETWORKS[network]
    torch._dynamo.reset()
    ensemble = DeepEnsemble(make_net, members)
    pair = torch.randn(shape), torch.randint(10, shape[:1])
    if "compiled" in way:
        vars(ensemble)["forward_members"] = torch.compile(ensemble.forward_members)
    torch.set_float32_matmul_precision("high" if way == "TF32" else "highest")
    with torch.autocast(device, torch.bfloat16, enabled="bfloat16" in way):
        run = partial(fit, ensemble, pair, device=device, progress=False)
        run(epochs=3)
        runs = [run(epochs=5) for _ in range(repeats)]
    torch.set_float32_matmul_precision("highest")
    return min(each.seconds / each.steps for each in runs)


def sharing(network: str, start: float, device: str = "cuda") -> float:
    """Return the time of a step of one network while other processes, which start at the same time, train theirs."""
    step_seconds(network, 1, "float32", 1, device)
    time.sleep(max(0.0, start - time.time()))
    while time.time() < start + 4:
        seconds = step_seconds(network, 1, "float32", 5, device)
    return seconds


def digits_nll(seed: int, bits: int, device: str = "cuda") -> float:
    """Return the NLL on test digits of eight networks that were trained in so many bits, 32 or 16."""
    digits = data.digits()
    torch.manual_seed(seed)
    ensemble = DeepEnsemble(cnn, 8)
    train = digits.x_train, digits.y_train
    with torch.autocast(device, torch.bfloat16, enabled=bits == 16):
        fit(ensemble, train, device=device, batch_size=50, lr=1e-2, seed=seed, progress=False)
    return nll(predict(ensemble, digits.x_test), digits.y_test).item()


def run() -> None:
    """Measure everything and keep it, unless it is kept already."""
    path = RESULTS / "gpu.json"
    if path.exists():
        return
    steps = [
        [network, members, way, step_seconds(network, members, way)]
        for network in NETWORKS
        for way in WAYS
        for members in (COMPILED if "compiled" in way else MEMBERS)
    ]
    losses = {str(bits): [digits_nll(seed, bits) for seed in range(SEEDS)] for bits in (32, 16)}
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        start = time.time() + 25  # all of them are ready by then
        shared = list(pool.map(partial(sharing, start=start), PROCESSES * ["perceptron"]))
    name = torch.cuda.get_device_name()
    facts = {"steps": steps, "nll": losses, "sharing": shared, **provenance(), "device": name}
    write_json(path, facts)


def read() -> dict[str, Any]:
    """Return what was measured: ``steps``, (network, members, way) to seconds; ``nll`` by bits; ``sharing``; versions.

    Raises:
        FileNotFoundError: nothing was measured yet.
    """
    path = RESULTS / "gpu.json"
    if not path.exists():
        raise FileNotFoundError("run python -m effens_book.gpu on a machine with a GPU, got no gpu.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return {**found, "steps": {(network, members, way): seconds for network, members, way, seconds in found["steps"]}}


if __name__ == "__main__":
    run()
