"""Colab, as far as it can be had here: what an install replaces, the install cell, and each chapter, offline."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from effens_book.address import ROOT, install, project, url
from effens_book.rerun import chapters

pytestmark = pytest.mark.slow
CHAPTERS = chapters()


def outside() -> dict[str, str]:
    """The environment of a reader: nothing of this checkout, nor of an activated environment, which IPython adds."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "EFFENS", "VIRTUAL_ENV"))}


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


def test_the_wheel_holds_the_library_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        folders = {name.split("/")[0] for name in archive.namelist()}
    assert folders == {"effens", f"effens-{project()['version']}.dist-info"}
    assert wheel.stat().st_size < 500_000


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
