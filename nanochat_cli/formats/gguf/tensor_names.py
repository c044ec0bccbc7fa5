"""Names of a model's tensors in a GGUF file, and the layout of their values there.

The exporter uses them in one direction and the loader in the other. The names are llama.cpp's; tensors that no stock
architecture has are named in its style, or by their own key in a block. Knows keys of a state dict and the
configuration; holds no weights.
"""

import re

import numpy as np
from numpy.typing import NDArray

from nanochat_cli.config.sections.model import ModelConfig
from nanochat_cli.formats.gguf.architecture import OWN, QWEN35, Architecture, architecture_of

_MODEL_TENSORS = {"embedding.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}
_MODEL_TENSORS |= {"head.weight": "output.weight"}
_WEIGHTS = {
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm",
    "attention.sub_norm": "attn_sub_norm",
    "delta.w_qkv": "attn_qkv",
    "delta.w_z": "attn_gate",
    "delta.w_alpha": "ssm_alpha",
    "delta.w_beta": "ssm_beta",
    "delta.norm": "ssm_norm",
    "delta.w_out": "ssm_out",
    "ffn_norm": "ffn_norm",
    "feed_forward.w_gate": "ffn_gate",
    "feed_forward.w_up": "ffn_up",
    "feed_forward.w_down": "ffn_down",
    "feed_forward.sub_norm": "ffn_sub_norm",
    "feed_forward.router": "ffn_gate_inp",
    "feed_forward.shared.w_gate": "ffn_gate_shexp",
    "feed_forward.shared.w_up": "ffn_up_shexp",
    "feed_forward.shared.w_down": "ffn_down_shexp",
}
"""Module of a block -> its name in the file, both without `.weight`."""
_OTHERS = {
    "delta.conv": "ssm_conv1d.weight",
    "delta.a_log": "ssm_a",
    "delta.dt_bias": "ssm_dt.bias",
    "feed_forward.balance_bias": "exp_probs_b.bias",
    **{
        f"{ours}_mix.{parameter}": f"hc_{theirs}_{name}"
        for ours, theirs in (("attention", "attn"), ("ffn", "ffn"))
        for parameter, name in (
            ("pre_bias", "pre"),
            ("post_bias", "post"),
            ("res_bias", "res"),
            ("projection", "fn"),
            ("gates", "scale"),
        )
    },
}
_BLOCK_KEY = re.compile(r"blocks\.(\d+)\.(.+)")
_EXPERTS = ("feed_forward.w_gate", "feed_forward.w_up", "feed_forward.w_down")


def tensor_name(key: str, config: ModelConfig) -> str:
    """GGUF name of a state-dict key: `blocks.3.attention.wq.weight` -> `blk.3.attn_q.weight`.

    What has no name in the tables keeps its own in our architecture; KeyError in one of llama.cpp's.
    """
    match = _BLOCK_KEY.fullmatch(key)
    if match is None:
        return _MODEL_TENSORS[key]
    block, part = match[1], match[2]
    if part in _OTHERS:
        return f"blk.{block}.{_OTHERS[part]}"
    module = part.removesuffix(".weight")
    if module not in _WEIGHTS and architecture_of(config) is OWN:
        return f"blk.{block}.{part}"
    name = _WEIGHTS[module]
    if module in _EXPERTS and config.moe.enabled:
        name += "_exps"
    if module == "ffn_norm" and architecture_of(config) is QWEN35:
        name = "post_attention_norm"
    return f"blk.{block}.{name}.weight"


def gain_name(weight_name: str) -> str:
    """Name of the optional factor on a linear layer's output: `….weight` -> `….scale`."""
    return f"{weight_name.removesuffix('.weight')}.scale"


def file_row_order(arch: Architecture, key: str, config: ModelConfig) -> NDArray[np.intp] | None:
    """Row r of the tensor in the file is row `order[r]` of ours; None if the order is the same.

    Dimension i of a head pairs with i + D/2 here and with its neighbour in arch llama, so (first half,
    second half) becomes interleaved. A permutation of rows: codes and per-row scales move together and
    groups along K are untouched. The order back is `numpy.argsort(order)`.
    """
    if not arch.rope_pairs_neighbours or not key.endswith((".wq.weight", ".wk.weight")):
        return None
    n_heads = config.n_heads if key.endswith(".wq.weight") else config.n_kv_heads
    head_dim = config.resolved_head_dim
    return np.arange(n_heads * head_dim).reshape(n_heads, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)


def to_file(key: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """A float tensor as the file stores it: the decay of DeltaNet is −exp(a_log) there."""
    return -np.exp(values) if key.endswith(".a_log") else values


def from_file(key: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The inverse of `to_file`."""
    return np.log(-values) if key.endswith(".a_log") else values


def stack_shape(shape: tuple[int, ...], key: str, config: ModelConfig) -> tuple[int, ...]:
    """The shape in the file of a matrix [N, K]: [E, N / E, K] for the experts of a mixture."""
    match = _BLOCK_KEY.fullmatch(key)
    if match and config.moe.enabled and match[2].removesuffix(".weight") in _EXPERTS:
        return (config.moe.experts, shape[0] // config.moe.experts, *shape[1:])
    return shape
