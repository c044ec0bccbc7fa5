"""A single matrix product in llama.cpp: a GGUF model that only multiplies one ternary matrix.

The matrix is the head. One layer adds zeros, so that a prompt of one token reaches the final norm as its embedding, a
row of int8 codes in Q8_0; ggml quantises the normed row to int8 again and, since every block holds a ±127, gets the
same codes. The log-probabilities minus that of a row of zeros are then the products: int dot · weight scale ·
activation scale. The head holds two copies of the matrix, one with a single scale, which reveals the integers.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray

from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.diagnose.validate.matmul_case import MatmulCase
from nanochat_cli.export import llama_cpp
from nanochat_cli.formats.gguf.packing import TERNARY_TYPES, pack
from nanochat_cli.formats.gguf.tokenizer_metadata import tokenizer_metadata
from nanochat_cli.formats.gguf.write import add_value

SPREAD = 20.0
"""Largest logit: the server's float32 softmax stays precise over twice this range."""
NORM_EPS = 1e-5
EMBEDDING_SCALE = 2.0**-7
HEAD_DIM = 64
VALUE_ROWS = 1024
"""At most this many rows in the second copy: more would test nothing new."""


@dataclass(frozen=True)
class LlamaCppProduct:
    """What llama.cpp computed, in the units of the case.

    integers: float64 [tokens, rows], near integers. values: float64 [tokens, at most VALUE_ROWS], for an activation
    scale of one.
    """

    integers: NDArray[np.float64]
    values: NDArray[np.float64]


def tensor_type(case: MatmulCase) -> str | None:
    """The llama.cpp type that holds the matrix of a case exactly, if any."""
    group = case.group or case.columns
    for name in ("tq2_0", "q2_0"):
        block = TERNARY_TYPES[name].block
        if case.columns % block == 0 and group % block == 0:
            return name
    return None


def llama_cpp_product(case: MatmulCase) -> LlamaCppProduct:
    """Ask llama.cpp. ConfigError without xllamacpp, ValidationFailure if it fails, ValueError if no type fits."""
    kind = tensor_type(case)
    if kind is None:
        raise ValueError(f"llama.cpp has no type for {case}")
    codes, scales = case.ternary.codes.numpy(), np.broadcast_to(case.packed.scales.numpy(), case.packed.scales.shape)
    grid = case.grid.numpy().astype(np.float64)
    n_values = min(case.rows, VALUE_ROWS)
    uniform = np.float32(np.float16(np.median(scales)))
    tokenizer = Tokenizer.train(["a few words, a few words"], 300)
    vocab_size = max(tokenizer.vocab_size, case.rows + n_values + 1, case.tokens)
    head_codes = np.zeros((vocab_size, case.columns), np.int8)
    head_codes[: case.rows], head_codes[case.rows : case.rows + n_values] = codes, codes[:n_values]
    head_scales = np.full((vocab_size, scales.shape[1]), uniform, np.float32)
    head_scales[case.rows : case.rows + n_values] = scales[:n_values]

    # the factor by which RMSNorm multiplies a token, before the weight of the norm
    normed = EMBEDDING_SCALE / np.sqrt(
        (EMBEDDING_SCALE * grid) ** 2 @ np.full(case.columns, 1 / case.columns) + NORM_EPS
    )
    largest = np.abs(grid @ head_codes.T * normed[:, None] * head_scales.max()).max()
    norm_weight = np.float32(SPREAD / largest) if largest > 0 else np.float32(1)
    activation_scale = normed * norm_weight
    if kind == "q2_0":  # Q8_0 stores the scale of a block as float16
        activation_scale = activation_scale.astype(np.float16).astype(np.float64)

    with tempfile.TemporaryDirectory(prefix="nanochat-product-") as folder:
        path = Path(folder) / "product.gguf"
        _write(path, case, tokenizer, kind, head_codes, head_scales, norm_weight)
        logprobs = llama_cpp.logprobs(path, [[token] for token in range(case.tokens)], vocab_size)
    logits = logprobs - logprobs[:, -1:]
    integers = logits[:, : case.rows] / (activation_scale[:, None] * np.float64(uniform))
    return LlamaCppProduct(integers, logits[:, case.rows : case.rows + n_values] / activation_scale[:, None])


def _write(
    path: Path,
    case: MatmulCase,
    tokenizer: Tokenizer,
    kind: str,
    head_codes: NDArray[np.int8],
    head_scales: NDArray[np.float32],
    norm_weight: np.float32,
) -> None:
    vocab_size, columns = head_codes.shape
    embedding = np.zeros((vocab_size, columns // 32, 34), np.uint8)
    embedding[..., :2] = np.array([EMBEDDING_SCALE], np.float16).view(np.uint8)
    embedding[: case.tokens, :, 2:] = case.grid.numpy().reshape(case.tokens, -1, 32).view(np.uint8)
    writer = GGUFWriter(None, "llama")
    writer.add_context_length(256)
    writer.add_vocab_size(vocab_size)
    writer.add_embedding_length(columns)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(NORM_EPS)
    for key, value in tokenizer_metadata(tokenizer, vocab_size).items():
        add_value(writer, key, value)
    writer.add_tensor("token_embd.weight", embedding.reshape(vocab_size, -1), raw_dtype=GGMLQuantizationType.Q8_0)
    writer.add_tensor("output_norm.weight", np.full(columns, norm_weight, np.float32))
    head = pack(kind, head_codes, head_scales)
    writer.add_tensor("output.weight", head, raw_dtype=TERNARY_TYPES[kind].ggml_type)
    shapes = {
        **{f"attn_{name}": (HEAD_DIM, columns) for name in ("q", "k", "v")},
        **{"attn_output": (columns, HEAD_DIM), "ffn_gate": (32, columns), "ffn_up": (32, columns)},
        **{"ffn_down": (columns, 32), "attn_norm": (columns,), "ffn_norm": (columns,)},
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
