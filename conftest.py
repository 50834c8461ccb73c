"""How the tests run the chapters: the same environment as their stored outputs, text compared and pictures not."""

import math
import os
import re
from collections.abc import Generator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import nbformat
import pytest
from nbval.plugin import IPyNbCell, IPyNbFile

from effens_book.rerun import ENVIRONMENT, chapters

ROOT = Path(__file__).parent


# Tests start other Pythons: these find the book's modules, too.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT / "chapters"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
)

# Workers of `pytest -n 2` share the cores: threads beside them would mostly wait for one another. Before torch starts.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    config.option.nbval_sanitize_with = str(ROOT / "tests/nbval_sanitize.cfg")


def pytest_collectstart(collector: pytest.Collector) -> None:
    if isinstance(collector, IPyNbFile):
        collector.skip_compare += ("image/svg+xml", "stderr")  # nbval itself skips png, jpeg and widgets


# What a cell tagged `approx` need not print alike: numbers with a decimal point or an exponent, outside HTML tags.
NUMBER = r"(?<![\w.])[-+−]?(?:(?:\d[\d,]*)?\.\d+(?:e[-+]?\d+)?|\d+e[-+]?\d+)(?!\.?\d)|\bnan\b"
TOKEN = re.compile(rf"(?P<tag><(style|script)\b.*?</\2>|</?[a-z!][^<>]*>)|(?P<number>{NUMBER})", re.I | re.S)


class Near(str):
    """A text that equals another of the same words if its numbers are near: by this share of them, or by .02."""

    share = 0.05

    def __eq__(self, other: object) -> bool:
        (words, numbers), (others, stored) = self.read(self), self.read(str(other))
        near = [math.isclose(*pair, rel_tol=self.share, abs_tol=0.02) for pair in zip(numbers, stored, strict=False)]
        return words == others and len(numbers) == len(stored) and all(near)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__

    @staticmethod
    def read(text: str) -> tuple[str, list[float]]:
        """The words, blanks counted once as columns of numbers grow and shrink, and the numbers."""
        words = TOKEN.sub(lambda token: token["tag"] or " # ", text)
        numbers = [token["number"] for token in TOKEN.finditer(text) if token["number"]]
        return re.sub("[ \t]+", " ", words), [float(n.replace(",", "").replace("−", "-")) for n in numbers]


def sanitize(cell: IPyNbCell, text: Any, exact: Any = IPyNbCell.sanitize) -> Any:
    """What nbval compares: the tag `approx`, or `approx-0.1` for another share, says that numbers need only be near."""
    text = exact(cell, text)
    for tag in cell.cell.metadata.get("tags", []):
        if isinstance(text, str) and (found := re.fullmatch(r"approx(?:-([\d.]+))?", tag)):
            text = Near(text)
            text.share = float(found[1] or Near.share)
    return text


IPyNbCell.sanitize = sanitize


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A cell tagged `needs-distributed` is skipped where there is no such package, `weights` where there are none."""
    for item in items:
        for tag in item.cell.metadata.get("tags", []) if isinstance(item, IPyNbCell) else []:
            if tag == "weights":
                from effens_book.minilm import weights_path  # here, for it imports torch, before which threads are set

                if weights_path() is not None:
                    continue
                item.add_marker(pytest.mark.skip(reason="EFFENS_WEIGHTS names no file"))
            if tag.startswith("needs-") and not find_spec(package := tag.removeprefix("needs-")):
                item.add_marker(pytest.mark.skip(reason=f"needs the package {package}"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None]:
    """A chapter's kernel starts in its first cell's setup; tests marked `gpu` must still see the GPU."""
    with patch.dict(os.environ, ENVIRONMENT if isinstance(item, IPyNbCell) else {}):
        yield


@pytest.fixture(params=chapters(), ids=lambda chapter: chapter.stem)
def chapter(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


@pytest.fixture
def notebook(chapter: Path) -> Any:
    return nbformat.read(chapter, as_version=4)
