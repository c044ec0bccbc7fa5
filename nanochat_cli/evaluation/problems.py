"""Sets of programming problems by name: the built-in ones (`problem_sets`), published benchmarks, and files.

Knows our own file format; `humaneval` reads those of published benchmarks.
"""

from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.evaluation import humaneval
from nanochat_cli.evaluation.problem import Language, Problem
from nanochat_cli.evaluation.problem_files import SUFFIXES, records
from nanochat_cli.sandbox.limits import Case

BUILT_IN: tuple[Language, ...] = ("python", "rust")
_BUILT_IN_FOLDER = Path(__file__).with_name("problem_sets")


def load_problems(source: str | Path) -> list[Problem]:
    """The problems of `python` or `rust` (built in), of a published set (`humaneval.HUB`), or of a file.

    A file is .jsonl, .jsonl.gz or .parquet, in our format or in one of the published ones, told apart by their fields.
    Raises ConfigError for an unknown name, and DataError, with file and line, for a bad record, a repeated id, or an
    empty set.
    """
    name = str(source)
    if name in BUILT_IN:
        return problems_of(records(_BUILT_IN_FOLDER / f"{name}.jsonl"), name)
    if name.partition("@")[0] in humaneval.HUB:
        return problems_of(humaneval.hub_records(name), name)
    path = Path(source)
    if path.is_file():
        return problems_of(records(path), name)
    if path.name.endswith(SUFFIXES):
        raise DataError(f"{path}: no such file")
    known = ", ".join([*BUILT_IN, *humaneval.HUB])
    raise ConfigError(f"no problem set {name!r}; choose from {known}, or name a file ({', '.join(SUFFIXES)})")


def problems_of(rows: Iterable[tuple[str, object]], source: str) -> list[Problem]:
    """Problems of (where, record) pairs; raises DataError as `load_problems` does."""
    problems: dict[str, Problem] = {}
    for where, record in rows:
        if not isinstance(record, dict):
            raise DataError(f"{where}: a problem must be an object with named fields, not {type(record).__name__}")
        try:
            problem = humaneval.published_problem(record, where) or _Record.model_validate(record).problem()
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(str(part) for part in first["loc"])
            raise DataError(f"{where}: {field}: {first['msg'][:1].lower()}{first['msg'][1:]}") from error
        if problem.id in problems:
            raise DataError(f"{where}: the id {problem.id!r} is repeated; ids must be unique")
        problems[problem.id] = problem
    if not problems:
        raise DataError(f"{source}: it holds no problems")
    return list(problems.values())


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
        tests = tuple(Case(test.call, test.expected) for test in self.tests)
        return Problem(
            self.id, self.language, self.prompt, tests, self.level, self.solution, tuple(self.stop), self.support
        )
