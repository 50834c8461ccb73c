"""Do the tests bite? Change one thing in the code, run the tests that reach it, and count the changes they notice.

    python tests/mutants.py              # a fixed sample of 400; may be killed at any time, and goes on
    python tests/mutants.py --sample 40  # its first 40

A mutant is one changed comparison, operator, constant, condition or returned value, or one deleted statement, in
memory: no file is touched. It is run in a fork of a process that has imported PyTorch, against the tests of its file
that reach its statement, until one fails. Verdicts are kept in `_build/mutants.json`; one of a mutant that survived
holds until code or tests change. `tests/mutants.md` says of survivors why no test can tell them from the code.
"""

import argparse
import ast
import gc
import hashlib
import importlib
import importlib.machinery
import importlib.metadata
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import coverage
import pytest

ROOT = Path(__file__).parent.parent
VERDICTS, REACH = ROOT / "_build/mutants.json", ROOT / "_build/mutants_reach.json"
EXPLAINED = ROOT / "tests/mutants.md"
COMMON = ("contract", "properties", "errors", "examples")
TESTS = {  # a file, and which tests are meant to notice what changes in it
    "ensembles/base.py": ("base", "deep", "batch", "mimo", *COMMON),
    **{f"ensembles/{name}.py": (name, *COMMON) for name in ("batch", "deep", "snapshot", "swag", "mimo", "hyper")},
    "training.py": ("training", "resume", "device", *COMMON),
    "scores.py": ("scores", *COMMON),
    "risk.py": ("risk", *COMMON),
}
GOAL = 0.85
LIMIT = 120  # seconds until a mutant that does not end is killed
ENOUGH = 15.0  # seconds of one file's tests, the quickest first, after which a mutant has survived them

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}


@dataclass
class Mutant:
    """One change: where, what, and how it is made in the file's tree."""

    path: Path
    tree: ast.Module
    lines: range
    key: str
    change: Callable[[], object]


