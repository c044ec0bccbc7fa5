"""Writing a trained model as one GGUF file that llama.cpp runs.

Decides nothing that has a definition elsewhere: architecture, names and row order come from
`architecture`, types from `tensor_types`, bytes from `packing`, the vocabulary from
`tokenizer_metadata`. `export.verify` checks the file afterwards.

The file appears under its name only once it is complete and on disk. llama.cpp refuses a file with a
tensor that it does not expect and aborts on norms that are not F32, so nothing extra is written;
provenance goes to `nanochat.*` metadata, which other programs ignore.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray
from torch import Tensor

from nanochat_cli.atomic_write import whole
from nanochat_cli.config.sections.export import ExportConfig
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.formats.gguf.architecture import Architecture, architecture_of, metadata
from nanochat_cli.formats.gguf.checksum import add_checksum
from nanochat_cli.formats.gguf.packing import TERNARY_TYPES, pack
from nanochat_cli.formats.gguf.tensor_names import file_row_order, gain_name, stack_shape, tensor_name, to_file
from nanochat_cli.formats.gguf.tensor_types import AUTO_ORDER, choose_type, fits
from nanochat_cli.formats.gguf.tokenizer_metadata import tokenizer_metadata
from nanochat_cli.model.bitlinear import BitLinear
from nanochat_cli.model.transformer import Transformer

FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "tq1_0": 36, "tq2_0": 37, "q2_0": 41}
"""`general.file_type` (llama.h, enum llama_ftype) by the type that most weights have; informative only."""
GGUF_QUANTIZATION_VERSION = 2
F16_MAX = 65504.0


@dataclass(frozen=True)
class ExportReport:
    path: Path
    bytes: int
    arch: str
    tensor_types: dict[str, str]
    """Type per GGUF tensor name, in file order."""
    linear_types: dict[str, str]
    """Type per linear layer, by its dotted name in the model."""
    head_type: str
    """Type of token embedding and head."""
    bits_per_weight: float
    """In the linear layers of the blocks, including scales."""
    file_bits_per_weight: float
    """In the whole file, including metadata, per parameter."""
    fallbacks: list[str] = field(default_factory=list)
    """One line per reason why `auto` did not take its first choice."""


def export_gguf(
    model: Transformer,
    tokenizer: Tokenizer,
    out: Path,
    export: ExportConfig,
    provenance: Mapping[str, Any],
    chat_template: str | None = None,
) -> ExportReport:
    """Write `model` with its tokenizer to `out`, replacing what is there once the new file is complete.

    Codes and f16 scales of ternary layers are copied bit for bit. With `export.type = f32` embeddings and head are
    F32 too; otherwise they are what `export.head` says. provenance: plain values for `nanochat.KEY` (version, git,
    run, step, config, dataset …); None is left out. chat_template: Jinja, of a model that was trained with one.

    Raises ConfigError if the model or the requested type cannot be exported, DataError if `out` cannot be written.
    """
    config = model.config
    arch = architecture_of(config)
    head_type = "f32" if export.type == "f32" else export.head
    linear_types = choose_linear_types(model, export.type)
    writer = GGUFWriter(None, arch.name)
    _add_metadata(writer, model, _most_common(model, linear_types), provenance)
    for key, value in tokenizer_metadata(tokenizer, config.vocab_size, chat_template).items():
        add_value(writer, key, value)

    linears = dict(model.linears())
    tensor_types: dict[str, str] = {}
    n_parameters = linear_bytes = 0
    for key, weight in model.state_dict().items():
        name, layer = tensor_name(key, config), linears.get(key.removesuffix(".weight"))
        n_parameters += weight.numel()
        if layer is not None:
            tensor_types[name] = linear_types[key.removesuffix(".weight")]
            data = _linear_data(layer, tensor_types[name], arch, key, model)
            linear_bytes += data.nbytes
        else:
            tensor_types[name] = head_type if key in ("embedding.weight", "head.weight") else "f32"
            data = to_file(key, _float_data(weight, tensor_types[name], name))
        data = data.reshape(stack_shape(data.shape, key, config))
        ternary_type = TERNARY_TYPES.get(tensor_types[name])
        raw: GGMLQuantizationType | None = ternary_type.ggml_type if ternary_type else None
        writer.add_tensor(name, data, raw_dtype=raw)
        if layer is not None and layer.gain != 1:
            factors = data.shape[0] if data.ndim == 3 else 1
            writer.add_tensor(gain_name(name), np.full(factors, layer.gain, dtype=np.float32))
            tensor_types[gain_name(name)] = "f32"
    add_checksum(writer)
    _write(writer, out)

    n_linear = sum(layer.weight.numel() for layer in linears.values())
    n_bytes = out.stat().st_size
    return ExportReport(
        path=out,
        bytes=n_bytes,
        arch=arch.name,
        tensor_types=tensor_types,
        linear_types=linear_types,
        head_type=head_type,
        bits_per_weight=8 * linear_bytes / n_linear,
        file_bits_per_weight=8 * n_bytes / n_parameters,
        fallbacks=_fallbacks(model, linear_types) if export.type == "auto" else [],
    )


def choose_linear_types(model: Transformer, requested: str) -> dict[str, str]:
    """Type per linear layer, by its dotted name. Raises ConfigError if `requested` does not fit one of them."""
    return {
        name: choose_type(
            requested,
            tensor_name(f"{name}.weight", model.config),
            layer.in_features,
            layer.quant.scale if layer.quant.enabled else None,
        )
        for name, layer in model.linears()
    }


def _fallbacks(model: Transformer, linear_types: Mapping[str, str]) -> list[str]:
    """Why layers did not get the first type of `auto`: one line per (columns, type), not per layer."""
    lines: dict[tuple[int, str], str] = {}
    for name, layer in model.ternary_layers():
        columns, chosen, first = layer.in_features, linear_types[name], AUTO_ORDER[0]
        if chosen != first and (columns, chosen) not in lines:
            block = TERNARY_TYPES[first].block
            why = (
                f"{columns} columns are not a multiple of {block}"
                if columns % block
                else f"one scale per {layer.quant.scale} is finer than its block of {block}"
            )
            others = [t for t in AUTO_ORDER if t != chosen and fits(t, columns, layer.quant.scale)]
            also = f" (also exact: {', '.join(others)})" if others else ""
            lines[columns, chosen] = f"{chosen} instead of {first}: {why}{also}"
    return list(lines.values())


def _most_common(model: Transformer, linear_types: Mapping[str, str]) -> str:
    weights: dict[str, int] = {}
    for name, layer in model.linears():
        weights[linear_types[name]] = weights.get(linear_types[name], 0) + layer.weight.numel()
    return max(weights, key=weights.__getitem__)


def _linear_data(layer: BitLinear, type_name: str, arch: Architecture, key: str, model: Transformer) -> NDArray[Any]:
    """The bytes of one linear layer, rows in the order of the file."""
    order = file_row_order(arch, key, model.config)
    rows = slice(None) if order is None else order
    if type_name not in TERNARY_TYPES:
        weight = layer.ternary().dequantize() if layer.quant.enabled else layer.weight
        return _float_data(weight, type_name, tensor_name(key, model.config))[rows]
    ternary = layer.ternary()
    codes, scales = ternary.codes.cpu().numpy()[rows], ternary.scales.cpu().numpy()
    if scales.shape[0] > 1:  # one scale for the whole tensor has no row to move
        scales = scales[rows]
    return pack(type_name, codes, scales, tensor_name(key, model.config))


def _float_data(weight: Tensor, type_name: str, what: str) -> NDArray[Any]:
    values = weight.detach().float().cpu().numpy()
    if not np.isfinite(values).all():
        raise ConfigError(f"{what} holds values that are not finite: the run diverged; export an earlier checkpoint")
    if type_name == "f32":
        return values
    if np.abs(values).max(initial=0) > F16_MAX:
        raise ConfigError(
            f"{what} holds values above {F16_MAX:g}, the largest F16: use F32 (export.head or export.type)"
        )
    return values.astype(np.float16)


def _add_metadata(writer: GGUFWriter, model: Transformer, file_type: str, provenance: Mapping[str, Any]) -> None:
    quant = model.config.quant
    writer.add_type("model")
    writer.add_name(str(provenance.get("run") or "nanochat"))
    writer.add_file_type(FILE_TYPES[file_type])
    writer.add_quantization_version(GGUF_QUANTIZATION_VERSION)
    values = {
        **metadata(model.config),
        "nanochat.quant.enabled": quant.enabled,
        "nanochat.quant.scale": str(quant.scale),
        "nanochat.quant.activations": quant.activations,
        **{f"nanochat.{key}": value for key, value in provenance.items() if value is not None},
    }
    for key, value in values.items():
        add_value(writer, key, value)


def add_value(writer: GGUFWriter, key: str, value: Any) -> None:
    """Write a plain Python value as the GGUF type that llama.cpp expects."""
    match value:
        case bool():
            writer.add_bool(key, value)
        case int() if 0 <= value < 2**32:
            writer.add_uint32(key, value)
        case int():
            writer.add_int64(key, value)
        case float():
            writer.add_float32(key, value)
        case list():
            writer.add_array(key, value)
        case _:
            writer.add_string(key, str(value))


def _write(writer: GGUFWriter, out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with whole(out) as temporary:
            try:
                writer.write_header_to_file(temporary)
                writer.write_kv_data_to_file()
                write_tensors(writer)
            finally:
                writer.close()
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror or error}; free space or choose another --out") from error


def write_tensors(writer: GGUFWriter) -> None:
    """Like its `write_tensors_to_file`, which writes through numpy's copy of the file.

    What that copy still holds when it is closed is lost on a full disk, without an error.
    """
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    (file,), (tensors,) = writer.fout, writer.tensors
    writer.write_padding(file, file.tell())
    for info in tensors.values():
        assert info.tensor is not None
        file.write(np.ascontiguousarray(info.tensor).data)
        writer.write_padding(file, info.nbytes)
