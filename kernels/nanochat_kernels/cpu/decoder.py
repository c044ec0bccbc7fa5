"""NativeDecoder: a token of each of several sequences through a whole packed model, in a single call of the C library.

For decoding, where everything but reading the weights is overhead. Left to the caller are prompts of many tokens,
which are faster as matrix products, sampling, and the memory of the cache.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat_kernels.backends import Unsupported
from nanochat_kernels.cpu.native import library
from nanochat_kernels.reference.packed import PackedTernary
from nanochat_kernels.reference.packing import PLANE

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t
MAX_SEQUENCES = 8
"""In one call of the C code, its TOKEN_BLOCK; more take several."""


@dataclass(frozen=True)
class DecoderLayer:
    """The weights of a block. Norms: float32 [dim]; q and k per head [head_dim]; before an output projection its K.

    qkv: [(n_heads + 2 n_kv_heads) · head_dim, dim]; wo: [dim, n_heads · head_dim]; gate_up: [2 · hidden, dim];
    down: [dim, hidden].
    """

    attention_norm: Tensor
    qkv: PackedTernary
    wo: PackedTernary
    ffn_norm: Tensor
    gate_up: PackedTernary
    down: PackedTernary
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    attention_sub_norm: Tensor | None = None
    ffn_sub_norm: Tensor | None = None


class _Matrix(ctypes.Structure):
    _fields_ = (("packed", _POINTER), ("scales", _POINTER), ("rows", _SIZE), ("columns", _SIZE), ("groups", _SIZE))


_NORMS = "attention_norm", "ffn_norm", "q_norm", "k_norm", "attention_sub_norm", "ffn_sub_norm"
_MATRICES = "qkv", "wo", "gate_up", "down"


class _Layer(ctypes.Structure):
    _fields_ = (*((name, _POINTER) for name in _NORMS), *((name, _Matrix) for name in _MATRICES))


class _Decoder(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)),
        *((name, _SIZE) for name in ("n_layers", "dim", "n_heads", "n_kv_heads", "head_dim", "hidden")),
        *((name, _SIZE) for name in ("vocab_size", "threads")),
        ("eps", ctypes.c_float),
        ("embedding_is_f16", ctypes.c_int),
        ("head_is_f16", ctypes.c_int),
        *((name, _POINTER) for name in ("embedding", "head", "norm", "cos", "sin")),
    )


class _Sequence(ctypes.Structure):
    _fields_ = (
        ("keys", _POINTER),
        ("values", _POINTER),
        *((name, _SIZE) for name in ("layer_stride", "capacity", "token", "position")),
    )


class NativeDecoder:
    """A packed model that the C library can decode with. Raises Unsupported if this machine or the model does not fit.

    layers: all of one shape. embedding, head: [V, dim], float32 or float16, possibly one tensor. norm: float32 [dim].
    cos, sin: float32 [positions, head_dim / 2]. Keeps references to all of them, and copies nothing.
    """

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        embedding: Tensor,
        head: Tensor,
        norm: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        n_heads: int,
        n_kv_heads: int,
        eps: float,
    ) -> None:
        self._library = library()
        self.vocab_size, self.dim = embedding.shape
        self._kept: list[Tensor] = []
        _check(layers, embedding, head, n_heads, n_kv_heads, cos.shape[1] * 2)
        structures = (_Layer * len(layers))(*(self._layer(layer) for layer in layers))
        self._decoder = _Decoder(
            layers=structures,
            n_layers=len(layers),
            dim=self.dim,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=cos.shape[1] * 2,
            hidden=layers[0].down.columns,
            vocab_size=self.vocab_size,
            threads=torch.get_num_threads(),
            eps=eps,
            embedding_is_f16=embedding.dtype == torch.float16,
            head_is_f16=head.dtype == torch.float16,
            embedding=self._keep(embedding),
            head=self._keep(head),
            norm=self._keep(norm),
            cos=self._keep(cos),
            sin=self._keep(sin),
        )
        self._address = ctypes.addressof(self._decoder)
        self._cache_shape = (len(layers), n_kv_heads, cos.shape[1] * 2)
        self._positions = len(cos)
        self._workspace = torch.empty(0, dtype=torch.uint8)

    def decode(
        self, tokens: Sequence[int], positions: Sequence[int], keys: Sequence[Tensor], values: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """hidden [n, dim] after the final norm, and logits [n, V], of n tokens at their positions; both float32.

        keys, values: of each token's sequence, float32 [layers, Hkv, capacity, head_dim], a layer contiguous, filled
        before its position; the token's own are written there. Tokens at positions that follow each other may have
        one cache: they are read as a text. The bits of a token do not depend on the others. Raises ValueError if a
        token, a position or a cache is out of range; nothing is read then.
        """
        rows = list(zip(tokens, positions, keys, values, strict=True))
        sequences = [self._sequence(*row) for row in rows]
        hidden, logits = torch.empty(len(rows), self.dim), torch.empty(len(rows), self.vocab_size)
        for start in range(0, len(rows), MAX_SEQUENCES):
            some = sequences[start : start + MAX_SEQUENCES]
            size = self._library.nk_decoder_workspace(self._address, max(one.capacity for one in some), len(some))
            if size + 64 > len(self._workspace):
                self._workspace = torch.empty(size + 64, dtype=torch.uint8)
            self._library.nk_decode(
                self._address,
                (self._workspace.data_ptr() + 63) // 64 * 64,
                (_Sequence * len(some))(*some),
                len(some),
                hidden[start:].data_ptr(),
                logits[start:].data_ptr(),
            )
        return hidden, logits

    def _sequence(self, token: int, position: int, keys: Tensor, values: Tensor) -> _Sequence:
        n_layers, n_kv_heads, head_dim = self._cache_shape
        capacity = keys.shape[-2]
        for cache in (keys, values):
            if cache.shape != (n_layers, n_kv_heads, capacity, head_dim) or not cache[0].is_contiguous():
                raise ValueError(f"the cache has shape {list(cache.shape)} where {self._cache_shape} is needed")
            if cache.dtype != torch.float32 or cache.device.type != "cpu":
                raise ValueError(f"the cache is {cache.dtype} on {cache.device}: the CPU decoder reads float32")
        if keys.stride(0) != values.stride(0):
            raise ValueError("keys and values lie differently in memory")
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token {token} is outside the vocabulary of {self.vocab_size}")
        if not 0 <= position < min(capacity, self._positions):
            raise ValueError(f"position {position} is beyond the {min(capacity, self._positions)} there are")
        return _Sequence(keys.data_ptr(), values.data_ptr(), keys.stride(0), capacity, token, position)

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits float32 [V] of hidden float32 [dim]."""
        if hidden.shape != (self.dim,):
            raise ValueError(f"a hidden state of shape {list(hidden.shape)} where [{self.dim}] is needed")
        hidden, logits = hidden.detach().float().contiguous(), torch.empty(self.vocab_size)
        self._library.nk_unembed(self._address, hidden.data_ptr(), logits.data_ptr())
        return logits

    def _keep(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        tensor = tensor.detach().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _matrix(self, weight: PackedTernary) -> _Matrix:
        return _Matrix(
            self._keep(weight.packed), self._keep(weight.scales), weight.rows, weight.columns, weight.n_groups
        )

    def _layer(self, layer: DecoderLayer) -> _Layer:
        norms = (self._keep(getattr(layer, name)) for name in _NORMS)
        return _Layer(*norms, *(self._matrix(getattr(layer, name)) for name in _MATRICES))


def _check(
    layers: Sequence[DecoderLayer], embedding: Tensor, head: Tensor, n_heads: int, n_kv_heads: int, head_dim: int
) -> None:
    """Check everything that the C code takes for granted. Raises Unsupported or ValueError."""
    dim = embedding.shape[1]
    if head.shape != embedding.shape:
        raise ValueError(f"head {list(head.shape)} and embedding {list(embedding.shape)} differ in shape")
    hidden, inner, heads = layers[0].down.columns, n_heads * head_dim, (n_heads + 2 * n_kv_heads) * head_dim
    for layer in layers:
        shapes = {
            "qkv": (layer.qkv, heads, dim),
            "wo": (layer.wo, dim, inner),
            "gate_up": (layer.gate_up, 2 * hidden, dim),
            "down": (layer.down, dim, hidden),
        }
        for name, (weight, rows, columns) in shapes.items():
            if (weight.rows, weight.columns) != (rows, columns):
                raise ValueError(f"{name} is {weight.rows} × {weight.columns} where {rows} × {columns} is needed")
            if weight.n_groups > 1 and weight.group % PLANE and weight.group != PLANE // 2:
                raise Unsupported(f"scales of {weight.group} inputs, not 64 or a multiple of 128")
            if weight.packed.device.type != "cpu":
                raise Unsupported(f"the weights are on {weight.packed.device}")
        for norm in (getattr(layer, name) for name in _NORMS):
            if norm is not None and norm.dtype != torch.float32:
                raise Unsupported(f"norm weights of {norm.dtype}")
    for matrix in (embedding, head):
        if matrix.dtype not in (torch.float32, torch.float16):
            raise Unsupported(f"an embedding or head of {matrix.dtype}")
