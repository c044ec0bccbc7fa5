"""Corpora: which documents a source yields, in what order, and which errors it reports."""

import bz2
import gzip
import json
import lzma
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_cli.data import corpus as corpus_module
from nanochat_cli.data import records, text_files
from nanochat_cli.data.corpus import open_corpus
from nanochat_cli.errors import DataError
from tests.data.corpora import write_folder


def contents(source: str | Path, **options: Any) -> list[bytes]:
    return [document.content for document in open_corpus(str(source), **options)]


# -- files and folders -----------------------------------------------------------------------------------


def test_a_folder_yields_every_file_sorted_and_again_on_every_iteration(tmp_path: Path) -> None:
    expected = write_folder(tmp_path, 30)
    corpus = open_corpus(str(tmp_path))
    assert [document.content for document in corpus] == expected
    assert [document.content for document in corpus] == expected
    assert corpus.size_bytes == sum(map(len, expected))
    ids = [document.id for document in corpus]
    assert ids == sorted(ids)
    assert len(set(ids)) == 30


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("**/*", ["a.rs", "b.py", "src/c.rs", "src/deep/d.rs", "src/deep/e.py"]),
        ("*.rs", ["a.rs", "src/c.rs", "src/deep/d.rs"]),
        ("**/*.rs", ["a.rs", "src/c.rs", "src/deep/d.rs"]),
        ("src/*", ["src/c.rs"]),
        ("src/**", ["src/c.rs", "src/deep/d.rs", "src/deep/e.py"]),
        ("src/**/*.py", ["src/deep/e.py"]),
        ("**/deep/*", ["src/deep/d.rs", "src/deep/e.py"]),
        ("[ab].*", ["a.rs", "b.py"]),
    ],
)
def test_glob_selects_files(tmp_path: Path, glob: str, expected: list[str]) -> None:
    for name in ("a.rs", "b.py", "src/c.rs", "src/deep/d.rs", "src/deep/e.py", ".git/config", "src/.hidden.rs"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [document.id for document in open_corpus(str(tmp_path), glob)] == expected


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.txt").write_text("a")
    (tmp_path / "inner" / "up").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "z.txt").symlink_to(tmp_path / "inner" / "a.txt")
    os.mkfifo(tmp_path / "pipe")
    assert [document.id for document in open_corpus(str(tmp_path))] == ["inner/a.txt", "z.txt"]


