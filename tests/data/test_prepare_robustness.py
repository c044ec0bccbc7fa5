"""Preparation under stress: killed anywhere, a full disk, no permission, a dying worker, a large corpus."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat_cli.data.encoding import encode_documents
from nanochat_cli.data.prepare import prepare_dataset
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import DataError
from nanochat_cli.report.reporter import QuietReporter
from tests.data.corpora import make_config, write_folder

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in this checkout. Returns only when every process that inherited its output has ended."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=200, env=environment, check=False
    )


def test_killed_at_any_durable_step_nothing_half_written_is_trusted(tmp_path: Path) -> None:
    write_folder(tmp_path / "corpus", 30)
    expected = tmp_path / "expected"
    manifest = prepare_dataset(str(tmp_path / "corpus"), expected, make_config(), QuietReporter())
    whole = f"{manifest.train.documents}+{manifest.val.documents} documents"
    out = tmp_path / "data"
    ran = python("-m", "tests.data.interrupted_preparation", str(tmp_path / "corpus"), str(out))
    assert ran.returncode == 0, ran.stderr
    ends = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(ends) > 12
    assert all(end["killed"] for end in ends[:-1])
    assert {end["left"] for end in ends} == {"no manifest", whole}
    assert ends[0]["left"] == "no manifest"
    assert ends[-1] == {"step": len(ends), "killed": False, "left": whole}
    for path in expected.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert not list(out.glob(".*.partial"))


def test_killed_while_replacing_a_data_set_the_old_or_the_new_one_is_there(tmp_path: Path) -> None:
    write_folder(tmp_path / "old corpus", 12, seed=1)
    write_folder(tmp_path / "corpus", 30)
    sizes = []
    for name in ("old corpus", "corpus"):
        manifest = prepare_dataset(str(tmp_path / name), tmp_path / f"{name} data", make_config(), QuietReporter())
        sizes.append(f"{manifest.train.documents}+{manifest.val.documents} documents")
    old, new = sizes
    arguments = [str(tmp_path / name) for name in ("corpus", "data", "old corpus data")]
    ran = python("-m", "tests.data.interrupted_preparation", *arguments)
    assert ran.returncode == 0, ran.stderr
    ends = [json.loads(line) for line in ran.stdout.splitlines()]
    # What is left: the old one while the new one is written, none that is trusted while files move, then the new one.
    left = [end["left"] for end in ends]
    assert left == sorted(left, key=[old, "no manifest", new].index)
    assert {old, new} <= set(left)
    # A later preparation, even one that fails, moves into place what was already complete.
    then = {(end["left"], end["then"]) for end in ends}
    assert then == {(old, old), (old, new), ("no manifest", new), (new, new)}


KILLED_WITH_WORKERS = """
import os, signal, sys
from nanochat_cli.data.encoding import encode_documents
from nanochat_cli.data.tokenizer import Tokenizer

if __name__ == "__main__":
    tokenizer = Tokenizer.load(sys.argv[1])
    for _ in encode_documents([b"a document"] * 100, tokenizer, workers=2, batch_bytes=1):
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    Tokenizer.train(["text " * 20], 300).save(tmp_path / "tokenizer.json")
    script = tmp_path / "killed.py"
    script.write_text(KILLED_WITH_WORKERS)
    # The workers hold the pipes: were one left over, this would time out.
    assert python(str(script), str(tmp_path / "tokenizer.json")).returncode == -signal.SIGKILL


def test_a_worker_that_dies_is_an_error_and_not_a_hang(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["text " * 20], 300)
    encoded = encode_documents([b"a document"] * 1000, tokenizer, workers=2, batch_bytes=1)
    next(encoded)
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    for child in children:
        command = Path(f"/proc/{child}/cmdline").read_bytes()
        if b"spawn_main" in command:
            os.kill(int(child), signal.SIGKILL)
    with pytest.raises(DataError, match=r"an encoding process died .*data\.workers=1"):
        list(encoded)


