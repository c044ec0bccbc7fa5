"""The suite `compile`: the beginnings of held-out functions, whose completions must compile.

A prompt is the source of a top-level function up to its first statement: signature, and docstring or doc comments. Only
functions that compile alone are used, so that a right answer exists; that leaves out Rust functions that name types of
their crate. Knows sources as text; the sandbox compiles them.
"""

import ast
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence

from nanochat_cli.data.functions import parsed
from nanochat_cli.errors import DataError
from nanochat_cli.evaluation.code_tokens import body_statements
from nanochat_cli.evaluation.cut_completion import CLOSING_STOP, cut_completion
from nanochat_cli.evaluation.humaneval import PYTHON_STOP
from nanochat_cli.evaluation.problem import Language, Problem, assemble
from nanochat_cli.evaluation.rejection_reason import rejection_reason
from nanochat_cli.report.reporter import Reporter
from nanochat_cli.sandbox.pool import SandboxPool

PROMPTS = 100
"""Most functions per language."""
_RUST_FUNCTION = re.compile(
    r"""(?:^(?:///|\#\[)[^\n]*\n)*
    ^(?:pub(?:\([^)\n]*\))?\ )?(?:const\ |async\ |unsafe\ )*fn\ \w[^{};]*\{[ ]*\n""",
    re.VERBOSE | re.MULTILINE,
)


def function_problems(
    documents: Iterable[tuple[str, str]], limit: int, pool: SandboxPool, reporter: Reporter
) -> list[Problem]:
    """At most `limit` problems per language, without tests, from (language, source) documents.

    Functions are taken in the order of their hashes, so that the same documents give the same ones. Raises DataError
    when no document holds a usable function.
    """
    by_hash: dict[Language, dict[str, Problem]] = {"python": {}, "rust": {}}
    for language, source in documents:
        if language in ("python", "rust"):
            split = python_functions if language == "python" else rust_functions
            for prompt, completion in split(source):
                name = hashlib.blake2b(prompt.encode(), digest_size=8).hexdigest()
                stop = PYTHON_STOP if language == "python" else (CLOSING_STOP,)
                by_hash[language][name] = Problem(
                    f"held-out/{language}/{name}", language, prompt, (), solution=completion, stop=stop
                )
    problems = []
    for candidates in by_hash.values():
        ordered = [candidates[name] for name in sorted(candidates)]
        problems += _that_compile(ordered, limit, pool, reporter)
    if not problems:
        raise DataError("no held-out file has a Python or Rust function that compiles by itself: nothing to complete")
    return problems


def _that_compile(candidates: Sequence[Problem], limit: int, pool: SandboxPool, reporter: Reporter) -> list[Problem]:
    """The first `limit` candidates whose own text compiles and is not rejected."""
    kept: list[Problem] = []
    start = 0
    with reporter.progress("functions that compile by themselves", limit, "functions") as progress:
        while len(kept) < min(limit, len(candidates)) and start < len(candidates):
            batch = candidates[start : start + max(8, limit - len(kept))]
            start += len(batch)
            sound = [one for one in batch if rejection_reason(one.language, one.prompt, one.solution or "") is None]
            outcomes = pool.judge_all([assemble(one, one.solution or "") for one in sound])
            compiling = [one for one, outcome in zip(sound, outcomes, strict=True) if outcome.compiled]
            compiling = compiling[: limit - len(kept)]
            kept += compiling
            progress.advance(len(compiling))
    return kept


def python_functions(source: str) -> Iterator[tuple[str, str]]:
    """(prompt, completion) of every top-level function; nothing if the file does not parse."""
    if (module := parsed(source)) is None:
        return
    lines = source.split("\n")
    for node in module.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        body = body_statements(node)
        if not body or not _starts_line(body[0], lines):
            continue  # only a docstring, or all on one line: no beginning to use as a prompt
        start, first = _first_line(node), _first_line(body[0])
        yield "\n".join(lines[start:first]) + "\n", "\n".join(lines[first : node.end_lineno]) + "\n"


def _first_line(node: ast.stmt) -> int:
    """Index of the line where a statement begins, its decorators included."""
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))]) - 1


def _starts_line(node: ast.stmt, lines: Sequence[str]) -> bool:
    return not lines[node.lineno - 1].encode()[: node.col_offset].strip()


def rust_functions(source: str) -> Iterator[tuple[str, str]]:
    """(prompt, completion) of every top-level function that ends."""
    for match in _RUST_FUNCTION.finditer(source):
        prompt, rest = match[0], source[match.end() :]
        completion = cut_completion("rust", prompt, rest)
        if completion.endswith("}") and len(completion) < len(rest):
            yield prompt, completion + "\n"
