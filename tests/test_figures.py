"""The pictures draw what they are given: where lines, bands, bars and labels stand is checked, not how they look."""

import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.lines import AxLine

from effens_book import figures

X = np.linspace(-1, 1, 5)
MEAN = X**2
STD = np.full(5, 0.5)


@pytest.fixture(autouse=True)
def _own_figures() -> Iterator[None]:
    with mpl.rc_context():
        yield
    plt.close("all")


def end_labels(ax: Any) -> dict[str, Any]:
    ax.get_figure(root=True).draw_without_rendering()
    return {text.get_text(): text for text in ax.texts if text.get_gid() == "end label"}


def test_every_method_has_its_own_color() -> None:
    methods = {"single", "deep ensemble", "BatchEnsemble", "snapshot", "SWAG", "MIMO", "hyper", "TabM"}
    baselines = {"single, temperature", "wide", "narrow", "MC dropout", "Laplace", "gradient boosting"}
    assert methods | baselines == set(figures.COLORS)
    assert len({to_rgb(color) for color in figures.COLORS.values()}) == len(figures.COLORS)


def test_lines_without_hue_differ_in_their_dashes() -> None:
    gray = [name for name, color in figures.COLORS.items() if len(set(to_rgb(color))) == 1]
    assert len(gray) == 3
    assert len({figures.STYLES[name] for name in gray}) == 3


