"""Generation: the cache equals reading everything again, a batch equals its rows, text streams as whole characters."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat_cli.config.schema import MTPConfig
from nanochat_cli.data.tokenizer import BASE_VOCAB, Tokenizer
from nanochat_cli.errors import DataError
from nanochat_cli.inference.batched import sample_batch
from nanochat_cli.inference.generate import generate, generate_tokens
from nanochat_cli.inference.sampling import SamplingConfig
from nanochat_cli.inference.speculative import make_drafter, speculate_tokens
from nanochat_cli.inference.text_stream import TextStream
from nanochat_cli.model.cache import KVCache
from nanochat_cli.model.mtp import MTP
from nanochat_cli.model.transformer import Transformer
from tests.architectures import build
from tests.inference.tiny_models import spread_model, tiny_config

GREEDY = SamplingConfig(max_tokens=20, temperature=0)
FLOAT_ACTIVATIONS = {"quant": {"activations": False}}
"""Without the int8 grid, on which a last-bit difference can become a whole step, agreement is to float rounding."""


class ByteTokenizer:
    """One token per byte, 0 ends a document; enough to test streaming against an obvious truth."""

    eos_id = 0
    bos_id = None
    never_sampled = ()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token_id: int, /) -> bytes:
        return bytes([token_id])


class Scripted(Transformer):
    """Writes a fixed byte string whatever it reads."""

    def __init__(self, script: bytes) -> None:
        super().__init__(tiny_config(dim=32, n_heads=2, n_kv_heads=1, ffn_dim=64, n_layers=1, max_seq_len=128))
        self.script = iter(script)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*hidden.shape[:-1], 256)
        logits[..., next(self.script)] = 10
        return logits


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(1, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 7], [1, 4, 1, 6]])
@torch.no_grad()
def test_reading_through_the_cache_in_any_pieces_equals_one_forward_pass(n_kv_heads: int, chunks: list[int]) -> None:
    model = spread_model(tiny_config(n_kv_heads=n_kv_heads, qk_norm=True, **FLOAT_ACTIVATIONS))
    tokens = torch.tensor([prompt(12, 1), prompt(12, 2)])
    cache = KVCache(model.config, batch_size=2)
    pieces = [model(piece, cache) for piece in tokens.split(chunks, dim=1)]
    assert cache.length == 12
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), atol=2e-5, rtol=0)


@torch.no_grad()
def test_greedy_generation_equals_argmax_of_a_full_pass_at_every_step() -> None:
    model = spread_model(tiny_config(**FLOAT_ACTIVATIONS))
    tokens = prompt(5, 3)
    expected = []
    for _ in range(20):
        expected.append(int(model.logits(model(torch.tensor([tokens + expected])))[0, -1].argmax()))
    assert [step[0] for step in generate_tokens(model, [tokens], GREEDY)] == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_generates_what_its_rows_generate_alone(temperature: float) -> None:
    model = spread_model(tiny_config(**FLOAT_ACTIVATIONS))
    prompts = [prompt(6, seed) for seed in range(3)]
    sampling = SamplingConfig(max_tokens=15, temperature=temperature, top_k=50, top_p=0.95, seed=5)
    together = list(generate_tokens(model, prompts, sampling))
    for row, tokens in enumerate(prompts):
        alone = SamplingConfig(max_tokens=15, temperature=temperature, top_k=50, top_p=0.95, seed=5 + row)
        assert [step[row] for step in together] == [step[0] for step in generate_tokens(model, [tokens], alone)]


def test_the_seed_decides_and_the_global_generator_is_not_touched() -> None:
    model = spread_model(tiny_config())
    state = torch.get_rng_state()

    def run(seed: int) -> list[list[int | None]]:
        return list(generate_tokens(model, [prompt(4, 0)], SamplingConfig(max_tokens=12, temperature=1.0, seed=seed)))

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_row_ends_at_eos_while_the_others_continue() -> None:
    model = spread_model(tiny_config())
    prompts = [prompt(6, seed) for seed in range(2)]
    free = list(generate_tokens(model, prompts, GREEDY))
    eos = free[7][0]
    assert eos is not None
    first = next(i for i, step in enumerate(free) if step[0] == eos)
    expected = [step[1] for step in free]
    stopped = list(generate_tokens(model, prompts, GREEDY, eos_id=eos))
    assert [step[0] for step in stopped] == [step[0] for step in free[:first]] + [None] * (len(stopped) - first)
    assert [step[1] for step in stopped if step[1] is not None] == expected[
        : len([s for s in stopped if s[1] is not None])
    ]


@pytest.mark.parametrize("mixing", ["attention", "hybrid"])
def test_beyond_the_context_the_later_half_is_read_again(mixing: str) -> None:
    """And nothing but that half: keys and values, and the states of recurrent layers, of what came before are gone."""
    model = build(f"plain+{mixing}+dense+untied", max_seq_len=16, vocab_size=256, **FLOAT_ACTIVATIONS)
    start = prompt(10, 4)
    got = [step[0] for step in generate_tokens(model, [start], SamplingConfig(max_tokens=40, temperature=0))]
    assert len(got) == 40
    text, window = list(start), list(start)
    with torch.no_grad():
        for token in got:
            if len(window) > 16:
                window = text[-8:]
            expected = int(model.logits(model(torch.tensor([window])))[0, -1].argmax())
            assert token == expected
            text.append(expected)
            window.append(expected)


def test_a_prompt_longer_than_the_context_is_refused_in_one_line() -> None:
    model = spread_model(tiny_config(max_seq_len=16))
    with pytest.raises(DataError, match="17 tokens and the model's context holds 16"):
        next(generate_tokens(model, [prompt(17, 0)], GREEDY))


def test_an_empty_prompt_starts_a_document_after_eos() -> None:
    model = spread_model(tiny_config(**FLOAT_ACTIVATIONS))
    tokenizer = ByteTokenizer()
    pieces = "".join(generate(model, tokenizer, "", GREEDY))
    raw = [step[0] for step in generate_tokens(model, [[0]], GREEDY, eos_id=0)]
    assert pieces == bytes(token for token in raw if token is not None).decode(errors="replace")


@given(st.text(max_size=40))
def test_pieces_are_whole_characters_and_join_to_the_text(text: str) -> None:
    stream = TextStream(ByteTokenizer())
    pieces = [stream.feed(byte) for byte in text.encode()]
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == text


@given(st.binary(max_size=40))
def test_invalid_utf8_becomes_replacement_characters_as_in_one_decode(raw: bytes) -> None:
    stream = TextStream(ByteTokenizer())
    assert "".join(stream.feed(byte) for byte in raw) + stream.finish() == raw.decode(errors="replace")


@given(st.text("abé", max_size=30), st.lists(st.text("abé", min_size=1, max_size=4), max_size=3))
def test_a_stop_string_ends_the_text_before_it_and_nothing_of_it_leaks(text: str, stops: list[str]) -> None:
    stream = TextStream(ByteTokenizer(), stops)
    out = ""
    for byte in text.encode():
        out += stream.feed(byte)
        if stream.stopped:
            break
    out += stream.finish()
    # The truth: the shortest beginning of the text that contains a stop string, cut where the first one starts.
    ends = [n for n in range(len(text) + 1) if any(stop in text[:n] for stop in stops)]
    expected = text if not ends else text[: min(text.find(s) for s in stops if s in text[: ends[0]])]
    assert out == expected
    assert stream.stopped == bool(ends)


@pytest.mark.parametrize(
    ("said", "stop", "expected"),
    [
        (b"hello\x00world", (), "hello"),
        ("naïve ∑\x00".encode(), (), "naïve ∑"),
        (b"one\n\ntwo\x00", ("\n\n",), "one"),
        (b"one\n\x00", ("\n\n",), "one\n"),
        (b"\x00", (), ""),
        (b"abc\xe2\x88\x00", (), "abc\ufffd"),
    ],
)
def test_generate_ends_at_eos_or_stop(said: bytes, stop: tuple[str, ...], expected: str) -> None:
    pieces = list(
        generate(Scripted(said), ByteTokenizer(), "x", SamplingConfig(max_tokens=50, temperature=0, stop=stop))
    )
    assert "".join(pieces) == expected
    assert all(pieces)


def test_max_tokens_bounds_the_text() -> None:
    assert (
        "".join(generate(Scripted(b"abcdef"), ByteTokenizer(), "x", SamplingConfig(max_tokens=3, temperature=0)))
        == "abc"
    )
    assert list(generate(Scripted(b"a"), ByteTokenizer(), "x", SamplingConfig(max_tokens=0))) == []


class PaddedTokenizer(ByteTokenizer):
    """Every even id only pads the vocabulary; any other is the character of its number."""

    never_sampled = range(2, 256, 2)

    def token_bytes(self, token_id: int, /) -> bytes:
        return chr(token_id).encode()


class Stubborn(Transformer):
    """Prefers every special token, then writes "a" three times and ends the text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tiny_config(vocab_size=tokenizer.vocab_size, dim=32, n_heads=2, n_kv_heads=1, ffn_dim=64))
        self.special = [token for name, token in tokenizer.special_tokens.items() if name != tokenizer.eos_token]
        (a,) = tokenizer.encode("a")
        self.script = iter([a, a, a, tokenizer.eos_id])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*hidden.shape[:-1], self.config.vocab_size)
        logits[..., next(self.script)] = 50
        logits[..., self.special] = 100
        return logits


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_special_token_is_generated_except_the_end_of_the_text(temperature):
    tokenizer = Tokenizer.train(["b c"], BASE_VOCAB + 2)
    assert "<|fim_middle|>" in tokenizer.special_tokens
    sampling = SamplingConfig(max_tokens=10, temperature=temperature)
    assert "".join(generate(Stubborn(tokenizer), tokenizer, "x", sampling)) == "aaa"
    ((batched,),) = sample_batch(Stubborn(tokenizer), tokenizer, ["x"], 1, sampling, [0])
    assert (batched.text, batched.finish) == ("aaa", "eos")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_without_a_text_are_never_generated(temperature):
    """Neither plainly nor in a batch nor with drafts, although the model would prefer them."""
    model, tokenizer = spread_model(tiny_config(quant={"activations": False})), PaddedTokenizer()
    sampling = SamplingConfig(max_tokens=24, temperature=temperature)
    start, unused = tokenizer.encode("let x"), set(tokenizer.never_sampled)
    free = [step[0] for step in generate_tokens(model, [start], sampling)]
    assert unused & set(free)
    plain = [step[0] for step in generate_tokens(model, [start], sampling, None, tokenizer.never_sampled)]
    assert not unused & set(plain)
    ((batched,),) = sample_batch(model, tokenizer, ["let x"], 1, sampling, [0])
    mtp = MTP(model.config, MTPConfig(enabled=True, kind="heads", n_tokens=2)).eval()
    drafter = make_drafter(model, mtp)
    drafted = list(speculate_tokens(model, drafter, start, sampling, 2, None, None, tokenizer.never_sampled))
    assert drafted == plain
    assert list(batched.tokens) == plain[: len(batched.tokens)]
    text = "".join(generate(model, tokenizer, "let x", sampling))
    assert not {ord(letter) for letter in text} & unused
