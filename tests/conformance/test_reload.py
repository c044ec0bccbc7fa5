"""A model read back from GGUF computes the logits of the model in memory, for every exportable kind."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat_cli.config.schema import ExportConfig
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.export.verify import verify_gguf
from nanochat_cli.formats.gguf.read import load_gguf
from nanochat_cli.formats.gguf.write import export_gguf
from tests.conformance.conftest import VOCAB_SIZE
from tests.inference.tiny_models import spread_model, tiny_config

ARCHS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"qk_norm": True},
    "bitnet": {"sub_norm": True, "tie_embeddings": True},
}
EXACT_TYPES: dict[Any, list[str]] = {
    "row": ["tq2_0", "tq1_0", "q2_0", "q4_0", "f16", "f32", "auto"],
    "tensor": ["tq2_0", "tq1_0", "q2_0", "q4_0", "f16"],
    256: ["tq2_0", "tq1_0", "q2_0", "q4_0", "f16"],
    128: ["q2_0", "q4_0", "f16", "auto"],
    64: ["q2_0", "q4_0", "f16"],
}
CASES = [("llama", scale, name) for scale, names in EXACT_TYPES.items() for name in names]
# The other archs differ in names, not in bytes: one type per scale.
CASES += [(arch, scale, names[0]) for arch in ("qwen3", "bitnet") for scale, names in EXACT_TYPES.items()]


def reload_difference(tmp_path: Path, tokenizer: Tokenizer, export: ExportConfig, **config: Any) -> float:
    model = spread_model(tiny_config(vocab_size=VOCAB_SIZE, **config), seed=len(str(config)))
    path = tmp_path / "model.gguf"
    report = export_gguf(model, tokenizer, path, export, {"run": "test"})
    assert report.bytes == path.stat().st_size
    verify_gguf(path, model, tokenizer, ask_llama_cpp=False)

    loaded, _ = load_gguf(path)
    ignored = {"qk_norm_init", "embedding_std", "head_std", "matrix_std", "ffn_mult"}
    assert loaded.config.model_dump(exclude=ignored) == {
        **model.config.model_dump(exclude=ignored),
        "head_dim": model.config.resolved_head_dim,
        "ffn_dim": model.config.resolved_ffn_dim,
    }
    for (name, ours), (_, theirs) in zip(model.ternary_layers(), loaded.ternary_layers(), strict=True):
        assert torch.equal(ours.ternary().codes, theirs.ternary().codes), name
        assert torch.equal(ours.ternary().scales, theirs.ternary().scales), name
        assert ours.ternary().granularity == theirs.ternary().granularity
    tokens = torch.randint(0, VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return float((model.logits(model(tokens)) - loaded.logits(loaded(tokens))).abs().max())


@pytest.mark.parametrize(("arch", "scale", "type_name"), CASES)
def test_logits_survive_for_every_arch_scale_and_type(
    tmp_path: Path, tokenizer: Tokenizer, arch: str, scale: Any, type_name: Any
) -> None:
    export = ExportConfig(type=type_name, head="f32")
    assert reload_difference(tmp_path, tokenizer, export, quant={"scale": scale}, **ARCHS[arch]) <= 1e-6


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("arch", "tied"), [("llama", False), ("llama", True), ("qwen3", False), ("qwen3", True), ("bitnet", True)]
)
def test_logits_survive_for_every_grouping_of_heads_tied_and_untied(
    tmp_path: Path, tokenizer: Tokenizer, arch: str, tied: bool, n_kv_heads: int
) -> None:
    config = {**ARCHS[arch], "tie_embeddings": tied, "n_kv_heads": n_kv_heads}
    assert reload_difference(tmp_path, tokenizer, ExportConfig(head="f32"), **config) <= 1e-6


@pytest.mark.parametrize(
    "config",
    [
        {"head_dim": 32},
        {"head_dim": 96, "ffn_dim": 320},
        {"rope_theta": 50000.0, "norm_eps": 1e-6},
        {"quant": {"activations": False}},
        {"quant": {"enabled": False}},
        {"dim": 96, "n_heads": 2, "n_kv_heads": 2, "ffn_dim": 160},
        {"dim": 100, "n_heads": 2, "n_kv_heads": 1, "ffn_dim": 200},
    ],
    ids=str,
)
def test_logits_survive_for_uncommon_shapes_and_settings(
    tmp_path: Path, tokenizer: Tokenizer, config: dict[str, Any]
) -> None:
    export = ExportConfig(type="f32" if config.get("quant") == {"enabled": False} else "auto", head="f32")
    assert reload_difference(tmp_path, tokenizer, export, **config) <= 1e-6


def test_a_float_model_in_f16_comes_back_rounded_to_f16(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = spread_model(tiny_config(vocab_size=VOCAB_SIZE, quant={"enabled": False}))
    path = tmp_path / "model.gguf"
    report = export_gguf(model, tokenizer, path, ExportConfig(), {})
    assert set(report.tensor_types.values()) == {"f16", "f32"}
    verify_gguf(path, model, tokenizer, ask_llama_cpp=False)
    loaded, _ = load_gguf(path)
    for (key, ours), theirs in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(theirs, ours if ours.ndim == 1 else ours.half().float()), key
