"""Which optimizer trains which parameter: the groups, and one object that steps them all.

Matrices of the blocks go to Muon (or AdamW), in a low-rank subspace if so configured; embedding, head, and vectors to
AdamW or Lion, each with its own learning rate. State is in float32, or in 8 bits for the matrices or for all.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nanochat_cli.config.sections.optim import OptimConfig
from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.model.bitlinear import BitLinear
from nanochat_cli.model.moe import ExpertLinear
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.optim.adamw import AdamW, AdamW8bit
from nanochat_cli.optim.galore import GaLore
from nanochat_cli.optim.lion import Lion
from nanochat_cli.optim.muon import Muon
from nanochat_cli.optim.schedules import WarmUps, lr_multiplier, muon_momentum, weight_decay_multiplier


class Optimizer(Protocol):
    weight_decay: float

    def step(self, lr: float) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
    def state_tensors(self) -> list[Tensor]: ...


@dataclass
class Group:
    """One optimizer, its peak learning rate and its weight decay. names: the parameters it trains."""

    name: str
    optimizer: Optimizer
    lr: float
    weight_decay: float
    names: list[str]

    def state_bytes(self) -> int:
        """Bytes of the state tensors that exist now."""
        return sum(t.numel() * t.element_size() for t in self.optimizer.state_tensors())


class Optimizers:
    """All groups of a model, stepped together."""

    def __init__(self, groups: list[Group], parameters: list[nn.Parameter], config: OptimConfig) -> None:
        self.groups = groups
        self.config = config
        self.parameters = parameters
        self.lr_factor = 1.0
        """A factor besides the schedule's: below 1 while the learning rates climb again after a reinitialisation."""

    def step(self, step: int, total_steps: int | None, warm_ups: WarmUps | None = None) -> float:
        """Update every parameter by the schedules for this 0-based step; returns the factor on the peak rates.

        total_steps: None while unknown, so that nothing decays. warm_ups: by default those that fit total_steps.
        """
        if warm_ups is None:
            warm_ups = WarmUps.configured(self.config)
            warm_ups = warm_ups if total_steps is None else warm_ups.within(total_steps)
        factor = self.lr_factor * lr_multiplier(step, total_steps, self.config, warm_ups.rate)
        decay = weight_decay_multiplier(step, total_steps, self.config)
        for group in self.groups:
            if isinstance(group.optimizer, Muon | GaLore) and self.config.matrix == "muon":
                group.optimizer.momentum = muon_momentum(step, self.config, warm_ups.momentum)
            group.optimizer.weight_decay = group.weight_decay * decay
            group.optimizer.step(group.lr * factor)
        return factor

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        for group in self.groups:
            if isinstance(group.optimizer, GaLore):
                group.optimizer.zero_grad()

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Scale all gradients to a global norm of at most max_norm (0: measure only). Returns the norm, 0-dim.

        For gradients released in the backward pass their projections count, which are all that a step uses.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        collected = [
            t for g in self.groups if isinstance(g.optimizer, GaLore) for t in g.optimizer.collected_gradients()
        ]
        norm = torch.nn.utils.get_total_norm(gradients + collected)
        if max_norm > 0 and _may_exceed(norm, max_norm):  # else it would multiply by 1
            torch.nn.utils.clip_grads_with_norm_(self.parameters, max_norm, norm)
            for tensor in collected:
                tensor.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def state_dict(self) -> dict[str, Any]:
        """{group: {parameter name: {state name: tensor}}}"""
        return {group.name: group.optimizer.state_dict() for group in self.groups}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. Raises DataError for the state of other optimizers."""
        for group in self.groups:
            saved, own = state.get(group.name, {}), group.optimizer.state_dict()
            for name in group.names:
                stored, expected = frozenset(saved.get(name, ())), frozenset(own[name])
                if stored and stored != expected:
                    key = _differing_key(group.name, stored, expected)
                    raise DataError(
                        f"the checkpoint was trained with another {key} (it has {', '.join(sorted(stored))} of {name}, "
                        f"not {', '.join(sorted(expected))}): resume with the one it was trained with"
                    )
            group.optimizer.load_state_dict(saved)

    def reset(self, names: Collection[str]) -> None:
        """Zero the state of these parameters, as if they had never been stepped.

        The subspaces of low-rank state stay, since all matrices of a shape get new ones together.
        """
        for group in self.groups:
            kept = ("projection", "step") if isinstance(group.optimizer, GaLore) else ()
            state = group.optimizer.state_dict()
            chosen = [state[name] for name in group.names if name in names and name in state]
            tensors = [t for one in chosen for key, t in one.items() if not key.startswith(kept)]
            for tensor in tensors:
                tensor.zero_()
            if tensors:  # state_dict may have returned copies
                group.optimizer.load_state_dict(state)

    def state_bytes(self) -> int:
        return sum(group.state_bytes() for group in self.groups)


def trained_parameters(model: nn.Module, beside: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Those of a model, and those beside it under their prefix, by name."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for prefix, module in beside.items():
        named |= {f"{prefix}.{name}": p for name, p in module.named_parameters()}
    return named


def build_optimizer(
    model: Transformer,
    config: OptimConfig,
    beside: Mapping[str, nn.Module] | None = None,
    stepped: Mapping[str, nn.Parameter] | None = None,
) -> Optimizers:
    """Assign every trained parameter to exactly one group.

    beside: what is trained beside the model, by the prefix of its parameters' names. stepped: the parameters, or rows
    of them, that this process steps; None: all. What happens to a parameter does not depend on which others there are.
    """
    matrices = {f"{name}.weight" for name, _ in model.linears()}
    experts = {f"{name}.weight": m.experts for name, m in model.named_modules() if isinstance(m, ExpertLinear)}
    for prefix, module in (beside or {}).items():
        matrices |= {f"{prefix}.{name}.weight" for name, m in module.named_modules() if isinstance(m, BitLinear)}
    named = trained_parameters(model, beside or {})
    members: dict[str, list[tuple[str, nn.Parameter]]] = {"matrix": [], "embedding": [], "head": [], "scalar": []}
    for name, parameter in (named if stepped is None else stepped).items():
        kind = "matrix" if name in matrices else name.split(".")[0]
        members[kind if kind in members else "scalar"].append((name, parameter))
    rates = {
        "matrix": config.lr,
        "embedding": config.embedding_lr,
        "head": config.head_lr,
        "scalar": config.scalar_lr,
    }
    groups = []
    for kind, parameters in members.items():
        if parameters:
            optimizer, factor = _optimizer(kind, parameters, config, experts)
            names = [name for name, _ in parameters]
            groups.append(Group(kind, optimizer, rates[kind] * factor, optimizer.weight_decay, names))
    return Optimizers(groups, [*named.values(), *(stepped or {}).values()], config)


def build_matrix_optimizer(
    parameters: list[tuple[str, nn.Parameter]], config: OptimConfig, experts: Mapping[str, int] | None = None
) -> Muon | GaLore:
    """Muon, or whatever GaLore has inside, for 2-D parameters; experts: matrices in a parameter, if more than one.

    Raises ConfigError for settings that GaLore cannot honour together.
    """
    block = config.state_block if config.eight_bit else None
    if config.galore.enabled:
        return _galore(parameters, config, experts or {}, block)
    return Muon(
        parameters,
        momentum=config.muon_momentum,
        nesterov=config.muon_nesterov,
        ns_steps=config.muon_ns_steps,
        coefficients=config.muon_coefficients,
        weight_decay=config.weight_decay,
        cautious=config.cautious_weight_decay,
        equilibrate=config.muon_equilibrate,
        variance_beta=config.muon_variance_beta,
        matrices=experts,
        state_block=block,
    )


def _may_exceed(norm: Tensor, max_norm: float) -> bool:
    """False where it is known, without waiting for a device, that a norm is within its limit."""
    return norm.device.type != "cpu" or not bool(max_norm / (norm + 1e-6) >= 1)


def _differing_key(group: str, stored: frozenset[str], expected: frozenset[str]) -> str:
    """The setting that explains the different names of state."""
    kinds = [
        frozenset(name.removesuffix("_codes").removesuffix("_scales") for name in names) for names in (stored, expected)
    ]
    if kinds[0] == kinds[1]:
        return "optim.eight_bit" if group == "matrix" else "optim.eight_bit_other"
    if group != "matrix":
        return "optim.other"
    inner = [kind - {"projection", "step"} for kind in kinds]
    return "optim.galore.enabled" if inner[0] == inner[1] else "optim.matrix"


def _optimizer(
    kind: str, parameters: list[tuple[str, nn.Parameter]], config: OptimConfig, experts: Mapping[str, int]
) -> tuple[Optimizer, float]:
    """The optimizer of a group, and the factor that its kind puts on the AdamW learning rate."""
    if kind == "matrix" and (config.galore.enabled or config.matrix == "muon"):
        return build_matrix_optimizer(parameters, config, experts), 1.0
    block = config.state_block if config.eight_bit and (kind == "matrix" or config.eight_bit_other) else None
    decay = config.weight_decay if kind == "matrix" else 0.0
    if kind != "matrix" and config.other == "lion":
        return Lion(parameters, weight_decay=config.lion_weight_decay, state_block=block), config.lion_lr_mult
    if block is not None:
        adamw = AdamW8bit(parameters, betas=config.betas, eps=config.eps, weight_decay=decay, state_block=block)
        return adamw, 1.0
    return AdamW(parameters, betas=config.betas, eps=config.eps, weight_decay=decay), 1.0


def _galore(
    parameters: list[tuple[str, nn.Parameter]], config: OptimConfig, experts: Mapping[str, int], block: int | None
) -> GaLore:
    """Raises ConfigError for settings that it cannot honour together."""
    galore = config.galore
    if galore.unbiased and config.matrix != "muon":
        raise ConfigError(f"optim.galore.unbiased needs optim.matrix = muon, not {config.matrix}")
    if galore.unbiased and galore.full_rank_share >= 1:
        raise ConfigError("optim.galore.full_rank_share = 1 leaves nothing to the subspaces: use a share below 1")
    if galore.unbiased and galore.release_gradients:
        raise ConfigError(
            "optim.galore.release_gradients drops the whole gradients that optim.galore.unbiased needs: turn one off"
        )
    for key in ("muon_equilibrate", "muon_variance_beta"):
        if getattr(config, key):
            raise ConfigError(
                f"optim.{key} = {getattr(config, key)} needs the rows of whole matrices, which optim.galore does not "
                "keep: turn one off"
            )
    return GaLore(
        parameters,
        galore,
        inner=config.matrix,
        momentum=config.muon_momentum,
        nesterov=config.muon_nesterov,
        ns_steps=config.muon_ns_steps,
        coefficients=config.muon_coefficients,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        cautious=config.cautious_weight_decay and config.matrix == "muon",
        matrices=experts,
        state_block=block,
    )
