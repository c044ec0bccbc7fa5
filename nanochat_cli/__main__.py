"""The command `nanochat`, and `python -m nanochat_cli`: Ctrl-C while the program is loaded is no traceback."""

import sys


def main() -> int:
    """Run the command line of this process; returns its exit code."""
    try:
        from nanochat_cli.cli.app import main as run

        return run()
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
