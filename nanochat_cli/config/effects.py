"""Settings that were given but have no effect, because their feature is off or another option was chosen.

One table says which keys need which value of which other key. Presets are not checked, since an overlay may turn off
what a model preset configures; a shipped preset by itself has no such key (tests/config/test_effects.py).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from nanochat_cli.config.keys import format_value, leaves
from nanochat_cli.config.schema import Config
from nanochat_cli.config.sources import Settings


@dataclass(frozen=True)
class Need:
    """keys: patterns of dotted keys that have an effect only if the key `switch` has one of `values`."""

    keys: str
    switch: str
    values: tuple[object, ...]

    def covers(self, key: str) -> bool:
        return key != self.switch and any(fnmatchcase(key, pattern) for pattern in self.keys.split())

    def fails(self, config: Config) -> str | None:
        """What the keys need, unless they have an effect."""
        actual = value_of(config, self.switch)
        if actual in self.values:
            return None
        wanted = " or ".join(format_value(value) for value in self.values)
        return f"needs {self.switch} = {wanted}, not {format_value(actual)}"


@dataclass(frozen=True)
class Rule:
    """Like Need, for a condition that one key cannot express."""

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
    Need("model.quant.* train.forward train.backward train.grad_input", "model.quant.enabled", (True,)),
    Need("model.mhc.*", "model.mhc.streams", (2, 4)),
    Need("model.mhc.gate_init", "model.mhc.dynamic", (True,)),
    Need("model.moe.*", "model.moe.enabled", (True,)),
    Need("model.moe.loss_weight", "model.moe.balance", ("loss",)),
    Need("model.moe.bias_rate", "model.moe.balance", ("bias",)),
    Need(
        "data.source data.sources data.glob data.text_field data.streaming data.max_bytes data.chat",
        "data.path",
        (None,),
    ),
    Need("data.source", "data.sources", ((),)),
    Need("data.glob data.text_field", "data.chat", (False,)),
    Need("data.gitignore data.max_file_bytes data.generated data.secrets data.functions", "data.path", (None,)),
    Need("data.dedup data.contamination data.val_fraction data.workers tokenizer.*", "data.path", (None,)),
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
    Rule("distill.*", lambda config: config.distill.teacher is not None, "needs distill.teacher"),
    Rule("fim.spm_rate", lambda config: config.fim.rate > 0, "needs fim.rate above 0"),
    Rule(
        "model.deltanet.n_heads model.deltanet.head_dim model.deltanet.conv_kernel model.deltanet.chunk "
        "model.deltanet.backend",
        lambda config: config.model.is_hybrid,
        "needs model.deltanet.ratio or model.deltanet.pattern to place a layer",
    ),
)


def value_of(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def why_without_effect(key: str, config: Config) -> str | None:
    """What `key` needs and does not have, unless it has an effect."""
    failures = (rule.fails(config) for rule in RULES if rule.covers(key))
    return next((failure for failure in failures if failure is not None), None)


def warnings(given: Sequence[Settings], config: Config) -> Iterator[str]:
    """One line per reason why keys of these sources (a file, `--set`, options) have no effect.

    Records of runs are passed over: they have every key, whether it has an effect or not.
    """
    by_reason: dict[str, dict[str, str]] = {}
    for source in given:
        if is_record(source):
            continue
        for key, setting in source.items():
            reason = None if setting.value is None else why_without_effect(key, config)
            if reason is not None:
                by_reason.setdefault(reason, {})[key] = setting.origin
    for reason, keys in by_reason.items():
        named = ", ".join(f"{key} ({origin})" for key, origin in keys.items())
        yield f"{named}: no effect; {reason}"


def is_record(keys: Iterable[str]) -> bool:
    """Whether a source with these keys is a whole configuration, such as the `config.toml` of a run."""
    return 2 * len(list(keys)) > len(leaves())
