"""Data sets of the hub while it cannot be reached."""

import socket

import pytest

from nanochat_cli.data.corpus import open_corpus
from nanochat_cli.errors import DataError
from nanochat_cli.evaluation.problems import load_problems


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """No name can be resolved; every attempt is counted."""
    tried = []

    def refuse(host, *_, **__):
        tried.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return tried


def test_hub_problems_without_a_network_are_one_line_that_says_what_to_do(no_network, capfd):
    with pytest.raises(DataError) as caught:
        load_problems("humaneval")
    assert str(caught.value).startswith("humaneval: cannot load: no connection to hub.example")
    assert str(caught.value).endswith("give a file of its problems in place of the name (.jsonl, .jsonl.gz, .parquet)")
    assert caught.value.exit_code == 3
    assert no_network == ["hub.example"], "it tried again"
    assert "Retrying" not in capfd.readouterr().err


def test_a_corpus_of_the_hub_without_a_network_does_the_same(no_network):
    with pytest.raises(DataError, match=r"hf:some/corpus: cannot load: no connection to hub.example.*give a folder"):
        list(open_corpus("hf:some/corpus"))
    assert no_network == ["hub.example"]
