"""From a configuration to the state that is trained: the model made ready, the parts it asks for, the optimizers.

METHODS is the one list of all parts; what is off is neither built nor saved.
"""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from nanochat_cli.config.schema import Config
from nanochat_cli.model.bitlinear import BitLinear
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.optim import build_optimizer
from nanochat_cli.optim.build import trained_parameters
from nanochat_cli.report.reporter import Reporter
from nanochat_cli.training.devices import choose_autocast, require_float8, require_nvfp4
from nanochat_cli.training.distributed.group import Group
from nanochat_cli.training.distributed.owned import Owned
from nanochat_cli.training.distributed.ranks import is_cut
from nanochat_cli.training.health.streams import StreamHealth
from nanochat_cli.training.health.ternary import TernaryHealth
from nanochat_cli.training.losses import TokenLoss
from nanochat_cli.training.methods.bigram_start import BigramStart
from nanochat_cli.training.methods.collider import TokenFilter
from nanochat_cli.training.methods.distillation import Distillation
from nanochat_cli.training.methods.expert_balance import ExpertBalance
from nanochat_cli.training.methods.fire import Fire
from nanochat_cli.training.methods.float_first import FloatFirst
from nanochat_cli.training.methods.mtp_loss import MTPLoss
from nanochat_cli.training.number_formats import use_configured, use_number_formats
from nanochat_cli.training.part import Part, Setup
from nanochat_cli.training.progress import Progress
from nanochat_cli.training.skip_policy import SkipPolicy
from nanochat_cli.training.state import TrainState
from nanochat_cli.training.training_data import TrainingData

Methods = Mapping[type[Part], Callable[[Config], object]]
METHODS: Methods = {
    Distillation: lambda config: config.distill.teacher is not None,  # before what others add to the loss
    MTPLoss: lambda config: config.mtp.enabled,  # it trains a module, whose layers those below count in
    FloatFirst: lambda config: config.model.quant.begins_in_float,
    BigramStart: lambda config: config.bigram_init.steps,
    Fire: lambda config: config.fire.enabled,
    TokenFilter: lambda config: config.collider.enabled,
    ExpertBalance: lambda config: config.model.moe.enabled,
    TernaryHealth: lambda config: config.model.quant.enabled,
    StreamHealth: lambda config: config.model.mhc.streams > 1,
}
"""Parts in the order in which their hooks run, and whether a configuration asks for them."""


def build_state(
    config: Config,
    device: torch.device,
    reporter: Reporter,
    *,
    model: Transformer | None = None,
    data: TrainingData | None = None,
    methods: Methods | None = None,
    group: Group | None = None,
) -> TrainState:
    """Ready for its first update on `device`. model: by default a new one, with random weights from torch's generator.

    data: for methods that read the corpus themselves. methods: by default METHODS. group: whose ranks train together.
    Raises ConfigError for what this device lacks.
    """
    train = config.train
    autocast_dtype = choose_autocast(train.dtype, device)
    require_float8(train, device)
    require_nvfp4(train, device)
    model = (Transformer(config.model) if model is None else model).to(device).train()
    model.gradient_checkpointing = train.gradient_checkpointing
    model.document_end = None if data is None else data.document_end
    setup = Setup(config, model, TokenLoss.of(model, train, autocast_dtype), device, reporter, data)
    parts = [method(setup) for method, is_on in (METHODS if methods is None else methods).items() if is_on(config)]
    progress = Progress(train.total_steps, micro_batch=train.batch_size)
    use_configured(progress, config)
    linears, owned = setup.linears(), None
    if group is not None:
        owned = divide(config, group, trained_parameters(model, setup.beside), linears, model)
    for part in parts:
        part.owned = owned
    state = TrainState(
        model=model,
        linears=linears,
        optimizers=build_optimizer(model, config.optim, setup.beside, None if owned is None else owned.stepped),
        skip_policy=SkipPolicy(train.spike_factor, train.max_skipped_steps),
        progress=progress,
        score=setup.score,
        parts=parts,
        owned=owned,
        grad_clip=train.grad_clip,
        reporter=reporter,
    )
    use_number_formats(state, config)
    return state


def divide(
    config: Config,
    group: Group,
    parameters: Mapping[str, nn.Parameter],
    linears: Mapping[str, BitLinear],
    model: Transformer,
) -> Owned:
    """What this rank computes and owns. parameters, linears: all that are trained, by name."""
    if not is_cut(config, group.size):
        return Owned(group, parameters, linears, config.train)
    from nanochat_cli.training.distributed.sharded import Sharded  # FSDP2 takes a while to import

    return Sharded(group, parameters, linears, config.train, model)
