"""TensorBoard beside a run: it answers while the block lasts, and is gone after it."""

import json
import time
import urllib.error
import urllib.request

import pytest

from nanochat_cli.report.metrics_log import MetricsLog
from nanochat_cli.report.reporter import QuietReporter
from nanochat_cli.report.tensorboard_server import tensorboard


def answer(address: str, path: str, seconds: float) -> bytes | None:
    """What the server says, once it does; None if it does not within the time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            with urllib.request.urlopen(address + path, timeout=5) as found:
                return found.read()
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    return None


@pytest.mark.slow
def test_it_serves_the_run_and_ends_with_it(tmp_path):
    with MetricsLog(tmp_path, tensorboard=True) as log:
        log.log(1, {"loss/main": 2.5})
    with tensorboard(tmp_path, QuietReporter()) as address, tensorboard(tmp_path, QuietReporter()) as other:
        assert address != other
        assert answer(address, "data/environment", 60) is not None
        found = answer(address, "data/plugin/scalars/tags", 10)
        until = time.monotonic() + 30
        while found is not None and json.loads(found) == {} and time.monotonic() < until:
            time.sleep(0.5)
            found = answer(address, "data/plugin/scalars/tags", 10)
        assert "loss/main" in json.loads(found or b"{}")["."]
    assert answer(address, "", 0.5) is None
