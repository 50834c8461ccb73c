"""Run chapters and store their outputs: `python -m effens_book.rerun [--time] [chapter ...]`.

It is called in `chapters/`, and runs them all when none is named. With `--time` a chapter also says how long it ran:
for two cores that have nothing else to do.
"""

import base64
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from effens_book import address
from effens_book.address import ROOT

# A chapter's stored outputs come from the CPU, at the small scale, with no control that needs a kernel.
ENVIRONMENT = {"EFFENS_STATIC": "1", "EFFENS_SCALE": "small", "CUDA_VISIBLE_DEVICES": ""}
# Widgets talk with the kernel in both directions, for which nbclient may wait in vain: the function is called once.
NO_WIDGETS = "--IPKernelApp.exec_lines=import ipywidgets; ipywidgets.interact = lambda draw, **sliders: draw()"


def chapters() -> list[Path]:
    """The notebooks that `_toc.yml` names, in its order."""
    names = re.findall(r"(?:root|file): (\S+)", (ROOT / "_toc.yml").read_text("utf-8"))
    return [file for name in names if (file := ROOT / f"{name}.ipynb").exists()]


def rerun(chapter: Path) -> None:
    """Run one chapter in a new kernel and write it back, the same wherever it ran.

    Raises:
        CellExecutionError: a cell failed that is not tagged `raises-exception`; the file stays as it was.
    """
    notebook = nbformat.read(chapter, as_version=4)
    folder = {"metadata": {"path": str(chapter.parent)}}
    NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources=folder,
        record_timing=False,
        extra_arguments=["--log-level=ERROR", NO_WIDGETS],
        coalesce_streams=True,
    ).execute()
    address.dress(notebook, chapter)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            shown = [] if "remove-output" in cell.metadata.get("tags", []) else cell.outputs  # such as a widget
            cell.outputs = [clean(output) for output in shown if output.get("name") != "stderr"]
    nbformat.write(notebook, chapter)
    if chapter.stem == "introduction":
        (ROOT / "chapters/_static/cover.png").write_bytes(last_frame(notebook))


def note_time(chapter: Path, seconds: float) -> None:
    """Write into a chapter's first cell how long it ran, rounded up to 5 seconds."""
    notebook = nbformat.read(chapter, as_version=4)
    says = f"runs in about {5 * math.ceil(seconds / 5)} seconds"
    notebook.cells[0].source = re.sub(r"runs in about \d+ seconds", says, notebook.cells[0].source)
    nbformat.write(notebook, chapter)


def last_frame(notebook: Any) -> bytes:
    """The last picture of a notebook's first player: the README shows it."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pages = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    return base64.b64decode(re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", pages[0])[-1])


def clean(output: Any) -> Any:
    """The output without what depends on the machine: an error's traceback, a picture's note of what drew it."""
    if output.output_type == "error":
        output.traceback = [f"{output.ename}: {output.evalue}"]
    if "image/png" in output.get("data", {}):
        picture = without_text(base64.b64decode(output.data["image/png"]))
        output.data["image/png"] = base64.b64encode(picture).decode()
    return output


def without_text(png: bytes) -> bytes:
    """A PNG without its tEXt chunks: each length (4 bytes), name (4), content, checksum (4), after a header of 8."""
    kept, at = png[:8], 8
    while at < len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4], "big")
        if png[at + 4 : at + 8] != b"tEXt":
            kept += png[at:end]
        at = end
    return kept


def main(names: list[str]) -> None:
    """Run the chapters with these names, or all, and print how long each took."""
    known = {chapter.stem: chapter for chapter in chapters()}
    wanted = [Path(name).stem for name in names if name != "--time"] or list(known)
    if unknown := [name for name in wanted if name not in known]:
        sys.exit(f"chapter must be one of {', '.join(known)}, got {', '.join(unknown)}")
    os.environ.update(ENVIRONMENT)
    for name in wanted:
        start = time.perf_counter()
        rerun(known[name])
        seconds = time.perf_counter() - start
        print(f"{name}: {seconds:.0f} s", flush=True)
        if "--time" in names:
            note_time(known[name], seconds)


if __name__ == "__main__":
    main(sys.argv[1:])
