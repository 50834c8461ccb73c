"""The book's pictures: small functions that draw what they are given and compute nothing.

Each takes `ax=None` (a new figure) and returns the axes it drew on. Arrays may be NumPy's or PyTorch's.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

# Okabe and Ito's colors, one per method through the whole book; grays for the baselines.
COLORS = {
    "single": "#000000",
    "single, temperature": "#4d4d4d",
    "wide": "#767676",
    "deep ensemble": "#0072B2",
    "BatchEnsemble": "#D55E00",
    "snapshot": "#009E73",
    "SWAG": "#CC79A7",
    "MIMO": "#E69F00",
    "hyper": "#56B4E9",
    "narrow": "#8c6d31",
    "MC dropout": "#6b4c9a",
    "Laplace": "#a3352c",
    "TabM": "#b8336a",
    "gradient boosting": "#5b7f2b",
}

# Three lines without hue are told apart by their dashes; every other method is solid.
STYLES = {"single": "-", "single, temperature": "--", "wide": ":"}


def use_style() -> None:
    """Apply the book's style (`effens.mplstyle`) to every figure drawn from here on."""
    plt.style.use(Path(__file__).with_name("effens.mplstyle"))


def regression_band(
    x: Any,
    mean: Any,
    std: Any,
    *,
    members: Any = None,
    data: Any = None,
    truth: Any = None,
    color: str = COLORS["deep ensemble"],
    ax: Axes | None = None,
) -> Axes:
    """Draw a predictive mean, its 95% band (1.96 standard deviations) and what lies behind them.

    Args:
        x: inputs in increasing order, (n,).
        mean: predictive mean, (n,).
        std: total predictive standard deviation, (n,).
        members: each member's mean as a thin line, (members, n).
        data: training points as a pair (x, y).
        truth: the function that made the data as a dashed line, (n,).
        color: of the mean, the band and the members.
        ax: axes to draw on.
    """
    ax = _axes(ax)
    x, mean, std = _line(x, "x"), _line(mean, "mean"), _line(std, "std")
    ax.fill_between(x, mean - 1.96 * std, mean + 1.96 * std, color=color, alpha=0.18, linewidth=0, label="95%")
    if members is not None:
        ax.plot(x, _array(members).T, color=color, alpha=0.55, linewidth=0.8)
    if truth is not None:
        ax.plot(x, _line(truth, "truth"), color="0.35", linestyle="--", linewidth=1.2, label="truth")
    ax.plot(x, mean, color=color, label="mean")
    if data is not None:
        ax.plot(_line(data[0], "data[0]"), _line(data[1], "data[1]"), "o", color="black", markersize=3.5, label="data")
    return ax


def class_bars(probs: Any, *, color: str = COLORS["deep ensemble"], ax: Axes | None = None) -> Axes:
    """Draw one input's class probabilities: a bar for the mean of the members, a dot for each member.

    Args:
        probs: (members, classes).
        color: of bars and dots.
        ax: axes to draw on.
    """
    ax = _axes(ax)
    probs = _array(probs)
    if probs.ndim != 2:
        raise ValueError(f"probs must be (members, classes), got shape {probs.shape}")
    members, classes = probs.shape
    ax.bar(range(classes), probs.mean(0), width=0.8, color=color, alpha=0.35)
    offsets = np.linspace(-0.25, 0.25, members) if members > 1 else np.zeros(1)  # side by side, not on top
    ax.plot(np.arange(classes) + offsets[:, None], probs, "o", color=color, markersize=3, clip_on=False)
    ax.set(xticks=range(classes), xlabel="class", ylabel="probability", ylim=(0, 1.03))
    return ax


def digit_row(images: Any, titles: Sequence[object] | None = None, *, axes: Any = None) -> Any:
    """Draw gray images side by side, dark on white.

    Args:
        images: (n, height, width) or (n, 1, height, width); one scale of gray for all.
        titles: a line above each image.
        axes: n axes to draw on; a new row when None.

    Returns:
        The n axes.
    """
    images = _array(images)
    if images.ndim == 4 and images.shape[1] == 1:
        images = images[:, 0]
    if images.ndim != 3 or not len(images):
        raise ValueError(f"images must be (n, height, width) with n >= 1, got shape {images.shape}")
    n = len(images)
    titles = [""] * n if titles is None else titles
    if axes is None:
        width = plt.rcParams["figure.figsize"][0]
        axes = plt.subplots(1, n, figsize=(width, min(width / n + 0.2, 3)), squeeze=False)[1]
    axes = np.ravel(axes)
    if not len(axes) == len(titles) == n:
        raise ValueError(f"images, titles and axes must be equally many, got {n}, {len(titles)} and {len(axes)}")
    for ax, image, title in zip(axes, images, titles, strict=True):
        ax.imshow(image, cmap="gray_r", vmin=images.min(), vmax=images.max())
        ax.set_title(title, loc="center", fontsize=10)
        ax.set_axis_off()
    return axes


