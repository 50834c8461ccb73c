"""What all chapters have, and what derives from the book's address: `python -m effens_book.address` writes both.

The address stands in `_config.yml`. Each chapter's badge and install cell, the package's link and the citation are
written from there, so that a fork changes one line and runs this.
"""

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nbformat
import yaml
from pybtex.database import Entry, parse_file

ROOT = Path(__file__).resolve().parents[2]
METADATA = {  # of every chapter; Colab reads the last two, and a machine without a GPU runs the chapters as well
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
    "accelerator": "GPU",
    "colab": {"gpuType": "T4", "provenance": []},
}
# What a chapter needs beyond the package and what Colab has: extras of pyproject.toml, by chapter.
EXTRAS = {"hyper_ensembles": ["tuning"], "finance": ["serving", "finance"], "scaling_out": ["scaling"]}
INSTALL = """\
import importlib.util
import os
import sys
from pathlib import Path

book = Path("effens-book").resolve()
if not all(map(importlib.util.find_spec, ["effens", "effens_book"])):  # as in Colab
    source = "{url}"
    clone = f"git clone --quiet --depth 1 {{source}} effens-book --branch"
    released = book.exists() or os.system(f"{{clone}} {release}") == 0
    if not released and os.system(f"{{clone}} {branch}") == 0:
        print("No {release} there: took {branch}, which may differ from this notebook.")
    %pip install --quiet --no-deps ./effens-book{small}
    importlib.invalidate_caches()
    if importlib.util.find_spec("effens") is None:
        print("effens is not installed: restart the runtime and run this cell again;")
        print(f"or download {{source}} and run `pip install .` there, or open an issue.")
if book.exists():
    sys.path.append(str(book / "chapters"))"""

# Under each chapter's badge: what a reader needs who takes a cell home.
HOME = "## Take it home"
GET = "`pip install git+{url}` gets `effens` for your own code; [your own loop](your_loop.md) shows where it goes."


def settings() -> dict[str, Any]:
    """What `_config.yml` says."""
    return dict(yaml.safe_load((ROOT / "_config.yml").read_text("utf-8")))


def project() -> dict[str, Any]:
    """What `pyproject.toml` says of the package."""
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"])


def url() -> str:
    """The book's address."""
    return str(settings()["repository"]["url"])


def colab(chapter: Path) -> str:
    """The address that opens a chapter in Colab."""
    owner_and_name = url().removeprefix("https://github.com/")
    branch = settings()["repository"]["branch"]
    return f"https://colab.research.google.com/github/{owner_and_name}/blob/{branch}/chapters/{chapter.name}"


def packages(extra: str) -> list[str]:
    """What an extra of pyproject.toml asks for, the extras that it names included."""
    found = []
    for package in project()["optional-dependencies"].get(extra, []):
        inner = re.fullmatch(r"effens\[(.*)\]", package)
        found += [part for name in inner[1].split(",") for part in packages(name)] if inner else [package]
    return found


def small_packages(chapter: Path) -> list[str]:
    """What the chapter's install cell asks for beside `effens`, as in pyproject.toml's extras."""
    return [package for extra in EXTRAS.get(chapter.stem, []) for package in packages(extra)]


def install(chapter: Path) -> str:
    """The source of a chapter's install cell: a clone of this version, and nothing where `effens` is there."""
    small = " ".join(f'"{package}"' for package in small_packages(chapter))
    return INSTALL.format(
        url=url(),
        release=f"v{project()['version']}",
        branch=settings()["repository"]["branch"],
        small=f"\n    %pip install --quiet {small}" if small else "",
    )


def link(entry: Entry, textual: bool) -> str:
    """A paper as a link that reads well in any notebook: [Wen et al., 2020](its DOI or arXiv page)."""
    parts = [[*person.rich_prelast_names, *person.rich_last_names] for person in entry.persons["author"]]
    names = [" ".join(str(part) for part in name) for name in parts]
    who = " and ".join(names) if len(names) < 3 else f"{names[0]} et al."
    text = f"{who} ({entry.fields['year']})" if textual else f"{who}, {entry.fields['year']}"
    if "doi" in entry.fields:
        return f"[{text}](https://doi.org/{quote(entry.fields['doi'])})"
    return f"[{text}](https://arxiv.org/abs/{entry.fields['eprint']})" if "eprint" in entry.fields else text


