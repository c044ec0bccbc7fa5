"""What a run computes by where it may choose: number formats of gradients and of Muon's iteration, and the form of
attention.

How fast each is depends on the processor in ways that no list of its instructions tells, so that `auto` measures,
here and now. The choice is made once and saved with the run, which therefore resumes as it was.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import nn

from nanochat_cli.config.schema import Config
from nanochat_cli.config.sections.model import ModelConfig
from nanochat_cli.config.sections.optim import OptimConfig
from nanochat_cli.model.attend import AttentionForm, attend_in_training
from nanochat_cli.model.attention import Attention
from nanochat_cli.model.bitlinear import BitLinear
from nanochat_cli.model.transformer import use_forms
from nanochat_cli.optim.build import build_matrix_optimizer
from nanochat_cli.optim.galore import GaLore
from nanochat_cli.optim.muon import Muon
from nanochat_cli.optim.newton_schulz import NumberFormat
from nanochat_cli.report.reporter import Reporter
from nanochat_cli.training.devices import codes_dtype
from nanochat_cli.training.progress import Progress
from nanochat_cli.training.state import TrainState
from nanochat_kernels import Backward, quantize_input, ternarize
from nanochat_kernels.linear_products import linear_gradients, products_are_exact

T = TypeVar("T", bound=str)
ROUNDS = 3
MAX_ROWS = 2048
MIN_GAIN = 1.1
"""What a format must be faster by than the exact one: less is noise."""


def choose_number_formats(state: TrainState, config: Config, reporter: Reporter) -> None:
    """Set those of `state.progress`, and say what was measured."""
    progress, train, asked = state.progress, config.train, config.optim.muon_format
    use_configured(progress, config)
    layers = [layer for layer in state.linears.values() if layer.quant.enabled and layer.quant.activations]
    largest = max(state.linears.values(), key=lambda layer: layer.weight.numel(), default=None)
    if largest is None or state.model.device.type != "cpu":
        return
    if train.backward == "auto" and layers and train.grad_input == "exact":
        rows = min(MAX_ROWS, train.batch_size * train.seq_len)
        gradients: tuple[Backward, ...] = ("exact", "bf16") if train.four_bit else ("exact", "bf16", "int8")
        progress.backward, gain = fastest(gradients, lambda f: _gradients(f, rows, largest.weight))
        reporter.info(f"backward pass: {progress.backward}{gain}")
    if asked == "auto" and config.optim.matrix == "muon":
        formats: tuple[NumberFormat, ...] = ("fp32", "bf16", "int8") if products_are_exact() else ("fp32", "bf16")
        progress.iteration, gain = fastest(formats, lambda f: _matrix_steps(f, largest.weight, config.optim))
        reporter.info(f"Muon's step: {progress.iteration}{gain}")
    if train.attention == "auto" and any(_attentions(state)):
        shape = max(1, MAX_ROWS // train.seq_len), train.seq_len
        progress.attention, gain = fastest(("torch", "blocks"), lambda form: _attention(form, *shape, config.model))
        reporter.info(f"attention: {progress.attention}{gain}")


def use_configured(progress: Progress, config: Config) -> None:
    """Set what needs no measurement."""
    attention, backward, iteration = config.train.attention, config.train.backward, config.optim.muon_format
    progress.attention = "torch" if attention == "auto" else attention
    progress.backward = "exact" if backward == "auto" else backward
    progress.iteration = None if iteration == "auto" else iteration


def use_number_formats(state: TrainState, config: Config) -> None:
    """Compute in those of `state.progress` from now on."""
    progress, train = state.progress, config.train
    backward = "fp8" if train.grad_input == "fp8" else progress.backward
    form = None if train.forward == "auto" else train.forward
    dtype = codes_dtype(state.score.autocast_dtype, state.model.device)
    use_forms(state.linears.items(), form, backward, dtype)
    for attention in _attentions(state):
        attention.form = progress.attention
    state.score.backward = head_backward(state.linears.values())
    for group in state.optimizers.groups:
        if isinstance(group.optimizer, Muon | GaLore):
            group.optimizer.number_format = progress.iteration


def head_backward(layers: Iterable[BitLinear]) -> Backward:
    """The format of the head's gradients: that of the ternary layers with one scale per row, if it rounds."""
    for layer in layers:
        if layer.phase == "ternary" and layer.scales.shape[1] == 1 and layer.backward != "exact":
            return layer.backward
    return "exact"


def fastest(formats: Sequence[T], prepare: Callable[[T], Callable[[], object]]) -> tuple[T, str]:
    """The format whose work takes the least time, the first one unless another is clearly faster, and a remark."""
    work = {name: prepare(name) for name in formats}
    seconds: dict[T, list[float]] = {name: [] for name in formats}
    for _ in range(ROUNDS + 1):
        for name, do in work.items():
            started = time.perf_counter()
            do()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    best = min(medians, key=lambda name: medians[name])
    gain = medians[formats[0]] / medians[best]
    return (best, f", {gain:.1f} × {formats[0]} here") if gain > MIN_GAIN else (formats[0], ", nothing is faster here")


def _gradients(backward: Backward, rows: int, latent: torch.Tensor) -> Callable[[], object]:
    """Both products of a layer's backward pass."""
    generator = torch.Generator().manual_seed(0)
    n, k = latent.shape
    dy, x = torch.randn(rows, n, generator=generator), torch.randn(rows, k, generator=generator)
    ternary = ternarize(torch.randn(n, k, generator=generator))
    in_int8 = backward == "int8"
    _, codes, scale, _ = quantize_input(x, "int8" if in_int8 else "float")
    operand, w_scale = ternary.codes if in_int8 else ternary.codes.float(), ternary.scales.squeeze(1)
    return lambda: linear_gradients([dy], codes, scale, [operand], [w_scale], torch.float32, backward)


def _matrix_steps(number_format: NumberFormat, latent: torch.Tensor, optim: OptimConfig) -> Callable[[], object]:
    """Whole steps of the configured optimizer for two matrices: a form may do more of it than the iteration alone."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(latent.shape, generator=generator)) for _ in range(2)]
    optimizer = build_matrix_optimizer([(str(i), p) for i, p in enumerate(parameters)], optim)
    optimizer.number_format = number_format
    for parameter in parameters:
        parameter.grad = torch.randn(latent.shape, generator=generator)
    return lambda: optimizer.step(0.0)


def _attentions(state: TrainState) -> Iterator[Attention]:
    """Those of the model and of what trains beside it."""
    modules = (state.model, *(state.parts[0].setup.beside.values() if state.parts else ()))
    return (layer for module in modules for layer in module.modules() if isinstance(layer, Attention))


def _attention(form: AttentionForm, batch: int, length: int, model: ModelConfig) -> Callable[[], object]:
    """Attention of one layer, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(batch, length, heads, model.resolved_head_dim, generator=generator).transpose(1, 2).requires_grad_()
        for heads in (model.n_heads, model.n_kv_heads, model.n_kv_heads)
    )
    dy = torch.randn(q.shape, generator=generator)
    return lambda: torch.autograd.grad(attend_in_training(q, k, v, form), (q, k, v), dy)
