"""What one run may use, and what came of it. Knows nothing of processes or languages."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

MIB = 1024**2

Stage = Literal["not compiled", "compiled", "ran"]
Status = Literal[
    "ok",
    "compile error",
    "tests do not compile",
    "runtime error",
    "timeout",
    "memory",
    "output limit",
    "disk limit",
    "killed",
]


@dataclass(frozen=True)
class Limits:
    """Bounds of one process tree. A tree that passes one of them is killed whole.

    `wall` and `cpu` are seconds (`cpu` of one process; rounded up), sizes are bytes. `memory` bounds the address
    space of each process and the private resident memory of the tree; `disk` and `files` the private folder;
    `output` standard output and standard error together.
    """

    wall: float = 10.0
    cpu: float = 8.0
    memory: int = 512 * MIB
    file_size: int = 16 * MIB
    disk: int = 32 * MIB
    files: int = 1024
    processes: int = 16
    open_files: int = 64
    output: int = MIB


COMPILE_LIMITS = Limits(
    wall=30.0, cpu=30.0, memory=2048 * MIB, file_size=64 * MIB, disk=128 * MIB, processes=48, open_files=256
)
"""What rustc and its linker may use."""


@dataclass(frozen=True)
class Case:
    """One test: source expressions in the language of the program. It passes when both have the same value."""

    call: str
    expected: str


class CaseLike(Protocol):
    """A `Case`, or whatever has its fields."""

    @property
    def call(self) -> str: ...
    @property
    def expected(self) -> str: ...


class ProgramLike(Protocol):
    """A `Program`, or whatever has its fields."""

    @property
    def language(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def support(self) -> str: ...
    @property
    def tests(self) -> Sequence[CaseLike]: ...
    @property
    def given(self) -> str: ...


@dataclass(frozen=True)
class Program:
    """Source to judge, and its tests as data. `support` is test code that the expressions of the tests may use.

    given: the beginning of the source that was not to be written; what it defines is not taken from the program.
    """

    language: str
    source: str
    tests: tuple[Case, ...] = ()
    support: str = ""
    given: str = ""


@dataclass(frozen=True)
class Diagnostic:
    """What a compiler or a test said. `line` counts from 1 in the program, None when it is elsewhere."""

    level: str
    message: str
    line: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of a program. `passed` of `total` tests passed; `seconds` is wall-clock time without waiting.

    `status` is "ok" when the program ended by itself and without a fault, whether or not its tests passed.
    """

    stage: Stage
    status: Status
    diagnostics: tuple[Diagnostic, ...] = ()
    passed: int = 0
    total: int = 0
    results: tuple[bool, ...] = ()
    stdout: str = ""
    stderr: str = ""
    seconds: float = 0.0

    @property
    def compiled(self) -> bool:
        """The program by itself compiles."""
        return self.stage != "not compiled"

    @property
    def solved(self) -> bool:
        """There are tests and all of them passed."""
        return self.total > 0 and self.passed == self.total
