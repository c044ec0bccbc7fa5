"""What every test process begins with, and what a run of the tests says at its end."""

import os
import signal
from collections import Counter
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes run tests: threads that spin while they wait would take each other's cores. Before torch.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Ignored where a shell or nohup started the tests in the background; tests and their children get them.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line for each reason why something was skipped: "passed" alone would hide that all of Rust was not run."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped)
    for reason, cases in reasons.most_common():
        terminalreporter.line(f"not run here: {cases} case{'s' * (cases > 1)}: {reason}", yellow=True)
