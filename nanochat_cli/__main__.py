"""The command `nanochat`, and `python -m nanochat_cli`: Ctrl-C gives no traceback even while the program loads."""

import os
import signal
import sys
import threading
from types import FrameType


def main() -> int:
    """Run this process's command line; returns its exit code. SIGTERM ends a command as Ctrl-C does."""
    try:
        _end_as_interrupted(os.getpid())
        from nanochat_cli.cli.app import main as run

        code = run()
        if "RANK" in os.environ:  # a launcher ends the other ranks, which are about to end
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if code == 130 and threading.active_count() > 1:
            # A thread inside a library cannot be stopped, and one that returns to an ending interpreter aborts it.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return code
    except KeyboardInterrupt:
        if "RANK" not in os.environ:  # of several ranks the one that failed has said why
            print("error: interrupted", file=sys.stderr)
        return 130


def _end_as_interrupted(pid: int) -> None:
    """Let SIGTERM raise KeyboardInterrupt in this process, so that it cleans up; its children just end."""

    def receive(number: int, frame: FrameType | None) -> None:
        if os.getpid() != pid:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if "RANK" in os.environ and sys.exc_info()[1] is not None:
            return  # this rank is ending with an error of its own, or of one that it has lost, and is to say it
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, receive)


if __name__ == "__main__":
    raise SystemExit(main())
