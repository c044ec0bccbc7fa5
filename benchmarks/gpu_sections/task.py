"""What a section of `benchmarks/gpu.py` is given: a device, its time, and a file for what it finds."""

import hashlib
import json
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from nanochat_cli.atomic_write import write_atomically
from nanochat_cli.errors import ConfigError
from nanochat_cli.report.environment import environment
from nanochat_cli.report.result_file import Claim, Result
from nanochat_kernels.linear_products import fp8_product

ROOT = Path(__file__).resolve().parents[2]
TREE = "tree.json"
"""In the carried folder: the commit of the checkout that was copied, and a digest of its files."""
REPEATS = 10
NO_FP8 = "this device, with this torch, has no fp8 with a scale per row"
NO_NVFP4 = "this device is no Blackwell GPU (compute capability 10 or 12)"


@dataclass
class Task:
    """until: when the section should end, on the monotonic clock; carried: the folder of `gpu_carry`."""

    section: str
    file: Path
    device: torch.device
    until: float
    carried: Path
    quick: bool = False
    results: list[Result] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @cached_property
    def environment(self) -> dict[str, Any]:
        return traced(environment(), self.carried)

    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @cached_property
    def has_fp8(self) -> bool:
        """Products of float8 with a scale per row: GPUs of capability 8.9 and later, and CPUs from torch 2.13 on."""
        if self.cuda:
            return torch.cuda.get_device_capability(self.device) >= (8, 9)
        try:
            fp8_product(torch.ones(16, 16), torch.ones(16, 16))
        except RuntimeError:
            return False
        return True

    def add(self, results: Sequence[Result] = (), claims: Sequence[Claim] = ()) -> None:
        """Keep results, show them, and write the file."""
        for result in results:
            than = "" if result.ratio is None else f", {result.ratio:.3g} × {result.peer}"
            print(f"{result.case}: {result.metric} {result.value:.4g} {result.unit}{than}")
        self.results += results
        self.claims += claims
        self.write(unfinished=True)

    def leave_out(self, what: str, why: str) -> None:
        print(f"left out: {what}: {why}")
        self.left_out.append(f"{what}: {why}")

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """A part whose failure must not end the section: a GPU is borrowed, and the other parts must still run.

        ConfigError, for what this device lacks, is no failure.
        """
        try:
            yield
        except ConfigError as reason:
            self.leave_out(what, str(reason))  # this device lacks something
        except Exception as error:  # noqa: BLE001 - recorded, printed, and the section ends as failed
            traceback.print_exc()
            lines = str(error).splitlines() or [""]
            self.faults.append(f"{what}: {type(error).__name__}: {lines[0]}")

    def finish(self) -> int:
        """Write the file for the last time; the exit code, 1 if a part has failed."""
        self.write(unfinished=False)
        if self.faults:
            print("; ".join(self.faults))
        return 1 if self.faults else 0

    def write(self, *, unfinished: bool) -> None:
        document = {
            "suite": f"gpu-{self.section}",
            "environment": self.environment,
            "results": [asdict(result) for result in self.results],
            "claims": [asdict(claim) for claim in self.claims],
            **self.details,
            **({"left_out": self.left_out} if self.left_out else {}),
            **({"quick": True} if self.quick else {}),
            **({"failed": "; ".join(self.faults)} if self.faults else {}),
            **({"unfinished": True} if unfinished else {}),
        }
        write_atomically(self.file, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())

    def seconds(self, function: Callable[[], object], repeats: int = REPEATS) -> list[float]:
        """Of each of a few calls after two that warm up, by the device's own clock where it has one."""
        repeats = 2 if self.quick else repeats
        for _ in range(2):
            function()
        if not self.cuda:
            return [_wall(function) for _ in range(repeats)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for event in events[1:]:
            function()
            event.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) / 1000 for start, end in pairwise(events)]


def _wall(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def traced(measured_in: dict[str, Any], carried: Path) -> dict[str, Any]:
    """The environment; in a copy, with the commit that it was copied from, and whether it has changed.

    A copy may have a git of its own, whose commit is another one: files that are exactly those of a commit name it.
    """
    recorded = carried / TREE
    if recorded.is_file():
        tree = json.loads(recorded.read_text(encoding="utf-8"))
        dirty = tree["dirty"] or digest(ROOT, tree["files"]) != tree["digest"]
        if measured_in["git"] is None or not dirty:
            measured_in["git"] = {"commit": tree["commit"], "dirty": dirty}
    return measured_in


def digest(root: Path, files: Sequence[str]) -> str:
    """SHA-256 over names and contents; a missing file counts as empty."""
    total = hashlib.sha256()
    for name in files:
        path = root / name
        content = path.read_bytes() if path.is_file() else b""
        total.update(f"{name}\0{hashlib.sha256(content).hexdigest()}\n".encode())
    return total.hexdigest()
