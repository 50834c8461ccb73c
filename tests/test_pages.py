"""The book's pages of text: their code runs, their tables are complete, what they name exists."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch
from urllib.parse import unquote

import nbformat
import pytest
import torch
from docutils import nodes
from docutils.utils import new_document
from PIL import Image
from pybtex.database import Entry, parse_file
from safetensors.torch import load_file

import effens
from effens_book import pages, theme
from effens_book.address import ROOT, link
from effens_book.benchmark import METHODS, TASKS, shipped
from effens_book.benchmark.results import names
from effens_book.rerun import chapters

PAGES = sorted((ROOT / "chapters").glob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.S | re.M)


def read(name: str) -> str:
    return (ROOT / f"chapters/{name}.md").read_text("utf-8")


def blocks(page: Path) -> list[tuple[str, str]]:
    """A page's Python, and what it prints, block by block."""
    return BLOCK.findall(page.read_text("utf-8"))


@pytest.fixture
def registries_as_they_were() -> Iterator[None]:
    with patch.dict(METHODS), patch.dict(TASKS):
        yield


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_the_code_of_a_page_runs_from_top_to_bottom(page: Path, registries_as_they_were: None) -> None:
    names: dict[str, Any] = {"__name__": page.stem}
    with torch.random.fork_rng(devices=[]):
        for code, printed in blocks(page):
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(code, str(page), "exec"), names)
            assert output.getvalue() == printed, code


RANK = r"""
import re, sys, torch
rank, world, page, folder, method = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
torch.set_num_threads(1)
wanted = ("x, x_new =", "def make_net", "def train_in_processes")
blocks = re.findall(r"```python\n(.*?)```", open(page, encoding="utf-8").read(), re.S)
names = {}
exec("import effens", names)
for block in blocks:
    if any(each in block for each in wanted):
        exec(block, names)
make = lambda: getattr(names["effens"], method)(names["make_net"], members=3)
ensemble = names["train_in_processes"](rank, world, f"{folder}/{method}-{world}", make)
if rank == 0:
    names["effens"].save(ensemble, f"{folder}/{method}-{world}.safetensors")
"""


@pytest.mark.parametrize("method", ["DeepEnsemble", "BatchEnsemble"])
def test_the_recipe_for_several_processes_trains_as_one_does(method: str, tmp_path: Path) -> None:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    page = str(ROOT / "chapters/your_loop.md")
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(world), page, str(tmp_path), method], env=environment
        )
        for world in (1, 2)
        for rank in range(world)
    ]
    try:
        assert [process.wait(100) for process in started] == [0, 0, 0]
    finally:
        for process in started:
            process.kill()
            process.wait()
    one, two = (load_file(tmp_path / f"{method}-{world}.safetensors") for world in (1, 2))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)


def test_the_pages_with_code_are_these() -> None:
    assert [page.stem for page in PAGES if blocks(page)] == ["adding_a_method", "your_loop"]
    assert all(page.read_text("utf-8").count("```python") == len(blocks(page)) for page in PAGES)


# The title page


def spine(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(("| | who sees what", "| *plain", "| ["))]


def test_the_spine_on_the_title_page_is_that_of_the_introduction() -> None:
    notebook = nbformat.read(ROOT / "chapters/introduction.ipynb", as_version=4)
    told = spine("\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown"))
    assert spine(read("index")) == told
    assert len(told) == 2 + 6


def test_the_map_has_every_method_and_leads_to_its_chapter() -> None:
    assert set(pages.CHAPTERS) <= set(names())
    leads = {chapter for chapter in pages.CHAPTERS.values() if chapter}
    told = set(re.findall(r"\((\w+)\.ipynb\)", "\n".join(spine(read("index")))))
    assert told < leads <= {chapter.stem for chapter in chapters()}


