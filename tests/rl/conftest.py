"""The run from which the tests of GRPO start."""

from pathlib import Path

import pytest

from tests.rl.tiny_run import make_run


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run, only to be read."""
    return make_run(tmp_path_factory.mktemp("source"))