def changes(node: ast.AST) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield what can be changed in a node itself, each with a name."""
    match node:
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                for new in COMPARISONS[type(op)]:
                    yield f"{type(op).__name__} to {new.__name__}", partial(ops.__setitem__, i, new())
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in OPERATORS:
            other = OPERATORS[type(op)]
            yield f"{type(op).__name__} to {other.__name__}", lambda: setattr(node, "op", other())
        case ast.UnaryOp(op=ast.USub()):
            yield "USub to UAdd", lambda: setattr(node, "op", ast.UAdd())
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield "not dropped", lambda: setattr(node, "operand", ast.UnaryOp(ast.Not(), operand))
        case ast.BoolOp(op=op):
            swapped = ast.Or if isinstance(op, ast.And) else ast.And
            yield f"{type(op).__name__} to {swapped.__name__}", lambda: setattr(node, "op", swapped())
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
            yield "condition negated", lambda: setattr(node, "test", ast.UnaryOp(ast.Not(), test))
        case ast.comprehension(ifs=[test, *_]):
            yield "condition negated", lambda: node.ifs.__setitem__(0, ast.UnaryOp(ast.Not(), test))
        case ast.Return(value=ast.expr()):
            yield "returns None", lambda: setattr(node, "value", ast.Constant(None))
        case ast.Constant(value=bool() as value):
            yield f"{value} to {not value}", lambda: setattr(node, "value", not value)
        case ast.Constant(value=int() | float() as number):
            yield f"{number} to {number + 1}", lambda: setattr(node, "value", number + 1)
        case ast.Constant(value=str() as text) if " " not in text:
            yield f"{text!r} to 'XX{text}'", lambda: setattr(node, "value", "XX" + text)


def deletable(statement: ast.stmt) -> bool:
    """Say whether a statement can go and leave no name undefined."""
    match statement:
        case ast.Expr(value=ast.Constant()):
            return False  # a docstring
        case ast.Assign(targets=[ast.Name() | ast.Tuple()]):
            return False
    return isinstance(statement, ast.Expr | ast.Assign | ast.AugAssign | ast.Raise | ast.Continue | ast.Break)


def mutants_of(path: Path) -> Iterator[Mutant]:
    """Yield every mutant of a file; not of annotations, decorators and messages."""
    source = path.read_text()
    tree = ast.parse(source)
    text = source.splitlines()
    seen: Counter[str] = Counter()

    def mutant(node: ast.AST, name: str, where: str, lines: range, change: Callable[[], object]) -> Mutant:
        line = text[getattr(node, "lineno", lines.start) - 1].strip()
        key = f"{path.relative_to(ROOT / 'effens')} | {where} | {line} | {name}"
        seen[key] += 1
        return Mutant(path, tree, lines, key + f" #{seen[key]}" * (seen[key] > 1), change)

    def visit(node: ast.AST, where: str, lines: range) -> Iterator[Mutant]:
        for name, change in changes(node):
            if where or (isinstance(node, ast.Constant) and not isinstance(node.value, str)):
                yield mutant(node, name, where, lines, change)
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            where = f"{where}.{node.name}".lstrip(".")
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list", "bases") or isinstance(node, ast.Raise):
                continue
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                value = node.args[:1] if field == "args" else []
            for i, child in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(child, ast.JoinedStr) or not isinstance(child, ast.AST):
                    continue
                if isinstance(child, ast.stmt):
                    if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                        continue
                    inner = getattr(child, "body", None)  # of a compound statement, its head
                    end = inner[0].lineno - 1 if isinstance(inner, list) else child.end_lineno or child.lineno
                    lines = range(child.lineno, max(end, child.lineno) + 1)
                    if where and deletable(child):
                        gone = ast.copy_location(ast.Pass(), child)
                        yield mutant(child, "deleted", where, lines, partial(value.__setitem__, i, gone))
                yield from visit(child, where, lines)

    yield from visit(tree, "", range(0))


def sample(size: int, seed: int) -> list[Mutant]:
    """Draw mutants by a hash of what they are, so that a change elsewhere in a file leaves the sample as it is."""
    found = [mutant for name in TESTS for mutant in mutants_of(ROOT / "effens" / name)]
    return sorted(found, key=lambda m: hashlib.sha256(f"{seed} {m.key}".encode()).digest())[:size]


def import_what_is_imported() -> None:
    """Import, once for all forks, the packages that code, tests and pytest import, but not `effens`."""
    tests = sorted((ROOT / "tests").glob("*.py"))
    ours = {"effens", *(path.stem for path in tests)}
    for path in [*(ROOT / "effens").rglob("*.py"), *tests, ROOT / "conftest.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                if name.split(".")[0] not in ours:
                    with suppress(ImportError):
                        importlib.import_module(name)
    for plugin in importlib.metadata.entry_points(group="pytest11"):
        plugin.load()
    gc.freeze()


def run_pytest(paths: Iterable[str], *plugins: object) -> int:
    """Run test files in this process, in silence, until a test fails."""
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    options = ["-o", "addopts=", "-x", "-q", "--tb=no", "--assert=plain", "-p", "no:cacheprovider", "-m", "not slow"]
    return int(pytest.main([*options, *paths], plugins))


class Only:
    """Run these tests, in this order, and leave the process at once when it is known whether one fails."""

    def __init__(self, tests: list[str]) -> None:
        self.place = {test: i for i, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.place), key=lambda item: self.place[item.nodeid])

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            os._exit(1)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            os._exit(1)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        os._exit(0 if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) else 1)


class Watch:
    """Which tests reach which lines, and how long each takes."""

    def __init__(self) -> None:
        self.coverage = coverage.Coverage(data_file=None, config_file=False, include=[str(ROOT / "effens/*")])
        self.seconds: dict[str, float] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        began = time.process_time()
        self.coverage.switch_context(item.nodeid)
        result = yield
        self.coverage.switch_context("")
        self.seconds[item.nodeid] = time.process_time() - began
        return result


def reach(name: str) -> dict[str, Any]:
    """Run one file's tests, unchanged, in a fork: the seconds each takes, and the tests that reach each line."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        watch = Watch()
        watch.coverage.start()
        code = run_pytest([f"tests/test_{name}.py"], watch)
        watch.coverage.stop()
        data = watch.coverage.get_data()
        files = {os.path.relpath(path, ROOT): data.contexts_by_lineno(path) for path in data.measured_files()}
        with os.fdopen(write, "w") as out:
            json.dump({"code": code, "seconds": watch.seconds, "reached": files}, out)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as came:
        found: dict[str, Any] = json.load(came)
    os.waitpid(child, 0)
    if found["code"] != 0:
        sys.exit(f"the tests must pass before anything is changed, got failures in tests/test_{name}.py")
    return found


