"""How the tests run the chapters: the same environment as their stored outputs, text compared and pictures not."""

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import nbformat
import pytest
from nbval.plugin import IPyNbCell, IPyNbFile
from rerun import ENVIRONMENT, chapters

ROOT = Path(__file__).parent


# Workers of `pytest -n 2` share the cores: threads beside them would mostly wait for one another. Before torch starts.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    config.option.nbval_sanitize_with = str(ROOT / "tests/nbval_sanitize.cfg")


def pytest_collectstart(collector: pytest.Collector) -> None:
    if isinstance(collector, IPyNbFile):
        collector.skip_compare += ("image/svg+xml", "stderr")  # nbval itself skips png, jpeg and widgets


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
