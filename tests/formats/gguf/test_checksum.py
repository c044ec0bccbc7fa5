"""The checksum in a GGUF file: an independent hash agrees, and no change of a tensor goes unseen.

The oracle reads the file through gguf alone and hashes what the module's docstring says.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_cli.config.schema import ExportConfig
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import DataError
from nanochat_cli.formats.gguf.checksum import is_intact
from nanochat_cli.formats.gguf.file import GGUFFile
from nanochat_cli.formats.gguf.float_copy import write_float_copy
from nanochat_cli.formats.gguf.read import load_gguf
from nanochat_cli.formats.gguf.write import export_gguf
from nanochat_cli.model.transformer import Transformer
from tests.architectures import build
from tests.inference.tiny_models import spread_model, tiny_config

KEY = "nanochat.tensors.sha256"


def export(path: Path, type_name: Any, model: Transformer | None = None) -> Path:
    model = model or spread_model(tiny_config(vocab_size=300, n_layers=1))
    tokenizer = Tokenizer.train(["some text, some more text"], 290).padded_to(300)
    export_gguf(model, tokenizer, path, ExportConfig(type=type_name), {"run": "first"})
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("exported") / "m.gguf", "auto")


def independent(path: Path) -> tuple[str, str]:
    """What the file says, and what gguf's reader finds."""
    reader = gguf.GGUFReader(path)
    parts = []
    for tensor in sorted(reader.tensors, key=lambda one: one.name):
        shape = [int(n) for n in tensor.shape][::-1]
        line = json.dumps([tensor.name, tensor.tensor_type.name, shape, int(tensor.n_bytes)])
        begin = int(tensor.data_offset)
        parts += [line.encode(), b"\n", path.read_bytes()[begin : begin + int(tensor.n_bytes)]]
    return reader.fields[KEY].contents(), hashlib.sha256(b"".join(parts)).hexdigest()


def agrees(path: Path) -> bool:
    said, found = independent(path)
    return said == found and is_intact(GGUFFile(path)) is True


@pytest.mark.parametrize("type_name", ["tq2_0", "tq1_0", "q2_0", "q4_0", "f16", "f32"])
def test_the_checksum_is_that_of_what_gguf_reads(tmp_path: Path, type_name: str) -> None:
    assert agrees(export(tmp_path / "m.gguf", type_name))


@pytest.mark.parametrize("combination", ["plain+attention+moe+tied", "mhc-2+hybrid+dense+untied"])
def test_so_it_is_for_experts_and_parts_of_our_own(tmp_path: Path, combination: str) -> None:
    assert agrees(export(tmp_path / "m.gguf", "auto", build(combination, vocab_size=300)))


def tensor_places(path: Path) -> list[tuple[int, int]]:
    """Offset and bytes of each tensor."""
    return [(int(tensor.data_offset), int(tensor.n_bytes)) for tensor in gguf.GGUFReader(path).tensors]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_one_flipped_bit_anywhere_in_a_tensor_is_found(
    file: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    begin, size = data.draw(st.sampled_from(tensor_places(file)))
    at, bit = begin + data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, 7))
    damaged = tmp_path_factory.getbasetemp() / "flipped.gguf"
    content = bytearray(file.read_bytes())
    content[at] ^= 1 << bit
    damaged.write_bytes(content)
    assert is_intact(GGUFFile(damaged)) is False


def test_every_tensor_counts_from_its_first_byte_to_its_last(file: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "flipped.gguf"
    for begin, size in tensor_places(file):
        for at in (begin, begin + size - 1):
            content = bytearray(file.read_bytes())
            content[at] ^= 0x80
            damaged.write_bytes(content)
            assert is_intact(GGUFFile(damaged)) is False, at


def exchanged(content: bytes, one: bytes, other: bytes) -> bytes:
    assert len(one) == len(other)
    assert one in content
    assert other in content
    return content.replace(one, b"?" * len(one)).replace(other, one).replace(b"?" * len(one), other)


def test_tensors_that_exchange_their_names_are_found(file: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "renamed.gguf"
    damaged.write_bytes(exchanged(file.read_bytes(), b"blk.0.attn_k.weight", b"blk.0.attn_v.weight"))
    assert is_intact(GGUFFile(damaged)) is False


def test_the_loader_refuses_a_damaged_file_in_one_line(file: Path, tmp_path: Path) -> None:
    begin, _ = max(tensor_places(file), key=lambda place: place[1])
    content = bytearray(file.read_bytes())
    content[begin + 70] ^= 1
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(DataError, match=rf"m\.gguf: its tensors do not match {KEY}: .*download it again") as refused:
        load_gguf(tmp_path / "m.gguf")
    assert "\n" not in str(refused.value)


def test_other_metadata_may_change_and_a_file_without_the_key_loads(file: Path, tmp_path: Path) -> None:
    content = file.read_bytes()
    renamed, silent = tmp_path / "renamed.gguf", tmp_path / "silent.gguf"
    renamed.write_bytes(content.replace(b"first", b"other"))
    assert GGUFFile(renamed).fields["general.name"] == "other"
    assert is_intact(GGUFFile(renamed)) is True
    silent.write_bytes(content.replace(KEY.encode(), b"elsewhere" + KEY.encode()[9:]))
    assert is_intact(GGUFFile(silent)) is None
    load_gguf(silent)


def test_a_float_copy_does_not_claim_to_be_the_original(file: Path, tmp_path: Path) -> None:
    shutil.copy(file, tmp_path / "m.gguf")
    write_float_copy(tmp_path / "m.gguf", tmp_path / "float.gguf")
    assert is_intact(GGUFFile(tmp_path / "float.gguf")) is None
