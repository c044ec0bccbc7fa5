"""The native decoder against a plain float64 form of the same model, over several positions.

Two correct programs round an activation that lies halfway between two int8 codes to different sides. The oracle
therefore reports how near to such a tie it came, and only sequences that kept away from ties are compared.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from nanochat_kernels import PackedTernary, Ternary
from nanochat_kernels.backends import Unsupported
from nanochat_kernels.cpu.decoder import DecoderLayer, NativeDecoder

DIM, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCAB, POSITIONS, EPS = 256, 4, 2, 64, 384, 67, 32, 1e-5
TIE = 3e-5
"""Distance to a tie, in code units, within which float32 programs may round differently."""
N_SEQUENCES, LENGTH = 24, 5


@dataclass
class Model:
    layers: list[DecoderLayer]
    embedding: Tensor
    head: Tensor
    norm: Tensor
    cos: Tensor
    sin: Tensor

    def native(self) -> NativeDecoder:
        parts = (self.embedding, self.head, self.norm, self.cos, self.sin)
        return NativeDecoder(self.layers, *parts, n_heads=HEADS, n_kv_heads=KV_HEADS, eps=EPS)


def build(group: int | None, qk_norm: bool, sub_norm: bool, head_dtype: torch.dtype, seed: int) -> Model:
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> PackedTernary:
        codes = torch.randint(-1, 2, (rows, columns), generator=generator, dtype=torch.int8)
        scales = 0.02 + 0.02 * torch.rand(rows, columns // (group or columns), generator=generator)
        return PackedTernary.pack(Ternary(codes, scales.half().float(), group or "row"))

    def norm(width: int) -> Tensor:
        return 0.5 + torch.rand(width, generator=generator)

    layers = [
        DecoderLayer(
            attention_norm=norm(DIM),
            qkv=matrix((HEADS + 2 * KV_HEADS) * HEAD_DIM, DIM),
            wo=matrix(DIM, HEADS * HEAD_DIM),
            ffn_norm=norm(DIM),
            gate_up=matrix(2 * HIDDEN, DIM),
            down=matrix(DIM, HIDDEN),
            q_norm=norm(HEAD_DIM) if qk_norm else None,
            k_norm=norm(HEAD_DIM) if qk_norm else None,
            attention_sub_norm=norm(HEADS * HEAD_DIM) if sub_norm else None,
            ffn_sub_norm=norm(HIDDEN) if sub_norm else None,
        )
        for _ in range(2)
    ]
    angles = torch.outer(torch.arange(POSITIONS), 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))
    embedding, head = (torch.randn(VOCAB, DIM, generator=generator).half() for _ in range(2))
    return Model(layers, embedding.float(), head.to(head_dtype), norm(DIM), angles.cos(), angles.sin())


class Oracle:
    """The forward pass of a sequence in float64; `margin`: the smallest distance to a rounding tie."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.margin = 0.5

    def __call__(self, tokens: Tensor) -> Tensor:
        x = self.model.embedding[tokens].double()
        for layer in self.model.layers:
            x = x + self.product(self.attention(self.norm(x, layer.attention_norm), layer), layer.wo)
            gate, up = self.product(self.norm(x, layer.ffn_norm), layer.gate_up).chunk(2, dim=-1)
            gated = gate / (1 + torch.exp(-gate)) * up
            if layer.ffn_sub_norm is not None:
                gated = self.norm(gated, layer.ffn_sub_norm)
            x = x + self.product(gated, layer.down)
        return self.norm(x, self.model.norm) @ self.model.head.double().T

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + EPS) * weight.double()

    def product(self, x: Tensor, weight: PackedTernary) -> Tensor:
        scale = x.abs().amax(dim=-1, keepdim=True) / 127
        self.margin = min(self.margin, float(((x / scale).frac().abs() - 0.5).abs().min()))
        return (x / scale).round() * scale @ weight.ternary().dequantize().double().T

    def attention(self, x: Tensor, layer: DecoderLayer) -> Tensor:
        length = len(x)
        heads = self.product(x, layer.qkv).reshape(length, HEADS + 2 * KV_HEADS, HEAD_DIM)
        q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        q, k = self.rotate(q, layer.q_norm), self.rotate(k, layer.k_norm)
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) / HEAD_DIM**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        y = torch.einsum("hij,jhd->ihd", scores.softmax(dim=-1), v).reshape(length, -1)
        return y if layer.attention_sub_norm is None else self.norm(y, layer.attention_sub_norm)

    def rotate(self, x: Tensor, norm: Tensor | None) -> Tensor:
        if norm is not None:
            x = self.norm(x, norm)
        cos, sin = (t[: len(x)].double().unsqueeze(1) for t in (self.model.cos, self.model.sin))
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def decode(decoder: NativeDecoder, tokens: list[int]) -> Tensor:
    keys, values = torch.full((2, 2, KV_HEADS, POSITIONS, HEAD_DIM), torch.nan)
    return torch.cat([decoder.decode([token], [i], [keys], [values])[1] for i, token in enumerate(tokens)])


