"""Preparing a data set: the right tokens on the right side, whatever the number of workers, and only once."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from nanochat_cli.cli.app import main
from nanochat_cli.data import prepare, write_sides
from nanochat_cli.data.corpus import open_corpus
from nanochat_cli.data.encoding import encode_documents
from nanochat_cli.data.manifest import SPLITS, Split
from nanochat_cli.data.on_the_fly import TextStore
from nanochat_cli.data.prepare import cached_dataset, prepare_dataset
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.data.split import split_key
from nanochat_cli.data.text_index import text_index
from nanochat_cli.data.text_sample import TextSample
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.report.reporter import PlainReporter, QuietReporter
from tests.data.corpora import make_config, write_folder


def files_of(folder: Path) -> dict[str, str]:
    """sha256 of every visible file."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if not path.name.startswith(".")
    }


def write_text(path: Path, text: str = "text of a program\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("pre", ["gpt-2", "llama3", "qwen2"])
def test_the_shards_are_what_the_plain_library_encodes_document_by_document(tmp_path: Path, pre: str) -> None:
    documents = write_folder(tmp_path / "corpus", 60)
    manifest = prepare_dataset(
        str(tmp_path / "corpus"), tmp_path / "data", make_config(tokenizer={"pre": pre}), QuietReporter()
    )
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "data" / "tokenizer.json"))
    plain.encode_special_tokens = True
    eos = plain.token_to_id("<|endoftext|>")
    reader = ShardReader(tmp_path / "data", vocab_size=400)
    held_out = list(reader.documents("val"))
    trained_on = list(reader.documents("train"))
    sides: list[tuple[Split, list[bytes]]] = [("train", trained_on), ("val", held_out)]
    for split, contents in sides:
        expected = [token for content in contents for token in [*plain.encode(content.decode()).ids, eos]]
        assert reader.tokens(split)[:].tolist() == expected
    # Nothing is lost, nothing is on both sides, and each side keeps the order of the corpus.
    assert Counter(trained_on + held_out) == Counter(documents)
    assert trained_on == [content for content in documents if content in set(trained_on)]
    assert manifest.train.documents + manifest.val.documents == 60
    assert manifest.tokenizer.vocab_size == plain.get_vocab_size() == 400


def test_the_side_depends_only_on_the_content(tmp_path: Path) -> None:
    documents = write_folder(tmp_path / "corpus", 60)
    # The same documents under other names, each of them three times, among new ones.
    for copy in range(3):
        for number, content in enumerate(documents):
            (tmp_path / "more" / str(copy)).mkdir(parents=True, exist_ok=True)
            (tmp_path / "more" / str(copy) / f"{hashlib.md5(content).hexdigest()}{number}").write_bytes(content)
    write_folder(tmp_path / "more", 60, seed=1)
    sides = []
    for name in ("corpus", "more"):
        prepare_dataset(str(tmp_path / name), tmp_path / f"{name}-data", make_config(), QuietReporter())
        reader = ShardReader(tmp_path / f"{name}-data")
        sides.append((set(reader.documents("train")), set(reader.documents("val"))))
    (train, val), (more_train, more_val) = sides
    assert not more_train & more_val
    assert train <= more_train
    assert val <= more_val


def test_near_duplicates_are_on_one_side_and_the_manifest_says_how_many_there_are(tmp_path: Path) -> None:
    documents = write_folder(tmp_path / "corpus", 60, size=900)
    for number, content in enumerate(documents[:20]):
        write_text(tmp_path / "corpus" / "forks" / f"{number}.txt", "# Copyright of a fork\n" + content.decode())
    manifest = prepare_dataset(
        str(tmp_path / "corpus"), tmp_path / "data", make_config(data={"dedup": "none"}), QuietReporter()
    )
    assert manifest.near_duplicates is not None
    assert 12 <= manifest.near_duplicates.clusters <= 20  # of a very short text, the header is most
    reader = ShardReader(tmp_path / "data")
    sides = {content: split for split in SPLITS for content in reader.documents(split)}
    for content in documents[:20]:
        if len(content) > 200:
            assert sides[b"# Copyright of a fork\n" + content] == sides[content]
    assert len(set(sides.values())) == 2
    assert {**manifest.settings}["data.split"] == "clusters of near-duplicates, 1"


