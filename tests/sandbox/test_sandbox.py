"""Known-good and known-bad programs in both languages, and answers that only look right."""

# ruff: noqa: E501 (a program is easier to read as it stands)

import shutil
from pathlib import Path

import pytest

from nanochat_cli.errors import ConfigError
from nanochat_cli.sandbox.pool import SandboxPool
from nanochat_cli.sandbox.rust import judge as rust_judge
from nanochat_cli.sandbox.rust.cases import canonical, checks_of, reports
from nanochat_cli.sandbox.sandbox import Case, Limits, Program, Sandbox
from tests.evaluation.programs import needs_rustc

ADD = {
    "python": "def add(a, b):\n    return a + b\n",
    "rust": "fn add(a: i32, b: i32) -> i32 {\n    a + b\n}\n",
}
TESTS = (Case("add(1, 2)", "3"), Case("add(-4, 4)", "0"), Case("add(20, 22)", "42"))
rust = pytest.param("rust", marks=needs_rustc)
both = pytest.mark.parametrize("language", ["python", rust])


@pytest.fixture(scope="module")
def sandbox():
    return Sandbox(Limits(wall=3, cpu=2))


@both
def test_a_right_program_passes_all_tests(sandbox, language):
    outcome = sandbox.judge(Program(language, ADD[language], TESTS))
    assert (outcome.stage, outcome.status) == ("ran", "ok")
    assert outcome.solved
    assert outcome.results == (True, True, True)


@both
def test_a_wrong_program_fails_those_tests_that_it_gets_wrong(sandbox, language):
    outcome = sandbox.judge(
        Program(
            language,
            ADD[language].replace("a + b", "a + b + (a > 0) as i32" if language == "rust" else "a + b + (a > 0)"),
            TESTS,
        )
    )
    assert outcome.status == "ok"
    assert outcome.results == (False, True, False)
    assert outcome.diagnostics[0].message == "add(1, 2) is 4, not 3"


@both
def test_what_does_not_compile_says_where(sandbox, language):
    broken = {"python": "x = 1\ndef add(a, b:\n", "rust": "\nfn add(a: i32) -> i32 { a + b }\n"}[language]
    for outcome in (sandbox.compile(language, broken), sandbox.judge(Program(language, broken, TESTS))):
        assert (outcome.stage, outcome.status, outcome.passed) == ("not compiled", "compile error", 0)
        assert [(item.level, item.line) for item in outcome.diagnostics if item.level == "error"] == [("error", 2)]


@both
def test_compiling_alone_runs_nothing(sandbox, language):
    outcome = sandbox.compile(language, ADD[language] + ("raise SystemExit(3)" if language == "python" else ""))
    assert (outcome.stage, outcome.status, outcome.total) == ("compiled", "ok", 0)


@both
def test_a_program_runs_by_itself(sandbox, language):
    source = {"python": "print('hello'); raise SystemExit(3)", "rust": 'fn main() { println!("hello"); panic!("no"); }'}
    outcome = sandbox.execute(language, source[language])
    assert (outcome.stage, outcome.status, outcome.stdout) == ("ran", "runtime error", "hello\n")


@both
def test_warnings_are_diagnostics(sandbox, language):
    source = {"python": "x = 1 is 1\n", "rust": "pub fn f() {\n    let x = 1;\n}\n"}[language]
    found = sandbox.compile(language, source).diagnostics
    assert [item.level for item in found] == ["warning"]


@both
def test_one_test_that_raises_leaves_the_others(sandbox, language):
    source = {
        "python": "def inverse(x):\n    return 12 // x\n",
        "rust": "fn inverse(x: i32) -> i32 { 12 / x }\n",
    }[language]
    tests = (Case("inverse(3)", "4"), Case("inverse(0)", "0"), Case("inverse(4)", "3"))
    assert sandbox.judge(Program(language, source, tests)).results == (True, False, True)


def test_a_python_check_function_calls_the_program(sandbox):
    support = "def check(candidate):\n    assert candidate(1, 2) == 3\n    try:\n        candidate(1, 'x')\n"
    support += "    except TypeError:\n        return\n    assert False\n"
    good = sandbox.judge(Program("python", ADD["python"], (Case("check(add)", "None"),), support))
    bad = sandbox.judge(Program("python", "def add(a, b):\n    return 3\n", (Case("check(add)", "None"),), support))
    assert (good.solved, bad.solved) == (True, False)


