"""Training begins with the weights of another model, and nothing else of it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanochat_cli.config.load import resolve_config
from nanochat_cli.config.schema import ModelConfig
from nanochat_cli.config.sections.export import ExportConfig
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import DataError
from nanochat_cli.formats.gguf.write import export_gguf
from nanochat_cli.formats.huggingface.tensors import stored_values
from nanochat_cli.formats.huggingface.write import write_folder
from nanochat_cli.formats.initial import initial_shape, initial_template, initial_weights
from nanochat_cli.formats.run.origin import CHAT_TEMPLATE_FILE
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.training.initial_weights import load_initial_weights
from tests.evaluation.saved_runs import save_run


def like(model: Transformer, **changes: object) -> Transformer:
    return Transformer(ModelConfig.model_validate({**model.config.model_dump(), **changes}))


def saved_everywhere(folder: Path) -> tuple[Transformer, Tokenizer]:
    """The same float model as a run, a GGUF file and a Hugging Face folder."""
    model, tokenizer = save_run(folder / "run", quant={"enabled": False})
    settings = ExportConfig(type="f32", head="f32")
    export_gguf(model, tokenizer, folder / "model.gguf", settings, {}, "a template")
    write_folder(model.config, stored_values(model, settings), tokenizer, folder / "folder", "a template")
    return model, tokenizer


@pytest.mark.parametrize("place", ["run", "run/checkpoints/step-000001", "model.gguf", "folder"])
@pytest.mark.parametrize("enabled", [True, False])
def test_every_source_gives_its_latents_to_a_ternary_or_float_model(tmp_path: Path, place: str, enabled: bool) -> None:
    saved, _ = saved_everywhere(tmp_path)
    model = like(saved, quant={"enabled": enabled}, max_seq_len=16)
    load_initial_weights(model, tmp_path / place)
    for name, weight in saved.state_dict().items():
        # a Hugging Face folder has matrices in float16 unless that loses something
        assert torch.equal(model.state_dict()[name], weight), name
    for _, layer in model.ternary_layers():  # quantised from them, not from what was there before
        assert torch.equal(layer.operand * layer.scales, layer.ternary().dequantize())


@pytest.mark.parametrize("place", ["run", "run/checkpoints/step-000001", "model.gguf", "folder"])
def test_the_shape_of_the_model_takes_the_place_of_the_presets(tmp_path: Path, place: str) -> None:
    saved, _ = saved_everywhere(tmp_path)
    init = f"train.init={tmp_path / place}"
    config = resolve_config(["quickstart", "sft"], overrides=[init, "train.seq_len=16"], shape_of=initial_shape)
    assert not config.model.quant.enabled
    model = Transformer(config.model)
    load_initial_weights(model, tmp_path / place)
    assert config.model.max_seq_len == saved.config.max_seq_len
    chosen = [init, "train.seq_len=16", "model.quant.enabled=true", "model.max_seq_len=32"]
    config = resolve_config(["quickstart", "sft"], overrides=chosen, shape_of=initial_shape)
    assert (config.model.quant.enabled, config.model.max_seq_len) == (True, 32)
    assert config.model.dim == saved.config.dim


@pytest.mark.parametrize("place", ["run", "run/checkpoints/step-000001", "model.gguf", "folder"])
def test_tokens_are_compared_and_a_template_comes_along(tmp_path: Path, place: str) -> None:
    _, tokenizer = saved_everywhere(tmp_path)
    (tmp_path / "run" / CHAT_TEMPLATE_FILE).write_text("a template")
    data: Any = SimpleNamespace(folder=tmp_path / "data", tokenizer=tokenizer)
    assert initial_template(tmp_path / place, data) == "a template"
    data.tokenizer = Tokenizer.train(["other words"], tokenizer.vocab_size)
    with pytest.raises(DataError, match=r"has another tokenizer than .*data, whose tokens would mean something else"):
        initial_template(tmp_path / place, data)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_theta": 5000.0}, r"model\.rope_theta is 10000\.0 there and 5000\.0 here"),
        ({"n_layers": 3}, r"model\.n_layers is 2 there and 3 here"),
        ({"qk_norm": True}, r"model\.qk_norm is False there and True here"),
    ],
)
def test_another_architecture_is_refused_by_its_first_key(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    saved, _ = save_run(tmp_path / "run", qk_norm=False)
    with pytest.raises(DataError, match=f"holds another model than this: {words}"):
        load_initial_weights(like(saved, **changes), tmp_path / "run")


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("none", "no such file or folder"),
        ("run/checkpoints/step-000002", "has no such checkpoint"),
        ("empty", "neither a run nor a Hugging Face folder nor a .gguf file"),
        ("ternary.gguf", "its weights are ternary already"),
    ],
)
def test_what_has_no_weights_to_begin_with_is_one_clear_line(tmp_path: Path, place: str, words: str) -> None:
    model, tokenizer = save_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    export_gguf(model, tokenizer, tmp_path / "ternary.gguf", ExportConfig(), {})
    with pytest.raises(DataError) as error:
        initial_weights(tmp_path / place)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
