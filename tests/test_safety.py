"""Safe to publish: nothing that is read can run code, and nothing that is stored tells a secret or weighs too much."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rerun import ROOT, chapters

CODE = sorted((ROOT / "effens").rglob("*.py"))
CHAPTERS = chapters()
TEXT = sorted(
    path
    for folder in ("effens", "tests", "chapters")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".ipynb", ".md", ".bib", ".cpp", ".css", ".js", ".html", ".json", ".cfg", ".mplstyle"}
) + [path for path in ROOT.iterdir() if path.suffix in {".md", ".py", ".toml", ".txt", ".yml", ".cff"}]

PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
BUILTINS = {"eval", "exec", "__import__"}
LOADERS = {"torch.load", "torch.save", "torch.jit.load", "torch.package", "pandas.read_pickle", "yaml.load"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput"}
NATIVE = {"aoti_load_package", "CDLL"}  # these run machine code
# Files for AOTInductor are machine code: `effens.serving.load` says so. The clock is compiled from source in effens.
ALLOWED = {("effens/serving.py", "aoti_load_package"), ("effens/orders.py", "CDLL")}

CELL, NOTEBOOK = 300_000, 1_000_000  # characters of stored outputs

SECRETS = {
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a key of AWS": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a token of GitHub": r"\b(?:gh[pousr]_[0-9A-Za-z]{36}|github_pat_[0-9A-Za-z_]{22,})",
    "a token of GitLab": r"\bglpat-[0-9A-Za-z_-]{20}",
    "a token of Hugging Face": r"\bhf_[0-9A-Za-z]{30,}",
    "a key of an API": r"\bsk-[0-9A-Za-z_-]{20,}",
    "a key of Google": r"\bAIza[0-9A-Za-z_-]{35}",
    "a token of Slack": r"\bxox[abprs]-[0-9A-Za-z-]{10,}",
    "a token of PyPI": r"\bpypi-[0-9A-Za-z_-]{30,}",
    "a web token": r"\beyJ[0-9A-Za-z_-]{10,}\.eyJ[0-9A-Za-z_-]{10,}\.",
    "a password in an address": r"\b[a-z]+://[^\s/:@'\"]+:[^\s/@'\"]+@\w",
    "a secret in an assignment": r"(?i)\b(?:password|passwd|secret|api_?key|auth_?token)\b['\"]?\s*[:=]\s*['\"]\w{8,}",
}
MACHINE = r"(?<![\w.:/\])}*])/(?:home|root|Users|tmp|mnt|opt|private|var)/[\w.]|\b[A-Z]:\\\\?Users"


def dangers(source: str) -> Iterator[str]:
    """What in a piece of code can run code from data, or reads or writes pickles."""
    tree = ast.parse(source)
    origin: dict[str, str] = {}  # what a name stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            origin |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names}
            yield from ({alias.name.split(".")[0] for alias in node.names} & PICKLES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            origin |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            yield from ({node.module.split(".")[0]} & PICKLES)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            first, *rest = ast.unparse(node).split(".")
            name = ".".join([origin.get(first, first), *rest])
            if name in BUILTINS | LOADERS | SHELLS or name.split(".")[-1] in NATIVE:
                yield name.split(".")[-1] if name.split(".")[-1] in NATIVE else name
        if isinstance(node, ast.Call):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            name = ast.unparse(node.func)
            if name == "compile":
                yield name  # called: an argument may have this name
            if name in ("np.load", "numpy.load") and given.get("allow_pickle") != "False":
                yield "np.load without allow_pickle=False"
            if given.get("allow_pickle") == "True":
                yield "allow_pickle=True"
            if given.get("shell") == "True":
                yield "shell=True"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import dump",
        "import cloudpickle as safe",
        "eval('1')",
        "exec(open('x').read())",
        "loads = exec",
        "compile('1', 'x', 'eval')",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.load('x', weights_only=True)",
        "from torch import save as keep\nkeep(1, 'x')",
        "np.load('x')",
        "np.load('x', allow_pickle=True)",
        "import os\nos.system('x')",
        "subprocess.run('x', shell=True)",
        "from torch._inductor import aoti_load_package\naoti_load_package('x')",
        "import ctypes\nctypes.CDLL('x')",
        "import yaml\nyaml.load('x')",
    ],
)
def test_dangers_are_seen(source: str) -> None:
    assert list(dangers(source))


def test_what_is_harmless_is_not_called_a_danger() -> None:
    harmless = "fit(compile=compile)\n"
    harmless += "import re, yaml\nre.compile('x')\nmodel.eval()\nyaml.safe_load('x')\nnp.load('x', allow_pickle=False)"
    assert not list(dangers(harmless))


def test_the_module_reads_no_pickle_and_runs_no_code_from_data() -> None:
    assert len(CODE) > 25
    found = {(str(path.relative_to(ROOT)), danger) for path in CODE for danger in dangers(path.read_text("utf-8"))}
    assert found == ALLOWED


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapters_read_no_pickle_and_run_no_code_from_data(path: Path) -> None:
    cells = [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    for cell in (cell for cell in cells if cell["id"] != "install"):  # it clones the book, from its address alone
        source = "".join(cell["source"])
        python = re.sub(r"^(\s*)[%!].*", r"\1pass", source, flags=re.M)
        assert not list(dangers(python)), source


def test_loading_machine_code_is_announced() -> None:
    tree = ast.parse((ROOT / "effens/serving.py").read_text("utf-8"))
    (load,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "load"]
    assert "load only files you trust" in (ast.get_docstring(load) or "")


def test_stored_arrays_hold_no_objects() -> None:
    files = sorted((ROOT / "effens").rglob("*.npz"))
    assert len(files) > 10
    for path in files:
        with np.load(path, allow_pickle=False) as arrays:
            assert all(arrays[name].dtype.kind in "biufUM" for name in arrays.files), path.name


# ---- What is stored. ----


@pytest.mark.parametrize(
    "text",
    [
        "-----BEGIN RSA " + "PRIVATE KEY-----",
        "AKIA" + "ABCDEFGHIJKLMNOP",
        "ghp_" + "a" * 36,
        "glpat-" + "a" * 20,
        "hf_" + "a" * 34,
        "sk-" + "a1" * 20,
        "AIza" + "b" * 35,
        "xoxb-" + "1" * 12,
        "pypi-" + "A" * 40,
        ".".join(["eyJ" + "a" * 12] * 2) + ".x",
        "https://me:" + "mine@example.org",
        "api_key = " + "'0123456789'",
    ],
)
def test_secrets_are_seen(text: str) -> None:
    assert [name for name, pattern in SECRETS.items() if re.search(pattern, text)]


def test_no_file_tells_a_secret_or_a_path_of_a_machine() -> None:
    found = {}
    for path in TEXT:
        text = re.sub(r"data:[\w/+-]+;base64,[\w+/=]+|\"image/png\": \"[^\"]*\"", "", path.read_text("utf-8"))
        for name, pattern in {**SECRETS, "a path of a machine": MACHINE}.items():
            if seen := re.search(pattern, text):
                found[str(path.relative_to(ROOT))] = f"{name}: {seen.group()}"
    assert not found


def test_paths_of_machines_are_seen() -> None:
    for path in ("/home/" + "me/x", "open('/tmp/" + "x')", "C:\\" + "Users\\me", "file: /root/" + ".ssh"):
        assert re.search(MACHINE, path), path
    assert not re.search(MACHINE, "https://example.org/home/index.html and a/tmp/b")


def outputs(path: Path) -> list[list[Any]]:
    """The stored outputs of each cell."""
    return [cell.get("outputs", []) for cell in json.loads(path.read_text("utf-8"))["cells"]]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_stored_outputs_are_small(path: Path) -> None:
    sizes = [len(json.dumps(cell)) for cell in outputs(path)]
    assert max(sizes) <= CELL
    assert sum(sizes) <= NOTEBOOK


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_stored_outputs_fetch_nothing(path: Path) -> None:
    pages = ["".join(o.get("data", {}).get("text/html", "")) for cell in outputs(path) for o in cell]
    assert not re.findall(r"<(?:script|img|iframe|link)[^>]*(?:src|href)\s*=\s*[\"']?\s*(?:https?:)?//", "".join(pages))
