"""A row of a batch draws what it draws alone, whoever joins, leaves or stands beside it.

The native decoder keeps this to the last bit, so that log-probabilities are compared with ==. Products of torch sum in
an order that depends on the number of rows: there the model has float activations, on which a last bit stays one, and
tokens are compared.
"""

from dataclasses import replace

import pytest
import torch

from nanochat_cli.errors import DataError
from nanochat_cli.inference.continuous_batch import ContinuousBatch, Row
from nanochat_cli.inference.packed_model import PackedTransformer
from nanochat_cli.inference.sampling import SamplingConfig
from nanochat_cli.model.cache import KVCache
from tests.architectures import build
from tests.inference.tiny_models import spread_model, tiny_config

FLOAT_ACTIVATIONS = {"quant": {"activations": False}}
MANNERS = (
    SamplingConfig(max_tokens=24, temperature=0),
    SamplingConfig(max_tokens=9, temperature=1.0, top_k=40),
    SamplingConfig(max_tokens=17, temperature=1.3, top_p=0.9, repetition_penalty=1.2),
)


def ids(length: int, seed: int) -> list[int]:
    return torch.randint(1, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def a_row(number: int, **options: bool) -> Row:
    """Rows of different lengths and settings; every third has the prompt of the first."""
    prompt = ids(7, 0) if number % 3 == 0 else ids(1 + 3 * number, number)
    return Row(prompt, MANNERS[number % len(MANNERS)], 100 + number, scored=True, **options)


def drawn(row: Row) -> tuple[list[int], list[float], str | None]:
    return row.tokens, row.log_probabilities, row.finish


def alone(model, number: int, **options: bool):
    batch, row = ContinuousBatch(model, 1), a_row(number, **options)
    batch.submit(row)
    while batch.step():
        pass
    return drawn(row)


def run_staggered(model, rows: list[Row], places: int) -> None:
    """Two rows at the beginning, and another one every second step."""
    batch, waiting, step = ContinuousBatch(model, places), list(rows), 0
    while True:
        for _ in range(2 if step == 0 else step % 2):
            if waiting:
                batch.submit(waiting.pop(0))
        step += 1
        if not batch.step() and not waiting:
            return


@pytest.mark.parametrize("shape", [{}, {"qk_norm": True, "quant": {"scale": 64}}, {"sub_norm": True}], ids=str)
def test_native_rows_that_come_and_go_draw_to_the_last_bit_what_they_draw_alone(shape):
    packed = PackedTransformer.from_model(spread_model(tiny_config(**shape)))
    assert packed._native is not None
    rows = [a_row(number) for number in range(10)]
    run_staggered(packed, rows, places=5)
    assert [drawn(row) for row in rows] == [alone(packed, number) for number in range(10)]
    assert len({tuple(row.tokens) for row in rows}) > 5


@pytest.mark.parametrize(
    "kind", ["plain+attention+dense+tied", "plain+hybrid+dense+untied", "mhc-2+attention+moe+untied"]
)
def test_rows_of_other_models_draw_the_tokens_that_they_draw_alone(kind):
    model = build(kind, vocab_size=256, max_seq_len=64, **FLOAT_ACTIVATIONS)
    rows = [a_row(number) for number in range(6)]
    run_staggered(model, rows, places=3)
    for number, row in enumerate(rows):
        tokens, scores, finish = alone(model, number)
        assert (row.tokens, row.finish) == (tokens, finish)
        assert row.log_probabilities == pytest.approx(scores, abs=1e-4)


def test_a_row_that_is_cancelled_leaves_its_place_to_the_next_and_the_others_alone():
    packed = PackedTransformer.from_model(spread_model(tiny_config()))
    batch, rows = ContinuousBatch(packed, 2), [a_row(number) for number in (0, 2, 5, 6)]
    for row in rows:
        batch.submit(row)
    rows[3].cancel()  # still waiting
    assert batch.step() == rows[:2]
    rows[0].cancel()
    assert batch.step() == [rows[1], rows[2]]
    assert batch.running == 2
    while batch.step():
        pass
    assert [len(row.tokens) for row in (rows[0], rows[3])] == [1, 0]
    assert [row.finish for row in rows] == ["cancelled", "length", "length", "cancelled"]
    assert [drawn(row) for row in rows[1:3]] == [alone(packed, 2), alone(packed, 5)]


def test_a_sliding_row_and_one_that_ends_at_the_context_share_a_batch():
    packed = PackedTransformer.from_model(spread_model(tiny_config(max_seq_len=16)))
    asked = SamplingConfig(max_tokens=40, temperature=1.0)

    def pair() -> list[Row]:
        return [Row(ids(6, 1), asked, 5, slides=True, scored=True), Row(ids(9, 2), asked, 6, scored=True)]

    together, batch = pair(), ContinuousBatch(packed, 2)
    for row in together:
        batch.submit(row)
    while batch.step():
        pass
    assert [len(row.tokens) for row in together] == [40, 16 - 9 + 1]
    for row, single in zip(together, pair(), strict=True):
        other = ContinuousBatch(packed, 1)
        other.submit(single)
        while other.step():
            pass
        assert drawn(row) == drawn(single)


def test_an_equal_prompt_is_read_once_and_a_longer_one_from_where_it_differs():
    model = spread_model(tiny_config(**FLOAT_ACTIVATIONS))
    read: list[list[int]] = []

    class Counted:
        config, device, dtype = model.config, model.device, model.dtype

        def next_logits(self, tokens, cache, /):
            if tokens.shape[1] > 1:
                read.append(tokens[0].tolist())
            return model.next_logits(tokens, cache)

    batch, prompt = ContinuousBatch(Counted(), 2), ids(12, 3)

    def text_of(prompt: list[int], reuse: bool, seed: int = 4) -> Row:
        row = Row(prompt, SamplingConfig(max_tokens=6, temperature=1.0), seed, reuse=reuse)
        batch.submit(row)
        while batch.step():
            pass
        return row

    first, again, other_seed = text_of(prompt, False), text_of(prompt, False), text_of(prompt, False, seed=5)
    assert read == [prompt]
    assert (first.tokens, first.reused, again.reused) == (again.tokens, 0, 12)
    assert other_seed.tokens != first.tokens
    longer = [*prompt, *first.tokens[:4], 1, 2, 3]
    assert text_of(longer, False).reused == 0
    more = text_of([*longer[:-1], 9, 8], True)
    assert more.reused == len(longer) - 1
    assert read[1:] == [longer, [9, 8]]
    batch = ContinuousBatch(model, 1)
    assert more.tokens == text_of(more.prompt, False).tokens


def test_a_state_that_cannot_go_back_is_not_reused_but_shared_at_the_prompt():
    model = build("plain+hybrid+dense+untied", vocab_size=256, **FLOAT_ACTIVATIONS)
    batch, prompt = ContinuousBatch(model, 2), ids(8, 1)
    asked = SamplingConfig(max_tokens=5, temperature=1.0)
    rows = [Row(prompt, asked, 0, reuse=True), Row(prompt, asked, 0), Row(prompt, asked, 0, reuse=True)]
    for row in rows:
        batch.submit(row)
    while batch.step():
        pass
    assert [row.reused for row in rows] == [0, 8, 0]
    assert rows[0].tokens == rows[1].tokens == rows[2].tokens


def test_what_cannot_be_continued_is_refused_before_it_waits():
    batch = ContinuousBatch(spread_model(tiny_config(max_seq_len=16)), 1)
    with pytest.raises(DataError, match="17 tokens and the model's context holds 16"):
        batch.submit(Row(ids(17, 0), MANNERS[0], 0))
    with pytest.raises(ValueError, match="at least one token"):
        batch.submit(Row([], MANNERS[0], 0))
    nothing = Row([1], replace(MANNERS[0], max_tokens=0), 0)
    batch.submit(nothing)
    assert batch.step() == []
    assert (nothing.tokens, nothing.finish) == ([], "length")


def test_a_copied_row_is_a_copy_up_to_a_length():
    cache = KVCache(tiny_config(), 2, 8)
    first, second = cache.row(0), cache.row(1)
    first.keys.normal_()
    first.values.normal_()
    second.copy_from(first, 5)
    assert (first.length, second.length) == (0, 5)
    for mine, theirs in ((second.keys, first.keys), (second.values, first.values)):
        assert torch.equal(mine[..., :5, :], theirs[..., :5, :])
        assert not mine[..., 5:, :].any()
    second.keys.zero_()
    assert first.keys[..., :5, :].all()
