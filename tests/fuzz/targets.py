"""The readers of bytes that others wrote, each as one function of bytes, with valid seeds that the product itself made.

The contract of `target.read(data)`: it returns, or raises the product's own error in one line; nothing else escapes it.
"""

import hashlib
import inspect
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from nanochat_cli.config.load import config_to_toml, load_run_config, resolve_config
from nanochat_cli.config.schema import Config, ExportConfig
from nanochat_cli.data.chat import render
from nanochat_cli.data.conversation_files import open_conversations
from nanochat_cli.data.conversations import from_bytes
from nanochat_cli.data.manifest import MANIFEST, ShardInfo, read_manifest
from nanochat_cli.data.shards import Shard
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.engine import Engine
from nanochat_cli.evaluation.problems import load_problems
from nanochat_cli.export.huggingface import stored_values
from nanochat_cli.formats.gguf import write
from nanochat_cli.formats.gguf.read import load_gguf
from nanochat_cli.formats.gguf.write import export_gguf
from nanochat_cli.formats.huggingface.files import CHECKSUMS, CONFIG_JSON, WEIGHTS
from nanochat_cli.formats.huggingface.read import read_folder
from nanochat_cli.formats.huggingface.write import write_folder
from nanochat_cli.formats.run import checkpoints
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.report.reporter import QuietReporter
from nanochat_cli.rl.experience import Experience, ExperienceLibrary
from nanochat_cli.sandbox.limits import Outcome
from nanochat_cli.sandbox.process import Ended
from nanochat_cli.sandbox.python import judge, plain_values
from nanochat_cli.sandbox.rust import judge as rust_judge
from nanochat_cli.sandbox.rust.cases import reports
from tests.data import corpora
from tests.inference.tiny_models import spread_model, tiny_config
from tests.rl.tiny_run import problem


class Target(NamedTuple):
    """mutations: how many fixed ones every test run tries."""

    name: str
    read: Callable[[bytes], object]
    seeds: list[bytes]
    mutations: int


@contextmanager
def targets(work: Path, *, serving: bool = True) -> Iterator[list[Target]]:
    """All targets, which write what they read below `work`. serving: with the server, which runs meanwhile."""
    tokenizer = Tokenizer.train([inspect.getsource(json)], 300)
    sizes = {"vocab_size": 300, "dim": 64, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "ffn_dim": 64}
    model = spread_model(tiny_config(**sizes, max_seq_len=32))
    found = [
        _gguf(work, model, tokenizer),
        *_hugging_face(work, model, tokenizer),
        *_data_set(work),
        _checkpoint(work),
        _tokenizer(work, tokenizer),
        *_configurations(work),
        _experiences(work),
        _problems(work),
        *_conversations(work, tokenizer),
        *_sandbox(),
    ]
    if not serving:
        yield found
        return
    with _server() as server:
        yield [*found, server]


def _gguf(work: Path, model: Transformer, tokenizer: Tokenizer) -> Target:
    seeds = []
    for kind, sealed in (("q2_0", True), ("q2_0", False), ("f16", False)):
        # Without the checksum of its tensors, which refuses most mutations before anything else looks at them.
        with nullcontext() if sealed else mock.patch.object(write, "add_checksum"):
            export_gguf(model, tokenizer, work / "seed.gguf", ExportConfig(type=kind), {"run": "seed"})
        seeds.append((work / "seed.gguf").read_bytes())
    return Target("gguf", lambda data: load_gguf(_written(work / "model.gguf", data)), seeds, 30)


def _hugging_face(work: Path, model: Transformer, tokenizer: Tokenizer) -> Iterator[Target]:
    """The weights beside an intact configuration, and the other way round."""
    for name, file, mutations in (("safetensors", WEIGHTS, 30), ("hf-config", CONFIG_JSON, 60)):
        folder = work / name
        write_folder(model.config, stored_values(model, ExportConfig()), tokenizer, folder)
        (folder / CHECKSUMS).unlink()  # it would refuse most mutations before anything else looks at them
        seed = (folder / file).read_bytes()

        def read(data: bytes, path: Path = folder / file) -> None:
            _written(path, data)
            read_folder(path.parent)

        yield Target(name, read, [seed], mutations)


