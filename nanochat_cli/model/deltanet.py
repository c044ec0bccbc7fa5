"""Gated DeltaNet in the form of Qwen3.5, llama.cpp's arch `qwen35` (arXiv:2412.06464).

    q, k, v = silu(conv(w_qkv x));  z = w_z x;  β = σ(w_beta x);  log g = −exp(a_log) · softplus(w_alpha x + dt_bias)
    o = delta rule(q / |q| / sqrt(D), k / |k|, v, g, β);  y = w_out(RMSNorm(o) · silu(z))

conv is causal, per channel. Everything but the projections is float32. Decoding keeps, per layer, a state of fixed
size and the last inputs of the convolution.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanochat_cli.config.sections.model import ModelConfig
from nanochat_cli.model.bitlinear import BitLinear, Joint
from nanochat_cli.model.cache import KVCache
from nanochat_cli.model.delta_rule import chunked_delta_rule, recurrent_delta_rule
from nanochat_cli.model.norm import RMSNorm

STEP_RANGE = 1e-3, 1e-1
"""Initial time steps softplus(dt_bias) are spread over this range, logarithmically (arXiv:2312.00752)."""
DECAY_RANGE = 1.0, 16.0
"""Initial exp(a_log) are spread over this range."""


class GatedDeltaNet(nn.Module):
    """x [B, T, C], before `norm`, to [B, T, C]; as many key heads as value heads, of one width D."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_heads, self.head_dim = config.delta_heads, config.delta_head_dim
        self.kernel, self.chunk, self.eps = config.deltanet.conv_kernel, config.deltanet.chunk, config.norm_eps
        self.backend = config.deltanet.backend
        inner = self.n_heads * self.head_dim
        self.w_qkv = BitLinear(config.dim, 3 * inner, config.quant)
        self.w_z = BitLinear(config.dim, inner, config.quant)
        self.w_alpha = nn.Linear(config.dim, self.n_heads, bias=False)
        self.w_beta = nn.Linear(config.dim, self.n_heads, bias=False)
        self.w_out = BitLinear(inner, config.dim, config.quant)
        self.conv = nn.Parameter(torch.empty(3 * inner, self.kernel))
        self.a_log = nn.Parameter(torch.empty(self.n_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.norm = RMSNorm(self.head_dim, config.norm_eps)
        self.inputs, self.out = Joint(self.w_qkv, self.w_z), Joint(self.w_out)

    @torch.no_grad()
    def init_weights(self, std: float, generator: torch.Generator | None = None) -> None:
        """Of all that is no BitLinear."""
        for linear in (self.w_alpha, self.w_beta):
            nn.init.normal_(linear.weight, std=std, generator=generator)
        nn.init.normal_(self.conv, std=self.kernel**-0.5, generator=generator)
        shape, device = self.n_heads, self.a_log.device
        self.a_log.copy_(torch.logspace(0, 1, shape, base=DECAY_RANGE[1], device=device).log())
        low, high = (torch.tensor(bound, device=device).log() for bound in STEP_RANGE)
        steps = (low + (high - low) * torch.rand(shape, generator=generator, device=device)).exp()
        self.dt_bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # softplus of it is the step

    def forward(self, x: Tensor, norm: RMSNorm, cache: KVCache | None = None) -> Tensor:
        x = norm(x)
        mixed, z = self.inputs.outputs(x)
        with torch.autocast(x.device.type, enabled=False):
            alpha, beta = (F.linear(x.float(), linear.weight.float()) for linear in (self.w_alpha, self.w_beta))
            log_decay = -self.a_log.float().exp() * F.softplus(alpha + self.dt_bias)
            q, k, v = self._convolve(mixed.float(), cache).unflatten(-1, (3, self.n_heads, -1)).unbind(dim=-3)
            q, k, v = (t.transpose(1, 2) for t in (l2_norm(q, self.eps) * self.head_dim**-0.5, l2_norm(k, self.eps), v))
            y = self._delta_rule(q, k, v, log_decay.mT, beta.sigmoid().mT, cache)
            y = self.norm(y.transpose(1, 2)) * F.silu(z.float()).unflatten(-1, (self.n_heads, -1))
        return self.out.output(y.flatten(-2).to(x.dtype))

    def _convolve(self, mixed: Tensor, cache: KVCache | None) -> Tensor:
        """silu of the causal convolution per channel, [B, T, channels]; continues what the cache holds."""
        channels = mixed.mT
        if cache is None:
            channels = F.pad(channels, (self.kernel - 1, 0))
        else:
            past = cache.recurrent[self.layer].convolution
            channels = torch.cat((past, channels), dim=-1)
            past.copy_(channels[..., -past.shape[-1] :])
        y = F.conv1d(channels, self.conv.float().unsqueeze(1), groups=channels.shape[1])
        return F.silu(y).mT

    def _delta_rule(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, cache: KVCache | None
    ) -> Tensor:
        if cache is None:
            if use_fla(self.backend, q.device):
                from nanochat_cli.model.fla_delta_rule import fla_delta_rule

                return fla_delta_rule(q, k, v, log_decay, beta)  # pyright: ignore[reportCallIssue]
            return chunked_delta_rule(q, k, v, log_decay, beta, chunk=min(self.chunk, q.shape[2]))[0]
        state = cache.recurrent[self.layer].state
        if q.shape[2] == 1:
            y, after = recurrent_delta_rule(q, k, v, log_decay, beta, state)
        else:
            y, after = chunked_delta_rule(q, k, v, log_decay, beta, state, min(self.chunk, q.shape[2]))
        state.copy_(after)
        return y


def l2_norm(x: Tensor, eps: float) -> Tensor:
    """x / max(|x|, eps) over the last dimension, ggml's form."""
    return x / x.norm(dim=-1, keepdim=True).clamp(min=eps)


def use_fla(backend: str, device: torch.device) -> bool:
    """Whether flash-linear-attention computes the training form. RuntimeError when it was asked for and cannot."""
    from importlib.util import find_spec

    there = device.type == "cuda" and find_spec("fla") is not None
    if backend == "fla" and not there:
        raise RuntimeError("model.deltanet.backend = fla needs CUDA and the package flash-linear-attention: use auto")
    return there and backend != "torch"
