"""Made-up suites for tests of the comparison report: every measure follows from configuration and seed."""

from pathlib import Path

from nanochat_cli.bench.matched.run_record import FINISHED, MEASURES, Point, RunRecord, Suite
from nanochat_cli.report.result_file import Claim

ENVIRONMENT = {"date": "2026-11-25T10:00:00+00:00", "device": "a CPU", "cores": 2, "versions": {"torch": "2.12.0"}}


def record(
    config: str,
    seed: int,
    *,
    better: float = 0.0,
    status: str = FINISHED,
    reason: str | None = None,
    run: str | None = None,
    without: frozenset[str] = frozenset(),
    speed: float = 1.0,
) -> RunRecord:
    """better: bits per byte below those of the seed. without: measures that are None. speed: of the steps."""
    final = 1.75 + seed / 128 - better
    steps = [1, 2, 4, 8]
    points = [
        Point(step, step * 1024, step * (1.5 + seed / 10) / speed, final + (8 - step) / 16, 2.5 * final)
        for step in steps
    ]
    values: dict[str, float | None] = {
        "bits_per_byte": final,
        "loss": 2.5 * final,
        "tokens_per_second": 683.0 * speed + seed,
        "step_ms": 1500 / speed,
        "forward_ms": 600 / speed,
        "backward_ms": 700 / speed,
        "optimizer_ms": 150 / speed,
        "data_wait_ms": 20.0,
        "busy_fraction": 0.987,
        "steps": 8,
        "peak_memory_bytes": 612_345_678 + seed,
        "optimizer_state_bytes": 45_000_000 / speed,
        "train_seconds": 12 / speed,
    }
    measures = {name: None if name in without else values.get(name) for name in MEASURES}
    train = {"step": [1.0, 2.0], "tokens": [1024.0, 2048.0], "seconds": [1.5, 3.0], "loss": [8.0, 7.0]}
    return RunRecord(config, seed, status, reason, run or f"{config}-{seed}", 5_000_000, train, points, measures)


def claim(**changes: object) -> Claim:
    values: dict[str, object] = {
        "id": "mtp",
        "statement": "multi-token prediction needs fewer tokens",
        "source": "arXiv:2404.19737",
        "expected": "10 to 20 % fewer",
        "measured": "1.152",
        "verdict": "supported",
        "interval": (1.125, 1.188),
        "seeds": 3,
        "expected_low": 1.1,
        "expected_high": 1.2,
        "unit": "×",
    }
    return Claim(**(values | changes))  # pyright: ignore[reportArgumentType]


def suite(runs: list[RunRecord], claims: list[Claim] | None = None, **settings: object) -> Suite:
    return Suite("e3", ENVIRONMENT, {"baseline": "baseline", "profile": "smoke", **settings}, [], claims or [], runs)


def three_seeds() -> Suite:
    """A baseline, a better and a worse configuration, with three seeds each, and three claims."""
    runs = []
    for seed in (1, 2, 3):
        runs += [
            record("baseline", seed),
            record("mtp-only", seed, better=seed / 64, speed=0.9),
            record("muon-8bit", seed, better=-1 / 32, speed=1.1),
        ]
    claims = [
        claim(),
        claim(id="async", statement="a busy loader", measured="1.02", interval=(0.97, 1.05),
              verdict="not supported (2 seeds only)", expected_low=1.3, expected_high=None),
        claim(id="full", statement="never got there", measured="not reached", interval=None, seeds=3,
              verdict="not measurable here"),
    ]  # fmt: skip
    return suite(runs, claims)


def every_status() -> Suite:
    """A finished baseline, and one run of every other status; names and reasons contain markup characters."""
    broken = record(
        "a|b <script>alert('x')</script> $1$ & *c*", 1, status="diverged", reason="losses <inf> at | step 3"
    )
    silent = RunRecord("silent", 1, "failed", "the process ended with\nexit code 1", "silent-1", None, {}, [], {})
    runs = [
        record("baseline", 1),
        broken,
        silent,
        record("large", 1, status="out of memory", reason="out of memory after step 0"),
        record("stopped", 1, status="interrupted", reason="stopped by SIGINT after step 4"),
    ]
    return suite(runs)


def everything() -> Suite:
    """Three seeds, runs of every other status, claims, notes and tuned rates: every section of a report."""
    tried = {"baseline": {"0.01": 2.5, "0.02": 2.25}, "mtp-only": {"0.01": None}}
    tuned = {"steps": 4, "key": "optim.lr", "tried": tried, "chosen": {"baseline": 0.02}}
    whole = three_seeds()
    return suite([*whole.runs, *every_status().runs[1:]], whole.claims, notes=["the data differ"], tuning=tuned)


def as_files(folder: Path) -> list[str]:
    """Names of all files in a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
