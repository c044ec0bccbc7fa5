"""Shards: plain safetensors, exact counts, and all damage noticed before training reads a token."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nanochat_cli.data import shards
from nanochat_cli.data.manifest import read_manifest
from nanochat_cli.data.prepare import prepare_dataset
from nanochat_cli.data.shards import Shard, ShardReader, ShardWriter, TokenStream
from nanochat_cli.errors import DataError
from nanochat_cli.report.reporter import QuietReporter
from tests.data.corpora import make_config, write_folder


@pytest.mark.parametrize(("vocab_size", "dtype"), [(400, np.uint16), (65536, np.uint16), (65537, np.uint32)])
def test_a_shard_is_a_plain_safetensors_file(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    rng = np.random.default_rng(vocab_size)
    documents = [rng.integers(0, vocab_size, size) for size in (5, 1, 8, 3, 9)]
    documents[0][0] = vocab_size - 1
    with ShardWriter(tmp_path, "train", vocab_size, max_tokens=14) as writer:
        for tokens in documents:
            writer.add(tokens, n_bytes=2 * len(tokens))
        info = writer.finish()
    assert [shard.documents for shard in info.shards] == [3, 2]
    assert (info.tokens, info.documents, info.bytes) == (26, 5, 52)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train-00000.safetensors", "train-00001.safetensors"]
    found = []
    for shard in info.shards:
        tensors = load_file(tmp_path / shard.file)
        assert tensors["tokens"].dtype == dtype
        assert tensors["doc_offsets"].dtype == np.int64
        found += np.split(tensors["tokens"], tensors["doc_offsets"][1:-1])
        assert (tmp_path / shard.file).stat().st_size == shard.size
    for expected, tokens in zip(documents, found, strict=True):
        np.testing.assert_array_equal(tokens, expected)
    stream = TokenStream([Shard(tmp_path / shard.file, shard) for shard in info.shards], eos_id=0)
    np.testing.assert_array_equal(stream[:], np.concatenate(documents))


def test_a_document_longer_than_a_shard_gets_its_own_shard(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "train", 400, max_tokens=10) as writer:
        for size in (4, 25, 4):
            writer.add(np.zeros(size, dtype=np.int64), size)
        assert [shard.tokens for shard in writer.finish().shards] == [4, 25, 4]


def test_an_abandoned_writer_leaves_no_file(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "train", 400) as writer:
        writer.add(np.zeros(5, dtype=np.int64), 5)
        assert list(tmp_path.iterdir()) != []
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    write_folder(tmp_path / "corpus", 40)
    prepare_dataset(str(tmp_path / "corpus"), tmp_path / "data", make_config(), QuietReporter())
    return tmp_path / "data"


def test_counts_are_those_of_the_streams(dataset: Path) -> None:
    reader = ShardReader(dataset, vocab_size=400)
    for split in ("train", "val"):
        stream, info = reader.tokens(split), reader.manifest.split(split)
        documents = list(reader.documents(split))
        assert len(stream) == info.tokens
        assert stream.document_count == info.documents == len(documents)
        assert stream.byte_count == info.bytes == sum(map(len, documents))
        assert int((stream[:] == reader.tokenizer.eos_id).sum()) == len(documents)


SHARD = "train-00000.safetensors"


def cut(folder: Path) -> None:
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(content[:-1])


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / SHARD).read_bytes())
    content[-1] ^= 1
    (folder / SHARD).write_bytes(content)


def other_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("[PAD", "[pad") + " ")


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, rf"{SHARD}: \d+ bytes, manifest\.json says \d+"),
        (flip_a_bit, rf"{SHARD}: its sha256 differs from manifest\.json"),
        (lambda folder: (folder / SHARD).unlink(), rf"{SHARD}: missing shard"),
        (other_tokenizer, r"tokenizer\.json: its sha256"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"tokenizer\.json: cannot read"),
        (lambda folder: (folder / "manifest.json").unlink(), r"not a data set: no manifest\.json"),
        (lambda folder: (folder / "manifest.json").write_text("{"), r"manifest\.json: damaged manifest"),
        (lambda folder: edit_manifest(folder, version=2), r"manifest\.json: damaged manifest \(version: "),
        (lambda folder: edit_manifest(folder, train={}), r"manifest\.json: damaged manifest \(train\.tokens: "),
    ],
)  # fmt: skip
def test_damage_is_noticed_on_open_and_reported_in_one_line(
    dataset: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(dataset)
    with pytest.raises(DataError, match=message) as caught:
        ShardReader(dataset)
    assert "\n" not in str(caught.value)
    assert "nanochat tokenize" in str(caught.value)


def test_a_shard_whose_header_lies_is_refused_even_when_only_sizes_are_checked(dataset: Path) -> None:
    content = bytearray((dataset / SHARD).read_bytes())
    content[8:12] = b"#@!?"
    (dataset / SHARD).write_bytes(content)
    with pytest.raises(DataError, match="not a token shard"):
        ShardReader(dataset, verify="size").tokens("train")
    content[:8] = (2**60).to_bytes(8, "little")
    (dataset / SHARD).write_bytes(content)
    with pytest.raises(DataError, match="not a token shard"):
        ShardReader(dataset, verify="size").tokens("train")


def test_a_model_with_another_vocabulary_is_refused(dataset: Path) -> None:
    with pytest.raises(DataError, match=r"tokenised with 400 tokens but model\.vocab_size = 401"):
        ShardReader(dataset, vocab_size=401)


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no manifest"):
        read_manifest(tmp_path / "nowhere")


def test_opening_maps_the_tokens_instead_of_reading_them(dataset: Path) -> None:
    shard = Shard(dataset / SHARD, read_manifest(dataset).train.shards[0])
    assert isinstance(shard.tokens, np.memmap)
    assert not shard.tokens.flags.writeable
    assert shard.tokens.flags.aligned
    assert shard.doc_offsets.flags.aligned


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tokens, offsets: tokens.__setitem__(3, 400), "token 400 in a vocabulary of 400"),
        (lambda tokens, offsets: offsets.__setitem__(1, 0), "documents overlap or have gaps"),
        (lambda tokens, offsets: offsets.__setitem__(1, offsets[-1] + 5), "documents overlap or have gaps"),
        (lambda tokens, offsets: offsets.__setitem__(-1, offsets[-1] + 10), "documents overlap or have gaps"),
    ],
)
def test_numbers_that_index_past_something_are_refused_though_all_hashes_fit(
    dataset: Path, change: Callable, message: str
) -> None:
    """As if written by a program that gets the shard's size and hash right, but one number wrong."""
    path, manifest = dataset / "train-00000.safetensors", dataset / "manifest.json"
    tensors = load_file(path)
    change(tensors["tokens"], tensors["doc_offsets"])
    save_file({name: tensors[name] for name in ("doc_offsets", "tokens")}, path)
    written = json.loads(manifest.read_text())
    written["train"]["shards"][0] |= {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "size": path.stat().st_size,
    }
    manifest.write_text(json.dumps(written))
    with pytest.raises(DataError, match=f"train-00000.safetensors: .*{message}"):
        ShardReader(dataset).tokens("train")


