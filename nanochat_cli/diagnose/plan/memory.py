"""Peak memory of a training step, from the configuration alone: nothing is trained and no weight is allocated.

Activations are not estimated by a formula: one block of each kind runs on fake tensors, and what autograd saves for the
backward pass is added up. The rest is arithmetic on shapes. Eager mode; a compiled step saves less.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nanochat_cli.config.load import load_run_config
from nanochat_cli.config.schema import Config
from nanochat_cli.formats.run.find import source_runs
from nanochat_cli.model.bitlinear import BitLinear, Phase
from nanochat_cli.model.hyper_connections import expand_streams
from nanochat_cli.model.mtp import MTP, build_mtp
from nanochat_cli.model.transformer import Block, Transformer, forms_of
from nanochat_cli.optim import build_optimizer
from nanochat_cli.optim.stacks import CHUNK
from nanochat_cli.training.devices import choose_autocast, codes_dtype
from nanochat_kernels import Backward, Form
from nanochat_kernels.backends import ENVIRONMENT_VARIABLE

MUON_COPIES = 5
"""Stacks of one shape that a Muon step holds at once: gradients, update, and three for the iteration."""
LOGIT_COPIES = 1
"""Logits of a chunk, which their gradient replaces."""
DIVERGENCE_COPIES = 6
"""Tensors of a chunk's tokens and the vocabulary that a distance from a teacher takes: logits, softmaxes, gradient."""


@dataclass(frozen=True)
class Memory:
    """Bytes. peak: the larger of the end of the forward pass and the optimizer step."""

    latents: int
    quantised: int
    """Codes and scales in the forms that training uses."""
    gradients: int
    optimizer: int
    activations: int
    logits: int
    """One chunk of the loss, and the gradients that the loss computes from it."""
    step_buffers: int
    """Temporary memory of the optimizer."""
    teacher: int = 0
    """Weights of the model that is learned from (`distill.teacher`)."""

    @property
    def peak(self) -> int:
        held = self.latents + self.quantised + self.optimizer + self.teacher
        return held + max(self.activations + self.logits, self.gradients + self.step_buffers)

    def as_dict(self) -> dict[str, int]:
        return {**asdict(self), "peak": self.peak}


def training_memory(config: Config, device: torch.device | None = None) -> Memory:
    """Memory of a training step on `device` (default CPU: float32 activations), of the phase that needs the most."""
    device = device or torch.device("cpu")
    with torch.device("meta"):
        model = Transformer(config.model)
        mtp = build_mtp(config.model, config.mtp)
    beside = {} if mtp is None else {"mtp": mtp}
    modules: list[nn.Module] = [model, *beside.values()]
    linears = [layer for module in modules for layer in module.modules() if isinstance(layer, BitLinear)]
    parameters = sum(p.numel() for module in modules for p in module.parameters())
    tokens = config.train.batch_size * config.train.seq_len
    activations, logit_states = _activations(config, device, model)
    head = model.unembedding.numel()
    chunk = min(config.train.loss_chunk, tokens)
    losses = 1 + (mtp.n_tokens if mtp is not None else 0)
    muon = config.optim.matrix == "muon"
    distills, copies = config.distill.teacher is not None, LOGIT_COPIES
    if distills:
        losses, copies = losses + 1, DIVERGENCE_COPIES
        logit_states += 4 * tokens * config.model.dim * 2  # the teacher's hidden states, and the gradient of these
    return Memory(
        latents=4 * parameters,
        quantised=sum(_quantised_bytes(layer, config, device) for layer in linears),
        gradients=4 * parameters,
        optimizer=build_optimizer(model, config.optim, beside).state_bytes(),
        activations=activations,
        # Each loss keeps the gradient of its hidden states and of the head until the backward pass.
        logits=copies * 4 * chunk * config.model.vocab_size + losses * 4 * head + logit_states,
        step_buffers=MUON_COPIES * 4 * largest_stack(linears) if muon else 0,
        teacher=_teacher_bytes(config, device) if distills else 0,
    )


def _teacher_bytes(config: Config, device: torch.device) -> int:
    """In float32, but for matrices that autocast rounds; beside ternary ones their codes. DataError if it is no run."""
    runs = source_runs(config, begins=True)
    teacher = load_run_config(runs.get("distill.teacher") or runs["train.init"]).model
    counts, dtype = teacher.count_parameters(), choose_autocast(config.train.dtype, device) or torch.float32
    of_matrix = 8 if teacher.quant.enabled else dtype.itemsize
    return 4 * (counts.total - counts.matrices) + of_matrix * counts.matrices


