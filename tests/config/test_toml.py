"""The resolved configuration as a file: it reads back equal, whatever it holds."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import tomlkit
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_cli.config.keys import leaves
from nanochat_cli.config.load import CONFIG_FILE, config_to_toml, load_run_config, resolve_config
from nanochat_cli.config.presets import available
from nanochat_cli.config.schema import Config
from nanochat_cli.errors import DataError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
RATES = st.floats(min_value=1e-12, max_value=1e6)

SECTIONS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "run": st.fixed_dictionaries(
        {"seed": st.integers(0, 2**63 - 1)}, optional={"name": TEXT, "dir": TEXT.filter(lambda s: "\0" not in s)}
    ),
    "model": st.fixed_dictionaries(
        {"n_heads": st.sampled_from([2, 4]), "n_kv_heads": st.sampled_from([1, 2]), "head_dim": st.just(128)},
        optional={
            "vocab_size": st.integers(1, 10**9),
            "dim": st.sampled_from([256, 512]),
            "ffn_dim": st.sampled_from([256, 768]),
            "rope_theta": RATES,
            "tie_embeddings": st.booleans(),
            "quant": st.fixed_dictionaries({"scale": st.sampled_from(["row", "tensor", 256, 128, 64])}),
        },
    ),
    "data": st.fixed_dictionaries({}, optional={"source": TEXT, "glob": TEXT, "workers": st.integers(1, 99)}),
    "train": st.fixed_dictionaries({}, optional={"time_budget": RATES, "batch_size": st.integers(1, 10**6)}),
    "optim": st.fixed_dictionaries(
        {}, optional={"lr": RATES, "betas": st.tuples(st.floats(0, 1), st.floats(0, 1)), "eps": RATES}
    ),
    "export": st.fixed_dictionaries({}, optional={"type": st.sampled_from(["auto", "tq2_0", "f32"])}),
}


@settings(max_examples=60, deadline=None)
@given(st.fixed_dictionaries({}, optional=SECTIONS))
def test_any_config_reads_back_equal(values):
    config = Config.model_validate(values)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / CONFIG_FILE
        file.write_text(config_to_toml(config, header="any\nheader"), encoding="utf-8")
        assert load_run_config(Path(folder)) == config


@pytest.mark.parametrize("preset", [preset.name for preset in available() if not preset.is_overlay])
def test_presets_read_back_equal(preset, tmp_path):
    config = resolve_config([preset])
    (tmp_path / CONFIG_FILE).write_text(config_to_toml(config), encoding="utf-8")
    assert load_run_config(tmp_path) == config


def test_a_run_from_before_duplicates_were_left_out_keeps_them(tmp_path):
    text = config_to_toml(resolve_config(["quickstart"]))
    assert load_run_config_of(tmp_path, text).data.dedup == "near"
    older = "".join(line for line in text.splitlines(True) if not line.startswith("dedup = "))
    assert load_run_config_of(tmp_path, older).data.dedup == "none"
    (tmp_path / "few.toml").write_text("[train]\ntotal_steps = 3\n")
    assert resolve_config(["quickstart"], tmp_path / "few.toml").data.dedup == "near"


def load_run_config_of(folder, text):
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    return load_run_config(folder)


def test_every_value_is_written_with_its_description():
    text = config_to_toml(Config(), header="written by a test")
    assert text.startswith("# written by a test\n")
    written = tomlkit.parse(text).unwrap()
    for key, field in leaves().items():
        *path, name = key.split(".")
        table = written
        for part in path:
            table = table[part]
        assert (name in table) == (field.get_default(call_default_factory=True) is not None), key
        if name in table and field.description:
            assert any(
                line.startswith(f"{name} = ") and line.endswith(field.description) for line in text.splitlines()
            ), key


def test_a_folder_without_a_config_is_not_a_run(tmp_path):
    with pytest.raises(DataError, match=r"not a run of nanochat train"):
        load_run_config(tmp_path)
