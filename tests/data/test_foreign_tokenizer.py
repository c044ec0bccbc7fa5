"""Tokenizers of other programs: the library's own ids for every text, and ends of a text by id, in one file."""

import copy
import json
from typing import Any

import pytest
import tokenizers

from nanochat_cli.data.foreign_tokenizer import adopt
from nanochat_cli.data.tokenizer import BYTE_TO_CHAR, Tokenizer
from nanochat_cli.errors import DataError
from tests.data.foreign_tokenizers import SPLITTERS, TEXTS, foreign, plain_ids

IM_END = 2


@pytest.mark.parametrize("pre", SPLITTERS)
def test_a_foreign_tokenizer_is_recognised_and_splits_as_the_library_does(pre: str) -> None:
    definition = foreign(pre)
    tokenizer = adopt(copy.deepcopy(definition), "theirs", eos_id=IM_END, bos_id=None)
    assert tokenizer.pre == pre
    for text in TEXTS:
        assert tokenizer.encode(text) == plain_ids(definition, text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_stand_alone_in_smollm() -> None:
    tokenizer = adopt(foreign("smollm"), "theirs", eos_id=None, bos_id=None)
    assert [tokenizer.token_bytes(token) for token in tokenizer.encode("1234")] == [b"1", b"2", b"3", b"4"]


def test_the_ends_of_a_text_are_given_by_id_and_survive_the_file() -> None:
    definition = foreign("smollm")
    by_name = adopt(copy.deepcopy(definition), "theirs", eos_id=None, bos_id=None)
    assert (by_name.eos_token, by_name.bos_id) == ("<|endoftext|>", None)
    by_id = adopt(copy.deepcopy(definition), "theirs", eos_id=IM_END, bos_id=1)
    for tokenizer in (by_id, Tokenizer.from_str(by_id.to_str()), by_id.padded_to(420)):
        assert (tokenizer.eos_token, tokenizer.eos_id, tokenizer.bos_id) == ("<|im_end|>", IM_END, 1)
    # The file is a plain tokenizer.json: the library alone encloses a text in what it says.
    plain = tokenizers.Tokenizer.from_str(by_id.to_str())
    assert plain.encode("ab").ids == [1, *by_id.encode("ab"), IM_END]


def test_the_end_of_a_text_is_a_special_token_even_where_it_was_none() -> None:
    definition = foreign("smollm")
    definition["added_tokens"] = [one for one in definition["added_tokens"] if one["content"] != "<|im_end|>"]
    tokenizer = adopt(definition, "theirs", eos_id=IM_END, bos_id=None)
    assert tokenizer.special_tokens["<|im_end|>"] == IM_END
    assert IM_END not in tokenizer.encode("a<|im_end|>b")


def test_a_vocabulary_without_some_bytes_loses_them_and_nothing_else() -> None:
    lacking = BYTE_TO_CHAR[4]
    definition = foreign("smollm", without=lacking)
    tokenizer = adopt(copy.deepcopy(definition), "theirs", eos_id=None, bos_id=None)
    assert tokenizer.missing_bytes == [4]
    assert tokenizer.encode("a\x04b") == tokenizer.encode("a") + tokenizer.encode("b")
    assert tokenizer.encode("a\x04b") == plain_ids(definition, "a\x04b")
    assert tokenizer.encode_bytes(b"a\x04\xff") == [*tokenizer.encode("a"), *tokenizer.encode_bytes(b"\xff")]
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(b"x\xfe\x05")) == b"x\xfe\x05"


def test_what_would_change_ids_beside_the_vocabulary_is_left_out() -> None:
    padding = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    padding |= {"pad_type_id": 0, "pad_token": "<|endoftext|>"}
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    definition = foreign("qwen2", normalizer={"type": "NFC"}, padding=padding, truncation=cut)
    tokenizer = adopt(definition, "theirs", eos_id=None, bos_id=None)
    assert tokenizer.encode(TEXTS[0]) == plain_ids(foreign("qwen2"), TEXTS[0])
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "e\u0301"


@pytest.mark.parametrize(
    ("changes", "ids", "message"),
    [
        ({}, {"eos_id": 4000}, "no token 4000"),
        ({}, {"bos_id": [1]}, r"no token \[1\]"),
        ({"normalizer": {"type": "Lowercase"}}, {}, "has a normalizer"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, {}, "does not share its pre-tokenizer"),
        ({"decoder": {"type": "Nothing"}}, {}, "not a tokenizer.json"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(changes: dict[str, Any], ids: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as refused:
        adopt(foreign("smollm", **changes), "theirs", **{"eos_id": None, "bos_id": None, **ids})
    assert "theirs" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_merges_are_ignored_with_llama_3_alone() -> None:
    definition = foreign("smollm")
    definition["model"]["ignore_merges"] = True
    with pytest.raises(DataError, match="uses ignore_merges"):
        adopt(definition, "theirs", eos_id=None, bos_id=None)
    definition = json.loads(json.dumps(foreign("llama-bpe")))
    definition["model"]["ignore_merges"] = False
    assert adopt(definition, "theirs", eos_id=None, bos_id=None).pre == "smaug-bpe"
