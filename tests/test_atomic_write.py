"""What must outlive a power cut is on the disk before it has its name: checkpoints, data sets, libraries, files."""

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from nanochat_cli.atomic_write import whole, write_atomically
from nanochat_cli.data.prepare import prepare_dataset
from nanochat_cli.errors import DataError
from nanochat_cli.evaluation.sample_file import SampleFile
from nanochat_cli.formats.run import checkpoints
from nanochat_cli.report.metrics_log import MetricsLog
from nanochat_cli.report.reporter import QuietReporter
from nanochat_cli.report.run_results import add_results
from nanochat_cli.rl.experience import Experience, ExperienceLibrary
from tests.data.corpora import make_config, write_folder
from tests.durability import record_disk_calls


def test_a_checkpoint_is_on_the_disk_before_it_and_its_pointers_are_named(tmp_path, monkeypatch):
    calls = record_disk_calls(monkeypatch)
    for _ in range(2):  # the second replaces the first
        tensors = {"model": {"weight": torch.ones(4)}, "optimizer": {"momentum": torch.zeros(4)}}
        checkpoints.save(tmp_path, 5, tensors, {"step": 5}, model_config={}, best=True)
    calls.require_durable()
    places = [place.name for _, place, _, _ in calls.renames]
    assert places == ["step-000005", "latest", "best"] * 2
    for (number, _, root, _), (following, *_) in pairwise(calls.renames):  # a pointer never outlives what it names
        assert any(number < at < following and found == root for at, found in calls.synced)
    inside = {path.name for path in calls.renames[0][3]}
    assert {"model.safetensors", "optimizer.safetensors", "state.json"} < inside


def test_a_data_set_is_on_the_disk_before_its_manifest_is_named(tmp_path, monkeypatch):
    write_folder(tmp_path / "corpus", 20)
    calls = record_disk_calls(monkeypatch)
    prepare_dataset(str(tmp_path / "corpus"), tmp_path / "data", make_config(), QuietReporter())
    calls.require_durable()
    place = calls.renames[-1][1]
    assert place == tmp_path / "data" / "manifest.json"


def test_an_experience_library_is_pruned_to_the_disk_and_appended_to_it(tmp_path, monkeypatch):
    calls = record_disk_calls(monkeypatch)
    library = ExperienceLibrary(tmp_path / "library.jsonl", clock=lambda: 10.0)
    library.add([Experience("prompt", f"answer {number}", 1.0, 0.5, 10.0) for number in range(3)])
    status = library.path.stat()
    assert (status.st_dev, status.st_ino) in [identity for _, identity in calls.synced]
    library.prune(max_size=1)
    calls.require_durable()


@pytest.mark.parametrize("kind", ["small", "large", "results"])
def test_a_file_that_is_written_whole_is_on_the_disk_before_it_is_named(tmp_path, monkeypatch, kind):
    calls = record_disk_calls(monkeypatch)
    if kind == "small":
        write_atomically(tmp_path / "config.toml", b"content")
    elif kind == "large":
        with whole(tmp_path / "model.gguf") as temporary, temporary.open("wb") as file:
            file.write(b"content")
    else:
        add_results(tmp_path, export={"bytes": 1})
    calls.require_durable()
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failure_in_between_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "config.toml"
    write_atomically(path, b"old")
    writing = whole(path)
    writing.__enter__().write_bytes(b"half")
    assert writing.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None) in (None, False)
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [("config.toml", b"old")]


def test_a_device_is_written_to_and_not_replaced(tmp_path):
    fifo = Path("/dev/null")
    write_atomically(fifo, b"content")
    assert fifo.is_char_device()


def test_a_pipe_that_has_no_name_of_its_own_is_written_to():
    reader, writer = os.pipe()
    write_atomically(Path(f"/dev/fd/{writer}"), b"content")
    os.close(writer)
    assert os.read(reader, 100) == b"content"
    os.close(reader)


def test_what_could_not_be_written_is_not_written_when_the_file_is_closed(tmp_path, full_disk):
    log = MetricsLog(tmp_path / "run", tensorboard=False)
    samples = SampleFile(tmp_path / "eval", {}, resume=False)
    library = ExperienceLibrary(tmp_path / "library.jsonl")
    text = "x" * 9000
    with full_disk(4096):
        for write in (
            lambda: log.log(1, {"text": text}),
            lambda: samples.append({"temperature": 0.0, "problem": text}),
            lambda: library.add([Experience("p", text, 1.0, 0.5, 10.0)]),
        ):
            with pytest.raises(DataError, match=r"File too large"):
                write()
    log.close()
    samples.__exit__()
    sizes = [path.stat().st_size for path in (log._path, samples.path, library.path)]
    assert sizes == [4096, 4096, 0]


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """No file of this process may grow beyond so many bytes."""

    @contextmanager
    def full(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return full


def test_lines_of_metrics_and_samples_are_synced_as_promised(tmp_path, monkeypatch):
    calls = record_disk_calls(monkeypatch)
    with MetricsLog(tmp_path / "run", tensorboard=False) as log:
        log.log(1, {"loss/main": 1.0})
        log.sync()
    with SampleFile(tmp_path / "eval", {}, resume=False) as samples:
        samples.append({"temperature": 0.0, "problem": "p"})
    synced = [identity for _, identity in calls.synced]
    for path in (tmp_path / "run" / "metrics.jsonl", tmp_path / "eval" / "samples.jsonl"):
        status = path.stat()
        assert (status.st_dev, status.st_ino) in synced
