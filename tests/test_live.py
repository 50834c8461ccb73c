"""The chapters' live cells: what is stored of them, and every slider moved as a reader with a kernel moves it."""

import ast
import re
import time
from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
import nbformat
import pytest
import torch
from rerun import ROOT

METHODS = ["deep_ensembles", "batch_ensemble", "snapshot_ensembles", "swag", "mimo", "hyper_ensembles"]
NAMES = [*METHODS, "introduction", "cost_comparison"]
SECONDS = 5  # that a reader waits on two cores; here one thread's, which other processes do not lengthen


def code(name: str) -> list[Any]:
    notebook = nbformat.read(ROOT / f"chapters/{name}.ipynb", as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def live_cell(name: str) -> Any:
    (cell,) = (cell for cell in code(name) if "players.live(" in cell.source)
    return cell


class Reader:
    """A reader with a kernel who ran a chapter's imports and its live cell, and nothing else."""

    def __init__(self, name: str) -> None:
        *body, last = ast.parse(live_cell(name).source).body
        assert isinstance(last, ast.Expr)
        scope: dict[str, Any] = {}
        exec(next(cell.source for cell in code(name) if "import effens" in cell.source), scope)
        exec(compile(ast.Module(body, []), name, "exec"), scope)
        box = eval(compile(ast.Expression(last.value), name, "eval"), scope)
        *self.sliders, self.picture, self.line = box.children
        self.start = [slider.value for slider in self.sliders]

    def move(self, slider: Any, value: Any) -> str:
        """Move one slider and wait."""
        start = time.process_time()
        slider.value = value
        seconds = time.process_time() - start
        assert seconds < SECONDS, f"{slider.description} {value} took {seconds:.1f} s"
        return self.look()

    def look(self) -> str:
        """The picture, without its words; the line under it tells of no error."""
        assert not re.search(r"Error|Warning|Computing|nan|inf\b", self.line.value), self.line.value
        (shown,) = re.findall(r'<img src="(data:image/png;base64,[^"]+)"', self.picture.value)
        return str(shown)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def reader(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    monkeypatch.delenv("EFFENS_STATIC", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with mpl.rc_context():
        yield Reader(name)
    torch.set_num_threads(threads)


def test_sliders_go_to_their_highest_values_one_after_the_other(reader: Reader) -> None:
    for slider in reader.sliders:
        before, start, highest = reader.look(), slider.value, slider.options[-1]
        assert (reader.move(slider, highest) == before) == (start == highest)


@pytest.mark.slow
def test_every_slider_moves_the_picture_in_time(reader: Reader) -> None:
    for slider in reader.sliders:
        start, values = slider.value, slider.options
        lowest, middle, highest = (reader.move(slider, values[i]) for i in (0, len(values) // 2, -1))
        assert len({lowest, middle, highest}) == 3, f"{slider.description} leaves the picture as it was"
        reader.move(slider, start)
    for corner in (-1, 0):
        for slider in reader.sliders:
            reader.move(slider, slider.options[corner])


@pytest.mark.slow
def test_the_same_values_give_the_same_picture(reader: Reader) -> None:
    slider, before = reader.sliders[0], reader.look()
    assert reader.move(slider, slider.options[0]) != before
    assert reader.move(slider, reader.start[0]) == before


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_live_cell_after_a_prediction(name: str) -> None:
    cells = nbformat.read(ROOT / f"chapters/{name}.ipynb", as_version=4).cells
    at = next(i for i, cell in enumerate(cells) if "players.live(" in cell.source)
    assert "redict" in cells[at - 1].source
    headings = [line for cell in cells[:at] for line in cell.source.splitlines() if line.startswith("## ")]
    assert headings[-1].startswith(("## See its uncertainty", "## The question"))


def test_a_live_cell_is_read_run_and_compared(name: str) -> None:
    assert not live_cell(name).metadata.get("tags")  # neither hidden nor exempt
    assert sum(bool(line.strip()) for line in live_cell(name).source.splitlines()) <= 15


def test_what_is_stored_needs_no_kernel(name: str) -> None:
    (output,) = live_cell(name).outputs
    assert set(output.data) == {"text/html", "text/plain"}
    page = output.data["text/html"]
    assert page.count("<img ") == 1
    assert "Run the imports and this cell in Colab" in page
    assert not re.search(r"<(script|input|button|select)|widget", page)
    assert not re.search(r"\d\.\d{3} ", page), "digits of a trained network"


def test_no_widget_is_stored_in_any_chapter(name: str) -> None:
    notebook = nbformat.read(ROOT / f"chapters/{name}.ipynb", as_version=4)
    kinds = {kind for cell in code(name) for output in cell.outputs for kind in output.get("data", {})}
    assert not [kind for kind in kinds if "widget" in kind]
    assert "widgets" not in notebook.metadata


# What a reader should have seen, as a hidden cell says it under each live cell of the curve with the gap.

Parts = tuple[float, ...]  # members' loss, diversity gain, NLL: on the data, then in the gap


def seen(reader: Reader, **values: Any) -> Parts:
    """The numbers under the picture with these values, and the sliders' first ones elsewhere."""
    for slider, start in zip(reader.sliders, reader.start, strict=True):
        slider.value = values.get(slider.description.replace(" ", "_"), start)
    numbers = re.findall(r"\u2212?-?\d+\.\d+", reader.line.value)
    return tuple(float(number) for number in numbers)


LIVE = {
    "introduction": lambda see: [
        see(width=8)[1] > 10 * see(width=128)[1],
        see(width=8)[0] > see(width=128)[0] + 0.1,
        abs(see(members=6)[2] - see(members=12)[2]) < 0.02,
    ],
    "deep_ensembles": lambda see: [
        abs(see(members=12)[5] - see()[5]) < 0.2,
        see(width=8)[4] > see()[4] > see(width=128)[4],
        see(activation="ReLU")[5] > 4 * see()[5],
        see(activation="Tanh")[5] > 4 * see()[5],
    ],
    "batch_ensemble": lambda see: [
        see(fast_rate=0.0)[1] > see()[1],
        see(fast_rate=0.0)[0] > see()[0],
        see(width=16)[4] > 10 * see(width=128)[4],
        see(width=16)[0] > see(width=128)[0] + 0.1,
        see(start="ones")[1] == see(start="ones")[4] == 0,
    ],
    "snapshot_ensembles": lambda see: [
        see(cycles=10)[4] > 2 * see(rate=0.03)[4],
        see(rate=0.1)[0] > 1,
        see(epochs=800)[1] < 0.2 * see()[1],
        see(epochs=800)[4] > 1,
    ],
    "swag": lambda see: [
        see(tail_rate=0.03)[1] < 0.03,
        see(tail_rate=0.03)[4] < 0.03,
        see(scale=8)[0] > see()[0] + 2,
        see(rank=0)[1] < 0.5 * see()[1],
        see(rank=0, scale=8)[1] < 0.5 * see(scale=8)[1],
    ],
    "mimo": lambda see: [
        see(width=32)[2] < see(width=16)[2] < see(width=8)[2] - 0.2,
        see(share=1.0)[1] < 0.002,
        see(share=1.0)[4] < 0.1 * see()[4],
    ],
    "hyper_ensembles": lambda see: [
        see(dropout=0.5)[1] > see(dropout=0.0)[1],
        see(dropout=0.5)[0] > see(dropout=0.0)[0] + 0.03,
        abs(see(candidates=12)[2] - see(candidates=3)[2]) < 0.02,
    ],
}


@pytest.mark.parametrize("chapter", LIVE)
def test_a_reader_sees_what_the_hidden_cell_says(chapter: str) -> None:
    reader = Reader(chapter)
    (cell,) = (cell for cell in code(chapter) if cell.id == "live-seen")
    assert cell.source.startswith("# What you should have seen.")
    claims = LIVE[chapter](lambda **values: seen(reader, **values))
    assert claims == [True] * len(claims)
