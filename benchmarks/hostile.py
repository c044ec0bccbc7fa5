"""How many hostile programs each isolation of this machine contains. Takes a minute.

    python benchmarks/hostile.py [--only namespaces] [--out benchmarks/results/hostile.json]

The programs, and what counts as contained, are in `hostile_programs.py`. Isolation without a file tree of its own is
tried only under Landlock and never as root: a fault would otherwise cost this machine its files. Root and a user
have different isolations, so run it as both.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.hostile_programs import breach, release
from nanochat_cli.report.result_file import Result, result_place, write_results
from nanochat_cli.sandbox import system_calls
from nanochat_cli.sandbox.limits import Limits
from nanochat_cli.sandbox.process import Command, Isolation, interpreter, run

SYSTEM_PYTHON = "/usr/bin/python3"


def isolations() -> Iterator[tuple[str, Isolation]]:
    """Name and isolation of every level that works here."""
    root = os.getuid() == 0
    levels = {"namespaces": Isolation("namespaces", root, "namespaces")}
    if not root:
        levels["bubblewrap"] = Isolation("bubblewrap", False, "bubblewrap")
    if system_calls.can_confine():
        levels["limits and Landlock"] = Isolation("limits", root, "limits")
    for name, level in levels.items():
        argv, visible = interpreter()
        ended, _, _ = run(Command([*argv, "-c", "pass"], Limits(), visible=visible), level)
        if ended.status == "ok" and ended.error is None:
            yield name, level
        else:
            print(f"{name}: does not work here: {ended.error or ended.status}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one isolation")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    sys.executable = SYSTEM_PYTHON  # other users may read it, and it has no packages
    results = []
    for name, level in isolations():
        if arguments.only not in (None, name):
            continue
        with tempfile.TemporaryDirectory(prefix="nanochat-hostile-") as folder:
            after = release(level, Path(folder), workers=2)
        breaches = {program: why for program, outcome in after.outcomes.items() if (why := breach(program, outcome))}
        if after.connections:
            breaches["python: connects"] = "it reached a server"
        for program, why in breaches.items():
            print(f"{name}: {program}: {why}")
        total = len(after.outcomes)
        results += [
            Result(name, "programs", total, "programs"),
            Result(name, "contained", total - len(breaches), "programs"),
        ]
        languages = sorted({program.partition(":")[0] for program in after.outcomes})
        print(f"{name}: {total - len(breaches)} of {total} contained ({', '.join(languages)})")
    print(f"wrote {write_results(result_place('hostile', arguments.out), 'hostile', results)}")


if __name__ == "__main__":
    main()
