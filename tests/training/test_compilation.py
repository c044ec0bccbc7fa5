"""When compiling is chosen, with which compiler, and what happens if it does not work."""

import subprocess
import sys

import pytest
import torch

from nanochat_cli.formats.run import checkpoints
from nanochat_cli.report.reporter import QuietReporter
from nanochat_cli.training import compilation
from nanochat_cli.training.compilation import decide
from nanochat_cli.training.cpp_compiler import CppCompiler, find_compiler
from nanochat_cli.training.trainer import Trainer
from tests.e2e.compilers import (
    environment,
    keep_kernels,
    write_broken_compilers,
    write_compiler_without_python_headers,
)
from tests.e2e.tiny import TINY, write_corpus
from tests.training.synthetic import SyntheticData, tiny_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
works = pytest.mark.skipif(find_compiler().path is None, reason=find_compiler().obstacle)


@pytest.fixture
def compiler(monkeypatch):
    def choose(found):
        monkeypatch.setattr(compilation, "find_compiler", lambda: found)

    choose(CppCompiler("/usr/bin/g++"))
    return choose


def test_without_a_compiler_a_cpu_run_is_eager_and_says_why(compiler):
    compiler(CppCompiler(None, "g++ has a cold"))
    decision = decide("auto", CPU, 1e6)
    assert not decision.compile
    assert "g++ has a cold" in decision.reason
    assert not decide("on", CPU, 1e6).compile
    assert decide("auto", CUDA, 1e6).compile


def test_short_runs_are_eager_and_long_ones_compiled(compiler):
    assert not decide("auto", CPU, 10).compile
    assert decide("auto", CPU, 1000).compile


def test_the_setting_wins(compiler):
    assert decide("on", CPU, 10).compile
    assert not decide("off", CPU, 1e6).compile


def found_with(folder, cache, **more):
    """The compiler that a process with `folder` first on its PATH finds."""
    program = (
        "from nanochat_cli.training.cpp_compiler import find_compiler as f; print(f().path, f().obstacle, sep='|')"
    )
    env = environment(folder, cache, **more)
    child = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    return child.stdout.strip().split("|")


@works
def test_a_compiler_that_works_is_taken_before_one_that_is_broken(tmp_path):
    broken = write_broken_compilers(tmp_path / "bin", ("broken-c++",)) / "broken-c++"
    path, obstacle = found_with(tmp_path, tmp_path, CXX=str(broken))
    assert (path, obstacle) == (find_compiler().path, "")


def test_a_machine_without_any_compiler_is_told_what_to_install(tmp_path):
    assert found_with(tmp_path, tmp_path, PATH=str(tmp_path)) == [
        "None",
        "no C++ compiler on this machine; install g++ or clang++",
    ]


@pytest.mark.parametrize(
    ("fake", "says"),
    [
        (write_broken_compilers, "g++ does not work: error: this compiler is broken"),
        pytest.param(write_compiler_without_python_headers, "(package python3-dev)", marks=works),
    ],
)
def test_a_run_with_a_broken_compiler_is_eager_and_succeeds(fake, says, tmp_path):
    write_corpus(tmp_path / "src")
    line = ["train", *TINY, "--set", "train.compile=on", "--set", "train.total_steps=2", "--set", "data.source=src"]
    keep_kernels(tmp_path / "cache")
    env = environment(fake(tmp_path / "bin"), tmp_path / "cache")
    command = [sys.executable, "-m", "nanochat_cli.cli.app", *line]
    child = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    (why,) = [line for line in child.stderr.splitlines() if line.startswith("eager:")]
    assert says in why
    assert "Traceback" not in child.stderr


def test_a_run_that_cannot_be_compiled_after_all_continues_eagerly(compiler, monkeypatch, request, tmp_path):
    """The check passes but inductor fails: the run equals the eager one bit for bit and says why once."""
    from torch._inductor import config as inductor
    from torch._inductor.utils import fresh_cache

    before = inductor.cpp.cxx
    # Not with monkeypatch: it deletes what is not in the object's own __dict__, and the settings would lose it.
    request.addfinalizer(lambda: setattr(inductor.cpp, "cxx", before))
    inductor.cpp.cxx = None
    torch._dynamo.reset()  # what another test compiled would be taken, and nothing could fail
    compiler(CppCompiler(str(write_broken_compilers(tmp_path / "bin") / "g++")))
    weights, said = [], []
    for setting in ("on", "off"):
        config = tiny_config(tmp_path / setting, train={"compile": setting, "total_steps": 2})
        folder = config.run.dir / "tiny"
        folder.mkdir(parents=True)
        reporter = QuietReporter()
        lines: list[str] = []
        monkeypatch.setattr(reporter, "info", lines.append)
        with fresh_cache():
            Trainer(config, SyntheticData(config.train.batch_size, config.train.seq_len), folder, reporter).fit()
        weights.append(checkpoints.load(folder))
        said.append([line for line in lines if "cannot be compiled" in line])
    assert len(said[0]) == 1
    assert "compiler" in said[0][0]
    assert said[1] == []
    assert not weights[0].state["progress"]["compiled"]
    assert all(
        torch.equal(value, weights[1].tensors["model"][name]) for name, value in weights[0].tensors["model"].items()
    )
