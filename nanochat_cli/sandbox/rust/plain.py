"""Restricts a Rust test to plain values of the program (standard-library types), without its traits and macros.

In `f(x) != y` a type of the program would decide through its own `ne`. So each function call inside a test is wrapped
in one that takes only types with the trait `Plain`, whose module has a name that the program cannot know. Knows the
surface of Rust, as `cases` does: a test that is rewritten wrongly does not compile.
"""

import re
import secrets
from pathlib import Path
from string import ascii_lowercase

from nanochat_cli.sandbox.rust.cases import TOKEN, closing

_MACROS = (
    r"assert|assert_eq|assert_ne|debug_assert|debug_assert_eq|debug_assert_ne|format|matches|panic|vec|write|writeln"
)
_MACRO = re.compile(rf"(?<![\w:])({_MACROS})!")
_CALL = re.compile(r"(?<![\w.:!&\'])(?P<path>(?:\w+::)*)(?P<name>[a-z_]\w*)(?:::<[^()]*?>)?\s*\(")
_KEYWORDS = frozenset("if while match return for in let loop move fn drop matches as else ref mut".split())
_WORD = re.compile(r"\w+")
_ITEM = re.compile(r"\b(?:fn|struct|enum|union|type|const|static|mod)\s+(?:mut\s+)?(\w+)")
_NOT_FINITE = re.compile(r"nan\b|infinit|\bis_finite|\bis_normal", re.IGNORECASE)
_PRELUDE = (
    "string::{String, ToString}", "vec::Vec", "boxed::Box", "option::Option::{self, None, Some}",
    "result::Result::{self, Err, Ok}",
)  # fmt: skip

_TRAIT = Path(__file__).with_suffix(".rs").read_text(encoding="utf-8")


class Guard:
    """Rewrites the tests of one crate; `module` goes to its root. given: the beginning that the model did not write.

    Functions that `given` declares to return one of its own types are left alone, and its traits stay usable.
    """

    def __init__(self, source: str, support: str, given: str) -> None:
        self._name = "nanochat_" + "".join(secrets.choice(ascii_lowercase) for _ in range(16))
        self.module = f"pub mod {self._name} {{\n{_TRAIT}\n}}\n"
        outside = _outside_braces(f"{source}\n{support}")
        self._items = {match[1] for match in _ITEM.finditer(outside)}
        self._uses = [match[1] for match in re.finditer(r"\buse\s+(?:::)?std(::[^;]+);", _code(source))]
        own = {match[1] for match in re.finditer(r"\b(?:struct|enum|union|type|trait)\s+(\w+)", given)}
        self._traits = sorted({match[1] for match in re.finditer(r"\btrait\s+(\w+)", f"{given}\n{support}")})
        signatures = re.finditer(r"\bfn\s+(\w+)[^{;]*?->\s*([^{;]+)", given)
        free = {match[1] for match in signatures if own & set(_WORD.findall(match[2]))}
        self._free = free | {match[1] for match in re.finditer(r"\bfn\s+(\w+)", support)} | _KEYWORDS

    def imports(self, call: str) -> str:
        """The `use` lines of a test: items of the program that it names, and no trait that the model wrote."""
        names = self._items & set(re.findall(r"(?<![\w.:])\w+", call))
        taken = [f"use super::{name};" for name in sorted(names)] + [
            f"use super::{name} as _;" for name in self._traits
        ]
        taken += [f"use ::std{path};" for path in self._uses if not names & set(_WORD.findall(path))]
        known = names | set(_WORD.findall(" ".join(self._uses)))
        taken += [f"use ::std::{path};" for path in _PRELUDE if not known & set(_WORD.findall(path))]
        return " ".join(f"#[allow(unused_imports)] {one}" for one in (*taken, "use ::std::collections::*;"))

    def wrapped(self, text: str, about: str = "", *, whole: bool = False) -> str:
        """The source of a test, with the standard library's macros and every function call guarded.

        whole: the text is one call, whose value goes to the host as it is. about: other text of the test, which may
        name non-finite numbers.
        """
        kind = "any" if _NOT_FINITE.search(f"{text} {about}") else "finite"
        code = _code(text)
        inserted = [(match.start(), "::std::") for match in _MACRO.finditer(code)]
        for match in _CALL.finditer(code) if not whole else ():
            end = closing(text, match.end() - 1)
            if end is not None and self._guarded(code, match):
                inserted += [(match.start(), f"crate::{self._name}::{kind}("), (end + 1, ")")]
        for position, words in sorted(inserted, key=lambda one: -one[0]):
            text = text[:position] + words + text[position:]
        return text

    def _guarded(self, code: str, match: re.Match[str]) -> bool:
        path = match["path"].split("::")
        elsewhere = path[0] in ("std", "core", "alloc", "f32", "f64") or any(part[:1].isupper() for part in path)
        declared = re.search(r"\bfn\s*\Z", code[: match.start()]) is not None
        return match["name"] not in self._free and not elsewhere and not declared


def _code(text: str) -> str:
    """The text with strings and comments blanked."""
    return TOKEN.sub(lambda token: " " * len(token[0]) if token["skip"] else token[0], text)


def _outside_braces(text: str) -> str:
    """The text with braces and everything between them blanked."""
    depth, visible = 0, []
    for character in _code(text):
        depth += (character == "{") - (character == "}")
        visible.append(character if depth == 0 else " ")
    return "".join(visible)
