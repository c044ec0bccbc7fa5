"""A programming problem: a prompt to complete, tests of the completion, and the program that the three make.

Knows nothing of files; `problems` and `humaneval` read them. Nothing here runs a program.
"""

from dataclasses import dataclass
from typing import Literal

from nanochat_cli.errors import ConfigError
from nanochat_cli.evaluation.completions import cut_completion

Language = Literal["python", "rust"]


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
