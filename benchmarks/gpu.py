"""What only a GPU can tell, in one run of under ten minutes.

    python3 benchmarks/gpu.py [--out FOLDER] [--deadline 520] [--only SECTION] [--device cpu] [--quick]

A plain python3 with torch, triton and tokenizers is enough: no network, nothing installed. Whatever else is imported,
and the Rust tokens that `e3` trains on, come from build/gpu, which `python benchmarks/gpu_carry.py` fills beforehand.

Sections, the most important first (`benchmarks/gpu_sections/`, one file each):

    exactness      every Triton kernel equals its reference on this device; the int8 and float forms train alike
    roofline       rates of memory and of products in bf16, fp8 and int8; every kernel against them; then tile sizes
    forms          a linear layer in each form of its product: rows of the table that `choose_form` reads
    training-125m  whole training steps of 125 million parameters: float twin, ternary, low-precision backward passes
    training-1b    the same for one billion parameters, with gradient checkpointing
    e3             runs of `nanochat bench e3`, as many as fit
    decode         tokens per second of a packed model, with and without a CUDA graph
    losses         the contenders of training-125m trained on the same bytes, if time is left

Each section is a process of its own: a kernel that hangs, or one that breaks the device for its process, ends nothing
else. It writes FOLDER/SECTION.json as it goes, and has a share of the time that is left; what does not fit is left out
and named in the file. A section that fails keeps what it measured, beside `failed`. A second run continues: it skips
sections that have finished. Exit code 1 if one has failed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# For a python3 into which nothing of ours is installed. What is imported here needs only the standard library.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanochat_cli.report.result_file import result_place

ROOT = Path(__file__).resolve().parents[1]
CARRIED = ROOT / "build" / "gpu"
LOG_LINES = 40


@dataclass(frozen=True)
class Section:
    """share: of the time that is left, relative to later sections; least: seconds in which it can do something."""

    name: str
    share: float
    least: float


SECTIONS = (
    Section("exactness", 80, 25),
    Section("roofline", 50, 25),
    Section("forms", 75, 40),
    Section("training-125m", 105, 60),
    Section("training-1b", 110, 60),
    Section("e3", 60, 45),
    Section("decode", 25, 15),
    Section("losses", 75, 60),
)

Start = Callable[[Section, float, float], str | None]
"""Run a section that should end at the first time of the monotonic clock and must at the second; why it failed."""


def run_all(
    sections: Sequence[Section], out: Path, ends: float, start: Start, clock: Callable[[], float] = time.monotonic
) -> dict[str, str]:
    """Run what has not finished, until `ends`; returns why sections failed, by name."""
    left = [section for section in sections if not finished(out / f"{section.name}.json")]
    for section in sections:
        if section not in left:
            print(f"--- {section.name}: finished before", flush=True)
    failures: dict[str, str] = {}
    for number, section in enumerate(left):
        file = out / f"{section.name}.json"
        began, remaining = clock(), ends - clock()
        seconds = remaining * section.share / sum(other.share for other in left[number:])
        if seconds < section.least:
            reason = f"it needs {section.least:.0f} s, and its share of {max(remaining, 0):.0f} s is {seconds:.0f} s"
            print(f"--- {section.name}: skipped: {reason}", flush=True)
            add_to(file, skipped=reason)
            continue
        print(f"--- {section.name}: {seconds:.0f} of {remaining:.0f} s", flush=True)
        add_to(file, skipped=None, failed=None)
        if failure := start(section, began + 0.9 * seconds, min(began + 1.2 * seconds + 5, ends)):
            failures[section.name] = failure
            add_to(file, failed=failure)
            print(f"--- {section.name}: failed: {failure}", flush=True)
        print(f"--- {section.name}: {clock() - began:.0f} s", flush=True)
    return failures


def finished(file: Path) -> bool:
    """Whether this result of a section is whole: no failure, and its process wrote its last word."""
    found = read(file)
    return bool(found) and not {"failed", "skipped", "unfinished"} & found.keys()


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def add_to(file: Path, **values: str | None) -> None:
    """Set keys of a section's file, keeping its measurements; None removes a key, and creates no file."""
    found = read(file)
    document = {key: value for key, value in {**found, **values}.items() if value is not None}
    if document != found:
        temporary = file.with_suffix(".new")
        temporary.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(file)


@dataclass(frozen=True)
class Process:
    """Runs sections as processes. options: of `gpu_sections.run`, the same for all; environment: of the processes."""

    out: Path
    options: Sequence[str]
    environment: dict[str, str]

    def start(self, section: Section, until: float, limit: float) -> str | None:
        command = [sys.executable, "-m", "benchmarks.gpu_sections.run", section.name, str(self.out), f"{until}"]
        with subprocess.Popen(
            [*command, *self.options],
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process:
            assert process.stdout is not None
            log: deque[str] = deque(maxlen=LOG_LINES)
            reader = threading.Thread(target=_follow, args=(process.stdout, log), daemon=True)
            reader.start()
            try:
                code = process.wait(max(limit - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _kill_group(process.pid)
            reader.join(5)
        if code == 0:
            return None
        lines = [line for line in log if line]
        last = lines[-1] if lines else "it printed nothing"
        return f"stopped when its time was over, at: {last}" if code is None else f"{last} (exit code {code})"


def _follow(lines: Any, log: deque[str]) -> None:
    for line in lines:
        print(line, end="", flush=True)
        log.append(line.rstrip())


def _kill_group(pid: int) -> None:
    """End a section's process with those it started, which its compilers and workers are."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def environment(carried: Path) -> dict[str, str]:
    """What a section's process and the processes it starts need to import the checkout and what was carried."""
    paths = [str(ROOT), str(ROOT / "kernels"), str(carried / "site"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def main() -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu; with --quick build/bench/gpu")
    parser.add_argument("--deadline", type=float, default=520.0, help="seconds for everything")
    parser.add_argument("--only", action="append", metavar="SECTION", choices=[s.name for s in SECTIONS])
    parser.add_argument("--device", default="cuda", help="cpu: to test the script, with --quick")
    parser.add_argument("--quick", action="store_true", help="sizes of a few numbers: whether it works, nothing else")
    parser.add_argument("--carried", type=Path, default=CARRIED, help="what gpu_carry.py made; default: build/gpu")
    options = parser.parse_args()
    if options.device != "cuda" and not options.quick and options.out is None:
        parser.error("results of another device are not those of a GPU: --quick, or another --out")
    out: Path = (options.out or result_place("gpu", None, quick=options.quick).with_suffix("")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    chosen = [section for section in SECTIONS if not options.only or section.name in options.only]
    if options.quick:
        chosen = [Section(section.name, section.share, 1) for section in chosen]
    carried = options.carried.resolve()
    shared = ["--device", options.device, "--carried", str(carried), *(["--quick"] if options.quick else [])]
    process = Process(out, shared, environment(carried))
    failures = run_all(chosen, out, began + options.deadline, process.start)
    print(f"wrote {out}, {time.monotonic() - began:.0f} s")
    for name, failure in failures.items():
        print(f"failed: {name}: {failure}", file=sys.stderr)
    if finished(out / "forms.json") and not options.quick:
        print(f"for `choose_form`: python benchmarks/bitlinear_forms.py --from {out / 'forms.json'}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
