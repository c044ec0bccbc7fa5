"""The tokenizer: exact round trips, an exact vocabulary, and nothing that llama.cpp would do differently."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from nanochat_cli.data.tokenizer import BASE_VOCAB, SPECIAL_TOKENS, Tokenizer
from nanochat_cli.errors import ConfigError, DataError
from tests.data.corpora import random_text

TEXTS = [random_text(random.Random(seed), 2000) for seed in range(20)]
BY_PRE = {pre: Tokenizer.train(TEXTS, 512, pre=pre) for pre in ("gpt-2", "llama3", "qwen2")}
every_pre = pytest.mark.parametrize("pre", BY_PRE)


@every_pre
@given(content=st.binary() | st.text().map(str.encode) | st.lists(st.binary() | st.just("é😀".encode())).map(b"".join))
def test_every_byte_string_round_trips(pre: str, content: bytes) -> None:
    tokenizer = BY_PRE[pre]
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(content)) == content


@every_pre
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_text_is_encoded_as_the_plain_library_encodes_it(pre: str, text: str) -> None:
    plain = tokenizers.Tokenizer.from_str(BY_PRE[pre].to_str())
    plain.encode_special_tokens = True
    assert BY_PRE[pre].encode(text) == plain.encode(text, add_special_tokens=False).ids
    assert BY_PRE[pre].encode_bytes(text.encode()) == BY_PRE[pre].encode_batch([text])[0]
    assert BY_PRE[pre].decode(BY_PRE[pre].encode(text)) == text == plain.decode(BY_PRE[pre].encode(text))


def test_a_lone_surrogate_is_encoded_and_does_not_fail() -> None:
    tokenizer = BY_PRE["gpt-2"]
    assert tokenizer.decode_bytes(tokenizer.encode("a\ud800b")) == b"a\xed\xa0\x80b"


def test_a_character_cut_in_half_decodes_to_the_replacement_character() -> None:
    tokenizer = BY_PRE["gpt-2"]
    assert tokenizer.decode(tokenizer.encode_bytes("é".encode()[:1])) == "\ufffd"


@every_pre
def test_the_vocabulary_has_exactly_the_requested_size_and_every_byte(pre: str) -> None:
    tokenizer = BY_PRE[pre]
    assert tokenizer.vocab_size == 512
    assert {bytes([byte]) for byte in range(256)} <= {tokenizer.token_bytes(i) for i in range(512)}
    texts = [tokenizer.token_text(i) for i in range(512)]
    assert len(set(texts)) == 512


@pytest.mark.parametrize(("pre", "name"), [("gpt-2", "gpt-2"), ("llama3", "smaug-bpe"), ("qwen2", "qwen2")])
def test_the_llama_cpp_name_of_the_pre_tokenizer_survives_the_file(pre: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    BY_PRE[pre].save(path)
    loaded = Tokenizer.load(path)
    assert loaded.pre == BY_PRE[pre].pre == name
    assert loaded.to_str() == BY_PRE[pre].to_str()
    # The file is a plain tokenizer.json.
    assert tokenizers.Tokenizer.from_file(str(path)).get_vocab_size() == 512


def test_digits_are_grouped_as_each_pre_tokenizer_says() -> None:
    texts = ["x 1234567 y\n" * 50]
    pieces = {pre: Tokenizer.train(texts, 300, pre=pre) for pre in BY_PRE}
    longest = {
        pre: max(
            len(tokenizer.token_bytes(i).strip())
            for i in range(300)
            if i not in tokenizer.unused_ids and tokenizer.token_bytes(i).strip().isdigit()
        )
        for pre, tokenizer in pieces.items()
    }
    assert longest == {"gpt-2": 7, "llama3": 3, "qwen2": 1}


def test_no_token_is_longer_than_allowed() -> None:
    texts = ["a" * 40 + " "] * 20
    longest = {}
    for limit in (4, 24, 64):
        tokenizer = Tokenizer.train(texts, 400, max_token_length=limit)
        used = set(range(400)) - set(tokenizer.unused_ids) - set(tokenizer.special_tokens.values())
        longest[limit] = max(len(tokenizer.token_bytes(i)) for i in used)
    # The same text supports a longer token when one is allowed.
    assert longest[4] <= 4 < longest[24] <= 24 < longest[64]


def test_training_is_deterministic() -> None:
    assert Tokenizer.train(TEXTS, 512).to_str() == BY_PRE["gpt-2"].to_str()
    assert Tokenizer.train(reversed(TEXTS), 512).to_str() == BY_PRE["gpt-2"].to_str()


def test_special_tokens_in_text_stay_text_unless_allowed() -> None:
    tokenizer = BY_PRE["gpt-2"]
    text = "a<|endoftext|>b<|im_start|>"
    specials = set(tokenizer.special_tokens.values())
    assert not specials & set(tokenizer.encode(text))
    assert not specials & set(tokenizer.encode_batch([text])[0])
    assert tokenizer.decode(tokenizer.encode(text)) == text
    allowed = tokenizer.encode(text, allow_special=True)
    assert [i for i in allowed if i in specials] == [tokenizer.eos_id, tokenizer.special_tokens["<|im_start|>"]]
    assert tokenizer.decode(allowed) == text
    assert tokenizer.decode(allowed, skip_special=True) == "ab"
    # Allowing them once must not change the next call.
    assert not specials & set(tokenizer.encode(text))


@every_pre
def test_the_special_tokens_have_the_ids_that_the_page_documents(pre: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "tokenizing.md").read_text(encoding="utf-8")
    documented = {name: int(token) for token, name in re.findall(r"^ (\d)  (<\|\w+\|>)", page, re.MULTILINE)}
    # Written out here too: no later version may move them.
    assert documented == {
        "<|endoftext|>": 0,
        "<|pad|>": 1,
        "<|fim_prefix|>": 2,
        "<|fim_middle|>": 3,
        "<|fim_suffix|>": 4,
        "<|im_start|>": 5,
        "<|im_end|>": 6,
        "<|fim_pad|>": 7,
        "<|repo_name|>": 8,
        "<|file_sep|>": 9,
    }
    tokenizer = BY_PRE[pre]
    assert tokenizer.special_tokens == documented
    assert sorted(tokenizer.token_bytes(token) for token in range(10, 266)) == [bytes([byte]) for byte in range(256)]
    assert tokenizer.eos_id == 0
    assert tokenizer.token_bytes(tokenizer.eos_id) == b"<|endoftext|>"


def test_a_corpus_too_small_for_the_vocabulary_leaves_unused_ids_that_no_text_reaches() -> None:
    tokenizer = Tokenizer.train(["aa aa"], 300)
    assert tokenizer.vocab_size == 300
    assert 0 < len(tokenizer.unused_ids) <= 300 - BASE_VOCAB
    for unused in tokenizer.unused_ids:
        assert tokenizer.token_text(unused) == f"[PAD{unused}]"
        assert unused not in tokenizer.encode(f"x[PAD{unused}]y", allow_special=True)
    assert Tokenizer.from_str(tokenizer.to_str()).unused_ids == tokenizer.unused_ids


def test_neither_filler_nor_special_tokens_are_for_sampling_but_the_end_of_the_text_is() -> None:
    tokenizer = Tokenizer.train(["aa aa"], 300)
    special = [tokenizer.special_tokens[name] for name in SPECIAL_TOKENS if name != "<|endoftext|>"]
    assert set(tokenizer.never_sampled) == {*tokenizer.unused_ids, *special}
    assert all(tokenizer.byte_lengths()[tokenizer.never_sampled] == 0)


def test_padding_does_not_change_the_tokenizer_it_starts_from() -> None:
    small = Tokenizer.train(TEXTS, 300)
    padded = small.padded_to(310)
    assert (small.vocab_size, padded.vocab_size) == (300, 310)
    assert padded.encode(TEXTS[0]) == small.encode(TEXTS[0])
    assert small.padded_to(300) is small
    with pytest.raises(DataError, match=r"300 tokens but model\.vocab_size = 299"):
        small.padded_to(299)


def test_byte_lengths_are_those_of_the_text_and_zero_for_other_tokens() -> None:
    tokenizer = Tokenizer.train(TEXTS[:1], 400).padded_to(420)
    lengths = tokenizer.byte_lengths()
    assert lengths.shape == (420,)
    assert lengths.dtype == np.int64
    content = "".join(TEXTS).encode()
    assert int(lengths[tokenizer.encode_bytes(content)].sum()) == len(content)
    assert not lengths[[*tokenizer.special_tokens.values(), *tokenizer.unused_ids]].any()


def test_a_vocabulary_smaller_than_the_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match=rf"model\.vocab_size = 265 is too small.*at least {BASE_VOCAB}"):
        Tokenizer.train(TEXTS, BASE_VOCAB - 1)


def damaged(**changes: object) -> str:
    definition = json.loads(BY_PRE["gpt-2"].to_str())
    for path, value in changes.items():
        *parents, key = path.split("__")
        target = definition
        for parent in parents:
            target = target[parent]
        target[key] = value
    return json.dumps(definition)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a tokenizer.json"),
        (damaged(normalizer={"type": "NFC"}), "normalizer"),
        (damaged(pre_tokenizer={"type": "Whitespace"}), "llama.cpp does not share its pre-tokenizer"),
        (damaged(pre_tokenizer=None), "llama.cpp does not share its pre-tokenizer"),
        (damaged(model__ignore_merges=True), "uses ignore_merges"),
        (damaged(added_tokens=[]), "no end-of-text token"),
        (damaged(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}), "a WordLevel tokenizer"),
    ],
)
def test_a_tokenizer_that_llama_cpp_cannot_follow_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        Tokenizer.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_tokenizer_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.json: cannot read the tokenizer: No such file or directory$"):
        Tokenizer.load(tmp_path / "gone.json")
