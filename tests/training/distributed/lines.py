"""Several command lines one after the other in this process, one rank of a group: `python -m …lines FILE [PORT…]`.

FILE: JSON, a list of argument lists. A group takes seconds to start, which many runs then share. A line that begins
with "alone" is run by rank 0 as if nobody had launched it. PORT: nobody has; this process becomes two ranks, which
talk there, at a port of its own for each line, after it has imported for both what takes longest.
"""

import importlib
import json
import os
import sys
from pathlib import Path
from unittest import mock

from nanochat_cli.cli.app import main
from nanochat_cli.training.distributed.ranks import LAUNCHED, rank

HEAVY = (
    *("nanochat_cli.training.trainer", "nanochat_cli.training.summary", "nanochat_cli.data.prepare"),
    "nanochat_cli.training.distributed.sharded",
)


def run(line: list[str]) -> int:
    if line[0] != "alone":
        return main(line)
    if rank():
        return 0
    with mock.patch.dict(os.environ):
        for name in LAUNCHED:
            os.environ.pop(name, None)
        return main(line[1:])


def run_all(file: str, *ports: str) -> int:
    """The exit code of the first line that fails, else 0."""
    left = list(ports)
    for line in json.loads(Path(file).read_text()):
        if left and line[0] != "alone":
            os.environ["MASTER_PORT"] = left.pop(0)
        if code := run(line):
            return code
    return 0


def run_as_two(file: str, *ports: str) -> int:
    """`run_all` in this process, rank 0, and in a copy of it. Nothing has computed yet, so that it can be copied."""
    for name in HEAVY:
        importlib.import_module(name)
    copy = os.fork()
    own = "0" if copy else "1"
    os.environ |= dict(zip(LAUNCHED, (own, "2", own, "localhost", ports[0]), strict=True))
    code = run_all(file, *ports)
    return code or (os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1]) if copy else 0)


if __name__ == "__main__":
    raise SystemExit(run_as_two(*sys.argv[1:]) if len(sys.argv) > 2 else run_all(sys.argv[1]))
