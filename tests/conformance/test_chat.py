"""Conversations in llama.cpp: the template in the file gives the tokens that the model was trained on."""

import inspect
import json
from pathlib import Path

import pytest

from nanochat_cli.config.schema import ExportConfig
from nanochat_cli.data.chat import CHATML, Turn, prompt_ids
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.export import llama_cpp
from nanochat_cli.formats.gguf.write import export_gguf
from tests.data.test_chat import as_messages
from tests.inference.tiny_models import spread_model, tiny_config

TURNS = [
    [Turn("user", "What is 2+2?")],
    [
        Turn("system", "be brief"),
        Turn("user", "Größe, 東京 😀\n\n  x = 1"),
        Turn("assistant", "\n\n\n    y"),
        Turn("user", "?"),
    ],
    [Turn("user", "\ta\r\n"), Turn("assistant", " 42 "), Turn("user", "\n")],
]


@pytest.mark.skipif(not llama_cpp.is_available(), reason="needs xllamacpp")
@pytest.mark.parametrize("pre", ["gpt-2", "llama3", "qwen2"])
def test_llama_cpp_renders_and_tokenises_conversations_as_we_do(tmp_path: Path, pre: str) -> None:
    tokenizer = Tokenizer.train([inspect.getsource(json)], 400, pre=pre)
    path = tmp_path / "model.gguf"
    model = spread_model(tiny_config(vocab_size=400, n_layers=1))
    export_gguf(model, tokenizer, path, ExportConfig(), {}, CHATML)
    found = llama_cpp.chat_tokens(path, [as_messages(turns) for turns in TURNS])
    assert found == [prompt_ids(turns, tokenizer) for turns in TURNS]
