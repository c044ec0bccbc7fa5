"""The metrics of an interrupted and resumed run are those of an uninterrupted one, in both formats."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nanochat_cli.errors import DataError
from nanochat_cli.report.metrics_log import MetricsLog, read_metrics, series


def metrics_of(step: int) -> dict[str, float | str]:
    return {"tokens": step * 100, "loss/train": 5.0 / step, "training/lr": 0.02, "note": "é" * (step % 3)}


def write(run_dir: Path, first: int, last: int, resumed_step: int | None = None, tensorboard: bool = True) -> None:
    with MetricsLog(run_dir, tensorboard, resumed_step) as log:
        for step in range(first, last + 1):
            log.log(step, metrics_of(step))
            if step % 5 == 0:
                log.log(step, {"eval/bpb": 2.0 + 1 / step})
            log.sync()


def tensorboard_scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_one_json_object_per_line_in_the_order_of_logging(tmp_path: Path) -> None:
    write(tmp_path, 1, 5)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        *({"step": step, **metrics_of(step)} for step in range(1, 6)),
        {"step": 5, "eval/bpb": 2.2},
    ]
    assert read_metrics(tmp_path) == [json.loads(line) for line in lines]


def test_lines_are_on_file_as_soon_as_they_are_logged(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, False) as log:
        log.log(1, {"loss/train": 1.5})
        assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss/train": 1.5}]


@pytest.mark.parametrize(
    "torn", ["", '{"step": 9, "loss', '{"step": 12}'], ids=["killed between lines", "in one", "at its end"]
)
@pytest.mark.parametrize("resumed_step", [5, 7, 8])
def test_a_killed_and_resumed_file_equals_the_uninterrupted_one(tmp_path: Path, torn: str, resumed_step: int) -> None:
    write(tmp_path / "whole", 1, 12)
    write(tmp_path / "resumed", 1, 8)
    with (tmp_path / "resumed" / "metrics.jsonl").open("a") as file:
        file.write(torn)
    write(tmp_path / "resumed", resumed_step + 1, 12, resumed_step)
    assert (tmp_path / "resumed" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_tensorboard_holds_the_scalars_that_have_a_group(tmp_path: Path) -> None:
    write(tmp_path, 1, 10)
    scalars = tensorboard_scalars(tmp_path)
    assert set(scalars) == {"loss/train", "training/lr", "eval/bpb"}
    assert scalars["loss/train"] == [(step, pytest.approx(5.0 / step)) for step in range(1, 11)]
    assert scalars["eval/bpb"] == [(5, pytest.approx(2.2)), (10, pytest.approx(2.1))]


def test_tensorboard_forgets_the_steps_that_a_resume_repeats(tmp_path: Path) -> None:
    write(tmp_path, 1, 9)
    # A second event file sorts after the first by its time stamp, and in the same second by its counter in the name.
    write(tmp_path, 6, 12, resumed_step=5)
    assert [step for step, _ in tensorboard_scalars(tmp_path)["loss/train"]] == list(range(1, 13))


def test_a_fresh_run_starts_an_empty_file(tmp_path: Path) -> None:
    write(tmp_path, 1, 5, tensorboard=False)
    write(tmp_path, 1, 2, tensorboard=False)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    assert not (tmp_path / "tensorboard").exists()


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, True) as log:
        log.log(1, {"loss/train": math.nan, "training/grad_norm": math.inf, "eval/bpb": 2.0})
    assert read_metrics(tmp_path) == [{"step": 1, "loss/train": None, "training/grad_norm": None, "eval/bpb": 2.0}]


def test_reading_leaves_out_a_half_written_last_line_only(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "los')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl:2: not a JSON object with a step"):
        read_metrics(path)
    with pytest.raises(DataError, match=r"cannot read .*nowhere"):
        read_metrics(tmp_path / "nowhere")


def test_series_pairs_two_columns_and_leaves_out_gaps() -> None:
    records = [{"step": 1, "a": 2.0}, {"step": 2, "a": None}, {"step": 3, "b": 1.0}, {"step": 4, "a": 0}]
    assert series(records, "step", "a") == ([1.0, 4.0], [2.0, 0.0])


def test_a_place_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(DataError, match=r"cannot write .*metrics.jsonl: .*run.dir"):
        MetricsLog(tmp_path, False)


def test_importing_it_imports_neither_torch_nor_tensorboard() -> None:
    code = "import sys, nanochat_cli.report.metrics_log; print({'torch', 'tensorboard', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
