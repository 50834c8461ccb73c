"""Studies: one question each, asked on the benchmark's tasks over a grid of settings and several seeds.

A row of the benchmark says how good a method is at its best settings; a study says what one of its settings does.
``python -m effens_book.studies`` runs what is missing, resumes after a kill, and keeps one file of scores a study.

To add a study, write one function that answers for one point of the grid and one seed, and register it with `study`.
"""

import argparse

import torch
from tqdm import tqdm

from effens_book.studies import claims, methods, panel, running, table_rows
from effens_book.studies.methods import DECAYED
from effens_book.studies.running import STUDIES, read, run, study, values

__all__ = [
    "DECAYED",
    "STUDIES",
    "claims",
    "main",
    "methods",
    "panel",
    "read",
    "run",
    "running",
    "study",
    "table_rows",
    "values",
]


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(prog="python -m effens_book.studies", description=main.__doc__)
    parser.add_argument("--studies", nargs="+", default=list(running.STUDIES), choices=running.STUDIES)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)  # so that numbers do not depend on how many cores there are
    for name in chosen.studies:
        with tqdm(total=len(running.STUDIES[name].grid) * running.STUDIES[name].seeds, desc=name, unit="run") as shown:
            run(name, shown)
