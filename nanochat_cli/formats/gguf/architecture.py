"""Which architecture of llama.cpp a model is, and its hyper-parameters as metadata.

The exporter uses it in one direction and the loader in the other. Knows the configuration of a model; holds no weights
and opens no file.

    arch              model                                       rotary form          head
    llama             plain, or a mixture of experts              neighbouring pairs   tied or untied
    qwen3             RMSNorm on q and k                          half-split (ours)    tied or untied
    qwen3moe          RMSNorm on q and k, a mixture of experts    half-split (ours)    tied or untied
    bitnet            sub-norms before wo, w_down                 half-split (ours)    tied only
    qwen35            gated DeltaNet and gated attention          half-split (ours)    tied or untied
    nanochat-ternary  what the others cannot express (several     half-split (ours)    tied or untied
                      residual streams, a shared expert …);
                      our own runtime reads it, llama.cpp refuses
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nanochat_cli.config.sections.model import ModelConfig, QuantConfig
from nanochat_cli.errors import ConfigError, DataError


@dataclass(frozen=True)
class Architecture:
    """A `general.architecture` that our model can have."""

    name: str
    rope_pairs_neighbours: bool
    """True: the arch rotates dimensions (2i, 2i + 1), so rows of wq and wk are permuted on export."""


LLAMA = Architecture("llama", rope_pairs_neighbours=True)
QWEN3 = Architecture("qwen3", rope_pairs_neighbours=False)
QWEN3MOE = Architecture("qwen3moe", rope_pairs_neighbours=False)
BITNET = Architecture("bitnet", rope_pairs_neighbours=False)
QWEN35 = Architecture("qwen35", rope_pairs_neighbours=False)
OWN = Architecture("nanochat-ternary", rope_pairs_neighbours=False)
ARCHITECTURES = {arch.name: arch for arch in (LLAMA, QWEN3, QWEN3MOE, BITNET, QWEN35, OWN)}
OWN_SPEC_VERSION = 1


def architecture_of(config: ModelConfig) -> Architecture:
    """The architecture that computes what this model computes: one of llama.cpp's, or our own.

    Raises ConfigError for sub-norms that no architecture has.
    """
    if beyond_llama_cpp(config) is not None:
        return OWN
    if config.is_hybrid:
        return QWEN35
    if config.sub_norm:
        _require_bitnet(config)
        return BITNET
    if config.qk_norm:
        return QWEN3MOE if config.moe.enabled else QWEN3
    return LLAMA


def beyond_llama_cpp(config: ModelConfig) -> str | None:
    """Why no architecture of llama.cpp computes this model, in words; None if one does."""
    moe = config.moe
    if config.mhc.streams > 1:
        return f"it has {config.mhc.streams} residual streams (model.mhc.streams)"
    if moe.enabled and moe.shared:
        return "one expert is shared by all tokens (model.moe.shared)"
    if moe.enabled and moe.balance == "bias":
        return "experts are chosen with a bias (model.moe.balance)"
    if config.is_hybrid and moe.enabled:
        return "gated DeltaNet is combined with experts (model.deltanet, model.moe)"
    if config.is_hybrid and not config.qk_norm:
        return "gated DeltaNet is used without model.qk_norm"
    if config.is_hybrid != config.resolved_attention_gate:
        state = "with" if config.resolved_attention_gate else "without"
        kind = "beside gated DeltaNet" if config.is_hybrid else "alone"
        return f"attention {kind} is {state} a gate (model.attention_gate)"
    return None


def _require_bitnet(config: ModelConfig) -> None:
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


@dataclass(frozen=True)
class Destination:
    """The result of exporting a model. arch: None if that will be refused; reason: why llama.cpp cannot run it.

    Static hyper-connections may still fold into a plain residual at export, which depends on their weights.
    """

    arch: str | None
    reason: str | None

    @property
    def runs_in_llama_cpp(self) -> bool:
        return self.reason is None

    @property
    def answer(self) -> str:
        """`"yes"`, or `"no: …"` with the reason."""
        return "yes" if self.reason is None else f"no: {self.reason}"

    def __str__(self) -> str:
        return f"GGUF architecture {self.arch or 'none'}; runs in llama.cpp: {self.answer}"


def destination_of(config: ModelConfig) -> Destination:
    """The destination of a model with this configuration, before it is trained; without torch, and never an error."""
    try:
        arch = architecture_of(config)
    except ConfigError as error:
        return Destination(None, str(error))
    return Destination(arch.name, beyond_llama_cpp(config))


def metadata(config: ModelConfig) -> dict[str, Any]:
    """Every hyper-parameter that llama.cpp needs, by its full key.

    Those with a default there are written too: without rope.freq_base, for example, a file loads silently
    and computes something else.
    """
    arch = architecture_of(config).name
    values: dict[str, Any] = {
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
    if config.is_hybrid:
        heads, width = config.delta_heads, config.delta_head_dim
        values |= {
            f"{arch}.attention.recurrent_layers": list(config.delta_layers),
            f"{arch}.ssm.conv_kernel": config.deltanet.conv_kernel,
            f"{arch}.ssm.inner_size": heads * width,
            f"{arch}.ssm.state_size": width,
            f"{arch}.ssm.time_step_rank": heads,
            f"{arch}.ssm.group_count": heads,
        }
    if arch == QWEN35.name:
        values[f"{arch}.rope.dimension_sections"] = rope_sections(config.resolved_head_dim // 2)
    if config.moe.enabled:
        values |= {f"{arch}.expert_count": config.moe.experts, f"{arch}.expert_used_count": config.moe.active}
    if arch == QWEN3MOE.name:
        values[f"{arch}.expert_feed_forward_length"] = config.resolved_ffn_dim
    if arch == OWN.name:
        values |= {
            f"{arch}.spec_version": OWN_SPEC_VERSION,
            f"{arch}.rope.type": "half-split",
            f"{arch}.attention.qk_norm": config.qk_norm,
            f"{arch}.attention.sub_norm": config.sub_norm,
            f"{arch}.attention.output_gate": config.resolved_attention_gate,
            f"{arch}.hyper_connection.count": config.mhc.streams,
            f"{arch}.hyper_connection.dynamic": config.mhc.dynamic,
            f"{arch}.expert_shared_count": int(config.moe.enabled and config.moe.shared),
            f"{arch}.expert_selection_bias": config.moe.enabled and config.moe.balance == "bias",
        }
    return values


def rope_sections(pairs: int) -> list[int]:
    """Shares of the rotated pairs in the three axes of position of arch qwen35, which are equal for text."""
    side = -(-pairs // 3)
    return [side, side, pairs - 2 * side, 0]


def config_from_metadata(fields: Mapping[str, Any], tied: bool, quant: QuantConfig) -> ModelConfig:
    """The inverse of `metadata`. Raises DataError, naming it, for anything that our model cannot compute."""
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

    def count(key: str, default: Any = None) -> int:
        value = field(key, default)
        if not isinstance(value, int) or not 0 < value < 2**31:
            raise DataError(f"metadata key {arch}.{key} = {value} is not a valid count")
        return value

    dim, n_heads = count("embedding_length"), count("attention.head_count")
    head_dim = count("attention.key_length", dim // n_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if field(key, head_dim) != head_dim:
            raise DataError(f"{arch}.{key} = {field(key)} differs from the key length {head_dim}: not supported")
    for key in ("attention.sliding_window", "rope.scaling.factor", "nextn_predict_layers"):
        if fields.get(f"{arch}.{key}"):
            raise DataError(f"{arch}.{key} = {fields[f'{arch}.{key}']} is not supported")
    try:
        return ModelConfig.model_validate(
            {
                "vocab_size": field("vocab_size"),
                "dim": dim,
                "n_layers": count("block_count"),
                "n_heads": n_heads,
                "n_kv_heads": field("attention.head_count_kv", n_heads),
                "head_dim": head_dim,
                "ffn_dim": field("expert_feed_forward_length" if arch == QWEN3MOE.name else "feed_forward_length"),
                "max_seq_len": field("context_length"),
                "rope_theta": _shortest(field("rope.freq_base", 10000.0)),
                "norm_eps": _shortest(field("attention.layer_norm_rms_epsilon")),
                "tie_embeddings": tied,
                "qk_norm": arch in (QWEN3.name, QWEN3MOE.name, QWEN35.name)
                or bool(fields.get(f"{arch}.attention.qk_norm")),
                "sub_norm": arch == BITNET.name or bool(fields.get(f"{arch}.attention.sub_norm")),
                "attention_gate": _attention_gate(fields, arch),
                "quant": quant,
                "mhc": _mhc(fields, arch),
                "deltanet": _deltanet(fields, arch, count),
                "moe": _moe(fields, arch),
            }
        )
    except ValueError as error:  # pydantic: a count of zero, heads that do not divide
        first = str(error).splitlines()
        raise DataError(
            "the hyper-parameters do not fit together: " + " ".join(part.strip() for part in first[1:3])
        ) from error


def _attention_gate(fields: Mapping[str, Any], arch: str) -> bool | None:
    """None if it is the configuration's default."""
    gated = arch == QWEN35.name or bool(fields.get(f"{arch}.attention.output_gate"))
    hybrid = any(_recurrent_layers(fields, arch))
    return None if gated == hybrid else gated


