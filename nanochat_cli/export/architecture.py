"""Which llama.cpp architecture a model is, and how its parts are called there.

The single definition of tensor names, row order and metadata keys, read in one direction by the
exporter and in the other by the loader. Knows the configuration of a model; holds no weights and
opens no file.

    arch     model                       rotary form          head
    llama    plain                       neighbouring pairs   tied or untied
    qwen3    RMSNorm on q and k          half-split (ours)    tied or untied
    bitnet   sub-norms before wo, w_down half-split (ours)    tied only
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanochat_cli.config.schema import ModelConfig, QuantConfig
from nanochat_cli.errors import ConfigError, DataError


@dataclass(frozen=True)
class Architecture:
    """One `general.architecture` of llama.cpp that our model can be."""

    name: str
    rope_pairs_neighbours: bool
    """True: the arch rotates dimensions (2i, 2i + 1), so rows of wq and wk change place at export."""


LLAMA = Architecture("llama", rope_pairs_neighbours=True)
QWEN3 = Architecture("qwen3", rope_pairs_neighbours=False)
BITNET = Architecture("bitnet", rope_pairs_neighbours=False)
ARCHITECTURES = {arch.name: arch for arch in (LLAMA, QWEN3, BITNET)}

_MODEL_TENSORS = {"embedding": "token_embd", "norm": "output_norm", "head": "output"}
_BLOCK_TENSORS = {
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm",
    "attention.sub_norm": "attn_sub_norm",
    "ffn_norm": "ffn_norm",
    "feed_forward.w_gate": "ffn_gate",
    "feed_forward.w_up": "ffn_up",
    "feed_forward.w_down": "ffn_down",
    "feed_forward.sub_norm": "ffn_sub_norm",
}
_BLOCK_KEY = re.compile(r"blocks\.(\d+)\.(.+)\.weight")


def architecture_of(config: ModelConfig) -> Architecture:
    """The architecture that computes what this model computes. ConfigError when llama.cpp has none."""
    if config.sub_norm:
        if not config.tie_embeddings:
            raise ConfigError(
                "model.sub_norm = true exports as arch bitnet, which has no separate head: "
                "set model.tie_embeddings = true, or train without sub_norm (arch llama)"
            )
        inner = config.n_heads * config.resolved_head_dim
        if inner != config.dim:
            raise ConfigError(
                f"model.sub_norm = true exports as arch bitnet, which needs n_heads × head_dim = dim, "
                f"not {inner} and {config.dim}: change head_dim, or train without sub_norm (arch llama)"
            )
        return BITNET
    return QWEN3 if config.qk_norm else LLAMA


def tensor_name(key: str) -> str:
    """GGUF name of a state-dict key: `blocks.3.attention.wq.weight` -> `blk.3.attn_q.weight`. KeyError if unknown."""
    if match := _BLOCK_KEY.fullmatch(key):
        return f"blk.{match[1]}.{_BLOCK_TENSORS[match[2]]}.weight"
    return f"{_MODEL_TENSORS[key.removesuffix('.weight')]}.weight"


def file_row_order(arch: Architecture, key: str, config: ModelConfig) -> NDArray[np.intp] | None:
    """Row r of the tensor in the file is row `order[r]` of ours; None when the order is the same.

    Dimension i of a head pairs with i + D/2 here and with its neighbour in arch llama, so (first half,
    second half) becomes interleaved. A permutation of rows: codes and per-row scales move together and
    groups along K are untouched. The order back is `numpy.argsort(order)`.
    """
    if not arch.rope_pairs_neighbours or not key.endswith((".wq.weight", ".wk.weight")):
        return None
    n_heads = config.n_heads if key.endswith(".wq.weight") else config.n_kv_heads
    head_dim = config.resolved_head_dim
    return np.arange(n_heads * head_dim).reshape(n_heads, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)


def metadata(config: ModelConfig) -> dict[str, int | float]:
    """Every hyper-parameter that llama.cpp needs, by its full key.

    Those with a default there are written too: a missing rope.freq_base, for example, loads without a
    word and computes something else.
    """
    arch = architecture_of(config).name
    return {
        f"{arch}.vocab_size": config.vocab_size,
        f"{arch}.context_length": config.max_seq_len,
        f"{arch}.embedding_length": config.dim,
        f"{arch}.block_count": config.n_layers,
        f"{arch}.feed_forward_length": config.resolved_ffn_dim,
        f"{arch}.attention.head_count": config.n_heads,
        f"{arch}.attention.head_count_kv": config.n_kv_heads,
        f"{arch}.attention.key_length": config.resolved_head_dim,
        f"{arch}.attention.value_length": config.resolved_head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.norm_eps),
        f"{arch}.rope.dimension_count": config.resolved_head_dim,
        f"{arch}.rope.freq_base": float(config.rope_theta),
    }


def config_from_metadata(fields: Mapping[str, Any], tied: bool, quant: QuantConfig) -> ModelConfig:
    """The inverse of `metadata`. Whatever our own model cannot compute is a DataError that names it."""
    arch = str(fields.get("general.architecture"))
    if arch not in ARCHITECTURES:
        raise DataError(f"architecture '{arch}' is not one that this program computes: {', '.join(ARCHITECTURES)}")

    def field(key: str, default: Any = None) -> Any:
        value = fields.get(f"{arch}.{key}", default)
        if value is None:
            raise DataError(f"metadata key {arch}.{key} is missing")
        if not isinstance(value, int | float):
            raise DataError(f"metadata key {arch}.{key} is not a number but {value!r:.60}")
        return value

    dim, n_heads = field("embedding_length"), field("attention.head_count")
    if not n_heads:
        raise DataError(f"metadata key {arch}.attention.head_count is 0")
    head_dim = field("attention.key_length", dim // n_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if field(key, head_dim) != head_dim:
            raise DataError(f"{arch}.{key} = {field(key)} differs from the key length {head_dim}: not supported")
    for key in ("expert_count", "attention.sliding_window", "rope.scaling.factor"):
        if fields.get(f"{arch}.{key}"):
            raise DataError(f"{arch}.{key} = {fields[f'{arch}.{key}']} is not supported")
    try:
        return ModelConfig.model_validate(
            {
                "vocab_size": field("vocab_size"),
                "dim": dim,
                "n_layers": field("block_count"),
                "n_heads": n_heads,
                "n_kv_heads": field("attention.head_count_kv", n_heads),
                "head_dim": head_dim,
                "ffn_dim": field("feed_forward_length"),
                "max_seq_len": field("context_length"),
                "rope_theta": _shortest(field("rope.freq_base", 10000.0)),
                "norm_eps": _shortest(field("attention.layer_norm_rms_epsilon")),
                "tie_embeddings": tied,
                "qk_norm": arch == QWEN3.name,
                "sub_norm": arch == BITNET.name,
                "quant": quant,
            }
        )
    except ValueError as error:  # pydantic: a count of zero, heads that do not divide
        first = str(error).splitlines()
        raise DataError(
            "the hyper-parameters do not fit together: " + " ".join(part.strip() for part in first[1:3])
        ) from error


def _shortest(value: float) -> float:
    """GGUF stores float32; the shortest decimal that rounds to it is the number that was written (1e-5)."""
    return float(str(np.float32(value)))