def _data_set(work: Path) -> Iterator[Target]:
    """A manifest, and a shard whose manifest says that it is as it should be."""
    corpora.write_folder(work / "corpus", 12)
    Engine(QuietReporter()).tokenize(str(work / "corpus"), work / "data", corpora.make_config())
    manifest = (work / "data" / MANIFEST).read_bytes()
    yield Target("manifest", lambda data: read_manifest(_written(work / "m" / MANIFEST, data).parent), [manifest], 240)
    info = read_manifest(work / "data").train.shards[0]
    shard = (work / "data" / info.file).read_bytes()

    def read(data: bytes) -> None:
        path = _written(work / "shard.safetensors", data)
        described: ShardInfo = info.model_copy(update={"size": len(data), "sha256": hashlib.sha256(data).hexdigest()})
        Shard(path, described).require_vocabulary(400, path, read=True)

    yield Target("shard", read, [shard], 240)


def _checkpoint(work: Path) -> Target:
    run = work / "run"
    path = checkpoints.save(run, 3, {}, {"nested": [1, (2.5, None)]}, model_config={"dim": 64}) / "state.json"

    def read(data: bytes) -> None:
        # With the seal that a damaged file would lack, or the mutation would never get further.
        try:
            document = json.loads(data)
            document.pop("sha256", None)
            data = checkpoints._seal(document).encode()
        except (ValueError, AttributeError, TypeError, RecursionError):
            pass
        _written(path, data)
        checkpoints.load(run)

    return Target("checkpoint", read, [path.read_bytes()], 200)


def _tokenizer(work: Path, tokenizer: Tokenizer) -> Target:
    seed = tokenizer.to_str().encode()
    return Target("tokenizer", lambda data: Tokenizer.load(_written(work / "tokenizer.json", data)), [seed], 120)


def _configurations(work: Path) -> Iterator[Target]:
    """What a person writes, and what a run has."""
    whole = config_to_toml(Config.model_validate({"run": {"name": "seed"}}), "A seed.").encode()
    flat = b'use_mtp = true\nbatch_size = 4\nlearning_rate = 3e-4\n[data]\nsource = "stdlib"\n'
    flat += b"[model]\ndim = 64\nn_heads = 2\nn_kv_heads = 1\n"

    def read(data: bytes) -> None:
        resolve_config(file=_written(work / "config" / "config.toml", data))

    yield Target("toml", read, [flat, b'base = "quickstart"\n' + flat], 120)
    yield Target(
        "run-config", lambda data: load_run_config(_written(work / "c" / "config.toml", data).parent), [whole], 40
    )


def _experiences(work: Path) -> Target:
    path = work / "seed.jsonl"
    ExperienceLibrary(path).add([Experience(f"p{n}", "answer\n", 1.0, 0.5, 1e9, {"problem": n}) for n in range(4)])

    def read(data: bytes) -> None:
        library = ExperienceLibrary(_written(work / "library.jsonl", data))
        library.add(library.experiences[:1])
        library.statistics()

    return Target("experiences", read, [path.read_bytes()], 200)


def _problems(work: Path) -> Target:
    seed = "".join(json.dumps(problem(n)) + "\n" for n in range(3)).encode()
    published = {"task_id": "t/0", "prompt": "def f(x):\n", "entry_point": "f", "canonical_solution": "    return x\n"}
    published["test"] = "def check(candidate):\n    assert candidate(1) == 1\n"
    seeds = [seed, json.dumps(published).encode() + b"\n"]
    return Target("problems", lambda data: load_problems(_written(work / "problems.jsonl", data)), seeds, 100)


