"""Does anything grow? Training, serving under load and learning from rewards for long, sampled from outside.

    python benchmarks/soak.py --minutes 120 [--without-compiler] [--terminal] [--threads 2]
    python benchmarks/soak.py --minutes 120 --matrix          # all eight forms, a share of the time each

Training has every method, the asynchronous loader and periodic checkpoints. Of each process tree the resident memory,
open files, threads and processes are sampled; of the machine /dev/shm, and the folder of checkpoints. A slope is that
of the means of ten equal parts of the time after the first fifth, in which caches fill, with its 95 % t interval.
Something grows if its interval lies above 0 and reaches the limit. What still runs when all have been told to end is an
orphan. Writes a result file and a picture; the exit code is 1 if anything grows, fails or is left over. Needs
`pip install -e .[test]`.
"""

import argparse
import itertools
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_cli.report.plots import finish_axes, new_figure, save_figure
from nanochat_cli.report.result_file import Claim, Result, result_place, write_results

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = 10
T_975 = 2.306
"""The 97.5 % quantile of Student's t with BLOCKS − 2 degrees of freedom."""
WARM = 0.2
"""Share of the time that is not counted."""
LIMITS = {
    "resident memory": 1e6,
    "open files": 0.0,
    "threads": 0.0,
    "processes": 0.0,
    "/dev/shm": 1e6,
    "checkpoints": 1e6,
}
"""Growth per hour (bytes, or a number) below which an interval above 0 is no leak that matters."""
BYTES = {"resident memory", "/dev/shm", "checkpoints"}
METHODS = (
    *("model.n_layers=2", "model.mhc.streams=2", "train.seq_len=64", "train.batch_size=4", "train.log_interval=10"),
    *("optim.eight_bit=true", "optim.galore.enabled=true", "optim.galore.rank=16", "optim.galore.update_freq=50"),
    *("mtp.enabled=true", "mtp.n_tokens=2", "collider.enabled=true", "collider.sparsity=0.3"),
    *("loader.enabled=true", "loader.workers=2", "fire.enabled=true", "fire.steps=[100]", "optim.schedule=constant"),
    *("checkpoint.interval=50", "eval.interval=200", "data.source=src", "telemetry.tensorboard=true"),
)
PRACTICE = ("grpo.max_tokens=12", "grpo.eval_samples=1", "grpo.held_out=0.34")


@dataclass
class Job:
    """A command that runs until it is told to end; samples: quantity → (seconds, value)."""

    name: str
    line: list[str]
    process: "subprocess.Popen[bytes] | None" = None
    samples: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def add(self, quantity: str, seconds: float, value: float) -> None:
        self.samples.setdefault(quantity, []).append((seconds, value))


@dataclass(frozen=True)
class Slope:
    """Per hour, with its interval."""

    value: float
    low: float
    high: float

    def grows(self, limit: float) -> bool:
        """Above 0, and not surely below the limit."""
        return self.low > 0 and self.high >= max(limit, 1e-9)


def slope_of(samples: Sequence[tuple[float, float]]) -> Slope | None:
    """None with too few samples. Neighbouring samples are alike, so that means of blocks are what is independent."""
    if not samples:
        return None
    seconds, values = (np.array(column) for column in zip(*samples, strict=True))
    late = seconds >= seconds[0] + WARM * (seconds[-1] - seconds[0])
    if late.sum() < 2 * BLOCKS:
        return None
    hours = np.array([block.mean() for block in np.array_split(seconds[late], BLOCKS)]) / 3600
    means = np.array([block.mean() for block in np.array_split(values[late], BLOCKS)])
    centred = hours - hours.mean()
    spread = float((centred**2).sum())
    value = float((centred * means).sum()) / spread
    rest = means - means.mean() - value * centred
    error = float(np.sqrt((rest**2).sum() / (BLOCKS - 2) / spread))
    return Slope(value, value - T_975 * error, value + T_975 * error)


# -- what is sampled -------------------------------------------------------------------------------------------------


