"""Composition of presets, file, `--set` and short options; what each error says."""

import re
from pathlib import Path

import pytest

from nanochat_cli.config.load import config_to_toml, resolve_config, with_default_model
from nanochat_cli.config.schema import Config
from nanochat_cli.errors import ConfigError


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_nothing_resolves_to_the_defaults_of_the_schema():
    assert resolve_config() == Config()


def test_later_places_win_key_by_key(tmp_path):
    file = write(tmp_path / "mine.toml", "[train]\nbatch_size = 3\nseq_len = 128\n[optim]\nlr = 0.5\n")
    config = resolve_config(
        ["quickstart", "cpu"],
        file,
        ["train.seq_len=64", "optim.lr=0.25", "optim.lr=0.125"],
        options={"--name": {"run.name": "mine"}, "--glob": {"data.glob": None}},
    )
    assert config.model.dim == 256  # quickstart
    assert config.train.dtype == "fp32"  # cpu, composed after it
    assert config.train.batch_size == 3  # the file
    assert config.train.seq_len == 64  # --set
    assert config.optim.lr == 0.125  # the last --set
    assert config.run.name == "mine"  # the short option
    assert config.data.glob == Config().data.glob  # an option that was not given


def test_presets_compose_left_to_right():
    assert resolve_config(["quickstart", "bitnet"]).model.tie_embeddings is True
    assert resolve_config(["bitnet", "quickstart"], overrides=["model.sub_norm=false"]).model.tie_embeddings is False


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.total_steps=7", 7),
        ("train.total_steps = 7", 7),
        ("total_steps=1e3", 1000),
        ("train.total_steps=1_000", 1000),
    ],
)
def test_set_reads_numbers_as_toml(text, expected):
    assert resolve_config(overrides=[text]).train.total_steps == expected


def test_set_takes_text_without_quotes_and_with_them():
    assert resolve_config(overrides=["optim.schedule=cosine"]).optim.schedule == "cosine"
    assert resolve_config(overrides=['optim.schedule="cosine"']).optim.schedule == "cosine"
    assert resolve_config(overrides=["data.source=hf:org/name@conf:train"]).data.source == "hf:org/name@conf:train"


@pytest.mark.parametrize("name", ["2024", "true", "1e5", "2024-01-01", "[a]"])
def test_set_keeps_text_where_only_text_fits(name):
    assert resolve_config(overrides=[f"run.name={name}"]).run.name == name


def test_set_none_unsets_an_optional_key():
    assert resolve_config(["quickstart"]).train.time_budget is not None
    assert resolve_config(["quickstart"], overrides=["train.time_budget=none"]).train.time_budget is None


def test_set_none_is_a_value_where_it_is_one_of_those_that_a_key_takes():
    assert resolve_config(["quickstart"], overrides=["data.dedup=none"]).data.dedup == "none"


def test_set_takes_arrays_and_equals_signs():
    config = resolve_config(overrides=["optim.betas=[0.5, 0.75]", "data.glob=a=b"])
    assert config.optim.betas == (0.5, 0.75)
    assert config.data.glob == "a=b"


BAD_SETTINGS = [
    # (--set, what the one line must say)
    ("model.n_headz=3", r"^model\.n_headz = 3 \(--set\): unknown key; did you mean model\.n_heads\?$"),
    ("optim.schdule=wsd", r"did you mean optim\.schedule\?$"),
    ("train.schedule=wsd", r"did you mean optim\.schedule\?$"),
    ("tie_embeddings=true", r"did you mean model\.tie_embeddings\?$"),
    ("train.stpes=1", r"did you mean train\.total_steps\?$"),
    ("weight_tied=true", r"did you mean model\.tie_embeddings\?$"),
    ("mhc_enabled=true", r"did you mean model\.mhc\.streams\?$"),
    ("use_fire=true", r"did you mean fire\.enabled\?$"),
    ("use_galoer=true", r"did you mean use_galore\?$"),
    ("hidden_size=64", r"did you mean model\.dim\?$"),
    ("optim.momentum=0.9", r"did you mean optim\.muon_momentum\?$"),
    ("train.zzz=1", r"unknown key; keys of \[train\]: total_steps, "),
    ("zzz.zzz=1", r"unknown key; sections: run, model, "),
    ("train.batch_size=eight", r'^train\.batch_size = "eight" \(--set\): must be an integer, not a string$'),
    ('train.batch_size="8"', r'^train\.batch_size = "8" \(--set\): must be an integer, not a string$'),
    ("train.batch_size=1.5", r"must be an integer, not a number$"),
    ("train.batch_size=true", r"must be an integer, not a boolean$"),
    ("model.tie_embeddings=1", r"must be a boolean, not an integer$"),
    ("train.batch_size=none", r"must be an integer, not none$"),
    ("train.batch_size=0", r"^train\.batch_size = 0 \(--set\): must be greater than 0$"),
    ("optim.lr=inf", r"must be a finite number"),
    ("run.seed=99999999999999999999", r"must be less than 9223372036854775808$"),
    ("optim.betas=0.9", r"must be an array, not a number$"),
    ("optim.betas=[0.9]", r"^optim\.betas = \[0\.9\] \(--set\): must be an array of 2 values$"),
    ("optim.betas=[0.9,0.9,0.9]", r"must be an array of 2 values$"),
    ('optim.betas=["a",0.9]', r"^optim\.betas = "),
    ("optim.schedule=wsdd", r"'wsd', 'two_stage', 'cosine' or 'constant'; did you mean wsd\?$"),
    ("model.quant.scale=100", r"^model\.quant\.scale = 100 \(--set\): must be 'row', 'tensor', 256, 128 or 64$"),
    ("model=3", r"^model = 3 \(--set\): model is a section, not a value$"),
    ("train.batch_size.x=1", r"train\.batch_size is a value, not a section$"),
    ("train.batch_size", r"^--set train\.batch_size: write KEY=VALUE"),
    ("batch size=1", r"is not a key"),
    ("=1", r"is not a key"),
    ("", r"write KEY=VALUE"),
]


