"""The schema for editors, by an independent validator: what a configuration may be, and what it may not."""

import json

import jsonschema
import pytest
import tomlkit

from nanochat_cli.config import presets
from nanochat_cli.config.json_schema import SCHEMA_FILE, json_schema
from nanochat_cli.config.keys import leaves
from nanochat_cli.config.load import config_to_toml, resolve_config
from nanochat_cli.errors import ConfigError
from nanochat_cli.formats.run.create import write_config

SCHEMA = json_schema()


def fits(text: str) -> bool:
    return jsonschema.Draft202012Validator(SCHEMA).is_valid(tomlkit.parse(text).unwrap())


def test_it_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert '"null"' not in json.dumps(SCHEMA)


@pytest.mark.parametrize("preset", presets.available(), ids=lambda preset: preset.name)
def test_every_preset_fits_written_and_resolved(preset):
    own = tomlkit.parse(preset.path.read_text()).unwrap()
    for key in ("description", "label"):  # of presets, not of a --config file
        own.pop(key, None)
    assert fits(tomlkit.dumps(own))
    names = ["quickstart", preset.name] if preset.is_overlay else [preset.name]
    assert fits(config_to_toml(resolve_config(names)))


WRONG = {
    "a typo": "[optim]\nlrr = 0.1",
    "a section that is none": "[optimizer]\nlr = 0.1",
    "text for a number": '[optim]\nlr = "high"',
    "a negative rate": "[optim]\nlr = -1",
    "a float for an integer": "[train]\nbatch_size = 1.5",
    "no such choice": '[optim]\nschedule = "wsdd"',
    "a number for a switch": "[mtp]\nenabled = 3",
    "a flat key of the wrong type": 'hidden_dim = "wide"',
    "three of two": "[optim]\nbetas = [0.9, 0.9, 0.9]",
    "a base that is a number": "base = 20",
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_what_train_refuses_the_schema_refuses(tmp_path, text):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(ConfigError):
        resolve_config(["quickstart"], file)
    assert not fits(text)


def test_flat_keys_of_other_programs_and_a_base_are_known():
    assert fits('base = "quickstart"\nhidden_dim = 512\nnum_layers = 3\nuse_mtp = true\nlr = 0.01')
    assert SCHEMA["properties"]["hidden_dim"]["description"] == "the same as model.dim"


def test_every_key_is_described():
    found = json.dumps(SCHEMA, ensure_ascii=False)
    assert all(json.dumps(field.description, ensure_ascii=False) in found for field in leaves().values())


def test_the_configuration_of_a_run_names_the_schema_beside_it(tmp_path):
    config = resolve_config(["quickstart"])
    write_config(config, tmp_path)
    first = (tmp_path / "config.toml").read_text().splitlines()[0]
    assert first == f"#:schema {SCHEMA_FILE}"
    beside = json.loads((tmp_path / SCHEMA_FILE).read_text())
    assert jsonschema.Draft202012Validator(beside).is_valid(
        tomlkit.parse((tmp_path / "config.toml").read_text()).unwrap()
    )
