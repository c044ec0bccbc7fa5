"""Tokenizers of other programs through a GGUF file: llama.cpp splits text as the library that made them does."""

import copy
from pathlib import Path

import pytest

from nanochat_cli.config.schema import ExportConfig
from nanochat_cli.data.foreign_tokenizer import adopt
from nanochat_cli.export import llama_cpp
from nanochat_cli.formats.gguf.file import GGUFFile
from nanochat_cli.formats.gguf.read import load_gguf
from nanochat_cli.formats.gguf.write import export_gguf
from tests.data.foreign_tokenizers import SPLITTERS, TEXTS, VOCAB, foreign, plain_ids
from tests.inference.tiny_models import spread_model, tiny_config

BOS, EOS = 1, 2
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>\r\n{% endfor %}"


@pytest.mark.skipif(not llama_cpp.is_available(), reason="needs xllamacpp")
@pytest.mark.parametrize("pre", SPLITTERS)
def test_llama_cpp_splits_text_as_the_library_does(tmp_path: Path, pre: str) -> None:
    definition = foreign(pre)
    tokenizer = adopt(copy.deepcopy(definition), "theirs", eos_id=EOS, bos_id=BOS)
    path = tmp_path / "model.gguf"
    model = spread_model(tiny_config(vocab_size=VOCAB, n_layers=1))
    export_gguf(model, tokenizer, path, ExportConfig(), {}, TEMPLATE)
    assert llama_cpp.tokenize(path, TEXTS) == [plain_ids(definition, text) for text in TEXTS]


@pytest.mark.parametrize("pre", [*SPLITTERS, "starcoder"])
def test_the_ends_of_a_text_and_the_template_survive_the_file(tmp_path: Path, pre: str) -> None:
    tokenizer = adopt(foreign("smollm" if pre == "starcoder" else pre), "theirs", eos_id=EOS, bos_id=BOS)
    if pre == "starcoder":  # the same pre-tokenizer under another name
        tokenizer.pre = pre
    path = tmp_path / "model.gguf"
    model = spread_model(tiny_config(vocab_size=VOCAB, n_layers=1))
    export_gguf(model, tokenizer, path, ExportConfig(), {}, TEMPLATE)
    fields = GGUFFile(path).fields
    assert (fields["tokenizer.ggml.pre"], fields["tokenizer.chat_template"]) == (pre, TEMPLATE)
    assert fields["tokenizer.ggml.add_bos_token"] is True
    _, back = load_gguf(path)
    assert (back.bos_id, back.eos_id, back.special_tokens) == (BOS, EOS, tokenizer.special_tokens)
    assert [back.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
