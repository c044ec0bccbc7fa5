"""mHC-lite: several residual streams, mixed by an exactly doubly stochastic matrix (arXiv:2512.24880, 2601.05732).

Per token, with streams x in R^(n x C) and a sublayer F:

    u  = pre · x                       pre  = σ(·)   in R^n
    x' = res · x + post ⊗ F(norm(u))   post = 2σ(·)  in R^n,  res = Σ_k softmax(·)_k P_k over all n! permutations

What stands for `·` is a learned bias, plus, when dynamic, a gated projection of the token's own normalised streams.
A convex combination of permutation matrices is doubly stochastic whatever the logits are: no Sinkhorn iteration.

Streams that start as copies and are read and written alike stay copies for ever, and the mixing never gets a gradient.
The initial reading and writing therefore prefer one stream, another one in each layer. Everything is float32.
"""

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nanochat_cli.config.sections.mhc import MHCConfig
from nanochat_cli.config.sections.model import ModelConfig
from nanochat_kernels.hyper_connections import mix_streams

FAVOURED, OTHERS = 1.0, -1.0
"""Initial bias of reading and writing, for the stream that a layer prefers and for the rest."""
NOT_IDENTITY = -8.0
"""Initial logit of every permutation but the identity."""


class MixCoefficients(NamedTuple):
    """pre, post: [..., n]; permutation_weights: [..., n!], identity first; res: [..., n, n]; static: no ...."""

    pre: Tensor
    post: Tensor
    permutation_weights: Tensor
    res: Tensor


class HyperConnection(nn.Module):
    """The coefficients of one sublayer, from its streams x [B, T, n, C]."""

    permutations: Tensor

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        mhc = config.mhc
        self.streams, self.dynamic, self.eps = mhc.streams, mhc.dynamic, config.norm_eps
        n, n_permutations = mhc.streams, math.factorial(mhc.streams)
        self.register_buffer("permutations", permutation_matrices(n).flatten(1), persistent=False)
        self.pre_bias = nn.Parameter(torch.empty(n))
        self.post_bias = nn.Parameter(torch.empty(n))
        self.res_bias = nn.Parameter(torch.empty(n_permutations))
        self.widths = [n, n, n_permutations]
        if mhc.dynamic:
            self.projection = nn.Parameter(torch.empty(sum(self.widths), n * config.dim))
            self.gates = nn.Parameter(torch.empty(3))
        self.init_weights(mhc, layer, config.n_layers)

    @torch.no_grad()
    def init_weights(self, mhc: MHCConfig, layer: int, n_layers: int) -> None:
        """layer: 0-based; the stream that it prefers is layer mod n."""
        for bias in (self.pre_bias, self.post_bias):
            bias.fill_(OTHERS)
            bias[layer % self.streams] = FAVOURED
        self.res_bias.copy_(initial_logits(mhc.init, len(self.res_bias), layer, n_layers))
        if self.dynamic:
            self.projection.zero_()
            self.gates.fill_(mhc.gate_init)

    def forward(self, x: Tensor) -> MixCoefficients:
        return self.coefficients(x)

    def coefficients(self, x: Tensor) -> MixCoefficients:
        """x: float32 [B, T, n, C]."""
        with torch.autocast(x.device.type, enabled=False):
            pre, post, res = self.pre_bias, self.post_bias, self.res_bias
            if self.dynamic:
                flat = x.flatten(-2)
                inverse = torch.rsqrt(flat.square().mean(dim=-1, keepdim=True) + self.eps)
                dynamic = nn.functional.linear(flat, self.projection) * inverse
                of_pre, of_post, of_res = dynamic.split(self.widths, dim=-1)
                pre = pre + self.gates[0] * of_pre
                post = post + self.gates[1] * of_post
                res = res + self.gates[2] * of_res
            weights = res.softmax(dim=-1)
            mixed = (weights @ self.permutations).unflatten(-1, (self.streams, self.streams))
            return MixCoefficients(pre.sigmoid(), 2 * post.sigmoid(), weights, mixed)


def permutation_matrices(n: int) -> Tensor:
    """All n! permutation matrices, the identity first: float32 [n!, n, n]."""
    return torch.stack([torch.eye(n)[list(order)] for order in itertools.permutations(range(n))])


def initial_logits(init: str, count: int, layer: int, n_layers: int) -> Tensor:
    """Logits of the permutations, [count], identity first.

    identity: nearly all mass on it; balanced: half of it; high-entropy: all alike; layer-dependent: from balanced in
    the first layer to identity in the last.
    """
    balanced = -math.log(count - 1) if count > 1 else 0.0
    depth = layer / max(n_layers - 1, 1)
    other = {
        "identity": NOT_IDENTITY,
        "balanced": balanced,
        "high-entropy": 0.0,
        "layer-dependent": balanced + depth * (NOT_IDENTITY - balanced),
    }[init]
    logits = torch.full((count,), other)
    logits[0] = 0.0
    return logits


def expand_streams(x: Tensor, n: int) -> Tensor:
    """[B, T, C] to n equal streams, float32 [B, T, n, C]."""
    return x.float().unsqueeze(-2).expand(*x.shape[:-1], n, x.shape[-1])


def collapse_streams(x: Tensor) -> Tensor:
    """The mean of the streams: [B, T, n, C] to [B, T, C]."""
    return x.mean(dim=-2)


def read_streams(x: Tensor, pre: Tensor) -> Tensor:
    """Σ_i pre_i x_i: x [B, T, n, C], pre [..., n]; [B, T, C]. One pass over x where it compiles or has a kernel."""
    return mix_streams(x, pre.unsqueeze(-2)).squeeze(-2)


def write_streams(x: Tensor, y: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """res · x + post ⊗ y: x [B, T, n, C], y [B, T, C], post [..., n], res [..., n, n]; [B, T, n, C]."""
    return mix_streams(x, torch.cat((res, post.unsqueeze(-1)), dim=-1), y)
