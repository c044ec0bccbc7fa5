"""Free functions of Python and Rust files, with their documentation: short documents that stand by themselves.

A function is free if nothing in it names its surroundings: in Rust no `self`, crate or macro variable, in Python no
global name except those of Python itself. Knows sources as text; compiles nothing.
"""

import ast
import builtins
import re
import symtable
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

MAX_LINES, MAX_CHARACTERS = 30, 900
DOC_LINES = 4
"""Most lines of a Rust function's documentation that are kept, of its first paragraph."""
_START = re.compile(r"^([ \t]*)(?:pub(?:\([^)]*\))? )?(?:const )?fn (\w+)")
_BOUND = re.compile(
    r"\bself\b|\bSelf\b|\bcrate\b|\bsuper\b|\bunsafe\b|\$|include|\benv!|todo!|unimplemented!|\bextern\b"
)
"""Words that tie a function to its surroundings, or mark a stub."""
_CONDITIONAL = re.compile("test|bench|cfg")
_PYTHON = frozenset(dir(builtins))


class Function(NamedTuple):
    """doc: the first paragraph of Rust's `///` with line ends; in Python the documentation is in the body."""

    name: str
    doc: str
    body: str

    @property
    def document(self) -> str:
        return f"{self.doc}{self.body}\n"


def functions_of(language: str, text: str) -> Iterator[Function]:
    """The free functions of a `python` or `rust` file, in order; of other languages none."""
    if language == "rust":
        yield from rust_functions(text)
    elif language == "python":
        yield from python_functions(text)


def rust_functions(text: str) -> Iterator[Function]:
    """Short free functions of a source file that rustfmt has indented, moved to the left margin."""
    lines = text.split("\n")
    at = 0
    while at < len(lines):
        start = _START.match(lines[at])
        end = None if start is None else _end(lines, at, start[1])
        if start is None or end is None:
            at += 1
            continue
        indent = start[1]
        doc, attributes = _above(lines, at, indent)
        body = "\n".join(line.removeprefix(indent) for line in lines[at : end + 1])
        at = end + 1
        bound = _BOUND.search(body) or any(_CONDITIONAL.search(line) for line in attributes)
        if not bound and len(body) <= MAX_CHARACTERS and start[2] != "main":
            yield Function(start[2], doc, body)


def _end(lines: Sequence[str], start: int, indent: str) -> int | None:
    """The line that closes the function: a brace with the indentation of its first line."""
    first = lines[start].rstrip()
    if first.endswith(";"):
        return None
    if first.endswith("}") and "{" in first:
        return start
    for at in range(start + 1, min(start + MAX_LINES, len(lines))):
        line = lines[at]
        if line == indent + "}":
            return at
        if line.strip() and len(line) - len(line.lstrip()) < len(indent):
            return None
    return None


def _above(lines: Sequence[str], start: int, indent: str) -> tuple[str, list[str]]:
    """The first paragraph of the documentation, and the attributes."""
    doc: list[str] = []
    attributes: list[str] = []
    at = start - 1
    while at >= 0 and lines[at].startswith((indent + "///", indent + "#[")):
        line = lines[at].removeprefix(indent)
        (doc if line.startswith("///") else attributes).insert(0, line)
        at -= 1
    paragraph = []
    for line in doc[:DOC_LINES]:
        words = line[3:].strip()
        if not words or words.startswith("```"):
            break
        paragraph.append(line.rstrip() + "\n")
    return "".join(paragraph), attributes


def parsed(text: str) -> ast.Module | None:
    """The syntax tree of a Python source, with line numbers as of `text.split("\\n")`; None if it has none."""
    if "\r" in text:  # the parser would count other lines
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as invalid escapes in others' code
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def python_functions(text: str) -> Iterator[Function]:
    """Short free functions at the top level of a source file, without decorators; none if it does not parse."""
    if (module := parsed(text)) is None:
        return
    lines = text.split("\n")
    for node in module.body:
        if not isinstance(node, ast.FunctionDef) or node.decorator_list or node.end_lineno is None:
            continue
        body = "\n".join(lines[node.lineno - 1 : node.end_lineno])
        small = node.end_lineno - node.lineno < MAX_LINES and len(body) <= MAX_CHARACTERS
        if small and node.name != "main" and not node.name.startswith("test") and _is_free(node.name, body):
            yield Function(node.name, "", body)


def _is_free(name: str, body: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tables = [symtable.symtable(body, "function", "exec")]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            is_global = symbol.is_global() or (table.get_type() == "module" and symbol.is_referenced())
            if is_global and symbol.get_name() not in _PYTHON and symbol.get_name() != name:
                return False
    return True
