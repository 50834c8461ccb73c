"""What tells calls from one another: different arguments by what they hold, equal ones in every process."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scenarios import mlp, vectors
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import effens
from effens.identity import describe, digest


def closing(size: Any) -> Callable[..., Any]:
    return lambda: size


def local_class() -> type:
    class Plain:
        pass

    return Plain


class Thing:
    def __init__(self, size: float) -> None:
        self.size = torch.arange(2000.0) * size


class Slotted:
    __slots__ = ("size",)

    def __init__(self, size: int) -> None:
        self.size = size


class Source:
    def __init__(self, size: int) -> None:
        self.size = size

    def load(self) -> int:
        return self.size


@dataclass(frozen=True)
class Scaled(effens.Likelihood):
    size: float


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return mlp()


def loader(seed: int, **options: Any) -> Any:
    return DataLoader(TensorDataset(*vectors(seed=1)), generator=torch.Generator().manual_seed(seed), **options)


MAKES: dict[str, Callable[[int], Any]] = {
    "numbers": lambda i: i,
    "tensors": lambda i: torch.full((2000,), float(i)),
    "arrays": lambda i: np.arange(3000) == i + 1500,  # which its repr leaves out
    "sets": lambda i: {"a", "b", f"c{i}"},
    "keys": lambda i: {(1, i): 2},
    "partials": lambda i: partial(mlp, depth=i),
    "methods": lambda i: Source(i).load,
    "methods of builtins": lambda i: [i].pop,
    "objects": Thing,
    "objects with slots": Slotted,
    "dataclasses": Scaled,
    "networks": network,
    "datasets": lambda i: TensorDataset(*vectors(seed=i)),
    "shuffles": loader,
    "options": lambda i: {"optimizer": partial(torch.optim.SGD, momentum=i / 2), "likelihood": Scaled(i)},
}


@pytest.mark.parametrize("make", MAKES.values(), ids=list(MAKES))
def test_what_differs_is_told_apart_and_what_is_equal_is_not(make: Callable[[int], Any]) -> None:
    assert digest(make(0)) == digest(make(0)) != digest(make(1))


def test_a_function_that_stands_in_a_module_is_its_name() -> None:
    assert describe(mlp) == "scenarios.mlp"
    assert describe(torch.optim.SGD) == "torch.optim.sgd.SGD"
    assert describe(len) == "builtins.len"
    assert describe(torch.float32) == "dtype.float32"


@pytest.mark.parametrize("options", [{"shuffle": True}, {"num_workers": 1, "persistent_workers": True}], ids=str)
def test_use_does_not_change_a_loader(options: dict[str, Any]) -> None:
    used = loader(0, **options)
    before = digest(used)
    list(used)
    assert digest(used) == before


def test_what_holds_itself_is_describe() -> None:
    around: list[Any] = [1]
    around.append(around)
    assert describe(around) == ["1", "what holds this, 1 further out"]


@pytest.mark.parametrize(
    "value",
    [threading.Lock(), closing(1), local_class(), (i for i in range(3)), {"data": [{}.keys()]}],
    ids=["lock", "closure", "local class", "generator", "keys"],
)
def test_what_cannot_be_described_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="must be described: by a function that stands in a module, or by name=, got"):
        digest(value)


@pytest.mark.slow
def test_every_process_says_the_same() -> None:
    code = "import json, test_identity as t; print(json.dumps({n: t.digest(make(0)) for n, make in t.MAKES.items()}))"
    folders = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": folders, "PYTHONHASHSEED": "7"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == {name: digest(make(0)) for name, make in MAKES.items()}
