"""A run folder back in memory: the saved model, from the requested checkpoint."""

import inspect
import json
from pathlib import Path

import pytest
import torch

from nanochat_cli.config.load import config_to_toml
from nanochat_cli.config.schema import Config, MTPConfig
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import DataError
from nanochat_cli.formats.open import load_mtp, load_run
from nanochat_cli.formats.run import checkpoints
from nanochat_cli.model.mtp import build_mtp
from nanochat_cli.model.transformer import Transformer
from tests.inference.tiny_models import spread_model, tiny_config

TOKENS = torch.arange(24).reshape(2, 12)


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, dict[int, Transformer]]:
    """A run with checkpoints of two different models at steps 10 (best) and 20 (latest)."""
    config = Config.model_validate({"model": tiny_config(vocab_size=300).model_dump(), "train": {"seq_len": 32}})
    models = {step: spread_model(config.model, seed=step) for step in (10, 20)}
    (tmp_path / "config.toml").write_text(config_to_toml(config))
    Tokenizer.train([inspect.getsource(json)], 300).save(tmp_path / "tokenizer.json")
    for step, model in models.items():
        checkpoints.save(
            tmp_path,
            step,
            {"model": model.state_dict()},
            {},
            model_config=config.model.model_dump(mode="json"),
            best=step == 10,
        )
    return tmp_path, models


@pytest.mark.parametrize(("which", "step"), [("latest", 20), ("best", 10), (10, 10), (20, 20)])
@torch.no_grad()
def test_the_named_checkpoint_computes_what_the_saved_model_did(
    run: tuple[Path, dict[int, Transformer]], which: checkpoints.Which, step: int
) -> None:
    folder, models = run
    model, tokenizer, config = load_run(folder, which)
    assert torch.equal(model.logits(model(TOKENS)), models[step].logits(models[step](TOKENS)))
    assert config.model == model.config
    assert tokenizer.vocab_size == 300
    assert not model.training


def test_a_checkpoint_of_another_model_is_one_clear_line(run: tuple[Path, dict[int, Transformer]]) -> None:
    folder, _ = run
    text = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(text.replace("n_layers = 2", "n_layers = 3"))
    with pytest.raises(DataError, match=r"n_layers is 2 there and 3 here"):
        load_run(folder)


def test_a_folder_that_is_not_a_run_is_one_clear_line(tmp_path: Path, run: tuple[Path, dict[int, Transformer]]) -> None:
    with pytest.raises(DataError, match="is not a folder: name a run"):
        load_run(tmp_path / "none")
    folder, _ = run
    with pytest.raises(DataError, match="no checkpoint of step 30"):
        load_run(folder, 30)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        load_run(folder)


@pytest.mark.parametrize(
    ("saved", "message"), [(None, "it has no tensor"), (3, "no place here"), (1, "it has no tensor heads.1")]
)
def test_multi_token_prediction_that_the_configuration_does_not_describe_is_one_clear_line(
    saved: int | None, message: str, tmp_path: Path
) -> None:
    """config.toml says two heads; the checkpoint has none, three, or one."""
    mtp = {"enabled": True, "kind": "heads", "n_tokens": 2}
    config = Config.model_validate(
        {"model": tiny_config(vocab_size=300).model_dump(), "train": {"seq_len": 32}, "mtp": mtp}
    )
    (tmp_path / "config.toml").write_text(config_to_toml(config))
    Tokenizer.train([inspect.getsource(json)], 300).save(tmp_path / "tokenizer.json")
    tensors = {"model": spread_model(config.model).state_dict()}
    if saved is not None:
        heads = build_mtp(config.model, MTPConfig.model_validate({**mtp, "n_tokens": saved}))
        assert heads is not None
        tensors["mtp"] = heads.state_dict()
    checkpoints.save(tmp_path, 10, tensors, {}, model_config=config.model.model_dump(mode="json"), best=False)
    with pytest.raises(DataError, match=message) as refused:
        load_mtp(tmp_path)
    assert "use the [mtp] settings it was trained with" in str(refused.value)
