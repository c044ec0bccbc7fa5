"""A programming problem: a prompt to complete, and tests; together with a completion they make a program.

Knows nothing of files; `problems` and `humaneval` read them. Nothing here runs a program.
"""

from dataclasses import dataclass
from typing import Literal

from nanochat_cli.errors import ConfigError
from nanochat_cli.evaluation.cut_completion import cut_completion
from nanochat_cli.sandbox.limits import Case, Program

Language = Literal["python", "rust"]


@dataclass(frozen=True)
class Problem:
    """prompt: source up to the first character that a model writes; a completion continues it.

    level: 1 (trivial) to 5, None where the source does not say. solution: a completion that is known to be right.
    stop: texts at which generation may end. support: source that the tests need, after the completion. needs: what the
    tests or the known solution need besides one function and the standard library, in words.
    """

    id: str
    language: Language
    prompt: str
    tests: tuple[Case, ...]
    level: int | None = None
    solution: str | None = None
    stop: tuple[str, ...] = ()
    support: str = ""
    needs: tuple[str, ...] = ()


def assemble(problem: Problem, completion: str, *, stopped: bool = True) -> Program:
    """The program that a completion makes, cut where the function ends (`cut_completion`).

    stopped: generation ended at a stop sequence. Text that ended otherwise (EOS, too long) gets no brace put back.
    Raises ConfigError for a problem with `needs`, since no completion of it can pass.
    """
    if problem.needs:
        raise ConfigError(f"{problem.id} needs {' and '.join(problem.needs)}; leave it out")
    completion = cut_completion(problem.language, problem.prompt, completion, problem.stop if stopped else ())
    return Program(problem.language, problem.prompt + completion, problem.tests, problem.support, problem.prompt)
