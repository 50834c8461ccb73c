"""Colab, as far as it can be had here: what an install replaces, the install cell, and each chapter, offline."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import nbformat
import pytest
from address import ROOT, install, project, small_packages, url
from rerun import NO_WIDGETS, chapters

pytestmark = pytest.mark.slow
CHAPTERS = chapters()
PRESENT = {"torch": "2.6.0", "numpy": "2.1.0"}  # the oldest that a Python 3.13 could hold
# In the kernel's environment, imported before all else: nothing but this machine answers, and packages are hidden.
OFFLINE = """
import importlib.machinery, os, socket, sys

def refuse(self, address, connect=socket.socket.connect):
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
        raise OSError(f"the network is off: {address}")
    return connect(self, address)

def resolve(host, *rest, found=socket.getaddrinfo, **named):
    if host not in (None, "", "127.0.0.1", "::1", "localhost", socket.gethostname()):
        raise socket.gaierror(f"the network is off: {host}")
    return found(host, *rest, **named)

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, *rest):
        hidden = name.partition(".")[0] in os.environ["HIDDEN"].split()
        return None if hidden else super().find_spec(name, *rest)

socket.socket.connect, socket.getaddrinfo = refuse, resolve
sys.meta_path = [Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
"""
RUN = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
arguments = ["--log-level=ERROR", sys.argv[2]]
NotebookClient(notebook, timeout=300, kernel_name="python3", extra_arguments=arguments).execute()
nbformat.write(notebook, sys.argv[1])
"""


def name_of(requirement: str) -> str:
    return re.split(r"[<>=!~\[; ]", requirement)[0]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--quiet", "--wheel-dir", str(folder)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode and "hatchling" in built.stderr:
        pytest.skip("needs the package hatchling, which no index gave")
    assert built.returncode == 0, built.stderr
    (found,) = folder.glob("*.whl")
    return found


# What an install replaces


def python_3_13() -> str | None:
    """An interpreter that starts: a shim on the path may not."""
    places = [shutil.which("python3.13"), *map(str, Path.home().glob(".pyenv/versions/3.13.*/bin/python"))]
    for place in filter(None, places):
        if subprocess.run([place, "-m", "venv", "--help"], capture_output=True, check=False).returncode == 0:
            return place
    return None


def installed_by(python: Path, *requirements: str) -> set[str]:
    """The names of what pip would install, torch and numpy being there."""
    report = python.with_name("report.json")
    command = [str(python), "-m", "pip", "install", "--dry-run", "--quiet", "--report", str(report), *requirements]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode and re.search(r"Temporary failure|NewConnectionError|Could not fetch", run.stderr):
        pytest.skip("needs an index of packages")
    assert run.returncode == 0, run.stderr
    return {item["metadata"]["name"].lower() for item in json.loads(report.read_text())["install"]}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python 3.13 with pip, and torch and numpy by their metadata alone, which is all that a resolve looks at."""
    interpreter = python_3_13()
    if interpreter is None:
        pytest.skip("needs a Python 3.13 on PATH or in ~/.pyenv/versions")
    folder = tmp_path_factory.mktemp("3.13")
    subprocess.run([interpreter, "-m", "venv", folder], check=True)
    (packages,) = folder.glob("lib/python3.13/site-packages")
    for name, version in PRESENT.items():
        record = packages / f"{name}-{version}.dist-info"
        record.mkdir()
        (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (record / "RECORD").write_text("")
        (record / "INSTALLER").write_text("pip\n")
    return folder / "bin/python"


def test_the_resolve_sees_what_it_would_replace(python: Path) -> None:
    assert "numpy" in installed_by(python, f"numpy>{PRESENT['numpy']}")
    assert "numpy" not in installed_by(python, "numpy>=1.26", "safetensors")


def test_installing_replaces_neither_torch_nor_numpy(python: Path, wheel: Path) -> None:
    """Stricter than the install cells, which take the package with --no-deps: here its own bounds count too."""
    small = {package for chapter in CHAPTERS for package in small_packages(chapter)}
    found = installed_by(python, str(wheel), *sorted(small))
    assert {"effens", "optuna"} <= found
    assert found.isdisjoint(PRESENT)
    assert [name for name in found if name.startswith(("torch", "nvidia", "triton"))] == []


# The install cell


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A Python with this one's packages, pip among them, but without `effens`: a .pth file's own are not followed."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "python"], check=True)
    (packages,) = tmp_path.glob("python/lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return tmp_path / "python/bin/python"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """What stands at the book's address: this checkout's last commit as `main`."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    subprocess.run(["git", "clone", "--quiet", "--bare", ROOT, tmp_path / "book.git"], check=True)
    subprocess.run(["git", "update-ref", "refs/heads/main", "HEAD"], cwd=tmp_path / "book.git", check=True)
    subprocess.run(["git", "tag", "--force", f"v{project()['version']}"], cwd=tmp_path / "book.git", check=True)
    return tmp_path / "book.git"


def run_install_cell(python: Path, repository: Path, folder: Path) -> str:
    """What the cell prints where this repository stands at the book's address, and then where `effens` is."""
    folder.mkdir(exist_ok=True)
    asked = "\nimport effens\nprint('from', effens.__file__)\nprint('path', sys.path[-1])"
    (folder / "cell.ipy").write_text(install(CHAPTERS[0]) + asked)
    there = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{repository}.insteadOf",
        "GIT_CONFIG_VALUE_0": url(),
    }
    command = [str(python), "-m", "IPython", "--quick", "cell.ipy"]
    environment = outside() | there | {"IPYTHONDIR": str(folder / "ipython")}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if "hatchling" in run.stdout + run.stderr:
        pytest.skip("needs the package hatchling, which no index gave")
    print(run.stdout, run.stderr)  # shown if the test fails
    return str(run.stdout)


