"""Text tokenised on the fly: rows are text of training documents, all of it is read and nothing held out is."""

import json
from pathlib import Path

import pytest

from nanochat_cli.config.schema import Config
from nanochat_cli.data.loader import source_spec
from nanochat_cli.data.loader_sources import TextSource
from nanochat_cli.data.on_the_fly import TextBatches, TextStore
from nanochat_cli.data.prepare import prepare_dataset
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import DataError
from nanochat_cli.report.reporter import QuietReporter

WORDS = ["alpha", "βήτα", "gamma", "δ", "🙂🙂", "zeta", "\n", "value = 17"]


def document(number: int) -> str:
    """Text of 20 to 90 words that names its own number, so that no two are alike."""
    words = [WORDS[(number * 7 + i * (number % 5 + 1)) % len(WORDS)] for i in range(20 + number * 11 % 71)]
    return f"document {number}: " + " ".join(words)


def write_files(folder: Path) -> str:
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:02d}.txt").write_text(document(number), encoding="utf-8")
    return str(folder)


def write_jsonl(folder: Path) -> str:
    lines = [json.dumps({"text": document(number), "n": number}, ensure_ascii=number % 2 == 0) for number in range(60)]
    lines.insert(30, "")
    path = folder.with_suffix(".jsonl")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def prepared(folder: Path, source: str, seq_len: int = 24) -> tuple[ShardReader, Config]:
    config = Config.model_validate(
        {
            "model": {"vocab_size": 300, "max_seq_len": 32_768},
            "train": {"batch_size": 4, "seq_len": seq_len},
            "data": {"val_fraction": 0.2, "source": source},
            "loader": {"on_the_fly": True},
        }
    )
    prepare_dataset(source, folder / "data", config, QuietReporter())
    return ShardReader(folder / "data"), config


def text_source(reader: ShardReader, config: Config) -> TextSource:
    spec = source_spec(reader, config, QuietReporter())
    assert isinstance(spec, TextSource)
    return spec


@pytest.mark.parametrize("write", [write_files, write_jsonl])
def test_the_store_is_the_training_documents_one_after_the_other(tmp_path: Path, write) -> None:
    reader, config = prepared(tmp_path, write(tmp_path / "text"))
    spec = text_source(reader, config)
    store = TextStore(spec.index, spec.files, spec.text_field)
    expected = list(reader.documents("train"))
    pieces, whole = store.stretch(0, len(store))
    assert pieces == expected
    assert whole
    # From the third byte of the last document: its rest from the first blank on, and then from the beginning again.
    start = len(store) - len(expected[-1]) + 2
    pieces, whole = store.stretch(start, len(expected[-1]) - 2 + len(expected[0]) + 1)
    assert pieces == [expected[-1][expected[-1].index(b" ") :], expected[0], expected[1][:1]]
    assert not whole


@pytest.mark.parametrize("write", [write_files, write_jsonl])
def test_a_row_is_text_of_the_training_documents_and_targets_follow_inputs(tmp_path: Path, write) -> None:
    reader, config = prepared(tmp_path, write(tmp_path / "text"))
    batches = text_source(reader, config).open()
    tokenizer = reader.tokenizer
    documents = list(reader.documents("train"))
    line = tokenizer.eos_token.encode().join([*documents, *documents[:1]])
    for index in range(30):
        inputs, targets = batches.batch(index)
        assert inputs.shape == targets.shape == (4, 24)
        assert (inputs[:, 1:] == targets[:, :-1]).all()
        for row in inputs:
            assert tokenizer.decode_bytes(row.tolist()) in line


def test_an_epoch_visits_every_window_once_and_moves_their_edges(tmp_path: Path) -> None:
    reader, config = prepared(tmp_path, write_files(tmp_path / "text"))
    batches = text_source(reader, config).open()
    assert isinstance(batches, TextBatches)
    n, size = batches.windows, batches.window_bytes
    assert n > 20
    first, second = ([batches.start(epoch * n + place) for place in range(n)] for epoch in (0, 1))
    for starts in (first, second):
        total = len(batches.store)
        edges = sorted(starts)
        gaps = [b - a for a, b in zip(edges, [*edges[1:], edges[0] + total], strict=True)]
        # All windows have the same length; less than one more is left over at the end.
        assert sorted(gaps)[:-1] == [size] * (n - 1)
        assert max(gaps) < 2 * size
    assert first != second
    assert first[0] % size != second[0] % size


def test_a_row_longer_than_the_text_reads_it_again(tmp_path: Path) -> None:
    reader, config = prepared(tmp_path, write_files(tmp_path / "text"), seq_len=20_000)
    inputs, _ = text_source(reader, config).open().batch(0)
    assert (inputs == reader.tokenizer.eos_id).sum() > 4 * reader.manifest.train.documents


def test_a_changed_source_is_refused_before_training(tmp_path: Path) -> None:
    source = write_files(tmp_path / "text")
    reader, config = prepared(tmp_path, source)
    text_source(reader, config)
    (tmp_path / "text" / "00.txt").write_text("something else")
    with pytest.raises(DataError, match=r"has changed since the data set was made.*nanochat tokenize"):
        text_source(reader, config)


def test_a_file_cut_short_while_training_is_an_error(tmp_path: Path) -> None:
    reader, config = prepared(tmp_path, write_files(tmp_path / "text"))
    batches = text_source(reader, config).open()
    for path in (tmp_path / "text").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="shorter than when it was prepared"):
        batches.batch(0)


def test_parquet_is_refused_with_a_way_out(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "text.parquet"
    pq.write_table(pa.table({"text": [document(number) for number in range(20)]}), path)
    reader, config = prepared(tmp_path, str(path))
    with pytest.raises(DataError, match=r"turn loader\.on_the_fly off"):
        text_source(reader, config)


def test_the_tokenizer_is_that_of_the_data_set(tmp_path: Path) -> None:
    reader, config = prepared(tmp_path, write_files(tmp_path / "text"))
    batches = text_source(reader, config).open()
    assert isinstance(batches, TextBatches)
    assert batches.tokenizer.to_str() == Tokenizer.load(reader.folder / "tokenizer.json").to_str()
