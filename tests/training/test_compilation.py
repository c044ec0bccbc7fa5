"""When compiling is chosen."""

import torch

from nanochat_cli.training import compilation

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_without_a_compiler_a_cpu_run_is_eager_and_says_why(monkeypatch):
    monkeypatch.setattr(compilation, "find_compiler", lambda: None)
    decision = compilation.decide("auto", CPU, 1e6)
    assert not decision.compile
    assert "compiler" in decision.reason
    assert not compilation.decide("on", CPU, 1e6).compile
    assert compilation.decide("auto", CUDA, 1e6).compile


def test_short_runs_are_eager_and_long_ones_compiled(monkeypatch):
    monkeypatch.setattr(compilation, "find_compiler", lambda: "/usr/bin/g++")
    assert not compilation.decide("auto", CPU, 10).compile
    assert compilation.decide("auto", CPU, 1000).compile


def test_the_setting_wins(monkeypatch):
    monkeypatch.setattr(compilation, "find_compiler", lambda: "/usr/bin/g++")
    assert compilation.decide("on", CPU, 10).compile
    assert not compilation.decide("off", CPU, 1e6).compile