@pytest.mark.parametrize("dedup", ["none", "exact", "near"])
def test_copies_and_near_duplicates_are_left_out_as_the_setting_says(
    tmp_path: Path, dedup: str, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = [content for content in write_folder(tmp_path / "corpus", 40, size=900) if len(content) > 200]
    forks = [b"# A fork\n" + content for content in documents[:9]]
    for number, content in enumerate([*forks, *documents[:5], *documents[:5]]):
        write_text(tmp_path / "corpus" / "forks" / f"{number:02}.txt", content.decode())
    config = make_config(data={"dedup": dedup})
    manifest = prepare_dataset(str(tmp_path / "corpus"), tmp_path / "data", config, PlainReporter())
    assert manifest.settings.get("data.dedup", "none") == dedup
    held = Counter(content for split in SPLITS for content in ShardReader(tmp_path / "data").documents(split))
    copies = manifest.skipped.get("copy of another document", 0)
    assert copies == (0 if dedup == "none" else 10)
    assert max(held.values()) == (3 if dedup == "none" else 1)
    for content, fork in zip(documents, forks, strict=False):
        assert (content in held) + (fork in held) == (1 if dedup == "near" else 2)
    assert manifest.skipped.get("near-duplicate of another document", 0) == (9 if dedup == "near" else 0)
    said = capsys.readouterr().err
    if dedup == "near":
        assert manifest.families[0][0] == 3  # two copies and a fork
        assert f"left out 10 copies and 9 near-duplicates of other documents: 3 like {manifest.families[0][1]}" in said
    else:
        assert ("left out 10 copies and 0 near-duplicates" in said) == (dedup == "exact")


def test_the_documents_of_a_data_set_are_found_again_in_a_source_with_duplicates(tmp_path: Path) -> None:
    documents = write_folder(tmp_path / "corpus", 40, size=900)
    for number, content in enumerate(documents[:20]):
        write_text(tmp_path / "corpus" / "forks" / f"{number:02}.py", "# A fork\n" + content.decode())
        write_text(tmp_path / "corpus" / "more" / f"{number:02}.rs", content.decode())
    config = make_config(data={"dedup": "near"})
    prepare_dataset(str(tmp_path / "corpus"), tmp_path / "data", config, QuietReporter())
    reader = ShardReader(tmp_path / "data")
    path, corpus = text_index(reader, config.data, QuietReporter())
    texts = TextStore(path, corpus.files, "text")
    pieces, whole = texts.stretch(0, len(texts))
    assert whole
    assert pieces == list(reader.documents("train"))


def test_a_corpus_of_one_cluster_is_split_by_document_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_folder(tmp_path / "once", 1, seed=4, size=2000)[0].decode() * 3
    for number in range(8):
        write_text(tmp_path / "corpus" / f"{number}.txt", f"version {number}\n" + text)
    manifest = prepare_dataset(str(tmp_path / "corpus"), tmp_path / "data", make_config(), PlainReporter())
    assert manifest.val.documents >= 1
    assert manifest.train.documents >= 1
    assert "every document is a near-duplicate of another" in capsys.readouterr().err


def test_a_data_set_of_the_split_by_document_still_loads(tmp_path: Path) -> None:
    write_folder(tmp_path / "corpus", 20)
    prepare_dataset(str(tmp_path / "corpus"), tmp_path / "data", make_config(), QuietReporter())
    path = tmp_path / "data" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["near_duplicates"], manifest["settings"]["data.split"]
    path.write_text(json.dumps(manifest))
    assert ShardReader(tmp_path / "data").manifest.near_duplicates is None


def test_a_small_corpus_still_has_a_document_on_each_side(tmp_path: Path) -> None:
    for count in (2, 3, 5):
        for fraction in (0.0001, 0.02, 0.49):
            folder = tmp_path / f"{count}-{fraction}"
            write_folder(folder / "corpus", count, seed=count)
            manifest = prepare_dataset(
                str(folder / "corpus"), folder / "data", make_config(data={"val_fraction": fraction}), QuietReporter()
            )
            assert manifest.train.documents >= 1
            assert manifest.val.documents >= 1


def test_the_tokenizer_is_trained_on_the_train_side_only(tmp_path: Path) -> None:
    write_folder(tmp_path / "corpus", 60)
    prepare_dataset(str(tmp_path / "corpus"), tmp_path / "data", make_config(), QuietReporter())
    reader = ShardReader(tmp_path / "data")
    again = Tokenizer.train((content.decode() for content in reader.documents("train")), 400)
    assert again.to_str() == reader.tokenizer.to_str()


def test_the_sample_for_the_tokenizer_is_bounded_even_and_independent_of_order() -> None:
    documents = [(split_key(str(number).encode()), f"{number:05d}".encode() * 2) for number in range(5000)]
    forwards, backwards = TextSample(10_000), TextSample(10_000)
    for key, content in documents:
        forwards.offer(key, content)
    for key, content in reversed(documents):
        backwards.offer(key, content)
    sample = forwards.documents()
    assert sorted(sample) == sorted(backwards.documents())
    assert len(sample) == 1000
    assert forwards.size == 10_000
    # Five equal parts of the stream, 200 expected from each, standard deviation 12.
    parts = Counter(int(content[:5]) // 1000 for content in sample)
    assert all(abs(parts[part] - 200) < 60 for part in range(5))
    held_out = {split_key(content[: len(content) // 2].lstrip(b"0") or b"0") for content in sample[:300]}
    assert sorted(forwards.documents(held_out)) == sorted(sample[300:])


def test_a_document_longer_than_the_sample_is_cut_to_it() -> None:
    sample = TextSample(10)
    sample.offer(1, b"x" * 100)
    sample.offer(0, b"y" * 5)
    assert sample.documents() == [b"x" * 10]


def test_the_tokenizer_reads_no_more_than_train_bytes(tmp_path: Path) -> None:
    write_folder(tmp_path / "corpus", 60)
    read: list[str] = []
    original = Tokenizer.train

    def spy(texts: Iterable[str], *arguments: Any, **options: Any) -> Tokenizer:
        read.extend(texts)
        return original(read, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare.Tokenizer, "train", spy)
        config = make_config(tokenizer={"train_bytes": 2000})
        prepare_dataset(str(tmp_path / "corpus"), tmp_path / "data", config, QuietReporter())
    assert 1000 < sum(len(text.encode()) for text in read) <= 2000
    held_out = set(ShardReader(tmp_path / "data").documents("val"))
    assert not {text.encode() for text in read} & held_out


def test_the_result_does_not_depend_on_the_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_sides, "WORTH_A_WORKER", 1)
    monkeypatch.setattr(write_sides, "MAX_SHARD_TOKENS", 1500)
    documents = write_folder(tmp_path / "corpus", 60)
    results = []
    for workers in (1, 2, 3):
        out = tmp_path / str(workers)
        prepare_dataset(str(tmp_path / "corpus"), out, make_config(data={"workers": workers}), QuietReporter())
        results.append(files_of(out))
    assert results[0] == results[1] == results[2]
    assert sum(name.startswith("train-") for name in results[0]) > 1
    # Batches of one document each: more batches in flight than workers.
    tokenizer = Tokenizer.load(tmp_path / "1" / "tokenizer.json")
    one = list(encode_documents(documents, tokenizer, workers=1))
    many = list(encode_documents(documents, tokenizer, workers=2, batch_bytes=1))
    assert [t for batch in one for t in batch.tokens.tolist()] == [t for batch in many for t in batch.tokens.tolist()]
    assert [d for batch in many for d in batch.documents] == documents


def test_a_given_tokenizer_is_used_and_padded_to_the_vocabulary(tmp_path: Path) -> None:
    documents = write_folder(tmp_path / "corpus", 20)
    tokenizer = Tokenizer.train((content.decode() for content in documents), 300)
    tokenizer.save(tmp_path / "mine.json")
    config = make_config(tokenizer={"path": tmp_path / "mine.json"})
    manifest = prepare_dataset(str(tmp_path / "corpus"), tmp_path / "data", config, QuietReporter())
    used = ShardReader(tmp_path / "data", vocab_size=400).tokenizer
    assert used.encode(documents[0].decode()) == tokenizer.encode(documents[0].decode())
    assert manifest.tokenizer.unused == 100 + len(tokenizer.unused_ids)
    small = make_config(tokenizer={"path": tmp_path / "mine.json"}, model={"vocab_size": 280})
    with pytest.raises(DataError, match=r"300 tokens but model\.vocab_size = 280"):
        prepare_dataset(str(tmp_path / "corpus"), tmp_path / "small", small, QuietReporter())


def test_max_bytes_stops_the_corpus(tmp_path: Path) -> None:
    documents = write_folder(tmp_path / "corpus", 60)
    config = make_config(data={"max_bytes": 3000})
    manifest = prepare_dataset(str(tmp_path / "corpus"), tmp_path / "data", config, QuietReporter())
    found = manifest.train.bytes + manifest.val.bytes
    assert 3000 <= found < 3000 + max(map(len, documents))


# -- doing it once ---------------------------------------------------------------------------------------


def test_the_same_settings_and_source_change_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "corpus", 20)
    out = tmp_path / "data"
    first = prepare_dataset(str(tmp_path / "corpus"), out, make_config(), PlainReporter())
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.iterdir()}
    capsys.readouterr()
    # The number of workers does not affect the result.
    again = prepare_dataset(str(tmp_path / "corpus"), out, make_config(data={"workers": 2}), PlainReporter())
    assert again == first
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.iterdir()} == before
    assert "already prepared" in capsys.readouterr().err


@pytest.mark.parametrize("changed", ["a setting", "the corpus", "a shard"])
def test_a_change_prepares_again_and_equals_a_fresh_preparation(
    tmp_path: Path, changed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "corpus", 20)
    out, config = tmp_path / "data", make_config()
    prepare_dataset(str(tmp_path / "corpus"), out, config, QuietReporter())
    if changed == "a setting":
        config = make_config(model={"vocab_size": 350})
        expected = "model.vocab_size changed"
    elif changed == "the corpus":
        write_folder(tmp_path / "corpus", 25, seed=3)
        expected = "the source changed"
    else:
        (out / "val-00000.safetensors").write_bytes(b"")
        expected = "val-00000.safetensors: 0 bytes"
    prepare_dataset(str(tmp_path / "corpus"), out, config, PlainReporter())
    assert expected in capsys.readouterr().err
    prepare_dataset(str(tmp_path / "corpus"), tmp_path / "fresh", config, QuietReporter())
    assert files_of(out) == files_of(tmp_path / "fresh")


def test_output_inside_the_source_is_not_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = write_folder(tmp_path, 20)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANOCHAT_CACHE", str(tmp_path / "cache"))
    first = prepare_dataset(".", Path("data/mine"), make_config(), QuietReporter())
    before = files_of(Path("data/mine"))
    cached = cached_dataset(make_config(data={"source": "."}), QuietReporter())
    # A run, a suite and another data set as we write them, and files that tools leave.
    for name in ("runs/a/config.toml", "runs/a/environment.json", "runs/a/tokenizer.json", "runs/a/samples/1.txt"):
        write_text(tmp_path / name)
    for name in ("suites/b/suite.json", "suites/b/configs/c.toml", "suites/b/logs/c.log"):
        write_text(tmp_path / name)
    for name in ("env/pyvenv.cfg", "env/lib/x.py", "part0/__pycache__/x.txt", "target/CACHEDIR.TAG", "target/x.rs"):
        write_text(tmp_path / name)
    prepare_dataset("part0", Path("data/other"), make_config(), QuietReporter())
    again = prepare_dataset(".", Path("data/mine"), make_config(), QuietReporter())
    assert again == first
    assert files_of(Path("data/mine")) == before
    assert cached_dataset(make_config(data={"source": "."}), QuietReporter()) == cached
    fresh = prepare_dataset(".", Path("data/third"), make_config(), QuietReporter())
    assert fresh == first
    assert fresh.train.documents + fresh.val.documents == len(documents)


def test_somebody_else_s_manifest_or_configuration_is_text(tmp_path: Path) -> None:
    write_folder(tmp_path, 3)
    write_text(tmp_path / "extension" / "manifest.json", '{"name": "a browser extension", "version": "1"}')
    write_text(tmp_path / "site" / "config.toml", "title = 'a site'")
    found = {document.id for document in open_corpus(str(tmp_path))}
    assert {"extension/manifest.json", "site/config.toml"} < found


def test_a_data_set_is_neither_a_source_nor_written_over_its_source(tmp_path: Path) -> None:
    write_folder(tmp_path / "corpus", 20)
    with pytest.raises(ConfigError, match="is both the source and the folder to be written"):
        prepare_dataset(str(tmp_path / "corpus"), tmp_path / "corpus", make_config(), QuietReporter())
    prepare_dataset(str(tmp_path / "corpus"), tmp_path / "data", make_config(), QuietReporter())
    with pytest.raises(DataError, match="is a data set of nanochat tokenize, not a corpus"):
        prepare_dataset(str(tmp_path / "data"), tmp_path / "again", make_config(), QuietReporter())


def test_a_failed_preparation_leaves_the_existing_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "corpus", 20)
    out = tmp_path / "data"
    prepare_dataset(str(tmp_path / "corpus"), out, make_config(), QuietReporter())
    before = files_of(out)
    write_folder(tmp_path / "corpus", 20, seed=2)

    def interrupted_by(error: type[BaseException]) -> None:
        raise error

    for error in (KeyboardInterrupt, OSError, DataError):
        with monkeypatch.context() as patch:
            patch.setattr(write_sides.ShardWriter, "finish", lambda _, error=error: interrupted_by(error))
            with pytest.raises((KeyboardInterrupt, DataError)):
                prepare_dataset(str(tmp_path / "corpus"), out, make_config(), QuietReporter())
        assert files_of(out) == before
        assert not list(out.rglob("*.partial"))
    ShardReader(out, verify="full")


