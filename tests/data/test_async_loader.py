"""The asynchronous loader: one reader's batches in order, every failure an error, no process left behind."""

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nanochat_cli.config.schema import Config
from nanochat_cli.data.async_loader import AsyncLoader
from nanochat_cli.data.loader import source_spec
from nanochat_cli.data.loader_sources import SourceSpec
from nanochat_cli.data.prepare import prepare_dataset
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.engine import Engine
from nanochat_cli.errors import DataError
from nanochat_cli.formats.run import checkpoints
from nanochat_cli.report.metrics_log import read_metrics
from nanochat_cli.report.reporter import QuietReporter
from tests.data.loader_specs import Counting
from tests.e2e.tiny import write_corpus
from tests.training.synthetic import tiny_config

ROOT = Path(__file__).parents[2]


def children(pid: int) -> set[int]:
    """Processes whose parent is `pid`, by /proc."""
    found = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.add(int(status.parent.name))
    return found


@pytest.fixture
def started() -> Callable[[], set[int]]:
    """Children that the test started; an earlier test may have left multiprocessing's tracker."""
    before = children(os.getpid())
    return lambda: children(os.getpid()) - before


def ended(handle: int, within: float = 10.0) -> bool:
    """Whether the process behind a pidfd ends in time; it need not be a child of this one."""
    return bool(select.select([handle], [], [], within)[0])


def read(loader: AsyncLoader, indices: range) -> None:
    for index in indices:
        loader.batch(index)


def tiny_spec(folder: Path, *, on_the_fly: bool) -> SourceSpec:
    write_corpus(folder / "text")
    config = Config.model_validate(
        {
            "model": {"vocab_size": 300},
            "train": {"batch_size": 2, "grad_accum": 2, "seq_len": 32},
            "data": {"glob": "*.py"},
            "loader": {"on_the_fly": on_the_fly},
        }
    )
    prepare_dataset(str(folder / "text"), folder / "data", config, QuietReporter())
    return source_spec(ShardReader(folder / "data"), config, QuietReporter())


@pytest.mark.parametrize("on_the_fly", [False, True], ids=["shards", "on the fly"])
def test_any_number_of_workers_gives_the_batches_of_one_reader(tmp_path: Path, on_the_fly: bool) -> None:
    spec = tiny_spec(tmp_path, on_the_fly=on_the_fly)
    reader = spec.open()
    expected = [reader.batch(index) for index in range(40)]
    for workers, prefetch in ((1, 1), (2, 3), (5, 16), (8, 8)):
        with AsyncLoader(spec, workers, prefetch) as loader:
            for index, (inputs, targets) in enumerate(expected):
                found = loader.batch(index)
                np.testing.assert_array_equal(found[0], inputs)
                np.testing.assert_array_equal(found[1], targets)


def test_a_loader_starts_anywhere_and_jumps_anywhere() -> None:
    with AsyncLoader(Counting(), workers=2, prefetch=3) as loader:
        for index in (17, 18, 18, 19, 3, 4, 4, 100, 20, 21, 22, 23, 24, 0):
            inputs, targets = loader.batch(index)
            assert (inputs == index).all()
            assert (targets == index + 1).all()
        loader.close()
        assert (loader.batch(5)[0] == 5).all()


def test_a_batch_is_the_callers_own() -> None:
    with AsyncLoader(Counting(), workers=1, prefetch=2) as loader:
        first = loader.batch(0)[0]
        first[:] = -1
        assert (loader.batch(0)[0] == 0).all()
        for index in range(1, 10):
            loader.batch(index)
        assert (first == -1).all()


@pytest.mark.parametrize("workers", [1, 3])
def test_a_worker_that_raises_is_an_error_at_its_batch_with_its_traceback(
    workers: int, started: Callable[[], set[int]]
) -> None:
    with AsyncLoader(Counting(fails_at=7), workers, prefetch=6) as loader:
        for index in range(7):
            assert (loader.batch(index)[0] == index).all()
        with pytest.raises(DataError, match=r"batch 7 could not be read:\nTraceback[\s\S]*ValueError: batch 7 is bad"):
            loader.batch(7)
        assert started() == set()


