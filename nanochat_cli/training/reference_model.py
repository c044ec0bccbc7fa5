"""The model whose losses Collider subtracts (`collider.score = excess` without a file of scores)."""

import torch

from nanochat_cli.config.schema import ColliderConfig
from nanochat_cli.errors import DataError
from nanochat_cli.model.transformer import Transformer


def reference_model(collider: ColliderConfig, vocab_size: int, device: torch.device) -> Transformer | None:
    """On the device, without gradients; None where none is asked for.

    vocab_size: of the model that is trained. Raises DataError for a run that is none or has other tokens.
    """
    reference = collider.reference_in_use
    if reference is None:
        return None
    from nanochat_cli.formats.open import load_run

    model, tokenizer, _ = load_run(reference)
    if model.config.vocab_size != vocab_size:
        raise DataError(
            f"collider.reference = {reference}: it has {tokenizer.vocab_size} tokens and this model "
            f"{vocab_size}; name a run with the same tokenizer"
        )
    return model.to(device).requires_grad_(False)
