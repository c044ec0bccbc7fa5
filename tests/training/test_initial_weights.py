"""Training begins with the weights of another model, and nothing else of it."""

from dataclasses import dataclass
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


@dataclass(frozen=True)
class Saved:
    """The same float model as a run, a GGUF file and a Hugging Face folder, inside a folder."""

    folder: Path
    model: Transformer
    tokenizer: Tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("saved")
    model, tokenizer = save_run(folder / "run", quant={"enabled": False})
    (folder / "run" / CHAT_TEMPLATE_FILE).write_text("a template")
    settings = ExportConfig(type="f32", head="f32")
    export_gguf(model, tokenizer, folder / "model.gguf", settings, {}, "a template")
    write_folder(model.config, stored_values(model, settings), tokenizer, folder / "folder", "a template")
    return Saved(folder, model, tokenizer)


PLACES = ["run", "run/checkpoints/step-000001", "model.gguf", "folder"]


@pytest.mark.parametrize(("place", "enabled"), [*((place, False) for place in PLACES), ("run", True)])
def test_every_source_gives_its_latents_to_a_ternary_or_float_model(saved: Saved, place: str, enabled: bool) -> None:
    model = like(saved.model, quant={"enabled": enabled}, max_seq_len=16)
    load_initial_weights(model, saved.folder / place)
    for name, weight in saved.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    for _, layer in model.ternary_layers():  # quantised from them, not from what was there before
        assert torch.equal(layer.operand * layer.scales, layer.ternary().dequantize())


@pytest.mark.parametrize("place", PLACES)
def test_the_shape_of_the_model_takes_the_place_of_the_presets(saved: Saved, place: str) -> None:
    given = [f"train.init={saved.folder / place}", "train.seq_len=16"]
    config = resolve_config(["quickstart", "sft"], overrides=given, shape_of=initial_shape)
    assert not config.model.quant.enabled
    load_initial_weights(Transformer(config.model), saved.folder / place)
    assert config.model.max_seq_len == saved.model.config.max_seq_len
    chosen = [*given, "model.quant.enabled=true", "model.max_seq_len=32"]
    config = resolve_config(["quickstart", "sft"], overrides=chosen, shape_of=initial_shape)
    assert (config.model.quant.enabled, config.model.max_seq_len) == (True, 32)
    assert config.model.dim == saved.model.config.dim


def test_an_overlay_goes_on_top_of_the_shape_and_a_way_to_ternary_is_not_gone_twice(tmp_path: Path) -> None:
    save_run(tmp_path / "run", quant={"enabled": True, "start": 0.2, "ramp": 0.4})
    given = [f"train.init={tmp_path / 'run'}", "train.seq_len=16"]
    quant = resolve_config(["quickstart", "sft"], overrides=given, shape_of=initial_shape).model.quant
    assert (quant.enabled, quant.start, quant.ramp) == (True, 0.0, 0.0)
    save_run(tmp_path / "float", quant={"enabled": False})
    given[0] = f"train.init={tmp_path / 'float'}"
    quant = resolve_config(["quickstart", "convert"], overrides=given, shape_of=initial_shape).model.quant
    assert (quant.enabled, quant.ramp) == (True, 0.3)


@pytest.mark.parametrize("place", PLACES)
def test_tokens_are_compared_and_a_template_comes_along(saved: Saved, place: str) -> None:
    data: Any = SimpleNamespace(folder=Path("data"), tokenizer=saved.tokenizer)
    assert initial_template(saved.folder / place, data) == "a template"
    data.tokenizer = Tokenizer.train(["other words"], saved.tokenizer.vocab_size)
    with pytest.raises(DataError, match=r"has another tokenizer than data, whose tokens would mean something else"):
        initial_template(saved.folder / place, data)


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
