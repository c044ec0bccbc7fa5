"""`kill -9` at random moments of a run, resumed each time, ends in the same bits as an uninterrupted run.

What is killed is the real command in processes of its own; what nobody kills runs in this one. The oracle is the
uninterrupted run. With NANOCHAT_RESULT_FILE set, the ten-kill form writes what it found there, in the one form of every
committed measurement.
"""

import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanochat_cli.report.result_file import Result, write_results
from tests.e2e.processes import run_here, start
from tests.e2e.tiny import TINY, write_corpus

TOTAL_STEPS = 200
RUN = [
    *TINY,
    *("--set", f"train.total_steps={TOTAL_STEPS}", "--set", "train.batch_size=8", "--set", "train.log_interval=1"),
    *("--set", "checkpoint.interval=10", "--set", "eval.interval=25", "--set", "telemetry.interval=20"),
    *("--set", "run.dir=runs", "--set", "data.path=data/src"),
]
TIMINGS = ("seconds", "throughput/")
"""Prefixes of the names of values that depend on the clock."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a data set and the run `whole`, which is never interrupted."""
    folder = tmp_path_factory.mktemp("work")
    write_corpus(folder / "src")
    assert run_here(folder, "tokenize", "--source", "src", "--vocab-size", "300") == 0
    assert run_here(folder, "train", *RUN, "--name", "whole") == 0
    return folder


def steps_said(process: "subprocess.Popen[str]") -> Iterator[int]:
    """The steps, as the process reports them."""
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.match(r"step (\d+)/", line):
            yield int(found[1])


def kill_after(process: "subprocess.Popen[str]", step: int, share: float) -> None:
    """SIGKILL after `step` plus `share` of the mean time per step since the first reported one."""
    started, first = time.perf_counter(), None
    for said in steps_said(process):
        if first is None:
            started, first = time.perf_counter(), said
        if said >= step:
            seconds_per_step = (time.perf_counter() - started) / max(said - first, 1)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=share * seconds_per_step)
            break
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL, "the process ended before it was killed"


def logged_steps(run: Path) -> list[int]:
    """The step of every complete line of metrics.jsonl."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


def without_timings(value: Any) -> Any:
    """The value without entries that depend on the clock."""
    if isinstance(value, dict):
        return {key: without_timings(item) for key, item in value.items() if not key.startswith(TIMINGS)}
    return [without_timings(item) for item in value] if isinstance(value, list) else value


def metrics(run: Path) -> list[dict[str, Any]]:
    return [without_timings(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]


def checkpoint_files(run: Path) -> dict[str, bytes]:
    """Every tensor file of the last checkpoint: weights, optimizer state, telemetry, random generators."""
    return {path.name: path.read_bytes() for path in (run / "checkpoints" / f"step-{TOTAL_STEPS:06d}").glob("*.safet*")}


def saved_state(run: Path) -> dict[str, Any]:
    """The plain part of the last checkpoint: the run's progress and measurements."""
    text = (run / "checkpoints" / f"step-{TOTAL_STEPS:06d}" / "state.json").read_text()
    state = without_timings(json.loads(text)["state"])
    del state["config"]["run"]["name"]
    return state


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_a_run_killed_at_random_moments_equals_the_uninterrupted_one_bit_for_bit(folder: Path, kills: int) -> None:
    moments = random.Random(20 + kills)
    targets = sorted(moments.sample(range(1, TOTAL_STEPS - 4 * kills), kills))
    name = f"killed-{kills}"
    run = folder / "runs" / name
    landed: list[int] = []
    line = ["train", *RUN, "--name", name]
    for target in targets:
        # Always beyond the last kill, so that every process gets further than the one before it.
        beyond = max([target, *(step + 1 for step in landed[-1:])])
        with start(folder, *line) as process:
            kill_after(process, beyond, moments.uniform(0, 2))
        landed.append(logged_steps(run)[-1])
        line = ["train", "--resume", name]
    assert run_here(folder, *line) == 0

    assert len(landed) == kills
    assert landed == sorted(set(landed))
    assert landed[-1] < TOTAL_STEPS
    whole = folder / "runs" / "whole"
    expected = checkpoint_files(whole)
    assert {"model.safetensors", "optimizer.safetensors", "random.safetensors"} <= expected.keys()
    assert checkpoint_files(run) == expected
    assert saved_state(run) == saved_state(whole)
    assert metrics(run) == metrics(whole)

    if kills == 10 and (result_file := os.environ.get("NANOCHAT_RESULT_FILE")):
        case = f"{kills} × kill -9 in a {TOTAL_STEPS}-step run, resumed each time"
        what = "weights, optimizer state, random state and metrics bit-identical to the uninterrupted run"
        found = Result(case, what, 1.0, "1: yes, 0: no")
        write_results(Path(result_file), "resume", [found], killed_after_step=landed)


def test_resuming_a_finished_run_changes_no_bit(folder: Path) -> None:
    whole = folder / "runs" / "whole"
    before = checkpoint_files(whole), saved_state(whole), metrics(whole)
    assert run_here(folder, "train", "--resume", "whole") == 0
    assert (checkpoint_files(whole), saved_state(whole), metrics(whole)) == before


def test_a_run_killed_before_its_first_checkpoint_starts_again(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name = "killed-early"
    with start(folder, "train", *RUN, "--name", name, "--set", "train.total_steps=12") as process:
        kill_after(process, 1, 0.5)
    assert not (folder / "runs" / name / "checkpoints" / "latest").exists()
    assert run_here(folder, "train", "--resume", name) == 0
    assert f"{Path('runs') / name}: no checkpoint yet" in capfd.readouterr().err
    losses = [line["loss/main"] for line in metrics(folder / "runs" / name) if "loss/main" in line]
    assert len(losses) == 12
    assert losses[0] == metrics(folder / "runs" / "whole")[0]["loss/main"]
