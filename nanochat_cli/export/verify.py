"""Proof that a GGUF file holds the model it was made from.

Two checks, each independent of the packer. The file is read again and every tensor compared bit for
bit with the codes, scales and weights in memory, decoded by gguf (and by a decoder here for Q2_0, which
gguf on PyPI lacks). Then llama.cpp, where xllamacpp is installed, computes full-vocabulary
log-probabilities that must be those of the model under ggml's rounding of activations.

Why some prompts count and others do not. An activation halfway between two int8 codes rounds either way
with the last bit of a sum, and the change spreads through the layers above: two correct programs agree
to 1e-6 on most short prompts and differ by the quantisation noise (1e-2) on the others. To tell them
apart, whatever is rounded is disturbed by a few units in the last place: prompts that do not move are
*stable*, and nearly all of those must agree within the tolerance. The others may differ by no more than
the quantisation noise, which a larger disturbance measures. A deep model may have no stable prompt; then
only the second condition applies, and the report says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import ReaderTensor
from numpy.typing import NDArray
from torch import Tensor

from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import ValidationFailure
from nanochat_cli.export import llama_cpp
from nanochat_cli.export.ggml_activations import Jitter, ggml_arithmetic
from nanochat_cli.formats.gguf.architecture import LLAMA, OWN, architecture_of, metadata
from nanochat_cli.formats.gguf.file import GGUFFile, rows_of
from nanochat_cli.formats.gguf.packing import Q2_0, TERNARY_TYPES
from nanochat_cli.formats.gguf.tensor_names import gain_name, tensor_name
from nanochat_cli.model.transformer import Transformer

RELOAD_TOLERANCE = 1e-4
"""Largest difference of logits between the packed runtime on the file and the model; 0 if both round alike."""
TOLERANCE = 2e-3
"""Largest difference of log-probabilities on a stable prompt (an F16 head accounts for some 1e-4)."""
LAST_BITS = 4e-7
"""A few units in the last place of float32: how far two orders of summation drift apart over some layers."""
LAST_BITS_OF_HYBRIDS = 1e-5
"""The same with DeltaNet's exponentials and state in between: how far the two programs differ in float32."""
N_DISTURBANCES = 8
STABLE = 2e-4
"""A prompt is stable if no disturbance of the last bits moves a log-probability further than this."""
STABLE_SHARE = 0.75
"""Share of stable prompts that must agree: a few disturbances do not find every halfway value."""
MIN_STABLE = 4
"""With fewer stable prompts their share means nothing."""
SATURATING = 2e-5
"""A disturbance that moves so many codes that its effect is the quantisation noise itself."""
NOISE_RATIO = 2.0
"""Root mean square difference allowed, in units of the quantisation noise."""
PROMPT_LENGTHS = (2, 3, 4, 5)
"""Short, since every position adds halfway values; above 1, since position 0 is not rotated."""
PROMPTS_PER_LENGTH = 10
LARGE_MODEL, PROMPTS_PER_LENGTH_OF_A_LARGE_MODEL = 50_000_000, 3
"""With more parameters a prompt takes seconds, and a model so deep has hardly any stable prompt anyway."""
LOWEST_LOGPROB = -60.0
"""Below this the server's float32 softmax has lost its precision."""
PROBE_TEXT = (
    "def main(self, value=0):\n    return [x * 2 for x in range(value)]\n\nThe quick brown fox jumps over the dog. "
    'fn main() { let mut total: u64 = 41; println!("{}", total + 1); }\n#include <stdio.h>\nimport os, sys\n'
)


@dataclass(frozen=True)
class LlamaCppComparison:
    """Differences of log-probabilities between llama.cpp and the model under ggml's rounding."""

    tolerance: float
    n_prompts: int
    n_within: int
    """Prompts whose every log-probability is within the tolerance."""
    n_stable: int
    n_stable_within: int
    max_stable_difference: float
    """Over the stable prompts within the tolerance; nan if there are none."""
    median_difference: float
    """Median over all prompts of the largest difference of each."""
    rms_difference: float
    rms_noise: float
    """Quantisation noise: root mean square of what SATURATING does to the log-probabilities."""

    @property
    def passed(self) -> bool:
        if self.n_within == self.n_prompts:
            return True
        stable_agree = self.n_stable < MIN_STABLE or self.n_stable_within >= STABLE_SHARE * self.n_stable
        return stable_agree and self.rms_difference <= max(self.tolerance, NOISE_RATIO * self.rms_noise)

    @property
    def conclusive(self) -> bool:
        """Whether the log-probabilities show that both compute the same, not only that rounding could explain it."""
        return self.n_within == self.n_prompts or self.n_stable >= MIN_STABLE

    def lines(self) -> list[str]:
        """The report of a comparison that has passed."""
        within = (
            f"log-probabilities of {self.n_within} of {self.n_prompts} prompts within {self.tolerance:g} "
            f"(median {self.median_difference:.1e}); rms {self.rms_difference:.1e}, rounding noise {self.rms_noise:.1e}"
        )
        if not self.conclusive:
            return [
                f"llama.cpp: {within}",
                f"weights verified bit for bit; logits inconclusive (only {self.n_stable} of {self.n_prompts} prompts "
                "are without a rounding tie)",
            ]
        lines = [f"verified: llama.cpp: {within}"]
        if self.n_stable:
            lines.append(
                f"verified: llama.cpp: {self.n_stable_within} of {self.n_stable} prompts without a rounding tie agree "
                f"within {self.max_stable_difference:.1e}"
            )
        return lines