def test_importing_changes_no_setting_and_use_style_does() -> None:
    code = """
import matplotlib as mpl
before = dict(mpl.rcParams)
from effens_book import figures
assert dict(mpl.rcParams) == before
figures.use_style()
assert not mpl.rcParams["axes.spines.top"] and not mpl.rcParams["axes.grid"]
assert mpl.rcParams["figure.facecolor"] == mpl.rcParams["axes.facecolor"] == "white"
colors = list(figures.COLORS.values())
cycle = [mpl.colors.to_hex(color).upper() for color in mpl.rcParams["axes.prop_cycle"].by_key()["color"]]
assert cycle == colors[3:9]
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_band_is_mean_plus_and_minus_1_96_standard_deviations() -> None:
    ax = figures.regression_band(X, MEAN, STD)
    (band,) = ax.collections
    vertices = np.asarray(band.get_paths()[0].vertices)
    corners = {(round(x, 9), round(y, 9)) for x, y in vertices}
    expected = {
        (round(x, 9), round(m + sign * 1.96 * 0.5, 9)) for x, m in zip(X, MEAN, strict=True) for sign in (1, -1)
    }
    assert corners == expected


def test_band_shows_members_truth_and_data_on_the_axes_it_is_given() -> None:
    fig, (left, right) = plt.subplots(1, 2)
    members = np.stack([MEAN + 1, MEAN - 1, MEAN])
    ax = figures.regression_band(X, MEAN, STD, members=members, data=(X[:2], MEAN[:2]), truth=X, ax=right)
    assert ax is right
    assert not left.lines
    assert plt.get_fignums() == [fig.number]
    drawn = [line.get_ydata() for line in ax.lines]
    assert [list(y) for y in drawn] == [list(y) for y in (*members, X, MEAN, MEAN[:2])]


def test_torch_tensors_draw_the_same_as_arrays() -> None:
    tensors = [torch.tensor(a, requires_grad=True) for a in (X, MEAN, STD)]
    one, two = figures.regression_band(*tensors), figures.regression_band(X, MEAN, STD)
    assert np.array_equal(one.lines[0].get_xydata(), two.lines[0].get_xydata())


def test_band_refuses_the_wrong_rank() -> None:
    with pytest.raises(ValueError, match=r"mean must have one axis and at least one value, got shape \(1, 5\)"):
        figures.regression_band(X, MEAN[None], STD)
    with pytest.raises(ValueError, match=r"ms must have one axis and at least one value, got shape \(0,\)"):
        figures.curve_in_m([], [], label="single")


@pytest.mark.parametrize("members", [1, 4])
def test_class_bars_show_the_mean_and_every_member(members: int) -> None:
    probs = torch.softmax(torch.randn(members, 10, generator=torch.Generator().manual_seed(0)), -1)
    ax = figures.class_bars(probs)
    bars: Any = ax.patches
    assert [bar.get_height() for bar in bars] == pytest.approx(probs.mean(0).tolist())
    dots = np.array([line.get_ydata() for line in ax.lines])  # one line a class
    assert np.array_equal(dots, probs.numpy().T)
    nearest = np.round([np.asarray(line.get_xdata()) for line in ax.lines])
    assert np.array_equal(nearest, np.arange(10.0)[:, None].repeat(members, 1))


def test_class_bars_refuse_a_batch() -> None:
    with pytest.raises(ValueError, match=r"probs must be \(members, classes\), got shape \(3, 2, 10\)"):
        figures.class_bars(np.ones((3, 2, 10)))


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 1, 8, 8)])
def test_digit_row_shows_one_image_per_axes_with_its_title(shape: tuple[int, ...]) -> None:
    images = torch.arange(3 * 64.0).reshape(shape)
    axes = figures.digit_row(images, titles=[7, 1, "?"])
    assert [ax.get_title() for ax in axes] == ["7", "1", "?"]
    assert all(np.array_equal(ax.images[0].get_array(), images.reshape(3, 8, 8)[i]) for i, ax in enumerate(axes))
    assert {ax.images[0].get_clim() for ax in axes} == {(0.0, 191.0)}


def test_digit_row_draws_on_given_axes_and_counts_them() -> None:
    _, axes = plt.subplots(1, 2)
    assert list(figures.digit_row(np.ones((2, 4, 4)), axes=axes)) == list(axes)
    with pytest.raises(ValueError, match="equally many, got 3, 3 and 2"):
        figures.digit_row(np.ones((3, 4, 4)), axes=axes)
    with pytest.raises(ValueError, match=r"n >= 1, got shape \(0, 4, 4\)"):
        figures.digit_row(np.ones((0, 4, 4)))


POINTS = {
    "single": (0.20, 0.0),
    "deep ensemble": [(0.20, 0.0), (0.205, 0.03), (0.21, 0.05)],
    "SWAG": torch.tensor([0.19, 0.01]),
}


def test_plane_labels_the_end_of_each_path_in_its_color() -> None:
    ax = figures.plane(POINTS)
    labels = end_labels(ax)
    assert set(labels) == set(POINTS)
    assert labels["deep ensemble"].xy == (0.21, 0.05)
    assert labels["deep ensemble"].get_color() == figures.COLORS["deep ensemble"]


def test_plane_joins_points_of_equal_loss() -> None:
    ax = figures.plane(POINTS)
    written: list[Any] = [text for text in ax.texts if text.get_gid() != "end label"]
    lines = [line for line in ax.lines if isinstance(line, AxLine)]
    assert len(lines) == len(written) >= 2
    for line, text in zip(lines, written, strict=True):
        (member_nll, gain), nll = text.xy, float(text.get_text().removeprefix("nll "))
        assert member_nll - gain == pytest.approx(nll)
        assert line.get_slope() == 1
        assert line.get_xy1() == pytest.approx((nll, 0))


@pytest.mark.parametrize("points", [{}, {"single": 0.2}, {"single": np.ones((2, 3))}])
def test_plane_refuses_anything_but_pairs(points: Any) -> None:
    with pytest.raises(ValueError, match=r"points must give each name \(member_nll, diversity_gain\)"):
        figures.plane(points)


def test_curve_in_m_shows_interval_color_and_label() -> None:
    ms = torch.arange(1, 6)
    ax = figures.curve_in_m(ms, 1 / ms, 0.9 / ms, 1.1 / ms, label="wide")
    (line,) = ax.lines
    assert line.get_color() == figures.COLORS["wide"]
    assert line.get_linestyle() == figures.STYLES["wide"]
    assert end_labels(ax)["wide"].xy == pytest.approx((5, 0.2))
    low, high = ax.collections[0].get_datalim(ax.transData).intervaly
    assert (low, high) == pytest.approx((0.9 / 5, 1.1))


def test_curve_in_m_refuses_half_an_interval() -> None:
    with pytest.raises(ValueError, match="low and high go together"):
        figures.curve_in_m([1, 2], [1, 2], low=[0, 1], label="single")


def test_end_labels_keep_apart_and_in_the_order_of_their_lines() -> None:
    _, ax = plt.subplots()
    ax.set(xlim=(1, 20), ylim=(0, 1))
    heights = {"MIMO": 0.5, "SWAG": 0.502, "hyper": 0.498, "snapshot": 0.9, "wide": 0.501}
    for name, height in heights.items():
        figures.curve_in_m([1, 20], [0.5, height], label=name, ax=ax)
    labels = end_labels(ax)
    boxes = [labels[name].get_window_extent() for name in sorted(heights, key=lambda name: heights[name])]
    assert all(low.y1 <= high.y0 for low, high in pairwise(boxes))
    assert boxes[-1].y0 < ax.transData.transform((20, 0.9))[1] < boxes[-1].y1  # a label with room stays at its line