@pytest.mark.parametrize("place", list(pages.PICTURES), ids=" ".join)
def test_a_picture_in_small_is_a_frame_of_its_player_and_leads_there(place: tuple[str, str]) -> None:
    (chapter, cell), (heading, caption) = place, pages.PICTURES[place]
    cells = json.loads((ROOT / f"chapters/{chapter}.ipynb").read_text("utf-8"))["cells"]
    (at,) = (n for n, found in enumerate(cells) if found["id"] == cell and found["cell_type"] == "code")
    frame, alt = re.findall('<img src="(.*)" alt="(.*)">', pages.picture(chapter, cell))[0]
    assert frame in json.dumps(cells[at]["outputs"])
    assert len(alt.split()) >= 10
    text = "\n".join("".join(found["source"]) for found in cells[:at] if found["cell_type"] == "markdown")
    title = re.findall(r"^#+ (.*)$", text, re.M)[-1].lower()
    assert heading == re.sub(r"[^a-z0-9]+", "-", title).strip("-")
    assert caption.endswith(".")


@pytest.mark.parametrize("key", list(pages.TITLES))
def test_the_map_shows_the_benchmark_s_numbers(key: str) -> None:
    drawn = pages.svg_map(key, "title")
    dots = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawn)
    points = {name: tuple(map(float, dot)) for name, dot in zip(pages.CHAPTERS, dots, strict=True)}
    costs = {name: shipped().relative_costs(pages.TASK, name)[key] for name in points}
    nlls = {name: shipped().values(pages.TASK, name).mean().item() for name in points}
    assert sorted(points, key=lambda name: points[name][0]) == sorted(points, key=lambda name: costs[name])
    assert sorted(points, key=lambda name: -points[name][1]) == sorted(points, key=lambda name: nlls[name])
    for name in points:
        assert f"{name} {costs[name]:.1f} times" in drawn  # for those who do not see it


@pytest.mark.parametrize("key", list(pages.TITLES))
def test_the_map_s_labels_lie_inside_and_apart(key: str) -> None:
    form = r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(start|end)">([A-Za-z]\D*?)</text>'
    boxes = []
    for x, y, anchor, name in re.findall(form, pages.svg_map(key, "title")):
        left = float(x) - (8 * len(name) if anchor == "end" else 0)
        boxes.append((left, left + 8 * len(name), float(y) - 10, float(y) + 2))
    assert len(boxes) == len(pages.CHAPTERS)
    assert all(left > 48 and right < 420 and top > 14 and bottom < 260 for left, right, top, bottom in boxes)
    for i, (a, b, c, d) in enumerate(boxes):
        assert not any(a < right and left < b and c < bottom and top < d for left, right, top, bottom in boxes[:i])


def test_the_stamp_says_what_the_runs_say() -> None:
    facts = shipped().row("digits", "single").facts[0]
    stamp = pages.stamp()
    for key in ("torch", "python", "device"):
        assert facts[key].lower() in stamp.lower()
    ((first, last),) = re.findall(r"; ([\d-]+)(?: to ([\d-]+))?\.", stamp)
    assert first <= facts["date"] <= (last or first)
    assert effens.__version__ in stamp


# Reference


def test_every_public_name_stands_on_the_page_of_the_package_once() -> None:
    told = re.findall(r"^\.\. auto(?:class|function):: effens\.(\w+)$", read("api"), re.M)
    assert sorted(told) == sorted(effens.__all__)
    assert re.findall(r"^\.\. autofunction:: effens_book\.nets\.(\w+)$", read("api"), re.M) == ["mlp", "cnn"]
    assert ".. automodule:: effens_book.data\n   :members:" in read("api")


def test_every_term_is_explained_once_and_leads_on() -> None:
    entries = re.findall(r"^(\w[^\n]*)\n((?:  [^\n]*\n)+)", read("glossary"), re.M)
    terms = [term for term, _ in entries]
    assert len(terms) == len(set(terms)) >= 40
    assert [term for term, text in entries if not re.search(r"\]\(|\{term\}|\{py:|\{ref\}", text)] == []


PAPERS = parse_file(ROOT / "chapters/references.bib", "bibtex").entries


