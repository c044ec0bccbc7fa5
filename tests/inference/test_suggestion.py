"""The infill sampler against llama.cpp's own example and a transcript of its loops, and the rules for lines."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat_cli.inference.sampling import SamplingConfig, sample
from nanochat_cli.inference.suggestion import InfillSampler, Suggestion


class Words:
    """A tokenizer whose tokens are these words; the first ends a text."""

    eos_id, bos_id, never_sampled = 0, None, ()

    def __init__(self, *words: str) -> None:
        self.words = ["", *words]

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def token_bytes(self, token_id: int, /) -> bytes:
        return self.words[token_id].encode()


def drawn_from(words: list[str], chances: list[float], end: float = 0.0) -> dict[str, float]:
    """By word, what the sampler draws from."""
    tokenizer = Words(*words)
    given = torch.tensor([[end, *chances]], dtype=torch.float64)
    found = InfillSampler(tokenizer, 0, frozenset({0}))(given)[0]
    return {tokenizer.words[token]: float(found[token]) for token in found.nonzero().flatten().tolist()}


def test_the_example_of_llama_h():
    """hel 0.5, hell 0.2, hello 0.1, dummy 0.1: hel has 0.8 then, and dummy is too improbable to be drawn."""
    found = InfillSampler(Words("hel", "hell", "hello", "dummy"), 0, frozenset({0}))
    joined = found._joined({1: 0.5, 2: 0.2, 3: 0.1, 4: 0.1})
    assert joined == pytest.approx({1: 0.8, 4: 0.1})
    assert drawn_from(["hel", "hell", "hello", "dummy"], [0.5, 0.2, 0.1, 0.1]) == {"hel": 1.0}


@pytest.mark.parametrize(
    ("chances", "end", "expected"),
    [
        ([0.45, 0.45], 0.101, {"": 1.0}),  # 3 · 0.101 · 3 candidates > 0.9 of text
        ([0.6, 0.3], 0.05, {"a": 0.6 / 0.65, "": 0.05 / 0.65}),  # b has less than 1/3 of what is left
        ([0.5, 0.45], 0.0, {"a": 0.5 / 0.95, "b": 0.45 / 0.95}),
        ([0.1, 0.1], 0.0, {"": 1.0}),  # nothing is probable enough
    ],
)
def test_a_likely_end_is_taken_and_what_is_improbable_left_out(chances, end, expected):
    assert drawn_from(["a", "b"], chances, end) == pytest.approx(expected)


def transcript(words: list[str], chances: dict[int, float]) -> dict[int, float]:
    """llama_sampler_infill_apply, loop by loop; token 0 is the only one that ends a text."""
    ids = sorted(chances, key=lambda token: -chances[token])
    p = [chances[token] for token in ids]
    dead = [False] * len(ids)
    p_eog = sum(p[i] for i in range(len(ids)) if ids[i] == 0)
    p_txt = sum(p[i] for i in range(len(ids)) if ids[i] != 0)
    if 3 * p_eog * len(ids) > p_txt:
        return {0: 1.0}
    for i0 in range(len(ids)):
        for i1 in range(len(ids)):
            if dead[i0]:
                break
            if i0 == i1 or dead[i1]:
                continue
            piece0, piece1 = words[ids[i0]], words[ids[i1]]
            if piece0 and len(piece0) <= len(piece1) and piece1[: len(piece0)] == piece0:
                dst, src = (i1, i0) if p[i1] > p[i0] else (i0, i1)
                p[dst] += p[src]
                dead[src], p[src] = True, 0.0
    kept = [i for i in range(len(ids)) if p[i] >= 0.2 or ids[i] == 0]
    n_text = sum(ids[i] != 0 for i in kept)
    if n_text == 0:
        return {0: 1.0}
    total = sum(p[i] for i in kept)
    threshold = 1 / (n_text + 1)
    last = [i for i in kept if p[i] / total >= threshold or ids[i] == 0]
    total = sum(p[i] for i in last)
    return {ids[i]: p[i] / total for i in last}


@given(
    st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=6, unique=True),
    st.lists(st.integers(1, 10**6), min_size=7, max_size=7, unique=True),
    st.integers(0, 10**5),
)
def test_it_draws_from_what_llama_cpps_loops_leave(words, weights, end):
    total = sum(weights[: len(words)]) + end
    chances = {0: end / total, **{i + 1: weights[i] / total for i in range(len(words))}}
    chances = {token: chance for token, chance in sorted(chances.items(), key=lambda one: -one[1]) if chance > 0}
    found = InfillSampler(Words(*words), 0, frozenset({0})).choose(chances)
    assert found == pytest.approx(transcript(["", *words], chances))


def test_sampling_draws_only_what_the_sampler_leaves_and_greedily_as_before():
    sampler = InfillSampler(Words("hel", "hello", "dummy"), 0, frozenset({0}))
    logits = torch.tensor([[0.001, 0.5, 0.3, 0.199]]).log().repeat(64, 1)
    rows = [torch.Generator().manual_seed(seed) for seed in range(64)]
    free = sample(logits, SamplingConfig(temperature=1), None, rows)
    assert set(free.tolist()) >= {1, 2, 3}
    rows = [torch.Generator().manual_seed(seed) for seed in range(64)]
    assert set(sample(logits, SamplingConfig(temperature=1), None, rows, reshape=sampler).tolist()) == {1}
    assert set(sample(logits, SamplingConfig(temperature=0), None, rows, reshape=sampler).tolist()) == {1}


def text_of(pieces: list[str], indent: int = 0, late_after: int | None = None) -> tuple[str, bool]:
    """What a suggestion makes of tokens, and whether a rule cut it; its time is over after so many."""
    tokenizer, fed = Words(*pieces), 0
    stream = Suggestion(tokenizer, (), indent, None if late_after is None else late_after - 0.5, lambda: fed)
    text = ""
    for token in range(1, len(pieces) + 1):
        text += stream.feed(token)
        fed += 1
        if stream.stopped:
            return text, stream.cut
    return text + stream.finish(), stream.cut


@given(st.lists(st.text(" \tx\n", min_size=1, max_size=4), max_size=8), st.integers(0, 3))
def test_a_suggestion_ends_where_a_line_is_indented_less_however_it_is_cut_into_tokens(pieces, indent):
    whole = "".join(pieces)
    first, *lines = whole.split("\n")
    kept = [first]
    cut = False
    for number, line in enumerate(lines):
        margin = line[: len(line) - len(line.lstrip(" \t"))]
        ends = margin != line or number + 1 < len(lines)  # something comes after its white space
        cut = len(margin) < indent and ends
        kept.append(margin if cut else line)
        if cut:
            break
    assert text_of(pieces, indent) == ("\n".join(kept), cut)


def test_a_suggestion_ends_with_the_line_in_which_its_time_is_over():
    pieces = ["a", "b\n", "c", "d", "\ne", "f\n"]
    assert text_of(pieces, late_after=2) == ("ab\ncd\n", True)
    assert text_of(pieces, late_after=1) == ("ab\n", True)
    assert text_of(pieces, late_after=99) == ("ab\ncd\nef\n", False)
    assert text_of(["a", "b", "c"], late_after=1) == ("abc", False)
