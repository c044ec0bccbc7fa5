"""Dormant units of the feed-forward layers (arXiv:2302.12902): units that are hardly ever active.

A unit is a hidden feature, an input of w_down. Its score is its mean absolute activation over the tokens of a batch, in
units of the mean over the layer. Measured in evaluation mode, without gradients; the model is left as it was.
"""

import torch
from torch import Tensor, nn

from nanochat_cli.model.feedforward import FeedForward
from nanochat_cli.model.moe import MoE
from nanochat_cli.model.norm import RMSNorm
from nanochat_cli.model.transformer import Transformer


@torch.no_grad()
def dormant_fraction(model: Transformer, tokens: Tensor, threshold: float) -> float:
    """Share of hidden units with a score of at most `threshold`; tokens: int64 [B, T].

    Every expert of a mixture is a layer, over the tokens that chose it; all units of one without tokens are dormant.
    """
    activities: list[Tensor] = []

    def of_dense(_: nn.Module, arguments: tuple[Tensor]) -> None:
        activities.append(arguments[0].float().abs().flatten(0, -2).mean(0))

    def of_experts(moe: nn.Module, arguments: tuple[Tensor, RMSNorm]) -> None:
        assert isinstance(moe, MoE)
        x, norm = arguments
        activities.extend(expert_activities(moe, norm(x).flatten(0, -2)))

    handles = []
    for module in model.modules():
        if isinstance(module, FeedForward):
            handles.append(module.w_down.register_forward_pre_hook(of_dense))
        elif isinstance(module, MoE):
            handles.append(module.register_forward_pre_hook(of_experts))
    was_training = model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            model(tokens.to(next(model.parameters()).device))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    dormant = torch.cat([activity <= threshold * activity.mean() for activity in activities])
    return float(dormant.float().mean())


def expert_activities(moe: MoE, flat: Tensor) -> list[Tensor]:
    """Mean absolute hidden activation of every expert's units over the tokens that chose it; flat: [N, C]."""
    routing = moe.route(flat)
    found, end = [], 0
    for index, count in enumerate(routing.counts.tolist()):
        rows = flat[routing.tokens[end : end + count]]
        end += count
        gate, up = (layer.expert(index)(rows) for layer in (moe.w_gate, moe.w_up))
        activity = (nn.functional.silu(gate) * up).float().abs()
        found.append(activity.mean(0) if count else activity.new_zeros(activity.shape[1]))
    return found