def tests_for(mutant: Mutant, reached: dict[str, Any]) -> list[list[str]]:
    """Return the tests, file by file, that reach a mutant's statement; the quickest of a file first."""
    files = []
    for name in TESTS[str(mutant.path.relative_to(ROOT / "effens"))]:
        seconds = reached[name]["seconds"]
        lines = reached[name]["reached"].get(str(mutant.path.relative_to(ROOT)), {})
        tests = {test for line in mutant.lines for test in lines.get(str(line), [])}
        ordered = sorted(seconds if "" in tests else tests, key=lambda test: seconds[test])  # "": on import
        until = accumulate(seconds[test] for test in ordered)
        files.append([test for test, total in zip(ordered, until, strict=True) if total < ENOUGH])
    return [tests for tests in files if tests]


def verdict(mutant: Mutant, tests: list[str]) -> str:
    """Run tests of one file on a mutant, in a fork: survived, killed, or killed by the clock."""
    if (child := os.fork()) == 0:
        signal.alarm(LIMIT)  # ends the fork also where this process is killed
        mutant.change()
        code = compile(ast.fix_missing_locations(mutant.tree), str(mutant.path), "exec")
        loader: Any = importlib.machinery.SourceFileLoader
        usual = loader.get_code
        loader.get_code = lambda self, name: code if self.path == str(mutant.path) else usual(self, name)
        run_pytest({test.split("::")[0] for test in tests}, Only(tests))
        os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
        return "killed by the clock"
    return "killed" if status else "survived"


def judged(mutant: Mutant, reached: dict[str, Any]) -> str:
    """Run the tests that reach a mutant, file by file, until one fails."""
    said = "not reached"
    for tests in tests_for(mutant, reached):
        if (said := verdict(mutant, tests)) != "survived":
            break
    return said


def check(mutant: Mutant, reached: dict[str, Any]) -> None:
    """Make sure that a mutant in which nothing is changed survives: else every verdict would be the machinery's."""
    if (said := judged(replace(mutant, change=lambda: None), reached)) != "survived":
        sys.exit(f"a mutant in which nothing is changed must survive, got {said}")


def digest(*tests: str) -> str:
    """Return a hash of the code and of test files."""
    paths = [*sorted((ROOT / "effens").rglob("*.py")), *(ROOT / f"tests/{name}.py" for name in ("scenarios", *tests))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def read(path: Path) -> Any:
    """Read what `write` wrote."""
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, content: Any) -> None:
    """Write a file, whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".new").write_text(json.dumps(content))
    path.with_suffix(".new").replace(path)


def reached_lines() -> dict[str, Any]:
    """Return what each file's tests reach; those that changed are run again."""
    found = read(REACH)
    for name in dict.fromkeys(name for names in TESTS.values() for name in names):
        if found.get(name, {}).get("digest") != (now := digest(f"test_{name}")):
            found[name] = {**reach(name), "digest": now}
            write(REACH, found)
    return dict(found)


def main() -> int:
    """Run what has no verdict yet; print the survivors and the share of the killed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sample", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    import_what_is_imported()
    reached = reached_lines()
    now = digest(*sorted(f"test_{name}" for name in reached))
    verdicts = {key: said for key, said in read(VERDICTS).items() if said[0].startswith("killed") or said[1] == now}
    drawn = sample(options.sample, options.seed)
    check(drawn[0], reached)
    for i, mutant in enumerate(drawn):
        if mutant.key not in verdicts:
            verdicts[mutant.key] = judged(mutant, reached), now
            write(VERDICTS, verdicts)
        if not (said := verdicts[mutant.key][0]).startswith("killed"):
            print(f"{i}: {said}: {mutant.path.name}:{mutant.lines.start} {mutant.key}", flush=True)
    left = [mutant.key for mutant in drawn if not verdicts[mutant.key][0].startswith("killed")]
    reasons = EXPLAINED.read_text() if EXPLAINED.exists() else ""
    unexplained = [key for key in left if key not in reasons]
    share = 1 - len(left) / len(drawn)
    print(f"{len(drawn) - len(left)} of {len(drawn)} killed ({share:.1%}); {len(unexplained)} survivors unexplained")
    return int(share < GOAL or bool(unexplained))


if __name__ == "__main__":
    sys.exit(main())
