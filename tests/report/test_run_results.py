"""Sections of a run's results accumulate, and the report always shows all of them."""

import pytest

from nanochat_cli.errors import DataError
from nanochat_cli.report.run_results import add_results, read_results

TRAINED = {
    "config": {"model": {"dim": 64}},
    "parameters": {"total": 1000},
    "environment": {"python": "3.11"},
    "results": {"bits_per_byte": 1.2345},
}


def test_export_adds_to_what_training_wrote(tmp_path):
    add_results(tmp_path, **TRAINED)
    report = add_results(tmp_path, export={"arch": "qwen3"})
    assert report is not None
    text = report.read_text(encoding="utf-8")
    assert "1.2345" in text
    assert "qwen3" in text
    assert read_results(tmp_path).keys() == {*TRAINED, "export"}


def test_an_export_of_an_unfinished_run_is_remembered_without_a_report(tmp_path):
    assert add_results(tmp_path, export={"arch": "llama"}) is None
    report = add_results(tmp_path, **TRAINED)
    assert report is not None
    assert "llama" in report.read_text(encoding="utf-8")


def test_a_damaged_file_is_one_clear_error(tmp_path):
    (tmp_path / "results.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="damaged"):
        add_results(tmp_path, export={})


def test_a_misspelt_section_is_a_fault_of_the_caller(tmp_path):
    with pytest.raises(TypeError, match="exprot"):
        add_results(tmp_path, exprot={})
