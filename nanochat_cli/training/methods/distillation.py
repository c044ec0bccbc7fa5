"""Distillation: the model learns the predictions of a teacher beside the tokens themselves (arXiv:1503.02531, §2).

    objective = (1 − weight) · loss + weight · T² · KL(teacher ‖ model),  both softened by the temperature T

The teacher is a run of the same tokenizer, of any architecture. It computes the batch without gradients, in the dtype
of the run, and belongs to no checkpoint.
"""

import torch
from torch import Tensor

from nanochat_cli.config.schema import Config
from nanochat_cli.config.sections.distill import INIT
from nanochat_cli.errors import ConfigError
from nanochat_cli.formats.open import open_run
from nanochat_cli.formats.run.find import run_and_checkpoint
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.training.divergence import chunked_divergence
from nanochat_cli.training.part import MicroBatch, Part, Setup


class Distillation(Part):
    """Adds the divergence from the teacher over the tokens that count in the loss."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.config = setup.config.distill
        self.teacher = load_teacher(setup.config).to(setup.device)
        self.teacher.document_end = setup.model.document_end
        if (dtype := setup.score.autocast_dtype) is not None:
            for _, layer in self.teacher.linears():  # their products round the weights to it anyway
                if not layer.quant.enabled:
                    layer.weight.data = layer.weight.data.to(dtype)

    def add_loss(self, micro: MicroBatch, objective: Tensor, counted: Tensor) -> Tensor:
        score, teacher, config = self.setup.score, self.teacher, self.config
        with torch.no_grad(), score.autocast():
            told = score.flat(teacher(micro.inputs))
        hidden, targets = score.flat(micro.hidden), micro.targets.reshape(-1)
        if micro.counted is not None:
            hidden, told, targets = hidden[micro.counted], told[micro.counted], targets[micro.counted]
        divergence = chunked_divergence(
            hidden,
            score.model.unembedding,
            told,
            teacher.unembedding.detach(),
            targets,
            temperature=config.temperature,
            top_k=config.top_k,
            chunk=score.chunk,
        )
        micro.metrics["loss/distillation"] = divergence
        return (1 - config.weight) * objective + config.weight * config.temperature**2 * divergence


def load_teacher(config: Config) -> Transformer:
    """On the CPU, ready to compute without gradients; as trained, or in float the weights that training begins with.

    Raises DataError if it is no run, ConfigError if it cannot read the batches.
    """
    asked, train, model = config.distill.teacher, config.train, config.model
    assert asked is not None
    path = train.init if asked == INIT else asked
    assert path is not None
    teacher = open_run(*run_and_checkpoint(path)).model
    if teacher.config.vocab_size != model.vocab_size:
        raise ConfigError(
            f"distill.teacher = {asked}: it has {teacher.config.vocab_size} tokens and the model {model.vocab_size}: a "
            "teacher needs the same tokenizer"
        )
    if teacher.config.max_seq_len < train.seq_len:
        raise ConfigError(
            f"distill.teacher = {asked}: it reads at most {teacher.config.max_seq_len} tokens, and train.seq_len = "
            f"{train.seq_len}: lower that"
        )
    return teacher.requires_grad_(False)
