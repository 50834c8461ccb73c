"""Every error says a rule and the value that broke it, and a test breaks each rule."""

import ast
import importlib.util
import re
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from scenarios import mlp, vectors
from torch import nn
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler
from torch.utils.data import DataLoader, TensorDataset

import effens
from effens import baselines, figures, gpu, ledger, orders, players, rivals, roofline, scaling, serving, storage, tuning
from effens.data import markets
from effens.ensembles.base import Ensemble

ROOT = Path(__file__).parent.parent
# Errors of `effens/data/make.py`, which makes the arrays again from other packages and is not run by the tests, and one
# line that says to readers and type checkers that a loop always returns.
EXEMPT = ("effens/data/make.py", "unreachable")


def literals(node: ast.AST) -> list[str]:
    """The fixed parts of a string."""
    return [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def rules() -> Iterator[tuple[str, list[str]]]:
    """Where an error is raised, and the fixed text of its message: up to the value that broke the rule, if it has one.

    A message may be built from a variable `rule`, or `expected`, assigned just before.
    """
    for path in sorted((ROOT / "effens").rglob("*.py")):
        tree = ast.parse(path.read_text())
        texts = {
            node.lineno: literals(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "rule"
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                message = node.exc.args[0]
                parts = literals(message)
                if "{rule}" in ast.unparse(message) and isinstance(message, ast.JoinedStr):
                    parts = [*texts[max(line for line in texts if line < node.lineno)], *parts]
                yield f"{path.relative_to(ROOT)}:{node.lineno}", [part.split(", got")[0] for part in parts]


def test_every_rule_is_broken_by_a_test() -> None:
    """The longest fixed part of each message stands in a string of the tests: in a `match=`, if it is not vain."""
    said = [
        text.replace("\\", "")
        for path in (ROOT / "tests").glob("test_*.py")
        for text in literals(ast.parse(path.read_text()))
    ]
    found = list(rules())
    assert len(found) > 150
    missing = [
        f"{where} {rule}"
        for where, parts in found
        if (rule := max(parts, key=len, default="").strip(" :"))
        and not any(rule in text for text in said)
        and not any(exempt in f"{where} {rule}" for exempt in EXEMPT)
    ]
    assert not missing, "\n".join(missing)


def test_every_message_says_a_value_or_what_to_do() -> None:
    """None raises a bare class; `error` is one that was caught."""
    for path in (ROOT / "effens").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Name):
                assert node.exc.id == "error", f"{path.name}:{node.lineno}"


# ---- Each rule that no other file's tests spell out. ----


def swag(**options: Any) -> effens.SWAG:
    return effens.SWAG(mlp, members=2, **{"rank": 2, **options})


class Extra(nn.Linear):
    def get_extra_state(self) -> str:
        return "not a tensor"


class Wrong(nn.Module):
    """A network whose call order is `first`, then `second`, whatever it is registered as."""

    def __init__(self, order: tuple[str, ...]) -> None:
        super().__init__()
        self.order = order
        self.stem, self.middle, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.order:
            x = getattr(self, name)(x)
        return x


def mimo(*order: str) -> effens.MIMO:
    return effens.MIMO(lambda: Wrong(order), members=2)


def frozen() -> nn.Module:
    return mlp().requires_grad_(False)


def loader(batch_size: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*vectors(12)), batch_size)


def no_compiler() -> None:
    raise InvalidCxxCompiler


def fails(*_: Any, **__: Any) -> SimpleNamespace:
    return SimpleNamespace(returncode=1, stderr="no such header")


def save_and_load(first: Ensemble, second: Ensemble, folder: Path) -> None:
    effens.save(first, folder / "a.safetensors")
    effens.load(second, folder / "a.safetensors")


X, Y = vectors()
FACTS = {"shape": [2, 4], "dtype": "float32", "device": "cpu", "members": 3, "likelihood": ""}
NORMAL = torch.distributions.Normal(torch.zeros(2, 5), torch.ones(2, 5))
DEEP = partial(effens.DeepEnsemble, mlp, 2)
FLAT: Any = SimpleNamespace(close=torch.ones(67), dates=np.arange(67), high=None, low=None)
DEFAULT = {"rate": 0.01, "weight_decay": 0.1, "dropout": 0.1, "width": 16}
PLAIN = nn.Sequential(nn.ReLU())
REQUIRE: Any = serving.require  # a function that returns nothing, as a part of an expression
CASES: dict[str, tuple[Callable[[Path, pytest.MonkeyPatch], object], type[Exception], str]] = {
    "conversion of nothing": (
        lambda *_: effens.BatchEnsemble(lambda: PLAIN, 2),
        ValueError,
        f"the network must have an nn.Linear or nn.Conv2d to convert, got {PLAIN}",
    ),
    "a negative rate of fast weights": (
        lambda *_: effens.BatchEnsemble(mlp, 2, fast_rate=-1.0),
        ValueError,
        "fast_rate must be >= 0 and finite, got -1.0",
    ),
    "split batches too small": (
        lambda *_: effens.BatchEnsemble(mlp, 4, split=True).examples(3),
        ValueError,
        "split needs one example or more for each member, in the data and in a batch, got 3 for 4 members",
    ),
    "training of a mixture": (
        lambda *_: effens.DeepEnsemble.of([DEEP(), DEEP()]).forward_members(X[None]),
        RuntimeError,
        "ensembles side by side are not trained together: call effens.fit on each of them first",
    ),
    "plain networks among ensembles": (
        lambda *_: effens.DeepEnsemble.of([DEEP(), mlp()]),
        ValueError,
        "networks must be all plain or all ensembles, got 1 ensembles of 2",
    ),
    "lazy weights": (
        lambda *_: effens.DeepEnsemble(lambda: nn.LazyLinear(2), 2),
        ValueError,
        "the network's weights must exist: call it once on a batch in make_net, got LazyLinear(",
    ),
    "another architecture": (
        lambda *_: effens.DeepEnsemble(partial(next, iter([nn.Linear(2, 2), nn.Linear(2, 3)])), 2),
        ValueError,
        "make_net must return the same architecture at each call, got {'weight': (2, 2), 'bias': (2,)} then ",
    ),
    "rows that are no rows": (
        lambda *_: effens.DeepEnsemble(lambda: nn.Flatten(0), 2)(X),
        ValueError,
        "the network must return one row of outputs per example, (44, outputs), got (176,)",
    ),
    "training of a hyperparameter ensemble": (
        lambda *_: effens.HyperEnsemble([mlp()], [0]).forward_members(X[None]),
        RuntimeError,
        "networks of a HyperEnsemble are trained already, each with its own settings: effens.search",
    ),
    "an empty index": (
        lambda *_: effens.HyperEnsemble([mlp()], []),
        ValueError,
        "index must hold at least one entry, got none",
    ),
    "selection from a distribution of another shape": (
        lambda *_: effens.greedy_select(NORMAL, torch.zeros(4), 1),
        ValueError,
        "predictions must be (candidates, n) and y (n,), none of them 0, got (2, 5), (4,)",
    ),
    "selection by infinite likelihoods": (
        lambda *_: effens.greedy_select(NORMAL, torch.tensor([0, 0, 0, 0, torch.inf]), 1),
        ValueError,
        "log likelihoods must be finite, got 2 that are not",
    ),
    "nothing to widen": (
        lambda *_: effens.MIMO(lambda: PLAIN, 2),
        ValueError,
        f"the network must have linear or convolutional layers to widen, got {PLAIN}",
    ),
    "layers in the wrong order": (
        lambda *_: mimo("head", "stem")(torch.ones(3, 4)),
        ValueError,
        "first must be called before last: name them with first= and last=, got first='stem', last='head', "
        "called in the order ['head', 'stem']",
    ),
    "a layer called twice": (
        lambda *_: effens.MIMO(partial(nn.Sequential, *[layer := nn.Linear(4, 4), nn.Linear(4, 4), layer]), 2),
        ValueError,
        "first must be a layer that the network calls once, got '0', called 2 times: name another with first=",
    ),
    "batch norm behind the answers": (
        lambda *_: mimo("stem", "head", "norm")(torch.ones(3, 4)),
        ValueError,
        "MIMO cannot have 'norm', BatchNorm1d, after 'head': it would mix the members",
    ),
    "a layer behind the last": (
        lambda *_: effens.MIMO(lambda: nn.Sequential(Wrong(("stem", "head"))), 2, last="0.stem", first="0.norm"),
        ValueError,
        "MIMO cannot widen '0.norm', BatchNorm1d, where nn.Linear or a convolution (nn.Conv1d, 2d, 3d) is needed: "
        "name another with first=",
    ),
    "a layer in front of the first": (
        lambda *_: mimo("middle", "stem", "head")(torch.ones(3, 4)),
        ValueError,
        "first must be the first linear or convolutional layer that is called: name it with first=, got 'middle' "
        "called before 'stem'",
    ),
    "a rank of 1": (
        lambda *_: swag(rank=1),
        ValueError,
        "rank must be 0 or >= 2, for a single deviation has no spread, got 1",
    ),
    "SWAG of frozen weights": (
        lambda *_: effens.SWAG(frozen, 2),
        ValueError,
        "the network must have weights to train, got none that require gradients",
    ),
    "SWAG of complex weights": (
        lambda *_: effens.SWAG(lambda: nn.Linear(2, 2, dtype=torch.complex64), 2),
        ValueError,
        "the network's weights must be real, got torch.complex64",
    ),
    "weights of another network": (
        lambda *_: swag().collect_from(nn.Linear(1, 1)),
        ValueError,
        "the network must have the trainable weights {'",
    ),
    "frozen weights": (
        lambda *_: effens.fit(effens.DeepEnsemble(frozen, 2), (X, Y)),
        ValueError,
        "the ensemble must have weights to train, got none that require gradients",
    ),
    "an optimizer whose step is not a multiple of the rate": (
        lambda *_: effens.fit(DEEP(), (X, Y), rate=[0.1, 0.2], optimizer=torch.optim.Adam),
        ValueError,
        "optimizer must be AdamW or SGD for rates or decays of the members' own, got Adam",
    ),
    "rates of their own for members that share weights": (
        lambda *_: effens.fit(effens.BatchEnsemble(mlp, 2), (X, Y), rate=[0.1, 0.2]),
        ValueError,
        "only members of a DeepEnsemble can have rates or decays of their own, got a BatchEnsemble",
    ),
    "a diverged training": (
        lambda *_: effens.fit(DEEP(), (X * torch.inf, Y), progress=False),
        FloatingPointError,
        "losses must be finite, got [nan, nan] at step 0: lower the rate, or look at the data",
    ),
    "batches of a loader too small to split": (
        lambda *_: effens.fit(effens.BatchEnsemble(mlp, 4, split=True), loader(3), progress=False),
        ValueError,
        "a batch must hold at least one example for each member, got none that does",
    ),
    "a plain network": (
        lambda *_: effens.predict(cast(Any, mlp()), X),
        TypeError,
        "ensemble must be an Ensemble (one network: effens.DeepEnsemble.of([network])), got Sequential",
    ),
    "a square of targets": (
        lambda *_: effens.Categorical().nll(torch.zeros(3, 2), torch.zeros(3, 1)),
        ValueError,
        "targets must have shape (3,), one per example, got (3, 1)",
    ),
    "scores of another shape": (
        lambda *_: effens.auroc(torch.zeros(0), torch.zeros(2)),
        ValueError,
        "inside must be (n,) numbers, n >= 1, got shape (0,)",
    ),
    "scores that are NaN": (
        lambda *_: effens.auroc(torch.zeros(2), torch.tensor([1, torch.nan])),
        ValueError,
        "outside must hold no NaN, got 1 among 2",
    ),
    "state that is no tensor": (
        lambda folder, _: effens.save(effens.DeepEnsemble.of([Extra(1, 1)]), folder / "a"),
        TypeError,
        "the state must hold nothing but tensors, got ['network.layers.0._extra_state']",
    ),
    "a file of another kind": (
        lambda folder, _: save_and_load(DEEP(), effens.DeepEnsemble(mlp, 3), folder),
        ValueError,
        "a.safetensors must hold {",
    ),
    "a file of other names": (
        lambda folder, _: save_and_load(DEEP(), effens.DeepEnsemble(lambda: nn.Linear(4, 3), 2), folder),
        ValueError,
        "a.safetensors must hold the ensemble's weights, got other names: ['network.",
    ),
    "a last layer without a bias": (
        lambda *_: baselines.LastLayerLaplace(lambda: PLAIN),
        ValueError,
        f"the network must be an nn.Sequential that ends in nn.Linear with a bias, got {PLAIN}",
    ),
    "prices that end before the target": (
        lambda *_: markets.task(FLAT),
        ValueError,
        "prices must hold a target 1 days after the features, got 67 days",
    ),
    "images that are no images": (
        lambda *_: figures.digit_row(torch.zeros(3)),
        ValueError,
        "images must be (n, height, width) with n >= 1, got shape (3,)",
    ),
    "titles for other images": (
        lambda *_: figures.digit_row(torch.zeros(1, 2, 2), titles=["a", "b"]),
        ValueError,
        "images, titles and axes must be equally many, got 1, 2 and 1",
    ),
    "a heavy player": (
        lambda *_: players.player(lambda ax, value: ax.plot([0, value]), [1], label="a", alt="a line", max_kb=1),
        ValueError,
        "a player must take at most 1 KB, got … KB for 1 frames: "
        "fewer values or colors, or a smaller figsize or dpi, make it smaller",
    ),
    "a living figure of no method": (
        lambda *_: players.living(method="forest"),
        ValueError,
        "method must be one of single, deep, batch, snapshot, got 'forest'",
    ),
    "a living figure of no members": (
        lambda *_: players.living(members=0),
        ValueError,
        "members must be in 1 ... 20, got 0",
    ),
    "a living figure of odd width": (
        lambda *_: players.living(width=5),
        ValueError,
        "width must be a multiple of 4 in 4 ... 64, got 5",
    ),
    "a living figure of no seed": (
        lambda *_: players.living(seed=-1),
        ValueError,
        "seed must be a whole number in 0 ... 999999, got -1",
    ),
    "a bet without the answer": (
        lambda *_: players.bet("which?", {"a": "so", "b": "not"}, answer="c"),
        ValueError,
        "replies must be at least two and hold the answer 'c', got ['a', 'b']",
    ),
    "service of other events": (
        lambda *_: orders.delays(torch.zeros(2), torch.zeros(3)),
        ValueError,
        "arrivals and service must have the same length, got 2 and 3",
    ),
    "networks that a search chooses": (
        lambda *_: roofline.brief("digits", "hyper"),
        ValueError,
        "name must be a method whose networks are known beforehand, got 'hyper'",
    ),
    "a search without a folder": (
        lambda *_: effens.search(mlp, (X, Y), (X, Y), default=DEFAULT, storage="sqlite://"),
        ValueError,
        "a storage needs a folder that keeps the weights, got folder=None",
    ),
    "another search by this name": (
        lambda folder, _: [tuning.open_study(f"sqlite:///{folder}/s.db", "mine", facts, {}) for facts in "ab"],
        ValueError,
        "the study 'mine' must be of this search, b, got a: give it another name",
    ),
    "a GPU that was not measured": (
        lambda folder, patch: (patch.setattr(ledger, "BANK", folder), gpu.read()),
        FileNotFoundError,
        "run python -m effens.gpu on a machine with a GPU, got no gpu.json in the bank",
    ),
    "a network that no process can import": (
        lambda *_: scaling.check_importable(make_net=lambda: None),
        ValueError,
        "make_net must stand in a module that a process can import (a file, no notebook, no lambda), got <lambda>.",
    ),
    "a state of something else": (
        lambda *_: storage.packed(object(), "step", {}),
        TypeError,
        "a checkpoint must hold nothing but tensors, numbers and strings, got <class 'object'> at step",
    ),
    "checkpoints within a DataLoader's epoch": (
        lambda folder, _: effens.fit(DEEP(), loader(4), progress=False, checkpoint=folder / "a", every=3),
        ValueError,
        "every must be None with a DataLoader, which is kept between epochs, got 3",
    ),
    "an exported file that is not there": (
        lambda folder, _: serving.load(folder / "none.pt2"),
        FileNotFoundError,
        "path must be a file that effens.export wrote, got none.pt2, which is no file",
    ),
    "an input of another shape": (
        lambda *_: serving.Served("onnx", FACTS, lambda x: (x, x))(torch.zeros(3, 4)),
        ValueError,
        "x must be as it was exported, shape (2, 4), torch.float32, on cpu, got shape (3, 4), torch.float32, on cpu",
    ),
    "packages that are missing": (
        lambda _, patch: (patch.setattr(serving, "PACKAGES", ("onnx", "no_such")), REQUIRE("onnx")),
        ModuleNotFoundError,
        "backend 'onnx' needs the packages onnx, no_such, missing no_such: pip install no_such",
    ),
    "no compiler": (
        lambda _, patch: (patch.setattr(cpp_builder, "get_cpp_compiler", no_compiler), REQUIRE("aoti")),
        RuntimeError,
        "backend 'aoti' needs a C++ compiler: install g++ or clang++ (and name it in CXX), or use 'onnx', got none",
    ),
    "a clock that does not compile": (
        lambda _, patch: (patch.setattr(subprocess, "run", fails), orders.clock.__wrapped__()),
        RuntimeError,
        "the clock must compile, got no such header",
    ),
    "a compiled file that does not run": (
        lambda folder, patch: (
            patch.setattr(orders, "clock", lambda: lambda *_: 3),
            orders.timed_without_python(folder, torch.zeros(1, 4), 1),
        ),
        RuntimeError,
        "the compiled file must run in C++, got error 3",
    ),
    "a bank without the times of serving": (
        lambda folder, patch: (patch.setattr(ledger, "BANK", folder), orders.read.__wrapped__()),
        FileNotFoundError,
        "the bank must hold the times of serving, got none: run python -m effens.orders",
    ),
    "a bank without rivals": (
        lambda folder, patch: (patch.setattr(ledger, "BANK", folder), rivals.read.__wrapped__()),
        FileNotFoundError,
        "the bank must hold the rivals, got none: run python -m effens.rivals",
    ),
    "a ledger without costs": (
        lambda folder, patch: (patch.setattr(ledger, "BANK", folder), ledger.costs("digits", "single")),
        FileNotFoundError,
        "the ledger must hold the costs of digits, single, got none: run python -m effens.ledger",
    ),
    "a ledger without costs of layers": (
        lambda folder, patch: (patch.setattr(ledger, "BANK", folder), ledger.layer_table()),
        FileNotFoundError,
        "the ledger must hold the costs of layers, got none: run python -m effens.ledger",
    ),
    "an ONNX file without its runtime": (
        lambda _, patch: (patch.setattr(importlib.util, "find_spec", lambda *_: None), serving.session_runner(b"")),
        ModuleNotFoundError,
        "a file for ONNX Runtime needs the package onnxruntime: pip install onnxruntime",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_broken_rule_is_named(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    breaks, error, message = CASES[case]
    with pytest.raises(error, match="^['\"]?" + ".*".join(map(re.escape, message.split("…")))):
        breaks(tmp_path, monkeypatch)
