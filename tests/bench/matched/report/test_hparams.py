"""TensorBoard reads back what differs between runs and how each ended."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import api_pb2, metadata

from nanochat_cli.bench.matched.report.configs import differences_table, read_settings
from nanochat_cli.bench.matched.report.hparams import write_hparams
from nanochat_cli.config.load import config_to_toml, resolve_config
from tests.bench.matched.report.suites import as_files, every_status, record, suite

SET = {"baseline": ["optim.lr=0.02"], "other": ["optim.lr=0.01", "mtp.enabled=true", "model.quant.scale=128"]}


def with_configs(folder: Path) -> Any:
    """Two configurations with two seeds each; the last run has no folder."""
    runs = []
    for seed in (1, 2):
        for config, overrides in SET.items():
            run = folder / f"{config}-{seed}"
            runs.append(record(config, seed, run=str(run)))
            if (config, seed) != ("other", 2):
                run.mkdir()
                own = [*overrides, f"run.name={run.name}", f"run.seed={seed}"]
                (run / "config.toml").write_text(config_to_toml(resolve_config(["quickstart"], None, own)))
    return suite(runs)


def sessions(folder: Path) -> dict[str, tuple[dict[str, Any], dict[str, float], int]]:
    """Folder of a run -> hyper-parameters, final metrics and status, as TensorBoard reads them."""
    found = {}
    for place in sorted((folder / "hparams").iterdir()):
        events = EventAccumulator(str(place)).Reload()
        content = events.SummaryMetadata
        start = metadata.parse_session_start_info_plugin_data(
            content(metadata.SESSION_START_INFO_TAG).plugin_data.content
        )
        end = metadata.parse_session_end_info_plugin_data(content(metadata.SESSION_END_INFO_TAG).plugin_data.content)
        values = {key: getattr(value, str(value.WhichOneof("kind"))) for key, value in start.hparams.items()}
        scalars = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
        found[place.name] = values, scalars, end.status
    return found


def test_differing_keys_and_final_measures_are_read_back(tmp_path: Path) -> None:
    made = with_configs(tmp_path)
    write_hparams(tmp_path, made, read_settings(made, tmp_path))
    found = sessions(tmp_path)
    assert sorted(found) == ["baseline-seed-1", "baseline-seed-2", "other-seed-1", "other-seed-2"]
    values, scalars, status = found["other-seed-1"]
    assert values == {
        "config": "other",
        "seed": 1,
        "optim.lr": 0.01,
        "mtp.enabled": True,
        "model.quant.scale": 128,
    }
    assert found["baseline-seed-2"][0]["model.quant.scale"] == "row"
    assert found["other-seed-2"][0] == {"config": "other", "seed": 2}
    (run,) = [run for run in made.runs if (run.config, run.seed) == ("other", 1)]
    expected = {name: value for name, value in run.measures.items() if value is not None}
    assert scalars == pytest.approx(expected, rel=1e-6)  # TensorBoard stores float32
    assert status == api_pb2.STATUS_SUCCESS  # pyright: ignore[reportAttributeAccessIssue]


def test_a_run_that_did_not_finish_is_a_failure_and_odd_names_are_folders(tmp_path: Path) -> None:
    write_hparams(tmp_path, every_status(), {})
    found = sessions(tmp_path)
    assert len(found) == 5
    success = api_pb2.STATUS_SUCCESS  # pyright: ignore[reportAttributeAccessIssue]
    assert [name for name, (_, _, status) in found.items() if status == success] == ["baseline-seed-1"]
    assert found["silent-seed-1"][1] == {}


def test_writing_again_replaces_what_was_written(tmp_path: Path) -> None:
    made = with_configs(tmp_path)
    for _ in range(2):
        write_hparams(tmp_path, made, read_settings(made, tmp_path))
    assert len([name for name in as_files(tmp_path) if "tfevents" in name]) == 4


def test_the_table_of_differences_has_a_column_per_configuration(tmp_path: Path) -> None:
    made = with_configs(tmp_path)
    table = differences_table(made, read_settings(made, tmp_path))
    assert table.columns == ["key", "baseline", "other"]
    assert table.rows == [
        ["model.quant.scale", "row", "128"],
        ["optim.lr", "0.02", "0.01"],
        ["mtp.enabled", "false", "true"],
    ]


def test_seeds_of_a_configuration_that_differ_show_every_value(tmp_path: Path) -> None:
    made = with_configs(tmp_path)
    for seed in (1, 2):
        path = tmp_path / f"baseline-{seed}" / "config.toml"
        own = [f"train.time_budget={seed * 60}"]
        path.write_text(config_to_toml(resolve_config(["quickstart"], path, own)))
    (row,) = [
        row for row in differences_table(made, read_settings(made, tmp_path)).rows if row[0] == "train.time_budget"
    ]
    assert row[1] == "60.0 | 120.0"


def test_no_torch_is_needed() -> None:
    code = (
        "import sys; from nanochat_cli.bench.matched.report.hparams import write_hparams\n"
        "from nanochat_cli.bench.matched.report.comparison import write_comparison\n"
        "from tensorboard.plugins.hparams import summary_v2; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
