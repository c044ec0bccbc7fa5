"""Training begins with the weights of another run, and nothing else of it."""

import pytest
import torch

from nanochat_cli.config.schema import ModelConfig
from nanochat_cli.errors import DataError
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.training.initial_weights import load_initial_weights
from tests.evaluation.saved_runs import save_run


def like(model: Transformer, **changes: object) -> Transformer:
    return Transformer(ModelConfig.model_validate({**model.config.model_dump(), **changes}))


@pytest.mark.parametrize("place", ["", "checkpoints/step-000001"])
@pytest.mark.parametrize("enabled", [True, False])
def test_a_run_or_a_checkpoint_gives_its_latents_to_a_ternary_or_float_model(tmp_path, place, enabled):
    saved, _ = save_run(tmp_path / "run", quant={"enabled": False})
    model = like(saved, quant={"enabled": enabled}, max_seq_len=16)
    load_initial_weights(model, tmp_path / "run" / place)
    for name, weight in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    for _, layer in model.ternary_layers():  # quantised from them, not from what was there before
        assert torch.equal(layer.operand * layer.scales, layer.ternary().dequantize())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_theta": 5000.0}, r"model\.rope_theta is 10000\.0 there and 5000\.0 here"),
        ({"n_layers": 3}, r"model\.n_layers is 2 there and 3 here"),
        ({"qk_norm": True}, r"model\.qk_norm is False there and True here"),
    ],
)
def test_another_architecture_is_refused_by_its_first_key(tmp_path, changes, words):
    saved, _ = save_run(tmp_path / "run", qk_norm=False)
    with pytest.raises(DataError, match=f"holds another model than this: {words}"):
        load_initial_weights(like(saved, **changes), tmp_path / "run")


@pytest.mark.parametrize(
    ("place", "words"),
    [("none", "no such folder"), ("run/checkpoints/step-000002", "has no such checkpoint"), (".", "nanochat import")],
)
def test_what_is_no_run_is_one_clear_line(tmp_path, place, words):
    saved, _ = save_run(tmp_path / "run")
    with pytest.raises(DataError, match=words):
        load_initial_weights(saved, tmp_path / place)
