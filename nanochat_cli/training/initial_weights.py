"""The weights that training begins with, where they are not random: those of another run, and nothing else of it."""

from pathlib import Path

from nanochat_cli.config.sections.model import ModelConfig
from nanochat_cli.errors import DataError
from nanochat_cli.formats.run import checkpoints
from nanochat_cli.formats.run.find import run_and_checkpoint
from nanochat_cli.formats.run.same_model import first_difference
from nanochat_cli.model.transformer import Transformer

MAY_DIFFER = {"quant", "max_seq_len", "ffn_mult", "qk_norm_init", "embedding_std", "head_std", "matrix_std"}
"""Of [model]: what weights do not depend on, or only random ones do."""


def load_initial_weights(model: Transformer, source: Path) -> None:
    """Give the model the latents of a run's last checkpoint, or of one of its steps (RUN/checkpoints/step-000500).

    Raises DataError for what is neither, or has another architecture.
    """
    saved = checkpoints.load(*run_and_checkpoint(source))
    there = ModelConfig.model_validate(saved.model_config)
    weights, state = saved.tensors["model"], model.state_dict()
    difference = first_difference(_architecture(there), _architecture(model.config), weights, state)
    if difference is not None:
        raise DataError(f"{saved.path} holds another model than this: {difference}; use the configuration it has")
    model.load_state_dict(weights)
    model.requantize()


def _architecture(config: ModelConfig) -> dict[str, object]:
    values = config.model_dump(mode="json", exclude=MAY_DIFFER)
    resolved = {
        "head_dim": config.resolved_head_dim,
        "ffn_dim": config.resolved_ffn_dim,
        "attention_gate": config.resolved_attention_gate,
    }
    return values | resolved
