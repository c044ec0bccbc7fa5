"""The code of a prompt and its completion as tokens, without comments, docstrings and white space.

Pygments lexes both together, since a prompt may end within a string or a name. Knows the surface of Python and Rust,
not what an answer is worth.
"""

import ast
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from pygments.lexer import Lexer
from pygments.lexers import PythonLexer, RustLexer
from pygments.token import Comment, Keyword, Name, String, Token, _TokenType

from nanochat_cli.evaluation.problem import Language

LEXERS: dict[Language, type[Lexer]] = {"python": PythonLexer, "rust": RustLexer}


class CodeToken(NamedTuple):
    text: str
    kind: _TokenType
    start: int
    """Characters from the start of the prompt."""


@dataclass(frozen=True)
class Code:
    """Code tokens before and after the point where the model began, and the attributes that it wrote."""

    prompt: tuple[CodeToken, ...]
    completion: tuple[CodeToken, ...]
    attributes: tuple[str, ...]
    """Rust attributes (`#[…]`) in the completion, which steer the compiler and compute nothing."""


class Body(NamedTuple):
    """The part of a completion that belongs to the function that its prompt began, and the function's parameters."""

    tokens: tuple[CodeToken, ...]
    parameters: frozenset[str]


def lex(language: Language, text: str) -> tuple[CodeToken, ...]:
    return tuple(token for token in _tokens(language, text) if _is_code(token))


@lru_cache(maxsize=256)  # every term of a reward asks for the same one
def split(language: Language, prompt: str, completion: str) -> Code:
    """The code of `prompt + completion`; a token that spans both belongs to the completion."""
    tokens = list(_tokens(language, prompt + completion))
    ours = [token for token in tokens if token.start + len(token.text) > len(prompt)]
    given = tokens[: len(tokens) - len(ours)]
    attributes = tuple(token.text for token in ours if token.kind in Comment.Preproc)
    return Code(tuple(filter(_is_code, given)), tuple(filter(_is_code, ours)), attributes)


def body(language: Language, prompt: str, completion: str) -> Body:
    """The function's body in the completion; the whole completion when the prompt began no function."""
    code = split(language, prompt, completion)
    return _python_body(prompt, completion, code) if language == "python" else _rust_body(code)


def python_function(prompt: str, completion: str) -> ast.FunctionDef | ast.AsyncFunctionDef | ast.Module | None:
    """The last function that the prompt began, or the whole module; None when the program does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as invalid escapes in generated code
            module = ast.parse(prompt + completion)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    first = prompt.count("\n") + 1  # line on which the model began
    unfinished = [
        node
        for node in ast.walk(module)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.lineno <= first
        and ((node.end_lineno or 0) >= first or not body_statements(node))
    ]
    return max(unfinished, key=lambda node: node.lineno, default=module)


def body_statements(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Module) -> list[ast.stmt]:
    """The statements of a body without its docstring."""
    return node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body


def _python_body(prompt: str, completion: str, code: Code) -> Body:
    function = python_function(prompt, completion)
    if function is None or isinstance(function, ast.Module):
        return Body(code.completion, frozenset())
    lines = list(io.StringIO(prompt + completion, newline=""))
    end = sum(len(line) for line in lines[: function.end_lineno])
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    names = frozenset(argument.arg for argument in every if argument is not None)
    return Body(tuple(token for token in code.completion if token.start < end), names)


def _rust_body(code: Code) -> Body:
    tokens = list(code.prompt)
    starts = [index for index, token in enumerate(tokens) if token.text == "fn" and token.kind in Keyword]
    depth = _depth(tokens)
    if not starts or (depth == 0 and "}" in (token.text for token in tokens[starts[-1] :])):
        return Body(code.completion, frozenset())  # the prompt's functions are whole
    rest = iter(code.completion)
    signature = tokens[starts[-1] :]
    if not any(_is_brace(token, "{") for token in signature):  # the model wrote the end of the signature
        for token in rest:
            if _is_brace(token, "{"):
                break
            signature.append(token)
    return Body(tuple(_until_closed(rest)), _rust_parameters(signature))


def _rust_parameters(signature: list[CodeToken]) -> frozenset[str]:
    """`self` and every name that is not a type's between the first parenthesis and the return type."""
    texts = [token.text for token in signature]
    start = texts.index("(") if "(" in texts else len(texts)
    end = next((index for index, text in enumerate(texts) if text in ("->", "{")), len(texts))
    return frozenset(token.text for token in signature[start:end] if token.kind in Name and is_operand(token))


def _until_closed(tokens: Iterator[CodeToken]) -> Iterator[CodeToken]:
    """Tokens up to the brace that closes the open block."""
    depth = 1
    for token in tokens:
        depth += _is_brace(token, "{") - _is_brace(token, "}")
        if depth == 0:
            return
        yield token


def _depth(tokens: list[CodeToken]) -> int:
    return sum(_is_brace(token, "{") - _is_brace(token, "}") for token in tokens)


def _is_brace(token: CodeToken, brace: str) -> bool:
    return token.text == brace and token.kind not in String


def _tokens(language: Language, text: str) -> Iterator[CodeToken]:
    for start, kind, value in LEXERS[language]().get_tokens_unprocessed(text):
        yield CodeToken(value, kind, start)


def _is_code(token: CodeToken) -> bool:
    return bool(token.text.strip()) and not (token.kind in Comment or token.kind in String.Doc)


def is_name(token: CodeToken) -> bool:
    """Whether a token is a name, built-in types and functions included."""
    return token.kind in Name or token.kind in Keyword.Type


def is_operand(token: CodeToken) -> bool:
    """Whether a token ends a value: a literal, a closing bracket, or a name that is not a type's."""
    if token.kind in Token.Literal or token.text in (")", "]", "self"):
        return True
    return token.kind in Name and not token.text[:1].isupper()
