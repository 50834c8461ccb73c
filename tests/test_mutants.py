"""The mutation run itself: what it changes, what it leaves alone; its explanations are of mutants that there are."""

import ast
import re
from pathlib import Path

import mutants
import pytest

SOURCE = '''
"""Words."""

SIZE: int = 3


class A:
    """Words, 1 of them."""

    @cache
    def f(self, a: int | None = 2) -> "A":
        """Words."""
        if a < 1 and not self.b:
            raise ValueError(f"a must be >= 1, got {a + 1}")
        self.c = [x for x in a if x]
        name = isinstance(a, int | float)
        return -a + len("two words")
'''
CHANGED = {
    "SIZE: int = 3 | 3 to 4",
    'def f(self, a: int | None = 2) -> "A": | 2 to 3',
    "if a < 1 and not self.b: | condition negated",
    "if a < 1 and not self.b: | And to Or",
    "if a < 1 and not self.b: | Lt to LtE",
    "if a < 1 and not self.b: | Lt to GtE",
    "if a < 1 and not self.b: | 1 to 2",
    "if a < 1 and not self.b: | not dropped",
    'raise ValueError(f"a must be >= 1, got {a + 1}") | deleted',
    "self.c = [x for x in a if x] | deleted",
    "self.c = [x for x in a if x] | condition negated",
    'return -a + len("two words") | returns None',
    'return -a + len("two words") | Add to Sub',
    'return -a + len("two words") | USub to UAdd',
}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "effens").mkdir()
    path = tmp_path / "effens/a.py"
    path.write_text(SOURCE)
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    return path


def test_code_is_changed_and_words_annotations_and_messages_are_not(file: Path) -> None:
    found = [mutant.key.split(" | ", 2)[2] for mutant in mutants.mutants_of(file)]
    assert len(found) == len(set(found))
    assert set(found) == CHANGED


def test_each_mutant_changes_one_line(file: Path) -> None:
    for i, mutant in enumerate(mutants.mutants_of(file)):
        fresh = list(mutants.mutants_of(file))[i]
        before = ast.unparse(fresh.tree).splitlines()
        fresh.change()
        after = ast.unparse(ast.fix_missing_locations(fresh.tree)).splitlines()
        assert sum(one != other for one, other in zip(before, after, strict=True)) == 1, mutant.key
        compile(fresh.tree, "a", "exec")


def test_the_sample_is_fixed_and_of_all_files() -> None:
    drawn = [mutant.key for mutant in mutants.sample(400, 0)]
    assert len(set(drawn)) == 400
    assert drawn[:40] == [mutant.key for mutant in mutants.sample(40, 0)]
    assert {key.split(" | ")[0] for key in drawn} == mutants.TESTS.keys()


def test_explanations_are_of_mutants_there_are() -> None:
    keys = {mutant.key for mutant in mutants.sample(10**6, 0)}  # all: which are drawn depends on how many there are
    explained = re.findall(r"^- `(.*)`: \w", mutants.EXPLAINED.read_text("utf-8"), re.MULTILINE)
    assert explained
    assert [key for key in explained if key not in keys] == []
