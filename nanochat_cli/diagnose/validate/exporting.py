"""Stages `export`, `gguf`, `packed` and `llama.cpp`: the trained model as a file, and every program that reads it."""

from typing import Literal, get_args

import torch

from nanochat_cli.config.sections.export import ExportConfig
from nanochat_cli.diagnose.validate.stage import Figure, Muted, NotHere, Value, Workspace
from nanochat_cli.engine import Engine
from nanochat_cli.errors import ValidationFailure
from nanochat_cli.export import llama_cpp as client
from nanochat_cli.export.verify import (
    compare_metadata,
    compare_tensors,
    compare_with_llama_cpp,
    compare_with_reload,
    probe_prompts,
)
from nanochat_cli.formats.gguf.file import GGUFFile
from nanochat_cli.formats.gguf.write import export_gguf
from nanochat_cli.formats.open import load_run
from nanochat_cli.inference.packed_model import PackedTransformer
from nanochat_cli.model.transformer import Transformer

Type = Literal["tq2_0", "tq1_0", "q2_0", "q4_0", "f16", "f32"]
TYPES: tuple[Type, ...] = get_args(Type)
EXPORTED: Type = "tq2_0"
"""What `auto` must choose for a model of this width."""


def export(workspace: Workspace) -> Figure:
    """`nanochat export` writes a file in which every linear layer has the type of two bits per weight."""
    engine = Engine(Muted())
    engine.export(workspace.run, workspace.gguf, ExportConfig(verify=False))
    file = GGUFFile(workspace.gguf)
    matrices = [tensor for name, tensor in file.tensors.items() if name.startswith("blk.") and "norm" not in name]
    others = [tensor.name for tensor in matrices if tensor.tensor_type.name.lower() != EXPORTED]
    if others or not matrices:
        raise ValidationFailure(f"{others[0] if others else 'no matrix'} has the type {EXPORTED} in the exported file")
    bits = 8 * sum(int(t.n_bytes) for t in matrices) / sum(int(t.n_elements) for t in matrices)
    size = workspace.gguf.stat().st_size
    arch = file.fields["general.architecture"]
    return Figure(
        f"arch {arch}, {size / 1e6:.2f} MB, {len(matrices)} matrices of {bits:.4g} bits per weight",
        [
            Value("size of the file", size, "B"),
            Value("bits per ternary weight", bits, "bits"),
            Value("ternary matrices", len(matrices), "matrices"),
        ],
    )


def gguf(workspace: Workspace) -> Figure:
    """Every tensor read back equals the one in memory, in the exported file and in one of each other type."""
    model, tokenizer, _ = load_run(workspace.run)
    n_values = 0
    types = TYPES[:1] if workspace.quick else TYPES
    for type_name in types:
        path = workspace.gguf
        if type_name != EXPORTED:
            path = workspace.folder / f"{type_name}.gguf"
            export_gguf(model, tokenizer, path, ExportConfig(type=type_name), {})
        file = GGUFFile(path)
        n_values += compare_tensors(file, model)
        compare_metadata(file, model, tokenizer)
    n_tensors = len(model.state_dict()) * len(types)
    return Figure(
        f"{', '.join(types)}: {n_tensors} tensors, {n_values:,} weights equal bit for bit",
        [Value("tensors read back equal", n_tensors, "tensors"), Value("weights equal", n_values, "weights")],
    )


def packed(workspace: Workspace) -> Figure:
    """The packed runtime computes the trained model's logits, from memory and from the file."""
    model, tokenizer, _ = load_run(workspace.run)
    prompts = probe_prompts(model, tokenizer)
    same = _require_same_logits(model, prompts)
    difference = compare_with_reload(workspace.gguf, model, prompts)
    if difference != 0:  # with one scale per row integers are exact, and everything else is computed alike
        raise ValidationFailure(
            f"the packed runtime's logits from the exported file differ from the model's by {difference:.1e}"
        )
    return Figure(
        f"{same:,} logits equal bit for bit; from the file max |difference| {difference:.1e}",
        [
            Value("logits equal bit for bit", same, "logits"),
            Value("largest difference of logits with the exported file", difference, "1"),
        ],
    )


@torch.no_grad()
def _require_same_logits(model: Transformer, prompts: list[list[int]]) -> int:
    """How many logits of the packed model, unfused, equal the model's bit for bit: all, or ValidationFailure."""
    runtime = PackedTransformer.from_model(model, fused=False)
    compared = 0
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        ours, theirs = runtime.logits(runtime(tokens)), model.logits(model(tokens))
        if not torch.equal(ours, theirs):
            worst = float((ours - theirs).abs().max())
            raise ValidationFailure(f"the packed runtime's logits differ from the trained model's by {worst:.1e}")
        compared += ours.numel()
    return compared


def llama_cpp(workspace: Workspace) -> Figure:
    """llama.cpp's log-probabilities for the exported file are the model's, as `export.verify` compares them."""
    if not client.is_available():
        raise NotHere("install nanochat-ternary[llama-cpp]")
    model, tokenizer, _ = load_run(workspace.run)
    found = compare_with_llama_cpp(workspace.gguf, model, probe_prompts(model, tokenizer))
    if not found.passed:
        raise ValidationFailure(
            f"llama.cpp and the model disagree: {found.n_within} of {found.n_prompts} prompts within "
            f"{found.tolerance:g}, rms difference {found.rms_difference:.1e} where rounding gives {found.rms_noise:.1e}"
        )
    return Figure(
        f"log-probabilities of {found.n_within} of {found.n_prompts} prompts within {found.tolerance:g}, "
        f"median {found.median_difference:.1e}",
        [
            Value("prompts within the tolerance", found.n_within, "prompts"),
            Value("prompts", found.n_prompts, "prompts"),
            Value("median of the largest difference of log-probabilities", found.median_difference, "nats"),
            Value("rms difference of log-probabilities", found.rms_difference, "nats"),
            Value("rms of the quantisation noise", found.rms_noise, "nats"),
        ],
    )
