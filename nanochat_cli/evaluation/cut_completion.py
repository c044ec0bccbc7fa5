"""Cuts a completion at the end of the function that its prompt began, or at a stop sequence.

Knows the surface of Python and Rust (blocks, strings, comments), not their grammar. Text that is not a program is left
as it is, for the compiler to judge.
"""

import io
import re
import tokenize
from collections.abc import Sequence

_RUST = re.compile(
    r"""(?P<line>//[^\n]*)
    | (?P<block>/\*)
    | \b[bc]?r(?P<hashes>\#*)"
    | (?P<string>"(?:[^"\\]|\\.)*(?:"|\Z))
    | (?P<char>'(?:\\u\{[^}]*\}|\\x..|\\.|[^\\'\n])')
    | (?P<brace>[{}])""",
    re.VERBOSE | re.DOTALL,
)
_BLOCK_COMMENT = re.compile(r"/\*|\*/")
_LAYOUT = {tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}
CLOSING_STOP = "\n}"
"""The stop sequence that swallows the closing brace of a Rust function."""


def cut_completion(language: str, prompt: str, completion: str, stop: Sequence[str] = ()) -> str:
    """The part of `completion` that belongs to the function that `prompt` began.

    Python: up to the earliest stop sequence, then up to the first statement at column 0. Rust: up to and including the
    brace that closes the function; if there is none, up to the earliest stop sequence, and the brace is put back if
    "\\n}" is one of the sequences. Raises ValueError for another language.
    """
    if language == "python":
        completion = _until_stop(completion, stop)
        return completion[: _python_end(prompt, completion)]
    if language == "rust":
        end = _rust_end(prompt, completion)
        if end is not None:
            return completion[:end]
        return _until_stop(completion, stop) + (f"{CLOSING_STOP}\n" if CLOSING_STOP in stop else "")
    raise ValueError(f"no language {language!r}")


def _until_stop(completion: str, stop: Sequence[str]) -> str:
    places = [place for text in stop if (place := completion.find(text)) >= 0]
    return completion[: min(places)] + "\n" if places else completion


def _python_end(prompt: str, completion: str) -> int:
    """Offset in the completion of its first statement at column 0, or its length if there is none.

    Lines inside brackets and multi-line strings do not count.
    """
    text = prompt + completion
    starts = [0]
    for line in io.StringIO(text):
        starts.append(starts[-1] + len(line))
    depth, at_start = 0, True
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            depth += (token.type == tokenize.INDENT) - (token.type == tokenize.DEDENT)
            if token.type in _LAYOUT:
                continue
            offset = starts[min(token.start[0], len(starts)) - 1] + token.start[1]
            if at_start and depth == 0 and offset >= len(prompt) and token.type != tokenize.ENDMARKER:
                return offset - len(prompt)
            at_start = token.type == tokenize.NEWLINE
    except (tokenize.TokenError, SyntaxError):
        pass  # not Python from here on; if that is inside the function, the compiler reports it
    return len(completion)


def _rust_end(prompt: str, completion: str) -> int | None:
    """Offset in the completion after the brace that closes the prompt's function; None if it stays open.

    Braces in strings, characters and comments do not count.
    """
    text = prompt + completion
    depth, outside, position = 0, None, 0
    while match := _RUST.search(text, position):
        if outside is None and match.start() >= len(prompt):
            outside = max(depth - 1, 0)
        position = match.end()
        if match["block"]:
            position = _comment_end(text, position)
        elif match["hashes"] is not None:
            closing = text.find('"' + match["hashes"], position)
            position = len(text) if closing < 0 else closing + 1 + len(match["hashes"])
        elif match["brace"]:
            depth += 1 if match["brace"] == "{" else -1
            if outside is not None and depth <= outside and match["brace"] == "}":
                return position - len(prompt)
    return None


def _comment_end(text: str, position: int) -> int:
    """The end of a Rust block comment; these nest."""
    depth = 1
    while depth and (match := _BLOCK_COMMENT.search(text, position)):
        depth += 1 if match[0] == "/*" else -1
        position = match.end()
    return position if depth == 0 else len(text)
