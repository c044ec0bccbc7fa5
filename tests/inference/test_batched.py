"""Continuations drawn together are those drawn alone; their log-probabilities are the model's."""

import pytest
import torch

from nanochat_cli.errors import DataError
from nanochat_cli.inference.batched import MAX_ROWS, sample_batch
from nanochat_cli.inference.generate import generate
from nanochat_cli.inference.packed_model import PackedTransformer
from nanochat_cli.inference.sampling import SamplingConfig
from tests.architectures import build
from tests.inference.tiny_models import spread_model, tiny_config

FLOAT_ACTIVATIONS = {"quant": {"activations": False}}
"""Without the int8 grid, on which a last-bit difference between batch sizes can become a whole step."""


class LetterTokenizer:
    """One token per byte; 0 ends a document."""

    eos_id = 0
    bos_id = None
    never_sampled = ()

    def encode(self, text: str) -> list[int]:
        return list(text.encode("latin-1"))

    def token_bytes(self, token_id: int, /) -> bytes:
        return chr(token_id).encode()


def test_every_row_is_what_its_seed_generates_alone():
    model, tokenizer = spread_model(tiny_config(**FLOAT_ACTIVATIONS)), LetterTokenizer()
    prompts, seeds = ["def f", "fn main() "], [11, 900]
    settings = SamplingConfig(max_tokens=20, temperature=1.2, top_k=60, top_p=0.97, repetition_penalty=1.1, stop=("a",))
    found = sample_batch(model, tokenizer, prompts, 5, settings, seeds)
    assert len({one.finish for row in found for one in row}) > 1, "rows that end at different places are the point"
    for prompt, seed, completions in zip(prompts, seeds, found, strict=True):
        for j, completion in enumerate(completions):
            alone = SamplingConfig(
                max_tokens=20, temperature=1.2, top_k=60, top_p=0.97, repetition_penalty=1.1, stop=("a",), seed=seed + j
            )
            assert completion.text == "".join(generate(model, tokenizer, prompt, alone))


def test_recurrent_layers_share_the_prompt_too():
    model = build("plain+hybrid+dense+untied", vocab_size=256, **FLOAT_ACTIVATIONS)
    settings = SamplingConfig(max_tokens=12, temperature=1.0)
    (together,) = sample_batch(model, LetterTokenizer(), ["let x"], 4, settings, [3])
    for j, completion in enumerate(together):
        ((alone,),) = sample_batch(model, LetterTokenizer(), ["let x"], 1, settings, [3 + j])
        assert completion.tokens == alone.tokens


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_log_probabilities_are_those_of_one_pass_over_the_whole_text(temperature):
    model, tokenizer = spread_model(tiny_config(**FLOAT_ACTIVATIONS)), LetterTokenizer()
    settings = SamplingConfig(max_tokens=16, temperature=temperature)
    (completions,) = sample_batch(model, tokenizer, ["abc"], 3, settings, [5])
    for completion in completions:
        assert len(completion.log_probabilities) == len(completion.tokens)
        tokens = torch.tensor([tokenizer.encode("abc") + list(completion.tokens)])
        with torch.no_grad():
            expected = (model.logits(model(tokens)) / (temperature or 1)).log_softmax(-1)[0, 2:-1]
        expected = expected.gather(1, tokens[0, 3:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(completion.log_probabilities), expected, atol=1e-4, rtol=0)


def test_a_packed_model_draws_reproducibly_even_more_rows_than_fit_at_once():
    packed = PackedTransformer.from_model(spread_model(tiny_config()))
    settings = SamplingConfig(max_tokens=3, temperature=1.0)
    (first,) = sample_batch(packed, LetterTokenizer(), ["x"], MAX_ROWS + 2, settings, [0])
    (again,) = sample_batch(packed, LetterTokenizer(), ["x"], MAX_ROWS + 2, settings, [0])
    assert first == again
    assert len(first) == MAX_ROWS + 2
    assert len({one.tokens for one in first}) > MAX_ROWS // 2


def test_eos_ends_a_row_and_is_a_token_without_text():
    class EndingTokenizer(LetterTokenizer):
        eos_id = 7

    model = spread_model(tiny_config())
    (found,) = sample_batch(model, EndingTokenizer(), ["q"], 24, SamplingConfig(max_tokens=60, temperature=1.0), [1])
    ended = [one for one in found if one.finish == "eos"]
    assert ended
    assert all(one.tokens[-1] == 7 and 7 not in one.tokens[:-1] and "\x07" not in one.text for one in ended)


def test_the_context_ends_a_continuation_and_a_longer_prompt_is_refused():
    model, tokenizer = spread_model(tiny_config(max_seq_len=16)), LetterTokenizer()
    settings = SamplingConfig(max_tokens=50, temperature=0)
    ((completion,),) = sample_batch(model, tokenizer, ["x" * 10], 1, settings, [0])
    assert (len(completion.tokens), completion.finish) == (7, "length")
    with pytest.raises(DataError, match="17 tokens and the model's context holds 16"):
        sample_batch(model, tokenizer, ["x" * 17], 1, settings, [0])
