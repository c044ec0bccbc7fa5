"""Every test can fail, since it or something that it calls asserts; no case occurs twice; skips are reported.

What a test calls is followed by name through tests/, so that this never accuses a test that does assert. That a list of
cases is not empty is pytest's to say (`empty_parameter_set_mark` in pyproject.toml).
"""

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from benchmarks.update_figures import ROOT


@cache
def trees() -> dict[str, ast.Module]:
    """Every file of the tests, parsed."""
    files = sorted((ROOT / "tests").rglob("*.py"))
    return {file.relative_to(ROOT).as_posix(): ast.parse(file.read_text(encoding="utf-8")) for file in files}


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def called(tree: ast.AST) -> set[str]:
    """Last names of everything that is called: `pytest.raises` is `raises`."""
    functions = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {f.attr if isinstance(f, ast.Attribute) else f.id if isinstance(f, ast.Name) else "" for f in functions}


def asserting(trees: list[ast.Module]) -> set[str]:
    """Names of functions that assert, fail or expect an error, or call one that does."""
    bodies: dict[str, list[ast.FunctionDef]] = {}
    for tree in trees:
        for function in functions(tree):
            bodies.setdefault(function.name, []).append(function)
    calls = {name: set().union(*map(called, same)) for name, same in bodies.items()}
    names = {"raises", "warns", "fail", *(name for found in calls.values() for name in found if "assert" in name)}
    names |= {
        name for name, same in bodies.items() for f in same if any(isinstance(n, ast.Assert) for n in ast.walk(f))
    }
    while more := {name for name, found in calls.items() if name not in names and found & names}:
        names |= more
    return names


def idle(tree: ast.Module, names: set[str]) -> list[str]:
    """Tests of a file that can fail only through an exception; names: of functions that assert."""
    checked = (f for f in functions(tree) if f.name.startswith("test_"))
    return [f.name for f in checked if not (called(f) & names or any(isinstance(n, ast.Assert) for n in ast.walk(f)))]


def repeated(tree: ast.Module) -> list[str]:
    """Cases that occur literally more than once in a list of parameters."""
    lists = [
        node.args[1].elts
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and called(node) >= {"parametrize"} and len(node.args) > 1
        if isinstance(node.args[1], ast.List | ast.Tuple)
    ]
    return [text for cases in lists for text, times in Counter(map(ast.unparse, cases)).items() if times > 1]


def test_every_test_asserts_something():
    names = asserting(list(trees().values()))
    assert {file: found for file, tree in trees().items() if (found := idle(tree, names))} == {}


def test_no_case_occurs_twice():
    assert {file: found for file, tree in trees().items() if (found := repeated(tree))} == {}


def test_an_idle_test_and_a_repeated_case_are_found():
    tree = ast.parse(
        "def test_a(): run(1)\n"
        "def test_b(): check(1)\n"
        "def check(x): expect(x)\n"
        "def expect(x): assert x\n"
        "@pytest.mark.parametrize('x', [1, 2, 1.0, 1])\n"
        "def test_c(x): other.assert_close(x, 1)\n"
        "def test_d():\n    with pytest.raises(ValueError): run(2)\n"
    )
    assert idle(tree, asserting([tree])) == ["test_a"]
    assert repeated(tree) == ["1"]


def test_skipped_tests_are_listed_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("from tests.conftest import pytest_terminal_summary\n")
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('x', [1, 2, 3])\ndef test_rust(x):\n    pytest.skip('rustc is not installed')\n"
        "@pytest.mark.skipif(True, reason='needs xllamacpp')\ndef test_llama(): pass\n"
        "def test_good(): pass\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        f"pythonpath={ROOT}",
        str(tmp_path),
    ]
    child = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert child.returncode == 0, child.stdout
    lines = child.stdout.splitlines()
    assert "not run here: 3 cases: rustc is not installed" in lines
    assert "not run here: 1 case: needs xllamacpp" in lines
