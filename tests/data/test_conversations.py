"""From records of four forms to shards with a loss mask; what is no conversation is one clear line."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_cli.cli.app import main
from nanochat_cli.data.chat import ROLES, Turn, chat_tokens, render
from nanochat_cli.data.conversations import conversation_of, from_bytes, to_bytes
from nanochat_cli.data.manifest import SPLITS, Split
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.data.token_export import export_tokens
from nanochat_cli.errors import DataError
from tests.data.chat_sets import chat_set, messages, text_set, write_records

ASKED, ANSWER = Turn("user", "1+1?"), Turn("assistant", "2")
SYSTEM = Turn("system", "be brief")
FORMS: list[tuple[str, dict[str, Any], list[Turn]]] = [
    (
        "messages",
        {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}], "source": "x"},
        [ASKED, ANSWER],
    ),
    (
        "ShareGPT",
        {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}], "system": "be brief"},
        [SYSTEM, ASKED, ANSWER],
    ),
    ("prompt and completion", {"prompt": "1+1?", "completion": "2"}, [ASKED, ANSWER]),
    (
        "prompt and completion",
        {"prompt": [{"role": "user", "content": "1+1?"}], "completion": [{"role": "assistant", "content": "2"}]},
        [ASKED, ANSWER],
    ),
    ("Alpaca", {"instruction": "add", "input": "1 1", "output": "2"}, [Turn("user", "add\n\n1 1"), ANSWER]),
    ("Alpaca", {"instruction": "1+1?", "input": "", "output": "2"}, [ASKED, ANSWER]),
]


@pytest.mark.parametrize(("form", "record", "turns"), FORMS)
def test_every_form_is_recognised_by_its_fields(form: str, record: dict[str, Any], turns: list[Turn]) -> None:
    assert conversation_of(record) == (form, turns)


@given(turns=st.lists(st.builds(Turn, st.sampled_from(ROLES), st.text(st.characters(exclude_categories=["Cs"])))))
def test_turns_survive_as_a_document(turns: list[Turn]) -> None:
    assert from_bytes(to_bytes(turns)) == turns


def role(name: Any) -> dict[str, Any]:
    return {"messages": [{"role": name, "content": "x"}, {"role": "assistant", "content": "y"}]}


MISTAKES: list[tuple[Any, str]] = [
    (role("robot"), "message 1 has the unknown role 'robot'; known: system, user, assistant, tool"),
    (role(3), "message 1 has the unknown role 3"),
    ({"messages": []}, "an empty conversation"),
    ({"messages": "hello"}, "a str where the list of messages should be"),
    ({"messages": [{"role": "user", "content": "x"}]}, "no turn of the assistant"),
    ({"messages": [{"role": "assistant", "content": None}]}, "the text of message 1 is NoneType, expected text"),
    ({"messages": [{"role": "assistant", "content": ""}]}, "is empty, and it is an answer"),
    ({"messages": [{"role": "assistant", "content": "\ud800"}]}, "is not valid Unicode"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}, "message 1 has tool_calls"),
    ({"messages": ["x"]}, "message 1 is no object with 'role' and 'content'"),
    ({"instruction": 1, "output": "2"}, "instruction is int, expected text"),
    ({"text": "plain"}, "no conversation: it has text, expected messages (messages); conversations (ShareGPT)"),
    ([1, 2], "a JSON list, expected an object"),
]


@pytest.mark.parametrize(("record", "words"), MISTAKES, ids=[words for _, words in MISTAKES])
def test_a_row_that_is_no_conversation_is_named_with_its_place(folder: Path, record: Any, words: str) -> None:
    with pytest.raises(DataError) as caught:
        chat_set(folder, [*messages(3), record], "bad")
    assert str(caught.value).startswith("bad.jsonl:4: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def documents(reader: ShardReader, split: Split) -> list[tuple[list[int], list[int]]]:
    found = []
    for shard in reader.shards(split):
        assert shard.loss_mask is not None
        for start, stop in zip(shard.doc_offsets[:-1].tolist(), shard.doc_offsets[1:].tolist(), strict=True):
            found.append((shard.tokens[start:stop].tolist(), shard.loss_mask[start:stop].tolist()))
    return found


def test_shards_hold_every_conversation_and_which_of_its_tokens_are_trained(tmp_path: Path) -> None:
    records = messages(60)
    reader = chat_set(tmp_path, records)
    turns = [conversation_of(record).turns for record in records]
    expected = [(one.tokens.tolist(), one.trained.astype(int).tolist()) for one in render(turns, reader.tokenizer)]
    sides = {split: documents(reader, split) for split in SPLITS}
    assert sides["val"]
    assert sorted(sides["train"] + sides["val"]) == sorted(expected)
    assert sides["train"] == [document for document in expected if document in sides["train"]]
    manifest = reader.manifest
    assert manifest.chat is not None
    assert manifest.chat.forms == {"messages": 60}
    assert (manifest.chat.train, manifest.chat.val) == tuple(
        sum(sum(mask) for _, mask in sides[split]) for split in SPLITS
    )
    special = list(reader.tokenizer.special_tokens.values())
    for split in SPLITS:
        tokens = reader.tokens(split)[:]
        text = reader.tokenizer.decode_bytes(tokens[~np.isin(tokens, special)].tolist())
        assert manifest.split(split).bytes == len(text)
    assert manifest.tokenizer.sha256 == ShardReader(tmp_path / "base").manifest.tokenizer.sha256


def test_the_command_reads_compressed_and_tabular_rows_in_the_tokens_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    monkeypatch.chdir(tmp_path)
    text_set(tmp_path)
    rows = [record for _, record, _ in FORMS if "messages" in record or "output" in record]
    rows += messages(20)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    Path("a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    Path("b.json").write_text(json.dumps(rows))
    parquet.write_table(pa.Table.from_pylist(rows, schema=_schema(rows)), "c.parquet")
    for name in ("a.jsonl.gz", "b.json", "c.parquet"):
        assert main(["tokenize", "--source", name, "--chat", "--tokenizer", "base", "--out", f"out-{name}"]) == 0
        found = ShardReader(Path(f"out-{name}")).manifest.chat
        assert found is not None
        assert found.forms == {"messages": 21, "Alpaca": 2}
    assert "conversations: 21 messages, 2 Alpaca" in capfd.readouterr().err
    assert main(["tokenize", "--source", "b.json", "--chat", "--tokenizer", "base", "--out", "out-b.json"]) == 0
    assert "already prepared" in capfd.readouterr().err


def _schema(rows: list[dict[str, Any]]) -> Any:
    import pyarrow as pa

    return pa.unify_schemas([pa.Table.from_pylist([row]).schema for row in rows])


REFUSED = [
    (["--source", "chat.jsonl", "--chat"], 2, "--tokenizer"),
    (["--source", "text", "--chat", "--tokenizer", "base"], 3, "conversations are read from a file of records"),
    (["--source", "plain.txt", "--chat", "--tokenizer", "base"], 3, "plain.txt: not a file of records"),
    (["--source", "chat.jsonl", "--chat", "--functions", "--tokenizer", "base"], 2, "functions = false"),
    (["--source", "chat.jsonl", "--chat", "--set", "data.generated=remove"], 2, 'generated = "keep"'),
    (["--source", "broken.jsonl", "--chat", "--tokenizer", "base"], 3, "broken.jsonl:1: not JSON"),
    (["--source", "chat.jsonl", "--chat", "--tokenizer", "missing"], 3, "missing: no such file"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    text_set(folder)
    write_records(folder / "chat.jsonl", messages(5))
    (folder / "plain.txt").write_text("text")
    (folder / "broken.jsonl").write_text("{\n")
    return folder


@pytest.mark.parametrize(("arguments", "code", "words"), REFUSED)
def test_what_cannot_be_read_as_conversations_is_one_line(
    folder: Path,
    arguments: list[str],
    code: int,
    words: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    assert main(["tokenize", *arguments, "--out", "out"]) == code
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert words in error
    assert not (folder / "out" / "manifest.json").exists()


def test_the_stop_token_ends_every_conversation_and_is_nowhere_else(tmp_path: Path) -> None:
    reader = chat_set(tmp_path, messages(20))
    stop = chat_tokens(reader.tokenizer).stop
    for split in SPLITS:
        assert all(tokens.index(stop) == len(tokens) - 1 for tokens, _ in documents(reader, split))


def test_token_files_cannot_hold_the_mask(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot say which of their tokens are trained"):
        export_tokens(chat_set(tmp_path, messages(20)), "nanotron", tmp_path / "out")
    assert not (tmp_path / "out").exists()
