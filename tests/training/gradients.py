"""The gradient that training computes, for a model and parts that a test has made by itself."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nanochat_cli.config.schema import Config
from nanochat_cli.model.mtp import MTP
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.optim import build_optimizer
from nanochat_cli.report.reporter import QuietReporter
from nanochat_cli.training.losses import TokenLoss
from nanochat_cli.training.methods.mtp_loss import MTPLoss
from nanochat_cli.training.next_token import next_token_loss
from nanochat_cli.training.part import Part, Setup
from nanochat_cli.training.progress import Progress
from nanochat_cli.training.skip_policy import SkipPolicy
from nanochat_cli.training.state import TrainState
from nanochat_cli.training.update import gradient


def setup_of(model: Transformer, mtp: MTP | None = None, data: Any = None, **sections: dict[str, object]) -> Setup:
    """What parts of a run of this model are built from; sections: of the configuration."""
    config = Config.model_validate(sections).model_copy(update={"model": model.config})
    if mtp is not None:
        config = config.model_copy(update={"mtp": mtp.config})
    score = TokenLoss.of(model, config.train)
    beside = {} if mtp is None else {"mtp": mtp}
    return Setup(config, model, score, torch.device("cpu"), QuietReporter(), data, beside)


def mtp_loss(setup: Setup) -> MTPLoss:
    """The part of the modules that `setup` holds already."""
    mtp = setup.beside["mtp"]
    part = MTPLoss(setup)
    part.mtp = setup.beside["mtp"] = mtp
    return part


def state_of(setup: Setup, *parts: Part) -> TrainState:
    """Multi-token prediction is a part of it where `setup` has its modules."""
    train = setup.config.train
    ahead: Sequence[Part] = [mtp_loss(setup)] if setup.beside else []
    return TrainState(
        model=setup.model,
        linears=setup.linears(),
        optimizers=build_optimizer(setup.model, setup.config.optim, setup.beside),
        skip_policy=SkipPolicy(train.spike_factor, train.max_skipped_steps),
        progress=Progress(train.total_steps, micro_batch=train.batch_size),
        parts=[*ahead, *parts],
        score=setup.score,
    )


def gradient_of(state: TrainState, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The metrics of a batch, whose gradient is in `.grad`."""
    return gradient(state, len(inputs), next_token_loss(state, inputs, targets))
