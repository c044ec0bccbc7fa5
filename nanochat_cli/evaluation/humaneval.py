"""Published benchmarks as problems: HumanEval, MultiPL-E (Rust) and HumanEval-X (Python, Rust).

Knows their record formats and where the `datasets` library finds them. Records are text: no code of a data set is run,
nothing is unpickled. Each of their check functions becomes one test, which a completion passes as a whole or fails.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel

from nanochat_cli.data.hub import load_rows
from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.evaluation.cut_completion import CLOSING_STOP, cut_completion
from nanochat_cli.evaluation.problem import Problem
from nanochat_cli.evaluation.problem_files import SUFFIXES
from nanochat_cli.sandbox.limits import Case

PYTHON_STOP = ("\nclass ", "\ndef ", "\n#", "\n@", "\nif ", "\nprint(")
"""Starts of top-level statements (arXiv:2107.03374, §2.1)."""
CRATES = ("rand", "regex", "md5")
"""The crates that the header of HumanEval-X imports besides `std`."""
_ITEM = re.compile(r"\b(?:fn|enum|struct|trait|type|const) (\w+)")
_UNIT_TEST = re.compile(r"#\[test\](?:\s|//[^\n]*\n)*fn (\w+)\(\)")


class Hub(NamedTuple):
    """Arguments of `datasets.load_dataset`. `{config}` in a file name stands for the configuration."""

    path: str
    configs: tuple[str, ...]
    split: str
    files: str | None = None


HUB = {
    "humaneval": Hub("openai/openai_humaneval", ("openai_humaneval",), "test"),
    "multipl-e": Hub("nuprl/MultiPL-E", ("humaneval-rs", "mbpp-rs"), "test"),
    # We do not run the loading script in its repository, but read the data files.
    "humaneval-x": Hub(
        "json", ("rust", "python"), "train", "hf://datasets/zai-org/humaneval-x/data/{config}/data/humaneval.jsonl"
    ),
}
"""Sets by name; NAME@CONFIG chooses a configuration other than the first."""


def hub_records(source: str) -> Iterator[tuple[str, object]]:
    """(where, record) of a set of HUB, named NAME or NAME@CONFIG.

    Raises ConfigError for an unknown configuration and DataError when the set cannot be loaded.
    """
    name, _, config = source.partition("@")
    hub = HUB[name]
    config = config or hub.configs[0]
    if config not in hub.configs:
        raise ConfigError(f"{source}: no configuration {config!r}; choose from {', '.join(hub.configs)}")
    hint = f"give a file of its problems in place of the name ({', '.join(SUFFIXES)})"
    if hub.files is None:
        rows = load_rows(source, hint, hub.path, config, split=hub.split)
    else:
        rows = load_rows(source, hint, hub.path, data_files=hub.files.format(config=config), split=hub.split)
    for number, record in enumerate(rows, 1):
        yield f"{source}: row {number}", record


def published_problem(record: dict[str, Any], where: str) -> Problem | None:
    """The problem of a record in one of the published formats; None for a record in another format.

    where: the record's place, for messages. Raises pydantic's ValidationError for a field that is missing or of another
    type, and DataError for content that does not fit the format.
    """
    if "stop_tokens" in record:
        return _multipl_e(MultiPLE.model_validate(record), where)
    if "task_id" in record and "declaration" in record:
        return _humaneval_x(HumanEvalX.model_validate(record), where)
    if "task_id" in record:
        return _humaneval(HumanEval.model_validate(record))
    return None


class HumanEval(BaseModel):
    """A row of openai/openai_humaneval; `test` defines check(candidate)."""

    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str


class MultiPLE(BaseModel):
    """A row of nuprl/MultiPL-E; `tests` starts with the brace that closes the function and defines main()."""

    name: str
    language: str
    prompt: str
    tests: str
    stop_tokens: list[str]


class HumanEvalX(BaseModel):
    """A row of HumanEval-X. Python: `test` ends in a call of check. Rust: `test` is a module of unit tests."""

    task_id: str
    prompt: str
    declaration: str
    canonical_solution: str
    test: str


def _humaneval(row: HumanEval) -> Problem:
    test = Case(f"check({row.entry_point})", "None")
    return Problem(
        row.task_id, "python", row.prompt, (test,), solution=row.canonical_solution, stop=PYTHON_STOP, support=row.test
    )


def _multipl_e(row: MultiPLE, where: str) -> Problem:
    if row.language != "rs":
        raise DataError(f"{where}: the language {row.language!r} cannot be run; only 'rs' of MultiPL-E can")
    support, mains = re.subn(r"\bfn main\(\)", "fn multipl_e_check()", row.tests.lstrip().removeprefix("}"))
    if mains != 1:
        raise DataError(f"{where}: 'tests' must define main() once, not {mains} times")
    tests = (Case("multipl_e_check()", "()"),)
    return Problem(row.name, "rust", row.prompt, tests, stop=tuple(row.stop_tokens), support=support)


def _humaneval_x(row: HumanEvalX, where: str) -> Problem:
    language, _, number = row.task_id.partition("/")
    name = f"humaneval-x/{language.lower()}/{number}"
    if language == "Python":
        body, _, call = row.test.rstrip().rpartition("\n")
        if not call.startswith("check("):
            raise DataError(f"{where}: the last line of 'test' must call check, not be {call!r}")
        tests = (Case(call, "None"),)
        return Problem(name, "python", row.prompt, tests, None, row.canonical_solution, PYTHON_STOP, f"{body}\n")
    if language == "Rust":
        return _humaneval_x_rust(row, name, where)
    raise DataError(f"{where}: the language {language!r} cannot be run; only Python and Rust of HumanEval-X can")


def _humaneval_x_rust(row: HumanEvalX, name: str, where: str) -> Problem:
    """Keeps the imports of `rand`, `regex` and `md5`, which every problem has, only where they are used."""
    module = re.search(r"\bmod (\w+)", row.test)
    functions = _UNIT_TEST.findall(row.test)
    if module is None or not functions:
        raise DataError(f"{where}: 'test' must be a module with unit tests")
    support = row.test.replace("#[cfg(test)]", "")
    support = _UNIT_TEST.sub(r"pub fn \1()", support)
    tests = tuple(Case(f"{module[1]}::{function}()", "()") for function in functions)
    program = row.canonical_solution + row.test
    crates = [crate for crate in CRATES if _uses(crate, program)]
    unused = "|".join(crate for crate in CRATES if crate not in crates)
    header = re.sub(rf"^use (?:{unused})\b[^;]*;\n?", "", row.declaration, flags=re.MULTILINE) if unused else ""
    prompt = (header or row.declaration) + row.prompt
    # A few solutions continue after the function, with items that the tests use; a completion ends before them.
    rest = row.canonical_solution[len(cut_completion("rust", prompt, row.canonical_solution)) :]
    items = [item for item in _ITEM.findall(rest) if re.search(rf"\b{item}\b", row.test)]
    needs = (*(f"the crate {crate}" for crate in crates), *(f"a second item, {item}" for item in items))
    return Problem(name, "rust", prompt, tests, None, row.canonical_solution, (CLOSING_STOP,), support, needs)


def _uses(crate: str, program: str) -> bool:
    return re.search(rf"\b{crate}::|\b{crate.capitalize()}::", program) is not None
