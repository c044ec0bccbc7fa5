"""A completion is cut where its function ends, and nowhere else."""

import ast
import io
import itertools
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanochat_cli.evaluation.cut_completion import cut_completion

PYTHON_PROMPT = 'def f(a):\n    """Doc."""\n'
RUST_PROMPT = "/// Doc with a brace {.\npub fn f(a: i32) -> i32 {\n"


@pytest.mark.parametrize(
    ("kept", "rest"),
    [
        ("    return a\n", "print(f(1))\n"),
        ("    return a\n\n\n", "def g():\n    return 2\n"),
        ("    if a:\n        return 1\n    return 2\n", "x = 3\n"),
        ("    if a:\n\n        return 1\n\n\n    return 2\n\n", "class C:\n    pass\n"),
        ('    text = """\nprint(1)\n"""\n    return text\n', "print(2)\n"),
        ("    return (\na,\n1\n)\n", "f(1)\n"),
        ("    return a \\\n+ 1\n", "f(1)\n"),
        ("    return '{'  # )\n", "f(1)\n"),
        ("\treturn a\n", "f(1)\n"),
        ("    def g():\n        return 1\n    return g()\n", "f(1)"),
        ("    # f(1)\n# at the margin\n    return a\n", "f(1)\n"),
        ("", "def f(a):\n    return 1\n"),
        ("", "return a\n"),
        ("    return a\n", "this is English text, isn't it?\n"),
        ("    return a\n", "```\nThat's it\n"),
    ],
)
def test_python_ends_at_the_first_statement_at_the_margin(kept, rest):
    assert cut_completion("python", PYTHON_PROMPT, kept + rest) == kept
    assert cut_completion("python", PYTHON_PROMPT, kept) == kept


def test_python_may_follow_on_the_line_of_the_prompt():
    assert cut_completion("python", "def f(a):", " return a\nf(1)\n") == " return a\n"
    assert cut_completion("python", "f = lambda a:", " a\nf(1)\n") == " a\n"


@pytest.mark.parametrize("completion", ["    return (a\n", "    return 'a\n", "    x = '''\n", "  return )\n   x\n"])
def test_python_that_never_ends_is_left_to_the_compiler(completion):
    assert cut_completion("python", PYTHON_PROMPT, completion) == completion


def test_python_ends_at_the_earliest_stop_sequence():
    assert (
        cut_completion("python", PYTHON_PROMPT, "    a = 1\n    b = 2\n    # c\n", ["#", "b ="]) == "    a = 1\n    \n"
    )


@pytest.mark.parametrize(
    "kept",
    [
        "    a\n}",
        "    if a > 0 { 1 } else { 2 }\n}",
        '    "}".len() as i32\n}',
        '    "\\"}".len() as i32\n}',
        '    r#"a "} b"#.len() as i32\n}',
        '    br##"}"# }"##.len() as i32\n}',
        "    let c = '}';\n    c as i32\n}",
        "    let c = '\\'';\n    let d = '}';\n    1\n}",
        "    let c = '\\u{7d}';\n    1\n}",
        "    let c = b'}';\n    1\n}",
        "    fn g<'a>(x: &'a str, y: &'a str) -> &'a str { x }\n    1\n}",
        "    'outer: loop { break 'outer; }\n    1\n}",
        "    // }\n    1\n}",
        "    /* } /* } */ } */ 1\n}",
        "    struct S { r#fn: i32 }\n    1\n}",
        "    let number = 1; let r = 2; r\n}",
        "}",
    ],
)
def test_rust_ends_at_the_brace_that_closes_the_function(kept):
    for rest in ("", "\n", "\n\nfn main() { f(1); }\n", "}\n"):
        assert cut_completion("rust", RUST_PROMPT, kept + rest, ["\n}"]) == kept


@pytest.mark.parametrize(
    "prompt", ["fn f() -> i32", "mod m {}\nfn f() -> i32", "mod m { pub fn g() {} }\nfn f() -> i32 {"]
)
def test_rust_prompts_may_stop_before_the_brace_and_hold_other_items(prompt):
    body = " 1 }" if prompt.endswith("{") else " { 1 }"
    assert cut_completion("rust", prompt, body + " fn g() {}") == body


def test_the_brace_that_a_stop_sequence_swallowed_comes_back():
    assert cut_completion("rust", RUST_PROMPT, "    a", ["\n}"]) == "    a\n}\n"
    assert cut_completion("rust", RUST_PROMPT, "    a", ["\nfn"]) == "    a"
    assert cut_completion("rust", RUST_PROMPT, "    if a {\n", ["\n}"]) == "    if a {\n\n}\n"  # still open


def test_another_language_is_refused():
    with pytest.raises(ValueError, match="lua"):
        cut_completion("lua", "", "")


def functions_of_the_standard_library() -> Iterator[tuple[str, str, str]]:
    """(First lines of a function, its body up to the next statement, the rest of its file)."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-h]*.py")):
        source = path.read_text(encoding="utf-8")
        lines, statements = list(io.StringIO(source)), ast.parse(source).body
        for function, following in itertools.pairwise(statements):
            if isinstance(function, ast.FunctionDef):
                first, *_ = function.body
                decorators = getattr(following, "decorator_list", [])
                body, end = first.lineno - 1, min(node.lineno for node in (following, *decorators)) - 1
                if body >= function.lineno and not getattr(first, "decorator_list", []):
                    yield "".join(lines[function.lineno - 1 : body]), "".join(lines[body:end]), "".join(lines[end:])


def test_functions_of_the_standard_library_are_cut_where_the_parser_says():
    functions = list(functions_of_the_standard_library())
    assert len(functions) > 100
    for prompt, body, rest in functions:
        assert cut_completion("python", prompt, body + rest) == body, prompt