@dataclass(frozen=True)
class VerifyReport:
    """A successful comparison; a failed one raises ValidationFailure."""

    path: Path
    arch: str
    n_tensors: int
    n_values: int
    """Weights compared bit for bit."""
    llama_cpp: LlamaCppComparison | None
    """None if xllamacpp is not installed, the comparison was not requested, or llama.cpp lacks the architecture."""
    reload_difference: float
    """Largest difference of logits between the packed runtime on the file and the model."""
    n_gains: int = 0
    """Linear layers with a factor on their output, into which hyper-connections were folded."""

    def lines(self) -> list[str]:
        """The report as text. Only what was proven is called verified."""
        weights = f"{self.n_tensors} tensors read back, {self.n_values:,} weights equal bit for bit"
        reload = f"our own runtime reads it back: logits within {self.reload_difference:.1e}"
        result = [f"verified: {weights}", f"verified: {reload}"]
        if self.arch == OWN.name:
            why = f"it has no architecture {OWN.name}; nanochat generate runs the file"
            return [*result, f"llama.cpp was not asked: {why}"]
        if self.llama_cpp is None:
            return [*result, "llama.cpp was not asked: install the extra [llama-cpp] to compare log-probabilities"]
        return [*result, *self.llama_cpp.lines()]


def verify_gguf(
    path: Path, model: Transformer, tokenizer: Tokenizer, *, tolerance: float = TOLERANCE, ask_llama_cpp: bool = True
) -> VerifyReport:
    """Compare a file with the model and tokenizer it was exported from. Raises ValidationFailure on any difference."""
    file = GGUFFile(path)
    n_values = compare_tensors(file, model)
    compare_metadata(file, model, tokenizer)
    comparison = None
    reloaded = compare_with_reload(path, model, probe_prompts(model, tokenizer))
    if reloaded > RELOAD_TOLERANCE:
        raise ValidationFailure(
            f"{path}: our own runtime computes logits {reloaded:.1e} away from the model's; do not use this file"
        )
    own = architecture_of(model.config) is OWN
    if ask_llama_cpp and not own and llama_cpp.is_available():
        comparison = compare_with_llama_cpp(path, model, probe_prompts(model, tokenizer), tolerance)
        if not comparison.passed:
            c = comparison
            raise ValidationFailure(
                f"{path}: llama.cpp and the model disagree: only {c.n_within} of {c.n_prompts} prompts "
                f"within {tolerance:g}, {c.n_stable_within} of {c.n_stable} stable ones, rms difference "
                f"{c.rms_difference:.1e} where rounding explains {c.rms_noise:.1e}; do not use this file"
            )
    return VerifyReport(
        path,
        architecture_of(model.config).name,
        len(file.tensors),
        n_values,
        comparison,
        reloaded,
        sum(layer.gain != 1 for _, layer in model.linears()),
    )


# --- the file against memory ------------------------------------------------------------------------------------------


def compare_tensors(file: GGUFFile, model: Transformer) -> int:
    """Compare every tensor of the file with the model, bit for bit; returns the number of weights.

    Raises ValidationFailure.
    """
    state, linears = model.state_dict(), dict(model.linears())
    expected = {tensor_name(key, model.config) for key in state}
    gains = {tensor_name(f"{name}.weight", model.config): layer.gain for name, layer in linears.items()}
    expected |= {gain_name(name) for name, gain in gains.items() if gain != 1}
    if file.tensors.keys() != expected:
        odd = sorted(file.tensors.keys() ^ expected)[0]
        raise ValidationFailure(f"{file.path}: tensor {odd} is in only one of the file and the model")
    n_values = 0
    for key, weight in state.items():
        name = tensor_name(key, model.config)
        tensor, layer = file.tensors[name], linears.get(key.removesuffix(".weight"))
        if gains.get(name, 1) != 1 and not (file.tensors[gain_name(name)].data == np.float32(gains[name])).all():
            raise ValidationFailure(f"{file.path}: tensor {gain_name(name)} differs from the model")
        if layer is not None and layer.quant.enabled:
            ternary = layer.ternary()
            values, scales = ternary.dequantize(), ternary.element_scales()
        else:
            values, scales = weight.detach().float(), None
        _compare_tensor(file.path, tensor, _as_in_file(values, key, model), None)
        if scales is not None:
            _compare_tensor(file.path, tensor, None, _as_in_file(scales, key, model))
        n_values += weight.numel()
    return n_values