def plane(points: Mapping[str, Any], *, ax: Axes | None = None) -> Axes:
    """Draw methods in the plane (members' loss, diversity gain): good, or different?

    The gray lines join points of equal loss of the ensemble, nll = member_nll - diversity_gain: better is up and left.

    Args:
        points: a method's name to its (member_nll, diversity_gain) in nats, (2,), or to a path of such points
            (k, 2), whose last one is marked and labeled.
        ax: axes to draw on.
    """
    ax = _axes(ax)
    paths = {name: np.atleast_2d(_array(path)) for name, path in points.items()}
    if not paths or any(path.ndim != 2 or path.shape[1] != 2 for path in paths.values()):
        shapes = {name: path.shape for name, path in paths.items()}
        raise ValueError(f"points must give each name (member_nll, diversity_gain), got shapes {shapes}")
    lines = {
        name: ax.plot(*path.T, STYLES.get(name, "-"), marker="o", markevery=[-1], color=COLORS.get(name, "black"))
        for name, path in paths.items()
    }
    ax.margins(0.3, 0.2)  # room for the labels
    ax.set(xlabel="members' loss (nats)", ylabel="diversity gain (nats)")
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    for nll in MaxNLocator(7).tick_values(left - high, right - low):
        x, y = min(right, nll + high), min(high, right - nll)  # where the line leaves the frame
        if left < x and low < y:
            ax.axline((nll, 0), slope=1, color="0.88", linewidth=1, zorder=0)
            ax.annotate(f"nll {nll:g}", (x, y), (2, 2), textcoords="offset points", color="0.45", fontsize=8)
    ax.set(xlim=(left, right), ylim=(low, high))
    for name, (line,) in lines.items():
        label_end(ax, line, name)
    return ax


def curve_in_m(
    ms: Any,
    mean: Any,
    low: Any = None,
    high: Any = None,
    *,
    label: str,
    color: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a score against the number of members, with its interval and its label at the line's end.

    Args:
        ms: numbers of members, (n,).
        mean: the score, (n,).
        low: lower end of its interval, (n,).
        high: upper end of it, (n,).
        label: written at the end; a name in `COLORS` brings its color and dashes.
        color: instead of that one.
        ax: axes to draw on.
    """
    ax = _axes(ax)
    ms = _line(ms, "ms")
    color = color or COLORS.get(label, "black")
    if (low is None) != (high is None):
        raise ValueError(f"low and high go together, got low={low!r} and high={high!r}")
    if low is not None:
        ax.fill_between(ms, _line(low, "low"), _line(high, "high"), color=color, alpha=0.18, linewidth=0)
    (line,) = ax.plot(ms, _line(mean, "mean"), color=color, linestyle=STYLES.get(label, "-"))
    ax.set_xlabel("members")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    label_end(ax, line, label)
    return ax


def label_end(ax: Axes, line: Line2D, text: str) -> Axes:
    """Write `text` after the last point of `line`, in its color; labels that would meet move down.

    Set the axes' limits first: labels are kept apart at the limits of the moment.
    """
    end = (np.asarray(line.get_xdata())[-1], np.asarray(line.get_ydata())[-1])
    ax.annotate(
        text,
        end,
        (7, 0),
        textcoords="offset points",
        color=line.get_color(),
        fontsize=10,
        va="center",
        gid="end label",
        annotation_clip=False,
    )
    labels = [label for label in ax.texts if isinstance(label, Annotation) and label.get_gid() == "end label"]
    ends = ax.transData.transform([label.xy for label in labels])
    taken: list[Bbox] = []
    for i in np.argsort(-ends[:, 1]):  # from the top, so that labels keep the order of their lines
        labels[i].set_position((7, 0))
        while _meets(box := labels[i].get_window_extent(), taken, ends):
            labels[i].set_position((7, labels[i].get_position()[1] - 2))
        taken.append(box)
    return ax


def _meets(box: Bbox, taken: Sequence[Bbox], points: np.ndarray) -> bool:
    return any(box.overlaps(other) for other in taken) or any(box.contains(*point) for point in points)


def _axes(ax: Axes | None) -> Axes:
    return plt.subplots()[1] if ax is None else ax


def _array(values: Any) -> np.ndarray:
    """NumPy's view of an array, a list or a tensor on any device."""
    array: np.ndarray = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    return array


def _line(values: Any, name: str) -> np.ndarray:
    line = _array(values)
    if line.ndim != 1 or not line.size:
        raise ValueError(f"{name} must have one axis and at least one value, got shape {line.shape}")
    return line
