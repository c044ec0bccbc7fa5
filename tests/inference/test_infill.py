"""Filling in: the prompt fits the context, and the command writes only what belongs at the place."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nanochat_cli
from nanochat_cli.cli.app import main
from nanochat_cli.config.schema import Config
from nanochat_cli.config.sections.fim import FimConfig
from nanochat_cli.data.fim import Gap, infill_prompt
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import DataError
from nanochat_cli.formats.gguf.file import GGUFFile
from nanochat_cli.formats.open import load_target, trained_fim
from nanochat_cli.inference.generate import generate_tokens
from nanochat_cli.inference.infill import infill_request
from nanochat_cli.inference.packed_model import PackedTransformer
from nanochat_cli.inference.sampling import SamplingConfig
from tests.data.corpora import random_text
from tests.evaluation.saved_runs import save_run

TOKENIZER = Tokenizer.train([random_text(random.Random(seed), 2000) for seed in range(5)], 400)
CODE = "def f(x):\n    return x + 1\n\n\ndef naïve(y):\n    return y\n"


@given(
    before=st.text(max_size=300),
    after=st.text(max_size=300),
    context=st.integers(16, 128),
    max_tokens=st.integers(1, 200),
    spm_rate=st.sampled_from([0.0, 0.5]),
)
def test_prompt_and_answer_fit_the_context(
    before: str, after: str, context: int, max_tokens: int, spm_rate: float
) -> None:
    sampling = SamplingConfig(max_tokens=max_tokens, temperature=0.3)
    fim = FimConfig(rate=0.5, spm_rate=spm_rate)
    ids, settings = infill_request(TOKENIZER, Gap(before, after), fim, sampling, context)
    assert settings.max_tokens == min(max_tokens, context - len(ids)) >= 1
    assert settings.temperature == 0.3
    assert (ids[0] == TOKENIZER.special_tokens["<|fim_suffix|>"]) == (spm_rate > 0)
    assert max_tokens > context // 2 or settings.max_tokens == max_tokens


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of an untrained model whose configuration says that it was trained to fill in."""
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "runs" / "one", fim={"rate": 0.5, "spm_rate": 0.25}, max_seq_len=512)
    (tmp_path / "code.py").write_bytes(CODE.encode())
    return tmp_path / "runs" / "one"


@pytest.mark.parametrize(
    ("place", "before"),
    [("2:12", "def f(x):\n    return "), ("1:1", ""), ("5:8", CODE[: CODE.index("ve(y)")]), ("7:1", CODE)],
)
def test_the_command_writes_what_the_model_says_after_the_prompt(
    run: Path, capfd: pytest.CaptureFixture[str], place: str, before: str
) -> None:
    model, tokenizer, _ = load_target(run)
    ids = infill_prompt(tokenizer, Gap(before, CODE.removeprefix(before)), 1000, spm=True)
    steps = generate_tokens(
        PackedTransformer.from_model(model),
        [ids],
        SamplingConfig(max_tokens=8, temperature=0),
        tokenizer.eos_id,
        tokenizer.never_sampled,
    )
    expected = tokenizer.decode(step[0] for step in steps if step[0] is not None)
    line = ["generate", str(run), "--infill", f"code.py:{place}", "--max-tokens", "8", "--temperature", "0"]
    assert main([*line, "--quiet"]) == 0
    found = capfd.readouterr()
    assert found.out == expected + "\n"
    assert "fill-in-the-middle" not in found.err
    library = nanochat_cli.load(run).infill(before, CODE.removeprefix(before), max_tokens=8, temperature=0)
    assert library == expected


def test_a_model_that_never_learned_it_is_asked_with_a_warning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_run(tmp_path / "run")
    (tmp_path / "code.py").write_text(CODE)
    assert (
        main(["generate", str(tmp_path / "run"), "--infill", f"{tmp_path / 'code.py'}:2:1", "--max-tokens", "2"]) == 0
    )
    assert "was trained without fill-in-the-middle (fim.rate = 0)" in capfd.readouterr().err


def test_a_file_says_how_its_model_was_trained(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    assert main(["export", str(run), "--out", str(file), "--no-verify", "--quiet"]) == 0
    assert trained_fim(file, None) == FimConfig(rate=0.5, spm_rate=0.25)
    save_run(tmp_path / "without")
    assert main(["export", str(tmp_path / "without"), "--out", str(file), "--no-verify", "--quiet"]) == 0
    assert not [key for key in GGUFFile(file).fields if key.startswith("nanochat.fim")]
    assert trained_fim(file, None).rate == 0
    assert trained_fim(file, Config(fim=FimConfig(rate=0.3))).rate == 0.3


def test_a_vocabulary_without_the_tokens_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nanochat_cli.data.tokenizer.SPECIAL_TOKENS", ("<|endoftext|>",))
    save_run(tmp_path / "run", Tokenizer.train([CODE * 5], 300))
    (tmp_path / "code.py").write_text(CODE)
    assert main(["generate", str(tmp_path / "run"), "--infill", f"{tmp_path / 'code.py'}:2:1", "--quiet"]) == 3
    error = capfd.readouterr().err
    assert "needs <|fim_prefix|>, <|fim_suffix|>, <|fim_middle|> in the vocabulary" in error
    assert error.count("\n") == 1
    with pytest.raises(DataError, match="in the vocabulary"):
        nanochat_cli.load(tmp_path / "run").infill("a", "b")


@pytest.mark.parametrize(
    ("place", "code", "words"),
    [
        ("code.py", 2, "name a file, a line and a column, such as src/main.rs:12:5"),
        ("code.py:2", 2, "name a file, a line and a column"),
        ("code.py:2:x", 2, "name a file, a line and a column"),
        (":2:1", 2, "name a file, a line and a column"),
        ("gone.py:1:1", 3, "cannot read gone.py: No such file or directory"),
        ("binary.py:1:1", 3, "cannot read binary.py"),
        ("code.py:8:1", 3, "code.py has lines 1 to 7"),
        ("code.py:0:1", 3, "code.py has lines 1 to 7"),
        ("code.py:1:11", 3, "line 1 has columns 1 to 10"),
        ("code.py:1:0", 3, "line 1 has columns 1 to 10"),
    ],
)
def test_a_wrong_place_is_one_line(
    run: Path, capfd: pytest.CaptureFixture[str], place: str, code: int, words: str
) -> None:
    Path("binary.py").write_bytes(b"\xff\xfe\x00")
    assert main(["generate", str(run), "--infill", place, "--quiet"]) == code
    error = capfd.readouterr().err
    assert words in error
    assert error.count("\n") == 1
