"""Evaluation during a run, on the held-out documents or a sample of them; the view shows its progress."""

from collections.abc import Iterator

import torch
from torch import Tensor

from nanochat_cli.model.transformer import Transformer
from nanochat_cli.report.live import LiveView
from nanochat_cli.training.bits_per_byte import HeldOut, evaluate
from nanochat_cli.training.training_data import TrainingData


def score(
    model: Transformer,
    data: TrainingData,
    view: LiveView,
    step: int,
    max_tokens: int | None,
    autocast_dtype: torch.dtype | None,
    provisional: str | None = None,
) -> HeldOut:
    """Score `model` after `step` steps. max_tokens: of the sample; None: all. provisional: see `part.Part`."""
    # On a CPU compiling the model once more for inference costs more than evaluating eagerly.
    stance = "force_eager" if model.device.type == "cpu" else "default"
    total = data.held_out_batches(max_tokens)

    def counted() -> Iterator[tuple[Tensor, Tensor]]:
        for done, batch in enumerate(data.held_out(max_tokens)):
            view.phase("evaluating", done, total)
            yield batch

    with torch.compiler.set_stance(stance):
        found = evaluate(model, counted(), data.token_bytes, autocast_dtype=autocast_dtype)
    view.phase()
    scope = "all documents" if total == data.held_out_batches(None) else "a sample"
    if provisional is not None:
        scope = f"{scope}, {provisional}"
    view.update(step, eval_loss=found.loss, bits_per_byte=found.bits_per_byte, eval_scope=scope)
    return found


def score_text(
    model: Transformer, data: TrainingData, view: LiveView, max_tokens: int | None, autocast_dtype: torch.dtype | None
) -> HeldOut:
    """Score the text that fine-tuning shall not forget, read as a base model is: one stream, across documents."""
    stance = "force_eager" if model.device.type == "cpu" else "default"
    end, model.document_end = model.document_end, None
    view.phase("evaluating data.base")
    try:
        with torch.compiler.set_stance(stance):
            return evaluate(model, data.held_out_text(max_tokens), data.token_bytes, autocast_dtype=autocast_dtype)
    finally:
        model.document_end = end
        view.phase()
