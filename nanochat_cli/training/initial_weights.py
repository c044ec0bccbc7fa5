"""The weights that training begins with, where they are not random: those of another model, and nothing else of it."""

from pathlib import Path

from nanochat_cli.config.sections.model import ModelConfig
from nanochat_cli.errors import DataError
from nanochat_cli.formats.initial import initial_weights
from nanochat_cli.formats.run.same_model import first_difference
from nanochat_cli.model.transformer import Transformer

MAY_DIFFER = {"quant", "max_seq_len", "ffn_mult", "qk_norm_init", "embedding_std", "head_std", "matrix_std"}
"""Of [model]: what weights do not depend on, or only random ones do."""


def load_initial_weights(model: Transformer, source: Path) -> None:
    """Give the model the latents of what `train.init` names. Raises DataError for another architecture."""
    there, weights = initial_weights(source)
    difference = first_difference(_architecture(there), _architecture(model.config), weights, model.state_dict())
    if difference is not None:
        raise DataError(f"train.init = {source} holds another model than this: {difference}; leave the key out")
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
