"""`python -m nanochat_cli`: the same as the command `nanochat`."""

from nanochat_cli.cli.app import main

if __name__ == "__main__":
    raise SystemExit(main())
