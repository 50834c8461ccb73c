"""Time `effens` beside others that do the same, in turns in one process, on one thread.

    pip install -r effens_book/peers/requirements.txt
    python -m effens_book.peers                  # all sections: some minutes, with nothing else running
    python -m effens_book.peers linear deep      # some; the others' results stay as they are

Each comparison gives median seconds and medians of paired ratios with 95% intervals. Results are kept, and
the book draws from them "How fast is it?".
"""

import argparse
import importlib.metadata
import json
import time
from pathlib import Path

import torch

from effens_book.benchmark import RESULTS
from effens_book.benchmark.run import provenance, write_json
from effens_book.peers.contestants import found
from effens_book.peers.sections import SECTIONS

PEERS = {"torch_uncertainty": "torch-uncertainty", "tabm": "tabm"}  # as they are imported, as they are called
PACKAGES = ("torch", *PEERS.values(), "onnxruntime")


def main() -> None:
    """Run sections and keep what they found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; all by default")
    parser.add_argument("--seconds", type=float, default=1.5, help="of a comparison (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "speed.json", help="where results are kept")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"sections must be of {', '.join(SECTIONS)}, got {', '.join(sorted(unknown))}")
    missing = [called for imported, called in PEERS.items() if not found(imported)]
    if missing and options.output.resolve().is_relative_to(RESULTS.resolve()):
        remedy = "pip install -r effens_book/peers/requirements.txt, or keep results elsewhere, with --output"
        parser.error(f"results for the book must have every peer beside them: {remedy}, got no {', '.join(missing)}")
    torch.set_num_threads(1)
    kept = json.loads(options.output.read_text()) if options.output.exists() else {}
    for name in options.sections or SECTIONS:
        began, rows = time.perf_counter(), []
        print(f"{name}: {(SECTIONS[name].__doc__ or '').splitlines()[0]}")
        torch.manual_seed(0)
        for row in SECTIONS[name](options.seconds):
            rows.append(row)
            print(f"  {words(row)}", flush=True)
        kept[name] = {"rows": rows, **facts()}
        write_json(options.output, kept)
        print(f"  {time.perf_counter() - began:.0f} s")


def words(row: dict[str, object]) -> str:
    """Return a row as a line."""
    case, ratios = row["case"], row["ratios"]
    assert isinstance(case, dict)
    assert isinstance(ratios, dict)
    parts = [f"{name} {middle:.2f} ({low:.2f} to {high:.2f})" for name, (middle, low, high) in ratios.items()]
    return f"{' '.join(map(str, case.values()))}, {row.get('what', 'a step')}: {', '.join(parts)}"


def facts() -> dict[str, object]:
    """Return where, when and with what this was measured."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**provenance(), "processor": processor(), "threads": torch.get_num_threads(), "versions": versions}


def processor() -> str:
    """Return the processor's name and what PyTorch uses of it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown'}, {torch.backends.cpu.get_cpu_capability()}"


if __name__ == "__main__":
    main()
