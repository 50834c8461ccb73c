"""Run chapters and store their outputs: `python tests/rerun.py [chapter ...]`, all of them when none is named."""

import base64
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import yaml
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
# A chapter's stored outputs come from the CPU, at the small scale, with no control that needs a kernel.
ENVIRONMENT = {"EFFENS_STATIC": "1", "EFFENS_SCALE": "small", "CUDA_VISIBLE_DEVICES": ""}
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def settings() -> dict[str, Any]:
    """What `_config.yml` says."""
    return dict(yaml.safe_load((ROOT / "_config.yml").read_text("utf-8")))


def chapters() -> list[Path]:
    """The notebooks that `_toc.yml` names, in its order."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text("utf-8"))
    files = [ROOT / f"{name}.ipynb" for name in [toc["root"], *(chapter["file"] for chapter in toc["chapters"])]]
    return [file for file in files if file.exists()]


def colab(chapter: Path) -> str:
    """The address that opens a chapter in Colab, from the one place where the book's address is written."""
    repository = settings()["repository"]
    owner_and_name = repository["url"].removeprefix("https://github.com/")
    return (
        f"https://colab.research.google.com/github/{owner_and_name}/blob/{repository['branch']}/chapters/{chapter.name}"
    )


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
        store_widget_state=False,
        extra_arguments=["--log-level=ERROR"],
        coalesce_streams=True,
    ).execute()
    notebook.metadata = nbformat.NotebookNode(METADATA)
    for cell in notebook.cells:
        for key in cell.metadata.keys() - {"tags", "mystnb"}:
            del cell.metadata[key]
        if cell.cell_type == "code":
            cell.outputs = [clean(output) for output in cell.outputs if output.get("name") != "stderr"]
        else:
            cell.source = re.sub(r"https://colab\.research\.google\.com/github/[^)\s]*", colab(chapter), cell.source)
    nbformat.write(notebook, chapter)
    if chapter.stem == "introduction":
        (ROOT / "chapters/_static/cover.png").write_bytes(last_frame(notebook))


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
    wanted = [Path(name).stem for name in names] or list(known)
    if unknown := [name for name in wanted if name not in known]:
        sys.exit(f"chapter must be one of {', '.join(known)}, got {', '.join(unknown)}")
    os.environ.update(ENVIRONMENT)
    for name in wanted:
        start = time.perf_counter()
        rerun(known[name])
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
