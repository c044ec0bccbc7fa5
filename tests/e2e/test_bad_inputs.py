"""Bad inputs to the commands, on a real data set, run and GGUF file: one clear line, the documented exit code, no loss.

Mistakes that need neither data nor a model (spelling, types, options) are in tests/cli/test_bad_input.py; here are
those that are found in files. Exit codes: 2 bad usage or configuration, 3 bad input.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from nanochat_cli.cli.app import main
from nanochat_cli.formats.gguf.checksum import KEY as CHECKSUM
from tests.e2e.tiny import TINY, write_corpus

USAGE, DATA = 2, 3
NANOCHAT = [sys.executable, "-m", "nanochat_cli.cli.app"]
CHECKPOINT = "runs/tiny/checkpoints/step-000004"
TRAIN = ["train", *TINY, "--name", "new", "--set", "train.total_steps=4", "--set", "checkpoint.interval=2"]
TRAIN_ON_SRC = [*TRAIN, "--set", "data.path=data/src"]
TOKENIZE_SRC = ["tokenize", "--source", "src", "--vocab-size", "300", "--out", "data/src"]
RESUME = ["train", "--resume", "tiny", "--set", "train.total_steps=8"]
TOKENIZE = ["tokenize", "--vocab-size", "300", "--out", "data/new", "--source"]

Change = Callable[[], object]


@dataclass(frozen=True)
class Mistake:
    """A command line, what was wrong before it, its exit code, and what its one line of error must say.

    disk: bytes that a file may have, as on a full disk. changes: files that the command rightly writes before it fails.
    """

    name: str
    line: list[str]
    code: int
    says: str
    before: Change | None = None
    disk: int | None = None
    changes: tuple[str, ...] = ()


# -- what can be wrong with a file --------------------------------------------------------------------------


def write(path: str, content: bytes) -> Change:
    return lambda: Path(path).write_bytes(content)


def cut(path: str, size: int) -> Change:
    """Keep only the first `size` bytes; a negative size counts from the end."""
    return lambda: Path(path).write_bytes(Path(path).read_bytes()[:size])


def flip(path: str) -> Change:
    """Flip one bit of the last byte."""

    def change() -> None:
        content = bytearray(Path(path).read_bytes())
        content[-1] ^= 1
        Path(path).write_bytes(bytes(content))

    return change


def remove(path: str) -> Change:
    return lambda: shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


def replace(path: str, other: str) -> Change:
    """Replace `path` by a copy of another file."""

    def change() -> None:
        remove(path)()
        shutil.copytree(other, path) if Path(other).is_dir() else shutil.copy(other, path)

    return change


def write_parquet(path: str, column: str) -> Change:
    return lambda: parquet.write_table(pa.table({column: ["x = 1\n", "y = 2\n"]}), path)


def write_gguf(path: str, arch: str) -> Change:
    """Write a valid GGUF file with one tensor."""

    def change() -> None:
        writer = gguf.GGUFWriter(path, arch)
        writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return change


def change_gguf(path: str, tokens: int | None = None, nan: str | None = None, **fields: int) -> Change:
    """A copy of the exported file with other metadata, a vocabulary cut to `tokens`, or a tensor of NaN."""

    def change() -> None:
        reader = gguf.GGUFReader("runs/tiny/model.gguf")
        arch = reader.fields["general.architecture"].contents()
        writer = gguf.GGUFWriter(path, arch)
        changed = {f"{arch}.{key}": value for key, value in fields.items()}
        for name, field in reader.fields.items():
            if name.startswith("GGUF.") or name in ("general.architecture", CHECKSUM):
                continue
            value, kind = field.contents(), field.types[0]
            if tokens is not None and name in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"):
                value = value[:tokens]
            if tokens is not None and name == "tokenizer.ggml.merges":
                value = value[:1]
            writer.add_key_value(
                name, changed.get(name, value), kind, field.types[-1] if len(field.types) > 1 else None
            )
        for tensor in reader.tensors:
            data = np.full_like(tensor.data, np.nan) if tensor.name == nan else tensor.data
            writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return change


# -- the table ----------------------------------------------------------------------------------------------

CONFIGURATION = [
    Mistake("typo in a key", [*TRAIN, "--set", "train.batch_sise=4"], USAGE, "did you mean train.batch_size?"),
    Mistake("wrong type", [*TRAIN, "--set", "model.n_layers=two"], USAGE, "must be an integer, not a string"),
    Mistake("unknown preset", ["train", "--preset", "nano-125n"], USAGE, "did you mean nano-125m?"),
    Mistake("no such device", [*TRAIN_ON_SRC, "--set", "train.device=gpu"], USAGE, "use auto or cpu"),
    Mistake("a device too many", [*TRAIN_ON_SRC, "--set", "train.device=cuda:99"], USAGE, "train.device = cuda:99"),
    Mistake("vocabulary below the bytes", [*TOKENIZE, "src", "--vocab-size", "9"], USAGE, "need at least 266"),
    Mistake("vocabulary of trillions", [*TOKENIZE, "src", "--vocab-size", str(10**12)], USAGE, "at most 1048576"),
    Mistake("K no multiple of the block", ["export", "tiny", "--type", "tq2_0"], USAGE, "one of q2_0, q4_0, f16"),
    Mistake("K no multiple of the scale", [*TRAIN, "--set", "model.quant.scale=128"], USAGE, "multiple of quant.scale"),
    Mistake("penalty of zero", ["generate", "tiny", "--repetition-penalty", "0"], USAGE, "repetition_penalty = 0.0"),
    Mistake("penalty of almost nothing", ["generate", "tiny", "--repetition-penalty", "1e-40"], USAGE, "0.001 to 1000"),
    Mistake("temperature of almost nothing", ["generate", "tiny", "--temperature", "1e-39"], USAGE, "from 1e-6 to 1e6"),
    Mistake("name that is not UTF-8", [*TRAIN, "--name", "x\udcff"], USAGE, r"argument x\udcff is not UTF-8"),
    Mistake("file name that is not UTF-8", [*TRAIN, "--config", "\udcff.toml"], USAGE, "is not UTF-8"),
    Mistake("setting that is not UTF-8", [*TRAIN, "--set", "data.source=\udcff"], USAGE, "is not UTF-8"),
    Mistake("run name that is not UTF-8", ["eval", "\udce9"], USAGE, "is not UTF-8"),
    Mistake(
        "configuration of brackets",
        [*TRAIN, "--config", "deep.toml"],
        USAGE,
        "deep.toml: not valid TOML: nested too deep",
        write("deep.toml", b"x = " + b"[" * 100_000),
    ),
    Mistake("setting of brackets", [*TRAIN, "--set", "train.total_steps=" + "[" * 5000], USAGE, "train.total_steps"),
    Mistake("temperature not a number", ["generate", "tiny", "--temperature", "nan"], USAGE, "--temperature"),
    Mistake("infinite temperature", ["generate", "tiny", "--temperature", "inf"], USAGE, "temperature = inf"),
    Mistake("top-p of zero", ["generate", "tiny", "--top-p", "0"], USAGE, "top_p = 0.0 is out of range"),
    Mistake("empty stop string", ["generate", "tiny", "--stop", ""], USAGE, "not empty"),
    Mistake("seed of 70 bits", ["generate", "tiny", "--seed", str(2**70)], USAGE, "seed = "),
]

CORPUS = [
    Mistake("missing source", [*TOKENIZE, "nowhere"], DATA, "nowhere: no such file or folder"),
    Mistake("missing source of a run", [*TRAIN, "--set", "data.source=nowhere"], DATA, "nowhere: no such file"),
    Mistake("empty corpus", [*TOKENIZE, "empty"], DATA, "empty: no file matches", lambda: Path("empty").mkdir()),
    Mistake("glob without a match", [*TOKENIZE, "src", "--glob", "*.rs"], DATA, "no file matches glob '*.rs'"),
    Mistake("empty file", [*TOKENIZE, "x.txt"], DATA, "no usable document (1 empty)", write("x.txt", b"")),
    Mistake("one-byte corpus", [*TOKENIZE, "x.txt"], DATA, "(1 bytes), but one must be held out", write("x.txt", b"x")),
    Mistake("binary file", [*TOKENIZE, "x.dat"], DATA, "(1 binary (NUL bytes))", write("x.dat", bytes(range(256)))),
    Mistake("not UTF-8", [*TOKENIZE, "x.txt"], DATA, "(1 not UTF-8)", write("x.txt", "café ".encode("latin-1") * 99)),
    Mistake("jsonl line that is not JSON", [*TOKENIZE, "x.jsonl"], DATA, "left out: 1 not JSON: x.jsonl:2 (not JSON)",
            write("x.jsonl", b'{"text": "a"}\n{text: b}\n')),
    Mistake("jsonl without the column", [*TOKENIZE, "x.jsonl"], DATA, "it has: code",
            write("x.jsonl", b'{"code": "a"}\n')),
    Mistake("parquet without the column", [*TOKENIZE, "x.parquet"], DATA, "it has: code",
            write_parquet("x.parquet", "code")),
    Mistake("not a parquet file", [*TOKENIZE, "x.parquet"], DATA, "x.parquet: not a readable parquet file",
            write("x.parquet", b"PAR1")),
    Mistake("hf: without a name", [*TOKENIZE, "hf:"], DATA, "write hf:NAME"),
    Mistake("not a tokenizer", [*TOKENIZE, "src", "--tokenizer", "src/f1.py"], DATA, "not a tokenizer.json"),
    Mistake("tokenizer with too many tokens",
            [*TOKENIZE, "src", "--tokenizer", "data/src/tokenizer.json", "--vocab-size", "280"],
            DATA, "set model.vocab_size=300"),
]  # fmt: skip

SHARDS = [
    Mistake("truncated shard", TRAIN_ON_SRC, DATA, "run `nanochat tokenize` again",
            cut("data/src/train-00000.safetensors", -10)),
    Mistake("wrong hash", TRAIN_ON_SRC, DATA, "its sha256 differs from manifest.json",
            flip("data/src/train-00000.safetensors")),
    Mistake("missing shard", TRAIN_ON_SRC, DATA, "missing shard", remove("data/src/val-00000.safetensors")),
    Mistake("damaged manifest", TRAIN_ON_SRC, DATA, "damaged manifest", write("data/src/manifest.json", b"{")),
    Mistake("tokenizer of another data set", TRAIN_ON_SRC, DATA, "tokenizer.json: its sha256",
            replace("data/src/tokenizer.json", "data/other/tokenizer.json")),
    Mistake("bad setting over a good data set", [*TOKENIZE_SRC, "--force", "--vocab-size", "9"], USAGE,
            "need at least 266"),
    Mistake("bad source over a good data set", [*TOKENIZE, "x.txt", "--out", "data/src", "--force"], DATA,
            "(1 empty)", write("x.txt", b"")),
    Mistake("no data set", [*TRAIN, "--set", "data.path=src"], DATA, "data.path = src: not a data set"),
    Mistake("another vocabulary", [*TRAIN, "--set", "data.path=data/other"], DATA, "tokenised with 280 tokens"),
    Mistake("sequence longer than the corpus",
            [*TRAIN_ON_SRC, "--set", "model.max_seq_len=100000", "--set", "train.seq_len=100000"],
            DATA, "give more text or lower train.seq_len"),
    Mistake("data set gone", ["eval", "tiny"], DATA, "data/src: not a data set: no manifest.json", remove("data/src")),
    Mistake("data set exchanged", ["eval", "tiny"], DATA, "has a different tokenizer from runs/tiny",
            replace("data/src", "data/other")),
]  # fmt: skip

RUNS = [
    Mistake("resume of nothing", ["train", "--resume"], DATA, "no run with a checkpoint here", remove("runs")),
    Mistake("resume of no run", ["train", "--resume", "src"], DATA, "src: not a run of nanochat train"),
    Mistake("damaged checkpoint", RESUME, DATA, "write step-000002 into runs/tiny/checkpoints/latest",
            flip(f"{CHECKPOINT}/model.safetensors")),
    Mistake("truncated optimizer state", RESUME, DATA, "optimizer.safetensors has 100 bytes",
            cut(f"{CHECKPOINT}/optimizer.safetensors", 100)),
    Mistake("damaged state", RESUME, DATA, "state.json is not a state file", write(f"{CHECKPOINT}/state.json", b"{")),
    Mistake("deep state", ["generate", "tiny"], DATA, "state.json is not a state file",
            write(f"{CHECKPOINT}/state.json", b"[" * 100_000 + b"]" * 100_000)),
    Mistake("pointer to nothing", RESUME, DATA, "there is no checkpoint of step 9 (saved steps: 2, 4)",
            write("runs/tiny/checkpoints/latest", b"step-000009\n")),
    Mistake("binary pointer", RESUME, DATA, "write the name of a checkpoint folder into it",
            write("runs/tiny/checkpoints/latest", b"\xff\xfe")),
    Mistake("resume as another model", [*RESUME, "--set", "model.dim=128"], DATA, "model.dim is 64 there and 128 here"),
    Mistake("resume with another optimizer", [*RESUME, "--set", "optim.matrix=adamw"], DATA, "another optim.matrix"),
    Mistake("checkpoint of another model", ["generate", "tiny"], DATA, "model.vocab_size is 280 there and 300 here",
            replace("runs/tiny/checkpoints", "runs/other/checkpoints")),
    Mistake("resume with another tokenizer", RESUME, DATA, "data/src has a different tokenizer from runs/tiny",
            lambda: main([*TOKENIZE_SRC, "--force", "--set", "tokenizer.max_token_length=2"])),
    Mistake("damaged run configuration", RESUME, USAGE, "runs/tiny/config.toml: not valid TOML",
            write("runs/tiny/config.toml", b"[model\n")),
    Mistake("evaluation of a damaged checkpoint", ["eval", "tiny"], DATA, "model.safetensors does not match its SHA",
            flip(f"{CHECKPOINT}/model.safetensors")),
    Mistake("export of a missing checkpoint", ["export", "tiny"], DATA, "model.safetensors is missing",
            remove(f"{CHECKPOINT}/model.safetensors")),
    Mistake("export of no run", ["export", "runs/tiny/model.gguf"], DATA, "a GGUF file, but this needs the run"),
    Mistake("a part of a run", ["eval", "runs/tiny/checkpoints"], DATA, "name the run's folder"),
    Mistake("damaged results", ["export", "tiny", "--no-verify", "--out", "new.gguf"], DATA, "results.json is damaged",
            write("runs/tiny/results.json", b"[]")),
    Mistake("run without a tokenizer", ["generate", "tiny"], DATA, "runs/tiny/tokenizer.json: cannot read",
            remove("runs/tiny/tokenizer.json")),
    Mistake("tokenizer of another vocabulary", ["generate", "tiny"], DATA, "has 280 tokens and the model 300",
            replace("runs/tiny/tokenizer.json", "runs/other/tokenizer.json")),
    Mistake("prompt longer than the context", ["generate", "tiny", "-p", "§" * 300], DATA, "shorten the prompt"),
]  # fmt: skip

GGUF = [
    Mistake("no such file", ["generate", "nowhere.gguf"], DATA, "nowhere.gguf: no such file"),
    Mistake("not a GGUF", ["generate", "x.gguf"], DATA, "x.gguf is not a GGUF file", write("x.gguf", b"hello " * 99)),
    Mistake("empty GGUF", ["generate", "x.gguf"], DATA, "x.gguf is not a GGUF file", write("x.gguf", b"")),
    *(
        Mistake(f"GGUF cut to {size}", ["generate", "runs/tiny/model.gguf"], DATA, "is damaged or incomplete",
                cut("runs/tiny/model.gguf", size))
        for size in (20, 3000, -1000)
    ),
    Mistake("GGUF of another arch", ["generate", "x.gguf"], DATA, "'gpt2' is not one", write_gguf("x.gguf", "gpt2")),
    Mistake("GGUF with another vocabulary", ["generate", "x.gguf"], DATA, "280 tokens and token_embd.weight 300 rows",
            change_gguf("x.gguf", tokens=280)),
    Mistake("GGUF with 20000 blocks", ["generate", "x.gguf"], DATA, "qwen3.block_count = 20000, but the file has only",
            change_gguf("x.gguf", block_count=20000)),
    Mistake("GGUF with a context of 2³¹", ["generate", "x.gguf"], DATA, "max_seq_len",
            change_gguf("x.gguf", context_length=2**31 - 1)),
    Mistake("GGUF of no heads", ["generate", "x.gguf"], DATA, "qwen3.attention.head_count = 0 is not a valid count",
            change_gguf("x.gguf", **{"attention.head_count": 0})),
    Mistake("GGUF of weights that are no numbers", ["generate", "x.gguf"], DATA, "logits are not finite",
            change_gguf("x.gguf", nan="output_norm.weight")),
    Mistake("GGUF without metadata", ["generate", "x.gguf"], DATA, "is missing", write_gguf("x.gguf", "llama")),
]  # fmt: skip

OUTPUT = [  # root ignores permissions: nobody can write a file's children or into /proc
    Mistake("file where the data set belongs", [*TOKENIZE, "src", "--out", "src/f1.py"], DATA, "write into src/f1.py"),
    Mistake("file above the data set", [*TOKENIZE, "src", "--out", "src/f1.py/x"], DATA, "src/f1.py is not a folder"),
    Mistake("read-only data set", [*TOKENIZE, "src", "--out", "/proc/nanochat"], DATA, "/proc/nanochat: cannot"),
    Mistake("read-only runs", [*TRAIN_ON_SRC, "--set", "run.dir=/proc/runs"], DATA, "/proc/runs/new"),
    Mistake("read-only export", ["export", "tiny", "--out", "/proc/x.gguf"], DATA, "/proc/x.gguf"),
    Mistake("folder where the export belongs", ["export", "tiny", "--out", "src"], DATA, "--out src: is a folder"),
    Mistake("full disk: --json", ["presets", "--json", "/dev/full"], DATA, "--json /dev/full: cannot be written"),
    Mistake("full disk: tokenize", [*TOKENIZE, "src"], DATA, "free space or choose another folder", disk=2000),
    Mistake("full disk: a new run", TRAIN_ON_SRC, DATA, "cannot write runs/new: File too large", disk=400),
    Mistake("full disk: a checkpoint", RESUME, DATA, "the checkpoint of step 4 is intact", disk=200_000,
            changes=("runs/tiny/config.toml",)),
    Mistake("full disk: an export", ["export", "tiny", "--out", "x.gguf"], DATA, "cannot write x.gguf", disk=40_000),
    Mistake("full disk: the same export again", ["export", "tiny"], DATA, "cannot write runs/tiny/model", disk=40_000),
]  # fmt: skip

MISTAKES = [*CONFIGURATION, *CORPUS, *SHARDS, *RUNS, *GGUF, *OUTPUT]


# -- the test -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder where nothing is wrong: two data sets, two runs of other models, an exported file."""
    folder = tmp_path_factory.mktemp("original")
    other = ["--set", "model.vocab_size=280", "--set", "data.path=data/other", "--set", "train.total_steps=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_corpus(folder / "src")
        for line in (
            TOKENIZE_SRC,
            ["tokenize", "--source", "src", "--vocab-size", "280", "--out", "data/other"],
            [*TRAIN_ON_SRC, "--name", "tiny"],
            [*TRAIN, *other, "--name", "other"],
            ["export", "tiny", "--no-verify"],
        ):
            assert main([*line, "--quiet"]) == 0
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to damage, as the working folder, with an empty cache."""
    folder = tmp_path / "work"
    shutil.copytree(original, folder)
    for kept in ("config.toml", "dataset.json"):  # as if it had all been made here
        for path in folder.glob(f"runs/*/{kept}"):
            path.write_text(path.read_text().replace(str(original), str(folder)))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NANOCHAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    return folder


@contextmanager
def files_of_at_most(size: int | None) -> Iterator[None]:
    """Writing beyond `size` bytes of any file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("mistake", MISTAKES, ids=[mistake.name for mistake in MISTAKES])
def test_a_bad_input_is_one_line_and_its_exit_code_and_nothing_is_lost(
    folder: Path, capfd: pytest.CaptureFixture[str], mistake: Mistake
) -> None:
    if mistake.before is not None:
        mistake.before()
    before = contents(folder)
    capfd.readouterr()
    with files_of_at_most(mistake.disk):
        code = main(mistake.line)
    said = capfd.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert said.splitlines()[-1] == errors[0]
    assert mistake.says in errors[0]
    assert code == mistake.code
    assert "Traceback" not in said
    assert len(errors[0]) < 400
    after = contents(folder)
    assert {name for name, content in before.items() if after.get(name) != content} == set(mistake.changes)
    assert not (folder / "runs" / "new" / "config.toml").exists(), "a run that never began has taken the name"


@pytest.mark.usefixtures("folder")
def test_a_run_that_could_not_begin_does_not_take_the_name() -> None:
    with files_of_at_most(400):  # standard error is captured in a file too
        assert main(TRAIN_ON_SRC) == DATA
    assert main([*TRAIN_ON_SRC, "--quiet"]) == 0


@pytest.mark.usefixtures("folder")
def test_a_batch_beyond_all_memory_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*TRAIN_ON_SRC, "--quiet", "--set", f"train.batch_size={10**12}"]) == USAGE
    said = capfd.readouterr().err
    assert said.startswith("error: out of memory: lower train.batch_size")
    assert said.count("\n") == 1


@pytest.mark.usefixtures("folder")
def test_an_empty_environment_is_enough(capfd: pytest.CaptureFixture[str]) -> None:
    Path("runs/tiny/environment.json").unlink()
    assert main([*RESUME, "--quiet"]) == 0
    assert main(["export", "tiny", "--no-verify", "--quiet"]) == 0
    assert "runs/tiny: no readable environment.json" in capfd.readouterr().err


@pytest.mark.usefixtures("folder")
def test_standard_output_on_a_full_disk_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*NANOCHAT, "presets"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == DATA
    assert done.stderr == "error: standard output cannot be written: No space left on device; free space\n"


@pytest.mark.usefixtures("folder")
def test_neither_a_terminal_nor_a_prompt_has_to_be_utf8() -> None:
    done = subprocess.run(
        [*NANOCHAT, "generate", "tiny", "--max-tokens", "3", "-p", b"caf\xe9 \xff", "--json", "found.json"],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"caf")
    assert os.fsencode(json.loads(Path("found.json").read_text())["prompt"]) == b"caf\xe9 \xff"
