"""`benchmarks/gpu.py` without CUDA: sections, time and failures with stand-ins, and everything in small."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_sections.run import MODULES
from benchmarks.gpu_sections.task import TREE, Task, digest, traced
from nanochat_cli.errors import ConfigError
from nanochat_cli.report.result_file import Result

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"


class Machine:
    """A clock that only sections move, and sections that write what a process would."""

    def __init__(self, out: Path, takes: dict[str, float], fails: frozenset[str] = frozenset()) -> None:
        self.now, self.out, self.takes, self.fails = 0.0, out, takes, fails
        self.started: dict[str, tuple[float, float]] = {}

    def clock(self) -> float:
        return self.now

    def start(self, section: gpu.Section, until: float, limit: float) -> str | None:
        self.started[section.name] = until, limit
        self.now += self.takes[section.name]
        document: dict[str, Any] = {"results": [{"value": 1}]}
        if section.name in self.fails:
            document["unfinished"] = True
        (self.out / f"{section.name}.json").write_text(json.dumps(document))
        return "it broke" if section.name in self.fails else None

    def run(self, sections: list[gpu.Section], deadline: float) -> dict[str, str]:
        return gpu.run_all(sections, self.out, self.now + deadline, self.start, self.clock)

    def file(self, name: str) -> dict[str, Any]:
        return json.loads((self.out / f"{name}.json").read_text())


A, B, C = (gpu.Section(name, share, 10) for name, share in (("a", 50), ("b", 30), ("c", 20)))


def test_a_section_gets_its_share_of_what_is_left_and_leaves_the_rest_to_later_ones(tmp_path):
    machine = Machine(tmp_path, {"a": 10, "b": 36, "c": 5})
    assert machine.run([A, B, C], 100) == {}
    assert machine.started["a"] == (45, 65)  # 50 of 100 s: until 90 %, and at most 120 % and 5 s
    assert machine.started["b"] == pytest.approx((10 + 0.9 * 54, 10 + 1.2 * 54 + 5))  # 30 of the 50 parts of 90 s
    assert machine.started["c"] == pytest.approx((46 + 0.9 * 54, 100))  # the rest, and never past the deadline


def test_a_section_without_time_is_skipped_with_the_reason_and_the_next_still_runs(tmp_path):
    machine = Machine(tmp_path, {"a": 70, "c": 1})
    machine.run([A, gpu.Section("b", 30, 25), C], 100)
    assert list(machine.started) == ["a", "c"]
    assert machine.file("b") == {"skipped": "it needs 25 s, and its share of 30 s is 18 s"}


def test_nothing_starts_after_the_deadline(tmp_path):
    machine = Machine(tmp_path, {"a": 200})
    machine.run([A, B, C], 100)
    assert list(machine.started) == ["a"]


def test_a_section_that_fails_keeps_what_it_measured_and_does_not_stop_the_others(tmp_path):
    machine = Machine(tmp_path, {"a": 1, "b": 1, "c": 1}, frozenset("b"))
    assert machine.run([A, B, C], 100) == {"b": "it broke"}
    assert list(machine.started) == ["a", "b", "c"]
    assert machine.file("b") == {"results": [{"value": 1}], "unfinished": True, "failed": "it broke"}


def test_a_second_run_does_only_what_failed_was_skipped_or_was_cut_off(tmp_path):
    first = Machine(tmp_path, {"a": 1, "b": 1}, frozenset("b"))
    first.run([A, B, gpu.Section("c", 20, 1000)], 100)
    again = Machine(tmp_path, {"b": 1, "c": 1})
    assert again.run([A, B, C], 100) == {}
    assert list(again.started) == ["b", "c"]
    assert "failed" not in again.file("b")
    assert "skipped" not in again.file("c")
    last = Machine(tmp_path, {})
    assert last.run([A, B, C], 100) == {}
    assert last.started == {}


FAKE = """
import json, sys, time, pathlib
name, out = sys.argv[1], pathlib.Path(sys.argv[2])
(out / f"{name}.json").write_text(json.dumps({"results": [], "unfinished": True}))
print("begins", flush=True)
if name == "hangs":
    import subprocess
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(child.pid, flush=True)
    time.sleep(600)
if name == "dies":
    sys.exit("error: the device is gone")
