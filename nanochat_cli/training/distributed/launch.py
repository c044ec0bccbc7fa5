"""`nanochat train --nproc N`: N ranks on this machine, started and watched by torch's elastic launcher.

The program that `become_launcher` turns this process into. It adds to torchrun what a person expects of a command: an
error is the one line that the failing rank has printed, and the exit code is that rank's.
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from nanochat_cli.errors import DataError


def become_launcher(ranks: int, arguments: Sequence[str]) -> NoReturn:
    """Run `nanochat ARGUMENTS` as so many ranks, in place of this process, which signals therefore still reach."""
    os.execv(sys.executable, [sys.executable, "-m", __name__, str(ranks), *arguments])


def main(ranks: str, *arguments: str) -> int:
    """The exit code of the rank that failed first, else 0."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // int(ranks))))
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable()
    line = run.parse_args(["--standalone", "--nproc-per-node", ranks, "-m", "nanochat_cli"])
    line.training_script_args = list(arguments)  # parsed, --nproc would be ambiguous
    try:
        run.run(line)
    except SignalException:
        return 130
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        if len(error.failures) == int(ranks) and all(
            f.exitcode < 0 for f in error.failures.values()
        ):  # none can say it
            print(f"error: rank {number} was killed by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
        return DataError.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
