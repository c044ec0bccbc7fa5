"""Compile and run untrusted programs: `Sandbox(limits).judge(program) -> Outcome`.

Languages are in `python` and `rust`, processes in `process`; `pool` runs many programs at once.
"""

import sys
import threading
from contextlib import nullcontext

from nanochat_cli.errors import ConfigError
from nanochat_cli.sandbox.limits import COMPILE_LIMITS, Case, Diagnostic, Limits, Outcome, Program
from nanochat_cli.sandbox.process import Isolation, isolation
from nanochat_cli.sandbox.python import judge as python
from nanochat_cli.sandbox.rust import judge as rust

__all__ = ["Case", "Diagnostic", "Limits", "Outcome", "Program", "Sandbox"]

LANGUAGES = ("python", "rust")
_one_at_a_time = threading.Lock()
"""Held while a program runs as a user that it shares with the other programs of this process."""


class Sandbox:
    """Runs programs within `limits`, and rustc within `compile_limits`. Thread-safe.

    `isolation` says how programs are kept apart (`isolation.description` is for reports); the default is the strongest
    form that works on this machine. Methods return an Outcome whatever the program does, and raise ConfigError for an
    unknown language, for Rust without rustc, and where no sandbox can start.
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
        """Compile without running; `source` needs no `main`."""
        with self._turn:
            if _known(language) == "python":
                return python.compile_program(source, self.limits, self.isolation)
            return rust.compile_program(source, self.compile_limits, self.isolation)

    def execute(self, language: str, source: str) -> Outcome:
        """Compile and run: Python as `__main__`, Rust through its `main`."""
        with self._turn:
            if _known(language) == "python":
                return python.execute(source, self.limits, self.isolation)
            return rust.execute(source, self.limits, self.compile_limits, self.isolation)

    def judge(self, program: Program) -> Outcome:
        """Compile and run the tests; a program without tests is only compiled."""
        if not program.tests:
            return self.compile(program.language, program.source)
        with self._turn:
            if _known(program.language) == "python":
                return python.judge(program, self.limits, self.isolation)
            return rust.judge(program, self.limits, self.compile_limits, self.isolation)

    def toolchain(self, language: str) -> str:
        """The version of the interpreter or compiler."""
        if _known(language) == "python":
            return sys.version
        return rust.version()


def _known(language: str) -> str:
    if language not in LANGUAGES:
        raise ConfigError(f"the sandbox cannot run {language!r}; choose from {', '.join(LANGUAGES)}")
    return language