def _mhc(fields: Mapping[str, Any], arch: str) -> dict[str, Any]:
    count = fields.get(f"{arch}.hyper_connection.count", 1)
    return {"streams": count, "dynamic": bool(fields.get(f"{arch}.hyper_connection.dynamic", True))}


def _deltanet(fields: Mapping[str, Any], arch: str, count: Callable[..., int]) -> dict[str, Any]:
    layers = _recurrent_layers(fields, arch)
    if not layers and arch == QWEN35.name:
        interval = count("full_attention_interval", 4)
        layers = [(layer + 1) % interval != 0 for layer in range(count("block_count"))]
    if not any(layers):
        return {}
    if len(layers) != count("block_count"):
        raise DataError(
            f"{arch}.attention.recurrent_layers has {len(layers)} entries for {count('block_count')} layers"
        )
    heads, width = count("ssm.time_step_rank"), count("ssm.state_size")
    if count("ssm.group_count") != heads or count("ssm.inner_size") != heads * width:
        raise DataError(f"{arch}.ssm.group_count = {count('ssm.group_count')}: only as many key as value heads")
    pattern = "".join("D" if delta else "A" for delta in layers)
    return {"pattern": pattern, "n_heads": heads, "head_dim": width, "conv_kernel": count("ssm.conv_kernel")}


def _recurrent_layers(fields: Mapping[str, Any], arch: str) -> list[bool]:
    """Which layers are DeltaNet according to the file; empty if it does not say."""
    layers = fields.get(f"{arch}.attention.recurrent_layers")
    if layers is not None and not isinstance(layers, list):
        raise DataError(f"metadata key {arch}.attention.recurrent_layers is not a list but {layers!r:.60}")
    return layers or []


def _moe(fields: Mapping[str, Any], arch: str) -> dict[str, Any]:
    if not fields.get(f"{arch}.expert_count"):
        return {}
    return {
        "enabled": True,
        "experts": fields[f"{arch}.expert_count"],
        "active": fields.get(f"{arch}.expert_used_count", 2),
        "shared": bool(fields.get(f"{arch}.expert_shared_count")),
        "balance": "bias" if fields.get(f"{arch}.expert_selection_bias") else "loss",
    }


def _shortest(value: float) -> float:
    """GGUF stores float32; the shortest decimal that rounds to it is the number that was written (1e-5)."""
    import numpy as np  # here, since `nanochat presets` needs architectures and must start fast

    return float(str(np.float32(value)))
