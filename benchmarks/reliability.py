"""What faults of the disk and hostile bytes cost: counts, for docs/reliability.md.

    python benchmarks/reliability.py [--minutes 10]

Every file operation of six kinds of work fails once in every way (tests/faults), and every reader of foreign bytes is
fuzzed (tests/fuzz) for so many minutes of processor time in all, guided by coverage where atheris is installed. Both
check what they find themselves; a fault that lost something, or bytes that broke a reader, make the exit code 1. Needs
`pip install -e .[test]` and a C compiler.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from nanochat_cli.report.result_file import Result, result_place, write_results

ROOT = Path(__file__).resolve().parents[1]
ALL = "all"
"""The case of sums."""


def faults(cases: int | None) -> tuple[list[Result], int, dict[str, list[str]]]:
    """Counts by kind of work and in all; how many lost something, and what was wrong."""
    from tests.faults.sweep import run_sweep

    _, *swept = run_sweep(cases)  # the first is careless, to show that the sweep sees something
    results = []
    for name, several in ((ALL, swept), *((one.name, [one]) for one in swept)):
        case = f"injected faults, {name}"
        tried, lost = sum(one.cases for one in several), sum(one.lost for one in several)
        results += [
            Result(case, "file operations", sum(one.operations for one in several), "operations"),
            Result(case, "faults", tried, "faults"),
            Result(case, "faults survived", tried - lost, "faults"),
            Result(case, "faults that lost something", lost, "faults"),
        ]
    return results, sum(one.lost for one in swept), {one.name: one.problems for one in swept if one.problems}


def fuzzing(minutes: float) -> tuple[list[Result], int]:
    """Executions by reader and in all; how many inputs broke the contract."""
    from tests.fuzz.run import all_names, breaches, fuzz

    known = set(breaches())
    done = fuzz(minutes, all_names())
    found = [path for path in breaches() if path not in known]
    results = []
    for name, executions in ((ALL, sum(done.values())), *done.items()):
        broken = [path for path in found if name in (ALL, path.parent.name)]
        results += [
            Result(f"fuzzing, {name}", "executions", executions, "executions"),
            Result(f"fuzzing, {name}", "breaches", len(broken), "inputs"),
        ]
    return results, len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="of fuzzing")
    parser.add_argument("--quick", action="store_true", help="few faults and seconds of fuzzing")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))  # tests/ is no installed package
    minutes = 0.2 if arguments.quick else arguments.minutes
    swept, lost, problems = faults(3 if arguments.quick else None)
    fuzzed, broken = fuzzing(minutes)
    details: dict[str, Any] = {"problems": problems, "minutes": minutes}
    path = write_results(
        result_place("reliability", arguments.out, quick=arguments.quick), "reliability", [*swept, *fuzzed], **details
    )
    for result in [*swept, *fuzzed]:
        print(f"{result.case}: {result.value:,.0f} {result.metric}")
    print(f"wrote {path}")
    sys.exit(1 if lost or broken else 0)


if __name__ == "__main__":
    main()
