"""Decisions on a simulated order flow: profits, thresholds and queues against the obvious loops."""

import ctypes
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import effens
import effens_book.nets
from effens import serving
from effens_book.data import orders as flows
from effens_book.finance import order_flow


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- The flow. ----


def test_the_flow_is_the_same_at_each_call_and_its_parts_are_not() -> None:
    first, again = flows.order_flow(), flows.order_flow()
    for name, size in flows.SIZES.items():
        assert torch.equal(first[name].x, again[name].x)
        assert torch.equal(first[name].y, again[name].y)
        assert first[name].x.shape == (size, flows.FEATURES)
        assert torch.equal(first[name].signal, flows.signal(first[name].x))
    assert not torch.equal(first["train"].x[:2000], first["val"].x)


def test_the_noise_has_the_size_that_it_says_and_what_is_shifted_lies_elsewhere() -> None:
    found = flows.order_flow()
    for flow in found.values():
        assert (flow.y - flow.signal).std().item() == pytest.approx(flows.NOISE, rel=0.05)
        assert (flow.y - flow.signal).mean().abs().item() < 4 * flows.NOISE / len(flow.y) ** 0.5
    usual = found["test"]
    assert usual.signal.std().item() == pytest.approx(flows.SIGNAL, rel=0.1)
    torch.testing.assert_close(flows.shifted(0).y, usual.y)
    far = flows.shifted(6.0)
    torch.testing.assert_close((far.x - usual.x).norm(dim=1), torch.full((3000,), 6.0))
    torch.testing.assert_close(far.y - far.signal, usual.y - usual.signal)
    assert torch.equal(far.signal, flows.signal(far.x))


def test_arrivals_have_their_rate_and_come_in_spells() -> None:
    calm = flows.arrivals(50_000, rate=100.0, busy=1.0)
    gaps = calm.diff()
    assert (gaps > 0).all()
    assert 1 / gaps.mean().item() == pytest.approx(100, rel=0.02)
    assert gaps.std().item() == pytest.approx(gaps.mean().item(), rel=0.03)  # exponential
    busy = flows.arrivals(50_000, rate=100.0, busy=5.0).diff()
    assert busy.std().item() > 1.15 * busy.mean().item()
    assert torch.equal(flows.arrivals(50, rate=2.0, seed=3), flows.arrivals(50, rate=2.0, seed=3))
    with pytest.raises(ValueError, match="n, rate, busy and spell must be > 0, got 5, 0, 5.0 and 200"):
        flows.arrivals(5, rate=0)


# ---- Decisions. ----


def test_profit_is_its_equation() -> None:
    side, signal = torch.tensor([1.0, -1, 0, 0.5]), torch.tensor([2.0, 2, 2, -1])
    now = order_flow.profit(side, signal)
    assert now.tolist() == pytest.approx([2 - order_flow.COST, -2 - order_flow.COST, 0, -0.5 - order_flow.COST / 2])
    late = order_flow.profit(side, signal, torch.full((4,), 2 * order_flow.HALF_LIFE))
    assert late.tolist() == pytest.approx(
        [0.5 - order_flow.COST, -0.5 - order_flow.COST, 0, -0.125 - order_flow.COST / 2], abs=1e-6
    )
    with pytest.raises(ValueError, match=r"sides must be in \[-1, 1\], got 2"):
        order_flow.profit(2 * side, signal)


@pytest.mark.parametrize("seed", range(3))
def test_the_threshold_is_the_best_of_all(seed: int) -> None:
    value, moves = draw(60, seed=seed), draw(60, seed=10 + seed) + draw(60, seed=seed)
    found = order_flow.threshold(value, moves)

    def gain(bound: float) -> float:
        return float(((value.sign() * moves - order_flow.COST) * (value.abs() >= bound)).sum())

    assert gain(found) == pytest.approx(max(gain(bound) for bound in value.abs().tolist()), abs=1e-4)


