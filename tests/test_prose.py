"""Numbers in the chapters' prose: each stands in the page, rounded alike, or has its source beside it.

A number that counts is one with a decimal point, or one with a unit of % or x. It may come from what the page's cells
print, or from a setting in their code; a multiple, such as 4x, only from a printed multiple. Or the paragraph, or the
row of a table, links to where it was published.
"""

import json
import re
from typing import Any

import pytest

from effens_book.address import ROOT
from effens_book.rerun import chapters

NUMBER = re.compile(r"(?<![\w.])(\d*\.\d+|\d+(?=x\b|\s?%|×))(x\b|×)?")
SOURCE = re.compile(r"\]\(https?://")


def paragraphs(notebook: dict[str, Any]) -> list[str]:
    """The prose, without code, formulas and addresses of links: paragraphs, rows of tables, alt texts of figures."""
    figures = [cell["metadata"].get("mystnb", {}).get("image", {}) for cell in notebook["cells"]]
    found = [figure["alt"] for figure in figures if "alt" in figure]
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            text = re.sub(r"```.*?```|\$\$.*?\$\$", " ", "".join(cell["source"]), flags=re.DOTALL)
            found += re.split(r"\n\s*\n|\n(?=\||- )", text)
    return found


def plain(text: str) -> str:
    return re.sub(r"`[^`]*`|\$[^$]*\$|\]\([^)]*\)|\[[^\]]*\d{4}\]?", " ", text)


def known(notebook: dict[str, Any]) -> tuple[str, str]:
    """The code of a page, and what it prints."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    printed = ["".join(o.get("text", o.get("data", {}).get("text/plain", ""))) for o in outputs]
    return "\n".join("".join(cell["source"]) for cell in cells), "\n".join(printed)


def explained(number: re.Match[str], code: str, printed: str) -> bool:
    """Whether a number is printed or set, perhaps with more decimals, or as a part of one instead of a percentage."""
    digits = len(number[1].partition(".")[2])
    found = re.findall(r"(\d*\.?\d+)x\b", printed) if number[2] else re.findall(r"\d*\.?\d+(?:e-?\d+)?", code + printed)
    values = [scale * float(each) for each in set(found) for scale in (1, 100)]
    return any(f"{value:.{digits}f}" == f"{float(number[1]):.{digits}f}" for value in values)


def lost(notebook: dict[str, Any]) -> list[str]:
    """Numbers of the prose that come from nowhere, each with what stands around it."""
    page, found = known(notebook), []
    for paragraph in paragraphs(notebook):
        if not SOURCE.search(paragraph):
            text = re.sub(r"\s+", " ", plain(paragraph))
            found += [
                text[max(0, m.start() - 40) : m.end() + 20] for m in NUMBER.finditer(text) if not explained(m, *page)
            ]
    return found


@pytest.mark.parametrize("name", [chapter.stem for chapter in chapters()])
def test_every_number_in_prose_comes_from_the_page_or_has_a_source(name: str) -> None:
    assert lost(json.loads((ROOT / f"chapters/{name}.ipynb").read_text("utf-8"))) == []


def page(prose: str, alt: str = "A line") -> dict[str, Any]:
    code: dict[str, Any] = {
        "cell_type": "code",
        "source": ["rate = 0.05\n"],
        "outputs": [{"text": ["NLL 0.1474 ± 0.0052, 4.2x\n"]}],
    }
    code["metadata"] = {"mystnb": {"image": {"alt": alt}}}
    return {"cells": [{"cell_type": "markdown", "metadata": {}, "source": [prose]}, code]}


@pytest.mark.parametrize(
    ("prose", "count"),
    [
        ("It costs 4.2x one network.", 0),
        ("It costs 4.3x one network.", 1),
        ("Memory is 0.1474x one network's.", 1),
        ("It costs about 4x, and the NLL is 0.147.", 0),
        ("The NLL is 0.148.", 1),
        ("With a rate of 5% it is .1474.", 0),
        ("On CIFAR-10 it is .136 ([Wen et al., 2020](https://arxiv.org/abs/2002.06715)).", 0),
        ("On CIFAR-10 it is .136.\n\nSee [Wen et al., 2020](https://arxiv.org/abs/2002.06715).", 1),
        ("Four networks and 1000 images in `0.3` of $0.4$ seconds.", 0),
    ],
)
def test_a_number_from_nowhere_is_noticed(prose: str, count: int) -> None:
    assert len(lost(page(prose))) == count


def test_an_alt_text_is_prose() -> None:
    assert lost(page("A figure.", "A line that ends at 0.147")) == []
    assert len(lost(page("A figure.", "A line that ends at 0.148"))) == 1