@pytest.mark.parametrize(("setting", "message"), BAD_SETTINGS)
def test_a_bad_setting_is_one_line_with_key_value_origin_and_what_is_allowed(setting, message):
    with pytest.raises(ConfigError) as caught:
        resolve_config(overrides=[setting])
    assert "\n" not in str(caught.value)
    assert re.search(message, str(caught.value)), str(caught.value)


def test_a_rule_between_keys_names_where_each_was_set():
    with pytest.raises(ConfigError) as caught:
        resolve_config(["quickstart"], overrides=["train.seq_len=100000"])
    assert str(caught.value) == (
        "train.seq_len = 100000 is longer than model.max_seq_len = 256"
        " (model.max_seq_len: preset quickstart; train.seq_len: --set)"
    )


def test_scale_groups_must_divide_the_widths():
    with pytest.raises(ConfigError, match=r"dim = 192 must be a multiple of quant\.scale = 128"):
        resolve_config(["quickstart"], overrides=["model.dim=192", "model.quant.scale=128"])


def test_several_errors_are_counted():
    with pytest.raises(ConfigError, match=r"\(and 1 more\)$"):
        resolve_config(overrides=["train.batch_size=0", "train.seq_len=0"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[train\nx = 1", "not valid TOML: .*line 1"),
        (b"[train]\nbatch_size = 1\nbatch_size = 2\n", "not valid TOML"),
        (b"\xff\xfe[train]", "not UTF-8 text"),
        (b"[train]\nbatch_size = 1979-05-27\n", r"train\.batch_size = 1979-05-27 \(.*mine\.toml\): must be an integer"),
        (b"[[train]]\nbatch_size = 1\n", "train is a section, not a value"),
        (b"[nonsense]\n", "unknown key; sections"),
        (b"[train]\nbatchsize = 1\n", r"\(.*mine\.toml\): unknown key; did you mean train\.batch_size\?"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    file = tmp_path / "mine.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        resolve_config(file=file)
    assert "mine.toml" in str(caught.value)


def test_an_empty_section_says_nothing(tmp_path):
    assert resolve_config(file=write(tmp_path / "c.toml", "[train]\n[model.quant]\n")) == Config()


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml: no such config file"):
        resolve_config(file=tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot read the config"):
        resolve_config(file=tmp_path)


def test_a_given_width_replaces_the_preset_s_other_key_for_it():
    assert resolve_config(["quickstart"]).model.ffn_dim == 768
    assert resolve_config(["quickstart"], overrides=["dim=512", "ffn_mult=4.0"]).model.resolved_ffn_dim == 2048
    both = resolve_config(["quickstart"], overrides=["ffn_mult=4.0", "model.ffn_dim=512"])
    assert both.model.resolved_ffn_dim == 512


def test_given_steps_replace_the_preset_s_time():
    assert resolve_config(["quickstart"]).train.time_budget == 300
    config = resolve_config(["quickstart"], overrides=["total_steps=70"])
    assert (config.train.total_steps, config.train.time_budget) == (70, None)
    both = resolve_config(["quickstart"], overrides=["total_steps=70", "train.time_budget=9"])
    assert (both.train.total_steps, both.train.time_budget) == (70, 9)


def test_a_given_place_of_deltanet_replaces_that_of_the_preset():
    config = resolve_config(["small-560m"], overrides=["model.deltanet.pattern=DA", "model.n_layers=4"])
    assert config.model.delta_layers == (True, False, True, False)
    assert resolve_config(["d20", "llama-cpp"], overrides=["deltanet_ratio=0.5"]).model.is_hybrid


def test_overlays_and_partial_files_extend_the_default_model(tmp_path):
    some = write(tmp_path / "seeds.toml", "hidden_dim = 512\nlearning_rate = 0.01\n")
    whole = write(tmp_path / "config.toml", config_to_toml(resolve_config(["d20"])))
    assert with_default_model([], None, "quickstart") == ["quickstart"]
    assert with_default_model([], some, "quickstart") == ["quickstart"]
    assert with_default_model(["h200"], None, "quickstart") == ["quickstart", "h200"]
    assert with_default_model(["h200", "d20"], some, "quickstart") == ["h200", "d20"]
    assert with_default_model([], whole, "quickstart") == []