def test_forecasts_of_one_size_are_traded_together_or_not_at_all() -> None:
    assert order_flow.threshold(torch.ones(3), torch.tensor([5.0, -5, -5])) == float("inf")
    assert order_flow.threshold(torch.tensor([1.0, -2, 1]), torch.tensor([5.0, -5, -1])) == 1
    assert order_flow.threshold(torch.tensor([1.0, -2, 1]), torch.tensor([5.0, -5, -9])) == 2


def test_where_no_trade_pays_there_is_none() -> None:
    value = draw(20)
    assert order_flow.threshold(value, -value) == float("inf")


def test_delays_are_those_of_a_queue() -> None:
    arrivals = flows.arrivals(500, rate=1000.0)
    service = 0.0008 * torch.rand(500, generator=torch.Generator().manual_seed(1)).double()
    free, expected = 0.0, []
    for came, takes in zip(arrivals.tolist(), service.tolist(), strict=True):
        free = max(free, came) + takes
        expected.append(free - came)
    torch.testing.assert_close(order_flow.queue(arrivals, service), torch.tensor(expected, dtype=torch.float64))
    assert (order_flow.queue(arrivals, service) > service + 1e-9).any()
    with pytest.raises(ValueError, match="must have the same length, got 500 and 1"):
        order_flow.queue(arrivals, service[:1])


def test_a_server_that_conflates_takes_the_newest_event_and_drops_what_it_passed_over() -> None:
    arrivals = flows.arrivals(500, rate=1000.0)
    service = 0.003 * torch.rand(500, generator=torch.Generator().manual_seed(1)).double()
    free, found = 0.0, [float("inf")] * 500
    seen = -1
    while True:  # the obvious loop: look at all events whenever the server is free
        waiting = [i for i in range(seen + 1, 500) if arrivals[i] <= free]
        if not waiting:
            if seen + 1 == 500:
                break
            free = max(free, arrivals[seen + 1].item())
            waiting = [seen + 1]
        seen = waiting[-1]
        free += service[seen].item()
        found[seen] = free - arrivals[seen].item()
    expected = torch.tensor(found, dtype=torch.float64)
    late = order_flow.conflate(arrivals, service)
    assert torch.equal(late.isinf(), expected.isinf())
    torch.testing.assert_close(late[late.isfinite()], expected[late.isfinite()])
    assert 50 < int(late.isinf().sum()) < 450
    assert bool((late[late.isfinite()] < 0.0061).all())  # at most two predictions' time, whatever the rate
    with pytest.raises(ValueError, match="must have the same length, got 500 and 1"):
        order_flow.conflate(arrivals, service[:1])


def test_who_knows_the_delay_does_not_trade_on_what_is_gone() -> None:
    forecast = torch.tensor([1.0, -1.0, 0.4, 3.0])
    assert order_flow.sides(forecast, 0.5).tolist() == [1, -1, 0, 1]
    late = torch.tensor([0.0, 2.0, 0.0, 2.0]) * order_flow.HALF_LIFE
    assert order_flow.sides(forecast, 0.5, late).tolist() == [1, 0, 0, 1]
    assert order_flow.sides(forecast, 0.5, torch.full((4,), torch.inf)).tolist() == [0, 0, 0, 0]


# ---- Ways of serving. ----


def make_net() -> torch.nn.Module:
    return effens_book.nets.mlp(flows.FEATURES, 2, width=8)


def test_the_eager_way_is_the_mean_and_the_spread_of_the_means() -> None:
    ensemble = effens.DeepEnsemble(make_net, 3).eval()
    x = draw(1, flows.FEATURES)
    said = effens.predict(ensemble, x, likelihood=effens.Gaussian()).loc
    mean, spread = order_flow.eager(ensemble)(x)
    torch.testing.assert_close(mean, said.mean(0))
    torch.testing.assert_close(spread, said.std(0, correction=0))
    assert order_flow.Locations().predict(ensemble(x)).shape == (3, 1)


