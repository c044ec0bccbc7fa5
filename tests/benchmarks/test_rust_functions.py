"""`benchmarks/rust_functions.py` keeps the functions that compile alone, with their documentation."""

import json

import pytest

from nanochat_cli.data.functions import rust_functions
from tests.benchmarks.scripts import load
from tests.evaluation.programs import needs_rustc

SOURCE = """\
use std::fmt;

/// Twice `n`.
///
/// More of it.
#[inline]
pub fn twice(n: i32) -> i32 {
    if n > 0 {
        2 * n
    } else {
        n + n
    }
}

const fn none() {}

impl Point {
    /// A method.
    pub fn x(&self) -> i32 {
        self.x
    }

    /// No method.
    fn origin(scale: u8) -> u8 {
        scale
    }
}

#[test]
fn works() {
    assert!(true);
}

#[cfg(windows)]
fn elsewhere() -> u8 {
    1
}

trait Shape {
    fn area(n: u8) -> u8;
}

fn main() {
    twice(1);
}
"""


@pytest.fixture
def script():
    return load("rust_functions")


def test_free_functions_are_found_with_the_first_paragraph_of_their_documentation():
    found = {function.name: function.document for function in rust_functions(SOURCE)}

    assert list(found) == ["twice", "none", "origin"]
    twice = "pub fn twice(n: i32) -> i32 {\n    if n > 0 {\n        2 * n\n    } else {\n        n + n\n    }\n}\n"
    assert found["twice"] == "/// Twice `n`.\n" + twice
    assert found["none"] == "const fn none() {}\n"
    assert found["origin"] == "/// No method.\nfn origin(scale: u8) -> u8 {\n    scale\n}\n"


@pytest.mark.parametrize(("lines", "found"), [(30, ["long", "short"]), (31, ["short"])])
def test_a_function_of_more_than_thirty_lines_is_left_out(lines, found):
    body = "".join(f"    f({number});\n" for number in range(lines - 2))

    assert [one.name for one in rust_functions(f"fn long() {{\n{body}}}\n\nfn short() {{}}\n")] == found


def test_equal_functions_count_once_and_names_of_problems_are_left_out(script, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "copy.rs").write_text("fn one(n: u8) -> u8 {\n        n\n}\n")
    (tmp_path / "a.rs").write_text("/// First.\nfn one(n: u8) -> u8 {\n    n\n}\n\nfn taken() {}\n")
    (tmp_path / "broken.rs").write_bytes(b"\xff fn no() {}\n")

    found = script.collect(tmp_path, frozenset({"taken"}))

    assert [function.document for function in found] == ["/// First.\nfn one(n: u8) -> u8 {\n    n\n}\n"]


@needs_rustc
def test_rustc_tells_which_functions_compile_alone(script):
    fine = ["fn a(n: u8) -> u8 { n }", "fn b(t: &str) -> String { t.to_string() }"]
    wrong = [
        "fn c(n: u8) -> Missing { n }",  # a name
        "fn d(n: u8) -> String { n }",  # a type
        "fn e(t: String) -> String { drop(t); t }",  # a move
        "fn f() { a[ }",  # no program
        "fn g(n: u8) -> u8 { a(n) }",  # a neighbour
    ]

    assert script.compiling([wrong[0], fine[0], *wrong[1:], fine[1]]) == fine


def test_functions_that_compile_alone_are_written_more_often(script, tmp_path):
    found = [script.Function("a", "/// A.\n", "fn a() {}"), script.Function("b", "", "fn b() {}")]

    count = script.write(found, frozenset({"fn a() {}"}), tmp_path / "out.jsonl")

    texts = [json.loads(line)["text"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert count == len(texts) == script.COPIES + 1
    assert sorted(texts) == ["/// A.\nfn a() {}\n"] * script.COPIES + ["fn b() {}\n"]
