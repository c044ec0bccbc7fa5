"""Objects of a program decide no test: only plain values are graded, against values that know nothing of the program."""

# ruff: noqa: E501 (a program is easier to read as it stands)

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest

from nanochat_cli.sandbox.sandbox import Case, Limits, Program, Sandbox
from tests.evaluation.programs import needs_rustc

EVERYTHING = (  # agrees with whatever it is asked
    "class Yes:\n    def __init__(self, *a): pass\n"
    + "".join(
        f"    def __{name}__(self, *a): return True\n"
        for name in "eq ne lt le gt ge contains bool instancecheck isabstractmethod".split()
    )
    + "".join(
        f"    def __{name}__(self, *a): return self\n"
        for name in "abs neg pos invert add radd sub rsub mul rmul truediv rtruediv mod floordiv pow and or xor round call enter".split()
    )
    + "    def __len__(self): return 1\n    def __hash__(self): return hash(3)\n    def __iter__(self):\n"
    "        i = 0\n        while True:\n            yield i\n            i += 1\n    def __getattr__(self, name): return self\n"
)
ANSWERS = {
    "an object": EVERYTHING + "def f(x): return Yes()\n",
    "a list of objects": EVERYTHING + "def f(x): return [Yes()]\n",
    "an object as a key": EVERYTHING + "def f(x): return {Yes(): Yes()}\n",
    "an endless iterator": "import itertools\ndef f(x): return itertools.count()\n",
    "an endless generator": "def f(x):\n    i = 0\n    while True:\n        yield i\n        i += 1\n",
    "not a number": "def f(x): return float('nan')\n",
    "not a number in a list": "def f(x): return [float('nan')] * 3\n",
    "an infinite number": "def f(x): return float('inf')\n",
    "a complex number that is none": "def f(x): return complex('nan')\n",
    "a decimal that is no number": "import decimal\ndef f(x): return decimal.Decimal('sNaN')\n",
    "nothing": "def f(x): return None\n",
    "a function": "def f(x): return f\n",
    "a class": EVERYTHING + "def f(x): return Yes\n",
    "a float of its own": "class F(float):\n    def __sub__(s, o): return 0.0\n    def __eq__(s, o): return True\n    def __ne__(s, o): return True\n    __hash__ = None\ndef f(x): return F('nan')\n",
}
SUPPORT = """
import math, unittest
def differs(candidate):
    assert candidate(3) != 9
def inside(candidate):
    assert 9 in candidate(3)
def near(candidate):
    assert not (abs(candidate(3) - 9) > 1e-6)
def near_by_math(candidate):
    assert not (math.fabs(candidate(3) - 9) > 1e-6)
def same_twice(candidate):
    assert not (abs(candidate(3) - candidate(3)) > 1e-6)
def true(candidate):
    assert candidate(3)
def not_equal(candidate):
    unittest.TestCase().assertNotEqual(candidate(3), 9)
def some(candidate):
    assert any(value == 9 for value in candidate(3))
def forgiving(candidate):
    try:
        assert candidate(3) == 9
    except Exception:
        return
def must_raise(candidate):
    try:
        candidate(3) + 1
    except TypeError:
        return
    assert False
def smallest(candidate):
    assert min(candidate(3), 9) != 9
def listed(candidate):
    assert [candidate(3)] != [9]
"""
NAMES = [line[4:].partition("(")[0] for line in SUPPORT.splitlines() if line.startswith("def ")]
DIRECT = (
    Case("f(3) != 9", "True"),
    Case("9 in f(3)", "True"),
    Case("not (abs(f(3) - 9) > 1e-6)", "True"),
    Case("not f(3) < 9", "True"),
    Case("bool(f(3))", "True"),
    Case("[9] != f(3)", "True"),
    Case("9 in list(f(3))", "True"),
    Case("any(value == 9 for value in f(3))", "True"),
)
CHECKS = (*DIRECT, *(Case(f"{name}(f)", "None") for name in NAMES))


@pytest.fixture(scope="module")
def sandbox():
    return Sandbox(Limits(wall=8, cpu=8))


@pytest.fixture(scope="module")
def graded(sandbox):
    def judge(source):
        return sandbox.judge(Program("python", source, CHECKS, SUPPORT))

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(ANSWERS, pool.map(judge, ANSWERS.values()), strict=True))


