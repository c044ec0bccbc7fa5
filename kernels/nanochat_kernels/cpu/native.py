"""The compiled CPU library through ctypes: the signatures of its functions, and whether it is available here.

Pointers are passed as integers (`tensor.data_ptr()`): a call costs about a microsecond. The callers in `operations`
and `decoder` check shapes and dtypes.
"""

import ctypes
import functools
import os

import torch  # before the library: torch brings the OpenMP runtime that both then share

from nanochat_kernels.backends import Unsupported
from nanochat_kernels.cpu.build import shared_library

_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_float

_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "nk_select": (ctypes.c_char_p, [ctypes.c_char_p]),
    "nk_threads": (_INT, []),
    "nk_set_threads": (None, [_INT]),
    "nk_quantize": (None, [_POINTER, _SIZE, _SIZE, _SIZE, _POINTER, _POINTER, _POINTER]),
    "nk_rmsnorm_quantize": (
        _INT,
        [_POINTER, _POINTER, _FLOAT, _SIZE, _SIZE, _SIZE, _POINTER, _POINTER, _POINTER],
    ),
    "nk_swiglu_quantize": (
        _INT,
        [_POINTER, _POINTER, _SIZE, _SIZE, _SIZE, _SIZE, _POINTER, _POINTER, _POINTER],
    ),
    "nk_ternary_matmul": (
        _INT,
        [_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _SIZE],
    ),
    "nk_linear": (_INT, [_POINTER, _POINTER, _POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _SIZE]),
    "nk_int8_matmul": (
        None,
        [_POINTER, _POINTER, _POINTER, _POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _SIZE],
    ),
    "nk_quantize_gradient": (
        _INT,
        [_POINTER, _SIZE, _SIZE, _SIZE, _POINTER, _POINTER, _POINTER, _POINTER, _FLOAT, _POINTER, _POINTER],
    ),
    "nk_attention": (_INT, [_POINTER, *[_SIZE] * 5, _FLOAT, _POINTER]),
    "nk_attention_backward": (_INT, [_POINTER, *[_SIZE] * 5, _FLOAT, _POINTER]),
    "nk_iterate": (None, [*[_POINTER] * 4, _SIZE, _SIZE, *[_POINTER] * 3]),
    "nk_gram": (None, [_POINTER, _POINTER, _SIZE, *[_POINTER] * 4]),
    "nk_polynomial": (None, [*[_POINTER] * 5, _FLOAT, _FLOAT, _SIZE, _POINTER, _POINTER]),
    "nk_muon": (
        _INT,
        [_POINTER, *[_SIZE] * 3, _FLOAT, _FLOAT, _INT, _POINTER, _SIZE, _FLOAT, _INT, _FLOAT, _FLOAT],
    ),
    "nk_cross_entropy": (None, [_POINTER, _SIZE, _SIZE, *[_POINTER] * 3, _FLOAT, _SIZE, _POINTER, _POINTER]),
    "nk_ternarize": (_INT, [_POINTER, _SIZE, _SIZE, _SIZE, _POINTER, _POINTER, _POINTER]),
    "nk_unpack": (_INT, [_POINTER, _SIZE, _SIZE, _POINTER]),
    "nk_decoder_workspace": (_SIZE, [_POINTER, _SIZE, _SIZE]),
    "nk_decode": (None, [_POINTER, _POINTER, _POINTER, _SIZE, _POINTER, _POINTER]),
    "nk_unembed": (None, [_POINTER, _POINTER, _POINTER]),
    "nk_read_sum": (ctypes.c_uint64, [_POINTER, _SIZE]),
}


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none: tried once per process, since a compiler does not appear meanwhile.

    The reason is kept as text: an exception that is raised again and again collects tracebacks, which keep the frames
    of all its callers with their tensors.
    """
    try:
        library = ctypes.CDLL(str(shared_library()))
    except Unsupported as reason:
        return str(reason)
    except OSError as error:
        return f"cannot load the compiled library: {error}"
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.nk_set_threads(torch.get_num_threads())
    return library


def library() -> ctypes.CDLL:
    """The library, compiled on first use. Raises Unsupported, with the reason, if it is not available."""
    loaded = _load()
    if isinstance(loaded, str):
        raise Unsupported(loaded)
    return loaded


def select(name: str | None) -> str:
    """Use the kernels `avx2` or `portable`, or this machine's best (None). Raises Unsupported if it lacks them."""
    chosen = library().nk_select(None if name is None else name.encode())
    if chosen is None:
        raise Unsupported(f"this machine cannot run the kernels {name}")
    return chosen.decode()


def forget_after_fork() -> None:
    """OpenMP does not survive a fork: the child computes on one thread."""
    loaded = _load() if _load.cache_info().currsize else None
    if isinstance(loaded, ctypes.CDLL):
        loaded.nk_set_threads(1)


os.register_at_fork(after_in_child=forget_after_fork)
