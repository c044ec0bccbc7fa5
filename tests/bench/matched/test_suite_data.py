"""The runs of a suite share one data set, fixed when it begins: a source that grows meanwhile changes none of them."""

import json

import pytest

from nanochat_cli.bench.matched.suite_data import load_suite_data, prepare_suite_data
from nanochat_cli.config.schema import Config
from nanochat_cli.data.manifest import read_manifest
from nanochat_cli.data.prepare import prepare_dataset
from nanochat_cli.errors import DataError
from nanochat_cli.report.reporter import QuietReporter
from tests.data.corpora import make_config, write_folder


def config(source: str) -> Config:
    return make_config(data={"source": source})


def test_a_run_is_trained_on_the_prepared_data_even_if_the_source_has_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_CACHE", str(tmp_path / "cache"))
    write_folder(tmp_path / "src", 20)
    suite = tmp_path / "suite"
    suite.mkdir()
    prepare_suite_data([config(str(tmp_path / "src"))] * 2, suite, QuietReporter())
    (tmp_path / "src" / "more.txt").write_text("some more text")
    run = config(str(tmp_path / "src"))
    load_suite_data(suite).fix(run)
    assert run.data.path is not None
    assert [run.data.path] == list((tmp_path / "cache" / "datasets").iterdir())
    manifest = read_manifest(run.data.path)
    assert manifest.train.documents + manifest.val.documents == 20
    other = make_config(data={"source": "stdlib"})
    load_suite_data(suite).fix(other)
    assert other.data.path is None


def test_a_data_set_that_was_prepared_again_ends_a_suite_with_one_line(tmp_path):
    write_folder(tmp_path / "src", 20)
    prepare_dataset(str(tmp_path / "src"), tmp_path / "data", make_config(), QuietReporter())
    suite = tmp_path / "suite"
    suite.mkdir()
    prepare_suite_data([make_config(data={"path": tmp_path / "data"})], suite, QuietReporter())
    load_suite_data(suite)
    (tmp_path / "src" / "more.txt").write_text("some more text " * 50)
    prepare_dataset(str(tmp_path / "src"), tmp_path / "data", make_config(), QuietReporter())
    with pytest.raises(DataError, match=r"data: no longer the data set with which the suite in .*suite began"):
        load_suite_data(suite)


def test_a_suite_from_before_such_records_is_resumed(tmp_path):
    found = config("stdlib")
    load_suite_data(tmp_path).fix(found)
    assert found.data.path is None


def test_a_suite_whose_record_lacks_newer_keys_goes_on_with_its_data(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_CACHE", str(tmp_path / "cache"))
    write_folder(tmp_path / "src", 12)
    prepare_suite_data([config(str(tmp_path / "src"))], tmp_path, QuietReporter())
    path = tmp_path / "data.json"
    (key, record), *_ = json.loads(path.read_text()).items()
    data, *rest = json.loads(key)
    older = {name: value for name, value in json.loads(data).items() if name != "dedup"}
    path.write_text(json.dumps({json.dumps([json.dumps(older), *rest]): record}))
    run = config(str(tmp_path / "src"))
    load_suite_data(tmp_path).fix(run)
    assert str(run.data.path) == record["folder"]
    other = make_config(data={"source": str(tmp_path / "src"), "val_fraction": 0.3})
    load_suite_data(tmp_path).fix(other)
    assert other.data.path is None