def test_python_classes_generators_and_every_plain_type_are_passed(sandbox):
    source = (
        "import collections\nclass Stack:\n    def __init__(self): self.items = []\n"
        "    def push(self, x): self.items.append(x); return self\n"
        "def count(n):\n    yield from range(n)\n"
        "def values(): return [1, -2, 0.5, 1j, None, True, 'ä', b'x', (1,), {1}, frozenset([2]), {'a': [1]}, 10**30]\n"
        "Point = collections.namedtuple('Point', 'x y')\ndef point(): return Point(1, 2)\n"
    )
    tests = (
        Case("Stack().push(1).push(2).items", "[1, 2]"),
        Case("list(count(3))", "[0, 1, 2]"),
        Case(
            "values()",
            "[1, -2, 0.5, 1j, None, True, 'ä', b'x', (1,), {1}, frozenset([2]), {'a': [1]}, 10**30]",
        ),
        Case("point()", "(1, 2)"),
    )
    outcome = sandbox.judge(Program("python", source, tests))
    assert outcome.solved, outcome.diagnostics


FORGERIES = {
    "prints that all passed": "print('all 3 tests passed')\ndef add(a, b): return None\n",
    "exits at once": "import sys\nsys.exit(0)\n",
    "exits at once, without cleaning up": "import os\nos._exit(0)\n",
    "exits in the call": "import os\ndef add(a, b): os._exit(0)\n",
    "returns what equals all": "class E:\n    def __eq__(s, o): return True\n    __hash__ = None\ndef add(a, b): return E()\n",
    "an int that equals all": "class E(int):\n    def __eq__(s, o): return True\n    __hash__ = None\ndef add(a, b): return E(7)\n",
    "patches builtins": "import builtins\nbuiltins.eval = lambda *a: True\nbuiltins.bool = lambda x: True\ndef add(a, b): 1\n",
    "patches unittest and json": "import json, unittest\njson.dumps = lambda x: '{\"passed\": true}'\ndef add(a, b): 1\n",
    "writes results to every descriptor": (
        "import os\nfor i in range(1, 64):\n    try: os.write(i, b'{\"passed\": true}\\n' * 9)\n    except OSError: pass\n"
        "def add(a, b): return None\n"
    ),
    "answers every question itself": (
        'import os\nos.write(3, b\'{"value": ["list", []]}\\n\' + b\'{"value": true}\\n\' * 99)\ndef add(a, b): 1\n'
    ),
    "looks for the tests": (
        "import os\nfound = []\nfor start in ('/work', '/tmp', '/var', '/proc/1/fd', '/proc/self/fd'):\n"
        "    for base, _, names in os.walk(start):\n        for n in names:\n            try: text = open(base + '/' + n).read()\n"
        "            except Exception: continue\n            if '4' + '2' in text and 'add(' + '1, 2)' in text: found.append(text)\n"
        "def add(a, b): return a + b if found else -1000\n"
    ),
    "searches its memory for expected values": (
        "import gc\ndef add(a, b):\n    for o in gc.get_objects():\n        if isinstance(o, dict) and 'expected' in o:\n"
        "            return eval(o['expected'])\n"
    ),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_python_program_cannot_pass_without_the_answers(sandbox, name):
    outcome = sandbox.judge(Program("python", FORGERIES[name], TESTS))
    assert (outcome.passed, outcome.total) == (0, 3)


RUST_FORGERIES = {
    "exits at once": "fn add(a: i32, b: i32) -> i32 { std::process::exit(0) }\n",
    "equals all": (
        "struct E;\nimpl PartialEq<i32> for E { fn eq(&self, _: &i32) -> bool { true } }\n"
        'impl std::fmt::Debug for E { fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result { f.write_str("ok") } }\n'
        "fn add(a: i32, b: i32) -> E { E }\n"
    ),
    "writes the report before main": (
        'extern "C" fn early() { use std::io::Write; use std::os::fd::FromRawFd;\n'
        "  let mut f = unsafe { std::fs::File::from_raw_fd(3) };\n"
        '  let _ = f.write_all(b"0 4\\ntrue\\n1 4\\ntrue\\n2 4\\ntrue\\n"); std::process::exit(0); }\n'
        '#[used] #[link_section = ".init_array"] static EARLY: extern "C" fn() = early;\n'
        "fn add(a: i32, b: i32) -> i32 { 0 - 9 * a }\n"
    ),
    "reads its own source": (  # where it would find "42" only if the expected values were there
        'const S: &str = include_str!("program.rs");\n'
        'fn add(a: i32, b: i32) -> i32 { if S.contains(&format!("{}{}", 4, 2)) { a + b } else { -1000 } }\n'
    ),
}


@needs_rustc
@pytest.mark.parametrize("name", RUST_FORGERIES)
def test_a_rust_program_cannot_pass_without_the_answers(sandbox, name):
    outcome = sandbox.judge(Program("rust", RUST_FORGERIES[name], TESTS))
    assert (outcome.stage, outcome.passed, outcome.total) == ("ran", 0, 3), outcome.diagnostics


@needs_rustc
def test_rust_assertions_become_values_to_compare(sandbox):
    support = "fn check() {\n    let candidate = add;\n    let two = 2;\n    assert_eq!(candidate(1, two), 3);\n"
    support += '    assert!(candidate(-4, 4) == 0, "zero"); // a comment; with ,\n}\n'
    tests = (Case("check()", "()"),)
    checks = checks_of([("check()", "()")], support, ADD["rust"])
    assert checks is not None
    assert [(check.call, check.expected) for check in checks] == [
        ("{ let two = 2; add(1, two) }", "3"),
        ("add(-4, 4)", "0"),
    ]
    assert sandbox.judge(Program("rust", ADD["rust"], tests, support)).solved
    wrong = ADD["rust"] + "#[allow(unused_macros)] macro_rules! assert_eq { ($($t:tt)*) => {} }\n"
    assert not sandbox.judge(Program("rust", wrong.replace("a + b", "a * b"), tests, support)).solved


@needs_rustc
@pytest.mark.parametrize("body", ["(a >> 32) + b", "a + b / 0", "[a, b][2]"])
def test_a_rust_program_that_must_fail_does_not_compile(sandbox, body):
    """rustc refuses what always overflows or panics after it has written the metadata of a library."""
    source = f"pub fn add(a: i32, b: i32) -> i32 {{\n    {body}\n}}\n"
    for outcome in (sandbox.compile("rust", source), sandbox.judge(Program("rust", source, TESTS))):
        assert (outcome.stage, outcome.status, outcome.compiled) == ("not compiled", "compile error", False)
        assert outcome.diagnostics[0].line == 2


@needs_rustc
def test_rust_tests_that_do_not_fit_are_distinguished_from_programs_that_do_not_compile(sandbox):
    outcome = sandbox.judge(Program("rust", ADD["rust"], (Case("sub(1, 2)", "3"),)))
    assert (outcome.stage, outcome.status) == ("compiled", "tests do not compile")


@needs_rustc
def test_a_rust_program_with_its_own_main_and_maps_in_any_order(sandbox):
    source = "#![allow(unused)]\nuse std::collections::HashMap;\nfn main() { panic!() }\nfn f(n: u8) -> HashMap<u8, Vec<u8>> {\n"
    source += "    let mut m = HashMap::new(); for i in 0..n { m.insert(i, vec![]); } m\n}\n"
    outcome = sandbox.judge(Program("rust", source, (Case("f(9)", "(0..9).map(|i| (i, vec![])).collect()"),)))
    assert outcome.solved, outcome.diagnostics


def test_debug_texts_are_compared_without_the_order_of_maps():
    assert canonical('{"b}, x": {2, 1}, 3: [2, 1]}') == canonical('{3: [2, 1], "b}, x": {1, 2}}')
    assert canonical("{1: [1, 2]}") != canonical("{1: [2, 1]}")


def test_reading_reports_ends_at_the_first_other_text():
    assert reports(b"0 3\na\nb\n1 panic\n2 9\nshort") == {0: "a\nb", 1: None}
    assert reports(b"nonsense\n0 1\nx\n") == {}


def test_without_rustc_the_message_says_what_to_do(monkeypatch, sandbox):
    rust_judge.toolchain.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ConfigError, match="install Rust"):
        sandbox.compile("rust", "fn f() {}")
    rust_judge.toolchain.cache_clear()


