"""llama.cpp's `/infill` asks with the very tokens that we train on and ask with.

Without `--spm-infill`, which its Python package cannot set; that order follows the source of the server.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanochat_cli.config.schema import ExportConfig
from nanochat_cli.data.fim import Gap, infill_prompt
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.formats.gguf.write import export_gguf
from tests.conformance.conftest import VOCAB_SIZE
from tests.inference.tiny_models import spread_model, tiny_config

ROOT = Path(__file__).parents[2]
CONTEXT, BATCH = 512, 128
PREDICTED = (CONTEXT - BATCH) // 2
"""With so many expected tokens llama.cpp finds no room for the names of a repository and a file before the prompt."""


def asked(folder: Path, **request: Any) -> list[dict[str, Any]]:
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    files = [str(folder / name) for name in ("request.json", "response.json")]
    child = subprocess.run(
        [sys.executable, "-m", "tests.conformance.infill_client", *files],
        cwd=ROOT,
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert child.returncode == 0, child.stderr.decode(errors="replace")[-3000:]
    return json.loads((folder / "response.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2"])
def test_llama_cpp_asks_with_our_tokens(tmp_path: Path, sources: list[str], pre: str) -> None:
    tokenizer = Tokenizer.train(sources, VOCAB_SIZE, pre=pre)
    model = spread_model(tiny_config(vocab_size=VOCAB_SIZE, n_layers=1, max_seq_len=CONTEXT))
    export_gguf(model, tokenizer, tmp_path / "model.gguf", ExportConfig(), {})
    code = sources[0]
    places = [0, 1, 57, 300, code.index("import") + 3, len(code) - 40, len(code)]  # also inside a word
    gaps = [Gap(code[max(0, at - 60) : at], code[at : at + 40]) for at in places]
    gaps += [Gap(code[:900], code[900:1600]), Gap("", code[:2000]), Gap(code[:3000], "")]  # more than fits
    gaps += [Gap("", ""), Gap("naïve 日", "本 = '😀'\n"), Gap("<|fim_middle|> x", "<|endoftext|>\r\n")]
    ours = [infill_prompt(tokenizer, gap, BATCH, spm=False) for gap in gaps]
    answers = asked(
        tmp_path,
        model=str(tmp_path / "model.gguf"),
        context=CONTEXT,
        batch=BATCH,
        predict=PREDICTED,
        threads=1,
        gaps=[{"input_prefix": gap.prefix, "input_suffix": gap.suffix} for gap in gaps],
        prompts=ours,
    )
    theirs, completions = answers[: len(gaps)], answers[len(gaps) :]
    for gap, ids, infilled, completed in zip(gaps, ours, theirs, completions, strict=True):
        assert infilled["tokens_evaluated"] == len(ids), gap
        assert infilled["prompt"] == completed["prompt"], gap  # as it shows tokens, which is not how we do
        assert infilled["tokens"] == completed["tokens"], gap  # what a model that has read other tokens would not say
    assert sum(len(ids) == BATCH + 1 for ids in ours) == 1
