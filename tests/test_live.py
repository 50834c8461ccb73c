"""The chapters' cells with sliders: each trains again for any value of its sliders, and on a reader's own points."""

import ast
import builtins
import re
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch

from effens_book.address import ROOT

METHODS = ["deep_ensembles", "batch_ensemble", "snapshot_ensembles", "swag", "mimo", "hyper_ensembles"]
NAMES = ["introduction", *METHODS]
SECONDS = 5  # that a reader waits on two cores; here one thread's, which other processes do not lengthen
MODULES = {"torch", "nn", "plt", "effens", "ipywidgets", "functools"}


def cell(chapter: str, name: str) -> Any:
    cells = nbformat.read(ROOT / f"chapters/{chapter}.ipynb", as_version=4).cells
    return next(cell for cell in cells if cell.id == name)


def steps(low: float, high: float, step: float = 1) -> list[float]:
    """The values of a slider that was given by its ends."""
    return [low + i * step for i in range(round((high - low) / step) + 1)]


class Reader:
    """A reader with a kernel who ran a chapter's imports, one cell ``before`` if need be, and its cell with sliders."""

    def __init__(self, chapter: str, own: bool = False, before: str | None = None) -> None:
        cells = nbformat.read(ROOT / f"chapters/{chapter}.ipynb", as_version=4).cells
        imports = next(cell.source for cell in cells if cell.cell_type == "code" and "import effens\n" in cell.source)
        self.scope: dict[str, Any] = {}
        exec(imports, self.scope)
        self.scope["device"] = torch.device("cpu")
        if before:
            exec(cell(chapter, before).source, self.scope)
        self.sliders: dict[str, list[Any]] = {}
        source = cell(chapter, "live-retrain").source
        if own:  # points of the reader's in place of the cell's
            source = re.sub(r"(?m)^( *)x = .*$", r"\1x = torch.linspace(1, 4, 40)[:, None]", source, count=1)
            source = re.sub(r"(?m)^( *)y = .*$", r"\1y = 3 + x[:, 0] / 4", source, count=1)
        self.scope["interact"] = self.interact
        with patch("ipywidgets.interact", self.interact):
            exec(source, self.scope)

    def interact(self, function: Callable[..., None], **sliders: Any) -> None:
        self.retrain = function
        self.sliders = {
            name: steps(*values) if isinstance(values, tuple) else values for name, values in sliders.items()
        }

    def see(self, **values: Any) -> tuple[bytes, list[float]]:
        """The picture that the sliders' values give, and the numbers in its title."""
        plt.close("all")
        self.retrain(**values)
        ax = plt.gca()
        numbers = [float(number) for number in re.findall(r"\d+\.\d+", ax.get_title() or ax.get_title(loc="left"))]
        ax.figure.canvas.draw()
        return bytes(ax.figure.canvas.buffer_rgba()), numbers  # type: ignore[attr-defined]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def reader(name: str) -> Iterator[Reader]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with plt.rc_context(), plt.ioff():
        yield Reader(name)
    torch.set_num_threads(threads)
    plt.close("all")


def test_a_cell_with_sliders_is_short_in_sight_and_needs_nothing_else(name: str) -> None:
    live = cell(name, "live-retrain")
    assert set(live.metadata.tags) == {"remove-output", "nbval-ignore-output"}  # in sight, with its stills in its place
    assert live.outputs == []
    assert sum(bool(line.strip()) for line in live.source.splitlines()) <= 20
    tree = ast.parse(live.source)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    own = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    own |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)} | {"retrain", "device", "interact"}
    own |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert used - own - MODULES - set(dir(builtins)) - {"partial"} == set()
    assert not re.search(r"effens_book|benchmark", live.source)
    assert "put your own" in live.source


def test_its_stills_stand_in_its_place(name: str) -> None:
    cells = nbformat.read(ROOT / f"chapters/{name}.ipynb", as_version=4).cells
    at = next(i for i, cell in enumerate(cells) if cell.id == "live-retrain")
    stills = cells[at + 1]
    assert stills.id == "live-stills"
    assert re.search(r"players\.stills\(\s*retrain", stills.source)
    assert "effens-player" in stills.outputs[0].data["text/html"]


