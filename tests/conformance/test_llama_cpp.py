"""llama.cpp itself as the oracle: log-probabilities, greedy tokens, tokenisation, and its reaction to broken files."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat_cli.config.schema import ExportConfig
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import ValidationFailure
from nanochat_cli.export import llama_cpp
from nanochat_cli.export.ggml_activations import ggml_arithmetic
from nanochat_cli.export.verify import compare_with_llama_cpp, probe_prompts, verify_gguf
from nanochat_cli.formats.gguf.write import ExportReport, export_gguf
from nanochat_cli.inference.generate import generate_tokens
from nanochat_cli.inference.sampling import SamplingConfig
from nanochat_cli.model.norm import RMSNorm
from nanochat_cli.model.rope import rope_table
from nanochat_cli.model.transformer import Transformer
from tests.conformance.conftest import VOCAB_SIZE
from tests.inference.tiny_models import spread_model, tiny_config

QWEN3: dict[str, Any] = {"qk_norm": True}
BITNET: dict[str, Any] = {"sub_norm": True, "tie_embeddings": True}

LOGPROB_CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("tq2_0", "f32", {"n_kv_heads": 1}),
    ("tq2_0", "f16", {"n_kv_heads": 4, "tie_embeddings": True, "quant": {"scale": 256}}),
    ("tq1_0", "f16", {"n_kv_heads": 2, "quant": {"scale": "tensor"}}),
    ("q2_0", "f16", {"n_kv_heads": 2, "quant": {"scale": 128}}),
    ("q4_0", "f32", {"n_kv_heads": 1, "tie_embeddings": True, "quant": {"scale": 64}}),
    ("auto", "f16", {"head_dim": 96, "ffn_dim": 320, "rope_theta": 50000.0}),
    ("tq2_0", "f32", {**QWEN3, "n_kv_heads": 2}),
    ("tq2_0", "f16", {**QWEN3, "n_kv_heads": 1, "tie_embeddings": True, "norm_eps": 1e-6}),
    ("q2_0", "f32", {**QWEN3, "n_kv_heads": 4, "quant": {"scale": 128}}),
    ("q4_0", "f16", {**QWEN3, "n_kv_heads": 2, "quant": {"scale": "tensor"}}),
    ("tq2_0", "f16", {**BITNET, "n_kv_heads": 2}),
    ("tq1_0", "f32", {**BITNET, "n_kv_heads": 1}),
    ("q2_0", "f16", {**BITNET, "n_kv_heads": 4, "quant": {"scale": 64}}),
    ("q4_0", "f32", {**BITNET, "n_kv_heads": 2, "quant": {"scale": 128}}),
]


def exported(
    tmp_path: Path, tokenizer: Tokenizer, type_name: Any, head: Any, config: dict[str, Any]
) -> tuple[Transformer, Path, ExportReport]:
    model = spread_model(tiny_config(vocab_size=VOCAB_SIZE, **config), seed=len(str(config)))
    path = tmp_path / "model.gguf"
    return model, path, export_gguf(model, tokenizer, path, ExportConfig(type=type_name, head=head), {})


@pytest.mark.parametrize(("type_name", "head", "config"), LOGPROB_CASES, ids=str)
def test_log_probabilities_equal_llama_cpps_under_its_rounding_of_activations(
    tmp_path: Path, tokenizer: Tokenizer, type_name: str, head: str, config: dict[str, Any]
) -> None:
    model, path, _ = exported(tmp_path, tokenizer, type_name, head, config)
    comparison = verify_gguf(path, model, tokenizer).llama_cpp
    assert comparison is not None
    assert comparison.passed
    # Two layers leave most prompts free of rounding ties; those agree to float32, or to the head's f16 input.
    assert comparison.n_stable >= 10
    assert comparison.median_difference <= 2e-5
    assert comparison.max_stable_difference <= 2e-3


@pytest.mark.parametrize("type_name", ["f16", "f32"])
@pytest.mark.parametrize("enabled", [True, False])
def test_float_files_agree_within_the_tolerance(
    tmp_path: Path, tokenizer: Tokenizer, type_name: str, enabled: bool
) -> None:
    model, path, _ = exported(tmp_path, tokenizer, type_name, "f16", {"quant": {"enabled": enabled}})
    comparison = compare_with_llama_cpp(path, model, probe_prompts(model, tokenizer))
    # F16 rounds every activation, so that hardly a prompt is free of ties, but the steps are small.
    assert comparison.passed
    assert comparison.n_within >= (0.9 if type_name == "f16" else 1) * comparison.n_prompts


def forget_rope(model: Transformer) -> None:
    model.cos.copy_(rope_table(64, 64, 11000.0)[0])


def other_eps(model: Transformer) -> None:
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.eps = 1e-3


def unpermuted_queries(model: Transformer) -> None:
    layer = model.blocks[0].attention.wq
    order = torch.arange(256).reshape(4, 2, 32).transpose(1, 2).reshape(-1)
    layer.operand.copy_(layer.operand[order])
    layer.scales.copy_(layer.scales[order])


def one_flipped_row(model: Transformer) -> None:
    model.blocks[1].feed_forward.w_down.operand[17].neg_()


def kv_heads_tiled(model: Transformer) -> None:
    for name in ("wq", "wo"):
        layer = getattr(model.blocks[0].attention, name)
        effective = layer.operand * layer.scales
        heads = effective.reshape(4, 64, 256) if name == "wq" else effective.reshape(256, 4, 64)
        swapped = heads[[0, 2, 1, 3]] if name == "wq" else heads[:, [0, 2, 1, 3]]
        layer.operand.copy_(swapped.reshape(256, 256))
        layer.scales.fill_(1.0)


@pytest.mark.parametrize("fault", [forget_rope, other_eps, unpermuted_queries, one_flipped_row, kv_heads_tiled])
def test_the_comparison_fails_when_the_model_computes_something_slightly_different(
    tmp_path: Path, tokenizer: Tokenizer, fault: Any
) -> None:
    model, path, _ = exported(tmp_path, tokenizer, "tq2_0", "f16", {})
    with torch.no_grad():
        fault(model)
    assert not compare_with_llama_cpp(path, model, probe_prompts(model, tokenizer)).passed


# --- greedy tokens ----------------------------------------------------------------------------------------------------

STEPS = 150
MARGIN = 0.05
"""Smallest gap between the best two logits over all compared steps: over twice the effect of int8 rounding on one."""


@pytest.fixture(scope="session")
def decisive(sources: list[str], tokenizer: Tokenizer) -> Transformer:
    """A model that knows a piece of source code almost by heart, so that nearly every next token is certain."""
    torch.manual_seed(0)
    model = Transformer(tiny_config(vocab_size=VOCAB_SIZE, matrix_std=0.05))
    windows = torch.tensor(tokenizer.encode(sources[0])[:320]).unfold(0, 25, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * (1 - step / STEPS)
        batch = windows[torch.randperm(len(windows))[:16]]
        # A window is a prompt of eight tokens and the sixteen after it, as the test needs them.
        logits = model.logits(model(batch[:, :-1]))[:, 7:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 8:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.requantize()
    assert loss.item() < 0.05
    return model.eval()


@pytest.mark.parametrize("type_name", ["tq2_0", "q4_0"])
def test_greedy_tokens_equal_llama_cpps_on_twenty_prompts(
    tmp_path: Path, tokenizer: Tokenizer, sources: list[str], decisive: Transformer, type_name: Any
) -> None:
    path = tmp_path / "model.gguf"
    report = export_gguf(decisive, tokenizer, path, ExportConfig(type=type_name), {})
    ids = tokenizer.encode(sources[0])
    prompts = [ids[start : start + 8] for start in range(0, 300, 15)]
    assert len(prompts) == 20
    theirs = [answer.tokens for answer in llama_cpp.complete(path, prompts, 16)]
    greedy = SamplingConfig(max_tokens=16, temperature=0)
    with ggml_arithmetic(decisive, report.linear_types, report.head_type) as logits:
        for prompt, tokens in zip(prompts, theirs, strict=True):
            best = logits(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1].topk(2).values
            assert (best[:, 0] - best[:, 1]).min() > MARGIN, "the model is not decisive enough for this test"
            assert [step[0] for step in generate_tokens(decisive, [prompt], greedy)] == tokens


def test_text_generated_by_llama_cpp_keeps_newlines(
    tmp_path: Path, tokenizer: Tokenizer, sources: list[str], decisive: Transformer
) -> None:
    path = tmp_path / "model.gguf"
    export_gguf(decisive, tokenizer, path, ExportConfig(), {})
    start = sources[0].index("\n\n")
    prompt = sources[0][start - 30 : start]
    text = llama_cpp.llama_cpp_generate(path, prompt, 24)
    assert "\n" in text
    assert text == tokenizer.decode(llama_cpp.complete(path, [tokenizer.encode(prompt)], 24)[0].tokens)


# --- tokenisation -----------------------------------------------------------------------------------------------------


def odd_strings(sources: list[str]) -> list[str]:
    rng = random.Random(0)
    alphabet = "aZ09 \t\n\r'\".,_-(){}[]<>|#é∑中日本한글Ωß😀👩‍💻\u200d\u00a0\u2028\u0301\x7f\x01"
    fuzz = ["".join(rng.choices(alphabet, k=rng.randint(1, 30))) for _ in range(150)]
    text = "".join(sources)
    pieces = [text[at : at + rng.randint(1, 80)] for at in (rng.randrange(len(text)) for _ in range(100))]
    spaces = ["\n", "\n\n\n", "\t\tx", " \n \t\r\n", "   indented", "trailing   ", "a\n\n  b"]
    words = ["it's we'll I'D", "12345678 3.14", "naïve café", "e\u0301", "🤖🤖", "\u0000".join("ab")]
    names = ["<|endoftext|>", "<|pad|> text <|im_end|>", "[PAD600]"]
    return [*spaces, *words, *names, *fuzz, *pieces]


@pytest.mark.parametrize("pre", ["gpt-2", "llama3", "qwen2"])
def test_llama_cpp_tokenises_newlines_tabs_and_unicode_as_we_do(tmp_path: Path, sources: list[str], pre: str) -> None:
    tokenizer = Tokenizer.train(sources, VOCAB_SIZE, pre=pre)
    model = spread_model(tiny_config(vocab_size=VOCAB_SIZE + 8, n_layers=1))
    path = tmp_path / "model.gguf"
    export_gguf(model, tokenizer, path, ExportConfig(), {})
    texts = odd_strings(sources)
    assert len(texts) > 250
    theirs = llama_cpp.tokenize(path, texts)
    wrong = [text for text, ids in zip(texts, theirs, strict=True) if ids != tokenizer.encode(text)]
    assert wrong == []
    assert all(tokenizer.decode(ids) == text for text, ids in zip(texts, theirs, strict=True))


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_file_that_llama_cpp_refuses_is_one_clear_failure(tmp_path: Path, tokenizer: Tokenizer) -> None:
    _, path, _ = exported(tmp_path, tokenizer, "tq2_0", "f16", {})
    path.write_bytes(path.read_bytes()[:-100_000])
    with pytest.raises(ValidationFailure, match=r"llama\.cpp failed on .*model\.gguf") as failure:
        llama_cpp.complete(path, ["a"], 1)
    assert "\n" not in str(failure.value)


def test_an_abort_inside_llama_cpp_does_not_take_us_with_it(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two tokens with the same text make llama.cpp call abort().
    from nanochat_cli.formats.gguf import write as exporter

    def duplicated(*args: Any) -> dict[str, Any]:
        fields = metadata(*args)
        fields["tokenizer.ggml.tokens"][20] = fields["tokenizer.ggml.tokens"][21]
        return fields

    metadata = exporter.tokenizer_metadata
    monkeypatch.setattr(exporter, "tokenizer_metadata", duplicated)
    _, path, _ = exported(tmp_path, tokenizer, "tq2_0", "f16", {})
    with pytest.raises(ValidationFailure, match=r"llama\.cpp failed on"):
        llama_cpp.complete(path, ["a"], 1)


def test_a_llama_cpp_that_hangs_is_a_failure_after_the_timeout(tmp_path: Path, tokenizer: Tokenizer) -> None:
    _, path, _ = exported(tmp_path, tokenizer, "tq2_0", "f16", {})
    with pytest.raises(ValidationFailure, match=r"did not finish .* within 0.01 s"):
        llama_cpp.complete(path, ["a"], 1, timeout=0.01)
