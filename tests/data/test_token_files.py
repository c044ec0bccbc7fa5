"""Token files of other programs become the same shards as the text that they stand for, and come out of them again."""

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import tokenizers

from nanochat_cli.cli.app import main
from nanochat_cli.cli.data import FormatName
from nanochat_cli.config.schema import Config
from nanochat_cli.config.sections.data import TokenFormat
from nanochat_cli.data import token_documents, write_sides
from nanochat_cli.data.documents import Document
from nanochat_cli.data.manifest import SPLITS, Manifest, read_manifest
from nanochat_cli.data.prepare import prepare_dataset
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.data.text_index import text_index
from nanochat_cli.data.token_documents import TokenSettings
from nanochat_cli.data.token_export import export_tokens
from nanochat_cli.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat_cli.errors import DataError
from nanochat_cli.evaluation.held_out import document_languages
from nanochat_cli.report.reporter import QuietReporter
from tests.data.corpora import make_config
from tests.data.token_formats import TEXTS, WRITERS, write_llmc, write_megatron, write_nanogpt, write_nanotron

VOCAB = 300
FORMATS = [
    ("nanotron", "H"),
    ("nanotron", "I"),
    ("megatron", "H"),
    ("megatron", "i"),
    ("nanogpt", "H"),
    ("llmc", "H"),
    ("llmc", "I"),
]
FIXTURES = Path(__file__).parents[1] / "fixtures" / "token_files"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    """Of VOCAB tokens, also as tokenizer.json in tmp_path."""
    trained = Tokenizer.train(TEXTS, VOCAB)
    trained.save(tmp_path / "tokenizer.json")
    return trained


def config_for(folder: Path, vocab_size: int = VOCAB, **data: int) -> Config:
    return make_config(
        model={"vocab_size": vocab_size}, data={**data}, tokenizer={"path": (folder / "tokenizer.json").as_posix()}
    )


def imported(folder: Path, source: Path, out: str = "imported", **data: int) -> Manifest:
    return prepare_dataset(str(source), folder / out, config_for(folder, **data), QuietReporter())


def hashes(manifest: Manifest) -> list[str]:
    return [shard.sha256 for split in SPLITS for shard in manifest.split(split).shards]


def ids_of(folder: Path) -> list[list[int]]:
    reader = ShardReader(folder)
    return [document.tolist() for split in SPLITS for document in reader.tokens(split).documents()]


def plain_ids(folder: Path, texts: list[str] = TEXTS) -> list[list[int]]:
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [plain.encode(text).ids for text in texts]


@pytest.mark.usefixtures("tokenizer")
@pytest.mark.parametrize(("form", "width"), FORMATS)
def test_token_files_become_the_shards_of_their_text(tmp_path: Path, form: TokenFormat, width: str) -> None:
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "files").mkdir()
    source = WRITERS[form](tmp_path / "files", plain_ids(tmp_path), 0, width)
    of_text, of_tokens = imported(tmp_path, tmp_path / "text.jsonl", "of-text"), imported(tmp_path, source)
    assert hashes(of_tokens) == hashes(of_text)
    assert (of_tokens.train, of_tokens.val) == (of_text.train, of_text.val)
    assert of_tokens.near_duplicates == of_text.near_duplicates
    assert of_tokens.settings["data.format"] == form
    # The folder is recognised too, and so is a data set that is up to date.
    before = (tmp_path / "imported" / "manifest.json").stat().st_mtime_ns
    assert imported(tmp_path, source) == of_tokens
    assert (tmp_path / "imported" / "manifest.json").stat().st_mtime_ns == before
    assert hashes(imported(tmp_path, tmp_path / "files", "of-folder")) == hashes(of_text)