@pytest.mark.parametrize("recorded", [True, False])
def test_a_shard_too_large_to_be_hashed_is_held_to_the_vocabulary_all_the_same(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, recorded: bool
) -> None:
    """By the largest token that the manifest names, without reading the shard; one that names none is read."""
    info = read_manifest(dataset).train.shards[0]
    assert info.largest == load_file(dataset / SHARD)["tokens"].max()
    monkeypatch.setattr(shards, "FULL_VERIFY_BYTES", 0)
    ShardReader(dataset).tokens("train")
    if recorded:
        written = json.loads((dataset / "manifest.json").read_text())
        written["train"]["shards"][0]["largest"] = 400
        (dataset / "manifest.json").write_text(json.dumps(written))
    else:
        written = json.loads((dataset / "manifest.json").read_text())
        del written["train"]["shards"][0]["largest"]
        (dataset / "manifest.json").write_text(json.dumps(written))
        tokens = Shard(dataset / SHARD, info).tokens
        with (dataset / SHARD).open("r+b") as file:
            file.seek(tokens.offset)
            file.write((400).to_bytes(tokens.itemsize, "little"))
    with pytest.raises(DataError, match=r"train-00000\.safetensors: token 400 in a vocabulary of 400"):
        ShardReader(dataset).tokens("train")
