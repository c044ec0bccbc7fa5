"""Small data sets of conversations, and the text beside them."""

import json
import random
from pathlib import Path
from typing import Any

from nanochat_cli.data.prepare import prepare_dataset
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.report.reporter import QuietReporter
from tests.data.corpora import make_config, random_text, write_folder

VOCAB = 400


def messages(count: int, seed: int = 0, longest: int = 60) -> list[dict[str, Any]]:
    """Records with one or two answers, no two alike."""
    rng = random.Random(seed)

    def said(role: str, number: int) -> dict[str, str]:
        return {"role": role, "content": f"{number} {random_text(rng, rng.randrange(2, longest))}"}

    return [
        {"messages": [said(role, number) for _ in range(rng.randrange(1, 3)) for role in ("user", "assistant")]}
        for number in range(count)
    ]


def write_records(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def text_set(folder: Path) -> ShardReader:
    """A data set of text, with a tokenizer of its own."""
    write_folder(folder / "text", 60)
    prepare_dataset(str(folder / "text"), folder / "base", make_config(), QuietReporter())
    return ShardReader(folder / "base")


def chat_set(folder: Path, records: list[Any], name: str = "chat") -> ShardReader:
    """A data set of conversations in the tokens of `text_set`, which is made if it is not there."""
    if not (folder / "base").exists():
        text_set(folder)
    source = write_records(folder / f"{name}.jsonl", records)
    config = make_config(data={"chat": True, "dedup": "none"}, tokenizer={"path": folder / "base" / "tokenizer.json"})
    prepare_dataset(str(source), folder / name, config, QuietReporter())
    return ShardReader(folder / name)
