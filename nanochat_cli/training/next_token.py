"""The loss of pre-training: how well a batch's next tokens are predicted, and what parts add to that."""

from torch import Tensor

from nanochat_cli.training.losses import IGNORE
from nanochat_cli.training.part import MicroBatch
from nanochat_cli.training.state import TrainState
from nanochat_cli.training.update import Loss, Metrics, update


def train_step(state: TrainState, inputs: Tensor, targets: Tensor) -> dict[str, float]:
    """One update on a global batch, int64 [B, T] each, on the device; a target of -100 does not count."""
    return update(state, len(inputs), next_token_loss(state, inputs, targets))


def next_token_loss(state: TrainState, inputs: Tensor, targets: Tensor) -> Loss:
    """Metrics: `loss/main`, the cross-entropy of all tokens in nats, `loss/objective`, and those of parts."""
    of_step = len(inputs) if state.owned is None else state.owned.rows
    # In text every sequence has as many targets as the others; of conversations only answers are some.
    answers = None if state.model.document_end is None else (targets != IGNORE).sum(1)

    def loss(rows: slice) -> tuple[Tensor, Metrics]:
        share = (rows.stop - rows.start) / of_step
        if answers is not None:
            share = answers[rows].sum() / answers.sum().clamp(min=1)
        micro = MicroBatch(inputs[rows], targets[rows], rows, share)
        for part in state.parts:
            part.before_forward(micro)
        with state.score.autocast():
            micro.hidden = state.model(micro.inputs)
        for part in state.parts:
            part.after_forward(micro)
        objective, counted = state.score(micro.hidden, micro.targets, micro.counted, micro.logits)
        micro.logits = None
        for part in state.parts:
            objective = part.add_loss(micro, objective, counted)
        main = counted if micro.cross_entropy is None else micro.cross_entropy
        metrics = {"loss/main": main, "loss/objective": objective, **micro.metrics}
        return objective * share, {name: value.detach() * share for name, value in metrics.items()}

    return loss
