"""A preset or a file that names a base: what it inherits, in which order, and what is refused."""

import json
from pathlib import Path

import pytest

from nanochat_cli.config import presets
from nanochat_cli.config.load import resolve_config, with_default_model
from nanochat_cli.errors import ConfigError
from tests.config.test_presets import value_at

RECORDED: dict[str, dict[str, object]] = json.loads(
    (Path(__file__).parent / "resolved_presets.json").read_text(encoding="utf-8")
)
DEFAULTS = RECORDED.pop("")


@pytest.mark.parametrize("name", RECORDED)
def test_a_preset_resolves_to_the_values_that_were_recorded_when_each_file_was_complete(name):
    names = ["quickstart", name] if presets.load(name).is_overlay else [name]
    resolved = resolve_config(names).model_dump(mode="json")
    expected = DEFAULTS | RECORDED[name]
    assert {key: value_at(resolved, tuple(key.split("."))) for key in expected} == expected


def write(path: Path, text: str, *, description: str = "mine") -> Path:
    path.write_text(f'description = "{description}"\n{text}', encoding="utf-8")
    return path


def test_a_preset_changes_its_base_key_by_key_and_so_does_its_base(tmp_path):
    write(tmp_path / "middle.toml", 'base = "d20"\n[model]\ndim = 640\nn_heads = 10\n')
    top = str(write(tmp_path / "top.toml", 'base = "middle.toml"\n[model]\nn_heads = 20\n'))
    config = resolve_config([top])
    d20 = resolve_config(["d20"])
    assert (config.model.dim, config.model.n_heads, config.model.n_layers) == (640, 20, d20.model.n_layers)
    assert config.train == d20.train
    assert [preset.name for preset in presets.load(top).lineage()] == ["d20", "middle", "top"]


def test_a_preset_with_a_base_stands_for_all_its_keys_among_other_presets():
    assert resolve_config(["quickstart", "d20-mtp"]).model == resolve_config(["d20-mtp"]).model
    assert resolve_config(["d20-mtp", "h200"]).train.batch_size == resolve_config(["h200"]).train.batch_size


def test_the_label_is_that_of_the_base_unless_it_has_one(tmp_path):
    plain = presets.load(str(write(tmp_path / "plain.toml", 'base = "d20"\n')))
    named = presets.load(str(write(tmp_path / "named.toml", 'base = "d20"\nlabel = "1.0B"\n')))
    assert (plain.label, named.label) == ("556M", "1.0B")
    assert not plain.is_overlay


def test_a_key_displaces_the_other_key_of_the_base_for_the_same_thing(tmp_path):
    mine = write(tmp_path / "mine.toml", 'base = "quickstart"\n[train]\ntotal_steps = 70\n')
    assert resolve_config([str(mine)]).train.time_budget is None
    file = tmp_path / "file.toml"
    file.write_text('base = "quickstart"\ntotal_steps = 70\n')
    assert resolve_config(file=file).train.time_budget is None


def test_the_base_of_a_file_comes_before_presets_and_names_the_model(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('base = "small-560m"\n[train]\nseq_len = 512\n')
    assert with_default_model(["cpu"], file, "quickstart") == ["cpu"]
    config = resolve_config(["cpu"], file)
    assert config.model == resolve_config(["small-560m"]).model
    assert (config.train.seq_len, config.eval.batch_size) == (512, 4)  # the file, and the overlay over the base


def test_an_error_names_the_base_that_sets_the_key():
    with pytest.raises(ConfigError) as caught:
        resolve_config(["d20-mtp"], overrides=["train.seq_len=4096"])
    assert "(model.max_seq_len: preset d20, base of d20-mtp; train.seq_len: --set)" in str(caught.value)


def test_a_base_on_the_command_line_is_told_what_to_do():
    with pytest.raises(ConfigError, match=r'^base = "d20" \(--set\): unknown key; .* --preset$'):
        resolve_config(overrides=["base=d20"])


BAD_BASES = [
    ('"d21"', r'^base = "d21" \(.*mine\.toml\): no such preset; did you mean d20\?$'),
    ('"missing.toml"', r'^base = "missing\.toml" \(.*mine\.toml\): no such file$'),
    ('"mine.toml"', r'^base = "mine\.toml" \(.*mine\.toml\): a circle: mine\.toml -> mine\.toml$'),
    ('"other.toml"', r'^base = "mine\.toml" \(.*other\.toml\): a circle: mine\.toml -> other\.toml -> mine\.toml$'),
    ('"cpu"', r'^base = "cpu" \(.*mine\.toml\): an overlay; a base is the preset of a model'),
    ("20", r'^base = 20 \(.*mine\.toml\): must be the name of a preset, such as "quickstart"$'),
]


@pytest.mark.parametrize(("base", "message"), BAD_BASES)
def test_a_bad_base_is_one_line_that_names_the_file_whether_preset_or_config(tmp_path, base, message):
    mine = write(tmp_path / "mine.toml", f"base = {base}\n")
    write(tmp_path / "other.toml", 'base = "mine.toml"\n')
    with pytest.raises(ConfigError, match=message):
        resolve_config([str(mine)])
    mine.write_text(mine.read_text().partition("\n")[2])
    with pytest.raises(ConfigError, match=message):
        resolve_config(file=mine)
