"""Reasons to give an answer no credit whatever the compiler says: it holds no work of the model.

Knows the text of an answer and whether all its tests passed.
"""

import ast
import math
import re
from collections.abc import Sequence
from typing import Literal

from pygments.token import Name, String

from nanochat_cli.evaluation.code_tokens import (
    Body,
    CodeToken,
    body,
    body_statements,
    is_name,
    is_operand,
    lex,
    python_function,
    split,
)
from nanochat_cli.evaluation.problem import Language

Rejection = Literal["empty", "comment-only", "copied", "trivial"]

COPY_TOKENS = 8
"""A shorter run of equal tokens is not a copy: `return a + b` has many authors."""
COPY_SHARE = 0.9
"""An answer is a copy when one run of its tokens, at least this share of it, occurs in a source."""

_CONSTRUCTORS = {"list", "dict", "set", "tuple", "str", "int", "float", "bool", "bytes", "frozenset", "object"}
_COMPUTES = (ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Subscript, ast.Attribute, ast.comprehension)
_COMPUTES += (ast.IfExp, ast.For, ast.AsyncFor, ast.AugAssign, ast.Await, ast.Yield, ast.YieldFrom)
_COMPUTES += (ast.FormattedValue, ast.Match, ast.Starred, ast.Delete)

_RUST_KEYWORDS = {"if", "match", "for", "while", "as"}
_RUST_STUBS = {"panic!", "todo!", "unimplemented!", "unreachable!", "vec!"}
_RUST_WRAPPERS = {"new", "default", "from", "into", "to_string", "to_owned", "clone", "Some", "Ok", "Err", "Box"}
_RUST_OPERATORS = set("+-*/%<>&|^")
_FORMATTED = re.compile(r"\{(\w+)")


def rejection_reason(
    language: Language, prompt: str, completion: str, *, examples: Sequence[str] = (), solved: bool = False
) -> Rejection | None:
    """Why the completion gets no credit, or None.

    `empty` and `comment-only` hold no code. `copied`: at least `COPY_SHARE` of its code, or of the function body in it,
    occurs in one piece in the prompt's code or in one of `examples`. `trivial`: it computes nothing or uses no
    parameter; a problem may ask for just that, so `solved` (it has tests, and all passed) admits it.
    """
    if not completion.strip():
        return "empty"
    code = split(language, prompt, completion)
    if not code.completion:
        return "comment-only"
    function = body(language, prompt, completion)
    sources = [code.prompt, *(lex(language, example) for example in examples)]
    if any(_copied(answer, source) for answer in (code.completion, function.tokens) for source in sources):
        return "copied"
    if solved:
        return None
    ignores_parameters = bool(function.parameters) and not _uses_parameter(function)
    computes = _python_computes(prompt, completion) if language == "python" else _rust_computes(function.tokens)
    return "trivial" if ignores_parameters or not computes else None


def _uses_parameter(answer: Body) -> bool:
    """Whether a parameter is named, if only in a Rust format string."""
    return any(
        token.text in answer.parameters
        or (token.kind in String and not answer.parameters.isdisjoint(_FORMATTED.findall(token.text)))
        for token in answer.tokens
    )


def _copied(answer: Sequence[CodeToken], source: Sequence[CodeToken]) -> bool:
    if len(answer) < COPY_TOKENS or len(source) < COPY_TOKENS:
        return False
    run = math.ceil(COPY_SHARE * len(answer))
    where = _joined(source)
    return any(_joined(answer[start : start + run]) in where for start in range(len(answer) - run + 1))


def _joined(tokens: Sequence[CodeToken]) -> str:
    """A text that contains another's exactly when these tokens contain the other's in a run."""
    return "".join(f"\0{token.text}\0" for token in tokens)


def _python_computes(prompt: str, completion: str) -> bool:
    """Whether the function has an operation on a name; True if it does not parse, since then it does not compile."""
    function = python_function(prompt, completion)
    if function is None:
        return True
    blank = completion[: len(completion) - len(completion.lstrip())]
    first = (prompt + blank).count("\n") + 1  # line of the first thing that the model wrote
    statements = body_statements(function)
    if isinstance(function, ast.Module):
        statements = [statement for statement in statements if (statement.end_lineno or 0) >= first]
    return any(_operates(node) for statement in statements for node in ast.walk(statement))


def _operates(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        return name != "NotImplementedError" and (name not in _CONSTRUCTORS or bool(node.args))
    unpacks = (
        isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Name)
    )
    # An operation on constants only is a constant.
    return unpacks or (isinstance(node, _COMPUTES) and any(isinstance(inner, ast.Name) for inner in ast.walk(node)))


def _rust_computes(tokens: Sequence[CodeToken]) -> bool:
    """Whether there is an operator between two values, a call, an index, a field, or a decision."""
    padded = (None, *tokens, None)
    neighbours = zip(padded, tokens, padded[2:], strict=False)
    return any(_rust_operates(left, token, right) for left, token, right in neighbours)


def _rust_operates(left: CodeToken | None, token: CodeToken, right: CodeToken | None) -> bool:
    if token.text in _RUST_KEYWORDS:
        return True
    if token.text.endswith("!") and len(token.text) > 1:  # a macro
        return token.text not in _RUST_STUBS
    if right is None:
        return False
    if token.text == "=" and right.text == "=":
        return True
    if token.text in ("-", "!") and right.kind in Name and is_operand(right):
        return True
    if left is None:
        return False
    if token.text == ".":
        return right.text not in _RUST_WRAPPERS
    if token.text in ("(", "["):
        defined = left.kind is Name.Function  # the name after `fn`
        return is_name(left) and not defined and left.text not in _RUST_WRAPPERS and not left.text.endswith("!")
    return token.text in _RUST_OPERATORS and is_operand(left)
