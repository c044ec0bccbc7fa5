"""Two lines about a run before its first step: model and device, length and expected time.

Knows the configuration, a measured rate of operations, and the progress of the run.
"""

from nanochat_cli.config.schema import Config
from nanochat_cli.config.size import format_parameters
from nanochat_cli.report.quantities import counted, format_quantity, format_span
from nanochat_cli.training.progress import Progress

EXPECTED_UTILISATION = 0.4
"""Share of the peak assumed before anything is measured: real runs reach half of it to twice that."""


def announcement(
    config: Config, progress: Progress, device: str, *, flops_per_token: float, peak_flops: float
) -> list[str]:
    """The lines. device: its name, such as "cpu, 2 threads, fp32"; peak_flops: of its matrix product, measured."""
    train, counts = config.train, config.model.count_parameters()
    used = "" if counts.active == counts.total else f", {format_parameters(counts.active)} for a token"
    steps = max(0, train.total_steps - progress.step)
    per_step = train.batch_size * train.grad_accum * train.seq_len
    seconds = steps * per_step * flops_per_token / (EXPECTED_UTILISATION * peak_flops)
    left = "left of " if progress.step else ""
    length = f"{steps:,} steps {left and f'{left}{train.total_steps:,} '}of {per_step:,} tokens, "
    length += f"{format_quantity(steps * per_step, 'tokens')}"
    if train.time_budget is None or (progress.total_is_final and progress.step):
        time = f"expected to take about {format_span(seconds)} at {EXPECTED_UTILISATION:.0%} of the peak"
    else:
        budget = max(0.0, train.time_budget - progress.seconds + progress.excess_seconds)
        length = f"up to {length}"
        time = f"or what fits {format_span(budget)} of training (train.time_budget)"
    return [
        f"model: {format_parameters(counts.total)} parameters{used}: {architecture(config)}; on {device}",
        f"training: {length}, {time}; evaluations come on top",
    ]


def architecture(config: Config) -> str:
    """The layers and what is special about them, in a phrase."""
    model = config.model
    delta = sum(model.delta_layers)
    kinds = [
        f"{counted(model.n_layers, 'layer')} of width {model.dim}",
        f"{delta} of them gated DeltaNet" if delta else "",
        counted(model.n_heads, "head")
        + (f" ({model.n_kv_heads} of keys)" if model.n_kv_heads != model.n_heads else ""),
        f"{model.moe.active} of {model.moe.experts} experts" if model.moe.enabled else "",
        f"{model.mhc.streams} residual streams" if model.mhc.streams > 1 else "",
        f"{model.vocab_size:,} tokens",
        model.quant.in_words(),
        f"multi-token prediction ({config.mtp.kind})" if config.mtp.enabled else "",
        "token filtering" if config.collider.enabled else "",
        "distilled" if config.distill.teacher is not None else "",
    ]
    return ", ".join(kind for kind in kinds if kind)