@pytest.fixture(scope="module", params=[VOCAB, 65537])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of text in uint16 or uint32, of several shards, some of them with one longer document."""
    folder = tmp_path_factory.mktemp("made")
    Tokenizer.train(TEXTS, VOCAB).padded_to(request.param).save(folder / "tokenizer.json")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    config = config_for(folder, vocab_size=request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write_sides, "MAX_SHARD_TOKENS", 150)
        manifest = prepare_dataset(str(folder / "text.jsonl"), folder / "data", config, QuietReporter())
    assert len(manifest.train.shards) > 3
    return folder / "data"


@pytest.mark.parametrize("form", get_args(TokenFormat))
def test_a_round_trip_is_the_identity(
    tmp_path: Path, made: Path, form: TokenFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_sides, "MAX_SHARD_TOKENS", 150)
    manifest, files = read_manifest(made), tmp_path / "deep" / "files"
    line = ["data", "export", str(made), "--format", form, "--out", str(files)]
    if form == "nanogpt" and manifest.tokenizer.vocab_size > 65536:
        assert main(line) == 2
        assert not (tmp_path / "deep").exists()
        return
    assert main(line) == 0
    config = config_for(files, vocab_size=manifest.tokenizer.vocab_size)
    again = prepare_dataset(str(files), tmp_path / "again", config, QuietReporter())
    assert hashes(again) == hashes(manifest)
    assert again.tokenizer == manifest.tokenizer


@pytest.mark.usefixtures("tokenizer")
def test_exported_files_are_what_their_formats_say(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    imported(tmp_path, write_nanotron(tmp_path / "files", plain_ids(tmp_path), 0))
    reader = ShardReader(tmp_path / "imported")
    for form in get_args(TokenFormat):
        export_tokens(reader, form, tmp_path / form)
    for split in SPLITS:
        documents = [document.tolist() for document in reader.tokens(split).documents()]
        by_hand = tmp_path / f"by-hand-{split}"
        by_hand.mkdir()
        for form, suffixes in (("nanotron", (".ds", ".ds.index")), ("nanogpt", (".bin",))):
            WRITERS[form](by_hand, documents, 0)
            for suffix in suffixes:
                found = tmp_path / form / f"{split}{suffix}"
                assert found.read_bytes() == (by_hand / f"tokens{suffix}").read_bytes()
        write_llmc(by_hand, documents, 0)
        assert (tmp_path / "llmc" / f"{split}_000000.bin").read_bytes() == (by_hand / "tokens.bin").read_bytes()
        # Megatron's layout, with a sequence for every document.
        lengths = [len(document) + 1 for document in documents]
        index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(lengths), len(lengths) + 1)
        index += np.array(lengths, "<i4").tobytes() + (2 * (np.cumsum(lengths) - lengths)).astype("<i8").tobytes()
        index += np.arange(len(lengths) + 1, dtype="<i8").tobytes()
        assert (tmp_path / "megatron" / f"{split}.idx").read_bytes() == index
        assert (tmp_path / "megatron" / f"{split}.bin").read_bytes() == (
            tmp_path / "nanogpt" / f"{split}.bin"
        ).read_bytes()
    metadata = (tmp_path / "nanotron" / "train.ds.metadata").read_text().splitlines()
    assert metadata[:2] == ["tokenizer.json|2", str(reader.manifest.train.tokens)]


@pytest.mark.parametrize("name", ["small_00000_unshuffled.ds", "wide.ds", "megatron.idx", "megatron-wide.bin"])
def test_what_datatrove_and_megatron_wrote_holds_its_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("nanochat_cli.data.tokenizer.SPECIAL_TOKENS", SPECIAL_TOKENS[:7])  # there were no others then
    monkeypatch.setattr("nanochat_cli.data.tokenizer.BASE_VOCAB", 263)
    Tokenizer.train(["text"], 263).save(tmp_path / "tokenizer.json")
    imported(tmp_path, FIXTURES / name)
    reader = ShardReader(tmp_path / "imported")
    found = [content.decode() for split in SPLITS for content in reader.documents(split)]
    assert sorted(found) == sorted(TEXTS)


@pytest.mark.usefixtures("tokenizer")
@pytest.mark.parametrize("form", get_args(TokenFormat))
def test_empty_documents_are_left_out_and_counted(tmp_path: Path, form: TokenFormat) -> None:
    (tmp_path / "files").mkdir()
    documents = [[], *plain_ids(tmp_path)[:6], [], *plain_ids(tmp_path)[6:], []]
    manifest = imported(tmp_path, WRITERS[form](tmp_path / "files", documents, 0))
    assert sorted(ids_of(tmp_path / "imported")) == sorted(plain_ids(tmp_path))
    # Where only an id tells, the nothing before the first one or after the last one is no document.
    assert manifest.skipped == {"empty": 3 if form in ("nanotron", "megatron") else 2}


@pytest.mark.usefixtures("tokenizer")
@pytest.mark.parametrize("form", get_args(TokenFormat))
def test_another_id_between_documents_becomes_the_tokenizer_s(tmp_path: Path, form: TokenFormat) -> None:
    (tmp_path / "files").mkdir()
    source = WRITERS[form](tmp_path / "files", plain_ids(tmp_path), VOCAB + 99)  # not even in the vocabulary
    imported(tmp_path, source, eot_id=VOCAB + 99)
    assert sorted(ids_of(tmp_path / "imported")) == sorted(plain_ids(tmp_path))


def test_a_document_that_is_too_long_is_cut_and_no_id_is_lost(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_documents, "LONGEST", 50)
    (tmp_path / "files").mkdir()
    source = write_nanogpt(tmp_path / "files", plain_ids(tmp_path), 0)
    settings = TokenSettings("nanogpt", None, tmp_path / "tokenizer.json")
    found = list(token_documents.token_documents(source, "files", settings, tokenizer))
    pieces = [document for document in found if isinstance(document, Document)]
    assert len(pieces) > len(TEXTS)
    assert b"".join(piece.content for piece in pieces).decode() == "".join(TEXTS)
    assert max(len(piece.content) for piece in pieces) <= 50
    tokens = [piece.tokens for piece in pieces if piece.tokens is not None]
    assert np.concatenate(tokens).tolist() == [t for ids in plain_ids(tmp_path) for t in ids]


@pytest.mark.usefixtures("tokenizer")
def test_the_same_text_in_other_tokens_is_another_data_set(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    first = imported(tmp_path, write_nanogpt(tmp_path / "files", plain_ids(tmp_path), 0))
    letters = [[token for char in text for token in plain_ids(tmp_path, [char])[0]] for text in TEXTS]
    second = imported(tmp_path, write_nanogpt(tmp_path / "files", letters, 0))
    assert second.train.bytes == first.train.bytes
    assert sorted(ids_of(tmp_path / "imported")) == sorted(letters)


@pytest.mark.usefixtures("tokenizer")
def test_a_data_set_of_token_files_has_no_text_to_read_again(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    manifest = imported(tmp_path, write_llmc(tmp_path / "files", plain_ids(tmp_path), 0))
    reader, config = ShardReader(tmp_path / "imported"), config_for(tmp_path)
    assert document_languages(reader, config, QuietReporter()) == ["other"] * manifest.val.documents
    with pytest.raises(DataError, match="holds token ids, not text"):
        text_index(reader, config.data, QuietReporter())


def test_memory_does_not_grow_with_the_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    settings, peaks = TokenSettings("nanogpt", None, tmp_path / "tokenizer.json"), []
    for count in (300_000, 1_200_000):
        ids = np.random.default_rng(0).integers(len(SPECIAL_TOKENS), VOCAB, count).astype("<u2")
        ids[::2_000] = 0
        ids.tofile(tmp_path / "tokens.bin")
        tracemalloc.start()
        documents = token_documents.token_documents(tmp_path / "tokens.bin", "tokens", settings, tokenizer)
        assert sum(1 for _ in documents) == count // 2_000
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 1_200_000  # the block that is searched for ends grows to 2^20 tokens


def cut(path: Path, size: int) -> Path:
    path.write_bytes(path.read_bytes()[:-size])
    return path


def patched(path: Path, offset: int, value: bytes) -> Path:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(value)] = value
    path.write_bytes(content)
    return path


Ids = list[list[int]]
DAMAGE: dict[str, tuple[Callable[[Path, Ids], Path], str]] = {
    "nanotron cut": (lambda folder, ids: cut(write_nanotron(folder, ids, 0), 2), "neither 2 nor 4 each: cut short"),
    "nanotron odd": (lambda folder, ids: cut(write_nanotron(folder, ids, 0), 1), "neither 2 nor 4 each"),
    "nanotron without index": (
        lambda folder, ids: [path := write_nanotron(folder, ids, 0), Path(f"{path}.index").unlink()][0],
        "tokens.ds.index: cannot read",
    ),
    "nanotron index cut": (
        lambda folder, ids: [path := write_nanotron(folder, ids, 0), cut(Path(f"{path}.index"), 3)][0],
        "no multiple of 8",
    ),
    "nanotron index disorder": (
        lambda folder, ids: [path := write_nanotron(folder, ids, 0), patched(Path(f"{path}.index"), 0, b"\xff" * 7)][0],
        "damaged: a document from token 0",
    ),
    "nanotron half": (
        lambda folder, ids: [
            path := write_nanotron(folder, ids, 0, "I"),
            cut(path, path.stat().st_size // 2),
            Path(f"{path}.metadata").write_text("x|4\n1\n"),
        ][0],
        "tokens.ds.metadata says 4",
    ),
    "megatron magic": (lambda folder, ids: patched(write_megatron(folder, ids, 0), 0, b"X"), "not a Megatron index"),
    "megatron version": (lambda folder, ids: patched(write_megatron(folder, ids, 0), 9, b"\2"), "version 2, type 8"),
    "megatron type": (lambda folder, ids: patched(write_megatron(folder, ids, 0), 17, b"\6"), "version 1, type 6"),
    "megatron index cut": (lambda folder, ids: cut(write_megatron(folder, ids, 0), 1), "tokens.idx: cut short"),
    "megatron offsets": (
        lambda folder, ids: [path := write_megatron(folder, ids, 0), patched(path, 34, b"\1")][0],
        "its offsets are not the sums of its lengths",
    ),
    "megatron cut": (
        lambda folder, ids: [path := write_megatron(folder, ids, 0), cut(path.with_suffix(".bin"), 2)][0],
        "tokens.idx: damaged: a document from token",
    ),
    "megatron sequences left over": (
        lambda folder, ids: patched(path := write_megatron(folder, ids, 0), path.stat().st_size - 8, b"\1"),
        "tokens.idx: its documents end at token",
    ),
    "megatron without ids": (
        lambda folder, ids: [path := write_megatron(folder, ids, 0), path.with_suffix(".bin").unlink()][0],
        "tokens.bin: cannot read",
    ),
    "nanogpt odd": (lambda folder, ids: cut(write_nanogpt(folder, ids, 0), 1), "no multiple of 2: cut short"),
    "nanogpt without ends": (
        lambda folder, ids: write_nanogpt(folder, ids, 6),
        "no id 0 ends a document in it; give the one that does with --eot-id (data.eot_id); the tokenizer's special "
        "tokens: <|endoftext|> = 0",
    ),
    "llmc cut": (lambda folder, ids: cut(write_llmc(folder, ids, 0), 2), "but its header says"),
    "llmc odd": (lambda folder, ids: cut(write_llmc(folder, ids, 0), 1), "no multiple of 2"),
    "llmc header": (lambda folder, ids: patched(write_llmc(folder, ids, 0), 4, b"\2"), "version 2 of magic 20240520"),
    "beyond the vocabulary": (lambda folder, ids: write_nanotron(folder, [*ids, [VOCAB]], 0), f"id {VOCAB} is not in"),
    "negative": (lambda folder, ids: write_megatron(folder, [*ids, [-1]], 0, "i"), "id 4294967295 is not in"),
}


@pytest.mark.usefixtures("tokenizer")
@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path, Ids], Path], message: str
) -> None:
    (tmp_path / "files").mkdir()
    source = damage(tmp_path / "files", plain_ids(tmp_path))
    line = ["tokenize", "--source", str(source), "--tokenizer", str(tmp_path / "tokenizer.json"), "--quiet"]
    assert main([*line, "--vocab-size", str(VOCAB), "--out", str(tmp_path / "deep" / "out")]) == 3
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "deep").exists()


def test_wrong_usage_is_one_line(tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "files").mkdir()
    source = str(write_llmc(tmp_path / "files", plain_ids(tmp_path), 0))
    (tmp_path / "word.json").write_text(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a")).to_str())
    given = ["--tokenizer", str(tmp_path / "tokenizer.json"), "--vocab-size", str(VOCAB)]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("text")
    (tmp_path / "files" / "more.ds").write_bytes(bytes(6))
    for arguments, code, message in (
        (["--source", source], 2, "holds token ids (llmc); name the tokenizer.json that made them with --tokenizer"),
        (["--source", source, "--tokenizer", str(tmp_path / "word.json")], 3, "only byte-level BPE is supported"),
        (["--source", source, *given[:2], "--vocab-size", "270"], 3, f"set model.vocab_size={VOCAB}"),
        (["--source", source, *given, "--format", "gpt"], 2, 'data.format = "gpt" (--format)'),
        (["--source", source, *given, "--format", "nanotron"], 3, "tokens.bin.index: cannot read"),
        (["--source", source, *given, "--eot-id", "-1"], 2, "data.eot_id = -1 (--eot-id)"),
        (["--source", str(tmp_path / "files"), *given], 2, "holds llmc and nanotron files; choose with --format"),
        (["--source", str(tmp_path / "text"), *given, "--format", "llmc"], 3, "no llmc file (*.bin) matches"),
        (["--source", str(tmp_path / "text"), "--eot-id", "0"], 2, "is text"),
        (["--source", "stdlib", "--format", "llmc"], 2, "stdlib: is text"),
    ):
        assert main(["tokenize", *arguments, "--quiet", "--out", str(tmp_path / "out")]) == code
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("tokenizer")
def test_an_export_replaces_nothing_and_a_failed_one_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "files").mkdir()
    imported(tmp_path, write_llmc(tmp_path / "files", plain_ids(tmp_path), 0))
    line = ["data", "export", str(tmp_path / "imported"), "--format", "llmc", "--quiet", "--out"]
    assert main([*line, str(tmp_path / "files")]) == 2
    assert "is not empty; choose another --out" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(np, "zeros", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert main([*line, str(tmp_path / "out")]) == 3
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*line, str(tmp_path / "out")]) == 0
    assert main(["data", "export", str(tmp_path / "out"), "--format", "llmc", "--out", str(tmp_path / "more")]) == 3


def test_a_text_file_is_text_whatever_its_name(tmp_path: Path) -> None:
    for name in ("notes.bin", "notes.ds", "notes.idx"):
        (tmp_path / name).write_text("\n".join(TEXTS) * 12)
        manifest = prepare_dataset(str(tmp_path / name), tmp_path / f"{name}-data", make_config(), QuietReporter())
        assert "data.format" not in manifest.settings
        assert read_manifest(tmp_path / f"{name}-data").skipped == {}


def test_the_command_line_knows_the_formats() -> None:
    assert get_args(FormatName) == get_args(TokenFormat)