def tree_of(pid: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def usage(pid: int) -> dict[str, float]:
    """Of one process; empty if it has ended."""
    folder = Path("/proc") / str(pid)
    try:
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        files = len(list((folder / "fd").iterdir()))
    except OSError:
        return {}
    resident = 1024 * int(status.get("VmRSS", "0 kB").split()[0])
    return {"resident memory": resident, "open files": files, "threads": int(status["Threads"]), "processes": 1}


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder, some of which may just be removed."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:
            continue
    return total


def sample(jobs: Sequence[Job], machine: Job, work: Path, started: float) -> None:
    now = time.monotonic() - started
    for job in jobs:
        assert job.process is not None
        used = [usage(pid) for pid in tree_of(job.process.pid)]
        if used and used[0]:
            for quantity in used[0]:
                job.add(quantity, now, sum(one.get(quantity, 0) for one in used))
    machine.add("/dev/shm", now, size_of(Path("/dev/shm")))
    machine.add("checkpoints", now, size_of(work / "runs" / "soak" / "checkpoints"))


def left_over(work: Path) -> list[int]:
    """Processes that work in the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if path.readlink().is_relative_to(work):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


# -- what runs -------------------------------------------------------------------------------------------------------


def prepare(work: Path, environment: dict[str, str], port: int, methods: Sequence[str]) -> list[Job]:
    """A corpus, problems, and a run to serve and to practise with."""
    from tests.e2e.tiny import TINY, write_corpus
    from tests.rl.tiny_run import write_problems

    write_corpus(work / "src")
    write_problems(work / "p.jsonl")
    first = ["--set", "data.source=src", "--set", "train.total_steps=20", "--set", "model.max_seq_len=128"]
    command = [sys.executable, "-m", "nanochat_cli", "train", *TINY, *first, "--name", "base"]
    subprocess.run(command, cwd=work, env=environment, check=True, capture_output=True)
    endless = ["--set", "train.total_steps=100000000", "--name", "soak"]
    practice = ["grpo", "runs/base", "--task", "p.jsonl", "--mode", "policy", "--rounds", "1000000", "--group", "2"]
    return [
        Job("train", ["train", *TINY, *_keys(methods), *endless]),
        Job("serve", ["serve", "runs/base", "--port", str(port)]),
        Job("grpo", [*practice, *_keys(PRACTICE)]),
    ]


def _keys(values: Sequence[str]) -> list[str]:
    return [word for value in values for word in ("--set", value)]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def launch(job: Job, work: Path, environment: dict[str, str], stack: ExitStack, *, terminal: bool) -> None:
    """Start a job whose output goes into a file, or is read from a terminal."""
    command = [sys.executable, "-m", "nanochat_cli", *job.line]
    log = stack.enter_context((work / f"{job.name}.log").open("wb"))
    ours, theirs = pty.openpty() if terminal else (None, log.fileno())
    job.process = subprocess.Popen(
        command, cwd=work, env=environment, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, process_group=0
    )
    stack.callback(job.process.kill)
    if ours is not None:
        os.close(theirs)
        stack.callback(os.close, ours)
        threading.Thread(target=_drain, args=(ours, log), daemon=True).start()


def _drain(terminal: int, log: Any) -> None:
    try:
        while block := os.read(terminal, 65536):
            log.write(block)
    except (OSError, ValueError):  # the last writer has gone, or the log is closed
        return


class Load:
    """Clients that ask the server one thing after the other, until it is told to end."""

    def __init__(self, port: int, clients: int = 2) -> None:
        self.answered = self.failed = 0
        self.last_failure = ""
        self._url = f"http://127.0.0.1:{port}/v1/completions"
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,), daemon=True) for n in range(clients)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, client: int) -> None:
        number = client
        while not self._stop.is_set():
            number += 2
            body = json.dumps({"prompt": f"def f{number % 60}(x):\n", "max_tokens": 16, "seed": number}).encode()
            request = urllib.request.Request(self._url, body, {"Content-Type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    json.load(answer)
                self.answered += 1
            except (OSError, ValueError) as error:
                if self.answered:  # before that it loads the model
                    self.failed += 1
                    self.last_failure = str(error)
                self._stop.wait(0.5)


def end(jobs: Sequence[Job], seconds: float = 60) -> list[str]:
    """Ctrl-C to every job; what went wrong."""
    wrong = []
    for job in jobs:
        assert job.process is not None
        if job.process.poll() is not None:
            wrong.append(f"{job.name} ended by itself with exit code {job.process.returncode}")
            continue
        job.process.send_signal(signal.SIGINT)
    for job in jobs:
        assert job.process is not None
        try:
            job.process.wait(seconds)
        except subprocess.TimeoutExpired:
            wrong.append(f"{job.name} did not end within {seconds:g} s of Ctrl-C")
            job.process.kill()
            job.process.wait()
    return wrong


def soak(minutes: float, form: "Form", *, every: float, work: Path, methods: Sequence[str]) -> dict[str, Any]:
    """Run all jobs for so long; returns them with what went wrong."""
    from tests.e2e.compilers import environment, write_broken_compilers

    fakes = work / "no-fakes" if form.compiler else write_broken_compilers(work / "bin")
    env = environment(fakes, work / "cache", TERM="xterm", OMP_NUM_THREADS=str(form.threads))
    port = free_port()
    jobs = prepare(work, env, port, methods)
    machine = Job("machine", [])
    with ExitStack() as stack:
        for job in jobs:
            launch(job, work, env, stack, terminal=form.terminal)
        with Load(port) as load:
            started = time.monotonic()
            while time.monotonic() - started < 60 * minutes:
                sample(jobs, machine, work, started)
                if any(job.process is not None and job.process.poll() is not None for job in jobs):
                    break
                time.sleep(every)
        wrong = end(jobs)
    if load.failed or not load.answered:
        wrong.append(f"{load.failed} requests failed and {load.answered} were answered ({load.last_failure})")
    if orphans := left_over(work):
        wrong.append(f"{len(orphans)} processes are left over: {orphans}")
    logs = {job.name: (work / f"{job.name}.log").read_text(errors="replace")[-2000:] for job in jobs}
    return {"jobs": [*jobs, machine], "wrong": wrong, "answered": load.answered, "logs": logs if wrong else {}}


# -- what is said about it -------------------------------------------------------------------------------------------


def judge(jobs: Sequence[Job], form: str) -> tuple[list[Result], list[Claim]]:
    """Slopes per hour and their verdicts."""
    results, claims = [], []
    for job in jobs:
        for quantity, samples in job.samples.items():
            case, scale = f"{job.name}, {form}", 1e6 if quantity in BYTES else 1
            slope = slope_of(samples)
            if slope is None:
                continue
            unit = "MB/h" if quantity in BYTES else "per hour"
            low, high = slope.low / scale, slope.high / scale
            last = samples[-1][1] / scale
            results.append(Result(case, f"{quantity}, slope", slope.value / scale, unit, spread=(low, high)))
            results.append(
                Result(case, f"{quantity}, at the end", last, unit.removesuffix("/h").replace("per hour", ""))
            )
            limit = LIMITS[quantity] / scale
            claims.append(
                Claim(
                    f"{case}, {quantity}",
                    f"{quantity} of {job.name} does not grow",
                    "docs/reliability.md",
                    f"an interval that contains 0, or lies below {limit:g} {unit}",
                    f"{slope.value / scale:.3g} {unit}",
                    "not supported" if slope.grows(LIMITS[quantity]) else "supported",
                    (low, high),
                    unit=unit,
                )
            )
    return results, claims


def draw(jobs: Sequence[Job], path: Path, title: str) -> None:
    """Resident memory of each job over time."""
    figure = new_figure(8, 4)
    axes = figure.subplots()
    for job in jobs:
        if resident := job.samples.get("resident memory"):
            axes.plot([s / 60 for s, _ in resident], [value / 1e6 for _, value in resident], label=job.name)
    axes.set_xlabel("minutes")
    axes.set_ylabel("resident memory, MB")
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.legend(frameon=False)
    finish_axes(axes)
    save_figure(figure, path)


@dataclass(frozen=True)
class Form:
    """How the jobs run."""

    compiler: bool = True
    terminal: bool = False
    threads: int = 1

    def __str__(self) -> str:
        compiler = "with a compiler" if self.compiler else "without a compiler"
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return f"{compiler}, {'terminal' if self.terminal else 'file'}, {threads}"


def run_forms(forms: Sequence[Form], minutes: float, every: float, place: Path, methods: Sequence[str]) -> bool:
    """Soak each form for so long, write the result and the pictures; returns whether nothing went wrong or grew."""
    results: list[Result] = []
    claims: list[Claim] = []
    wrong: dict[str, list[str]] = {}
    logs: dict[str, dict[str, str]] = {}
    for number, form in enumerate(forms):
        with tempfile.TemporaryDirectory(prefix="nanochat-soak-") as folder:
            found = soak(minutes, form, every=every, work=Path(folder).resolve(), methods=methods)
        slopes, verdicts = judge(found["jobs"], str(form))
        results += slopes
        claims += verdicts
        results += [
            Result(str(form), "minutes", minutes, "minutes"),
            Result(str(form), "requests answered", found["answered"], "requests"),
            Result(str(form), "things that went wrong", len(found["wrong"]), ""),
        ]
        wrong[str(form)], logs[str(form)] = found["wrong"], found["logs"]
        draw(found["jobs"], place.with_name(f"{place.stem}{f'-{number}' if number else ''}.png"), str(form))
    write_results(place, "soak", results, claims, wrong=wrong, logs=logs)
    for claim in claims:
        print(f"{claim.id}: {claim.measured}, {claim.interval}: {claim.verdict}")
    for form_name, lines in wrong.items():
        print(*(f"{form_name}: {line}" for line in lines), sep="\n", end="\n" if lines else "")
    print(f"wrote {place}")
    return not any(wrong.values()) and all(claim.verdict == "supported" for claim in claims)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=2.0, help="seconds between samples")
    parser.add_argument("--without-compiler", action="store_true")
    parser.add_argument("--terminal", action="store_true", help="write to a terminal instead of a file")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--matrix", action="store_true", help="all forms, one after the other")
    parser.add_argument("--quick", action="store_true", help="half a minute: only checks that it works")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))  # tests/ is no installed package
    place = result_place("soak", arguments.out, quick=arguments.quick)
    forms = [Form(not arguments.without_compiler, arguments.terminal, arguments.threads)]
    if arguments.matrix:
        forms = [Form(*form) for form in itertools.product((True, False), (False, True), (1, 2))]
    if arguments.quick:
        run_forms(forms, 0.5, 0.25, place, METHODS)
        return
    well = run_forms(forms, arguments.minutes / len(forms), arguments.every, place, (*METHODS, "train.compile=auto"))
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
