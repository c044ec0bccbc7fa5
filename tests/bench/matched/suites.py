"""Made-up records of runs, and suites read back from their `report.json`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanochat_cli.bench.matched.run_record import FINISHED, MEASURES, REPORT_FILE, Point, RunRecord, Suite
from nanochat_cli.report.result_file import Claim, Result


def record(
    config: str,
    seed: int = 0,
    *,
    status: str = FINISHED,
    bits: Sequence[float] = (),
    measures: Mapping[str, float | None] | None = None,
) -> RunRecord:
    """A run with an evaluation after every 10 steps, of 100 tokens and a second each."""
    points = [Point(10 * n, 1000 * n, 10.0 * n, value, value) for n, value in enumerate(bits, start=1)]
    train = {name: [1.0, 2.0] for name in ("step", "tokens", "seconds", "loss")}
    known = dict.fromkeys(MEASURES) | dict(measures or {})
    reason = None if status == FINISHED else "because"
    return RunRecord(config, seed, status, reason, f"runs/{config}-seed{seed}", 1000, train, points, known)


def suite(runs: Sequence[RunRecord], kind: str = "e3") -> Suite:
    return Suite(kind, {}, {"baseline": "baseline", "seeds": 1}, [], [], list(runs))


def read_suite(folder: Path) -> Suite:
    """The suite in `folder`; JSON has lists where the dataclasses have pairs."""

    def pair(values: dict[str, Any], name: str) -> dict[str, Any]:
        return values | {name: None if values[name] is None else tuple(values[name])}

    found = json.loads((folder / REPORT_FILE).read_text())
    found["results"] = [Result(**pair(values, "spread")) for values in found["results"]]
    found["claims"] = [Claim(**pair(values, "interval")) for values in found["claims"]]
    for values in found["runs"]:
        values["evaluations"] = [Point(**point) for point in values["evaluations"]]
    return Suite(**found | {"runs": [RunRecord(**values) for values in found["runs"]]})
