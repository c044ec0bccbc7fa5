"""Rust tests as text: builds the crates that evaluate them, and reads their reports.

Knows the surface of Rust (brackets, strings, comments), not its grammar: a test that is split wrongly does not compile.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

TOKEN = re.compile(
    r"""(?P<skip>//[^\n]*|/\*.*?\*/|b?r(?P<hashes>\#*)".*?"(?P=hashes)|b?"(?:[^"\\]|\\.)*"|b?'(?:[^'\\\n]|\\[^\n]+?)')
    | (?P<open>[([{]) | (?P<close>[)\]}])""",
    re.VERBOSE | re.DOTALL,
)
_ALIAS = re.compile(r"let\s+(\w+)\s*=\s*([A-Za-z_]\w*)\Z")
_LET = re.compile(r"let\s+(?:mut\s+)?(\w+)\b")
_HEAD = re.compile(rb"(\d{1,9}) (\d{1,9}|panic)(?:\n|\Z)")
"""The first line of a report."""

_REPORT = """
fn main() {{
    use ::std::io::Write as _;
    use ::std::os::fd::FromRawFd as _;
    let mut channel = unsafe {{ ::std::fs::File::from_raw_fd(3) }};
    let cases: [fn() -> ::std::string::String; {count}] = [{names}];
    for (number, case) in cases.into_iter().enumerate() {{
        let line = match ::std::panic::catch_unwind(case) {{
            ::std::result::Result::Ok(text) => ::std::format!("{{number}} {{}}\\n{{text}}\\n", text.len()),
            ::std::result::Result::Err(_) => ::std::format!("{{number}} panic\\n"),
        }};
        channel.write_all(line.as_bytes()).unwrap();
    }}
}}
"""


@dataclass(frozen=True)
class Check:
    """`call` must have the value of `expected`, whose type is `kind` where known; part of test number `case`."""

    case: int
    call: str
    expected: str
    kind: str | None = None


def checks_of(tests: Sequence[tuple[str, str]], support: str, source: str) -> list[Check] | None:
    """The checks of (call, expected) tests; a call of an assertion function in the support becomes its assertions.

    None when the support does more than assert.
    """
    checks: list[Check] = []
    for number, (call, expected) in enumerate(tests):
        if not support.strip():
            checks.append(_check(number, call, expected, source))
            continue
        name = re.fullmatch(r"(?:\w+::)*(\w+)\(\)", call.strip())
        pairs = _assertions(name[1], support) if name and expected.strip() == "()" else None
        if not pairs:
            return None
        checks += [_check(number, one, other, source) for one, other in pairs]
    return checks


def _check(case: int, call: str, expected: str, source: str) -> Check:
    """A check with the function's return type, where the test is exactly one call of a function of the program."""
    name = _whole_call(call)
    if name is None:
        return Check(case, call, expected)
    signature = re.search(rf"\bfn\s+{name}\s*\(", source)
    if signature is None:
        return Check(case, call, expected)
    end = closing(source, signature.end() - 1)
    kind = re.match(r"\s*->\s*([^{;]+?)\s*(?:\{|where\b)", source[end + 1 :]) if end is not None else None
    return Check(case, call, expected, re.sub(r"'\w+", "'static", kind[1]) if kind else None)


def _whole_call(text: str) -> str | None:
    """The name of the function, if the text is exactly one call."""
    match = re.match(r"\s*(\w+)\s*(\()", text)
    return match[1] if match is not None and closing(text, match.start(2)) == len(text.rstrip()) - 1 else None


def closing(text: str, start: int) -> int | None:
    """Where the bracket at `start` is closed."""
    depth = 0
    for token in TOKEN.finditer(text, start):
        depth += bool(token["open"]) - bool(token["close"])
        if token["close"] and depth == 0:
            return token.start()
    return None


def _split(text: str, separator: str) -> list[str]:
    """Split at separators outside brackets, strings and comments; drops comments."""
    parts, depth, position, part = [], 0, 0, ""
    while position < len(text):
        token = TOKEN.match(text, position)
        if token:
            depth += bool(token["open"]) - bool(token["close"])
            part += "" if token[0].startswith(("//", "/*")) else token[0]
            position = token.end()
        elif depth == 0 and text.startswith(separator, position):
            parts.append(part.strip())
            part, position = "", position + len(separator)
        else:
            part += text[position]
            position += 1
    return [*parts, part.strip()]


def _assertions(name: str, support: str) -> list[tuple[str, str]] | None:
    """(value, expected) of each assertion of a function made of `let` and assertions only; None for any other."""
    start = re.search(rf"\bfn\s+{name}\s*\(\)\s*\{{", support)
    end = closing(support, start.end() - 1) if start else None
    if start is None or end is None:
        return None
    lets: list[str] = []
    aliases: dict[str, str] = {}
    pairs = []
    for statement in filter(None, _split(support[start.end() : end], ";")):
        alias = _ALIAS.match(statement)
        if alias:
            aliases[alias[1]] = alias[2]
        elif _LET.match(statement):
            lets.append(statement)
        else:
            match = re.match(r"(assert(?:_eq)?)!\s*\((.*)\)\Z", statement, re.DOTALL)
            if match is None:
                return None
            parts = _split(match[2], ",") if match[1] == "assert_eq" else _split(_split(match[2], ",")[0], "==")
            one, other = (parts[0], parts[1]) if len(parts) > 1 else (parts[0], "true")
            pairs.append((_with(lets, aliases, one), _with(lets, aliases, other)))
    return pairs


def _with(lets: Sequence[str], aliases: dict[str, str], expression: str) -> str:
    """The expression after the `let`s that it needs, with aliases of functions resolved."""
    needed: list[str] = []
    text = expression
    for statement in reversed(lets):
        name = _LET.match(statement)
        if name and re.search(rf"\b{name[1]}\b", text):
            needed.insert(0, statement)
            text += statement
    whole = f"{{ {'; '.join(needed)}; {expression} }}" if needed else expression
    for short, name in aliases.items():
        whole = re.sub(rf"\b{short}\b", name, whole)
    return whole


class TestGuard(Protocol):
    """Keeps the program's own types from deciding tests: `plain.Guard`."""

    module: str

    def imports(self, call: str, /) -> str: ...
    def wrapped(self, text: str, about: str = "", *, whole: bool = False) -> str: ...


def crate_of(source: str, support: str, checks: Sequence[Check], inside: bool, guard: TestGuard) -> str:
    """The program, the support, and a main that reports the value of each call.

    inside: put the program into a module, one line lower, since it has its own `main` or crate attributes.
    """
    cases = "\n".join(
        f'pub fn case_{i}() -> ::std::string::String {{ ::std::format!("{{:?}}", '
        f"{guard.wrapped(check.call, check.expected, whole=_whole_call(check.call) is not None)}) }}"
        for i, check in enumerate(checks)
    )
    imports = guard.imports(" ".join(check.call for check in checks))
    body = f"{source}\n{guard.wrapped(support)}\npub mod nanochat_cases {{\n{imports}\n{cases}\n}}\n"
    if inside:
        return f"mod program {{\n{body}}}\n{guard.module}{_main(len(checks), 'program::nanochat_cases')}"
    return f"{body}{guard.module}{_main(len(checks), 'nanochat_cases')}"


def expected_crate(checks: Sequence[Check]) -> str:
    """A crate without the program that reports the expected values."""
    lines = []
    for i, check in enumerate(checks):
        kind = f": {check.kind}" if check.kind else ""
        value = f'let value{kind} = {check.expected}; ::std::format!("{{:?}}", value)'
        lines.append(f"pub fn case_{i}() -> ::std::string::String {{ {value} }}")
    body = "\n".join(lines)
    imports = "#[allow(unused_imports)] use ::std::collections::*;"
    return f"pub mod cases {{\n{imports}\n{body}\n}}\n{_main(len(checks), 'cases')}"


def _main(count: int, module: str) -> str:
    return _REPORT.format(count=count, names=", ".join(f"{module}::case_{i}" for i in range(count)))


def reports(received: bytes) -> dict[int, str | None]:
    """The reported values by number, None for a panic, up to the first malformed report."""
    values: dict[int, str | None] = {}
    at = 0
    while match := _HEAD.match(received, at):  # never a copy of the rest: a program may send very many
        at = match.end()
        if match[2] == b"panic":
            values[int(match[1])] = None
            continue
        end = at + int(match[2])
        if received[end : end + 1] != b"\n":
            break
        values[int(match[1])] = received[at:end].decode(errors="replace")
        at = end + 1
    return values


def canonical(text: str) -> str:
    """`Debug` text with the entries of every brace sorted: sets and maps print in no fixed order."""
    output: list[list[str]] = [[""]]
    for piece in re.finditer(r'"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)+\'|[{}]|, |.', text, re.DOTALL):
        token = piece[0]
        if token == "{":
            output.append([""])
        elif token == "}" and len(output) > 1:
            entries = sorted(output.pop())
            output[-1][-1] += "{" + ", ".join(entries) + "}"
        elif token == ", " and len(output) > 1:
            output[-1].append("")
        else:
            output[-1][-1] += token
    return ", ".join(entry for level in output for entry in level)
