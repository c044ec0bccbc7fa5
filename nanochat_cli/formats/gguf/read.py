"""A GGUF file back in our own runtime, with exactly the codes and scales that it holds.

The inverse of `formats.gguf.write`, with the same names, row order and layouts. Also reads files of other
programs if the architecture is one of ours and the linear layers are ternary or float.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import ReaderTensor
from numpy.typing import NDArray

from nanochat_cli.config.sections.model import ModelConfig, QuantConfig
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import DataError
from nanochat_cli.formats.buildable import buildable, shapes_of
from nanochat_cli.formats.gguf.architecture import ARCHITECTURES, config_from_metadata
from nanochat_cli.formats.gguf.checksum import require_intact
from nanochat_cli.formats.gguf.file import GGUFFile, rows_of
from nanochat_cli.formats.gguf.packing import TERNARY_TYPES, unpack
from nanochat_cli.formats.gguf.tensor_names import (
    file_row_order,
    from_file,
    gain_name,
    stack_shape,
    tensor_name,
)
from nanochat_cli.formats.gguf.tokenizer_metadata import tokenizer_from_metadata
from nanochat_cli.model.hyper_connections import permutation_matrices
from nanochat_cli.model.rope import rope_table
from nanochat_cli.model.transformer import Transformer
from nanochat_kernels import Granularity, Ternary

_TERNARY_BY_GGML_TYPE = {t.ggml_type: t.name for t in TERNARY_TYPES.values()}
_GRANULARITIES: tuple[Granularity, ...] = ("tensor", "row", 256, 128, 64)
"""Coarsest first."""
TENSORS_OF_A_BLOCK = 9
"""The fewest: two norms, four matrices of attention (DeltaNet has more), three of the feed-forward."""

_NOT_COMPUTED = {".bias": ", a bias,", "rope_freqs.weight": ", scaled rotary positions,"}
"""What a tensor is, by the end of its name, if files of other programs have it and our models do not."""

Matrix = tuple[NDArray[np.int8], NDArray[np.float32]]
"""Codes [N, K] and the scale of every block [N, blocks]."""


def load_gguf(path: Path) -> tuple[Transformer, Tokenizer]:
    """The model and the tokenizer of a GGUF file, in float32 on the CPU, ready for inference.

    Raises DataError if the file is damaged, or holds a model that this program cannot compute.
    """
    file = GGUFFile(path)
    try:
        return _load(file)
    except DataError as error:
        raise error if str(path) in str(error) else DataError(f"{path}: {error}") from error


@torch.no_grad()
def _load(file: GGUFFile) -> tuple[Transformer, Tokenizer]:
    config = model_config(file)
    arch = ARCHITECTURES[file.fields["general.architecture"]]
    model = shapes_of(config, str(file.path))  # no random weights to be overwritten
    _check_tensors(file, model)
    require_intact(file)
    tokenizer = tokenizer_from_metadata(file.fields)
    if tokenizer.vocab_size != config.vocab_size:
        raise DataError(
            f"the vocabulary has {tokenizer.vocab_size} tokens and token_embd.weight {config.vocab_size} rows: "
            "not the tokenizer it was trained with; export or download the file again"
        )

    with buildable(str(file.path)):
        model.to_empty(device="cpu")
        cos, sin = rope_table(config.max_seq_len, config.resolved_head_dim, config.rope_theta)
    model.cos.copy_(cos)
    model.sin.copy_(sin)
    linears = dict(model.linears())
    matrices: dict[str, Matrix] = {}
    for key, parameter in model.state_dict().items():
        tensor = file.tensors[tensor_name(key, config)]
        name = key.removesuffix(".weight")
        order = file_row_order(arch, key, config)
        rows = slice(None) if order is None else np.argsort(order)
        if name in linears and config.quant.enabled:
            codes, scales = _ternary(tensor, config.quant.scale)
            matrices[name] = codes[rows], scales[rows]
        else:
            parameter.copy_(torch.from_numpy(from_file(key, _float(tensor))[rows]))
    for name, layer in linears.items():
        gain = file.tensors.get(gain_name(tensor_name(f"{name}.weight", config)))
        if gain is not None:
            if (gain.data != gain.data[0]).any():
                raise DataError(f"tensor {gain.name} differs between experts: not supported")
            layer.gain = float(gain.data[0])
    _fill_buffers(model)
    granularity = _declared_granularity(file.fields) or _coarsest_granularity(matrices)
    for name, (codes, scales) in matrices.items():
        grouped = _grouped(scales, codes.shape[1], granularity)
        if grouped is None:
            raise DataError(
                f"{tensor_name(name + '.weight', config)} has finer scales than nanochat.quant.scale = {granularity}"
            )
        linears[name].set_ternary(Ternary(torch.from_numpy(codes), torch.from_numpy(grouped), granularity))
    config.quant.scale = granularity  # pyright: ignore[reportAttributeAccessIssue] - one of the Literal's values
    return model.eval(), tokenizer


def load_float_gguf(path: Path) -> tuple[Transformer, Tokenizer]:
    """`load_gguf` of a file of float or 4- to 8-bit weights, each as one matrix.

    Raises DataError for a file that is ternary already: it has codes, and not what they were rounded from.
    """
    model, tokenizer = load_gguf(path)
    if model.config.quant.enabled:
        raise DataError(
            f"{path}: its weights are ternary already: nanochat generate and eval take the file itself; only float and "
            "4- to 8-bit files are imported"
        )
    for _, layer in model.linears():  # a factor beside the matrix becomes part of it
        layer.weight.data *= layer.gain
        layer.gain = 1.0
    return model, tokenizer


def model_config(file: GGUFFile) -> ModelConfig:
    """[model] as the metadata has it; the scales of a ternary file are known once they are read."""
    fields = dict(file.fields)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise DataError("there is no tensor token_embd.weight: not a language model")
    if len(embedding.shape) != 2:
        raise DataError(f"tensor token_embd.weight has {len(embedding.shape)} dimensions, a matrix has 2")
    arch = fields.get("general.architecture")
    _check_depth(file, arch)
    fields.setdefault(f"{arch}.vocab_size", int(embedding.shape[1]))
    quant = QuantConfig.model_validate(
        {
            "enabled": _is_ternary(file),
            "scale": _declared_granularity(fields) or "row",
            "activations": bool(fields.get("nanochat.quant.activations", True)),
        }
    )
    return config_from_metadata(fields, tied="output.weight" not in file.tensors, quant=quant)


def _check_depth(file: GGUFFile, arch: Any) -> None:
    """Refuse more layers than the tensors make up, before anything is built; a missing tensor is named later."""
    layers = file.fields.get(f"{arch}.block_count")
    tensors = sum(name.startswith("blk.") for name in file.tensors)
    if isinstance(layers, int) and (layers - 1) * TENSORS_OF_A_BLOCK > tensors:
        raise DataError(f"{arch}.block_count = {layers}, but the file has only {tensors} tensors of blocks")


def _is_ternary(file: GGUFFile) -> bool:
    """What the file declares; for files of other programs, whether any tensor has a type that is always ternary."""
    declared = file.fields.get("nanochat.quant.enabled")
    if declared is not None:
        return bool(declared)
    types = {_TERNARY_BY_GGML_TYPE.get(tensor.tensor_type) for tensor in file.tensors.values()}
    return bool(types & {"tq1_0", "tq2_0", "q2_0"})


def _check_tensors(file: GGUFFile, model: Transformer) -> None:
    """Require the tensors of the model with their shapes, and no others, before memory is allocated for them."""
    config = model.config
    expected = {
        tensor_name(key, config): list(stack_shape(tuple(weight.shape), key, config))
        for key, weight in model.state_dict().items()
    }
    if missing := sorted(expected.keys() - file.tensors.keys()):
        raise DataError(f"tensor {missing[0]} is missing")
    gains = {gain_name(tensor_name(f"{name}.weight", config)) for name, _ in model.linears()}
    if extra := sorted(file.tensors.keys() - expected.keys() - gains):
        what = next((what for end, what in _NOT_COMPUTED.items() if extra[0].endswith(end)), "")
        raise DataError(
            f"tensor {extra[0]}{what} is not part of a {file.fields['general.architecture']} model that we compute"
        )
    for name, shape in expected.items():
        stored = [int(n) for n in reversed(file.tensors[name].shape.tolist())]
        if stored != shape:
            raise DataError(f"tensor {name} has shape {stored} where the metadata asks for {shape}")


def _fill_buffers(model: Transformer) -> None:
    """Fill non-persistent buffers, which `to_empty` left uninitialised."""
    for _, mix in model.hyper_connections():
        mix.permutations.copy_(permutation_matrices(mix.streams).flatten(1))
    for _, moe in model.mixtures():
        moe.load.zero_()
        moe.dropped.zero_()
        moe.loss_scale.fill_(1)


def _float(tensor: ReaderTensor) -> NDArray[np.float32]:
    try:
        values = gguf.quants.dequantize(rows_of(tensor), tensor.tensor_type)
    except NotImplementedError as error:
        raise DataError(f"tensor {tensor.name} has type {tensor.tensor_type.name}, which we cannot read") from error
    return np.ascontiguousarray(values, dtype=np.float32)


def _ternary(tensor: ReaderTensor, granularity: Granularity) -> Matrix:
    if name := _TERNARY_BY_GGML_TYPE.get(tensor.tensor_type):
        codes, scales = unpack(name, rows_of(tensor), tensor.name)
        return codes, scales.astype(np.float32)
    return _split_product(_float(tensor), granularity, tensor.name)


def _split_product(values: NDArray[np.float32], granularity: Granularity, what: str) -> Matrix:
    """Codes and scales of a ternary matrix stored as the product of the two (types F16 and F32).

    The file has lost the scale of a group whose codes are all zero; 0 computes the same.
    """
    if not np.isfinite(values).all():
        raise DataError(f"{what} holds values that are not finite")
    n_rows, n_columns = values.shape
    n_groups = n_columns // granularity if isinstance(granularity, int) else 1
    magnitude = np.abs(values).reshape(n_rows, n_groups, -1).max(axis=-1)
    if granularity == "tensor":
        magnitude = np.full_like(magnitude, magnitude.max())
    codes = np.sign(values).astype(np.int8)
    if not np.array_equal(codes * np.repeat(magnitude, n_columns // n_groups, axis=1), values):
        raise DataError(f"{what} holds values other than -1, 0 and 1 times a scale: not a ternary model")
    return codes, magnitude


def _declared_granularity(fields: Mapping[str, Any]) -> Granularity | None:
    """What our exporter wrote; None in files of other programs."""
    declared = fields.get("nanochat.quant.scale")
    if declared is None:
        return None
    for granularity in _GRANULARITIES:
        if declared == str(granularity):
            return granularity
    raise DataError(f"nanochat.quant.scale = {declared} is not one of {', '.join(map(str, _GRANULARITIES))}")


def _coarsest_granularity(matrices: Mapping[str, Matrix]) -> Granularity:
    for granularity in _GRANULARITIES:
        if all(_grouped(scales, codes.shape[1], granularity) is not None for codes, scales in matrices.values()):
            return granularity
    raise DataError("the scales are finer than one per 64 weights: not supported")


def _grouped(scales: NDArray[np.float32], n_columns: int, granularity: Granularity) -> NDArray[np.float32] | None:
    """Scales per block [N, blocks] as scales per group; None if they differ within a group."""
    n_rows, n_blocks = scales.shape
    if granularity == "tensor":
        return scales[:1, :1].copy() if (scales == scales[0, 0]).all() else None
    if granularity == "row":
        return scales[:, :1].copy() if (scales == scales[:, :1]).all() else None
    group = int(granularity)
    if n_columns % group:
        return None
    n_groups = n_columns // group
    if n_blocks % n_groups == 0:
        inside = scales.reshape(n_rows, n_groups, n_blocks // n_groups)
        return inside[..., 0].copy() if (inside == inside[..., :1]).all() else None
    return np.repeat(scales, n_groups // n_blocks, axis=1) if n_groups % n_blocks == 0 else None
