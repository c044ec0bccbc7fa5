"""Compares a model before and after learning: pass@1, best of n, compile rate, mean reward, each with an interval.

Both sides have the same problems, random numbers and number of completions, so that differences are paired by problem.
Intervals are over problems (`evaluation.share_intervals`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nanochat_cli.atomic_write import write_atomically
from nanochat_cli.errors import DataError
from nanochat_cli.evaluation.pass_at_k import pass_at_k
from nanochat_cli.evaluation.share_intervals import difference_interval, share_interval
from nanochat_cli.report.result_file import Result, write_results
from nanochat_cli.rl.judging import Judged

RESULTS_FILE = "grpo.json"
REPORT_FILE = "report.md"


@dataclass(frozen=True)
class ProblemScore:
    """Counts over `samples` completions of one problem. best: whether the one with the largest reward solves it."""

    samples: int
    solved: int
    compiled: int
    best: bool
    reward: float


Scores = dict[str, ProblemScore]
"""By id of the problem."""

MEASURES = {
    "pass@1": lambda score: pass_at_k(score.samples, score.solved, 1),
    "best of n": lambda score: float(score.best),
    "compile rate": lambda score: score.compiled / score.samples,
    "mean reward": lambda score: score.reward,
}


@dataclass(frozen=True)
class Difference:
    """One measure over one set of problems. Intervals are 95 %, None for a single problem."""

    problems: str
    measure: str
    count: int
    before: float
    before_interval: tuple[float, float] | None
    after: float
    after_interval: tuple[float, float] | None
    difference: float
    difference_interval: tuple[float, float] | None


def score(group: Sequence[Judged]) -> ProblemScore:
    """The score of one problem from its completions, at least one. Among equal rewards the first is the best."""
    best = max(group, key=lambda judged: judged.reward.total)
    return ProblemScore(
        samples=len(group),
        solved=sum(judged.solves for judged in group),
        compiled=sum(judged.compiles for judged in group),
        best=best.solves,
        reward=math.fsum(judged.reward.total for judged in group) / len(group),
    )


def differences(sets: Mapping[str, Sequence[str]], before: Scores, after: Scores) -> list[Difference]:
    """Every measure over every set of problem ids that is not empty."""
    compared = []
    for name, ids in sets.items():
        for measure, of in MEASURES.items() if ids else ():
            values = [of(before[one]) for one in ids], [of(after[one]) for one in ids]
            mean_before, mean_after = (math.fsum(side) / len(side) for side in values)
            compared.append(
                Difference(
                    name,
                    measure,
                    len(ids),
                    mean_before,
                    share_interval(values[0]),
                    mean_after,
                    share_interval(values[1]),
                    mean_after - mean_before,
                    difference_interval(values[1], values[0]),
                )
            )
    return compared


COLUMNS = ("problems", "measure", "before", "after", "difference")


def rows(compared: Sequence[Difference]) -> list[tuple[str, str, str, str, str]]:
    """Rows of a table with COLUMNS, without measures that are 0 on both sides."""
    return [
        (
            f"{one.problems} ({one.count})",
            one.measure,
            _with_interval(one.before, one.before_interval),
            _with_interval(one.after, one.after_interval),
            _with_interval(one.difference, one.difference_interval, "+.3f"),
        )
        for one in compared
        if one.before or one.after
    ]


def write_report(
    run_dir: Path,
    compared: Sequence[Difference],
    before: Scores,
    after: Scores,
    *,
    notes: Sequence[str],
    details: Mapping[str, object],
) -> Path:
    """Write the result file `grpo.json` and a readable `report.md`; returns the latter. Raises DataError.

    details: further keys of `grpo.json`.
    """
    results = [
        Result(
            f"{one.problems}, {one.count} problems",
            one.measure,
            one.after,
            "share" if one.measure != "mean reward" else "",
            "before",
            one.after / one.before if one.before else None,
        )
        for one in compared
    ]
    content = {
        "differences": [asdict(one) for one in compared],
        "before": {problem: asdict(one) for problem, one in before.items()},
        "after": {problem: asdict(one) for problem, one in after.items()},
        **details,
    }
    write_results(run_dir / RESULTS_FILE, "grpo", results, (), **content)
    lines = [f"# {run_dir.name}", "", *notes, "", f"| {' | '.join(COLUMNS)} |", "| --- | --- | --- | --- | --- |"]
    shown = rows(compared)
    hidden = len(compared) - len(shown)
    lines += [f"| {' | '.join(row)} |" for row in shown]
    lines += ["", *([f"{hidden} of {len(compared)} measures are 0 before and after.", ""] if hidden else [])]
    lines += [
        "In brackets: 95 % intervals over problems, which do not cover the randomness of the completions.",
        "`best of n` picks the completion with the largest reward, which has seen the tests: it says what the",
        "completions contain, not what the model would answer.",
        "",
    ]
    path = run_dir / REPORT_FILE
    try:
        write_atomically(path, "\n".join(lines).encode())
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}; free space") from error
    return path


def _with_interval(value: float, interval: tuple[float, float] | None, form: str = ".3f") -> str:
    if interval is None:
        return format(value, form)
    low, high = interval
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"
