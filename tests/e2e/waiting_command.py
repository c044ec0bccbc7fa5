"""The command line in a process that has imported everything and waits for a line on standard input before it runs.

Several of them told at once begin together, whatever importing took. Prints `ready` when it waits.
"""

import sys

import nanochat_cli.export.verify
import nanochat_cli.training.summary
import nanochat_cli.training.trainer  # noqa: F401 - imported before the start
from nanochat_cli.cli.app import main

if __name__ == "__main__":
    print("ready", flush=True)
    sys.stdin.readline()
    sys.exit(main(sys.argv[1:]))
