"""Hyper-connections measured on a batch: how they mix, what they let through, whether the streams are used.

Pure functions of tensors; `measure_streams`, which runs a model once forward and backward with hooks; and the part of
a training run that calls it. A doubly stochastic matrix has spectral norm 1, so the gains are 1 by construction and say
nothing about health; the diversity of the streams does (arXiv:2512.24880, 2601.05732). Nor does alpha: models that
train well end with any value (benchmarks/stream_health.py).
"""

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nanochat_cli.model.hyper_connections import MixCoefficients
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.training.part import Part
from nanochat_cli.training.progress import Progress

INTERVAL = 100
"""Steps between two measurements in a training run."""
SMALLEST_DIVERSITY = 1e-6
GAIN_TOLERANCE = 1e-3


@dataclass(frozen=True)
class StreamStatistics:
    """Measures of one sublayer, means over the tokens of a batch."""

    name: str
    alpha: float
    """Weight of the identity permutation."""
    entropy: float
    """Entropy of the permutation weights, as a share of its maximum."""
    orthogonality: float
    """Frobenius norm of HᵀH − I."""
    gain: float
    """Spectral norm of H."""
    pre_balance: float
    post_balance: float
    """Largest coefficient over the mean one: 1 is even, n is one stream alone."""
    diversity: float
    """1 − mean cosine between the streams that enter the sublayer: 0 for copies."""
    gradient_norms: tuple[float, ...]
    """Norm of the loss gradient of each stream that enters."""
    matrix: tuple[tuple[float, ...], ...]
    """Mean H."""

    @property
    def reads_copies(self) -> bool:
        """Whether the streams that enter are copies by construction: nothing has been written to them yet."""
        return self.name.startswith("blocks.0.attention")

    def warnings(self) -> list[str]:
        """Findings; empty when all is healthy."""
        found = []
        if not self.diversity > SMALLEST_DIVERSITY and not self.reads_copies:
            found.append("the streams are copies of each other")
        if not math.isfinite(self.gain) or abs(self.gain - 1) > GAIN_TOLERANCE:
            found.append(f"gain {self.gain:.3g}")
        return found


@dataclass(frozen=True)
class StreamReport:
    """layers: in order; composite_gain: spectral norm of the product of all H; gain_product: product of their norms."""

    layers: tuple[StreamStatistics, ...]
    composite_gain: float
    gain_product: float

    def scalars(self) -> dict[str, float]:
        """Means over the sublayers, for the metrics log."""
        names = ("alpha", "entropy", "orthogonality", "pre_balance", "post_balance", "diversity")
        count = len(self.layers)
        values = {f"mhc/{name}": sum(getattr(layer, name) for layer in self.layers) / count for name in names}
        for stream in range(len(self.layers[0].gradient_norms)):
            norms = sum(layer.gradient_norms[stream] for layer in self.layers)
            values[f"mhc/gradient_norm_{stream}"] = norms / count
        return values | {"mhc/composite_gain": self.composite_gain, "mhc/gain_product": self.gain_product}

    def as_dict(self) -> dict[str, object]:
        layers = [{**asdict(layer), "warnings": layer.warnings()} for layer in self.layers]
        return {"layers": layers, **self.scalars()}


def entropy_share(weights: Tensor) -> Tensor:
    """Entropy of weights [..., P] over log P: [...]."""
    return torch.special.entr(weights).sum(dim=-1) / math.log(weights.shape[-1])


def orthogonality_error(res: Tensor) -> Tensor:
    """‖HᵀH − I‖_F of [..., n, n]: [...]."""
    return (res.mT @ res - torch.eye(res.shape[-1], device=res.device)).flatten(-2).norm(dim=-1)


def balance(coefficients: Tensor) -> Tensor:
    """Largest over mean of [..., n]: [...]."""
    return coefficients.amax(dim=-1) / coefficients.mean(dim=-1)


def stream_diversity(x: Tensor) -> Tensor:
    """1 − mean cosine over pairs of different streams of [..., n, C]: [...]."""
    unit = F.normalize(x, dim=-1)
    cosine = unit @ unit.mT
    n = x.shape[-2]
    return 1 - (cosine.sum(dim=(-2, -1)) - cosine.diagonal(dim1=-2, dim2=-1).sum(dim=-1)) / (n * (n - 1))


def measure_streams(model: Transformer, tokens: Tensor, targets: Tensor) -> StreamReport:
    """On tokens, targets int64 [B, T]. Leaves gradients, mode and random numbers as they were.

    ValueError for a model with one stream.
    """
    mixes = list(model.hyper_connections())
    if not mixes:
        raise ValueError("the model has one residual stream")
    seen: dict[str, tuple[Tensor, MixCoefficients]] = {}

    def hook(name: str):
        def remember(_module: object, arguments: tuple[Tensor], out: MixCoefficients) -> None:
            if arguments[0].requires_grad:
                arguments[0].retain_grad()
            seen[name] = arguments[0], out

        return remember

    handles = [mix.register_forward_hook(hook(name)) for name, mix in mixes]
    training, gradients = model.training, [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    try:
        model.eval()
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            logits = model.logits(model(tokens)).float()
            F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100).backward()
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
    with torch.no_grad():
        layers = tuple(_statistics(name, *seen[name]) for name, _ in mixes)
        product = torch.eye(mixes[0][1].streams, dtype=torch.float64)
        gains = 1.0
        for layer in layers:
            product = torch.tensor(layer.matrix, dtype=torch.float64) @ product
            gains *= layer.gain
    return StreamReport(layers, float(torch.linalg.matrix_norm(product, 2)), gains)


class StreamHealth(Part):
    """Measures the streams every INTERVAL steps, on one sequence of the batch that comes next."""

    def observe(self, progress: Progress) -> dict[str, float]:
        if progress.step % INTERVAL:
            return {}
        assert self.setup.data is not None
        inputs, targets = (rows[:1].to(self.setup.device) for rows in self.setup.data.batch(progress.step))
        return measure_streams(self.setup.model, inputs, targets).scalars()


def _statistics(name: str, x: Tensor, mix: MixCoefficients) -> StreamStatistics:
    res = mix.res.reshape(-1, *mix.res.shape[-2:])
    n = x.shape[-2]
    gradient = torch.zeros(n) if x.grad is None else x.grad.flatten(0, 1).square().sum(dim=(0, 2)).sqrt()
    return StreamStatistics(
        name=name,
        alpha=float(mix.permutation_weights[..., 0].mean()),
        entropy=float(entropy_share(mix.permutation_weights).mean()),
        orthogonality=float(orthogonality_error(res).mean()),
        gain=float(torch.linalg.matrix_norm(res.float(), 2).mean()),
        pre_balance=float(balance(mix.pre).mean()),
        post_balance=float(balance(mix.post).mean()),
        diversity=float(stream_diversity(x.detach()).mean()),
        gradient_norms=tuple(gradient.tolist()),
        matrix=tuple(tuple(row) for row in res.mean(dim=0).tolist()),
    )
