"""The `.mhc` file beside an export of static hyper-connections: their coefficients, for other runtimes.

Little-endian: magic 0x6D484321, version 2, streams, sublayers (uint32 each); then per sublayer float32

    2 streams, 36 bytes:   alpha logit; pre logits 2, pre bias 2, post logits 2, post bias 2
    4 streams, 160 bytes:  24 logits of the permutations; pre logits 4, pre bias 4, post logits 4, post bias 4

pre = σ(logits + bias), post = 2 σ(logits + bias); we write only biases, and logits of 0. With two streams the identity
has the weight σ(alpha logit). Permutations are in lexicographic order, the identity first.
"""

import struct
from pathlib import Path

import numpy as np

from nanochat_cli.atomic_write import write_atomically
from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.model.transformer import Transformer

MAGIC = 0x6D484321
VERSION = 2


def write_sidecar(model: Transformer, out: Path) -> None:
    """Raises ConfigError for a model without static hyper-connections, DataError if `out` cannot be written."""
    mixes = [mix for _, mix in model.hyper_connections()]
    if not mixes or mixes[0].dynamic:
        raise ConfigError("only static hyper-connections (model.mhc.dynamic = false) fit a .mhc file")
    n = mixes[0].streams
    data = bytearray(struct.pack("<4I", MAGIC, VERSION, n, len(mixes)))
    nothing = np.zeros(n, dtype="<f4")
    for mix in mixes:
        res, pre, post = (p.detach().cpu().numpy().astype("<f4") for p in (mix.res_bias, mix.pre_bias, mix.post_bias))
        mixing = res[:1] - res[1:] if n == 2 else res
        data += np.concatenate([mixing, nothing, pre, nothing, post]).astype("<f4").tobytes()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, bytes(data))
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror}; free space or choose another --out") from error
