"""Static hyper-connections folded into a plain residual model, if that is exact.

Everything between the sublayers of a static model is linear, so the input of sublayer l is a sum over the embedding and
the outputs of the sublayers before it, with fixed coefficients A[l, k]. If they have the form s_l · c_k, one stream
with output k scaled by c_k computes the same: s_l vanishes in the norm. llama.cpp multiplies an output by a `.scale`
tensor.

Two things can prevent it: coefficients of higher rank (which is what the streams are for), and the eps of RMSNorm,
which s_l does not scale. The first is computed, the second measured: a fold is only claimed if the logits agree.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat_cli.config.sections.mhc import MHCConfig
from nanochat_cli.model.hyper_connections import HyperConnection
from nanochat_cli.model.transformer import Block, Transformer

RANK_ONE = 1e-6
"""Largest relative deviation of a coefficient from s_l · c_k."""
EXACT = 1e-5
"""Largest difference of logits between the model and its fold, nothing rounded to int8."""
PROBE_SHAPE = 2, 32


@dataclass(frozen=True)
class Fold:
    """model: the plain twin, which shares the weights; None if there is no exact one. reason: why not, in words."""

    model: Transformer | None
    residual: float
    """Deviation from rank one; infinite for a dynamic model."""
    difference: float
    """Measured difference of logits; infinite if it was not measured."""
    reason: str


def fold(model: Transformer) -> Fold:
    mixes = [mix for _, mix in model.hyper_connections()]
    if any(mix.dynamic for mix in mixes):
        return Fold(None, torch.inf, torch.inf, "the mixing depends on the token (model.mhc.dynamic = true)")
    coefficients, of_output = branch_coefficients(mixes)
    scales = of_output[1:]
    residual = rank_one_residual(coefficients, of_output)
    if not residual <= RANK_ONE:
        return Fold(None, residual, torch.inf, f"the streams are really used: rank-1 residual {residual:.1e}")
    twin = _twin(model, scales)
    difference = float_difference(model, twin)
    if not difference <= EXACT:
        why = f"the eps of RMSNorm is not scaled with the streams: logits differ by {difference:.1e}"
        return Fold(None, residual, difference, why)
    return Fold(twin, residual, difference, "")


def branch_coefficients(mixes: list[HyperConnection]) -> tuple[Tensor, Tensor]:
    """A float64 [L, L + 1] and the coefficients [L + 1] of the collapsed output; column 0 is the embedding."""
    n, count = mixes[0].streams, len(mixes)
    streams = torch.zeros(n, count + 1, dtype=torch.float64)
    streams[:, 0] = 1
    rows = []
    for index, mix in enumerate(mixes):
        pre, post, _, res = (t.detach().double().cpu() for t in mix.coefficients(torch.zeros(1, 1, n, 1)))
        rows.append(pre @ streams)
        streams = res @ streams
        streams[:, index + 1] += post
    return torch.stack(rows), streams.mean(dim=0)


def rank_one_residual(coefficients: Tensor, of_output: Tensor) -> float:
    """Largest |A[l, k] / A[l, 0] − c_k / c_0| over the outputs k that sublayer l sees."""
    seen = coefficients / coefficients[:, :1]
    expected = of_output / of_output[0]
    causal = torch.ones_like(seen).tril().bool()
    return float(torch.where(causal, seen - expected, 0.0).abs().max())


def _twin(model: Transformer, scales: Tensor) -> Transformer:
    config = model.config.model_copy(update={"mhc": MHCConfig()})
    with torch.device("meta"):
        twin = Transformer(config)
    twin.to_empty(device=model.device)
    state = {name: tensor for name, tensor in model.state_dict().items() if "_mix." not in name}
    twin.load_state_dict(state)
    twin.cos.copy_(model.cos)
    twin.sin.copy_(model.sin)
    for _, moe in twin.mixtures():
        moe.loss_scale.fill_(1)
    for (_, ours), (_, theirs) in zip(model.linears(), twin.linears(), strict=True):
        if ours.quant.enabled:
            theirs.set_ternary(ours.ternary())
            theirs.weight.data.copy_(ours.weight)
    for index, block in enumerate(twin.blocks):
        assert isinstance(block, Block)
        attention, feed_forward = scales[2 * index : 2 * index + 2].tolist()
        mixing = block.attention.wo if block.attention is not None else block.delta.w_out  # pyright: ignore
        mixing.gain = attention
        for layer in (block.feed_forward.w_down, getattr(getattr(block.feed_forward, "shared", None), "w_down", None)):
            if layer is not None:
                layer.gain = feed_forward
    return twin.eval()


@torch.no_grad()
def float_difference(one: Transformer, other: Transformer) -> float:
    """Largest difference of logits on fixed tokens, with unrounded activations, since ties may round either way."""
    batch, length = PROBE_SHAPE
    config = one.config
    shape = batch, min(length, config.max_seq_len)
    tokens = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(one.device)
    logits = []
    for model in (one, other):
        layers = [layer for _, layer in model.linears()]
        was_training = model.training
        model.eval()
        try:
            for layer in layers:
                setattr(layer, "quantize_input", lambda x: x)  # noqa: B010 - shadows the method of the instance
            logits.append(model.logits(model(tokens)))
        finally:
            for layer in layers:
                layer.__dict__.pop("quantize_input", None)
            model.train(was_training)
    return float((logits[0] - logits[1]).abs().max())
