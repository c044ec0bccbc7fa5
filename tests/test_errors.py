"""A file that cannot be read or written is one line with the file and the reason, without an errno."""

import json
from pathlib import Path
from typing import Any, cast

import pytest

from nanochat_cli.bench.matched.suite_data import DATA_FILE, load_suite_data
from nanochat_cli.bench.matched.tuning import TUNING_FILE, load_tuned
from nanochat_cli.data.manifest import ShardInfo
from nanochat_cli.data.shards import Shard
from nanochat_cli.errors import DataError, reason
from nanochat_cli.evaluation.sample_file import SAMPLES, SETTINGS, SampleFile
from nanochat_cli.formats.run.dataset import RECORD_FILE, read_record
from nanochat_cli.training.score_file import ScoreBatches

NOTHING = cast(Any, None)
"""For what is not looked at before the file."""


def continue_evaluation(folder: Path) -> None:
    (folder / SAMPLES).write_text(json.dumps({"temperature": 0, "problem": "a"}) + "\n")
    SampleFile(folder, {}, resume=True)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        (SETTINGS, continue_evaluation),
        (RECORD_FILE, read_record),
        (DATA_FILE, load_suite_data),
        (TUNING_FILE, load_tuned),
        ("scores", lambda folder: ScoreBatches(folder / "scores", NOTHING, NOTHING)),
        ("shard", lambda folder: Shard(folder / "shard", ShardInfo.model_construct(size=1))),
    ],
)
def test_a_folder_where_a_file_belongs_is_named_with_the_reason(tmp_path, name, read):
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match="Is a directory") as raised:
        read(tmp_path)
    text = str(raised.value)
    assert text.count(str(tmp_path / name)) == 1
    assert "Errno" not in text


def test_scores_that_are_missing_are_named_with_the_reason(tmp_path):
    with pytest.raises(DataError) as raised:
        ScoreBatches(tmp_path / "scores", NOTHING, NOTHING)
    assert str(raised.value) == (
        f"collider.scores = {tmp_path / 'scores'}: not a file of nanochat score (No such file or directory)"
    )


def test_an_error_that_is_not_the_systems_is_its_own_reason():
    assert reason(ValueError("not a number")) == "not a number"
    assert reason(OSError("told by a library")) == "told by a library"
    assert reason(PermissionError(13, "Permission denied", "/a")) == "Permission denied"
