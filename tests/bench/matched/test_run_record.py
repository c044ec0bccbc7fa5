"""The report of a suite has all of it."""

import pytest

from nanochat_cli.bench.matched.run_record import Suite, write_suite
from nanochat_cli.report.result_file import Claim, Result
from tests.bench.matched.suites import read_suite, record, suite


def test_nothing_is_lost_in_the_file(tmp_path):
    runs = [record("baseline", bits=(3.0, 2.5), measures={"loss": 1.5}), record("full", status="diverged")]
    result = Result("full", "loss", 1.0, "nats/token", "baseline", 1.5, [1.0], (1.0, 1.0))
    claim = Claim("id", "s", "source", "at least 1", "1.5 ×", "supported", (1.4, 1.6), 3, 1.0, None, "×")
    written = Suite("e3", {"cores": 2}, {"baseline": "baseline"}, [result], [claim], runs)
    assert write_suite(tmp_path, written) == tmp_path / "report.json"
    assert read_suite(tmp_path) == written


def test_configurations_are_in_the_order_of_their_runs_and_the_baseline_first():
    found = suite([record("full"), record("baseline"), record("full", 1), record("baseline", 1)])
    assert found.configs == ["baseline", "full"]
    assert [run.seed for run in found.of("full")] == [0, 1]


@pytest.mark.parametrize("change", [{"status": "fine"}, {"measures": {"speed": 1.0}}])
def test_a_status_or_a_measure_that_does_not_exist_is_an_error(change):
    with pytest.raises(ValueError, match=r"fine|speed"):
        record("full", **change)
