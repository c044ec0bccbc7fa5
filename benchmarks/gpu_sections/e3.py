"""As many runs of `nanochat bench e3` as fit: the baseline first, then the others, one seed, at their presets' rates.

The corpus is the data set that was carried, else the standard library. Runs are processes of the suite's own; it is
stopped when the time is over, and what has finished is compared. Its folder is build/gpu-e3.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict

from benchmarks.gpu_sections.task import ROOT, Task
from nanochat_cli.bench.matched.plan import CONFIGS, PLAN_FILE, load_plan
from nanochat_cli.bench.matched.run_record import FINISHED
from nanochat_cli.bench.matched.suite import collect
from nanochat_cli.errors import NanochatError

FOLDER = ROOT / "build" / "gpu-e3"
FIRST = "full", "best"
"""Configurations that run before the others, once they exist."""
STEPS = ((150.0, 200), (0.0, 100))
"""Steps of a run by the seconds that are left for all."""
SAVES_WITHIN = 10.0


def run(task: Task) -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    with task.attempt("nanochat bench e3"):
        code = suite_until(task, command(task))
        finished = record(task) if (FOLDER / PLAN_FILE).is_file() else 0
        if code and not finished:
            raise NanochatError(f"exit code {code}")
        if code:  # its last act is a report, for which packages may be missing here
            task.leave_out("the suite's own report", f"exit code {code}")


def command(task: Task) -> list[str]:
    """The command line of the suite."""
    steps = next(steps for seconds, steps in STEPS if task.left() >= seconds)
    overrides = [f"train.device={task.device.type}", *(() if task.quick else (f"train.total_steps={steps}",))]
    manifest = task.carried / "rust" / "manifest.json"
    if manifest.is_file():
        vocabulary = json.loads(manifest.read_text(encoding="utf-8"))["tokenizer"]["vocab_size"]
        overrides += [f"data.path={manifest.parent}", f"model.vocab_size={vocabulary}"]
    profile, configs = ("smoke", "full") if task.quick else ("gpu", ",".join(_order(CONFIGS)))
    line = [sys.executable, "-m", "nanochat_cli", "bench", "e3", "--profile", profile, "--configs", configs]
    return [*line, "--seeds", "1", "--out", str(FOLDER), *(word for text in overrides for word in ("--set", text))]


def _order(configs: Sequence[str]) -> list[str]:
    return sorted(configs, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))


def suite_until(task: Task, line: list[str]) -> int:
    """Run the suite and return its exit code; when the time is over, have its run save and end, and return 0."""
    with subprocess.Popen(line, cwd=ROOT, env=dict(os.environ)) as process:
        try:
            return process.wait(max(task.left() - SAVES_WITHIN, 1))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(SAVES_WITHIN)
            except subprocess.TimeoutExpired:
                process.kill()
            return 0


def record(task: Task) -> int:
    """Keep the suite's results over the runs that finished, and how every run ended; returns how many finished."""
    plan = load_plan(FOLDER)
    suite = collect(plan, FOLDER)
    planned = [contender.name for contender in plan.contenders]
    finished = [run.config for run in suite.runs if run.status == FINISHED]
    task.details["settings"] = suite.settings
    # Without their environments, which are this file's.
    task.details["runs"] = [{**asdict(run), "environment": {}} for run in suite.runs]
    for name in planned:
        if name not in finished:
            ended = (f"{run.status}: {run.reason}" for run in suite.runs if run.config == name)
            task.leave_out(name, next(ended, "no time was left"))
    task.add(suite.results, suite.claims)
    return len(finished)
