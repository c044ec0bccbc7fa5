"""`nanochat bench decode` on a tiny model: both sides count the same tokens, and failures are one line."""

import json
import os
from pathlib import Path

import pytest
import torch

from nanochat_cli.bench.micro import run_decode
from nanochat_cli.bench.micro.decode import CONTENDERS, Contender, Job, measure
from nanochat_cli.cli.app import main
from nanochat_cli.config.load import resolve_config
from nanochat_cli.config.schema import ExportConfig
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import NanochatError
from nanochat_cli.export import llama_cpp
from nanochat_cli.formats.gguf.write import export_gguf
from nanochat_cli.report.reporter import QuietReporter
from tests.inference.tiny_models import spread_model, tiny_config

VOCAB_SIZE = 320


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tokenizer = Tokenizer.train(["a few words, a few words"], 300)
    export_gguf(spread_model(tiny_config(vocab_size=VOCAB_SIZE)), tokenizer, path, ExportConfig(type="tq2_0"), {})
    return path


def state(pid: int) -> str:
    """The state of a process according to the kernel; T: stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


@pytest.mark.parametrize("name", CONTENDERS)
def test_a_contender_measures_itself_and_rests_in_between(gguf: Path, name: str) -> None:
    warnings: list[str] = []
    with Contender(name, Job(gguf, 1, [1, 2, 3, 4, 5], 4), warnings.append) as contender:
        for _ in range(2):
            rates = contender.measure()
            assert set(rates) == {"prefill", "decode"}
            assert min(rates.values()) > 0
        pid = contender._child.pid
        os.waitpid(pid, os.WUNTRACED)  # until it is really stopped
        assert state(pid) == "T"
    assert contender._child.returncode is not None
    assert warnings == []


def test_results_compare_pairs_of_rounds(gguf: Path) -> None:
    results = measure(Job(gguf, 1, [1, 2, 3], 3), "tiny", 2, QuietReporter())
    assert [result.peer for result in results] == ["llama.cpp", None] * 2
    for ours, theirs in zip(results[::2], results[1::2], strict=True):
        ratios = sorted(a / b for a, b in zip(ours.runs, theirs.runs, strict=True))
        assert ours.ratio == pytest.approx(sum(ratios) / 2)
    assert results[0].case == "tiny, prefill of 3 tokens"
    assert results[2].case == "tiny, decode of 3 tokens"


@pytest.mark.parametrize("name", CONTENDERS)
def test_a_file_that_cannot_be_loaded_is_one_line_that_names_the_side(tmp_path: Path, gguf: Path, name: str) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(gguf.read_bytes()[:2000])
    with pytest.raises(NanochatError, match=rf"{name} ended with exit code .*: \S") as failure:
        Contender(name, Job(broken, 1, [1], 2), print).__enter__()
    assert "\n" not in str(failure.value)


def test_the_command_measures_a_file(gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "decode.json"
    line = ["bench", "decode", gguf, "--quick", "--threads", 1, "--prompt-tokens", 8, "--new-tokens", 4, "--out", out]
    assert main([str(word) for word in line]) == 0
    found = json.loads(out.read_text())
    assert found["suite"] == "decode"
    assert set(found["settings"]) == set(CONTENDERS)
    assert all(len(result["runs"]) == run_decode.QUICK_ROUNDS for result in found["results"])
    shown = capfd.readouterr().out
    assert "tiny.gguf, 1 thread" in shown
    assert "prefill of 8 tokens" in shown


def test_a_preset_becomes_a_random_model_with_room_for_the_tokens() -> None:
    config = resolve_config(["quickstart"])
    model, tokenizer = run_decode.random_model(config, 640)
    assert model.config.max_seq_len >= 640
    assert (model.config.dim, model.config.vocab_size) == (config.model.dim, config.model.vocab_size)
    assert tokenizer.vocab_size <= config.model.vocab_size
    again, _ = run_decode.random_model(config, 640)
    assert torch.equal(model.embedding.weight, again.embedding.weight)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--preset", "quikstart"], 2, "quickstart"),
        (["--preset", "quickstart", "--set", "model.dim=320"], 2, "tq2_0"),
        (["no-such-run"], 3, "no-such-run: no such run"),
        (["no-such.gguf"], 3, "no-such.gguf: no such file"),
    ],
)
def test_mistakes_are_one_line(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments, code, message
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "decode", "--quiet", *arguments]) == code
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_file_and_a_preset_together_are_a_mistake(gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "decode", str(gguf), "--preset", "quickstart"]) == 2
    assert "TARGET brings its own shape" in capfd.readouterr().err


def test_more_tokens_than_the_context_are_a_mistake(gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "decode", str(gguf), "--prompt-tokens", "5000"]) == 2
    assert "a prompt of 5000 tokens and 2 new ones do not fit the context of 64" in capfd.readouterr().err


def test_a_model_with_a_short_context_is_measured_with_what_fits(
    gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "decode", str(gguf), "--quick", "--threads", "1"]) == 0
    shown = capfd.readouterr()
    assert "a prompt of 48 tokens and 16 new ones: tiny.gguf has a context of 64" in shown.err + shown.out
    assert "prefill of 48 tokens" in shown.out


@pytest.mark.parametrize(
    ("context", "prompt", "new", "expected"),
    [
        (4096, None, None, (512, 128)),
        (640, None, None, (512, 128)),
        (256, None, None, (192, 64)),  # the quickstart's
        (256, 200, None, (200, 56)),
        (256, None, 128, (128, 128)),
        (256, 8, 4, (8, 4)),
    ],
)
def test_tokens_are_as_requested_or_as_usual_or_as_many_as_fit(context, prompt, new, expected) -> None:
    assert run_decode.fitting(context, prompt, new, (512, 128)) == expected


def test_without_llama_cpp_it_says_what_to_install(
    gguf: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(llama_cpp, "is_available", lambda: False)
    assert main(["bench", "decode", str(gguf)]) == 2
    assert capfd.readouterr().err.endswith("install the extra [llama-cpp] of nanochat\n")