(out / f"{name}.json").write_text(json.dumps({"results": []}))
"""


def ended(pid: int) -> bool:
    """Within five seconds, which the kernel may take."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_a_process_that_hangs_is_ended_with_its_children_and_one_that_dies_is_quoted(tmp_path, monkeypatch, capfd):
    fake = tmp_path / "benchmarks" / "gpu_sections"
    fake.mkdir(parents=True)
    (fake / "run.py").write_text(FAKE)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    process = gpu.Process(tmp_path, [], {**os.environ, "PYTHONPATH": str(tmp_path)})

    def start(section: gpu.Section, until: float, limit: float) -> str | None:
        soon = time.monotonic() + (1.0 if section.name == "hangs" else 60.0)
        return process.start(section, until, soon)

    sections = [gpu.Section(name, 1, 0) for name in ("hangs", "dies", "works")]
    failures = gpu.run_all(sections, tmp_path, time.monotonic() + 100, start)
    child = int(failures["hangs"].removeprefix("stopped when its time was over, at: "))
    assert failures["dies"] == "error: the device is gone (exit code 1)"
    assert "works" not in failures
    assert gpu.read(tmp_path / "hangs.json")["failed"] == failures["hangs"]
    assert ended(child)
    assert capfd.readouterr().out.count("begins") == 3


def test_the_sections_are_those_of_the_documentation_and_each_has_a_file():
    assert gpu.__doc__ is not None
    assert [section.name for section in gpu.SECTIONS] == list(MODULES)
    for name, module in MODULES.items():
        assert f"\n    {name} " in gpu.__doc__
        assert callable(importlib.import_module(f"benchmarks.gpu_sections.{module}").run)


def test_without_cuda_every_section_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--out", tmp_path, "--only", "forms"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "torch finds no CUDA device here" in json.loads((tmp_path / "forms.json").read_text())["failed"]


# --- a section's task -------------------------------------------------------------------------------------------------


def task(folder: Path) -> Task:
    return Task("forms", folder / "forms.json", torch.device("cpu"), time.monotonic() + 60, folder, quick=True)


def test_a_part_that_fails_is_named_and_the_section_ends_as_failed(tmp_path, capsys):
    one = task(tmp_path)
    with one.attempt("first"):
        one.add([Result("a", "m", 1.0, "s")])
    with one.attempt("second"):
        raise MemoryError("full\nand more")
    with one.attempt("third"):
        raise ConfigError("this device has no fp8")
    with one.attempt("fourth"):
        one.add([Result("b", "m", 2.0, "s")])
    assert gpu.finished(one.file) is False
    assert one.finish() == 1
    found = json.loads(one.file.read_text())
    assert [result["case"] for result in found["results"]] == ["a", "b"]
    assert found["failed"] == "second: MemoryError: full"
    assert found["left_out"] == ["third: this device has no fp8"]
    assert found.keys() >= {"suite", "environment", "results", "claims", "quick"}


def test_a_section_is_finished_only_after_its_last_word(tmp_path):
    one = task(tmp_path)
    one.add([Result("a", "m", 1.0, "s")])
    assert not gpu.finished(one.file)
    assert one.finish() == 0
    assert gpu.finished(one.file)


def test_a_copy_names_the_commit_that_it_was_copied_from_and_whether_it_has_changed(tmp_path):
    """Also one with a git of its own, unless its files are those of no commit."""
    files = ["benchmarks/gpu.py", "pyproject.toml"]
    recorded = {"commit": "abc", "dirty": False, "files": files, "digest": digest(ROOT, files)}
    (tmp_path / TREE).write_text(json.dumps(recorded))
    assert traced({"git": None}, tmp_path) == {"git": {"commit": "abc", "dirty": False}}
    assert traced({"git": {"commit": "own", "dirty": True}}, tmp_path) == {"git": {"commit": "abc", "dirty": False}}
    (tmp_path / TREE).write_text(json.dumps({**recorded, "dirty": True}))
    assert traced({"git": None}, tmp_path) == {"git": {"commit": "abc", "dirty": True}}
    assert traced({"git": {"commit": "own", "dirty": False}}, tmp_path)["git"]["commit"] == "own"
    (tmp_path / TREE).write_text(json.dumps({**recorded, "digest": "of other files"}))
    assert traced({"git": None}, tmp_path) == {"git": {"commit": "abc", "dirty": True}}
    assert traced({"git": {"commit": "own", "dirty": False}}, tmp_path)["git"]["commit"] == "own"


# --- everything, in small ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_section_runs_on_the_cpu_and_leaves_a_finished_file(tmp_path):
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--quick", "--out", str(tmp_path), "--deadline", "1100"]
    done = subprocess.run([*command, "--carried", str(tmp_path / "nothing")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for section in gpu.SECTIONS:
        assert gpu.finished(tmp_path / f"{section.name}.json"), section.name
        assert gpu.read(tmp_path / f"{section.name}.json")["results"], section.name
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0
    assert again.stdout.count("finished before") == len(gpu.SECTIONS)
