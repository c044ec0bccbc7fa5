"""Free functions of sources: what is one, and that it stands by itself."""

import ast
import builtins
import sysconfig
import textwrap
from pathlib import Path

import pytest

from nanochat_cli.cli.app import main
from nanochat_cli.data.functions import MAX_CHARACTERS, MAX_LINES, functions_of
from nanochat_cli.data.manifest import SPLITS
from nanochat_cli.data.prepare import prepare_dataset
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.data.text_index import text_index
from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.evaluation.held_out import document_languages
from nanochat_cli.report.reporter import QuietReporter
from tests.data.corpora import make_config

RUST = """\
//! A crate.
mod shapes {
    /// The larger of two numbers.
    ///
    /// Not shown.
    #[inline]
    pub fn larger(a: i32, b: i32) -> i32 {
        if a > b { a } else { b }
    }

    fn of(&self) -> i32 {
        self.value
    }
}
#[cfg(test)]
fn only_in_tests() {}
pub const fn zero() -> i32 { 0 }
fn main() {
    println!("x");
}
fn from_here() { crate::shapes::larger(1, 2); }
fn declared();
"""

PYTHON = '''\
import os
LIMIT = 3

def doubled(values):
    """Twice each value."""
    return [2 * value for value in values if isinstance(value, int)]

def below(value):
    return value < LIMIT

def listed(path):
    return os.listdir(path)

def factorial(n):
    return 1 if n < 2 else n * factorial(n - 1)

@staticmethod
def decorated(x):
    return x

def test_it():
    assert True

class Shape:
    def area(self):
        return 0

def outer(n):
    def inner(m):
        return n + m
    return [inner(k) for k in range(n)]

def annotated(x: "int", y: Missing) -> int:
    return x
'''


def test_free_functions_of_rust_come_with_the_first_paragraph_of_their_documentation() -> None:
    found = [function.document for function in functions_of("rust", RUST)]
    larger = "pub fn larger(a: i32, b: i32) -> i32 {\n    if a > b { a } else { b }\n}\n"
    assert found == [f"/// The larger of two numbers.\n{larger}", "pub const fn zero() -> i32 { 0 }\n"]


def test_free_functions_of_python_need_no_name_of_their_module() -> None:
    assert [function.name for function in functions_of("python", PYTHON)] == ["doubled", "factorial", "outer"]
    for function in functions_of("python", PYTHON):
        assert textwrap.dedent(function.body) in PYTHON


def test_long_functions_and_other_languages_have_none() -> None:
    long = "def f(x):\n" + "    x = x + 1\n" * MAX_LINES + "    return x\n"
    wide = f"def f(x):\n    return '{'y' * MAX_CHARACTERS}'\n"
    for text in (long, wide, "def f(x:\n", "def f(x):\r\n    return x\r\n", ""):
        assert list(functions_of("python", text)) == []
    assert list(functions_of("c", "int f() { return 0; }")) == []


@pytest.mark.parametrize("name", ["textwrap.py", "statistics.py", "colorsys.py", "bisect.py", "posixpath.py"])
def test_functions_of_the_standard_library_can_be_defined_by_themselves(name: str) -> None:
    text = Path(sysconfig.get_path("stdlib"), name).read_text(encoding="utf-8")
    for function in functions_of("python", text):
        names: dict[str, object] = {"__builtins__": builtins}
        exec(compile(function.document, name, "exec"), names)  # only defines it
        loaded = {node.id for node in ast.walk(ast.parse(function.body)) if isinstance(node, ast.Name)}
        nodes = list(ast.walk(ast.parse(function.body)))
        stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        stored |= {str(node.name) for node in nodes if isinstance(node, ast.ExceptHandler)}
        arguments = {node.arg for node in ast.walk(ast.parse(function.body)) if isinstance(node, ast.arg)}
        inner = {node.name for node in ast.walk(ast.parse(function.body)) if isinstance(node, ast.FunctionDef)}
        assert loaded <= {*stored, *arguments, *inner, *dir(builtins)}


def test_a_data_set_of_functions_has_each_as_a_document_of_its_language(tmp_path: Path) -> None:
    source = tmp_path / "corpus"
    source.mkdir()
    for number in range(12):
        rust = f"/// Adds {number}.\npub fn add_{number}(x: i64) -> i64 {{\n    x + {number}\n}}\n\nuse std::fmt;\n"
        (source / f"{number}.rs").write_text(rust)
        (source / f"{number}.py").write_text(f"import os\n\ndef times_{number}(x):\n    return x * {number}\n")
    (source / "none.py").write_text("import os\n")
    (source / "notes.txt").write_text("def prose(x):\n    return x\n")
    out, flags = (
        tmp_path / "data",
        ["--vocab-size", "300", "--set", "data.dedup=none", "--set", "data.val_fraction=0.2"],
    )
    assert main(["tokenize", "--source", str(source), "--functions", "--out", str(out), *flags]) == 0
    reader = ShardReader(out)
    documents = {content for split in SPLITS for content in reader.documents(split)}
    expected = [f"/// Adds {n}.\npub fn add_{n}(x: i64) -> i64 {{\n    x + {n}\n}}\n" for n in range(12)]
    expected += [f"def times_{n}(x):\n    return x * {n}\n" for n in range(12)]
    assert documents == {text.encode() for text in expected}
    assert reader.manifest.origin is not None
    assert {name: count for name, (count, _) in reader.manifest.origin.languages.items()} == {"python": 12, "rust": 12}
    assert reader.manifest.skipped == {"no free function of Python or Rust": 2}
    assert reader.manifest.settings["data.functions"] is True
    config = make_config(data={"dedup": "none"})
    languages = document_languages(reader, config, QuietReporter())
    held_out = ["rust" if content.startswith(b"///") else "python" for content in reader.documents("val")]
    assert languages == held_out
    with pytest.raises(DataError, match=r"cannot be read at random.*data\.functions"):
        text_index(reader, config.data, QuietReporter())


def test_token_files_hold_no_functions_to_take(tmp_path: Path) -> None:
    (tmp_path / "tokens.bin").write_bytes(b"\1\0\2\0\0\0")
    config = make_config(data={"format": "nanogpt", "functions": True}, tokenizer={"path": tmp_path / "tokenizer.json"})
    with pytest.raises(ConfigError, match=r"holds token ids; data\.functions is for text"):
        prepare_dataset(str(tmp_path / "tokens.bin"), tmp_path / "data", config, QuietReporter())
