"""Run by test_prepare_robustness: preparations that die, one per durable step, each in a forked child.

Arguments: corpus folder, output folder and, to replace what that already is each time, a data set to begin with.
Prints one JSON line per child: how it ended, what it left, and what a preparation that fails at once makes of that.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanochat_cli.data.prepare import prepare_dataset
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.errors import DataError
from nanochat_cli.report.reporter import QuietReporter
from tests.data.corpora import make_config


def die_at(step: int) -> None:
    """SIGKILL this process at its `step`-th fsync or rename, before or after doing it."""
    done = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal done
            done += 1
            if done == step:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*arguments)
            done += 1
            if done == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    os.fsync = counted(os.fsync)
    Path.rename = counted(Path.rename)


def state(out: Path) -> str:
    try:
        reader = ShardReader(out, verify="full")
        return f"{len(list(reader.documents('train')))}+{len(list(reader.documents('val')))} documents"
    except DataError as error:
        return "no manifest" if "no manifest.json" in str(error) else f"believed but broken: {error}"


def failing_preparation(out: Path) -> str:
    """What remains after preparing a source without usable documents."""
    (out.parent / "useless").mkdir(exist_ok=True)
    (out.parent / "useless" / "empty.txt").touch()
    try:
        prepare_dataset(str(out.parent / "useless"), out, make_config(), QuietReporter())
    except DataError:
        return state(out)
    return "prepared"


def main(corpus: str, out: Path, begin_with: Path | None) -> None:
    step = 0
    while True:
        step += 1
        if begin_with is not None:
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(begin_with, out)
        child = os.fork()
        if child == 0:
            die_at(step)
            prepare_dataset(corpus, out, make_config(), QuietReporter())
            os._exit(0)
        _, status = os.waitpid(child, 0)
        ended = {"step": step, "killed": os.WIFSIGNALED(status), "left": state(out)}
        if begin_with is not None:
            ended["then"] = failing_preparation(out)
        print(json.dumps(ended), flush=True)
        if not os.WIFSIGNALED(status):
            return
        if step % 2:  # sometimes continue from what was left, sometimes from nothing
            shutil.rmtree(out)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None)