@pytest.mark.parametrize("tagged", [True, False])
def test_the_install_cell_takes_the_release_else_main(
    bare: Path, repository: Path, tmp_path: Path, tagged: bool
) -> None:
    release = f"v{project()['version']}"
    if not tagged:
        subprocess.run(["git", "tag", "--delete", release], cwd=repository, check=True)
    for _ in range(2):  # the second time, both are there
        said = run_install_cell(bare, repository, tmp_path / "reader")
        assert f"from {bare.parents[1]}" in said
        assert f"path {tmp_path}/reader/effens-book/chapters" in said
        assert (f"No {release} there: took main" in said) == (not tagged)
        tagged = True  # nothing is fetched again
    assert (tmp_path / "reader/effens-book/chapters" / CHAPTERS[0].name).exists()


def test_an_install_cell_that_fails_says_what_to_do(bare: Path, tmp_path: Path) -> None:
    said = run_install_cell(bare, tmp_path / "nowhere", tmp_path / "reader")
    assert "effens is not installed: restart the runtime and run this cell again;" in said
    assert f"or download {url()} and run `pip install .` there, or open an issue." in said
    assert "No v" not in said
    assert "from " not in said


# Each chapter with only the wheel


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """This Python with its packages, but `effens` from the wheel: a .pth file's own .pth files are not followed."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (packages / "sitecustomize.py").write_text(OFFLINE)
    shutil.unpack_archive(wheel, packages, "zip")
    return folder / "bin/python"


def outside(chapter: Path | None = None) -> dict[str, str]:
    """The environment of a reader: nothing of this checkout, and of the extras only what the chapter installs."""
    extras = {name_of(package) for packages in project()["optional-dependencies"].values() for package in packages}
    installed = {name_of(package) for package in small_packages(chapter)} if chapter else set()
    in_colab = {"effens", "matplotlib", "pandas", "ipywidgets", "ipython", "ipykernel", "nbclient", "scikit-learn"}
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "EFFENS"))}
    return kept | {"HIDDEN": " ".join(sorted(extras - installed - in_colab))}


def answer(kernel: Path, code: str, folder: Path) -> str:
    command = [str(kernel), "-P", "-c", code]
    run = subprocess.run(command, cwd=folder, env=outside(), capture_output=True, text=True, check=True)
    return str(run.stdout).strip()


def test_there_the_package_is_the_wheel_and_the_network_is_off(kernel: Path, tmp_path: Path) -> None:
    assert Path(answer(kernel, "import effens; print(effens.__file__)", tmp_path)).is_relative_to(kernel.parents[1])
    tried = "import urllib.request as r\ntry: r.urlopen('http://192.0.2.1', timeout=5)\nexcept OSError as e: print(e)"
    assert "the network is off" in answer(kernel, tried, tmp_path)
    assert "optuna" in answer(kernel, "try: import optuna\nexcept ModuleNotFoundError as e: print(e)", tmp_path)


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.stem)
def test_a_chapter_runs_alone_from_the_wheel_with_the_network_off(kernel: Path, chapter: Path, tmp_path: Path) -> None:
    notebook: Any = nbformat.read(chapter, as_version=4)
    shutil.copy(chapter, tmp_path)
    command = [kernel, "-P", "-c", RUN, chapter.name, NO_WIDGETS]
    subprocess.run(command, cwd=tmp_path, env=outside(chapter), check=True, timeout=600)
    ran = nbformat.read(tmp_path / chapter.name, as_version=4)
    code = [cell for cell in ran.cells if cell.cell_type == "code"]
    failed = [cell.id for cell in code for output in cell.outputs if output.output_type == "error"]
    meant = [cell.id for cell in notebook.cells if "raises-exception" in cell.metadata.get("tags", [])]
    assert failed == meant
    assert all(cell.execution_count for cell in code)