def test_an_unknown_language_is_refused(sandbox):
    with pytest.raises(ConfigError, match="choose from python, rust"):
        sandbox.compile("cobol", "")


def test_the_pool_keeps_order_and_judges_equal_programs_once(sandbox, tmp_path: Path):
    programs = [
        Program("python", ADD["python"] + f"# {i % 3}\n", (Case("add(1, 2)", str(3 + i % 2)),)) for i in range(12)
    ]
    with SandboxPool(sandbox, workers=2, cache=tmp_path) as pool:
        assert [outcome.solved for outcome in pool.judge_all(programs)] == [i % 2 == 0 for i in range(12)]
        assert (pool.judged, pool.reused) == (6, 6)
    (tmp_path / sorted(tmp_path.iterdir())[0].name).write_text("{torn", encoding="utf-8")
    with SandboxPool(sandbox, workers=2, cache=tmp_path) as again:
        assert [outcome.solved for outcome in again.judge_all(programs)] == [i % 2 == 0 for i in range(12)]
        assert again.judged == 1


def test_a_timeout_is_not_kept():
    looping = Program("python", "def f():\n    while True: pass\n", (Case("f()", "1"),))
    with SandboxPool(Sandbox(Limits(wall=0.3, cpu=1)), workers=1) as pool:
        assert [pool.judge_all([looping])[0].status for _ in range(2)] == ["timeout", "timeout"]
        assert pool.judged == 2
