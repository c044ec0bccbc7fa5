"""TensorBoard beside a run: started with it, ended with it."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nanochat_cli.report.metrics_log import TENSORBOARD_FOLDER
from nanochat_cli.report.reporter import Reporter

SERVER = """
import sys
from nanochat_cli.end_with_parent import end_with_parent
end_with_parent(int(sys.argv.pop(1)))
from tensorboard.main import run_main
run_main()
"""


@contextmanager
def tensorboard(run_dir: Path, reporter: Reporter) -> Iterator[str]:
    """Serve what the run writes for TensorBoard, on this machine alone; says and yields the address.

    The server is a process of its own, which ends with the block or with this process. Its own messages go to
    `run_dir/tensorboard.log`.
    """
    port = free_port()
    folder = run_dir / TENSORBOARD_FOLDER
    command = [sys.executable, "-c", SERVER, str(os.getpid()), "--logdir", str(folder), "--port", str(port)]
    with (run_dir / "tensorboard.log").open("wb") as log:
        # A session of its own: Ctrl-C ends the training in order, and that ends the server.
        server = subprocess.Popen([*command, "--host", "localhost"], stdout=log, stderr=log, start_new_session=True)
    address = f"http://localhost:{port}/"
    reporter.info(f"TensorBoard: {address} while the run lasts")
    try:
        yield address
    finally:
        server.terminate()
        server.wait()


def free_port() -> int:
    """One that nobody uses: not TensorBoard's own, which another run may be about to take."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]