def _as_in_file(values: Tensor, key: str, model: Transformer) -> NDArray[np.float32]:
    """Rows of wq and wk in the order of arch llama, by the code of llama.cpp's converter, not of our exporter."""
    array = values.cpu().numpy()
    if key.endswith(".a_log"):  # llama.cpp multiplies by this
        array = -np.exp(array)
    if architecture_of(model.config) is LLAMA and key.endswith((".wq.weight", ".wk.weight")):
        heads = model.config.n_heads if key.endswith(".wq.weight") else model.config.n_kv_heads
        halves = array.reshape(heads, 2, array.shape[0] // heads // 2, array.shape[1])
        array = halves.swapaxes(1, 2).reshape(array.shape)
    return array


def _compare_tensor(
    path: Path, tensor: ReaderTensor, values: NDArray[np.float32] | None, scales: NDArray[np.float32] | None
) -> None:
    """Compare weights with the decoded tensor, or the scale of every element with the stored f16 of its block."""
    if values is not None:
        if tensor.tensor_type == gguf.GGMLQuantizationType.F16:
            values = values.astype(np.float16).astype(np.float32)
        stored, expected, what = decode(tensor), values, "weight"
    else:
        stored, expected, what = _stored_scales(tensor), scales, "scale"
        if stored is None:  # F16 and F32 hold products only
            return
    if expected is None or stored.shape != expected.shape:
        raise ValidationFailure(f"{path}: tensor {tensor.name} has shape {list(stored.shape)}; do not use this file")
    if not np.array_equal(stored, expected):
        row, column = (int(i) for i in np.argwhere(np.atleast_2d(stored != expected))[0])
        raise ValidationFailure(
            f"{path}: tensor {tensor.name} differs from the model, first in the {what} at [{row}, {column}]: "
            f"{np.atleast_2d(stored)[row, column]} in the file, {np.atleast_2d(expected)[row, column]} in memory"
        )


def decode(tensor: ReaderTensor) -> NDArray[np.float32]:
    """The weights of a tensor as llama.cpp sees them: float32, shape [N, K] or [K]."""
    data = rows_of(tensor)
    if tensor.tensor_type != Q2_0:
        return gguf.quants.dequantize(data, tensor.tensor_type)
    blocks = data.reshape(data.shape[0], -1, 18)
    d = blocks[..., :2].copy().view(np.float16).astype(np.float32)
    bits = np.unpackbits(blocks[..., 2:], axis=-1, bitorder="little").reshape(*blocks.shape[:-1], 64, 2)
    return (d * (bits[..., 0] + 2.0 * bits[..., 1] - 1)).astype(np.float32).reshape(data.shape[0], -1)


def _stored_scales(tensor: ReaderTensor) -> NDArray[np.float32] | None:
    kind = next((t for t in TERNARY_TYPES.values() if t.ggml_type == tensor.tensor_type), None)
    if kind is None:
        return None
    data = rows_of(tensor)
    blocks = data.reshape(data.shape[0], -1, kind.block_bytes)
    d = blocks[..., :2] if kind.name in ("q2_0", "q4_0") else blocks[..., -2:]
    scales = np.ascontiguousarray(d).view(np.float16).astype(np.float32)
    return np.broadcast_to(scales, (*scales.shape[:2], kind.block)).reshape(scales.shape[0], -1)


def compare_metadata(file: GGUFFile, model: Transformer, tokenizer: Tokenizer) -> None:
    """Compare the shape of the model and the texts of the vocabulary. Raises ValidationFailure."""
    arch = architecture_of(model.config).name
    for key, value in {"general.architecture": arch, **metadata(model.config)}.items():
        stored = file.fields.get(key)
        same = stored == (float(np.float32(value)) if isinstance(value, float) else value)
        if not same:
            raise ValidationFailure(f"{file.path}: metadata key {key} is {stored!r} and the model has {value!r}")
    tokens = [tokenizer.token_text(token) for token in range(tokenizer.vocab_size)]
    if file.fields.get("tokenizer.ggml.tokens", [])[: len(tokens)] != tokens:
        raise ValidationFailure(f"{file.path}: the vocabulary differs from the tokenizer")


@torch.no_grad()
def compare_with_reload(path: Path, model: Transformer, prompts: Sequence[Sequence[int]]) -> float:
    """Largest difference of logits between the file in the packed runtime and the model with a head rounded alike."""
    from nanochat_cli.formats.gguf.read import load_gguf
    from nanochat_cli.inference.packed_model import PackedTransformer

    loaded = load_gguf(path)[0]
    packed = PackedTransformer.from_model(loaded, fused=False)
    rounded = [(model.embedding.weight, loaded.embedding.weight), (model.unembedding, loaded.unembedding)]
    for (_, ours), (_, theirs) in zip(model.linears(), loaded.linears(), strict=True):
        if not ours.quant.enabled:
            rounded.append((ours.weight, theirs.weight))
    original = {id(parameter): (parameter, parameter.data) for parameter, _ in rounded}
    try:
        for parameter, source in rounded:
            parameter.data = source.data.to(parameter.device)
        worst = 0.0
        for prompt in prompts[:: max(1, len(prompts) // 8)]:
            tokens = torch.tensor([list(prompt)])
            ours = model.logits(model(tokens.to(model.device))).cpu()
            worst = max(worst, float((packed.logits(packed(tokens)) - ours).abs().max()))
    finally:
        for parameter, data in original.values():
            parameter.data = data
    return worst


# --- llama.cpp against the model --------------------------------------------------------------------------------------


def probe_prompts(model: Transformer, tokenizer: Tokenizer) -> list[list[int]]:
    """Fixed short prompts, as token ids: pieces of one text."""
    ids = tokenizer.encode(PROBE_TEXT)
    large = sum(parameter.numel() for parameter in model.parameters()) > LARGE_MODEL
    per_length = PROMPTS_PER_LENGTH_OF_A_LARGE_MODEL if large else PROMPTS_PER_LENGTH
    lengths = [n for n in PROMPT_LENGTHS if n <= model.config.max_seq_len] or [1]
    return [ids[i * 7 % (len(ids) - n) :][:n] for n in lengths for i in range(per_length)]


def compare_with_llama_cpp(
    path: Path, model: Transformer, prompts: Sequence[Sequence[int]], tolerance: float = TOLERANCE
) -> LlamaCppComparison:
    """Compare log-probabilities after each prompt. Raises ValidationFailure if llama.cpp fails.

    prompts: token ids, 1 to max_seq_len each.
    """
    types = GGUFFile(path).tensors
    linear_types = {name: _type_name(types[tensor_name(f"{name}.weight", model.config)]) for name, _ in model.linears()}
    head_type = _type_name(types["token_embd.weight"])

    def ours(jitter: Jitter | None = None) -> NDArray[np.float64]:
        return _logprobs(model, linear_types, head_type, prompts, jitter)

    exact = ours()
    theirs = llama_cpp.logprobs(path, prompts, model.config.vocab_size)
    comparable = np.minimum(exact, theirs) > LOWEST_LOGPROB

    def difference(other: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where(comparable, other - exact, 0)

    last_bits = LAST_BITS_OF_HYBRIDS if model.config.is_hybrid else LAST_BITS
    stable = np.ones(len(prompts), dtype=bool)
    for seed in range(N_DISTURBANCES):
        if stable.any():
            stable &= np.abs(difference(ours(Jitter(last_bits, seed)))).max(axis=-1) <= STABLE
    worst = np.abs(difference(theirs)).max(axis=-1)
    within = worst <= tolerance
    return LlamaCppComparison(
        tolerance=tolerance,
        n_prompts=len(prompts),
        n_within=int(within.sum()),
        n_stable=int(stable.sum()),
        n_stable_within=int((stable & within).sum()),
        max_stable_difference=float(worst[stable & within].max(initial=0)) if (stable & within).any() else float("nan"),
        median_difference=float(np.median(worst)),
        rms_difference=_rms(difference(theirs)),
        rms_noise=_rms(difference(ours(Jitter(SATURATING, seed=0)))),
    )


def _rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(values**2)))


def _type_name(tensor: ReaderTensor) -> str:
    return tensor.tensor_type.name.lower()


def _logprobs(
    model: Transformer,
    linear_types: Mapping[str, str],
    head_type: str,
    prompts: Sequence[Sequence[int]],
    jitter: Jitter | None,
) -> NDArray[np.float64]:
    """[prompts, V] after the last token of each prompt; prompts of equal length run together."""
    rows: dict[int, NDArray[np.float64]] = {}
    with ggml_arithmetic(model, linear_types, head_type, jitter) as logits:
        for length in sorted({len(prompt) for prompt in prompts}):
            indices = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
            tokens = torch.tensor([list(prompts[i]) for i in indices], device=model.embedding.weight.device)
            last = logits(tokens)[:, -1].double().log_softmax(dim=-1).cpu().numpy()
            rows |= dict(zip(indices, last, strict=True))
    return np.stack([rows[i] for i in range(len(prompts))])
