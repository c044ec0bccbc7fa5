"""Flat spellings of keys that published configs of this family use, and where each belongs.

Knows only names: what a spelling means, and which spellings belong to features that this version
does not have. Reading, merging and reporting are left to `config.layers`.
"""

from collections.abc import Callable
from dataclasses import dataclass

ALIASES: dict[str, str] = {
    "hidden_dim": "model.dim",
    "dim": "model.dim",
    "num_layers": "model.n_layers",
    "n_layers": "model.n_layers",
    "num_heads": "model.n_heads",
    "n_heads": "model.n_heads",
    "num_kv_heads": "model.n_kv_heads",
    "n_kv_heads": "model.n_kv_heads",
    "ffn_mult": "model.ffn_mult",
    "max_seq_len": "model.max_seq_len",
    "group_size": "model.quant.scale",
    "total_steps": "train.total_steps",
    "batch_size": "train.batch_size",
    "seq_length": "train.seq_len",
    "grad_clip": "train.grad_clip",
    "entropy_weight": "train.entropy_weight",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "learning_rate": "optim.lr",
    "lr": "optim.lr",
    "warmup_steps": "optim.warmup_steps",
    "weight_decay": "optim.weight_decay",
    "schedule_type": "optim.schedule",
    "stable_ratio": "optim.stable_ratio",
    "decay_start_frac": "optim.stable_ratio",
    "min_lr_ratio": "optim.min_lr_ratio",
    "muon_momentum": "optim.muon_momentum",
    "lion_lr_mult": "optim.lion_lr_mult",
    "lion_weight_decay": "optim.lion_weight_decay",
    "use_mtp": "mtp.enabled",
    "mtp_n_tokens": "mtp.n_tokens",
    "mtp_weight": "mtp.weight",
    "mhc_n_streams": "model.mhc.streams",
    "deltanet_ratio": "model.deltanet.ratio",
    "use_moe": "model.moe.enabled",
    "num_experts": "model.moe.experts",
    "n_experts": "model.moe.experts",
    "num_active_experts": "model.moe.active",
    "n_active_experts": "model.moe.active",
}
"""Flat key -> dotted key of the schema."""


@dataclass(frozen=True)
class Feature:
    """A feature that this version does not have."""

    name: str


@dataclass(frozen=True)
class AbsentKey:
    """A key of an absent feature. `turns_on(value)` says whether the value asks for the feature."""

    feature: Feature
    turns_on: Callable[[object], bool]


def _never(_value: object) -> bool:
    return False


_COLLIDER = Feature("Collider token filtering")
_LOADER = Feature("the asynchronous loader")
_8BIT = Feature("8-bit optimizer state")
_GALORE = Feature("GaLore")

ABSENT: dict[str, AbsentKey] = {
    "use_collider": AbsentKey(_COLLIDER, bool),
    "collider_threshold": AbsentKey(_COLLIDER, _never),
    "collider_sparsity": AbsentKey(_COLLIDER, _never),
    "use_async_loader": AbsentKey(_LOADER, bool),
    "async_n_workers": AbsentKey(_LOADER, _never),
    "num_workers": AbsentKey(_LOADER, _never),
    "async_prefetch_size": AbsentKey(_LOADER, _never),
    "prefetch_batches": AbsentKey(_LOADER, _never),
    "use_8bit_optim": AbsentKey(_8BIT, bool),
    "use_galore": AbsentKey(_GALORE, bool),
    "galore_rank": AbsentKey(_GALORE, _never),
    "galore_update_freq": AbsentKey(_GALORE, _never),
}
"""Flat keys of features without a section yet. One that merely describes a feature never turns it on."""

ABSENT_SECTIONS: dict[str, Feature] = {
    "collider": _COLLIDER,
    "loader": _LOADER,
    "fire": Feature("FIRE"),
    "optim.galore": _GALORE,
}
"""Sections that such features will have."""