@pytest.mark.parametrize("head_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("group", "qk_norm", "sub_norm"),
    [(None, False, False), (None, True, False), (None, False, True), (128, False, False), (64, True, False)],
)
def test_logits_are_those_of_the_plain_model(group, qk_norm, sub_norm, head_dtype):
    model = build(group, qk_norm, sub_norm, head_dtype, seed=3)
    decoder = model.native()
    generator = torch.Generator().manual_seed(4)
    compared = 0
    for _ in range(N_SEQUENCES):
        tokens = torch.randint(0, VOCAB, (LENGTH,), generator=generator)
        oracle = Oracle(model)
        expected = oracle(tokens)
        if oracle.margin > TIE:
            compared += 1
            found = decode(decoder, tokens.tolist())
            assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert compared >= 4


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 11])
@pytest.mark.parametrize(("group", "norms"), [(None, True), (None, False), (128, False), (64, True)])
def test_a_token_has_the_same_bits_whatever_is_read_beside_it(group, norms, n, kernel_set):
    """Sequences of different lengths and memories; products of one token, of a few, of a tile and of several calls."""
    model = build(group, norms, norms, torch.float16, seed=8)
    decoder, generator = model.native(), torch.Generator().manual_seed(9)
    texts = [torch.randint(0, VOCAB, (3 + i,), generator=generator).tolist() for i in range(n)]
    alone = [decode(decoder, text)[-1] for text in texts]
    rows = torch.full((2, 2, n, KV_HEADS, POSITIONS, HEAD_DIM), torch.nan)
    own = torch.full((2, 2, KV_HEADS, POSITIONS + 1, HEAD_DIM), torch.nan)
    caches = [(own[0], own[1]) if i == 1 else (rows[0, :, i], rows[1, :, i]) for i in range(n)]
    for (keys, values), text in zip(caches, texts, strict=True):
        for position, token in enumerate(text[:-1]):
            decoder.decode([token], [position], [keys], [values])
    keys, values = zip(*caches, strict=True)
    _, together = decoder.decode([text[-1] for text in texts], [len(text) - 1 for text in texts], keys, values)
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize("group", [None, 64])
def test_tokens_at_following_positions_of_one_cache_are_a_text(group, kernel_set):
    model = build(group, True, False, torch.float32, seed=10)
    decoder, tokens = model.native(), [5, 60, 2, 2, 41, 7, 19, 33, 8, 1]
    expected = decode(decoder, tokens)
    keys, values = torch.full((2, 2, KV_HEADS, POSITIONS, HEAD_DIM), torch.nan)
    _, found = decoder.decode(tokens, range(len(tokens)), [keys] * len(tokens), [values] * len(tokens))
    assert torch.equal(found, expected)


def test_the_hidden_state_gives_the_logits():
    model = build(None, False, False, torch.float32, seed=5)
    keys, values = torch.zeros(2, 2, KV_HEADS, POSITIONS, HEAD_DIM)
    hidden, logits = model.native().decode([3], [0], [keys], [values])
    torch.testing.assert_close(hidden @ model.head.T, logits, rtol=1e-5, atol=1e-4)


def test_values_out_of_range_are_refused_and_write_nothing():
    decoder = build(None, False, False, torch.float32, seed=6).native()
    keys, values = torch.zeros(2, 2, KV_HEADS, 8, HEAD_DIM)
    for token, position, message in ((VOCAB, 0, "vocabulary"), (-1, 0, "vocabulary"), (0, 8, "position 8")):
        with pytest.raises(ValueError, match=message):
            decoder.decode([1, token], [0, position], [keys, keys], [values, values])
    with pytest.raises(ValueError, match="cache has shape"):
        decoder.decode([0], [0], [keys[:1]], [values])
    with pytest.raises(ValueError, match="float32"):
        decoder.decode([0], [0], [keys.half()], [values.half()])
    assert not keys.any()


def test_matrices_that_do_not_fit_are_refused():
    model = build(None, False, False, torch.float32, seed=7)
    model.layers[1] = DecoderLayer(**{**vars(model.layers[1]), "wo": model.layers[1].down})
    with pytest.raises(ValueError, match="wo is 256 × 384 where 256 × 256 is needed"):
        model.native()
    model = build(None, False, False, torch.bfloat16, seed=7)
    with pytest.raises(Unsupported, match="bfloat16"):
        model.native()
