"""Every architecture through a GGUF file: our runtime reads it back, and llama.cpp, where it can, computes the same."""

from pathlib import Path

import pytest
import torch

from nanochat_cli.config.schema import ExportConfig
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.export import llama_cpp
from nanochat_cli.export.verify import compare_with_llama_cpp, verify_gguf
from nanochat_cli.formats.gguf.architecture import architecture_of
from nanochat_cli.formats.gguf.read import load_gguf
from nanochat_cli.formats.gguf.write import export_gguf
from nanochat_cli.inference.packed_model import PackedTransformer
from tests.architectures import COMBINATIONS, build
from tests.conformance.conftest import VOCAB_SIZE

ARCHS = {"attention+dense": "llama", "attention+moe": "llama", "hybrid+dense": "qwen35"}
TOKENS = torch.randint(0, VOCAB_SIZE, (2, 20), generator=torch.Generator().manual_seed(1))


def prompts(lengths: tuple[int, ...], each: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths for _ in range(each)]


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_a_file_holds_the_model_and_the_packed_runtime_computes_it(
    tmp_path: Path, tokenizer: Tokenizer, combination: str
) -> None:
    model = build(combination, vocab_size=VOCAB_SIZE)
    residual, mixing, feed_forward, _ = combination.split("+")
    expected = ARCHS.get(f"{mixing}+{feed_forward}", "nanochat-ternary")
    assert architecture_of(model.config).name == (expected if residual == "plain" else "nanochat-ternary")
    path = tmp_path / "model.gguf"
    report = export_gguf(model, tokenizer, path, ExportConfig(head="f32"), {"run": "test"})
    assert set(report.linear_types.values()) == {"tq2_0"}
    verified = verify_gguf(path, model, tokenizer, ask_llama_cpp=False)
    assert verified.reload_difference <= 1e-4
    loaded, _ = load_gguf(path)
    with torch.no_grad():
        ours = model.logits(model(TOKENS))
    packed = PackedTransformer.from_model(loaded)
    difference = (packed.logits(packed(TOKENS)) - ours).abs()
    assert difference.median() <= 1e-5  # with norms fused into kernels a tie may round the other way
    packed = PackedTransformer.from_model(loaded, fused=False)
    assert (packed.logits(packed(TOKENS)) - ours).abs().max() <= 1e-4


@pytest.mark.skipif(not llama_cpp.is_available(), reason="needs xllamacpp")
@pytest.mark.parametrize("head", ["tied", "untied"])
@pytest.mark.parametrize("parts", ["attention+moe", "hybrid+dense"])
@pytest.mark.parametrize("type_name", ["tq2_0", "q4_0"])
def test_llama_cpp_computes_the_same_logits(
    tmp_path: Path, tokenizer: Tokenizer, parts: str, head: str, type_name: str
) -> None:
    """Within 1e-3 on prompts without a rounding tie, and within the rounding noise on the others.

    DeltaNet's exponentials leave 1e-5 between two programs, so that nearly every prompt of a hybrid has a tie; for
    those the comparison without rounding below is the strict one.
    """
    model = build(f"plain+{parts}+{head}", vocab_size=VOCAB_SIZE)
    path = tmp_path / "model.gguf"
    export_gguf(model, tokenizer, path, ExportConfig(type=type_name, head="f32"), {"run": "test"})  # pyright: ignore[reportArgumentType]
    compared = compare_with_llama_cpp(path, model, prompts((2, 3, 4, 5), 20), tolerance=1e-3)
    assert compared.passed, compared
    if "hybrid" in parts:
        assert compared.rms_difference <= compared.rms_noise, compared
        assert compared.n_within >= compared.n_prompts // 4, compared
    else:
        assert compared.n_stable >= 4, compared


@pytest.mark.skipif(not llama_cpp.is_available(), reason="needs xllamacpp")
def test_llama_cpp_computes_experts_behind_normed_queries_as_qwen3moe(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = build("plain+attention+moe+untied", vocab_size=VOCAB_SIZE, qk_norm=True, quant={"activations": False})
    assert architecture_of(model.config).name == "qwen3moe"
    path = tmp_path / "model.gguf"
    export_gguf(model, tokenizer, path, ExportConfig(type="f32", head="f32"), {"run": "test"})
    verified = verify_gguf(path, model, tokenizer, ask_llama_cpp=False)
    assert verified.reload_difference <= 1e-4
    compared = compare_with_llama_cpp(path, model, prompts((2, 3, 5, 9, 17, 40), 2), tolerance=1e-3)
    assert compared.n_within == compared.n_prompts, compared
    loaded, _ = load_gguf(path)
    assert (loaded.config.qk_norm, loaded.config.moe.experts, loaded.config.resolved_ffn_dim) == (True, 4, 256)


@pytest.mark.skipif(not llama_cpp.is_available(), reason="needs xllamacpp")
@pytest.mark.parametrize("parts", ["attention+moe", "hybrid+dense"])
def test_llama_cpp_computes_the_same_logits_without_rounding(tmp_path: Path, tokenizer: Tokenizer, parts: str) -> None:
    """F32 weights: nothing is rounded to int8, so that every prompt must agree."""
    model = build(f"plain+{parts}+untied", vocab_size=VOCAB_SIZE, quant={"activations": False})
    path = tmp_path / "model.gguf"
    export_gguf(model, tokenizer, path, ExportConfig(type="f32", head="f32"), {"run": "test"})
    compared = compare_with_llama_cpp(path, model, prompts((2, 3, 5, 9, 17, 40, 60), 4), tolerance=1e-3)
    assert compared.n_within == compared.n_prompts, compared
