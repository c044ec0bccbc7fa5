"""The suites of `nanochat eval --suite` by name, and the settings of those that sample. Imports no torch.

Suites of problems ask for programs that pass tests; `compile` asks for programs that compile.
`bpb`, `completion` and `memorised` compare a model with text and draw nothing.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanochat_cli.errors import ConfigError
from nanochat_cli.evaluation.problem import Problem
from nanochat_cli.evaluation.problems import load_problems
from nanochat_cli.report.quantities import counted
from nanochat_cli.report.reporter import Reporter

BITS_PER_BYTE = "bpb"
COMPILE = "compile"
COMPLETION = "completion"
MEMORISED = "memorised"
NAMED = {"python": "python", "rust": "rust", "humaneval-python": "humaneval", "humaneval-rust": "multipl-e"}
"""Suites of problems, and what `load_problems` calls them."""
SAMPLES = 10
"""Completions of each problem, unless a k asks for more."""


@dataclass(frozen=True)
class SuiteOptions:
    """How completions are drawn and counted. Raises ConfigError for values that make no sense.

    samples: completions of each problem at each temperature; limit: most problems.
    """

    samples: int = SAMPLES
    ks: tuple[int, ...] = (1,)
    temperatures: tuple[float, ...] = (0.2,)
    limit: int | None = None
    max_tokens: int = 256
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1:
            raise ConfigError(f"--k {_listed(self.ks)}: needs whole numbers of at least 1")
        if self.samples < max(self.ks):
            raise ConfigError(
                f"--samples {self.samples} is too few for pass@{max(self.ks)}: draw at least {max(self.ks)}, "
                "or ask for a smaller --k"
            )
        if not self.temperatures or not all(0 <= value < math.inf for value in self.temperatures):
            raise ConfigError(f"--temperature {_listed(self.temperatures)}: needs numbers of 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p:g}: needs a number above 0, at most 1 (off)")
        if len(set(self.ks)) < len(self.ks) or len(set(self.temperatures)) < len(self.temperatures):
            raise ConfigError("--k and --temperature take each value once")
        if 0 in self.temperatures and self.samples > 1:
            raise ConfigError(
                f"--temperature 0 draws the same completion {self.samples} times: use --samples 1, or a temperature "
                "above 0"
            )

    def drawn(self) -> dict[str, Any]:
        """The options that completions depend on; the others only decide which figures are computed from them."""
        values = asdict(self)
        del values["ks"], values["limit"]
        return {**values, "temperatures": list(self.temperatures)}


def problem_suite(name: str, limit: int | None, reporter: Reporter) -> list[Problem]:
    """The first `limit` problems of a suite: a name of NAMED, or anything that `load_problems` reads.

    Leaves out problems that no completion can pass, with a warning. Raises ConfigError for an unknown name, and what
    `load_problems` raises.
    """
    try:
        problems = load_problems(NAMED.get(name, name))
    except ConfigError as error:
        if NAMED.get(name, name) == name and not Path(name).exists():
            raise ConfigError(f"--suite {name}: choose from {_names()}; {error}") from error
        raise
    needy = [problem for problem in problems if problem.needs]
    if needy:
        reporter.warn(
            f"{name}: left out {counted(len(needy), 'problem')}; for example, {needy[0].id} needs "
            f"{' and '.join(needy[0].needs)}"
        )
    return [problem for problem in problems if not problem.needs][:limit]


def _names() -> str:
    return ", ".join([BITS_PER_BYTE, COMPILE, *NAMED, COMPLETION, MEMORISED])


def _listed(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values) or '""'
