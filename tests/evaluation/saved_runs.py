"""Untrained runs on disk for evaluation to load."""

import inspect
import json
from pathlib import Path
from typing import Any

from nanochat_cli.config.load import config_to_toml
from nanochat_cli.config.schema import Config
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.formats.run import checkpoints
from nanochat_cli.model.transformer import Transformer
from tests.inference.tiny_models import spread_model, tiny_config


def save_run(
    run: Path,
    tokenizer: Tokenizer | None = None,
    *,
    data: dict[str, Any] | None = None,
    fim: dict[str, Any] | None = None,
    **shape: object,
) -> tuple[Transformer, Tokenizer]:
    """A run of a tiny model with random weights, at step 1; data, fim: those sections of its configuration."""
    run.mkdir(parents=True)
    tokenizer = tokenizer or Tokenizer.train([inspect.getsource(json)], 300)
    model_config = tiny_config(vocab_size=tokenizer.vocab_size, **shape).model_dump()
    sections = {"model": model_config, "train": {"seq_len": 32}, "data": data or {}, "fim": fim or {}}
    config = Config.model_validate(sections)
    model = spread_model(config.model)
    (run / "config.toml").write_text(config_to_toml(config))
    tokenizer.save(run / "tokenizer.json")
    saved = config.model.model_dump(mode="json")
    checkpoints.save(run, 1, {"model": model.state_dict()}, {}, model_config=saved)
    return model, tokenizer