def test_a_full_disk_is_one_line_and_nothing_is_trusted(tmp_path: Path) -> None:
    write_folder(tmp_path / "corpus", 60, size=4000)
    out = tmp_path / "data"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))  # a write beyond it fails as on a full disk
    try:
        with pytest.raises(DataError, match=r"cannot write the data set: File too large") as caught:
            prepare_dataset(str(tmp_path / "corpus"), out, make_config(), QuietReporter())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert not list(out.rglob("*.safetensors"))
    prepare_dataset(str(tmp_path / "corpus"), out, make_config(), QuietReporter())
    assert ShardReader(out).tokens("train").document_count > 0
    assert not list(out.glob(".*.partial"))


def test_a_data_set_that_cannot_be_read_now_is_not_taken_for_a_damaged_one(tmp_path: Path) -> None:
    write_folder(tmp_path / "corpus", 20)
    out = tmp_path / "data"
    prepare_dataset(str(tmp_path / "corpus"), out, make_config(), QuietReporter())
    (out / "manifest.json").rename(tmp_path / "manifest.json")
    (out / "manifest.json").mkdir()  # reading it is an OSError, also for root
    shards = {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
    with pytest.raises(DataError, match=r"manifest\.json: cannot read: Is a directory"):
        prepare_dataset(str(tmp_path / "corpus"), out, make_config(model={"vocab_size": 420}), QuietReporter())
    assert {path.name: path.read_bytes() for path in out.glob("*.safetensors")} == shards


def test_an_output_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    write_folder(tmp_path / "corpus", 5)
    (tmp_path / "file").touch()
    targets = [tmp_path / "file", tmp_path / "file" / "data", Path("/proc/nanochat")]
    if os.geteuid() != 0:  # root ignores permissions
        (tmp_path / "locked").mkdir(mode=0o555)
        targets.append(tmp_path / "locked" / "data")
    for target in targets:
        with pytest.raises(DataError, match="cannot write") as caught:
            prepare_dataset(str(tmp_path / "corpus"), target, make_config(), QuietReporter())
        assert "\n" not in str(caught.value)


PEAK_MEMORY = """
import sys
import threading
from pathlib import Path
from nanochat_cli.config.schema import Config
from nanochat_cli.data.prepare import prepare_dataset
from nanochat_cli.report.reporter import QuietReporter

def own_memory():
    # Without the pages of mapped files, which the system takes back when it needs them.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * (int(status["RssAnon"].split()[0]) + int(status["RssShmem"].split()[0]))

def watch():
    while not done.wait(0.01):
        peaks.append(own_memory())

if __name__ == "__main__":
    source, out, workers = sys.argv[1:]
    config = Config.model_validate(
        {"model": {"vocab_size": 400}, "tokenizer": {"train_bytes": 500_000}, "data": {"workers": int(workers)}}
    )
    done, peaks = threading.Event(), []
    watcher = threading.Thread(target=watch)
    watcher.start()
    prepare_dataset(source, Path(out), config, QuietReporter())
    done.set()
    watcher.join()
    print(max(peaks))
"""


@pytest.mark.parametrize(
    ("small", "large", "workers"),
    [(3, 12, 1), pytest.param(5, 50, 1, marks=pytest.mark.slow), pytest.param(5, 50, 2, marks=pytest.mark.slow)],
)
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, small: int, large: int, workers: int) -> None:
    script = tmp_path / "peak.py"
    script.write_text(PEAK_MEMORY)
    peaks = []
    for megabytes in (small, large):
        path = tmp_path / f"{megabytes}.jsonl"
        with path.open("w") as file:
            for number in range(megabytes * 100):
                file.write(json.dumps({"text": f"document {number} " + "some words of text\n" * 525}) + "\n")
        ran = python(str(script), str(path), str(tmp_path / str(megabytes)), str(workers))
        assert ran.returncode == 0, ran.stderr
        peaks.append(int(ran.stdout))
    # Of a document its signature against near-duplicates stays, below a kilobyte. Keeping the additional text or its
    # tokens would cost at least (large − small) MB.
    documents = 100 * (large - small)
    assert peaks[1] - peaks[0] < 4e6 + 1000 * documents
