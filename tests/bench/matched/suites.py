"""Made-up records of runs."""

from collections.abc import Mapping, Sequence

from nanochat_cli.bench.matched.records import FINISHED, MEASURES, Point, RunRecord, Suite


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