def citations(source: str) -> str:
    """Put links in the place of citations by key, which are Sphinx's alone."""
    papers = parse_file(ROOT / "chapters/references.bib", "bibtex").entries

    def replaced(match: re.Match[str]) -> str:
        textual = match[1] == ":t"
        links = ", ".join(link(papers[key.strip()], textual) for key in match[2].split(","))
        return links if textual else f"({links})"

    return re.sub(r"\{cite(:\w)?\}`([^`]+)`", replaced, source)


def minutes(notebook: Any) -> int:
    """How long a chapter takes to read: its prose, without formulas and tables, at 200 words a minute."""
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    prose = re.sub(r"\$\$[^$]*\$\$|^\|.*", "", prose, flags=re.M)
    return max(1, round(len(prose.split()) / 200))


def folds(tags: Iterable[str]) -> dict[str, Any]:
    """What folds a cell as its tags do in the book: in JupyterLab, which reads `jupyter`, and in Colab, the others."""
    found: dict[str, Any] = {}
    if not {"hide-input", "hide-cell", "remove-input"}.isdisjoint(tags):
        found = {"cellView": "form", "jupyter": {"source_hidden": True}}
    if not {"hide-output", "hide-cell"}.isdisjoint(tags):
        found |= {"collapsed": True, "jupyter": {**found.get("jupyter", {}), "outputs_hidden": True}}
    return found


def dress(notebook: Any, chapter: Path) -> None:
    """Write into a chapter what is the same in all: metadata, badge, time to read, install cell, links to papers."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        kept = {key: cell.metadata[key] for key in cell.metadata.keys() & {"tags", "mystnb"}}
        cell.metadata = nbformat.from_dict(kept | folds(kept.get("tags", [])))
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\n\n`pip install git\+.*", "", citations(cell.source))
            cell.source = cell.source.replace(HOME, f"{HOME}\n\n{GET.format(url=url())}")
    first, *rest = notebook.cells
    first.source = re.sub(r"https://colab\.research\.google\.com/github/[^)\s]*", colab(chapter), first.source)
    reads = f"\n· reads in about {minutes(notebook)} minutes, runs in about "
    first.source = re.sub(r"\n· (?:reads in about \d+ minutes, )?runs in about ", reads, first.source)
    cell = nbformat.v4.new_code_cell(install(chapter), id="install", metadata={"tags": ["remove-cell"]})
    notebook.cells = [first, cell, *(cell for cell in rest if cell.id != "install")]
    count = 0
    for cell in notebook.cells:  # the cells count as if the new one had run with them
        if cell.cell_type == "code":
            count += 1
            for run in [cell, *(output for output in cell.outputs if output.output_type == "execute_result")]:
                run.execution_count = count


def texts() -> dict[Path, str]:
    """What the other files that hold the address must say."""
    owner, name = url().removeprefix("https://github.com/").split("/")
    changes = [
        ("pyproject.toml", r'(?<=\nSource = ")[^"]*', url()),
        ("CITATION.cff", r"(?<=\nrepository-code: )\S*", url()),
        ("README.md", r"(?<=pip install git\+)\S*", url()),
        ("README.md", r"https://[\w-]+\.github\.io/[\w.-]+/", f"https://{owner.lower()}.github.io/{name}/"),
    ]
    found = {ROOT / file: (ROOT / file).read_text("utf-8") for file, _, _ in changes}
    for file, old, new in changes:
        found[ROOT / file] = re.sub(old, new, found[ROOT / file])
    return found


def main() -> None:
    """Write all that derives from the book's address, and into every chapter what all chapters have."""
    for file, text in texts().items():
        file.write_text(text, "utf-8")
    for chapter in (ROOT / "chapters").glob("*.ipynb"):
        notebook = nbformat.read(chapter, as_version=4)
        dress(notebook, chapter)
        nbformat.write(notebook, chapter)


if __name__ == "__main__":
    main()
