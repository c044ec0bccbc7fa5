"""A run of 200 steps with ten `kill -9`, resumed each time, against the same run undisturbed, bit for bit.

    python benchmarks/resume.py

Runs the test that checks this, which writes the result. Needs pytest (`pip install -e .[test]`).
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from nanochat_cli.report.result_file import result_place

ROOT = Path(__file__).resolve().parent.parent
TEST = "tests/e2e/test_kill_and_resume.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two kills: only checks that it works, and writes nothing")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    kills = 2 if arguments.quick else 10
    name = f"test_a_run_killed_at_random_moments_equals_the_uninterrupted_one_bit_for_bit[{kills}]"
    result = result_place("resume", arguments.out).resolve()
    command = [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", f"{TEST}::{name}"]
    # One thread, so that sums have one order.
    environment = {**os.environ, "NANOCHAT_RESULT_FILE": str(result), "OMP_NUM_THREADS": "1"}
    sys.exit(subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
