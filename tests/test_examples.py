"""Every public name has an example, and it says what it gives."""

import doctest
import inspect
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import effens

NAMES = [name for name in effens.__all__ if not inspect.ismodule(getattr(effens, name))]
GIVEN = {"effens": effens, "torch": torch, "nn": nn, "Path": Path, "tempfile": tempfile}


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_public_name_runs(name: str) -> None:
    thing: Any = getattr(effens, name)
    torch.manual_seed(0)
    (test,) = doctest.DocTestFinder(recurse=False).find(thing, name, globs={**GIVEN, name: thing})
    assert test.examples, f"{name} has no example"
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test)
    assert result.failed == 0
