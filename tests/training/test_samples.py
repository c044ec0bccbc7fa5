"""Samples are continuations of the corpus's own held-out text, beside what followed in it."""

import pytest

from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.training.samples import Sample, held_out_prompts, write_samples

RUST = [
    "".join(f"pub fn area_{n}_{i}(w: u32, h: u32) -> u32 {{\n    w * h + {i}\n}}\n\n" for i in range(40))
    for n in range(9)
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(RUST, 400)


@pytest.mark.parametrize("context", [32, 64, 1024])
def test_prompts_and_their_continuations_are_neighbours_in_documents_spread_over_all(tokenizer, context):
    found = held_out_prompts([text.encode() for text in RUST], tokenizer, context, 3)
    sources = [next(i for i, text in enumerate(RUST) if one.prompt + one.truth in text) for one in found]
    assert sources == [0, 3, 6]
    for one in found:
        assert 0 < len(tokenizer.encode(one.prompt)) <= min(64, context // 2)
        assert 0 < len(tokenizer.encode(one.truth)) <= 96
        assert "def " not in one.prompt + one.truth
        assert "\n" in one.prompt[-1] + one.truth[0], "it ends with a line"
        ids = tokenizer.encode(one.prompt)
        assert tokenizer.encode(one.prompt + one.truth)[: len(ids)] == ids, "it ends with a token"


def test_a_line_break_that_is_one_token_with_the_indentation_after_it_is_not_in_the_prompt():
    text = "def f(x):\n" + "".join(f"    x = x + {i}\n" for i in range(40))
    (found,) = held_out_prompts([text.encode()], Tokenizer.train([text] * 5, 300), 64, 1)
    assert found.prompt.endswith("x = x + 19")
    assert found.truth.startswith("\n    x = x + 20\n")


def test_a_corpus_of_few_or_short_documents_has_fewer(tokenizer):
    assert held_out_prompts([b"short"], tokenizer, 64, 3) == []
    assert len(held_out_prompts([b"short", RUST[0].encode()], tokenizer, 64, 3)) == 1
    one_line = ("x = " + "1 + " * 200).encode()
    (found,) = held_out_prompts([one_line], tokenizer, 64, 3)
    assert 0 < len(tokenizer.encode(found.prompt)) <= 32


def test_the_file_holds_each_sample_beside_the_truth(tmp_path):
    path = write_samples(tmp_path, 7, [Sample("fn a", " { 1 }", " { 2 }"), Sample("fn b", " x", " y")])
    assert path == tmp_path / "samples" / "step-000007.txt"
    text = path.read_text()
    places = [text.index(part) for part in ("fn a", " { 1 }", " { 2 }", "fn b", " x", " y")]
    assert places == sorted(places)