def test_no_widget_is_stored_in_any_chapter(name: str) -> None:
    notebook = nbformat.read(ROOT / f"chapters/{name}.ipynb", as_version=4)
    kinds = {kind for cell in notebook.cells for output in cell.get("outputs", []) for kind in output.get("data", {})}
    assert not [kind for kind in kinds if "widget" in kind]
    assert "widgets" not in notebook.metadata


def test_sliders_start_within_their_values(reader: Reader) -> None:
    import inspect

    start = {key: parameter.default for key, parameter in inspect.signature(reader.retrain).parameters.items()}
    assert start.keys() == reader.sliders.keys()
    assert [key for key, value in start.items() if value not in reader.sliders[key]] == []


@pytest.mark.slow
def test_every_slider_changes_the_picture_in_time(reader: Reader) -> None:
    for slider, values in reader.sliders.items():
        some = {values[i] for i in (0, len(values) // 2, -1)}
        pictures = {reader.see(**{slider: value})[0] for value in some}
        assert len(pictures) == len(some), f"{slider} leaves the picture as it was"
    for corner in (0, -1):
        start = time.process_time()
        reader.see(**{slider: values[corner] for slider, values in reader.sliders.items()})
        assert time.process_time() - start < SECONDS


@pytest.mark.slow
def test_the_same_values_give_the_same_picture(reader: Reader) -> None:
    assert reader.see() == reader.see()


@pytest.mark.slow
def test_a_reader_s_own_points_are_drawn(name: str) -> None:
    with plt.rc_context(), plt.ioff():
        Reader(name, own=True).see()
        (bottom, top), (left, right) = plt.gca().get_ylim(), plt.gca().get_xlim()
        assert bottom < 3.25 < 4 < top
        assert left < 1 < 4 < right
        assert any(line.get_xydata().tolist()[-1] == [4, 4] for line in plt.gca().lines)  # type: ignore[union-attr]
        plt.close("all")


# What the sentences under the stills say, as inequalities of the numbers in the titles.
See = Callable[..., list[float]]
CLAIMS: dict[str, Callable[[See], list[bool]]] = {
    "introduction": lambda see: [
        see(width=8)[1] > 2 * see(width=64)[1],
        see(width=8)[0] < 0.1,
        see(members=1) == [0, 0],
        see(members=2)[1] > 5 * see(members=2)[0],
        abs(see(members=12)[1] - see(members=5)[1]) < 0.2,
    ],
    "batch_ensemble": lambda see: [
        see(start="ones") == [0, 0],
        all(see(start=start)[1] > 2 * see(start=start)[0] for start in ("normal", "signs")),
        see(fast_lr=0.0)[1] > 2 * see(fast_lr=0.0)[0] > 0,
    ],
    "snapshot_ensembles": lambda see: [
        see(cycles=1) == [0, 0],
        all(see(cycles=cycles)[1] > 4 * see(cycles=cycles)[0] for cycles in (3, 5, 10)),
        see(epochs=100)[1] < 2 * see(epochs=100)[0],
    ],
    "swag": lambda see: [
        all(see(tail_lr=lr)[1] < 1.5 * see(tail_lr=lr)[0] for lr in (0.1, 0.3, 1)),
        see(tail_lr=1)[0] > 4 * see(tail_lr=0.03)[0],
        see(rank=0)[0] < 0.7 * see()[0],
        min(see(scale=8)) > 2.5 * max(see()),
    ],
    "mimo": lambda see: [
        all(see(width=width)[0] > 0.05 for width in (8, 16, 32)),
        all(see(width=width)[0] < 0.03 for width in (64, 128)),
        max(see(share=1.0)) < 0.05,
    ],
    "hyper_ensembles": lambda see: [
        see(dropout=0.5)[0] > 1.5 * see(dropout=0.0)[0],
        see(dropout=0.5)[1] > 1.8 * see(dropout=0.0)[1],
    ],
    "tabm": lambda see: [
        see(members=2)[0] > see(members=8)[0] > see(members=32)[0],
        see(members=2)[1] - see(members=8)[1] > 5 * abs(see(members=16)[1] - see(members=32)[1]),
    ],
}
DATA = {"tabm": "flights"}  # the cell that a chapter's sliders take their data from


@pytest.mark.slow
@pytest.mark.parametrize("chapter", CLAIMS)
def test_a_reader_sees_what_the_sentences_say(chapter: str) -> None:
    reader = Reader(chapter, before=DATA.get(chapter))
    claims = CLAIMS[chapter](lambda **values: reader.see(**values)[1])
    assert claims == [True] * len(claims)
