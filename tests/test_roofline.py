"""The roofline: its arithmetic by hand, and what the book's machine measured."""

import math

import pytest
import torch

from effens import ledger, roofline
from effens.roofline import Machine

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


def test_a_machine_is_measured() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = roofline.measured()
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
    monkeypatch.setattr(ledger, "BANK", tmp_path)
    roofline.read.cache_clear()
    try:
        with pytest.raises(FileNotFoundError, match="the bank must hold the roofline, got none: run python -m"):
            roofline.read()
    finally:
        roofline.read.cache_clear()