def test_unusable_files_are_left_out_and_counted_by_reason(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_bytes("naïve\r\n".encode())
    (tmp_path / "latin1.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "cut.txt").write_bytes("é".encode()[:1])
    (tmp_path / "binary.txt").write_bytes(b"ELF\0\1")
    (tmp_path / "empty.txt").touch()
    corpus = open_corpus(str(tmp_path))
    assert [document.content for document in corpus] == ["naïve\r\n".encode()]
    assert corpus.skipped == {"not UTF-8": 2, "binary (NUL bytes)": 1, "empty": 1}
    list(corpus)
    assert sum(corpus.skipped.values()) == 4


def test_a_single_file_is_cut_at_line_ends_so_that_part_can_be_held_out(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes("".join(f"line {number} é\n" for number in range(5000)).encode())
    pieces = contents(path)
    assert b"".join(pieces) == path.read_bytes()
    assert len(pieces) > 3
    assert all(piece.endswith(b"\n") for piece in pieces)
    assert all(len(piece) < corpus_module.SINGLE_FILE_PIECE + 20 for piece in pieces)


def test_a_long_document_is_cut_and_a_long_bad_one_is_left_out_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (corpus_module, records, text_files):
        monkeypatch.setattr(module, "MAX_DOCUMENT", 100)
    text = "".join(f"{number} é\n" for number in range(100))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": text + "\0"}))
    corpus = open_corpus(str(rows))
    pieces = [document.content for document in corpus]
    assert b"".join(pieces).decode() == text
    assert len(pieces) > 5
    assert all(piece.endswith(b"\n") for piece in pieces)
    assert corpus.skipped == {"binary (NUL bytes)": 1}

    (tmp_path / "rows.jsonl").unlink()
    (tmp_path / "long.txt").write_bytes(text.encode() + b"\xff")  # only the last piece would be invalid
    (tmp_path / "short.txt").write_bytes(b"short")
    assert contents(tmp_path) == [b"short"]


def test_the_standard_library_is_a_corpus_without_installed_packages() -> None:
    ids = [document.id for document in open_corpus("stdlib")]
    root = Path(sysconfig.get_path("stdlib"))
    assert "json/decoder.py" in ids
    assert len(ids) > 500
    assert not any("site-packages" in name or "dist-packages" in name for name in ids)
    assert all((root / name.partition("@")[0]).suffix == ".py" for name in ids)


def test_the_fingerprint_follows_names_sizes_and_times_but_not_where_the_folder_is(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    write_folder(folder, 3)
    before = open_corpus(str(folder)).fingerprint
    assert open_corpus(str(folder)).fingerprint == before
    folder.rename(tmp_path / "b")
    moved = tmp_path / "b"
    assert open_corpus(str(moved)).fingerprint == before
    assert open_corpus(str(moved), "*.txt").fingerprint != before
    file = next(moved.rglob("*.txt"))
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert open_corpus(str(moved)).fingerprint != before


# -- records ---------------------------------------------------------------------------------------------

ROWS = ["first\n", "zweite Zeile é", "three \ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")]


def write_jsonl(path: Path, rows: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": i, field: row}) + "\n" for i, row in enumerate(rows)) + "\n")
    return path


def write_parquet(path: Path, rows: list[str | None], field: str = "text") -> Path:
    pq.write_table(pa.table({"id": list(range(len(rows))), field: pa.array(rows, pa.string())}), path)
    return path


def test_jsonl_and_parquet_rows_are_documents(tmp_path: Path) -> None:
    expected = [row.encode() for row in ROWS]
    assert contents(write_jsonl(tmp_path / "rows.jsonl", ROWS)) == expected
    assert contents(write_parquet(tmp_path / "rows.parquet", [*ROWS, None])) == expected
    assert contents(write_jsonl(tmp_path / "code.jsonl", ROWS, field="code"), text_field="code") == expected


def test_a_folder_of_records_is_read_when_the_glob_says_so(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", ROWS[1:])
    write_jsonl(tmp_path / "a.jsonl", ROWS[:1])
    write_parquet(tmp_path / "c.parquet", [*ROWS])
    assert contents(tmp_path, glob="*.jsonl") == [row.encode() for row in ROWS]
    assert contents(tmp_path, glob="*.parquet") == [row.encode() for row in ROWS]


def test_a_row_that_is_not_utf8_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "\\ud800"}\n{"text": "fine"}\n{"text": null}\n')
    corpus = open_corpus(str(path))
    assert [document.content for document in corpus] == [b"fine"]
    assert corpus.skipped == {"not UTF-8": 1, "empty": 1}


def test_records_are_recognised_by_their_suffix_and_never_read_as_raw_text(tmp_path: Path) -> None:
    expected = [row.encode() for row in ROWS]
    lines = write_jsonl(tmp_path / "lines", ROWS).read_bytes()
    array = json.dumps([{"text": row} for row in ROWS], indent=1).encode()
    zstandard = pa.compress(lines, codec="zstd", asbytes=True)
    for name, content in {
        "a.jsonl": lines,
        "A.JSONL": lines,
        "a.ndjson": lines,
        "a.json": array,
        "lines.json": lines,
        "a.jsonl.gz": gzip.compress(lines),
        "c4.json.gz": gzip.compress(lines),
        "a.json.gz": gzip.compress(array),
        "a.jsonl.bz2": bz2.compress(lines),
        "a.ndjson.xz": lzma.compress(lines),
        "a.jsonl.zst": zstandard,
    }.items():
        folder = tmp_path / f"folder of {name}"
        folder.mkdir()
        (folder / name).write_bytes(content)
        assert contents(folder) == expected, name
        assert contents(folder / name) == expected, name
    (tmp_path / "parquet").mkdir()
    write_parquet(tmp_path / "parquet" / "A.PARQUET", [*ROWS])
    assert contents(tmp_path / "parquet") == expected


def test_json_without_a_list_of_records_is_text(tmp_path: Path) -> None:
    for number, content in enumerate(
        ('{"name": "x"}', '{\n "a": [{"text": 1}]\n}\n', "[1, 2]", '["x", {"text": "y"}]', "{}\n")
    ):
        path = tmp_path / f"{number}.json"
        path.write_text(content)
        assert contents(path) == [content.encode()]


def test_a_large_array_is_read_element_by_element(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "READ_AT_A_TIME", 7)
    rows = [f"{number} é ]," * (number % 9) + "x" for number in range(200)]
    (tmp_path / "rows.json").write_text(json.dumps([{"text": row} for row in rows], ensure_ascii=False))
    assert contents(tmp_path / "rows.json") == [row.encode() for row in rows]


def test_a_nested_field_is_named_with_dots(tmp_path: Path) -> None:
    rows = [{"meta": {"text": row}, "meta.lang": "x"} for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert contents(tmp_path / "rows.jsonl", text_field="meta.text") == [row.encode() for row in ROWS]
    assert contents(tmp_path / "rows.jsonl", text_field="meta.lang") == [b"x"] * 3
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert contents(tmp_path / "rows.parquet", text_field="meta.text") == [row.encode() for row in ROWS]
    with pytest.raises(DataError, match=r"3 no field 'meta\.body'; rows\.jsonl:1: it has: text;"):
        contents(tmp_path / "rows.jsonl", text_field="meta.body")


def test_a_column_of_bytes_is_text_when_it_is_utf8(tmp_path: Path) -> None:
    table = pa.table({"text": pa.array([b"fine", "é".encode(), b"\xff"], pa.binary())})
    pq.write_table(table, tmp_path / "rows.parquet")
    corpus = open_corpus(str(tmp_path / "rows.parquet"))
    assert [document.content for document in corpus] == [b"fine", "é".encode()]
    assert corpus.skipped == {"not UTF-8": 1}


def test_bad_lines_are_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    deep = b"[" * 100_000
    path.write_bytes(b'{"text": "a"}\n{"text": \n\xff\n{"body": "x"}\n' + deep + b'\n{"text": ["x"]}\n{"text": "b"}\n')
    corpus = open_corpus(str(path))
    assert [document.content for document in corpus] == [b"a", b"b"]
    assert corpus.skipped == {"not JSON": 3, "no field 'text'": 1, "field 'text' is list, expected text": 1}
    assert [item.id for item in corpus.left_out] == [f"rows.jsonl:{number}" for number in (2, 3, 4, 5, 6)]
    (tmp_path / "rows.json").write_text('[{"text": "a"}, {"text": 1}, {"text": "b"}, {"text')
    corpus = open_corpus(str(tmp_path / "rows.json"))
    assert [document.content for document in corpus] == [b"a", b"b"]
    assert corpus.skipped == {"field 'text' is int, expected text": 1, "not JSON from some record on": 1}


# -- encodings and names ---------------------------------------------------------------------------------


def test_utf16_and_utf32_with_a_byte_order_mark_are_decoded(tmp_path: Path) -> None:
    text = "naïve ∑ 😀\r\n" * 3000
    for encoding in ("utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-32-be"):
        mark = "" if encoding in ("utf-16", "utf-32") else "\ufeff"
        path = tmp_path / f"{encoding}.txt"
        path.write_bytes((mark + text).encode(encoding))
        pieces = contents(path)
        assert b"".join(pieces) == text.encode(), encoding
        assert len(pieces) > 1
        assert all(piece.endswith(b"\n") for piece in pieces)


def test_text_that_looks_like_utf16_is_reported_as_such(tmp_path: Path) -> None:
    (tmp_path / "le.txt").write_bytes(("plain words é\n" * 50).encode("utf-16-le"))
    (tmp_path / "be.txt").write_bytes(("plain words é\n" * 50).encode("utf-16-be"))
    (tmp_path / "bad.txt").write_bytes("x".encode("utf-16") + b"\x00\xd8")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\x02\0\0\0\2" + bytes(range(256)))
    (tmp_path / "good.txt").write_text("good")
    corpus = open_corpus(str(tmp_path))
    assert [document.content for document in corpus] == [b"good"]
    assert corpus.skipped == {
        "UTF-16 without a byte order mark": 2,
        "binary (NUL bytes)": 1,
        "not UTF-16, as its byte order mark says": 1,
    }


def test_a_line_without_an_end_is_cut_at_a_character(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (corpus_module, text_files):
        monkeypatch.setattr(module, "MAX_DOCUMENT", 100)
    monkeypatch.setattr(corpus_module, "SINGLE_FILE_PIECE", 50)
    path = tmp_path / "long.txt"
    path.write_text("é∑😀x" * 500)
    pieces = contents(path)
    assert b"".join(pieces) == path.read_bytes()
    assert all(piece.decode() for piece in pieces)
    assert max(map(len, pieces)) <= 154


def test_files_that_look_minified_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.min.js").write_text("x=1;" * 5000)
    (tmp_path / "b.js").write_text("x = 1;\n" * 5000)
    corpus = open_corpus(str(tmp_path))
    assert len(list(corpus)) == 2
    assert corpus.long_lines == ["a.min.js"]


# -- what cannot be read ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"text": ', r"rows\.jsonl: no usable document \(1 not JSON; rows\.jsonl:1: Expecting value"),
        ("rows.jsonl", b"\n\xff\xfe\n", r"no usable document \(1 not JSON; rows\.jsonl:2: .*codec can't decode"),
        (
            "rows.jsonl",
            b'{"id": 1, "content": "x"}\n' * 3,
            r"\(3 no field 'text'; rows\.jsonl:1: it has: id, content; set data\.text_field\)",
        ),
        ("rows.jsonl", b'["x"]\n', r"\(1 a JSON list, expected an object with 'text'\)"),
        ("rows.jsonl", b'{"text": 3}\n', r"\(1 field 'text' is int, expected text; .*set data\.text_field\)"),
        ("rows.jsonl.gz", b"\x1f\x8b\x08\0 this is no gzip", r"rows\.jsonl\.gz: damaged or cut short"),
        ("rows.jsonl.gz", b"plain", r"rows\.jsonl\.gz: damaged or cut short: Not a gzipped file"),
        ("rows.jsonl.zst", b"plain", r"rows\.jsonl\.zst: cannot read"),
        ("rows.jsonl.xz", b"plain", r"rows\.jsonl\.xz: damaged or cut short"),
        ("rows.json", b'[{"text": "x" "y"}]', r"1 not JSON from some record on; rows\.json: after 0: Expecting ',' "),
        ("rows.jsonl", b"", r"rows\.jsonl: no usable document: it is empty"),
        ("rows.parquet", b"PAR1 this is not parquet", r"rows\.parquet: not a readable parquet file"),
        ("note.txt", b"", r"note\.txt: no usable document \(1 empty\)"),
        ("note.txt", b"\0", r"note\.txt: no usable document \(1 binary \(NUL bytes\)\)"),
        ("note.txt", b"\xff", r"note\.txt: no usable document \(1 not UTF-8\)"),
    ],
)
def test_a_bad_source_is_named_with_the_reason_in_one_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        contents(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_parquet_file_without_the_field_lists_its_columns(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", ["x"], field="code")
    with pytest.raises(DataError, match=r"no field 'text'; .*it has: id, code; set data\.text_field"):
        contents(path)


def test_sources_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such file or folder"):
        open_corpus(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"no file matches glob '\*\.rs'"):
        open_corpus(str(tmp_path), "*.rs")
    with pytest.raises(DataError, match="no data set named"):
        open_corpus("hf:")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, 2)
    corpus = open_corpus(str(tmp_path))
    victim = next(tmp_path.rglob("*.txt"))
    victim.unlink()
    with pytest.raises(DataError, match=rf"{victim.name}: cannot read: No such file"):
        list(corpus)


# -- hf: -------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A local data set with a train and a test split, without access to the hub and with a separate cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    folder = tmp_path / "rows"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [f"train {number}\n" for number in range(20)])
    write_jsonl(folder / "test.jsonl", [f"test {number}\n" for number in range(5)])
    yield folder
    datasets.enable_progress_bars()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_is_read_through_the_datasets_library(hub_folder: Path, streaming: bool) -> None:
    train = [f"train {number}\n".encode() for number in range(20)]
    assert contents(f"hf:{hub_folder}", streaming=streaming) == train
    assert contents(f"hf:{hub_folder}:test", streaming=streaming) == [f"test {n}\n".encode() for n in range(5)]
    assert contents(f"hf:{hub_folder}@default:train", streaming=streaming) == train
    corpus = open_corpus(f"hf:{hub_folder}", streaming=streaming)
    assert list(corpus) == list(corpus)


def test_part_of_a_split_can_be_named(hub_folder: Path) -> None:
    assert contents(f"hf:{hub_folder}:train[:3]") == [b"train 0\n", b"train 1\n", b"train 2\n"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("suffix", "field", "message"),
    [
        (":nope", "text", "cannot load: .*nope"),
        ("@nope", "text", "cannot load: .*nope"),
        ("", "code", r"20 no field 'code'; train:0: it has: id, text"),
        ("-missing", "text", "cannot load"),
    ],
)
def test_a_data_set_that_cannot_be_loaded_is_one_line(
    hub_folder: Path, streaming: bool, suffix: str, field: str, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        contents(f"hf:{hub_folder}{suffix}", text_field=field, streaming=streaming)
    assert "\n" not in str(caught.value)