def test_every_call_is_timed() -> None:
    calls: list[Tensor] = []
    times = order_flow.time_calls(calls.append, draw(3, 2), 50)
    assert len(times) == 50
    assert len(calls) == 250
    assert (times > 0).all()
    assert all(call.shape == (1, 2) for call in calls)


@pytest.mark.slow
def test_without_python_it_is_not_slower(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    ensemble, x = effens.BatchEnsemble(make_net, 4).eval(), draw(20, flows.FEATURES)
    served = serving.export(ensemble, x[:1], tmp_path / "a.pt2", "aoti", likelihood=order_flow.Locations())
    ratios = []
    for _ in range(9):  # in turns, so that a busy moment hits both
        with_python = order_flow.time_calls(served.run, x, 1000)
        without = order_flow.time_calls_without_python(tmp_path / "a.pt2", x, 1000)
        ratios.append(np.median(without) / np.median(with_python))
    assert np.median(ratios) < 1.1
    with pytest.raises(RuntimeError, match="the compiled file must run in C"):
        order_flow.time_calls_without_python(tmp_path / "none.pt2", x, 10)


def test_every_method_was_timed_in_every_way() -> None:
    found = order_flow.read()
    assert found.keys() == {(name, way) for name in order_flow.METHODS for way in order_flow.WAYS}
    for times in found.values():
        assert len(times) == order_flow.KEPT
        assert (times.diff() >= 0).all()
        assert times[0] > 0
    drawn = order_flow.draw_times("single", "eager", 100)
    assert torch.isin(drawn, found["single", "eager"]).all()
    assert torch.equal(drawn, order_flow.draw_times("single", "eager", 100))


def test_what_reading_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order_flow.read.cache_clear()
    monkeypatch.setattr(order_flow, "RESULTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="run python -m effens_book.finance.order_flow"):
        order_flow.read()
    order_flow.read.cache_clear()


def test_every_way_is_timed_in_turns_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What exports and what compiles is tested elsewhere: here they are stand-ins."""
    said: list[str] = []

    def times(name: str) -> Any:
        def call(*given: Any) -> Any:
            said.append(name)
            return np.full(given[-1], 1e-6 * len(said))

        return call

    monkeypatch.setattr(order_flow, "RESULTS", tmp_path)
    monkeypatch.setattr(order_flow, "train_one", lambda *_: (effens.DeepEnsemble(make_net, 2), 0.0))
    monkeypatch.setattr(serving, "export", lambda *_, **__: SimpleNamespace(run=None))
    monkeypatch.setattr(order_flow, "time_calls", times("Python"))
    monkeypatch.setattr(order_flow, "time_calls_without_python", times("C++"))
    for name, value in {"METHODS": ("single", "MIMO"), "CALLS": 40, "KEPT": 10}.items():
        monkeypatch.setattr(order_flow, name, value)
    order_flow.read.cache_clear()
    order_flow.run(looks=2)
    assert said == [*["Python"] * 3, "C++"] * 4  # two methods, two looks
    found = order_flow.read()
    order_flow.read.cache_clear()
    assert found.keys() == {(name, way) for name in ("single", "MIMO") for way in order_flow.WAYS}
    for kept in found.values():
        assert len(kept) == 10
        assert (kept.diff() >= 0).all()
        assert kept[0] < kept[-1]  # of both looks
    order_flow.run(looks=2)  # what is kept is not timed again
    assert len(said) == 16


def test_a_clock_that_compiles_is_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0))
    monkeypatch.setattr(ctypes, "CDLL", lambda path: SimpleNamespace(effens_clock=lambda *_: 0))
    order_flow.clock.cache_clear()
    assert order_flow.time_calls_without_python(Path("served"), draw(3, flows.FEATURES), 7).shape == (7,)
    order_flow.clock.cache_clear()
