"""The benchmark's contestants compute the same, and its statistics are right; no test asks how fast anything is."""

import json
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from scenarios import relative
from torch import nn

import effens_book.nets
from effens import costs
from effens_book.address import ROOT
from effens_book.peers import __main__ as run
from effens_book.peers import sections, timing


def same_weights(layers: dict[str, sections.Layer]) -> None:
    """Give every contestant the weights of effens' layer; the plain product has no factors."""
    ours = layers["effens"][0]
    named = dict(ours.named_parameters())
    aliases = {"linear.weight": "weight", "conv.weight": "weight", "r_group": "r", "s_group": "s"}
    with torch.no_grad():
        named["bias"].normal_()
        for name, (layer, _, _) in layers.items():
            if name != "plain product":
                for key, parameter in layer.named_parameters():
                    parameter.copy_(named[aliases.get(key, key)])


MAKES: list[tuple[Callable[..., dict[str, sections.Layer]], tuple[int, ...]]] = [
    (sections.linear_layers, (6, 5, 3, 1)),
    (sections.linear_layers, (6, 5, 3, 4)),
    (sections.linear_layers, (6, 5, 3, 40)),
    (sections.shared_layers, (6, 5, 3, 4)),
    (sections.shared_layers, (6, 5, 3, 40)),
    (sections.conv_layers, (2, 5, 3, 4, 6)),
]


@pytest.mark.parametrize(("make", "sizes"), MAKES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_contestants_give_the_same_answers(
    make: Callable[..., dict[str, sections.Layer]], sizes: tuple[int, ...]
) -> None:
    layers = make(*sizes)
    same_weights(layers)
    _, run, x = layers["effens"]
    expected = run(x)
    assert layers["plain product"][1](layers["plain product"][2]).numel() == expected.numel()
    for name in layers.keys() - {"plain product"}:
        _, run, x = layers[name]
        y = run(x).transpose(0, 1) if name == "tabm" else run(x)  # tabm's rows are (batch, members)
        assert relative(y.reshape(expected.shape), expected) < 1e-5, name


@pytest.mark.parametrize("network", sections.NETWORKS)
def test_training_steps_have_the_same_gradients(network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    squares: list[float] = []
    step = torch.optim.AdamW.step

    def noting(self: torch.optim.AdamW, *args: Any) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        squares.append(sum(p.grad.double().square().sum().item() for p in parameters))
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    sums = {}
    for name, call in sections.steps(network, 3).items():
        squares.clear()
        call()
        sums[name] = sum(squares)
    sums.pop("tabm", None)  # its weights are its own
    assert all(total == pytest.approx(sums["effens"], rel=1e-4) for total in sums.values()), sums


def test_a_converted_network_has_as_many_weights_a_member() -> None:
    network = effens_book.nets.mlp(4, 2, width=8)
    converted = sections.convert_network(network, lambda inputs, outputs: nn.Linear(inputs, outputs))
    assert [p.shape for p in converted.parameters()] == [p.shape for p in network.parameters()]
    assert not {id(p) for p in converted.parameters()} & {id(p) for p in network.parameters()}


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    draws, inside = random.Random(0), 0
    for _ in range(1000):
        low, high = timing.interval([draws.expovariate(1) for _ in range(25)])
        inside += low <= 0.6931 <= high
    assert 940 <= inside <= 985  # 95.7% for 25 values


class Clock:
    """A clock that stands still unless it is moved."""

    now = 0.0

    def move(self, seconds: float) -> None:
        self.now += seconds

    def thread_time(self) -> float:
        return self.now

    perf_counter = thread_time


def test_ratios_are_those_of_paired_times(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    calls = {"effens": lambda: clock.move(1), "slow": lambda: clock.move(4), "fast": lambda: clock.move(0.5)}
    row = timing.compare(calls, 30)
    assert row["seconds"] == {"effens": 1, "slow": 4, "fast": 0.5}
    assert row["ratios"] == {"slow": [0.25] * 3, "fast": [2] * 3}
    assert timing.compare(calls, 30, to="slow")["ratios"] == {"effens": [0.25] * 3, "fast": [0.125] * 3}


def test_every_round_times_every_call_once() -> None:
    times = timing.rounds({"a": lambda: None, "b": lambda: None}, 0.01)
    assert len(times["a"]) == len(times["b"]) >= timing.LEAST
    assert all(seconds >= 0 for seconds in times["a"] + times["b"])


def test_kept_bytes_are_those_of_autograd() -> None:
    layer, x = nn.Linear(6, 5), torch.randn(7, 6, requires_grad=True)
    assert costs.kept_bytes(partial(layer, x), layer) == 4 * 7 * 6  # the input; the weight is no extra


@pytest.mark.slow
def test_one_command_runs_a_section_and_keeps_the_others(tmp_path: Path) -> None:
    kept = tmp_path / "speed.json"
    kept.write_text(json.dumps({"conv": "kept"}))
    command = [sys.executable, "-m", "effens_book.peers", "mimo", "--seconds", "0.01", "--output", str(kept)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    content = json.loads(kept.read_text())
    assert content["conv"] == "kept"
    assert {row["what"] for row in content["mimo"]["rows"]} >= {"predict"}
    assert content["mimo"]["threads"] == 1
    wrong = subprocess.run([*command[:3], "mime"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "sections must be of linear" in wrong.stderr
    assert "got mime" in wrong.stderr


@pytest.mark.parametrize(("there", "missing"), [((), "torch-uncertainty, tabm"), (("tabm",), "torch-uncertainty")])
def test_the_book_s_results_are_not_replaced_by_some_without_peers(
    there: tuple[str, ...], missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "linear"])
    monkeypatch.setattr(run, "found", there.__contains__)
    monkeypatch.setattr(run, "SECTIONS", {"linear": lambda seconds: pytest.fail("it ran")})
    with pytest.raises(SystemExit):
        run.main()
    said = capsys.readouterr().err
    assert (
        "results for the book must have every peer beside them: pip install -r effens_book/peers/requirements" in said
    )
    assert said.endswith(f"got no {missing}\n")


def test_the_book_holds_every_section() -> None:
    content = json.loads((ROOT / "chapters/effens_book/results/speed.json").read_text())
    assert content.keys() == sections.SECTIONS.keys()
    rows = [row for section in content.values() for row in section["rows"]]
    intervals = [ratio for row in rows for ratio in row["ratios"].values()]
    assert all(low <= middle <= high for middle, low, high in intervals)
    assert statistics.median(len(row["ratios"]) for row in rows) >= 2


def test_the_book_holds_every_peer_wherever_it_takes_part() -> None:
    """A run without the packages leaves them out; its results must not have got into the book."""
    layers = {"linear": 2 * len(sections.LINEAR), "shared": 2 * len(sections.SHARED)}
    perceptrons = sum(name.startswith("MLP") for name in sections.NETWORKS)
    expected = {
        "torch-uncertainty": {**layers, "conv": 2 * len(sections.CONV), "swag": 2, "mimo": 2, "serving": 1},
        "tabm": {**layers, "deep": 2 * perceptrons, "serving": 1},
    }
    content = json.loads((ROOT / "chapters/effens_book/results/speed.json").read_text())
    for peer, rows in expected.items():
        beside = {
            name: sum(any(peer in contestant for contestant in row["ratios"]) for row in section["rows"])
            for name, section in content.items()
        }
        assert beside == {name: rows.get(name, 0) for name in sections.SECTIONS}
        assert all(peer in section["versions"] for section in content.values())
