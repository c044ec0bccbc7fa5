"""Which class of transformers computes a model, and its config.json in both directions. No torch.

The class follows from the architecture of llama.cpp, so that a model has one. config.json is written for transformers 4
and 5 alike: 4 reads `rope_theta` and `torch_dtype` and would take the defaults of its classes where only 5's
`rope_parameters` and `dtype` are, without a warning.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from nanochat_cli.config.sections.model import ModelConfig
from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.formats.gguf.architecture import (
    BITNET,
    LLAMA,
    QWEN3,
    QWEN3MOE,
    QWEN35,
    architecture_of,
    beyond_llama_cpp,
    rope_sections,
)


@dataclass(frozen=True)
class HuggingFaceClass:
    """A class of transformers. defaults: what it takes for a key that config.json lacks, where that matters to us."""

    name: str
    model_type: str
    defaults: Mapping[str, Any] = field(default_factory=dict)


LLAMA_CLASS = HuggingFaceClass("LlamaForCausalLM", "llama")
MISTRAL = HuggingFaceClass("MistralForCausalLM", "mistral", {"sliding_window": 4096})
MIXTRAL = HuggingFaceClass("MixtralForCausalLM", "mixtral", {"rope_theta": 1_000_000.0, "rms_norm_eps": 1e-5})
QWEN3_CLASS = HuggingFaceClass("Qwen3ForCausalLM", "qwen3", {"use_sliding_window": False, "head_dim": 128})
QWEN3MOE_CLASS = HuggingFaceClass(
    "Qwen3MoeForCausalLM", "qwen3_moe", {"use_sliding_window": False, "norm_topk_prob": False}
)
BITNET_CLASS = HuggingFaceClass(
    "BitNetForCausalLM", "bitnet", {"rope_theta": 500_000.0, "rms_norm_eps": 1e-5, "hidden_act": "relu2"}
)
QWEN35_CLASS = HuggingFaceClass("Qwen3_5ForCausalLM", "qwen3_5_text")
MAX_LAYERS = 10_000
COMMON_DEFAULTS: Mapping[str, Any] = {"rope_theta": 10_000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
_OF_ARCHITECTURE = {
    QWEN3.name: QWEN3_CLASS,
    QWEN3MOE.name: QWEN3MOE_CLASS,
    BITNET.name: BITNET_CLASS,
    QWEN35.name: QWEN35_CLASS,
}
READABLE = {one.name: one for one in (LLAMA_CLASS, MISTRAL, MIXTRAL, QWEN3_CLASS, QWEN3MOE_CLASS, BITNET_CLASS)}


def class_of(config: ModelConfig) -> HuggingFaceClass:
    """The class that computes this model. Raises ConfigError, with the key to change, if there is none."""
    reason = beyond_llama_cpp(config)
    if reason is not None:
        raise ConfigError(f"no class of transformers computes this model: {reason}; change that key, or export --gguf")
    arch = architecture_of(config)
    if arch is LLAMA and config.dim % config.n_heads:
        raise ConfigError(
            f"transformers refuses model.dim = {config.dim} that is no multiple of model.n_heads = {config.n_heads}: "
            "change one of them, or export --gguf"
        )
    return (MIXTRAL if config.moe.enabled else LLAMA_CLASS) if arch is LLAMA else _OF_ARCHITECTURE[arch.name]


def to_config_json(config: ModelConfig, token_ids: Mapping[str, int | None], dtype: str) -> dict[str, Any]:
    """config.json of a model. token_ids: `bos_token_id` and the like; dtype: of its matrices, as torch names it."""
    kind = class_of(config)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    values: dict[str, Any] = {
        "architectures": [kind.name],
        "model_type": kind.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.resolved_ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.resolved_head_dim,
        "hidden_act": "silu",  # BitNet's default is relu2
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
        **token_ids,
    }
    if kind in (LLAMA_CLASS, QWEN3_CLASS):
        values |= {"mlp_bias": False} if kind is LLAMA_CLASS else {"use_sliding_window": False, "sliding_window": None}
    if config.moe.enabled:
        values |= {"num_local_experts": config.moe.experts, "num_experts_per_tok": config.moe.active}
    if kind is MIXTRAL:
        values["sliding_window"] = None
    if kind is QWEN3MOE_CLASS:
        values |= {
            "num_experts": config.moe.experts,  # transformers 4; 5 reads num_local_experts
            "moe_intermediate_size": config.resolved_ffn_dim,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "use_sliding_window": False,
        }
    if kind is QWEN35_CLASS:
        heads, width = config.delta_heads, config.delta_head_dim
        rope |= {"partial_rotary_factor": 1.0, "mrope_section": rope_sections(config.resolved_head_dim // 2)[:3]}
        values |= {
            "layer_types": ["linear_attention" if delta else "full_attention" for delta in config.delta_layers],
            "linear_conv_kernel_dim": config.deltanet.conv_kernel,
            "linear_key_head_dim": width,
            "linear_value_head_dim": width,
            "linear_num_key_heads": heads,
            "linear_num_value_heads": heads,
            "partial_rotary_factor": 1.0,
        }
    return values


_MUST_BE: tuple[tuple[str, Sequence[object], str], ...] = (
    ("hidden_act", ("silu",), "only SwiGLU with silu is computed"),
    ("attention_bias", (False, None), "biases are not computed"),
    ("mlp_bias", (False, None), "biases are not computed"),
    ("rope_scaling", (None,), "scaled rotary positions are not computed"),
    ("quantization_config", (None,), "quantised weights are not read; take the float folder, or a GGUF file"),
    ("auto_map", (None,), "a model with code of its own may compute anything"),
    ("partial_rotary_factor", (None, 1, 1.0), "heads that are rotated in part are not computed"),
    ("norm_topk_prob", (None, True), "experts whose weights do not sum to 1 are not computed"),
    ("decoder_sparse_step", (None, 1), "dense layers between experts are not computed"),
    ("mlp_only_layers", (None, []), "dense layers between experts are not computed"),
)
"""A key of config.json, its values that our model computes, and why not another one."""


def from_config_json(values: Mapping[str, Any]) -> ModelConfig:
    """The float model that a config.json describes. Raises DataError, naming it, for what our model cannot compute."""
    kind = _kind(values)
    values = {**COMMON_DEFAULTS, **kind.defaults, **values}
    for key, allowed, why in _MUST_BE:
        if values.get(key) not in allowed:
            raise DataError(f"{key} = {values[key]!r:.80}: {why}")
    _require_full_attention(values)
    theta = _rope_theta(values)
    experts = {}
    if kind in (MIXTRAL, QWEN3MOE_CLASS):
        count = values.get("num_local_experts") or values.get("num_experts")
        experts = {"enabled": True, "experts": count, "active": _number(values, "num_experts_per_tok")}
    heads, layers = _number(values, "num_attention_heads"), _number(values, "num_hidden_layers")
    if layers > MAX_LAYERS:  # validation builds a list of them
        raise DataError(f"num_hidden_layers = {layers}: more than {MAX_LAYERS} are no model")
    try:
        return ModelConfig.model_validate(
            {
                "vocab_size": _number(values, "vocab_size"),
                "dim": _number(values, "hidden_size"),
                "n_layers": layers,
                "n_heads": heads,
                "n_kv_heads": _number(values, "num_key_value_heads", heads if kind is LLAMA_CLASS else None),
                "head_dim": values.get("head_dim"),
                "ffn_dim": _number(values, "moe_intermediate_size" if kind is QWEN3MOE_CLASS else "intermediate_size"),
                "max_seq_len": _number(values, "max_position_embeddings"),
                "rope_theta": theta,
                "norm_eps": _number(values, "rms_norm_eps"),
                "tie_embeddings": bool(values.get("tie_word_embeddings", False)),
                "qk_norm": kind in (QWEN3_CLASS, QWEN3MOE_CLASS),
                "sub_norm": kind is BITNET_CLASS,
                "quant": {"enabled": False},
                "moe": experts,
            }
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = str(first["msg"]).removeprefix("Value error, ")
        raise DataError(f"the numbers do not fit together: {f'{where}: ' if where else ''}{message}") from error


def _kind(values: Mapping[str, Any]) -> HuggingFaceClass:
    names = values.get("architectures") or ["none"]
    name = str(names[0] if isinstance(names, list) else names)
    if name not in READABLE:
        raise DataError(f"architecture {name:.80} is not one that we compute: {', '.join(READABLE)}")
    return READABLE[name]


def _require_full_attention(values: Mapping[str, Any]) -> None:
    types = set(values.get("layer_types") or ()) - {"full_attention"}
    window = values.get("sliding_window") if values.get("use_sliding_window", True) else None
    if types or window is not None:
        what = f"layer_types has {sorted(types)[0]}" if types else f"sliding_window = {window}"
        raise DataError(f"{what}: attention to a part of the context is not computed")


def _rope_theta(values: Mapping[str, Any]) -> object:
    rope = values.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise DataError(f"rope_parameters = {rope!r:.80}: scaled rotary positions are not computed")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise DataError(f"rope_parameters = {rope!r:.80}: heads that are rotated in part are not computed")
    return rope.get("rope_theta") or values["rope_theta"]


def _number(values: Mapping[str, Any], key: str, default: float | None = None) -> int | float:
    value = default if values.get(key) is None else values[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{key} = {value!r:.80}: a number belongs here")
    return value
