"""checksums.json of a Hugging Face folder: coreutils agrees, and a changed bit is found and not imported."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_cli.config.schema import ExportConfig
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import DataError
from nanochat_cli.formats.huggingface.checksums import damaged_files
from nanochat_cli.formats.huggingface.read import read_folder
from nanochat_cli.formats.huggingface.tensors import stored_values
from nanochat_cli.formats.huggingface.write import write_folder
from tests.inference.tiny_models import spread_model, tiny_config


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    model = spread_model(tiny_config(vocab_size=300, dim=128, n_heads=4, ffn_dim=256, n_layers=1))
    tokenizer = Tokenizer.train(["def f(x): return x + 1\n" * 30], 290)
    write_folder(model.config, stored_values(model, ExportConfig()), tokenizer, folder, "{{ x }}", shard_bytes=200_000)
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "copy")


def said(folder: Path) -> dict[str, str]:
    return json.loads((folder / "checksums.json").read_text())["sha256"]


def test_every_file_is_named_with_the_sum_that_coreutils_computes(folder: Path) -> None:
    files = sorted(path.name for path in folder.iterdir() if path.name != "checksums.json")
    assert sum(name.endswith(".safetensors") for name in files) > 1
    lines = subprocess.run(["sha256sum", *files], cwd=folder, capture_output=True, text=True, check=True).stdout
    assert said(folder) == {name: digest for digest, name in map(str.split, lines.splitlines())}
    assert damaged_files(folder) == []


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_one_flipped_bit_anywhere_is_found(exported: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(said(exported))))
    content = (exported / name).read_bytes()
    at, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    try:
        (exported / name).write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        assert damaged_files(exported) == [name]
    finally:
        (exported / name).write_bytes(content)


def test_a_missing_file_is_damage_and_a_card_or_another_file_is_not(folder: Path) -> None:
    (folder / "README.md").write_text("a card with a licence")
    assert damaged_files(folder) == []
    (folder / "tokenizer.json").unlink()
    assert damaged_files(folder) == ["tokenizer.json"]
    (folder / "checksums.json").unlink()
    assert damaged_files(folder) is None


@pytest.mark.parametrize("text", ["{}", "[1]", "{", '{"sha256": {"../x": "00"}}'])
def test_a_damaged_list_is_one_clear_line(folder: Path, text: str) -> None:
    (folder / "checksums.json").write_text(text)
    with pytest.raises(DataError, match=r"checksums\.json: ") as refused:
        damaged_files(folder)
    assert "\n" not in str(refused.value)


def test_weights_that_were_changed_are_not_imported(folder: Path) -> None:
    weights = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(weights.read_bytes())
    content[-7] ^= 1  # another number, as good as any
    read_folder(folder)
    weights.write_bytes(content)
    with pytest.raises(DataError, match=rf"{weights.name}: does not match checksums\.json.*download it again"):
        read_folder(folder)