@pytest.mark.parametrize("paper", PAPERS.values(), ids=list(PAPERS))
def test_every_paper_is_linked(paper: Entry) -> None:
    fields = paper.fields
    if paper.type == "book":
        digits = [int(digit) for digit in fields["isbn"].replace("-", "")]
        assert sum(digits[0::2] + [3 * digit for digit in digits[1::2]]) % 10 == 0
        return
    if "doi" in fields:
        assert re.fullmatch(r"10\.\d{4,9}/\S+", fields["doi"])
    else:
        assert re.fullmatch(r"\d{4}\.\d{5}|0?\d{3}\.\d{4}|1[0-4]\d\d\.\d{4}", fields["eprint"])
        assert fields["archivePrefix"] == "arXiv"
        assert 2000 + int(fields["eprint"][:2]) <= int(fields["year"])
    assert re.fullmatch(r"\[.+, \d{4}\]\(https://.+\)", link(paper, textual=False))


def test_every_cited_paper_is_in_the_bibliography() -> None:
    listed = {
        paper.fields[key].lower() for paper in PAPERS.values() for key in ("eprint", "doi") if key in paper.fields
    }
    pages = "".join(path.read_text() for path in sorted((ROOT / "chapters").glob("*.[im][pd]*")))
    cited = re.findall(r"https://(?:arxiv\.org/abs|doi\.org)/([^\s)\\]+)", pages)
    assert len(cited) > 100
    assert {unquote(address).lower() for address in cited} - listed == set()


def test_no_two_papers_have_the_same_address() -> None:
    links = [re.search(r"\((https.*)\)$", link(paper, textual=False)) for paper in PAPERS.values()]
    addresses = [found[1] for found in links if found]
    assert len(set(addresses)) == len(addresses) == sum(paper.type != "book" for paper in PAPERS.values())


# Exercises


def cell(source: str, output: str = "", **options: Any) -> nodes.container:
    """A folded code cell as MyST-NB makes it."""
    parts = [nodes.container("", nodes.literal_block("", source), nb_element="cell_code_source")]
    if output:
        parts += [nodes.container("", nodes.literal_block("", output), nb_element="cell_code_output")]
    return nodes.container("", *parts, nb_element="cell_code", prompt_show="Show the code", **options)


def test_a_fold_says_what_it_hides() -> None:
    document = new_document("page")
    exercises = [cell("# Solution", "1", hide_mode="all"), cell("more = 1", hide_mode="all"), cell("shown = 1")]
    document += nodes.section("", nodes.title("", "Exercises"), *exercises, ids=["exercises"])
    elsewhere = [cell("# Solution", "1", hide_mode="all"), cell("plot()", "a picture", hide_mode="input")]
    found = [cell("ask()", "1", hide_mode=mode) for mode in ("all", "output")]
    document += nodes.section("", *elsewhere, *found, cell("silent = 1", hide_mode="all"), ids=["elsewhere"])
    theme.name_folds(Mock(), document)
    assert [part["prompt_show"] for part in document.findall(nodes.container) if "prompt_show" in part] == [
        *["Show the solution"] * 2,
        "Show the code",
        "Show the solution",
        "Show the code",
        *["Show what was found"] * 2,
        "Show the code",
    ]


def test_only_wide_figures_are_boxed_and_only_once(tmp_path: Path) -> None:
    (tmp_path / "_images").mkdir()
    for name, width in (("wide", 900), ("small", 700)):
        Image.new("L", (width, 300)).save(tmp_path / f"_images/{name}.png")
    wide, small = (f'<img alt="x" src="../_images/{name}.png" width="1">' for name in ("wide", "small"))
    boxed = theme.box_wide_figures(f"<body>{wide}{small}</body>", tmp_path)
    assert f'<div class="wide-figure">{wide}</div>{small}' in boxed
    assert theme.box_wide_figures(boxed, tmp_path) == boxed
    assert theme.box_wide_figures(f"<body>{small}</body>", tmp_path) == f"<body>{small}</body>"
