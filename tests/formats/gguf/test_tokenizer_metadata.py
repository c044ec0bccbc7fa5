"""The vocabulary in GGUF form: explicit, complete, and the same tokenizer when read back."""

import inspect
import json
from pathlib import Path

import pytest

from nanochat_cli.data.tokenizer import BASE_VOCAB, Tokenizer
from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.formats.gguf.tokenizer_metadata import tokenizer_from_metadata, tokenizer_metadata

TEXT = inspect.getsource(json)
SAMPLES = [
    "",
    "def f(x):\n\treturn x  # é∑😀\r\n\n",
    "it's 12345 'll",
    "<|endoftext|> [PAD600]",
    "\x00\x7f\u2028 \u0301",
]


@pytest.fixture(scope="module", params=["gpt-2", "llama3", "qwen2"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer.train([TEXT], 600, pre=request.param)


def test_reading_back_gives_a_tokenizer_that_encodes_and_decodes_the_same(tokenizer: Tokenizer) -> None:
    back = tokenizer_from_metadata(tokenizer_metadata(tokenizer, 600))
    assert (back.pre, back.eos_id, back.special_tokens) == (tokenizer.pre, tokenizer.eos_id, tokenizer.special_tokens)
    assert [back.token_text(i) for i in range(600)] == [tokenizer.token_text(i) for i in range(600)]
    for text in [*SAMPLES, TEXT]:
        assert back.encode(text) == tokenizer.encode(text)
        assert back.encode(text, allow_special=True) == tokenizer.encode(text, allow_special=True)
        assert back.decode(back.encode(text)) == text


def test_every_id_has_a_unique_text_and_a_type(tokenizer: Tokenizer) -> None:
    fields = tokenizer_metadata(tokenizer, 640)
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == len(set(tokens)) == 640
    assert [i for i, kind in enumerate(types) if kind == 3] == sorted(tokenizer.special_tokens.values())
    assert all(kind == 5 for kind in types[600:])
    assert tokens[600:] == [f"[PAD{i}]" for i in range(600, 640)]
    assert all(len(merge.split(" ")) == 2 for merge in fields["tokenizer.ggml.merges"])


def test_nothing_is_left_to_llama_cpps_defaults(tokenizer: Tokenizer) -> None:
    fields = tokenizer_metadata(tokenizer, 600)
    for role in ("bos", "eos", "eot"):
        assert fields[f"tokenizer.ggml.{role}_token_id"] == tokenizer.eos_id
    assert fields["tokenizer.ggml.padding_token_id"] == tokenizer.special_tokens["<|pad|>"]
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.ggml.add_eos_token"] is False


def test_the_tokens_of_infill_have_the_keys_that_llama_cpp_reads(tokenizer: Tokenizer) -> None:
    fields = tokenizer_metadata(tokenizer, 600)
    found = {key.split(".")[-1]: value for key, value in fields.items() if "fim_" in key}
    # llama.cpp's names (src/llama-arch.cpp, LLM_KV_TOKENIZER_FIM_PRE_ID and the five after it).
    ids = {"pre": 2, "suf": 4, "mid": 3, "pad": 7, "rep": 8, "sep": 9}
    assert found == {f"fim_{role}_token_id": token for role, token in ids.items()}
    old = Tokenizer.load(Path(__file__).parents[2] / "fixtures" / "written" / "data" / "tokenizer.json")
    found = {key.split(".")[-1]: value for key, value in tokenizer_metadata(old, 272).items() if "fim_" in key}
    assert found == {"fim_pre_token_id": 2, "fim_suf_token_id": 4, "fim_mid_token_id": 3}
    assert tokenizer_from_metadata(tokenizer_metadata(old, 272)).special_tokens == old.special_tokens


def test_pre_tokenizers_have_llama_cpps_names(tokenizer: Tokenizer) -> None:
    assert tokenizer_metadata(tokenizer, 600)["tokenizer.ggml.pre"] in ("gpt-2", "smaug-bpe", "qwen2")


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="600 tokens and the model only 512 embeddings"):
        tokenizer_metadata(tokenizer, 512)


def test_a_tokenizer_without_merges_is_refused_because_llama_cpp_does() -> None:
    with pytest.raises(ConfigError, match="no merges"):
        tokenizer_metadata(Tokenizer.train(["x"], BASE_VOCAB), BASE_VOCAB)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokens", None, "tokenizer.ggml.tokens is missing"),
        ("merges", None, "tokenizer.ggml.merges is missing"),
        ("model", "llama", "only byte-level BPE"),
        ("pre", "deepseek-coder", "pre = deepseek-coder"),
        ("token_type", [1], "do not fit together"),
        ("merges", ["abc"], "do not fit together"),
        ("merges", ["Ġzz qq"], "the vocabulary is damaged"),
    ],
)
def test_a_vocabulary_that_is_damaged_or_foreign_is_one_clear_line(
    tokenizer: Tokenizer, key: str, value: object, message: str
) -> None:
    fields = {**tokenizer_metadata(tokenizer, 600), f"tokenizer.ggml.{key}": value}
    with pytest.raises(DataError, match=message) as error:
        tokenizer_from_metadata({key: value for key, value in fields.items() if value is not None})
    assert "\n" not in str(error.value)
