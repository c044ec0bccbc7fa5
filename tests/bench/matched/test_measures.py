"""Measures are read from a run's metrics: medians of steady steps, the main loss only, when a target is reached."""

import json
from pathlib import Path

import pytest

from nanochat_cli.bench.matched.measures import MAX_POINTS, RunOutcome, first_reached, read_run, relate
from nanochat_cli.bench.matched.run_record import FINISHED, MEASURES
from tests.bench.matched.suites import record


def write_metrics(folder: Path, steps: int, final: float | None = 2.0) -> None:
    """A run whose first tenth is slow. Auxiliary losses are far from the main loss."""
    lines = []
    seconds = 0.0
    for step in range(1, steps + 1):
        slow = step <= steps // 10
        seconds += 10.0 if slow else 0.5
        lines.append(
            {
                **{"step": step, "tokens": 100 * step, "seconds": seconds, "loss/main": 5.0 - step / steps},
                **{"loss/objective": 99.0, "loss/mtp_1": 88.0, "training/grad_norm": 1.0 + step % 2},
                **{"training/skipped": 1, "throughput/data_wait_ms": 50.0},
                **{"throughput/step_ms": 1e4 if slow else 500.0},
                **{"time/forward_ms": 100.0, "time/backward_ms": 9e3 if slow else 200.0, "time/optimizer_ms": 30.0},
                **{"throughput/tokens_per_second": 200.0},
            }
        )
        if step % (steps // 4) == 0:
            where = {"step": step, "tokens": 100 * step, "seconds": seconds}
            lines.append({**where, "eval/bits_per_byte": 3.0 - step / steps, "eval/loss": 4.0})
    end = {"step": steps, "tokens": 100 * steps, "seconds": seconds}
    lines.append({**end, "final/bits_per_byte": final, "final/loss": None if final is None else 1.4})
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def read(folder: Path, outcome: RunOutcome):
    return read_run(folder, "runs/full-seed1", "full", 1, outcome)


def test_times_are_of_the_steps_after_the_first_tenth(tmp_path):
    write_metrics(tmp_path / "runs" / "full-seed1", 40)
    found = read(tmp_path, RunOutcome(FINISHED, None, 1000, 8, 1 << 20, 77, 0.5))
    measures = found.measures
    assert measures.keys() == MEASURES.keys()
    assert (measures["backward_ms"], measures["step_ms"], measures["forward_ms"]) == (200.0, 500.0, 100.0)
    assert measures["tokens_per_second"] == pytest.approx(100 / 0.5)
    assert measures["busy_fraction"] == pytest.approx(0.9)
    assert measures["train_seconds"] == pytest.approx(4 * 10 + 36 * 0.5)
    assert (measures["bits_per_byte"], measures["loss"]) == (2.0, 1.4)
    assert (measures["optimizer_state_bytes"], measures["gguf_bytes"], measures["gpu_utilisation"]) == (8, 77, 0.5)
    assert (measures["steps"], measures["skipped"], measures["kept_fraction"]) == (40, 1, None)
    assert found.train["loss"][0] == pytest.approx(5.0 - 1 / 40)
    assert [point.bits_per_byte for point in found.evaluations] == pytest.approx([2.75, 2.5, 2.25, 2.0])


def test_a_long_curve_is_thinned_and_keeps_its_end(tmp_path):
    write_metrics(tmp_path / "runs" / "full-seed1", 1240)
    curve = read(tmp_path, RunOutcome(FINISHED)).train
    assert len({len(values) for values in curve.values()}) == 1
    assert 300 < len(curve["step"]) <= MAX_POINTS
    assert curve["step"][-1] == 1240
    assert curve["step"] == sorted(curve["step"])


def test_a_run_whose_held_out_loss_is_not_finite_has_diverged(tmp_path):
    write_metrics(tmp_path / "runs" / "full-seed1", 40, final=None)
    found = read(tmp_path, RunOutcome(FINISHED))
    assert (found.status, found.measures["bits_per_byte"]) == ("diverged", None)
    assert found.reason is not None


def test_a_run_that_never_began_is_a_row_without_numbers(tmp_path):
    found = read(tmp_path, RunOutcome("out of memory", "27 TB"))
    assert (found.status, found.reason, found.evaluations) == ("out of memory", "27 TB", [])
    assert set(found.measures.values()) == {None}
    assert found.train == {"step": [], "tokens": [], "seconds": [], "loss": []}


def test_a_target_is_reached_on_the_line_between_two_evaluations():
    points = record("full", bits=(4.0, 3.0, 2.0)).evaluations
    assert first_reached(points, 2.5) == (pytest.approx(2500), pytest.approx(25))
    assert first_reached(points, 3.0) == (pytest.approx(2000), pytest.approx(20))
    assert first_reached(points, 4.5) == (1000, 10)
    assert first_reached(points, 1.9) is None
    assert first_reached([], 1.0) is None


def test_every_run_is_related_to_the_baseline_of_its_own_seed():
    runs = [
        *(record("baseline", bits=(4.0, 3.0)), record("full", bits=(3.5, 2.5))),
        *(record("baseline", 1, bits=(4.0, 2.0)), record("full", 1, bits=(3.0, 2.5))),
        record("full", 2, bits=(3.0, 2.0)),
        record("mtp-only", status="diverged", bits=(1.0, 1.0)),
    ]
    reached = [run.measures["tokens_to_baseline"] for run in relate(runs, "baseline")]
    assert reached == [2000, 1500, 2000, None, None, None]
