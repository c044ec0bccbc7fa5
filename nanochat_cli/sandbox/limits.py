"""The data of a run: its limits, the program with its tests, the outcome. Knows nothing of processes or languages."""

from dataclasses import dataclass
from typing import Literal

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
    """Bounds of one process tree, which is killed whole when it exceeds one of them.

    `wall` and `cpu` are seconds (`cpu` of each process; rounded up), sizes are bytes. `memory` bounds the address
    space of each process and the private resident memory of the tree; `disk` and `files` bound the private folder;
    `output` bounds standard output and standard error together.
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
"""Limits of rustc and its linker."""


@dataclass(frozen=True)
class Case:
    """One test: two expressions in the program's language. It passes when neither fails and both have equal values."""

    call: str
    expected: str


@dataclass(frozen=True)
class Program:
    """Source to judge, and its tests as data. There is no `main`.

    support: code that the tests may use, evaluated after the source. given: the beginning of the source, which the
    model did not write; tests use its definitions and not the program's.
    """

    language: str
    source: str
    tests: tuple[Case, ...] = ()
    support: str = ""
    given: str = ""


@dataclass(frozen=True)
class Diagnostic:
    """A message of a compiler or of a failed test. `line` counts from 1; None: not a line of the program."""

    level: str
    message: str
    line: int | None = None


@dataclass(frozen=True)
class Outcome:
    """How far a program came. `passed` of `total` tests passed; `seconds` is its wall-clock time, without queueing.

    `status` is "ok" when the program ended by itself and without an error, whether or not its tests passed.
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
        """The program compiles without its tests."""
        return self.stage != "not compiled"

    @property
    def solved(self) -> bool:
        """There are tests and all of them passed."""
        return self.total > 0 and self.passed == self.total
