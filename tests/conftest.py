"""Set-up of every test process, and the summary at the end of a run."""

import gc
import os
import signal
import sys
from collections import Counter
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes run tests: threads that spin while they wait would take each other's cores. Before torch.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# A pool of compilers would import torch once more in each, for the few small graphs of a test. Before torch, too.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Every worker rewrites the assertions of all files, and every child compiles what it imports: once is enough.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Ignored where a shell or nohup started the tests in the background; tests and their children get them.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

LONGEST = (
    *("bench/matched/test_suite.py", "conformance/test_three_way_parity.py", "kernels/triton/test_interpreter.py"),
    *("diagnose/validate/test_planted_faults.py", "diagnose/validate/test_stages.py", "training/test_trainer.py"),
    *("e2e/test_kill_and_resume.py", "kernels/triton/test_ahead_of_time.py", "conformance/test_old_files.py"),
    *("training/test_architectures.py", "training/test_all_methods.py", "training/test_compilation.py"),
)
"""Files that take longest: begun last, one of them would keep a single process busy when all others have ended."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; the order within a file stays."""
    ranks = {f"tests/{name}": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.nodeid.partition("::")[0], len(ranks)))


def pytest_collection_finish() -> None:
    """Modules and tests live as long as the process: the garbage collector need not look at them again and again."""
    gc.freeze()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line for each reason to skip: "passed" alone would hide that, say, no Rust test ran."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped)
    for reason, cases in reasons.most_common():
        terminalreporter.line(f"not run here: {cases} case{'s' * (cases > 1)}: {reason}", yellow=True)