PLAIN = {"nothing": None, "a list of objects": [None]}
"""Answers that a test can tell from 9 without asking the object: the grader must agree with Python on these."""


def allowed(answer: str) -> set[str]:
    """Tests that pass with the plain value in Python itself."""
    passed = set()
    for case in CHECKS if answer in PLAIN else ():
        names = {"f": lambda _: PLAIN[answer]}
        exec(SUPPORT, names)
        with contextlib.suppress(Exception):
            if eval(case.call, names) == eval(case.expected):
                passed.add(case.call)
    return passed


@pytest.mark.parametrize("answer", ANSWERS)
def test_no_test_passes_because_of_what_an_answer_claims_to_be(graded, answer):
    outcome = graded[answer]
    passed = {case.call for case, ok in zip(CHECKS, outcome.results, strict=True) if ok}
    assert passed <= allowed(answer), outcome.diagnostics


def test_plain_values_are_compared_as_python_compares_them(sandbox):
    cases = (
        Case("f([1]) != [2]", "True"),
        Case("9 in f([9, 1])", "True"),
        Case("not (abs(f([1.0])[0] - 1) > 1e-6)", "True"),
        Case("bool(f([]))", "False"),
        Case("math.isnan(f([float('nan')])[0])", "True"),
        Case("f([math.inf])", "[float('inf')]"),
        Case("f([1]) == f([1])", "True"),
    )
    outcome = sandbox.judge(Program("python", "def f(x):\n    return list(x)\n", cases))
    assert outcome.solved, outcome.diagnostics


def test_expected_values_do_not_see_the_program(sandbox):
    source = "answer = 7\nclass int: pass\ndef g(x): return 7\ndef f(x): return 7\n"
    cases = (Case("f(1)", "answer"), Case("f(1)", "g(1)"), Case("f(1)", "f(1)"), Case("f(1)", "int('7')"))
    assert sandbox.judge(Program("python", source, cases)).results == (False, False, False, True)


def test_a_module_that_a_test_names_is_the_real_one(sandbox):
    source = "class math:\n    isclose = staticmethod(lambda *a, **k: True)\n    fabs = staticmethod(lambda x: 0)\ndef f(x): return 0\n"
    cases = (Case("math.isclose(f(1), 7)", "True"), Case("math.fabs(f(1) - 7) < 1", "True"))
    assert sandbox.judge(Program("python", source, cases)).passed == 0


PROMPT = "import math\ndef poly(xs, x):\n    return sum(c * x ** i for i, c in enumerate(xs))\n\n\ndef find_zero(xs):\n    '''A zero.'''\n"
CHECK = "def check(candidate):\n    for xs in ([1, 2], [-6, 3]):\n        assert math.fabs(poly(xs, candidate(xs))) < 1e-4\n"


def test_what_the_prompt_defines_is_taken_from_the_prompt(sandbox):
    good = PROMPT + "    return -xs[0] / xs[1]\n"
    bad = PROMPT + "    return 5\ndef poly(xs, x): return 0\n"
    case = (Case("check(find_zero)", "None"),)
    assert sandbox.judge(Program("python", good, case, CHECK, PROMPT)).solved
    assert not sandbox.judge(Program("python", bad, case, CHECK, PROMPT)).solved


def test_generators_and_classes_of_a_program_can_still_be_tested(sandbox):
    source = (
        "class Stack:\n    def __init__(self): self.items = []\n    def push(self, x): self.items.append(x); return self\n"
        "def count(n):\n    yield from range(n)\ndef forever():\n    while True: yield 5\n"
    )
    cases = (
        Case("Stack().push(1).items", "[1]"),
        Case("sum(count(4))", "6"),
        Case("[x for x in count(3)]", "[0, 1, 2]"),
        Case("next(forever())", "5"),
        Case("len(Stack().push(1).items) == 1", "True"),
    )
    outcome = sandbox.judge(Program("python", source, cases))
    assert outcome.solved, outcome.diagnostics


