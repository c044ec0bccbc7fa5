"""The report of a suite comes back as it was written."""

import json

import pytest

from nanochat_cli.bench.matched.records import Suite, read_suite, write_suite
from nanochat_cli.errors import DataError
from nanochat_cli.report.result_file import Claim, Result
from tests.bench.matched.suites import record, suite


def test_what_is_written_is_read(tmp_path):
    runs = [record("baseline", bits=(3.0, 2.5), measures={"loss": 1.5}), record("full", status="diverged")]
    result = Result("full", "loss", 1.0, "nats/token", "baseline", 1.5, [1.0], (1.0, 1.0))
    claim = Claim("id", "s", "source", "at least 1", "1.5 ×", "supported", (1.4, 1.6), 3, 1.0, None, "×")
    written = Suite("e3", {"cores": 2}, {"baseline": "baseline"}, [result], [claim], runs)
    path = write_suite(tmp_path, written)
    assert read_suite(path) == read_suite(tmp_path) == written


def test_configurations_are_in_the_order_of_their_runs_and_the_baseline_first():
    found = suite([record("full"), record("baseline"), record("full", 1), record("baseline", 1)])
    assert found.configs == ["baseline", "full"]
    assert [run.seed for run in found.of("full")] == [0, 1]


@pytest.mark.parametrize("change", [{"status": "fine"}, {"measures": {"speed": 1.0}}])
def test_a_status_or_a_measure_that_does_not_exist_is_an_error(change):
    with pytest.raises(ValueError, match=r"fine|speed"):
        record("full", **change)


@pytest.mark.parametrize("text", ["", "[]", json.dumps({"suite": "e3"})])
def test_a_file_of_another_form_is_an_error_that_names_it(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(DataError, match=r"report\.json: not the report of a suite"):
        read_suite(tmp_path)
    with pytest.raises(DataError, match="cannot read"):
        read_suite(tmp_path / "nothing.json")
