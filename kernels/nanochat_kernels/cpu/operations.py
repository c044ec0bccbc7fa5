"""The CPU backend: the operations of the compiled library on torch tensors.

Every function checks what the C code takes for granted, and raises Unsupported for what it does not cover; the
dispatcher then uses the reference. Float inputs other than float32 are converted first.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from nanochat_kernels.backends import Unsupported
from nanochat_kernels.cpu.native import library
from nanochat_kernels.reference import matmul as reference
from nanochat_kernels.reference import operations as definitions
from nanochat_kernels.reference.activations import QuantizedActivations
from nanochat_kernels.reference.attention import empty_heads
from nanochat_kernels.reference.cross_entropy import CodedGradient
from nanochat_kernels.reference.gradient import QuantizedGradient
from nanochat_kernels.reference.gradient import int8_gradients as int8_gradients  # those of a CPU: linear_products
from nanochat_kernels.reference.nvfp4 import Nvfp4Activations
from nanochat_kernels.reference.orthogonalize import tightening
from nanochat_kernels.reference.packed import PackedTernary
from nanochat_kernels.reference.packing import PLANE
from nanochat_kernels.reference.ternarize import Granularity, Ternary

_int8_product = torch._int_mm  # pyright: ignore[reportPrivateImportUsage] - it has no public name
SUM_GROUP = 32
"""The C code sums activations in pieces of this many."""


def quantize_activations(x: Tensor, group: int | None = None) -> QuantizedActivations:
    rows, out = _activations(x, group)
    m, k = rows.shape
    library().nk_quantize(rows.data_ptr(), m, k, group or k, *_pointers(out))
    return _shaped(out, x.shape[:-1])


def rmsnorm_quantize(x: Tensor, weight: Tensor, eps: float, group: int | None = None) -> QuantizedActivations:
    rows, out = _activations(x, group)
    m, k = rows.shape
    weight = _floats(weight)
    if weight.shape != (k,):
        raise ValueError(f"a norm weight of shape {list(weight.shape)} does not fit rows of {k}")
    _require_memory(
        library().nk_rmsnorm_quantize(rows.data_ptr(), weight.data_ptr(), eps, m, k, group or k, *_pointers(out))
    )
    return _shaped(out, x.shape[:-1])


def swiglu_quantize(gate: Tensor, up: Tensor, group: int | None = None) -> QuantizedActivations:
    if gate.shape != up.shape:
        raise ValueError(f"gate {list(gate.shape)} and up {list(up.shape)} differ in shape")
    _require_cpu(gate, up)
    k = gate.shape[-1]
    gates, ups = _rows_of_a_block(gate), _rows_of_a_block(up)
    if gates is None or ups is None or gates.stride(0) != ups.stride(0):
        gates, ups = _floats(gate).reshape(-1, k), _floats(up).reshape(-1, k)
    out = _empty(len(gates), k, group)
    _require_memory(
        library().nk_swiglu_quantize(
            gates.data_ptr(), ups.data_ptr(), gates.stride(0), len(gates), k, group or k, *_pointers(out)
        )
    )
    return _shaped(out, gate.shape[:-1])


def ternary_matmul(
    activations: QuantizedActivations, weight: PackedTernary, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    codes, scale, sums = activations
    _require_cpu(codes, weight.packed)
    n, k, groups = _sizes(weight, codes.shape[-1])
    rows = codes.reshape(-1, k).contiguous()
    m = len(rows)
    sums = sums.reshape(m, -1)
    if sums.shape[1] != groups:
        sums = _regroup(rows, sums, groups)
    y = torch.empty(m, n)
    scale, sums = scale.reshape(m).contiguous(), sums.contiguous()
    activation_pointers = rows.data_ptr(), scale.data_ptr(), sums.data_ptr()
    weight_pointers = weight.packed.data_ptr(), weight.scales.data_ptr()
    _require_memory(library().nk_ternary_matmul(*activation_pointers, *weight_pointers, groups, y.data_ptr(), m, n, k))
    return y.to(out_dtype).reshape(*codes.shape[:-1], n)


def packed_linear(x: Tensor, weight: PackedTernary, out_dtype: torch.dtype = torch.float32) -> Tensor:
    n, k, groups = _sizes(weight, x.shape[-1])
    packed, scales = weight.packed, weight.scales
    _require_cpu(x, packed)
    if k // groups % SUM_GROUP:
        raise Unsupported(f"scales of {k // groups} inputs, not multiples of {SUM_GROUP}")
    if x.dtype != torch.float32 or not x.is_contiguous():
        x = _floats(x)
    y = torch.empty(*x.shape[:-1], n)
    pointers = x.data_ptr(), packed.data_ptr(), scales.data_ptr()
    _require_memory(library().nk_linear(*pointers, groups, y.data_ptr(), x.numel() // k, n, k))
    return y if out_dtype == torch.float32 else y.to(out_dtype)


def int8_matmul(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    _require_cpu(a, b)
    a, b = a.contiguous(), b.contiguous()
    (m, k), n = a.shape, len(b)
    if b.shape[1] != k:
        raise ValueError(f"int8 matrices of {k} and {b.shape[1]} inputs cannot be multiplied")
    y = torch.empty(m, n)
    a_scale, b_scale = _floats(a_scale).reshape(-1), _floats(b_scale).reshape(-1)
    library().nk_int8_matmul(
        a.data_ptr(),
        b.data_ptr(),
        a_scale.data_ptr(),
        b_scale.data_ptr(),
        0 if len(b_scale) == 1 else 1,
        y.data_ptr(),
        m,
        n,
        k,
    )
    return y.to(out_dtype)


def fp8_matmul(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """A format of GPUs, computed here by the reference."""
    return reference.fp8_matmul(a, b, a_scale, b_scale, out_dtype)


def nvfp4_quantize(x: Tensor) -> Nvfp4Activations:
    raise Unsupported("NVFP4 is a format of GPUs")


def nvfp4_matmul(
    packed: Tensor, scale: Tensor, weight: Tensor, w_scale: Tensor, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    raise Unsupported("NVFP4 is a format of GPUs")


def quantize_gradient(dy: Tensor, factor: Tensor, weight: Tensor, levels: float) -> QuantizedGradient:
    _require_cpu(dy)
    m, n = dy.shape
    if dy.dtype != torch.float32 or dy.stride(1) != 1:
        dy = _floats(dy)
    factor, weight = _floats(factor), _floats(weight)
    out = QuantizedGradient(
        *(torch.empty(m, n, dtype=torch.int8), torch.empty(m)), *(torch.empty(m, n, dtype=torch.int8), torch.empty(n))
    )
    inputs = dy.data_ptr(), dy.stride(0), m, n, factor.data_ptr(), weight.data_ptr()
    codes, scale, column_codes, column_scale = (tensor.data_ptr() for tensor in out)
    _require_memory(library().nk_quantize_gradient(*inputs, codes, scale, levels, column_codes, column_scale))
    return out


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = (_heads(x) for x in (q, k, v))
    y, lse = empty_heads(q), torch.empty(q.shape[:3])
    _require_memory(library().nk_attention(*_attention_arguments(q, k, v, y), lse.data_ptr()))
    return y, lse


def attention_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, dy = (_heads(x) for x in (q, k, v, dy))
    gradients = empty_heads(q), empty_heads(k), empty_heads(v)
    arguments = _attention_arguments(q, k, v, dy, *gradients)
    _require_memory(library().nk_attention_backward(*arguments, lse.contiguous().data_ptr()))
    return gradients


def _heads(x: Tensor) -> Tensor:
    """float32 [B, H, T, D] whose elements of a head are next to each other."""
    _require_cpu(x)
    if x.shape[3] % 16:
        raise Unsupported(f"heads of {x.shape[3]} elements, not a multiple of 16")
    return x.detach() if x.dtype == torch.float32 and x.stride(3) == 1 else _floats(x)


def _attention_arguments(q: Tensor, k: Tensor, *others: Tensor) -> tuple[object, ...]:
    places = [place for x in (q, k, *others) for place in (x.data_ptr(), *x.stride()[:3])]
    batch, heads, length, head_dim = q.shape
    sizes = batch, heads, k.shape[1], length, head_dim
    return (ctypes.c_size_t * len(places))(*places), *sizes, head_dim**-0.5


def cross_entropy_gradient(logits: Tensor, targets: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    return _cross_entropy(logits, targets, factor, 0, 0, None, None), logits


def cross_entropy_codes(logits: Tensor, targets: Tensor, factor: Tensor, levels: float, first: int) -> CodedGradient:
    codes, scale = torch.empty(logits.shape, dtype=torch.int8), torch.empty(len(logits))
    return CodedGradient(_cross_entropy(logits, targets, factor, levels, first, codes, scale), codes, scale)


def iterate_int8(x: Tensor, coefficients: Sequence[tuple[float, float, float]], tighten: bool = False) -> Tensor:
    _require_cpu(x)
    native = library()
    rows, columns = x.shape
    codes, gram_codes = torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows, rows, dtype=torch.int8)
    gram, product = torch.empty(rows, rows), torch.empty(rows, columns, dtype=torch.int32)
    square = torch.empty(rows, rows, dtype=torch.int32)
    scale, diagonal, gram_scale, squares, step = torch.empty(5, rows)
    of_x = codes.data_ptr(), scale.data_ptr(), diagonal.data_ptr()
    of_gram = gram.data_ptr(), gram_codes.data_ptr(), gram_scale.data_ptr(), squares.data_ptr()
    native.nk_iterate(x.data_ptr(), None, None, None, rows, columns, *of_x)
    for index, (a, b, c) in enumerate(coefficients):
        _int8_product(codes, codes.T, out=square)
        native.nk_gram(square.data_ptr(), scale.data_ptr(), rows, *of_gram)
        if tighten and index == 0:
            room = float(tightening(diagonal.square().sum() + squares.sum()))
            a, b, c = a * room, b * room**3, c * room**5
        _int8_product(gram_codes, gram_codes.T, out=square)
        keep = a + b * diagonal + c * (diagonal.square() + squares)
        inputs = gram.data_ptr(), square.data_ptr(), diagonal.data_ptr(), gram_scale.data_ptr(), scale.data_ptr()
        native.nk_polynomial(*inputs, b, c, rows, gram_codes.data_ptr(), step.data_ptr())
        _int8_product(gram_codes, codes, out=product)
        pointers = x.data_ptr(), product.data_ptr(), keep.data_ptr(), step.data_ptr()
        native.nk_iterate(*pointers, rows, columns, *of_x)
    return x


def ternarize(weight: Tensor, granularity: Granularity = "row") -> Ternary:
    weight, group, scales = _weights(weight, granularity)
    codes = torch.empty(weight.shape, dtype=torch.int8)
    _ternarize(weight, group, codes, None, scales)
    return Ternary(codes, scales, granularity)


def ternarize_packed(weight: Tensor, granularity: Granularity = "row") -> PackedTernary:
    weight, group, scales = _weights(weight, granularity)
    rows, columns = weight.shape
    if columns % PLANE:
        raise ValueError(f"K = {columns} is not a multiple of {PLANE}")
    packed = torch.empty(rows, columns // 4, dtype=torch.uint8)
    _ternarize(weight, group, None, packed, scales)
    return PackedTernary(packed, scales.expand(rows, -1).contiguous(), columns)


def ternarize_rows(
    latents: Sequence[Tensor], scales: Sequence[Tensor], operands: Sequence[Tensor], packed: Sequence[Tensor | None]
) -> None:
    for latent, scale, operand, held in zip(latents, scales, operands, packed, strict=True):
        whole = latent.is_contiguous() and scale.is_contiguous() and operand.is_contiguous()
        if whole and held is None and (latent.dtype, operand.dtype) == (torch.float32, torch.int8):
            _require_cpu(latent, scale, operand)
            _ternarize(latent, latent.shape[1], operand, None, scale)
        else:
            definitions.ternarize_rows([latent], [scale], [operand], [held], ternarize)


def unpack(weight: PackedTernary, dtype: torch.dtype = torch.int8) -> Tensor:
    _require_cpu(weight.packed)
    codes = torch.empty(weight.rows, weight.columns, dtype=torch.int8)
    if library().nk_unpack(weight.packed.data_ptr(), weight.rows, weight.columns, codes.data_ptr()):
        raise ValueError("invalid code 3 in packed ternary weights")
    return codes.to(dtype)


# --- checks and shapes ------------------------------------------------------------------------------------------------


def _require_cpu(*tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.device.type != "cpu":
            raise Unsupported(f"the tensors are on {tensor.device}")


def _sizes(weight: PackedTernary, inputs: int) -> tuple[int, int, int]:
    """N, K and scales per row of weights that fit `inputs`."""
    if inputs != weight.columns:
        raise ValueError(f"activations of {inputs} inputs do not fit weights of {weight.columns}")
    if weight.n_groups > 1 and weight.group % PLANE and weight.group != PLANE // 2:
        raise Unsupported(f"scales of {weight.group} inputs, not 64 or a multiple of 128")
    return weight.rows, weight.columns, weight.n_groups


def _floats(x: Tensor) -> Tensor:
    return x.detach().to(torch.float32).contiguous()


def _rows_of_a_block(x: Tensor) -> Tensor | None:
    """[M, K] view of a float32 tensor, if its rows are contiguous and equally far apart, as after a fused product."""
    if x.dtype != torch.float32 or x.stride(-1) != 1:
        return None
    try:
        return x.detach().view(-1, x.shape[-1])
    except RuntimeError:
        return None


def _activations(x: Tensor, group: int | None) -> tuple[Tensor, QuantizedActivations]:
    _require_cpu(x)
    rows = _floats(x).reshape(-1, x.shape[-1])
    return rows, _empty(len(rows), x.shape[-1], group)


def _empty(m: int, k: int, group: int | None) -> QuantizedActivations:
    """Uninitialised codes, scale and sums of m tokens. Raises Unsupported for sizes that the C code does not take."""
    group = group or k
    if k % group:
        raise ValueError(f"{k} inputs cannot be split into groups of {group}")
    if group % SUM_GROUP:
        raise Unsupported(f"{k} inputs in groups of {group}, not multiples of {SUM_GROUP}")
    return QuantizedActivations(
        torch.empty(m, k, dtype=torch.int8), torch.empty(m, 1), torch.empty(m, k // group, dtype=torch.int32)
    )


def _pointers(out: QuantizedActivations) -> tuple[int, int, int]:
    return out.codes.data_ptr(), out.scale.data_ptr(), out.sums.data_ptr()


def _shaped(out: QuantizedActivations, leading: Sequence[int]) -> QuantizedActivations:
    return QuantizedActivations(*(tensor.reshape(*leading, tensor.shape[-1]) for tensor in out))


def _regroup(codes: Tensor, sums: Tensor, groups: int) -> Tensor:
    """Sums for other groups than the activations came with: added up if those are finer, else counted again."""
    m = len(codes)
    if sums.shape[1] % groups == 0:
        return sums.reshape(m, groups, -1).sum(dim=-1, dtype=torch.int32)
    return codes.reshape(m, groups, -1).sum(dim=-1, dtype=torch.int32)


def _weights(weight: Tensor, granularity: Granularity) -> tuple[Tensor, int, Tensor]:
    """The latent, the C code's name for the granularity (0: tensor, else inputs per scale), and empty scales."""
    _require_cpu(weight)
    weight = _floats(weight)
    rows, columns = weight.shape
    if granularity == "tensor":
        return weight, 0, torch.empty(1, 1)
    group = columns if granularity == "row" else int(granularity)
    if group <= 0 or columns % group:
        raise ValueError(f"a weight with {columns} inputs cannot be split into groups of {granularity}")
    return weight, group, torch.empty(rows, columns // group)


def _ternarize(weight: Tensor, group: int, codes: Tensor | None, packed: Tensor | None, scales: Tensor) -> None:
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in (codes, packed))
    _require_memory(library().nk_ternarize(weight.data_ptr(), *weight.shape, group, *pointers, scales.data_ptr()))


def _cross_entropy(
    logits: Tensor,
    targets: Tensor,
    factor: Tensor,
    levels: float,
    first: int,
    codes: Tensor | None,
    scale: Tensor | None,
) -> Tensor:
    """The losses; the gradient is in the codes and their scale, or in place of the logits."""
    _require_cpu(logits, targets)
    if logits.dtype != torch.float32 or not logits.is_contiguous():
        raise Unsupported("logits that are not contiguous float32")
    (m, n), targets, factor = logits.shape, targets.to(torch.int64).contiguous(), _floats(factor)
    if m and int(targets.max()) >= n:
        raise IndexError(f"target {int(targets.max())} of {n} logits")
    loss = torch.empty(m)
    inputs = logits.data_ptr(), m, n, targets.data_ptr(), factor.data_ptr(), loss.data_ptr(), levels, first
    library().nk_cross_entropy(*inputs, *(None if out is None else out.data_ptr() for out in (codes, scale)))
    return loss


def _require_memory(status: int) -> None:
    if status:
        raise MemoryError("no memory for the workspace of a ternary operation")