@pytest.mark.parametrize("options", [[], ["--set", "data.val_fraction=2"]], ids=["success", "error"])
def test_what_json_wrote_into_the_source_is_not_part_of_the_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    """Neither while the first command runs, nor when the next one finds it there: it changes nothing."""
    monkeypatch.chdir(tmp_path)
    write_folder(Path("corpus"), 20)
    write_text(Path("corpus/settings.json"), '{\n  "dataset": "of a person"\n}\n')
    line = ["tokenize", "--source", "corpus", "--out", "out", "--vocab-size", "400", "--json", "corpus/found.json"]
    assert main([*line, *options]) == (2 if options else 0)
    assert Path("corpus/found.json").is_file()
    assert main(line) == 0
    found = json.loads(Path("corpus/found.json").read_text())
    assert found["train"]["documents"] + found["val"]["documents"] == 21
    before = files_of(Path("out"))
    assert main(line) == 0
    assert files_of(Path("out")) == before


def test_the_cache_prepares_once_per_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_CACHE", str(tmp_path / "cache"))
    write_folder(tmp_path / "corpus", 20)
    config = make_config(data={"source": str(tmp_path / "corpus")})
    first = cached_dataset(config, QuietReporter())
    assert first.is_relative_to(tmp_path / "cache" / "datasets")
    assert first.name.startswith("corpus-")
    assert cached_dataset(config, QuietReporter()) == first
    other = make_config(data={"source": str(tmp_path / "corpus")}, model={"vocab_size": 350})
    assert cached_dataset(other, QuietReporter()) != first
    assert ShardReader(first, vocab_size=400).tokens("train").document_count > 0
    given = make_config(data={"path": tmp_path / "mine"})
    assert cached_dataset(given, QuietReporter()) == tmp_path / "mine"


