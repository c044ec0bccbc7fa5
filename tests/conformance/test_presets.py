"""Every preset with its structure and a tiny shape: exported, the file has the architecture that was foretold, and
llama.cpp opens it or refuses it as foretold."""

import json
from pathlib import Path

import gguf
import pytest
import torch

from nanochat_cli.config import presets
from nanochat_cli.config.load import resolve_config
from nanochat_cli.config.schema import ExportConfig, ModelConfig
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import ValidationFailure
from nanochat_cli.export import llama_cpp
from nanochat_cli.formats.gguf.architecture import destination_of
from nanochat_cli.formats.gguf.write import export_gguf
from nanochat_cli.model.transformer import Transformer
from tests.conformance.conftest import VOCAB_SIZE

TINY = {"dim": 256, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 256, "max_seq_len": 64}
PRESETS = [[preset.name] for preset in presets.available() if not preset.is_overlay]
PRESETS += [[name, overlay] for name in ("medium-3b", "nano-125m-mhc") for overlay in ("llama-cpp", "bitnet")]


def tiny(names: list[str]) -> ModelConfig:
    """The model of these presets with only its sizes changed."""
    return ModelConfig.model_validate(resolve_config(names).model.model_dump() | TINY | {"vocab_size": VOCAB_SIZE})


def structures() -> dict[str, list[list[str]]]:
    """Presets that differ only in sizes share an export."""
    found: dict[str, list[list[str]]] = {}
    for names in PRESETS:
        found.setdefault(json.dumps(tiny(names).model_dump()), []).append(names)
    return found


SAME = list(structures().values())


@pytest.mark.parametrize("names", PRESETS, ids="+".join)
def test_a_tiny_shape_has_the_same_destination_as_the_preset(names: list[str]) -> None:
    assert destination_of(tiny(names)) == destination_of(resolve_config(names).model)


@pytest.mark.parametrize("same", SAME, ids=lambda same: ",".join("+".join(names) for names in same))
def test_llama_cpp_opens_exactly_the_files_that_we_say_it_opens(
    tmp_path: Path, tokenizer: Tokenizer, same: list[list[str]]
) -> None:
    config = tiny(same[0])
    torch.manual_seed(0)
    path = tmp_path / "model.gguf"
    report = export_gguf(Transformer(config), tokenizer, path, ExportConfig(), {"run": "test"})
    foretold = destination_of(config)
    architecture = gguf.GGUFReader(path).get_field("general.architecture")
    assert architecture is not None
    assert foretold.arch == report.arch == architecture.contents()
    assert set(report.linear_types.values()) == {"tq2_0"}
    if not llama_cpp.is_available():
        pytest.skip("needs xllamacpp")
    if foretold.runs_in_llama_cpp:
        assert len(llama_cpp.complete(path, ["def f"], 3)[0].tokens) >= 1
    else:
        with pytest.raises(ValidationFailure, match="unknown model architecture"):
            llama_cpp.complete(path, ["def f"], 3)
