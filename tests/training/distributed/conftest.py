"""A working folder with a corpus and a cache of its own; processes that a test began there end with it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.tiny import write_corpus
from tests.training.distributed.ranks import started


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    write_corpus(tmp_path / "corpus")
    monkeypatch.setenv("NANOCHAT_CACHE", str(tmp_path / "cache"))
    yield tmp_path
    for process in started:
        process.terminate()  # of a test that failed
    started.clear()