def _conversations(work: Path, tokenizer: Tokenizer) -> Iterator[Target]:
    """All four forms of records, as lines and as one array, up to their tokens."""
    records = [
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
        {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}], "system": "s"},
        {"prompt": "x", "completion": "y"},
        {"instruction": "do", "input": "x", "output": "y"},
    ]

    def read(path: Path) -> None:
        render([from_bytes(one.content) for one in open_conversations(str(path))], tokenizer)

    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    yield Target("conversations", lambda data: read(_written(work / "chat.jsonl", data)), [lines], 100)
    array = json.dumps(records).encode()
    yield Target("conversations-array", lambda data: read(_written(work / "chat.json", data)), [array], 50)


def _sandbox() -> Iterator[Target]:
    """What a program under test can send: messages of Python's grader and program, rustc's lines, a crate's reports."""
    passed = [{"compiled": True, "diagnostics": [["warning", "w", 3]]}, {"run": True}, {"passed": True}]
    failed = [{"compiled": True}, {"run": False, "message": "ZeroDivisionError", "line": 2}]

    def lines(messages: list[dict]) -> bytes:
        return b"".join(json.dumps(message).encode() + b"\n" for message in messages)

    def verdict(data: bytes) -> None:
        outcome, ended = Outcome("ran", "ok"), Ended(0, None, None, 0.1)
        judged = judge._judged(outcome, ended, judge._messages(bytearray(data)), 3)
        assert judged.total == len(judged.results) == 3

    def value(data: bytes) -> None:
        with suppress(
            plain_values.Refused, TypeError, ValueError, OverflowError, RecursionError
        ):  # each is a test that failed
            plain_values.decode((plain_values.read(io.BytesIO(data)) or {}).get("value"), lambda number: [number])

    values = plain_values.encode({"a": [1, 2.5, (True, b"x")], "b": {1 + 2j}}, lambda _: 7)
    rustc = {"$message_type": "diagnostic", "level": "error", "message": "m", "code": {"code": "E0308"}}
    rustc["spans"] = [{"is_primary": True, "line_start": 3}]
    yield Target("verdict", verdict, [lines(passed), lines(failed)], 100)
    yield Target("plain-value", value, [json.dumps({"value": values}).encode() + b"\n", lines(failed)], 100)
    yield Target(
        "rustc", lambda data: rust_judge._diagnostics(data.decode(errors="replace")), [lines([rustc] * 2)], 100
    )
    yield Target("crate", reports, [b"0 3\nabc\n1 panic\n2 5\n[1,\n]\n"], 100)


PATHS = ("/v1/completions", "/v1/chat/completions", "/infill", "/tokenize", "/detokenize", "/apply-template")


@contextmanager
def _server() -> Iterator[Target]:
    """Bodies of requests; the first byte of the data says which path gets the rest."""
    from fastapi.testclient import TestClient

    from nanochat_cli.serve.app import create_app
    from nanochat_cli.serve.engine import NativeEngine
    from nanochat_cli.serve.rules import rules_for
    from tests.serve.live import tiny_served

    message = [{"role": "user", "content": "x"}]
    bodies = (
        {"prompt": "x = ", "max_tokens": 2, "temperature": 0.5, "seed": 1, "stop": ["\n"], "logprobs": 1},
        {"messages": message, "max_tokens": 2, "n": 2},
        {"input_prefix": "def f(", "input_suffix": "return", "n_predict": 2},
        {"content": "x = 1", "with_pieces": True},
        {"tokens": [1, 2, 3]},
        {"messages": message},
    )
    engine = NativeEngine(lambda: served, 1, 4)
    served = tiny_served(context=32)
    with TestClient(create_app(engine, rules_for("127.0.0.1", None)), base_url="http://127.0.0.1") as client:
        while client.get("/health").status_code != 200:
            pass

        def read(data: bytes) -> None:
            path = PATHS[data[0] % len(PATHS)] if data else PATHS[0]
            found = client.post(path, content=data[1:], headers={"Content-Type": "application/json"})
            assert found.status_code < 500, found.text
            if found.status_code >= 400:
                assert set(found.json()["error"]) == {"message", "type", "param", "code"}

        yield Target("http", read, [bytes([n]) + json.dumps(body).encode() for n, body in enumerate(bodies)], 70)


def _written(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path
