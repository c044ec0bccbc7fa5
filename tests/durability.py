"""What is written to the disk, and when: every fsync and every rename of a test, in order.

`kill -9` cannot tell whether something was synced, since the kernel has it; only a power cut could. So the order of the
calls is what is asserted: a file is synced before it gets its name, and the folder with the name after.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

Identity = tuple[int, int]
"""(device, inode): the same file or folder under another name."""


@dataclass
class DiskCalls:
    """synced: in order, with the number of the call. renames: number, new place, its folder, what was renamed."""

    synced: list[tuple[int, Identity]] = field(default_factory=list)
    renames: list[tuple[int, Path, Identity, dict[Path, Identity]]] = field(default_factory=list)
    count: int = 0

    def require_durable(self) -> None:
        """Everything that was renamed had been synced before, and the folder of its new place was synced afterwards."""
        assert self.renames
        for number, place, folder, renamed in self.renames:
            for path, identity in renamed.items():
                before = [at for at, found in self.synced if found == identity and at < number]
                assert before, f"{path} was renamed to {place} before it was on the disk"
            assert any(at > number and found == folder for at, found in self.synced), f"the name {place} was not synced"


def _identity(path: Path | int) -> Identity:
    status = os.fstat(path) if isinstance(path, int) else path.stat()
    return status.st_dev, status.st_ino


def record_disk_calls(monkeypatch: pytest.MonkeyPatch) -> DiskCalls:
    """Records until the test ends. A rename to a hidden name does not count."""
    calls = DiskCalls()
    fsync = os.fsync

    def sync(descriptor: int) -> None:
        fsync(descriptor)
        calls.count += 1
        calls.synced.append((calls.count, _identity(descriptor)))

    def moving(name: str) -> Any:
        original = getattr(Path, name)

        def move(path: Path, target: Path) -> Path:
            calls.count += 1
            if not Path(target).name.startswith("."):
                inside = [path, *path.iterdir()] if path.is_dir() else [path]
                renamed = {one: _identity(one) for one in inside}
                calls.renames.append((calls.count, Path(target), _identity(Path(target).parent), renamed))
            return original(path, target)

        return move

    monkeypatch.setattr(os, "fsync", sync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, moving(name))
    return calls
