"""Run by test_prepare_robustness: preparations that die, one per durable step, each in a forked child.

Arguments: corpus folder, output folder. Prints one JSON line per child: how it ended and what it left.
"""

import json
import os
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


def main(corpus: str, out: Path) -> None:
    step = 0
    while True:
        step += 1
        child = os.fork()
        if child == 0:
            die_at(step)
            prepare_dataset(corpus, out, make_config(), QuietReporter())
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(json.dumps({"step": step, "killed": os.WIFSIGNALED(status), "left": state(out)}), flush=True)
        if not os.WIFSIGNALED(status):
            return
        if step % 2:  # sometimes go on from what was left, sometimes from nothing
            for path in out.iterdir():
                path.unlink()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
