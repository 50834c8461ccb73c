"""The workflows, by what their files say: they run on GitHub alone, but these rules can be read off here."""

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from address import ROOT

FILES = sorted((ROOT / ".github/workflows").glob("*.yml"))
MAY_WRITE = {("book", "deploy"): {"pages", "id-token"}, ("weekly", "report"): {"issues"}}


def parsed(name: str) -> dict[str, Any]:
    found = yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text("utf-8"))
    return {"on" if key is True else str(key): value for key, value in found.items()}  # YAML 1.1 reads `on` as true


def jobs() -> list[tuple[str, str, dict[str, Any]]]:
    return [(file.stem, name, job) for file in FILES for name, job in parsed(file.stem)["jobs"].items()]


def steps(key: str) -> list[tuple[str, str, dict[str, Any]]]:
    return [(file, name, step) for file, name, job in jobs() for step in job["steps"] if key in step]


def commands(file: str, job: str | None = None) -> str:
    return "\n".join(step["run"] for at, name, step in steps("run") if at == file and job in (None, name))


def test_there_are_two_workflows() -> None:
    assert [file.name for file in FILES] == ["book.yml", "weekly.yml"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_actions_are_pinned_by_commit_and_say_their_version(file: Path) -> None:
    lines = [line for line in file.read_text("utf-8").splitlines() if re.search(r"\buses:", line)]
    assert len(lines) == sum(at == file.stem for at, _, _ in steps("uses"))
    form = r"\s*(?:- )?uses: actions/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+"
    assert [line for line in lines if not re.fullmatch(form, line)] == []


def test_an_action_has_one_version_everywhere() -> None:
    used = {step["uses"] for _, _, step in steps("uses")}
    assert len({action.split("@")[0] for action in used}) == len(used)


def test_a_job_gets_no_permission_that_it_does_not_need() -> None:
    assert {file.stem: parsed(file.stem)["permissions"] for file in FILES} == {"book": {}, "weekly": {}}
    for file, name, job in jobs():
        granted = job["permissions"]
        assert {scope for scope, access in granted.items() if access == "write"} == MAY_WRITE.get((file, name), set())
        assert {scope for scope, access in granted.items() if access != "write"} <= {"contents"}
        checks_out = any("actions/checkout@" in step.get("uses", "") for step in job["steps"])
        assert (granted.get("contents") == "read") == checks_out


def test_no_token_is_left_in_a_checkout() -> None:
    kept = [step for _, _, step in steps("uses") if "checkout@" in step["uses"]]
    assert [step for step in kept if step["with"]["persist-credentials"] is not False] == []


def test_every_job_ends() -> None:
    assert [name for _, name, job in jobs() if not 0 < job["timeout-minutes"] <= 90] == []


def test_what_others_write_is_never_run() -> None:
    """A title or a branch's name put into a script by the workflow's own templates would be."""
    assert [step["run"] for _, _, step in steps("run") if "${{" in step["run"]] == []
    assert [file.stem for file in FILES if "pull_request_target" in parsed(file.stem)["on"]] == []


def test_scripts_parse() -> None:
    for _, _, step in steps("run"):
        checked = subprocess.run(["bash", "-n"], input=step["run"], text=True, capture_output=True, check=False)
        assert checked.stderr == ""


def test_a_change_is_checked_in_full_and_only_main_is_published() -> None:
    book = parsed("book")
    assert set(book["on"]) == {"push", "pull_request", "workflow_dispatch"}
    assert book["on"]["push"] == {"branches": ["main"]}
    assert ".ci/run" in commands("book", "check").splitlines()
    assert book["jobs"]["deploy"]["needs"] == ["check", "package"]
    assert book["jobs"]["deploy"]["if"] == "github.ref == 'refs/heads/main'"
    (pages,) = (step for _, _, step in steps("uses") if "upload-pages-artifact@" in step["uses"])
    assert pages["with"]["path"] == "_build/html"
    assert pages["if"] == book["jobs"]["deploy"]["if"]


def test_the_package_is_built_and_kept() -> None:
    assert "hatchling build --directory dist" in commands("book", "package")
    kept = [
        step["with"] for at, name, step in steps("uses") if name == "package" and "upload-artifact@" in step["uses"]
    ]
    assert [files["path"] for files in kept] == ["dist"]


def test_every_week_there_is_a_run() -> None:
    ((line,),) = (entry.values() for entry in parsed("weekly")["on"]["schedule"])
    minute, hour, day, month, weekday = line.split()
    assert (day, month) == ("*", "*")
    assert 0 <= int(minute) < 60
    assert 0 <= int(hour) < 24
    assert 0 <= int(weekday) < 7


def test_the_weekly_run_takes_the_newest_packages_and_python_3_13_in_full() -> None:
    newest = parsed("weekly")["jobs"]["newest"]
    assert newest["strategy"]["matrix"]["python"] == ["3.11", "3.13"]
    assert "requirements.txt" not in commands("weekly", "newest")
    assert 'pip install --editable ".[dev]"' in commands("weekly", "newest")
    version = [step["with"]["python-version"] for _, name, step in steps("uses") if name == "python-3-13"
               and "setup-python@" in step["uses"]]  # fmt: skip
    assert version == ["3.13"]
    full = commands("weekly", "python-3-13").splitlines()
    for command in ("python -m pip install -r requirements.txt && pytest", "pytest -m slow -n 2"):
        assert command in full
        assert command in (ROOT / ".ci/run").read_text("utf-8").splitlines()
    assert "jupyter-book build . -W -n --keep-going" in full


def test_the_weekly_run_counts_what_the_tests_reach() -> None:
    """With `fail_under`, which holds for the documented command alone: the quick tests reach less."""
    command = 'pytest tests -m "slow or not slow" --cov'
    assert command in commands("weekly", "coverage").splitlines()
    assert f"`{command}`" in (ROOT / "README.md").read_text("utf-8")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["coverage"]
    assert settings["report"]["fail_under"] == 95


def test_the_weekly_run_looks_at_outside_links_and_known_holes() -> None:
    assert "--builder linkcheck" in commands("weekly", "links")
    assert "https://doi.org/api/handles/" in commands("weekly", "links")  # publishers refuse robots: they are not asked
    assert "pip-audit" in commands("weekly", "audit")


def test_a_failure_of_any_weekly_job_opens_an_issue() -> None:
    weekly = parsed("weekly")["jobs"]
    assert set(weekly["report"]["needs"]) == set(weekly) - {"report"}
    results = [f"contains(needs.*.result, '{result}')" for result in ("failure", "cancelled")]
    assert weekly["report"]["if"] == f"always() && ({' || '.join(results)})"  # cancelled() is of the whole run alone
    assert "gh issue create" in commands("weekly", "report")
