"""The book's one address: what derives from it agrees, and one command moves all of it to a fork."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

import effens
from effens_book.address import ROOT, citations, colab, dress, install, minutes, project, small_packages, url
from effens_book.rerun import chapters, note_time

CHAPTERS = chapters()


def test_a_chapter_says_what_derives_from_the_address(chapter: Path, notebook: Any) -> None:
    stored = json.dumps(notebook, sort_keys=True)
    dress(notebook, chapter)
    assert stored == json.dumps(notebook, sort_keys=True), "run `python -m effens_book.address`"


def test_what_was_written_by_hand_is_dressed_at_once(chapter: Path, notebook: Any) -> None:
    notebook.cells.append(nbformat.v4.new_markdown_cell(100 * "{cite}`gal2016dropout` ", id="written-by-hand"))
    dress(notebook, chapter)
    once = json.dumps(notebook, sort_keys=True)
    dress(notebook, chapter)
    assert json.dumps(notebook, sort_keys=True) == once


def test_the_install_cell_does_nothing_where_the_package_is(
    chapter: Path, notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands before the first import; `get_ipython` of its magics is not even there to be called."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code[0].source == install(chapter)
    assert notebook.cells[1] is code[0]
    monkeypatch.chdir(tmp_path)
    path = sys.path.copy()
    exec(TransformerManager().transform_cell(install(chapter)), {})
    assert sys.path == path
    assert list(tmp_path.iterdir()) == []


def test_the_install_cell_takes_the_release_and_leaves_torch_and_numpy(chapter: Path) -> None:
    """That it works is tested by running it, in `test_colab.py`."""
    source = install(chapter)
    first, *rest = [line.strip() for line in source.splitlines() if "%pip" in line]
    assert f'source = "{url()}"' in source
    assert f"v{effens.__version__}" in source
    assert project()["version"] == effens.__version__
    assert first == "%pip install --quiet --no-deps ./effens-book"
    assert [name for name in ("torch", "numpy", "effens") for line in rest if re.search(rf'"{name}\b', line)] == []
    assert all(f'"{package}"' in rest[0] for package in small_packages(chapter))


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ([], {}),
        (["approx", "remove-cell"], {}),
        (["hide-input"], {"cellView": "form", "jupyter": {"source_hidden": True}}),
        (["remove-input"], {"cellView": "form", "jupyter": {"source_hidden": True}}),
        (["hide-output"], {"collapsed": True, "jupyter": {"outputs_hidden": True}}),
        (
            ["hide-cell"],
            {"cellView": "form", "collapsed": True, "jupyter": {"source_hidden": True, "outputs_hidden": True}},
        ),
    ],
)
def test_tags_fold_a_cell_in_other_notebooks_too(tags: list[str], expected: dict[str, Any]) -> None:
    """Written again, a cell has what its tags say and nothing of what they said before."""
    cell = nbformat.v4.new_code_cell(metadata={"tags": ["hide-cell"], "mystnb": {"image": {}}, "scrolled": True})
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A chapter"), cell])
    dress(notebook, CHAPTERS[0])
    cell.metadata["tags"] = tags
    dress(notebook, CHAPTERS[0])
    assert cell.metadata == {"tags": tags, "mystnb": {"image": {}}} | expected


def test_the_badge_is_an_image_of_the_book(chapter: Path, notebook: Any) -> None:
    assert f"[![Open in Colab](_static/colab.svg)]({colab(chapter)})" in notebook.cells[0].source
    assert (ROOT / "chapters/_static/colab.svg").exists()


@pytest.mark.parametrize(
    ("typed", "linked"),
    [
        ("a {cite}`gal2016dropout`.", "a ([Gal and Ghahramani, 2016](https://arxiv.org/abs/1506.02142))."),
        ("{cite:t}`gibbs2021adaptive`", "[Gibbs and Candès (2021)](https://arxiv.org/abs/2106.00170)"),
        ("{cite:t}`lopezdeprado2018advances`", "López de Prado (2018)"),
        (
            "{cite}`corsi2009har, wen2020batchensemble`",
            "([Corsi, 2009](https://doi.org/10.1093/jjfinec/nbp001), "
            "[Wen et al., 2020](https://arxiv.org/abs/2002.06715))",
        ),
    ],
)
def test_citations_become_links_that_read_well_everywhere(typed: str, linked: str) -> None:
    assert citations(typed) == linked
    assert citations(linked) == linked


def test_a_chapter_s_time_is_written_where_it_says_it(tmp_path: Path) -> None:
    chapter = Path(shutil.copy(CHAPTERS[0], tmp_path))
    note_time(chapter, 41.2)
    before, after = (nbformat.read(path, as_version=4).cells for path in (CHAPTERS[0], chapter))
    assert "runs in about 45 seconds on two CPU cores" in after[0].source
    assert before[1:] == after[1:]


def test_the_time_to_read_counts_prose_alone(notebook: Any) -> None:
    words = minutes(notebook)
    notebook.cells.append(nbformat.v4.new_markdown_cell("$$\n" + 4000 * "x " + "\n$$\n\n|" + 4000 * " x" + " |"))
    assert minutes(notebook) == words
    notebook.cells.append(nbformat.v4.new_markdown_cell(2000 * "word "))
    assert minutes(notebook) == words + 10
