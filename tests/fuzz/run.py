"""Fuzzing for as long as one likes: `python -m tests.fuzz.run --minutes 10` (`make fuzz`).

Coverage guides it where atheris is installed (`pip install atheris`; it does not belong to the extras, since it has
wheels for few versions of Python); otherwise the mutator of the tests goes on where they stop. A new breach is written
to build/fuzz/TARGET/, from where it moves to tests/fuzz/found/TARGET/ when it is repaired. Minutes are of processor
time, shared by the targets in turn.
"""

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from tests.fuzz.contract import bounded_memory, breach
from tests.fuzz.mutate import mutation

if TYPE_CHECKING:
    from tests.fuzz.targets import Target

ROOT = Path(__file__).resolve().parents[2]
FOUND = ROOT / "build" / "fuzz"
LAST = "last"
"""Name of the file with the input that is being read: a process that dies leaves nothing else."""
FIRST = 10**6
"""Number of the first mutation, beyond those of the tests."""


def keep(target: str, data: bytes, said: str) -> None:
    """Write a breach down, once."""
    path = FOUND / target / hashlib.sha256(data).hexdigest()[:16]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        print(f"{path.relative_to(ROOT)}:\n{said}", file=sys.stderr, flush=True)


def mutate(target: "Target", seconds: float, start: int, last: Path) -> int:
    """Mutations for so much processor time; returns how many. last: gets every input before it is read."""
    until = time.process_time() + seconds
    for number in itertools.count(start):
        if time.process_time() >= until:
            return number - start
        data = mutation(target.name, number, target.seeds)
        last.write_bytes(data)
        if (said := breach(target.read, data)) is not None:
            keep(target.name, data, said)
    raise AssertionError("unreachable")


def guided(target: "Target", seconds: float, work: Path, count: Callable[[bytes], None]) -> None:
    """By atheris, which ends the process. count: called with every input before it is read."""
    import atheris

    corpus = work / "inputs"
    corpus.mkdir()
    for number, seed in enumerate(target.seeds):
        (corpus / str(number)).write_bytes(seed)

    def one(data: bytes) -> None:
        count(data)
        if (said := breach(target.read, data)) is not None:
            keep(target.name, data, said)

    size = 4 * max(map(len, target.seeds)) + 4096
    options = [f"-max_total_time={round(seconds)}", f"-max_len={size}", "-verbosity=0", "-print_final_stats=0"]
    atheris.Setup([sys.argv[0], *options, "-rss_limit_mb=8192", str(corpus)], one)
    atheris.Fuzz()


def instrumented() -> AbstractContextManager[None]:
    """What is imported meanwhile tells atheris which branches it takes: our readers and gguf's, not torch."""
    if find_spec("atheris") is None:
        return nullcontext()
    import atheris

    return atheris.instrument_imports(include=["nanochat_cli", "gguf"])


def fuzz_one(name: str, seconds: float, start: int, report: Path) -> None:
    """One target in this process; writes how many executions there were."""
    with instrumented():
        from tests.fuzz.targets import targets
    with tempfile.TemporaryDirectory(prefix="nanochat-fuzz-") as folder, targets(Path(folder)) as found:
        target = next(target for target in found if target.name == name)
        if find_spec("atheris") is None:
            with bounded_memory():
                report.write_text(json.dumps(mutate(target, seconds, start, report.with_name(LAST))))
            return
        done = itertools.count(1)

        def count(data: bytes) -> None:
            report.with_name(LAST).write_bytes(data)
            if (number := next(done)) % 100 == 0:
                report.write_text(json.dumps(number))

        guided(target, seconds, Path(folder), count)


def fuzz(minutes: float, names: list[str], start: int = FIRST) -> dict[str, int]:
    """Every target in a process of its own, one after the other; returns executions by target."""
    done: dict[str, int] = {}
    for name in names:
        with tempfile.TemporaryDirectory(prefix="nanochat-fuzz-") as folder:
            report = Path(folder) / "executions"
            command = [sys.executable, "-m", "tests.fuzz.run", "--target", name, "--start", str(start)]
            command += ["--seconds", str(60 * minutes / len(names)), "--report", str(report)]
            ended = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
            done[name] = json.loads(report.read_text()) if report.exists() else 0
            print(f"{name}: {done[name]:,} executions", flush=True)
            if ended.returncode < 0 and (last := report.with_name(LAST)).exists():
                keep(name, last.read_bytes(), f"the process died with signal {-ended.returncode}")
            elif ended.returncode:
                sys.exit(f"{name}: the fuzzer itself failed")
    return done


def breaches() -> list[Path]:
    """Inputs that break the contract and have not been moved to the tests."""
    return sorted(FOUND.glob("*/*"))


def all_names() -> list[str]:
    from tests.fuzz.targets import targets

    with tempfile.TemporaryDirectory(prefix="nanochat-fuzz-") as folder, targets(Path(folder)) as found:
        return [target.name for target in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--target", help="only this one")
    parser.add_argument("--start", type=int, default=FIRST, help="number of the first mutation, without atheris")
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.report is not None:
        fuzz_one(arguments.target, arguments.seconds, arguments.start, arguments.report)
        return
    guide = "the mutator of the tests: atheris is not installed" if find_spec("atheris") is None else "atheris"
    print(f"mutations by {guide}", flush=True)
    done = fuzz(arguments.minutes, [arguments.target] if arguments.target else all_names(), arguments.start)
    found = breaches()
    print(f"{sum(done.values()):,} executions, {len(found)} breaches in {FOUND.relative_to(ROOT)}/")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
