"""Compile and run programs that nobody has read: `Sandbox(limits).judge(program) -> Outcome`.

The one object that rewards and evaluation use. Languages are in `python` and `rust`, processes in
`process`, many programs at once in `pool`.
"""

import sys
import threading
from contextlib import nullcontext

from nanochat_cli.errors import ConfigError
from nanochat_cli.sandbox.limits import COMPILE_LIMITS, Case, Diagnostic, Limits, Outcome, Program, ProgramLike
from nanochat_cli.sandbox.process import Isolation, isolation
from nanochat_cli.sandbox.python import judge as python
from nanochat_cli.sandbox.rust import judge as rust

__all__ = ["Case", "Diagnostic", "Limits", "Outcome", "Program", "Sandbox"]

LANGUAGES = ("python", "rust")
_one_at_a_time = threading.Lock()
"""Of all sandboxes of this process whose programs share a user."""


class Sandbox:
    """Runs programs within `limits`; rustc within `compile_limits`. May be used by many threads at once.

    `isolation` says how programs are kept apart (`isolation.description` is for reports); by default the strongest
    form that works on this machine. Every method returns an Outcome, whatever the program does. They raise ConfigError
    for an unknown language, for Rust without rustc, and when the machine can start no sandbox.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        compile_limits: Limits = COMPILE_LIMITS,
        isolated: Isolation | None = None,
    ) -> None:
        self.limits = limits if limits is not None else Limits()
        self.compile_limits = compile_limits
        self.isolation = isolated if isolated is not None else isolation()
        self._turn = _one_at_a_time if self.isolation.shared else nullcontext()

    def compile(self, language: str, source: str) -> Outcome:
        """Compile and do not run. `source` needs no `main`."""
        with self._turn:
            if _known(language) == "python":
                return python.compile_program(source, self.limits, self.isolation)
            return rust.compile_program(source, self.compile_limits, self.isolation)

    def execute(self, language: str, source: str) -> Outcome:
        """Compile and run by itself: Python as `__main__`, Rust through its `main`."""
        with self._turn:
            if _known(language) == "python":
                return python.execute(source, self.limits, self.isolation)
            return rust.execute(source, self.limits, self.compile_limits, self.isolation)

    def judge(self, program: ProgramLike) -> Outcome:
        """Compile, and run the tests; a program without tests is only compiled."""
        if not program.tests:
            return self.compile(program.language, program.source)
        with self._turn:
            if _known(program.language) == "python":
                return python.judge(program, self.limits, self.isolation)
            return rust.judge(program, self.limits, self.compile_limits, self.isolation)

    def toolchain(self, language: str) -> str:
        """The version that programs of a language are compiled with."""
        if _known(language) == "python":
            return sys.version
        return rust.version()


def _known(language: str) -> str:
    if language not in LANGUAGES:
        raise ConfigError(f"no sandbox for the language {language!r}; there are {', '.join(LANGUAGES)}")
    return language
