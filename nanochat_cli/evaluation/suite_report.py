"""Figures of an evaluation from its lines: pass@k with intervals over problems, as a table and as a result file.

Knows the content of a line (`complete_problems`), not where completions came from.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanochat_cli.evaluation.pass_at_k import PassAtK, mean_pass_at_k
from nanochat_cli.evaluation.sample_file import Key
from nanochat_cli.report.result_file import Result

Row = tuple[object, ...]


@dataclass(frozen=True)
class Score:
    """Figures of a group of problems at a temperature. Shares are of all completions, with equal weight per problem.

    compiled: the program compiles; rejected: empty, a comment, a copy or trivial; cut: ended by --max-tokens or the
    context. too_long: problems whose prompt does not fit, which count as failed.
    """

    group: str
    temperature: float
    passes: tuple[PassAtK, ...]
    compiled: float
    rejected: float
    cut: float
    problems: int
    too_long: int


def scores(records: Mapping[Key, dict[str, Any]], ks: Sequence[int], temperatures: Sequence[float]) -> list[Score]:
    """Scores by temperature: all problems, then each language and each level where there are several."""
    scored = []
    for temperature in temperatures:
        chosen = [record for record in records.values() if record["temperature"] == temperature]
        groups = {"all": chosen}
        for field, called in (("language", "{}"), ("level", "level {}")):
            values = sorted({record[field] for record in chosen if record[field] is not None})
            if len(values) > 1:
                groups |= {called.format(value): [one for one in chosen if one[field] == value] for value in values}
        scored += [_score(group, temperature, members, ks) for group, members in groups.items()]
    return scored


def table(suite: str, scored: Sequence[Score]) -> tuple[tuple[str, ...], list[Row]]:
    """The columns and rows of the table that is printed."""
    columns = ["temperature", "of", "problems"]
    for one in scored[0].passes:
        columns += [metric(suite, one.k), "95 % interval"]
    rows = []
    for score in scored:
        cells: list[object] = [score.temperature, score.group, score.problems]
        for one in score.passes:
            cells += [one.value, "—" if one.interval is None else "{:.3f} – {:.3f}".format(*one.interval)]
        rows.append((*cells, score.compiled, score.rejected, score.cut))
    return (*columns, "compiled", "rejected", "cut"), rows


def results(suite: str, scored: Sequence[Score]) -> list[Result]:
    """The figures as results of a result file; the ends of an interval are separate results."""
    listed = []
    for score in scored:
        group = "" if score.group == "all" else f", {score.group}"
        case = f"{suite}{group}, temperature {score.temperature:g}"
        for one in score.passes:
            name = metric(suite, one.k)
            listed.append(Result(case, name, one.value, "share"))
            if one.interval is not None:
                listed.append(Result(case, f"{name}, low end of the 95 % interval", one.interval[0], "share"))
                listed.append(Result(case, f"{name}, high end of the 95 % interval", one.interval[1], "share"))
        listed += [
            Result(case, "compiled", score.compiled, "share"),
            Result(case, "rejected", score.rejected, "share"),
            Result(case, "cut", score.cut, "share"),
            Result(case, "problems", float(score.problems), "problems"),
            Result(case, "problems whose prompt does not fit", float(score.too_long), "problems"),
        ]
    return listed


def metric(suite: str, k: int) -> str:
    """The name of pass@k in a suite; in `compile` it is the compile rate."""
    if suite != "compile":
        return f"pass@{k}"
    return "compile rate" if k == 1 else f"compile@{k}"


def _score(group: str, temperature: float, members: Sequence[dict[str, Any]], ks: Sequence[int]) -> Score:
    counts = {
        record["problem"]: (record["samples"], sum(one["passed"] for one in record["completions"]))
        for record in members
    }
    return Score(
        group=group,
        temperature=temperature,
        passes=tuple(mean_pass_at_k(counts, ks)),
        compiled=_share(members, lambda one: one["compiled"]),
        rejected=_share(members, lambda one: one["rejected"] is not None),
        cut=_share(members, lambda one: one["finish"] == "length"),
        problems=len(members),
        too_long=sum(not record["fits"] for record in members),
    )


def _share(members: Sequence[dict[str, Any]], holds: Any) -> float:
    return statistics.fmean(
        sum(bool(holds(one)) for one in record["completions"]) / record["samples"] for record in members
    )
