"""The book: what a chapter must hold, and proof that the comparison of its outputs catches a wrong number."""

import base64
import copy
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nbval.plugin import IPyNbCell, IPyNbFile

from effens_book.address import METADATA, ROOT, colab, folds
from effens_book.rerun import chapters, without_text

CHAPTERS = chapters()
PICTURE = re.compile(r"data:image/[^\"')\s]+")
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?")
# A number that a re-run may change: one with a unit of time. Written apart from the sanitizer, to check it.
TIMED = re.compile(r"\d[\d.]*(e[+-]?\d+)?\s?(ns|ms|µs|us|s|sec|min)\b")


@pytest.fixture
def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell: Any) -> set[str]:
    return set(cell.metadata.get("tags", []))


def strings(value: Any) -> Iterator[str]:
    """Every text inside a notebook, its stored pictures left out."""
    if isinstance(value, str):
        yield PICTURE.sub("", value)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in ("image/png", "image/jpeg"):
                yield from strings(item)


# What a chapter must hold


def test_every_chapter_of_the_table_of_contents_exists() -> None:
    names = re.findall(r"(?:root|file): (\S+)", (ROOT / "_toc.yml").read_text("utf-8"))
    assert [name for name in names if not list(ROOT.glob(f"{name}.*"))] == []
    assert len(CHAPTERS) == len(list((ROOT / "chapters").glob("*.ipynb"))), "a chapter is missing from _toc.yml"


def test_all_cells_ran_in_order(code: list[Any]) -> None:
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


def test_errors_are_only_stored_where_they_are_the_point(code: list[Any]) -> None:
    failed = [cell.id for cell in code if any(output.output_type == "error" for output in cell.outputs)]
    assert failed == [cell.id for cell in code if "raises-exception" in tags(cell)]


def test_no_cell_ends_in_a_semicolon(code: list[Any]) -> None:
    # nbval runs cells without history, and IPython then shows the value that the semicolon should have hidden.
    assert [cell.id for cell in code if cell.source.rstrip().endswith(";")] == []


def test_warnings_and_progress_bars_are_not_stored(code: list[Any]) -> None:
    assert [cell.id for cell in code for output in cell.outputs if output.get("name") == "stderr"] == []


def test_pictures_say_what_they_show(code: list[Any]) -> None:
    for cell in code:
        if any("image/png" in output.get("data", {}) for output in cell.outputs):
            alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
            assert len(alt.split()) >= 5, f"cell {cell.id} must have a sentence in mystnb.image.alt, got {alt!r}"
            assert not re.search(r"\.(png|svg|jpe?g)\b", alt)
    for picture in re.findall(r"<img[^>]*>", " ".join(strings([cell.outputs for cell in code]))):
        assert re.search(r'alt="[^"]*\w+ \w+', picture), picture


def test_nothing_of_the_machine_is_stored(notebook: Any) -> None:
    text = "\n".join(strings(notebook))
    assert re.findall(r"(?<![\w.:/])/(?:home|root|tmp|usr|var|mnt|opt|work|Users|private)/\S*", text) == []
    assert re.findall(r"[A-Z]:\\\\?Users\S*", text) == []
    assert re.findall(r"\d{4}-\d\d-\d\dT\d\d:\d\d", text) == [], "a time of day"
    assert re.findall(r"\b0x[0-9a-f]{8,}", text) == [], "an address"


def test_metadata_is_the_same_everywhere(notebook: Any) -> None:
    assert notebook.metadata == METADATA
    for cell in notebook.cells:
        others = {key: value for key, value in cell.metadata.items() if key not in ("tags", "mystnb")}
        assert others == folds(tags(cell)), f"cell {cell.id}: run `python -m effens_book.address`"


def test_pictures_do_not_tell_what_drew_them(code: list[Any]) -> None:
    for cell in code:
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                picture = base64.b64decode(output.data["image/png"])
                assert without_text(picture) == picture, cell.id


def test_cell_ids_are_stable_and_unique(notebook: Any) -> None:
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert [name for name in ids if not re.fullmatch(r"[a-z0-9][a-z0-9-]{2,39}", name)] == []


def test_a_line_of_code_fits_the_page(code: list[Any]) -> None:
    assert [(cell.id, line) for cell in code for line in cell.source.splitlines() if len(line) > 88] == []


def test_the_first_cell_opens_colab_and_says_the_time(chapter: Path, notebook: Any) -> None:
    assert f"[![Open in Colab](_static/colab.svg)]({colab(chapter)})" in notebook.cells[0].source
    times = re.search(
        r"· reads in about (\d+) minutes, runs in about (\d+) seconds on two CPU cores", notebook.cells[0].source
    )
    assert times
    assert 3 <= int(times[1]) <= 30
    assert int(times[2]) <= 50


