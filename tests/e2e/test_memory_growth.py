"""The memory of a long run does not grow: the resident size of its process, read from outside while it trains.

A leak of one step's tensors shows within a few hundred steps. The first steps are not counted: allocators fill,
modules load.
"""

import json
import os
import pty
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.e2e.compilers import environment, write_broken_compilers
from tests.e2e.tiny import TINY, write_corpus
from tests.rl.tiny_run import write_problems

STEPS, WARM = 300, 100
SMALL = 64 * 2**20
"""Bytes that a healthy run may gain after its warm-up. Keeping each step's tensors costs several times as many."""
TRAIN = [
    *("train", *TINY, "--name", "grown", "--set", f"train.total_steps={STEPS}", "--set", "train.log_interval=10"),
    *("--set", "data.source=src", "--set", "checkpoint.interval=1000", "--set", "eval.interval=1000"),
    *("--set", "model.n_layers=2", "--set", "train.seq_len=64", "--set", "train.batch_size=4"),
]


def resident(pid: int) -> int:
    """VmRSS in bytes; 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")), 0)


def last_step(metrics: Path) -> int:
    """The last step with a complete line in `metrics`."""
    if not metrics.exists():
        return 0
    lines = metrics.read_text().split("\n")[:-1]
    return json.loads(lines[-1])["step"] if lines else 0


def growth(line: list[str], folder: Path, metrics: str, warm: int, steps: int, *, terminal: bool = False, **env) -> int:
    """Bytes that `nanochat LINE` gains between step `warm` and the last report before `steps`."""
    ours, theirs = pty.openpty() if terminal else (None, (folder / "output.txt").open("wb"))
    command = [sys.executable, "-m", "nanochat_cli.cli.app", *line]
    with subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, **env) as child:
        if ours is not None:
            os.close(theirs)
            threading.Thread(target=read_to_the_end, args=(ours,), daemon=True).start()
        sizes: dict[int, int] = {}
        while child.poll() is None:
            sizes[last_step(folder / metrics)] = resident(child.pid)
            time.sleep(0.02)
        assert child.returncode == 0, "" if terminal else (folder / "output.txt").read_text()
    counted = {step: size for step, size in sizes.items() if warm <= step < steps and size}
    assert max(counted) - min(counted) >= (steps - warm) // 2, f"too few steps were seen: {sorted(sizes)}"
    return counted[max(counted)] - counted[min(counted)]


def read_to_the_end(terminal: int) -> None:
    try:
        while os.read(terminal, 65536):
            pass
    except OSError:  # Linux says so when the last writer of a terminal is gone
        os.close(terminal)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "src")
    return tmp_path


def test_training_without_a_working_compiler_does_not_grow(folder):
    env = environment(write_broken_compilers(folder / "bin"), folder / "cache")
    assert growth(TRAIN, folder, "runs/grown/metrics.jsonl", WARM, STEPS, env=env) < SMALL


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["works", "broken"])
@pytest.mark.parametrize("form", ["plain", "terminal", "async"])
def test_training_does_not_grow(folder, compiler, form):
    fakes = write_broken_compilers(folder / "bin") if compiler == "broken" else folder / "empty"
    line = [*TRAIN, "--set", f"loader.enabled={'true' if form == 'async' else 'false'}"]
    env = environment(fakes, folder / "cache", TERM="xterm")
    found = growth(line, folder, "runs/grown/metrics.jsonl", WARM, STEPS, terminal=form == "terminal", env=env)
    assert found < SMALL


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("compiler", ["works", "broken"])
def test_grpo_does_not_grow(folder, compiler):
    write_problems(folder / "p.jsonl")
    fakes = write_broken_compilers(folder / "bin") if compiler == "broken" else folder / "empty"
    env = environment(fakes, folder / "cache")
    train = [sys.executable, "-m", "nanochat_cli.cli.app", *TRAIN, "--set", "train.total_steps=20"]
    subprocess.run(train, cwd=folder, env=env, check=True, capture_output=True)
    grpo = ["grpo", "runs/grown", "--task", "p.jsonl", "--mode", "policy", "--rounds", "20", "--group", "2"]
    small = ["--set", "grpo.max_tokens=12", "--set", "grpo.eval_samples=1", "--set", "grpo.held_out=0.34"]
    assert growth([*grpo, *small], folder, "runs/grown-policy-1/metrics.jsonl", 8, 20, env=env) < SMALL
