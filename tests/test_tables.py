"""Tables: the page and the plain text hold the same digits and marks, and a spoiled table fails."""

import copy
import re
from html.parser import HTMLParser
from typing import Any

import nbformat
import pytest
from test_book import cells_of

from effens_book.benchmark import Interval, shipped
from effens_book.rerun import chapters
from effens_book.tables import Table

ROWS: dict[str, dict[str, Any]] = {
    "one <network>": {"NLL": Interval(0.1642, 0.008), "accuracy (%)": 94.66, "seeds": 8},
    "four": {"NLL": Interval(0.1471, 0.0051), "accuracy (%)": 95.51, "seeds": 8},
    "other": {"NLL": Interval(0.1452, 0.0073), "accuracy (%)": None, "verdict": "lower"},
}
OPTIONS: dict[str, Any] = {
    "caption": "digits, NLL in nats",
    "best": {"NLL": min, "accuracy (%)": max},
    "unresolved": [("four", "NLL")],
    "digits": {"accuracy (%)": 1},
    "note": "Eight seeds",
}
TEXT = """\
digits, NLL in nats
                         NLL  accuracy (%)  seeds  verdict
one <network>  0.164 ± 0.008         94.7       8        –
four           0.147 ± 0.005≈        95.5*      8        –
other          0.145 ± 0.007*           –       –    lower
* best; ≈ difference from the best not resolved. Eight seeds"""


def test_what_is_not_known_is_not_the_best() -> None:
    rows: dict[str, dict[str, float | None]] = {
        "diverged": {"NLL": float("nan")},
        "four": {"NLL": 0.2},
        "one": {"NLL": 0.1},
        "not run": {"NLL": None},
    }
    assert str(Table(rows, best={"NLL": min}, digits=1)).splitlines()[3:] == [
        "one       0.1*",
        "not run     –",
        "* best",
    ]


class Cells(HTMLParser):
    """The text of each cell of a table, and which are bold."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.bold: list[str] = []
        self.tag = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tag = tag
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and data.strip() and self.tag in ("td", "th", "strong"):
            self.rows[-1][-1] += data
            if self.tag == "strong":
                self.bold.append(data)


def test_plain_text_has_the_digits_marks_caption_and_note() -> None:
    lines = [line.rstrip() for line in repr(Table(ROWS, **OPTIONS)).splitlines()]
    assert [line.split() for line in lines] == [line.split() for line in TEXT.splitlines()]
    assert len({line.index("±") for line in lines if "±" in line}) == 1, "numbers stand under one another"


def test_the_page_has_the_same_cells_and_marks() -> None:
    table = Table(ROWS, **OPTIONS)
    page = Cells(table._repr_html_())
    assert page.rows[0] == ["", "NLL", "accuracy (%)", "seeds", "verdict"]
    assert page.rows[1] == ["one <network>", "0.164 ± 0.008", "94.7", "8", "–"]
    assert page.rows[2][1] == "0.147 ± 0.005≈"
    assert page.bold == ["95.5", "0.145 ± 0.007"]
    assert re.findall(r"<(\w+) scope=\"(\w+)\">", table._repr_html_())[:5] == [("th", "col")] * 4 + [("th", "row")]
    text, shown = (set(re.findall(r"\d+\.\d+", each)) for each in (repr(table), table._repr_html_()))
    assert text == shown


def test_values_stay_as_they_were_in_the_frame() -> None:
    frame = Table(ROWS, **OPTIONS).frame
    assert frame.loc["four", "NLL"] == ROWS["four"]["NLL"]
    assert list(frame.columns) == ["NLL", "accuracy (%)", "seeds", "verdict"]


def test_an_empty_caption_no_best_and_a_negative_zero() -> None:
    assert repr(Table({"a": {"b": -0.0001}})).split() == ["b", "a", "0.000"]


def test_intervals_write_both_numbers_alike() -> None:
    found = Interval(-0.0174, 0.0102)
    assert f"{found}" == str(found) == "-0.017 ± 0.010"
    assert f"{Interval(0.0174, 0.0102):+.2f}" == "+0.02 ± 0.01"


@pytest.mark.parametrize("spoiled", [("text/plain", "0.147", "0.146"), ("text/html", "0.147", "0.146")])
def test_a_spoiled_table_fails(spoiled: tuple[str, str, str], request: pytest.FixtureRequest) -> None:
    cell = next(cell for cell in cells_of(chapters()[0], request.session) if not cell.options["skip"])
    table = Table(ROWS, **OPTIONS)
    data = {"text/plain": repr(table), "text/html": table._repr_html_()}
    right = [nbformat.v4.new_output("execute_result", data, execution_count=1)]
    wrong = copy.deepcopy(right)
    key, old, new = spoiled
    wrong[0]["data"][key] = wrong[0]["data"][key].replace(old, new)
    assert cell.compare_outputs(copy.deepcopy(right), copy.deepcopy(right))
    assert not cell.compare_outputs(right, wrong)


def test_the_benchmark_marks_the_best_and_what_is_not_resolved() -> None:
    table = shipped().table("digits", ["nll", "member_nll"], ["single", "hyper", "BatchEnsemble"])
    assert table.marks == {("hyper", "NLL"): "*", ("BatchEnsemble", "NLL"): "≈"}
    verdicts = shipped().differences("digits", [("deep ensemble", "wide")]).frame
    assert verdicts.loc["deep ensemble − wide", "verdict"] == "lower"


def test_the_best_trials_are_in_order_and_the_first_was_chosen() -> None:
    frame = shipped().best_trials("digits", ["MIMO"], 3).frame
    losses = [float(loss) for loss in frame["validation NLL"]]
    assert losses == sorted(losses)
    assert frame.index[0] == "MIMO, chosen"
    assert frame["learning rate"].iloc[0] == f"{shipped().settings('digits', 'MIMO')['lr']:.4f}"
