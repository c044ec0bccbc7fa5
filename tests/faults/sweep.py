"""Every file operation of the work in `operations` fails once in every way: what remains, and what a repetition makes.

    LD_PRELOAD=… python -m tests.faults.sweep OUT.json [--cases N] [--only NAME]

Run in a process of its own by `run_sweep`, with the failing disk preloaded. After every fault the command must have
ended well or with one line; every file that was there must be what it was or what it should become, and so must every
new one; the same work without a fault must then end in the same bits as work that was never disturbed.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from nanochat_cli.cli import app
from tests.faults.disk import FAULTS, Disk, Fault, build
from tests.faults.operations import Operation, operations

ROOT = Path(__file__).resolve().parents[2]
SHOWN = 20
"""So many problems of an operation are kept in words."""


@dataclass
class Swept:
    """operations: of the files, in one undisturbed pass. cases: faults tried. struck: those that were met."""

    name: str
    operations: int
    cases: int = 0
    struck: int = 0
    lost: int = 0
    problems: list[str] = field(default_factory=list)


def run_sweep(cases: int | None = None) -> list[Swept]:
    """All operations in a new process. cases: at most so many faults of each, spread evenly; None: all."""
    with tempfile.TemporaryDirectory(prefix="nanochat-faults-") as name:
        out = Path(name) / "swept.json"
        command = [sys.executable, "-m", "tests.faults.sweep", str(out)]
        command += [] if cases is None else ["--cases", str(cases)]
        environment = {**os.environ, "LD_PRELOAD": str(build(Path(name))), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-4000:])
        return [Swept(**one) for one in json.loads(out.read_text())]


def sweep(operation: Operation, cases: int | None) -> Swept:
    """The faults of one operation."""
    before = snapshot(operation.folder)
    disk = Disk(operation.folder)
    _undisturbed(operation)
    after = snapshot(operation.folder)
    restore(operation.folder, before)
    disk.disarm()
    _undisturbed(operation)
    seen = disk.seen
    assert snapshot(operation.folder) == after, f"{operation.name}: not the same bits twice"
    faults = [(number, fault) for number, kind in enumerate(seen) for fault in FAULTS if kind in fault.kinds]
    if cases is not None:
        faults = [faults[len(faults) * at // cases] for at in range(min(cases, len(faults)))]
    swept = Swept(operation.name, len(seen))
    for number, fault in faults:
        restore(operation.folder, before)
        disk.arm(number, fault)
        code, said = ended(operation.act)
        struck = disk.struck
        disk.disarm()
        swept.cases += 1
        swept.struck += struck > 0
        wrong = [*_wrong_words(code, said), *_wrong_files(operation, before, after, code)]
        again = ended(operation.act) if code else (0, "")
        if again[0]:
            wrong.append(f"the repetition failed: {again[1].strip()}")
        elif code and (differing := _differing(snapshot(operation.folder), after)):
            wrong.append(f"the repetition differs: {', '.join(differing)}")
        if wrong:
            swept.lost += 1
            swept.problems += [_told(number, seen[number].name, fault, text) for text in wrong]
    swept.problems = swept.problems[:SHOWN]
    shutil.rmtree(operation.folder)
    return swept


def _undisturbed(operation: Operation) -> None:
    code, said = ended(operation.act)
    assert code == 0, f"{operation.name}: {said}"


def _told(number: int, kind: str, fault: Fault, text: str) -> str:
    return f"{fault.name} at operation {number} ({kind}): {text}"


def ended(act: Callable[[], None]) -> tuple[int, str]:
    """The exit code and the standard error of a command that does this."""
    errors = io.StringIO()
    command = SimpleNamespace(main=lambda **_: act())
    patched = mock.patch.object(app, "get_command", return_value=command)
    with patched, redirect_stderr(errors), redirect_stdout(io.StringIO()):
        return app.main(["export"]), errors.getvalue()


def _wrong_words(code: int, said: str) -> Iterator[str]:
    lines = [line for line in said.splitlines() if not line.startswith("warning: ")]
    if code == 0 and lines:
        yield f"it ended well and said {lines}"
    if code and (len(lines) != 1 or not lines[0].startswith("error: ") or "internal error" in said):
        yield f"exit code {code} with {lines}"
    elif code and "/" not in lines[0]:
        yield f"it does not say where: {lines[0]}"


def _wrong_files(operation: Operation, before: dict[str, bytes], after: dict[str, bytes], code: int) -> Iterator[str]:
    found = {name: content for name, content in snapshot(operation.folder).items() if not _is_hidden(name)}
    if code == 0 and found != {name: content for name, content in after.items() if not _is_hidden(name)}:
        yield f"it ended well, but {', '.join(_differing(found, after))} differ"
    for name in sorted(before.keys() - found.keys()):
        if name in after and not _is_hidden(name) and Path(name).name not in operation.may_miss:
            yield f"{name} is lost"
    for name, content in found.items():
        if name not in operation.grows and content not in (before.get(name), after.get(name)):
            yield f"{name} is neither what it was nor what it should become"
    try:
        operation.intact()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what the sweep looks for
        yield f"not intact: {error}"


def _differing(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones too, by its path in the folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def restore(folder: Path, files: dict[str, bytes]) -> None:
    """Make the folder hold these files and no others."""
    shutil.rmtree(folder)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def careless(work: Path) -> Operation:
    """Writes into place, in two parts, and keeps an error to itself: the sweep must see it."""
    folder = work / "careless"
    folder.mkdir()
    (folder / "file").write_bytes(b"old")

    def act() -> None:
        with (folder / "file").open("wb", buffering=0) as file:
            file.write(b"ne")
            file.write(b"w")

    return Operation("careless", folder, act)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cases", type=int)
    parser.add_argument("--only", help="one kind of work")
    arguments = parser.parse_args()
    os.environ.pop("LD_PRELOAD", None)  # not for the processes that this one starts
    with tempfile.TemporaryDirectory(prefix="nanochat-faults-") as name:
        work = Path(name).resolve()
        swept = [sweep(careless(work), None)]
        for one in operations(work):
            if arguments.only in (None, one.name):
                swept.append(sweep(one, arguments.cases))
                print(f"{one.name}: {swept[-1].cases} faults, {swept[-1].lost} lost something", flush=True)
    arguments.out.write_text(json.dumps([asdict(one) for one in swept]))


if __name__ == "__main__":
    main()
