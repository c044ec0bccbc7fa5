"""Names and values of a model's tensors in the safetensors of a Hugging Face folder, in both directions.

The rows of q and k need no order of their own: transformers rotates halves, as we do. Experts are separate tensors, as
in the published checkpoints of their classes. Knows keys of a state dict; opens no file.
"""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from nanochat_cli.config.sections.export import ExportConfig
from nanochat_cli.config.sections.model import ModelConfig
from nanochat_cli.errors import ConfigError
from nanochat_cli.formats.huggingface.architecture import MIXTRAL, QWEN35_CLASS, class_of
from nanochat_cli.model.transformer import Transformer

_MODEL_TENSORS = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_PARTS = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "attention.sub_norm.weight": "self_attn.attn_sub_norm.weight",
    "delta.w_qkv.weight": "linear_attn.in_proj_qkv.weight",
    "delta.w_z.weight": "linear_attn.in_proj_z.weight",
    "delta.w_alpha.weight": "linear_attn.in_proj_a.weight",
    "delta.w_beta.weight": "linear_attn.in_proj_b.weight",
    "delta.w_out.weight": "linear_attn.out_proj.weight",
    "delta.conv": "linear_attn.conv1d.weight",
    "delta.a_log": "linear_attn.A_log",
    "delta.dt_bias": "linear_attn.dt_bias",
    "delta.norm.weight": "linear_attn.norm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w_gate.weight": "mlp.gate_proj.weight",
    "feed_forward.w_up.weight": "mlp.up_proj.weight",
    "feed_forward.w_down.weight": "mlp.down_proj.weight",
    "feed_forward.sub_norm.weight": "mlp.ffn_sub_norm.weight",
    "feed_forward.router.weight": "mlp.gate.weight",
}
_MIXTRAL_EXPERTS = {"w_gate": "w1", "w_up": "w3", "w_down": "w2"}
_BLOCK_KEY = re.compile(r"blocks\.(\d+)\.(.+)")
_EXPERTS = re.compile(r"feed_forward\.(w_gate|w_up|w_down)\.weight")
F16_MAX = 65504.0


def file_names(key: str, config: ModelConfig) -> list[str]:
    """The tensors that hold a state-dict key, its rows one after the other: one, or one of each expert."""
    match = _BLOCK_KEY.fullmatch(key)
    if match is None:
        return [_MODEL_TENSORS[key]]
    layer, part = f"model.layers.{match[1]}", match[2]
    mixtral = class_of(config) is MIXTRAL
    expert = _EXPERTS.fullmatch(part) if config.moe.enabled else None
    if expert is not None:
        name = _MIXTRAL_EXPERTS[expert[1]] if mixtral else _PARTS[part].split(".")[1]
        block = "block_sparse_moe" if mixtral else "mlp"
        return [f"{layer}.{block}.experts.{index}.{name}.weight" for index in range(config.moe.experts)]
    if mixtral and part == "feed_forward.router.weight":
        return [f"{layer}.block_sparse_moe.gate.weight"]
    return [f"{layer}.{_PARTS[part]}"]


def in_file(key: str, weight: Tensor, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the file for one of the model's, by name."""
    if class_of(config) is QWEN35_CLASS:
        if key.endswith("norm.weight") and not key.endswith("delta.norm.weight"):
            weight = weight - 1  # its RMSNorm multiplies by 1 + weight
        elif key.endswith(".conv"):
            weight = weight.unsqueeze(1)  # [channels, 1, kernel]
    names = file_names(key, config)
    for name, part in zip(names, weight.chunk(len(names)), strict=True):
        yield name, part.contiguous()


def stored_values(model: Transformer, export: ExportConfig) -> dict[str, Tensor]:
    """Every parameter in the number format of the file, on the CPU; embedding, head and linear matrices may be halves.

    Ternary matrices as code × scale, which float16 holds exactly. `export.type` is f16 or f32; anything else, for
    ternary models, is float16 with embedding and head as `export.head` says; for float models, the smallest of float16,
    bfloat16 and float32 that loses nothing. Raises ConfigError for values that cannot be stored.
    """
    linears = dict(model.linears())
    values = {key: value.detach().float().cpu() for key, value in model.state_dict().items()}
    for name, layer in linears.items():
        if layer.gain != 1:
            raise ConfigError(f"{name} has a factor on its output, for which transformers has no tensor: export --gguf")
        if layer.quant.enabled:
            values[f"{name}.weight"] = layer.ternary().dequantize().cpu()
    vocabulary = values.keys() & {"embedding.weight", "head.weight"}
    matrices = vocabulary | {f"{name}.weight" for name in linears}
    if export.type in ("f16", "f32"):
        dtype = torch.float16 if export.type == "f16" else torch.float32
    else:
        dtype = torch.float16 if model.config.quant.enabled else _smallest([values[key] for key in matrices])
    full = export.head == "f32" and (model.config.quant.enabled or export.type == "f16")
    for key in matrices:
        values[key] = _rounded(values[key], torch.float32 if full and key in vocabulary else dtype, key)
    return values


def float_twin(config: ModelConfig, values: Mapping[str, Tensor]) -> Transformer:
    """The model that transformers makes of stored values: float matrices, and activations that are not rounded."""
    twin = Transformer(
        config.model_copy(deep=True, update={"quant": config.quant.model_copy(update={"enabled": False})})
    )
    twin.load_state_dict({key: value.float() for key, value in values.items()})
    return twin.eval()


def _smallest(weights: list[Tensor]) -> torch.dtype:
    for dtype in (torch.float16, torch.bfloat16):
        if all(torch.equal(weight.to(dtype).float(), weight) for weight in weights):
            return dtype
    return torch.float32


def _rounded(weight: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    if not weight.isfinite().all():
        raise ConfigError(f"{key} holds values that are not finite: the run diverged; export an earlier checkpoint")
    if dtype == torch.float16 and weight.abs().max() > F16_MAX:
        raise ConfigError(f"{key} holds values above {F16_MAX:g}, the largest float16: use --type f32 or --head f32")
    return weight.to(dtype)
