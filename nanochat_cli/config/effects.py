"""Settings that were given and that nothing reads, because what they belong to is off or something else was chosen.

One table says which keys need which other key to have which value. Presets are not asked: an overlay may turn off
what a model preset describes. A shipped preset by itself has no such key (tests/config/test_effects.py).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from nanochat_cli.config.keys import format_value, leaves
from nanochat_cli.config.layers import Layer
from nanochat_cli.config.schema import Config


@dataclass(frozen=True)
class Need:
    """keys: patterns of dotted keys, which have an effect only where `switch` has one of `values`."""

    keys: str
    switch: str
    values: tuple[object, ...]

    def covers(self, key: str) -> bool:
        return key != self.switch and any(fnmatchcase(key, pattern) for pattern in self.keys.split())

    def fails(self, config: Config) -> str | None:
        """What would have to be otherwise; None where the keys have their effect."""
        found = value_of(config, self.switch)
        if found in self.values:
            return None
        wanted = " or ".join(format_value(value) for value in self.values)
        return f"needs {self.switch} = {wanted}, not {format_value(found)}"


@dataclass(frozen=True)
class Rule:
    """As Need, for what takes more than one key to say."""

    keys: str
    holds: Callable[[Config], bool]
    words: str

    def covers(self, key: str) -> bool:
        return any(fnmatchcase(key, pattern) for pattern in self.keys.split())

    def fails(self, config: Config) -> str | None:
        return None if self.holds(config) else self.words


TRAINED = ("policy", "rft")
RULES: tuple[Need | Rule, ...] = (
    Need("mtp.*", "mtp.enabled", (True,)),
    Need("mtp.n_tokens mtp.decay", "mtp.kind", ("heads", "shared")),
    Need("collider.*", "collider.enabled", (True,)),
    Need("collider.reference", "collider.score", ("excess",)),
    Need("fire.*", "fire.enabled", (True,)),
    Need("fire.interval", "fire.trigger", ("dormant", "isometry")),
    Need("fire.dormant_*", "fire.trigger", ("dormant",)),
    Need("fire.isometry_deviation", "fire.trigger", ("isometry",)),
    Need("loader.workers loader.prefetch", "loader.enabled", (True,)),
    Need("optim.galore.*", "optim.galore.enabled", (True,)),
    Need("optim.galore.full_rank_share", "optim.galore.unbiased", (True,)),
    Need("optim.state_block optim.eight_bit_other", "optim.eight_bit", (True,)),
    Need("optim.lion_*", "optim.other", ("lion",)),
    Need("optim.muon_* optim.cautious_weight_decay", "optim.matrix", ("muon",)),
    Need("optim.stable_ratio optim.decay_shape", "optim.schedule", ("wsd",)),
    Need("optim.min_lr_ratio", "optim.schedule", ("wsd", "two_stage", "cosine")),
    Need("optim.head_lr model.head_std", "model.tie_embeddings", (False,)),
    Need("model.qk_norm_init", "model.qk_norm", (True,)),
    Need("model.ffn_mult", "model.ffn_dim", (None,)),
    Need("model.quant.* train.forward train.grad_input", "model.quant.enabled", (True,)),
    Need("model.mhc.*", "model.mhc.streams", (2, 4)),
    Need("model.mhc.gate_init", "model.mhc.dynamic", (True,)),
    Need("model.moe.*", "model.moe.enabled", (True,)),
    Need("model.moe.loss_weight", "model.moe.balance", ("loss",)),
    Need("model.moe.bias_rate", "model.moe.balance", ("bias",)),
    Need("data.source data.glob data.text_field data.streaming data.max_bytes", "data.path", (None,)),
    Need("data.val_fraction data.workers tokenizer.*", "data.path", (None,)),
    Need("tokenizer.pre tokenizer.max_token_length tokenizer.train_bytes", "tokenizer.path", (None,)),
    Need("grpo.library grpo.threshold grpo.max_experiences", "grpo.mode", ("training-free",)),
    Need("grpo.shots grpo.shot_temperature grpo.lessons_* grpo.max_lessons", "grpo.mode", ("training-free",)),
    Need("grpo.lr_factor grpo.batch_size grpo.updates grpo.epochs", "grpo.mode", TRAINED),
    Need("grpo.max_divergence grpo.clip_* grpo.ratio_cap grpo.kl_weight grpo.aggregation", "grpo.mode", ("policy",)),
    Need("grpo.min_reward", "grpo.mode", ("rft",)),
    Rule(
        "optim.betas optim.eps",
        lambda config: "adamw" in (config.optim.matrix, config.optim.other),
        "needs optim.other = adamw or optim.matrix = adamw",
    ),
    Rule(
        "optim.muon_momentum_start optim.muon_momentum_warmup",
        lambda config: config.optim.muon_momentum_start is not None and config.optim.muon_momentum_warmup > 0,
        "needs both optim.muon_momentum_start and optim.muon_momentum_warmup",
    ),
    Rule("bigram_init.*_lr", lambda config: config.bigram_init.steps > 0, "needs bigram_init.steps above 0"),
    Rule(
        "model.deltanet.n_heads model.deltanet.head_dim model.deltanet.conv_kernel model.deltanet.chunk "
        "model.deltanet.backend",
        lambda config: config.model.is_hybrid,
        "needs model.deltanet.ratio or model.deltanet.pattern to place a layer",
    ),
)


def value_of(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    found: Any = config
    for name in key.split("."):
        found = getattr(found, name)
    return found


def why_without_effect(key: str, config: Config) -> str | None:
    """What `key` needs and does not have; None when it has an effect."""
    failures = (rule.fails(config) for rule in RULES if rule.covers(key))
    return next((failure for failure in failures if failure is not None), None)


def warnings(given: Sequence[Layer], config: Config) -> Iterator[str]:
    """A line for each reason that keys of these layers (a file, `--set`, options) have no effect.

    A layer that sets most keys there are is the record of a run, of which nobody expects that all are read.
    """
    by_reason: dict[str, dict[str, str]] = {}
    for layer in given:
        if is_record(layer.settings):
            continue
        for key, setting in layer.settings.items():
            reason = None if setting.value is None else why_without_effect(key, config)
            if reason is not None:
                by_reason.setdefault(reason, {})[key] = setting.origin
    for reason, keys in by_reason.items():
        named = ", ".join(f"{key} ({origin})" for key, origin in keys.items())
        yield f"{named}: no effect; {reason}"


def is_record(keys: Iterable[str]) -> bool:
    """Whether a layer with these keys is a whole configuration, as `config.toml` of a run is."""
    return 2 * len(list(keys)) > len(leaves())
