"""The roofline: its arithmetic by hand, and what the book's machine measured."""

import math
from pathlib import Path

import pytest
import torch

from effens_book import roofline
from effens_book.benchmark import shipped
from effens_book.roofline import Machine

EXPLAINED = ("digits", "gap", "diamonds")  # the tasks whose latencies the book predicts
MACHINE = Machine(peak=100.0, call=1.0, bandwidths=((16.0, 8.0), (1600.0, 2.0)))


def test_the_slower_of_reading_and_computing_decides() -> None:
    # 2 x 2: 16 bytes; one row of one member: 8 operations
    assert MACHINE.predict(2, 1, 1, shared=True) == pytest.approx(1 + 16 / 8)
    assert MACHINE.predict(2, 1, 4, shared=True) == pytest.approx(1 + 16 / 8)  # shared weights are read once
    assert MACHINE.predict(2, 1, 4, shared=False) == pytest.approx(1 + 64 / 8)  # nearest size: 16
    assert MACHINE.predict(2, 100, 1, shared=True) == pytest.approx(1 + 800 / 100)
    assert MACHINE.predict(20, 1, 1, shared=True) == pytest.approx(
        1 + 1600 / 2
    )  # larger weights come from further away


@pytest.mark.parametrize("width", [2, 20])
def test_at_the_knee_both_take_as_long(width: int) -> None:
    rows = MACHINE.knee(width)
    size = 4 * width**2
    assert size / MACHINE.bandwidth(size) == pytest.approx(2 * width**2 * rows / MACHINE.peak)


def test_sizes_are_nearest_on_a_log_scale() -> None:
    assert MACHINE.bandwidth(100) == 8
    assert MACHINE.bandwidth(200) == 2


@pytest.mark.slow
def test_a_machine_is_measured() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = roofline.measure_machine()
    finally:
        torch.set_num_threads(threads)
    assert 1e8 < found.peak < 1e14
    assert 0 < found.call < 1e-2
    assert [size for size, _ in found.bandwidths] == [4.0 * width**2 for width in roofline.WIDTHS]
    assert all(1e7 < speed < 1e13 for _, speed in found.bandwidths)


def test_the_bank_holds_every_point() -> None:
    machine, times = roofline.read()
    expected = {(name, *point) for name in ("deep ensemble", "BatchEnsemble") for point in roofline.points()}
    assert times.keys() == expected
    assert all(math.isfinite(t) and t > 0 for t in times.values())
    ratios = torch.tensor([t / machine.predict(w, b, m, n == "BatchEnsemble") for (n, w, b, m), t in times.items()])
    assert 0.3 < ratios.median() < 4  # the picture is of this machine


def test_what_is_missing_says_what_to_run(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "RESULTS", tmp_path)
    roofline.read.cache_clear()
    try:
        with pytest.raises(FileNotFoundError, match="results must hold the roofline, got none: run python -m"):
            roofline.read()
    finally:
        roofline.read.cache_clear()


def test_rows_are_members_times_batch_and_splits_of_the_same_rows_share_a_median() -> None:
    layer = {("BatchEnsemble", 8, 2, 1): 1.0, ("BatchEnsemble", 8, 1, 4): 4.0, ("BatchEnsemble", 8, 2, 2): 6.0}
    others = {("BatchEnsemble", 16, 1, 1): 9.0, ("deep ensemble", 8, 1, 4): 9.0}
    assert roofline.by_rows(layer | others, 8) == {2: 1.0, 4: 5.0}


def test_where_the_time_has_doubled_is_read_between_the_points() -> None:
    assert roofline.doubling_rows({1: 3.0, 4: 3.0, 16: 12.0}) == pytest.approx(8)  # on a line of slope 1, log-log
    assert roofline.doubling_rows({1: 3.0, 4: 6.0}) == pytest.approx(4)
    assert roofline.doubling_rows({1: 3.0, 4: 5.9}) == math.inf
    shared = {rows: MACHINE.predict(20, rows, 1, shared=True) - MACHINE.call for rows in range(1, 1000)}
    assert roofline.doubling_rows(shared) == pytest.approx(2 * MACHINE.knee(20), rel=0.01)


@pytest.mark.parametrize(("size", "said"), [(16384, "16 KB"), (2**20, "1 MB"), (2**28, "268 MB")])
def test_bytes_in_words(size: int, said: str) -> None:
    assert roofline.words(size) == said


def test_a_prediction_is_counted_by_hand() -> None:
    x, w = torch.randn(5, 3), torch.randn(3, 2)
    found = roofline.count_operations(lambda: (x @ w).T.relu())  # a product, a view, an elementwise operator
    assert found == roofline.Forward(3, (4 * (15 + 6 + 10), 0, 4 * (10 + 10)), (2 * 5 * 3 * 2, 0, 0))
    calls, memory, compute = found.predict(Machine(peak=1.0, call=2.0, bandwidths=((1.0, 4.0),)))
    assert calls == 3 * 2
    assert compute == 60  # the product: 60 operations against 31 seconds of reading
    assert memory == 20
    assert roofline.count_operations(lambda: None) == roofline.Forward(0, (), ())


@pytest.mark.parametrize("name", ["single", "deep ensemble", "BatchEnsemble", "SWAG", "MIMO"])
def test_operations_are_those_of_the_benchmark(name: str) -> None:
    for task in EXPLAINED:
        found = roofline.forward(task, name, 1)
        kept = roofline.forwards()[task, name, 1]
        assert sum(found.work) == sum(kept.work) == shipped().costs(task, name)["flops"]
        assert found.calls <= kept.calls + 8


def test_predictions_are_bounds_from_below_for_every_latency() -> None:
    machine, _ = roofline.read()
    for task in EXPLAINED:
        for name in ("single", "deep ensemble", "BatchEnsemble"):
            for batch in (1, 256):
                said = sum(roofline.forwards()[task, name, batch].predict(machine))
                assert 1 < shipped().costs(task, name)["latency_p50"][str(batch)] / said < 8


def test_networks_of_a_search_cannot_be_made_again_briefly() -> None:
    with pytest.raises(ValueError, match="whose networks are known beforehand, got 'hyper'"):
        roofline.brief("digits", "hyper")


def test_what_is_kept_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "RESULTS", tmp_path)
    monkeypatch.setattr(roofline, "WIDTHS", (8,))
    monkeypatch.setattr(roofline, "BATCHES", (1,))
    monkeypatch.setattr(roofline, "SECONDS", 0.01)
    monkeypatch.setattr(roofline, "measure_machine", lambda: Machine(100.0, 1.0, ((256.0, 8.0),)))
    threads = torch.get_num_threads()
    roofline.read.cache_clear()
    try:
        roofline.run()
        first = (tmp_path / "roofline.json").read_bytes()
        roofline.run()
        assert (tmp_path / "roofline.json").read_bytes() == first
        monkeypatch.setattr(roofline, "WIDTHS", (8, 16))
        monkeypatch.setattr(roofline, "read_speed", lambda width, call: 3.0)
        kept = dict(roofline.read()[1])
        roofline.run()
        machine, times = roofline.read()
        assert machine.bandwidths == ((256.0, 8.0), (1024.0, 3.0))
        assert times.items() >= kept.items()
        assert {width for _, width, _, _ in times} == {8, 16}
    finally:
        torch.set_num_threads(threads)
        roofline.read.cache_clear()
