"""Make `fashion.npz`: ``python -m effens_book.data.make_fashion FOLDER``, the folder of Fashion-MNIST's four files.

They are those of https://github.com/zalandoresearch/fashion-mnist, which Debian's package dataset-fashion-mnist ships.
"""

import gzip
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effens_book.benchmark.packing import write_arrays
from effens_book.data.make import pool

SPLITS = {"train": 10_000, "val": 5_000, "test": 10_000}
SEED = 20  # another than the pilot's, which looked at other test images


def read(path: Path, header: int) -> NDArray[np.uint8]:
    """Return the bytes of one of the four files."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


def fashion(folder: Path) -> dict[str, NDArray[Any]]:
    """Split all 70,000 images, class by class, by one seeded permutation; the official test images are among them."""
    parts = [(f"{name}-images-idx3-ubyte.gz", f"{name}-labels-idx1-ubyte.gz") for name in ("train", "t10k")]
    images = np.concatenate([read(folder / file, 16).reshape(-1, 28, 28) for file, _ in parts])
    labels = np.concatenate([read(folder / file, 8) for _, file in parts])
    generator = np.random.default_rng(SEED)
    shuffled = np.stack([generator.permutation(np.flatnonzero(labels == kind)) for kind in range(10)])  # (10, 7000)
    arrays: dict[str, NDArray[Any]] = {}
    start = 0
    for name, size in SPLITS.items():
        rows = generator.permutation(shuffled[:, start : start + size // 10].ravel())
        arrays |= {f"x_{name}": pool(images[rows]), f"y_{name}": labels[rows]}
        start += size // 10
    return arrays


if __name__ == "__main__":
    write_arrays(Path(__file__).with_name("fashion.npz"), fashion(Path(sys.argv[1])))
