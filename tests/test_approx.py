"""Cells tagged `approx`: numbers within the tolerance pass, all else is compared as in every cell."""

import os
import subprocess
import sys
from pathlib import Path
from shutil import copy
from typing import Any
from xml.etree import ElementTree

import nbformat
import pytest
from nbformat import v4
from nbval.plugin import IPyNbFile

from effens_book.address import ROOT

MODULES = ("__init__", "address", "rerun")  # of the book, for conftest.py


def same(request: pytest.FixtureRequest, folder: Path, stored: Any, new: Any, tag: str = "approx") -> bool:
    """Whether a cell with this tag and this stored output passes when it gives the new one."""
    cell = v4.new_code_cell("print()", metadata={"tags": [tag]})
    nbformat.write(v4.new_notebook(cells=[cell]), folder / "one.ipynb")
    file = IPyNbFile.from_parent(request.session, path=folder / "one.ipynb")
    request.config.hook.pytest_collectstart(collector=file)
    file.setup_sanitize_files()
    (collected,) = file.collect()
    return bool(collected.compare_outputs([new], [stored]))


def printed(text: str) -> Any:
    return v4.new_output("stream", name="stdout", text=text)


WITHIN = [
    ("nll 1.00", "nll 1.04"),
    ("nll 0.100", "nll 0.118"),  # .02
    ("1e-3 and 2.5E+02", "2e-3 and 2.6e+02"),
    ("gain -0.01", "gain 0.00"),
    ("gain −1.00 ± 0.01", "gain −1.03 ± 0.02"),
    ("12.5% at 1.10x, ×2.20.", "12.6% at 1.12x, ×2.25."),
    ("1,000.5 of (9.98)", "999.5 of (10.02)"),
    ("  nll\n 9.98  a\n", "   nll\n10.02  a\n"),  # a column grows
    ("0.41 -> 0.40", "0.42 -> 0.41"),
    ("1.00 in 3.25 s", "1.01 in 12 s"),
]
BEYOND = [
    ("nll 1.00", "nll 1.06"),
    ("nll 0.100", "nll 0.125"),
    ("1e3", "2e3"),
    ("gain -0.05", "gain 0.05"),
    ("gain −1.00", "gain 1.00"),
    ("12.5%", "13.5%"),
    ("12.5%", "12.5"),
    ("1,000.5", "2,000.5"),
    ("1.10x", "1.10 s"),
    ("lower by 1.00", "higher by 1.00"),
    ("1.00 1.00", "1.00 1.00 1.00"),
    ("1.00", "1"),
    ("100 members", "101 members"),
    ("5 of 5.", "4 of 5."),
    ("1.00 -5", "1.00 5"),
    ("version 1.20.1", "version 1.21.1"),
    ("layer3.10", "layer3.11"),
    ("1.00", "nan"),
    ("NaN", "NaN"),
    ("1.00", "inf"),
    ("1.00\n", "1.00\n\n"),
]


@pytest.mark.parametrize(("stored", "new"), WITHIN)
def test_numbers_within_the_tolerance_pass(
    request: pytest.FixtureRequest, tmp_path: Path, stored: str, new: str
) -> None:
    for pair in [(stored, new), (new, stored)]:
        outputs = [printed(text) for text in pair]
        assert same(request, tmp_path, outputs[0], outputs[1])
        assert not same(request, tmp_path, outputs[0], outputs[1], "exact")


@pytest.mark.parametrize(("stored", "new"), BEYOND)
def test_all_else_is_noticed(request: pytest.FixtureRequest, tmp_path: Path, stored: str, new: str) -> None:
    for pair in [(stored, new), (new, stored)]:
        assert not same(request, tmp_path, *map(printed, pair))


@pytest.mark.parametrize("tag", ["approx-0.1", "approx-.1"])
def test_a_tag_states_another_share(request: pytest.FixtureRequest, tmp_path: Path, tag: str) -> None:
    assert same(request, tmp_path, printed("10.0"), printed("10.9"), tag)
    assert not same(request, tmp_path, printed("10.0"), printed("11.5"), tag)
    assert not same(request, tmp_path, printed("10.0"), printed("10.9"))


@pytest.mark.parametrize(
    ("stored", "new", "expected"),
    [
        ('<td class="a">1.00</td>', '<td class="a">1.04</td>', True),
        ("<td>1.00</td>", "<td>1.06</td>", False),
        ("<td>1.00</td><td>2</td>", "<td>1.00</td><td>3</td>", False),
        ('<td width="1.00">1.00</td>', '<td width="1.01">1.00</td>', False),
        ("<td>1.00</td>", "<th>1.00</th>", False),
        ("<style>b {top: 1.00em}</style>1.00", "<style>b {top: 1.01em}</style>1.00", False),
    ],
)
def test_in_html_only_what_is_read_may_differ(
    request: pytest.FixtureRequest, tmp_path: Path, stored: str, new: str, expected: bool
) -> None:
    outputs = [v4.new_output("display_data", {"text/html": text, "text/plain": "a table"}) for text in (stored, new)]
    assert same(request, tmp_path, *outputs) == expected


@pytest.mark.parametrize("kind", ["text/plain", "text/markdown", "text/latex", "image/svg+xml"])
def test_every_compared_kind_counts(request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    stored, near, far = (v4.new_output("display_data", {kind: text}) for text in ("is 1.00", "is 1.01", "is 1.20"))
    assert same(request, tmp_path, stored, near)
    assert same(request, tmp_path, stored, far) == (kind == "image/svg+xml")  # pictures are not compared


def test_in_a_notebook_that_runs_spoiled_cells_fail_and_cells_of_missing_packages_do_not(tmp_path: Path) -> None:
    cells = [
        v4.new_code_cell(f"print({value})", execution_count=1, outputs=[printed(stored)], metadata={"tags": [tag]})
        for value, stored, tag in [
            (1.01, "1.0\n", "approx"),
            (1.2, "1.0\n", "approx"),
            (1.01, "1.0\n", "exact"),
            (1.2, "1.0\n", "needs-no_such_package"),
        ]
    ]
    (tmp_path / "chapters/effens_book").mkdir(parents=True)
    (tmp_path / "tests").mkdir()
    nbformat.write(v4.new_notebook(cells=cells), tmp_path / "chapters/one.ipynb")
    for name in ("pyproject.toml", "_toc.yml", "conftest.py", *(f"chapters/effens_book/{name}.py" for name in MODULES)):
        copy(ROOT / name, tmp_path / name)
    copy(ROOT / "tests/nbval_sanitize.cfg", tmp_path / "tests")
    command = [sys.executable, "-m", "pytest", "chapters", "-p", "no:cacheprovider", "--junitxml=report.xml"]
    subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, check=False)
    cases = ElementTree.parse(tmp_path / "report.xml").iter("testcase")
    found = [next((kind for kind in ("failure", "skipped") if case.find(kind) is not None), "") for case in cases]
    assert found == ["", "failure", "failure", "skipped"]
