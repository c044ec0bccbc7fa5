"""Without the extra [serve] these tests are left out, and the end of a run says so."""

from importlib.util import find_spec
from typing import Any

MISSING = [name for name in ("fastapi", "uvicorn", "prometheus_client", "httpx") if find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if MISSING else []


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if MISSING:
        terminalreporter.line(f"not run here: tests/serve: {', '.join(MISSING)} not installed", yellow=True)