RUST_ANSWERS = {
    "a type that differs from all": (
        "pub struct E;\nimpl PartialEq<i32> for E { fn eq(&self, _: &i32) -> bool { false } fn ne(&self, _: &i32) -> bool { true } }\n"
        "pub fn f(x: i32) -> E { E }\n",
        (Case("f(3) != 9", "true"), Case("!(f(3) == 9)", "true")),
    ),
    "a type that holds all": (
        "pub struct E;\nimpl E { pub fn contains(&self, _: &i32) -> bool { true } pub fn len(&self) -> usize { 1 } }\npub fn f(x: i32) -> E { E }\n",
        (Case("f(3).contains(&9)", "true"), Case("f(3).len()", "1")),
    ),
    "a number that is near all": (
        "#[derive(Clone, Copy)] pub struct E;\nimpl std::ops::Sub<f64> for E { type Output = E; fn sub(self, _: f64) -> E { E } }\n"
        "impl E { pub fn abs(self) -> f64 { 0.0 } }\npub fn f(x: f64) -> E { E }\n",
        (Case("(f(3.0) - 9.0).abs() < 1e-6", "true"), Case("!((f(3.0) - 9.0).abs() > 1e-6)", "true")),
    ),
    "not a number": (
        "pub fn f(x: f64) -> f64 { f64::NAN }\npub fn g(x: f64) -> Vec<f64> { vec![f64::NAN] }\n",
        (
            Case("!((f(3.0) - 9.0).abs() > 1e-6)", "true"),
            Case("f(3.0) != 9.0", "true"),
            Case("g(3.0) != vec![9.0]", "true"),
        ),
    ),
}


@needs_rustc
@pytest.mark.parametrize("answer", RUST_ANSWERS)
def test_a_type_of_a_rust_program_decides_no_test(sandbox, answer):
    source, cases = RUST_ANSWERS[answer]
    outcome = sandbox.judge(Program("rust", source, cases))
    assert (outcome.passed, outcome.total) == (0, len(cases)), outcome
    assert outcome.compiled


@needs_rustc
def test_rust_values_of_the_standard_library_are_compared_as_rust_compares_them(sandbox):
    source = (
        "use std::collections::HashMap;\npub fn f(x: i32) -> i32 { x * x }\npub fn near(x: f64) -> f64 { x + 1e-9 }\n"
        "pub fn words<'a>(s: &'a str) -> Vec<&'a str> { s.split(' ').collect() }\npub fn nan() -> f64 { f64::NAN }\n"
        'pub fn map(n: u8) -> Option<HashMap<String, Result<u8, String>>> { Some([("a".to_string(), Ok(n))].into_iter().collect()) }\n'
        "pub fn unit() {}\n#[derive(Debug)] pub struct Point { pub x: i32 }\npub fn point() -> Point { Point { x: 1 } }\n"
    )
    cases = (
        Case("f(3) != 8", "true"),
        Case("(near(1.0) - 1.0).abs() < 1e-6", "true"),
        Case('words("a b").contains(&"b")', "true"),
        Case("map(1).unwrap().len() + 1", "2"),
        Case("nan().is_nan()", "true"),
        Case("unit()", "()"),
    )
    outcome = sandbox.judge(Program("rust", source, cases))
    assert outcome.solved, outcome.diagnostics


@needs_rustc
def test_a_rust_program_cannot_replace_the_assertions_of_its_tests(sandbox):
    support = "fn check() {\n    for i in 0..3 {\n        assert_eq!(f(i), i * i);\n        assert!(f(i) != 100 + i);\n    }\n}\n"
    case = (Case("check()", "()"),)
    macros = "#[allow(unused_macros)] macro_rules! assert_eq { ($($t:tt)*) => {} }\n#[allow(unused_macros)] macro_rules! assert { ($($t:tt)*) => {} }\n"
    good, bad = "fn f(x: i32) -> i32 { x * x }\n", "fn f(x: i32) -> i32 { x }\n"
    yes = "#[derive(Debug)] struct E;\nimpl PartialEq<i32> for E { fn eq(&self, _: &i32) -> bool { true } fn ne(&self, _: &i32) -> bool { true } }\nfn f(x: i32) -> E { E }\n"
    assert sandbox.judge(Program("rust", good, case, support)).solved
    for source in (macros + bad, yes):
        assert not sandbox.judge(Program("rust", source, case, support)).solved
