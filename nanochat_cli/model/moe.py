"""Mixture of experts in the form of Mixtral, llama.cpp's arch `llama` with experts (arXiv:2401.04088).

Router: softmax over all experts in float32, the k best, their weights renormalised to 1. Every expert is a SwiGLU
feed-forward. Tokens are sorted by expert and all experts computed in one grouped product.

Balance: the auxiliary loss of arXiv:2101.03961, whose gradient is added in the backward pass so that the objective
stays what is logged; or a bias on the choice, moved against the load after every step (arXiv:2408.15664), which no
stock architecture of llama.cpp has.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nanochat_cli.config.sections.model import ModelConfig, QuantConfig
from nanochat_cli.model.bitlinear import BitLinear
from nanochat_cli.model.feedforward import FeedForward
from nanochat_cli.model.norm import RMSNorm
from nanochat_kernels import QuantizedInput, Ternary, drop_filtered, quantize_input
from nanochat_kernels.experts import KeptAssignments, grouped_bit_linear


class Routing(NamedTuple):
    """Assignments sorted by expert, R = tokens · k of them.

    tokens: int64 [R]; experts: int64 [R]; weights: float32 [R], 0 for a dropped one; counts: int64 [E].
    """

    tokens: Tensor
    experts: Tensor
    weights: Tensor
    counts: Tensor


class ExpertLinear(BitLinear):
    """The linear layers of all experts, [E · N, K], one expert's rows after the other's."""

    def __init__(self, in_features: int, out_features: int, experts: int, quant: QuantConfig) -> None:
        super().__init__(in_features, experts * out_features, quant)
        self.experts = experts

    def expert(self, index: int) -> BitLinear:
        """One expert as a layer of its own, with the codes and scales that it has now."""
        n = self.out_features // self.experts
        rows = slice(index * n, (index + 1) * n)
        layer = BitLinear(self.in_features, n, self.quant).to(self.weight.device)
        layer.weight.data = self.weight.detach()[rows]
        layer.gain = self.gain
        if self.quant.enabled:
            whole = self.ternary()
            scales = whole.scales if len(whole.scales) == 1 else whole.scales[rows]
            layer.weight.data = layer.weight.data.clone()
            layer.set_ternary(Ternary(whole.codes[rows], scales, whole.granularity))
        return layer

    def quantize_input(self, x: Tensor) -> QuantizedInput | Tensor:
        """Of rows that are not those of the batch: nothing is gathered for the backward pass."""
        if self.phase == "ternary" and self.quant.activations:
            return quantize_input(x, self.form)
        return super().quantize_input(x)

    def project_sorted(self, quantized: QuantizedInput | Tensor, routing: Routing) -> Tensor:
        """[R, K], rows in the order of the routing, to [R, N]."""
        weight = self.quantized_weight() if self.phase == "ternary" else self.float_weight()
        kept = None if self.kept is None else KeptAssignments(routing.tokens, self.kept.rows, self.kept.n_kept)
        y = grouped_bit_linear(quantized, self.weight, weight, routing.counts, routing.experts, kept)
        return y if self.gain_afterwards == 1 else y * self.gain_afterwards


class Experts:
    """The SwiGLU of every expert on the tokens that chose it, as one operation (see `bitlinear.Joint`)."""

    def __init__(self, gate: ExpertLinear, up: ExpertLinear, down: ExpertLinear) -> None:
        self.layers = gate, up, down

    def output(self, x: Tensor, routing: Routing, shared: FeedForward | None) -> Tensor:
        """x [N, C] to [N, C], the sum over the experts of each token; shared: of an expert of all tokens too."""
        gate_layer, up_layer, down_layer = self.layers
        quantized = gate_layer.quantize_input(x)
        if isinstance(quantized, QuantizedInput):
            quantized = QuantizedInput(
                quantized.x[routing.tokens], quantized.codes[routing.tokens], quantized.scale[routing.tokens]
            )
        else:
            quantized = quantized[routing.tokens]
        gate, up = (layer.project_sorted(quantized, routing) for layer in (gate_layer, up_layer))
        hidden = nn.functional.silu(gate) * up
        y = down_layer.project_sorted(down_layer.quantize_input(hidden), routing)
        weighted = (y.float() * routing.weights.unsqueeze(1)).to(x.dtype)
        out = torch.zeros_like(x).index_add(0, routing.tokens, weighted)
        return out if shared is None else out + shared(x)


class MoE(nn.Module):
    """x [B, T, C], before the norm where one is given, to [B, T, C].

    load: float32 [E], assignments since it was last read; dropped: those beyond the capacity. Both only in training.
    """

    balance_bias: Tensor | None
    load: Tensor
    dropped: Tensor
    loss_scale: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        moe, hidden = config.moe, config.resolved_ffn_dim
        self.config = moe
        self.router = nn.Linear(config.dim, moe.experts, bias=False)
        self.w_gate = ExpertLinear(config.dim, hidden, moe.experts, config.quant)
        self.w_up = ExpertLinear(config.dim, hidden, moe.experts, config.quant)
        self.w_down = ExpertLinear(hidden, config.dim, moe.experts, config.quant)
        self.shared = FeedForward(config) if moe.shared else None
        self.experts = Experts(self.w_gate, self.w_up, self.w_down)
        self.register_buffer("balance_bias", torch.zeros(moe.experts) if moe.balance == "bias" else None)
        self.register_buffer("load", torch.zeros(moe.experts), persistent=False)
        self.register_buffer("dropped", torch.zeros(()), persistent=False)
        self.register_buffer("loss_scale", torch.ones(()), persistent=False)

    def forward(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        flat = (x if norm is None else norm(x)).reshape(-1, x.shape[-1])
        return self.experts.output(flat, self.route(flat), self.shared).reshape(x.shape)

    def route(self, flat: Tensor) -> Routing:
        """flat: [N, C]. In training counts the load and adds the gradient of the balance loss."""
        experts, k = self.config.experts, self.config.active
        with torch.autocast(flat.device.type, enabled=False):
            probabilities = nn.functional.linear(flat.float(), self.router.weight.float()).softmax(dim=-1)
            if self.training:  # the balance loss reads the probabilities of all tokens
                probabilities = drop_filtered(probabilities, self.w_gate.kept)
            biased = probabilities if self.balance_bias is None else probabilities + self.balance_bias
            chosen = biased.detach().topk(k, dim=-1).indices
            weights = probabilities.gather(1, chosen)
            weights = weights / weights.sum(dim=-1, keepdim=True)
        ordered, order = chosen.flatten().sort(stable=True)
        counts = (ordered.unsqueeze(1) == torch.arange(experts, device=flat.device)).sum(dim=0)
        weights = weights.flatten()[order]
        kept = self._within_capacity(ordered, counts, len(flat))
        if kept is not None:
            weights = weights * kept
        if self.training:
            if self.config.balance == "loss" and self.config.loss_weight:
                share = counts.float() / counts.sum()
                loss = experts * (share * probabilities.mean(dim=0)).sum()
                weights = _AddGradient.apply(weights, loss, self.config.loss_weight * self.loss_scale)
            with torch.no_grad():
                self.load += counts
                if kept is not None:
                    self.dropped += (~kept).sum()
        return Routing(order // k, ordered, weights, counts)  # pyright: ignore[reportArgumentType] - apply is untyped

    def _within_capacity(self, ordered: Tensor, counts: Tensor, n_tokens: int) -> Tensor | None:
        """bool [R]: whether an assignment is among the first of its expert; None without a capacity."""
        if not self.config.capacity_factor or not self.training:
            return None
        even = n_tokens * self.config.active / self.config.experts
        capacity = max(1, -(-int(self.config.capacity_factor * even * 1000) // 1000))
        first = counts.cumsum(0) - counts
        place = torch.arange(len(ordered), device=ordered.device) - first[ordered]
        return place < capacity

    @torch.no_grad()
    def update_balance(self) -> None:
        """After an optimizer step: move the selection bias against the load since the last call."""
        if self.balance_bias is not None:
            self.balance_bias += self.config.bias_rate * (self.load.mean() - self.load).sign()


class _AddGradient(torch.autograd.Function):
    """The identity on `carrier`; in the backward pass `loss` receives the gradient `scale`."""

    @staticmethod
    def forward(ctx, carrier: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.loss_dtype = loss.dtype
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        (scale,) = ctx.saved_tensors
        return grad_outputs[0], scale.to(ctx.loss_dtype), None