def test_a_chapter_reads_well_where_there_is_no_sphinx(notebook: Any) -> None:
    """Roles, directives and labels are shown as they are typed in Jupyter and in Colab; links and quotes are not."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            assert re.findall(r"\{[\w:-]+\}`|^(?:```|:::+)\{.*|^\([\w-]+\)=$", cell.source, re.M) == [], cell.id


def test_exercises_have_folded_solutions(chapter: Path, notebook: Any) -> None:
    start = [cell.source.startswith("## Exercises") for cell in notebook.cells].index(True)
    solutions = [cell for cell in notebook.cells[start:] if "hide-cell" in tags(cell)]
    exercises = re.findall(r"^\*\*\d+\.\*\*", "\n".join(cell.source for cell in notebook.cells[start:]), re.M)
    assert len(solutions) >= len(exercises) >= 1
    for before, cell in itertools.pairwise(notebook.cells[start:]):
        if cell.cell_type == "markdown" and before in solutions:
            assert re.match(
                r'<details class="answer"><summary>Show the answer</summary>\n\n|\*\*\d+\.|## ', cell.source
            )


def test_no_picture_or_script_comes_from_elsewhere(notebook: Any) -> None:
    text = "\n".join(strings(notebook))
    assert re.findall(r"!\[[^\]]*\]\(\s*(?:https?:)?//[^)]*", text) == []
    assert re.findall(r"""<(?:img|script|iframe|link|source)[^>]*(?:src|href)=["']?(?:https?:)?//[^>]*""", text) == []


# The comparison of stored outputs


def cells_of(chapter: Path, session: pytest.Session) -> list[IPyNbCell]:
    """A chapter's code cells as `pytest` collects them, sanitizer and skipped kinds of output included."""
    file = IPyNbFile.from_parent(session, path=chapter)
    session.config.hook.pytest_collectstart(collector=file)
    file.setup_sanitize_files()
    return list(file.collect())


def compared(cells: list[IPyNbCell]) -> list[IPyNbCell]:
    return [cell for cell in cells if cell.options["check"] and not cell.options["skip"]]


def numbers(text: str) -> list[int]:
    """Where the numbers of a text stand, by their last digit, times and pictures left out."""
    masked = [range(*match.span()) for pattern in (PICTURE, TIMED) for match in pattern.finditer(text)]
    ends = [match.end() - 1 for match in NUMBER.finditer(text)]
    return [at for at in ends if not any(at in span for span in masked)]


def changed(text: str, at: int, cell: IPyNbCell) -> str:
    """The text with another digit at this place; where numbers need only be near, with a number that is not."""
    approx = [float(tag[7:] or 0.05) for tag in tags(cell.cell) if tag.startswith("approx")]
    if not approx:
        return text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]
    (number,) = [match for match in NUMBER.finditer(text) if match.end() == at + 1]
    value = float(number[0])
    return f"{text[: number.start()]}{value + max(0.03, 3 * approx[0] * value)}{text[number.end() :]}"


def lines_around(text: str, at: int) -> tuple[str, int]:
    """The line of this place with the two beside it, and the place in them: to compare all of a long text is slow."""
    start = text.rfind("\n", 0, max(0, text.rfind("\n", 0, at))) + 1
    end = text.find("\n", text.find("\n", at) + 1) if "\n" in text[at:] else -1
    return text[start : end if end > 0 else len(text)], at - start


def slots(outputs: list[Any]) -> list[tuple[dict[str, Any], str]]:
    """The compared texts of a cell's outputs, as (holder, key)."""
    streams = [(output, "text") for output in outputs if output.get("name") == "stdout"]
    kinds = ("text/plain", "text/html", "text/markdown", "text/latex")
    return streams + [(data, kind) for o in outputs for data in [o.get("data", {})] for kind in kinds if kind in data]


def test_at_most_one_cell_in_five_is_exempt(chapter: Path, request: pytest.FixtureRequest) -> None:
    cells = cells_of(chapter, request.session)
    assert len(compared(cells)) >= 0.8 * len(cells)


@pytest.mark.slow
def test_any_number_changed_in_a_stored_output_is_noticed(chapter: Path, request: pytest.FixtureRequest) -> None:
    printed = 0
    for cell in compared(cells_of(chapter, request.session)):
        stored = cell.cell.outputs
        assert cell.compare_outputs(copy.deepcopy(stored), copy.deepcopy(stored))
        for holder, key in slots(stored):
            for at in numbers(holder[key]):
                right, wrong = (
                    [copy.deepcopy(o) for o in stored if o is holder or o.get("data") is holder] for _ in "12"
                )
                part, place = lines_around(holder[key], at)
                slots(right)[0][0][key], slots(wrong)[0][0][key] = part, changed(part, place, cell)
                assert cell.compare_outputs(copy.deepcopy(right), copy.deepcopy(right))
                assert not cell.compare_outputs(right, wrong), holder[key][max(0, at - 40) : at + 20]
                printed += key in ("text", "text/plain")
    assert printed >= 10, "a chapter must print numbers that are compared"


@pytest.mark.parametrize(
    ("stored", "new", "same"),
    [
        ("took 3.25 s", "took 4.1 s", True),
        ("1e-5 s in 12ms", "2e-05 s in 9ms", True),
        ("<Net at 0x7f3a5c0012d0>", "<Net at 0x7f00000012d0>", True),
        ("lower in 5 of 5", "lower in 4 of 5", False),
        ("nll 0.41", "nll 0.42", False),
        ("5 members, 10 samples", "5 members, 11 samples", False),
        ("3 standard deviations", "2 standard deviations", False),
        ("1.1x the price", "1.2x the price", False),
        ("True", "False", False),
    ],
)
def test_the_sanitizer_masks_times_and_addresses_only(
    stored: str, new: str, same: bool, request: pytest.FixtureRequest
) -> None:
    cell = cells_of(CHAPTERS[0], request.session)[0]
    assert (cell.sanitize(stored) == cell.sanitize(new)) == same