def test_a_source_that_does_not_open_is_an_error_with_its_traceback(started: Callable[[], set[int]]) -> None:
    with pytest.raises(DataError, match=r"could not start:\nTraceback[\s\S]*this source does not open"):
        AsyncLoader(Counting(opens=False), 2, 4).batch(0)
    assert started() == set()


@pytest.mark.parametrize("workers", [1, 3])
def test_a_worker_that_dies_while_it_reads_is_an_error(workers: int, started: Callable[[], set[int]]) -> None:
    with (
        AsyncLoader(Counting(dies_at=5), workers, prefetch=4) as loader,
        pytest.raises(DataError, match=r"loader process \(pid \d+\) was killed by SIGKILL"),
    ):
        read(loader, range(6))
    assert started() == set()


def test_an_idle_worker_that_is_killed_is_an_error_at_the_next_batches() -> None:
    with AsyncLoader(Counting(), workers=2, prefetch=2) as loader:
        loader.batch(0)
        os.kill(loader._workers[1].process.pid, signal.SIGKILL)
        with pytest.raises(DataError, match="was killed by SIGKILL"):
            read(loader, range(1, 100))


def test_no_process_is_left_after_close(started: Callable[[], set[int]]) -> None:
    with AsyncLoader(Counting(), workers=3, prefetch=4) as loader:
        loader.batch(0)
        assert len(started()) == 3
        loader.close()
        assert started() == set()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left_after_the_reader_is_stopped(how: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "from tests.data.loader_specs import read_without_end; read_without_end()"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2
        handles = [os.pidfd_open(pid) for pid in pids]
        assert not any(ended(handle, within=0) for handle in handles)
        # Ctrl-C reaches every process of the terminal's foreground group.
        os.killpg(process.pid, how)
        try:
            process.wait(10)
        finally:
            with contextlib.suppress(ProcessLookupError):  # a reader that does not end must not outlive the test
                os.killpg(process.pid, signal.SIGKILL)
    for handle in handles:
        assert ended(handle)
        os.close(handle)


def test_a_worker_imports_no_torch() -> None:
    code = (
        "import sys, nanochat_cli.data.loader_worker, nanochat_cli.data.on_the_fly; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("on_the_fly", [False, True], ids=["shards", "on the fly"])
def test_a_run_that_reads_ahead_equals_one_that_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: Callable[[], set[int]], on_the_fly: bool
) -> None:
    monkeypatch.setenv("NANOCHAT_CACHE", str(tmp_path / "cache"))
    write_corpus(tmp_path / "text")
    runs = [train(tmp_path, f"enabled-{on}", on_the_fly=on_the_fly, enabled=on) for on in (False, True)]
    one, other = (checkpoints.load(run).tensors["model"] for run in runs)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    losses = [[line["loss/main"] for line in read_metrics(run) if "loss/main" in line] for run in runs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6
    assert all(0 <= line["throughput/busy_fraction"] <= 1 for line in read_metrics(runs[1]) if "loss/main" in line)
    assert started() == set()


def test_a_resumed_run_continues_reading_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_CACHE", str(tmp_path / "cache"))
    write_corpus(tmp_path / "text")
    whole = train(tmp_path, "whole", enabled=True)
    part = train(tmp_path, "part", enabled=True, steps=3)
    train(tmp_path, "part", enabled=True, resume=part)
    one, other = (checkpoints.load(run).tensors["model"] for run in (whole, part))
    assert all(torch.equal(one[name], other[name]) for name in one)


def train(
    folder: Path, name: str, *, enabled: bool, on_the_fly: bool = False, steps: int = 6, resume: Path | None = None
) -> Path:
    """Train a tiny model on the text in `folder`; returns the run's folder."""
    config = tiny_config(
        folder / "runs",
        run={"name": name},
        model={"vocab_size": 300, "max_seq_len": 32},
        train={"total_steps": steps, "grad_accum": 2},
        data={"source": str(folder / "text"), "glob": "*.py"},
        eval={"interval": 100},
        optim={"schedule": "constant"},
        loader={"enabled": enabled, "on_the_fly": on_the_fly, "workers": 2, "prefetch": 3},
    )
    return Engine(QuietReporter()).train(config, resume)
