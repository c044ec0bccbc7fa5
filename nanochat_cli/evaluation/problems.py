"""Programming problems: a prompt to complete, and tests that say whether the completion is right.

Knows the built-in sets (`nanochat_cli/tasks`), the file format of problems, and how prompt, completion and tests become
a program. Published benchmarks are read by `humaneval`; nothing here runs a program.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.evaluation.completions import cut_completion
from nanochat_cli.evaluation.problem_files import SUFFIXES, records

Language = Literal["python", "rust"]
BUILT_IN: tuple[Language, ...] = ("python", "rust")
_TASKS = Path(__file__).resolve().parent.parent / "tasks"


@dataclass(frozen=True)
class Test:
    """Passes when `call` == `expected`; both are expressions of the problem's language, and neither may fail."""

    __test__ = False  # pytest collects no class of this name

    call: str
    expected: str


@dataclass(frozen=True)
class Problem:
    """prompt: source up to the first character that a model writes; a completion continues it.

    level: 1 (trivial) to 5, None where the source does not say. solution: a completion that is known to be right, or
    None. stop: texts at which generation may end. support: source that the tests need, behind the completion.
    needs: what the tests or the known solution need beside one function and the standard library, in words.
    """

    id: str
    language: Language
    prompt: str
    tests: tuple[Test, ...]
    level: int | None = None
    solution: str | None = None
    stop: tuple[str, ...] = ()
    support: str = ""
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Program:
    """source: prompt and completion; support: what follows it for the tests only; tests: data, not in the source.
    given: the prompt.

    A harness puts `support` behind `source` and evaluates each test there. There is no `main`.
    """

    language: Language
    source: str
    support: str
    tests: tuple[Test, ...]
    given: str = ""


def assemble(problem: Problem, completion: str, *, stopped: bool = True) -> Program:
    """The program that a completion makes, cut where the function ends (`completions.cut_completion`).

    stopped: generation ended at a stop sequence. Text that ended otherwise (EOS, too long) gets no brace put back.
    Raises ConfigError for a problem with `needs`, since no completion of it can pass.
    """
    if problem.needs:
        raise ConfigError(f"{problem.id} needs {' and '.join(problem.needs)}; leave it out")
    completion = cut_completion(problem.language, problem.prompt, completion, problem.stop if stopped else ())
    return Program(problem.language, problem.prompt + completion, problem.support, problem.tests, problem.prompt)


def load_problems(source: str | Path) -> list[Problem]:
    """The problems of `python` or `rust` (built in), of a published set (`humaneval.HUB`), or of a file.

    A file is .jsonl, .jsonl.gz or .parquet, in our format or in one of the published ones, told apart by their fields.
    Raises ConfigError for a name that is neither, and DataError, with file and line, for a bad record, an id that comes
    twice, or no problem at all.
    """
    from nanochat_cli.evaluation import humaneval

    name = str(source)
    if name in BUILT_IN:
        return problems_of(records(_TASKS / f"{name}.jsonl"), name)
    if name.partition("@")[0] in humaneval.HUB:
        return problems_of(humaneval.hub_records(name), name)
    path = Path(source)
    if path.is_file():
        return problems_of(records(path), name)
    if path.name.endswith(SUFFIXES):
        raise DataError(f"{path}: no such file")
    known = ", ".join([*BUILT_IN, *humaneval.HUB])
    raise ConfigError(f"no problem set {name!r}; there are {known}, and files ({', '.join(SUFFIXES)})")


def problems_of(rows: Iterable[tuple[str, object]], source: str) -> list[Problem]:
    """Problems of (where, record) pairs; raises DataError as `load_problems` does."""
    from nanochat_cli.evaluation import humaneval

    found: dict[str, Problem] = {}
    for where, record in rows:
        if not isinstance(record, dict):
            raise DataError(f"{where}: a problem must be an object with named fields, not {type(record).__name__}")
        try:
            problem = humaneval.published_problem(record, where) or _Record.model_validate(record).problem()
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(str(part) for part in first["loc"])
            raise DataError(f"{where}: {field}: {first['msg'][:1].lower()}{first['msg'][1:]}") from error
        if problem.id in found:
            raise DataError(f"{where}: the id {problem.id!r} comes twice; ids must be unique")
        found[problem.id] = problem
    if not found:
        raise DataError(f"{source}: no problems in it")
    return list(found.values())


class _TestRecord(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    call: str = Field(min_length=1)
    expected: str = Field(min_length=1)


class _Record(BaseModel):
    """A line of our own format."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: str = Field(min_length=1)
    language: Language
    prompt: str = Field(min_length=1)
    tests: list[_TestRecord] = Field(min_length=1)
    level: int | None = Field(default=None, ge=1, le=5)
    solution: str | None = None
    stop: list[str] = []
    support: str = ""

    def problem(self) -> Problem:
        tests = tuple(Test(test.call, test.expected) for test in self.tests)
        return Problem(
            self.id, self.language, self.prompt, tests, self.level, self.solution, tuple(self.stop), self.support
        )