def _quantised_bytes(layer: BitLinear, config: Config, device: torch.device) -> int:
    if not layer.quant.enabled:
        return 0
    form, backward = _forms(layer, config, device)
    weights, scales = layer.weight.numel(), 4 * layer.scales.numel()
    scales += 4 * weights if layer.quant.ramp else 0  # what is between the latent and the ternary weight
    cuda = device.type == "cuda"
    if layer.computes_in_int8(form, backward, cuda):
        return (2 if cuda and backward == "int8" else 1) * weights + scales
    codes = codes_dtype(choose_autocast(config.train.dtype, device), device)
    operand = codes if layer.scales.shape[1] == 1 else torch.float32
    return operand.itemsize * weights + scales + {"int8": weights // 4, "nvfp4": weights // 2}.get(form, 0)


def largest_stack(linears: list[BitLinear]) -> int:
    """Number of weights that Muon computes together: those of the most frequent shape, up to a bound."""
    stacks: dict[tuple[int, int], int] = {}
    for layer in linears:
        experts = getattr(layer, "experts", 1)
        shape = layer.weight.shape[0] // experts, layer.weight.shape[1]
        stacks[shape] = stacks.get(shape, 0) + layer.weight.numel()
    largest = max((layer.weight.numel() for layer in linears), default=0)
    return min(max(stacks.values(), default=0), max(CHUNK, largest))


def _activations(config: Config, device: torch.device, shapes: Transformer) -> tuple[int, int]:
    """Bytes that autograd saves for a micro-batch, and those of the hidden states' gradients in the loss.

    shapes: the model; its blocks are of one kind if their parameters have the same names and shapes.
    """
    model_config, train = config.model, config.train
    batch, length = train.batch_size, train.seq_len
    kinds = [tuple((name, p.shape) for name, p in block.named_parameters()) for block in shapes.blocks]
    with _portable_kernels(), FakeTensorMode(allow_non_fake_inputs=True):
        model = Transformer(model_config.model_copy(update={"n_layers": 1}))
        blocks = {kind: Block(model_config, kinds.index(kind)) for kind in set(kinds)}
        mtp = build_mtp(model_config, config.mtp)
        for module in (*blocks.values(), *([] if mtp is None else [mtp])):
            _choose_forms(module, config, device)
        x = torch.empty(batch, length, model_config.dim, requires_grad=True)
        state = 4 * x.numel()
        inputs = expand_streams(x, model_config.mhc.streams) if model_config.mhc.streams > 1 else x
        stream = 4 * inputs.numel()
        cos, sin = model.cos[:length], model.sin[:length]
        by_kind = {kind: max(_kept(block, inputs, cos, sin) for _ in _phases(block)) for kind, block in blocks.items()}
        kept = sum(by_kind[kind] for kind in kinds)
        if train.gradient_checkpointing:
            kept = stream * len(kinds) + max(by_kind.values())
        rest = 3 * state + (2 * stream if model_config.mhc.streams > 1 else 0)  # final norm and the states it reads
        ahead = 0 if mtp is None else _kept_ahead(mtp, model, x)
    losses = 1 + (0 if mtp is None else mtp.n_tokens)
    return kept + rest + ahead, 2 * losses * state


@contextmanager
def _portable_kernels() -> Iterator[None]:
    """Compute with the reference in torch: native kernels read addresses, which fake tensors lack."""
    with patch.dict(os.environ, {ENVIRONMENT_VARIABLE: "reference"}):
        yield


def _choose_forms(module: nn.Module, config: Config, device: torch.device) -> None:
    """Like `use_forms`, but without codes, since fake tensors have no content."""
    for layer in module.modules():
        if isinstance(layer, BitLinear) and layer.quant.enabled:
            layer.form, layer.backward = _forms(layer, config, device)
            if layer.computes_in_int8(layer.form, layer.backward, device.type == "cuda"):
                layer.operand = torch.empty(layer.weight.shape, dtype=torch.int8)
            elif layer.form == "int8":
                layer.packed = torch.empty(layer.out_features, layer.in_features // 4, dtype=torch.uint8)
            elif layer.form == "nvfp4":
                layer.packed = torch.empty(layer.out_features, layer.in_features // 2, dtype=torch.uint8)


def _phases(module: nn.Module) -> Iterator[None]:
    """The module in each phase that its layers go through, ternary at last."""
    layers = [layer for layer in module.modules() if isinstance(layer, BitLinear)]
    quant = layers[0].quant
    phases: dict[Phase, float] = {"float": quant.start, "ramp": quant.ramp, "ternary": 1}
    for phase, share in phases.items():
        if share:
            for layer in layers:
                layer.use_phase(phase, torch.ones(()))
            yield


def _forms(layer: BitLinear, config: Config, device: torch.device) -> tuple[Form, Backward]:
    """Where a format is to be measured, the exact one, which needs the most memory."""
    train = config.train
    backward: Backward = "exact" if train.backward == "auto" else train.backward
    return forms_of(layer, None if train.forward == "auto" else train.forward, backward, device)


def _kept_ahead(mtp: MTP, model: Transformer, hidden: Tensor) -> int:
    tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64)
    return _kept(lambda h: mtp.hidden_states(model, h, tokens), hidden)


def _kept(function: Callable[..., object], *arguments: Tensor) -> int:
    """Bytes of distinct storages that autograd saves while `function` runs, without parameters and arguments."""
    sizes: dict[int, int] = {}
    keep: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter) and storage._cdata not in sizes:
            sizes[storage._cdata] = storage.nbytes()
            keep.append(tensor)  # so that no other storage reuses its address
        return tensor

    owned: set[int] = set()
    if isinstance(function, nn.Module):
        owned = {t.untyped_storage()._cdata for t in (*function.parameters(), *function.buffers())}
    owned |= {a.untyped_storage()._cdata for a in arguments[1:]}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = function(*arguments)
    del out
    return sum(size for storage, size in sizes.items() if storage not in owned)