# -- what cannot be prepared -----------------------------------------------------------------------------


def test_a_corpus_of_one_document_or_of_equal_ones_cannot_be_split(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"x")
    with pytest.raises(DataError, match=r"only one distinct document \(1 bytes\)"):
        prepare_dataset(str(tmp_path / "one"), tmp_path / "data", make_config(), QuietReporter())
    (tmp_path / "equal").mkdir()
    for number in range(5):
        (tmp_path / "equal" / str(number)).write_bytes(b"the same")
    with pytest.raises(DataError, match="only one distinct document"):
        prepare_dataset(str(tmp_path / "equal"), tmp_path / "data", make_config(), QuietReporter())
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_a_source_that_changes_between_the_passes_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "corpus", 20)
    original = prepare._tokenizer

    def edit_and_go_on(*arguments: Any) -> Tokenizer:
        next((tmp_path / "corpus").rglob("*.txt")).write_text("edited")
        return original(*arguments)

    monkeypatch.setattr(prepare, "_tokenizer", edit_and_go_on)
    with pytest.raises(DataError, match="changed while it was read"):
        prepare_dataset(str(tmp_path / "corpus"), tmp_path / "data", make_config(), QuietReporter())
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_skipped_files_are_reported_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "corpus", 20)
    (tmp_path / "corpus" / "image.png").write_bytes(b"\x89PNG\0")
    manifest = prepare_dataset(str(tmp_path / "corpus"), tmp_path / "data", make_config(), PlainReporter())
    assert manifest.skipped == {"binary (NUL bytes)": 1}
    assert manifest.left_out == ["image.png: binary (NUL bytes)"]
    assert "corpus: left out 1 binary (NUL bytes): image.png (binary (NUL bytes))\n" in capsys.readouterr().err
    for number in range(20):
        (tmp_path / "corpus" / f"{number:02d}.txt").write_bytes(b"\xff")
    write_text(tmp_path / "corpus" / "a.min.js", "x=1;" * 5000)
    manifest = prepare_dataset(str(tmp_path / "corpus"), tmp_path / "data", make_config(), PlainReporter())
    assert manifest.skipped == {"binary (NUL bytes)": 1, "not UTF-8": 20}
    assert manifest.left_out[0] == "00.txt: not UTF-8"
    assert manifest.left_out[-1] == "image.png: binary (NUL bytes)"
    assert manifest.long_lines == ["a.min.js"]
    said = capsys.readouterr().err
    assert "image.png (binary (NUL bytes)) and 10 more\n" in said
    assert "used 1 files with lines of more than 10,000 bytes, which look minified or generated: a.min.js" in said


def test_names_that_are_not_utf8_are_escaped_and_found_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(tmp_path / "caf\udce9")
    write_folder(Path(source), 20)
    (Path(source) / "bad\udcff.bin").write_bytes(b"\0")
    (Path(source) / "long\udcff.js").write_text("x" * 20_000)
    manifest = prepare_dataset(source, tmp_path / "data", make_config(), PlainReporter())
    assert manifest.source.endswith("caf\\udce9")
    assert manifest.left_out == ["bad\\udcff.bin: binary (NUL bytes)"]
    assert manifest.long_lines == ["long\\udcff.js"]
    json.loads((tmp_path / "data" / "manifest.json").read_bytes())
    assert len(list(prepare.source_of(manifest, make_config().data))) == 21
    assert cached_dataset(make_config(data={"source": source}), QuietReporter())
    capsys.readouterr().err.encode()
