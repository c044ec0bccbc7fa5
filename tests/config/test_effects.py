"""Settings without effect are reported with what they need; complete records of runs and presets are not."""

from fnmatch import fnmatchcase

import pytest

from nanochat_cli.config import presets
from nanochat_cli.config.effects import RULES, why_without_effect
from nanochat_cli.config.keys import leaves
from nanochat_cli.config.load import config_to_toml, resolve_config
from nanochat_cli.config.sources import read_source

IDLE = {
    "optim.lion_lr_mult=0.2": 'needs optim.other = "lion", not "adamw"',
    "lion_weight_decay=0.1": 'needs optim.other = "lion"',
    "optim.galore.rank=64": "needs optim.galore.enabled = true, not false",
    "optim.state_block=128": "needs optim.eight_bit = true",
    "optim.decay_shape=sqrt optim.schedule=cosine": 'needs optim.schedule = "wsd", not "cosine"',
    "muon_momentum=0.9 optim.matrix=adamw": 'needs optim.matrix = "muon", not "adamw"',
    "optim.cautious_weight_decay=true optim.matrix=adamw": 'needs optim.matrix = "muon"',
    "optim.betas=[0.9,0.95] optim.other=lion": "needs optim.other = adamw or optim.matrix = adamw",
    "optim.muon_momentum_start=0.8": "needs both optim.muon_momentum_start and optim.muon_momentum_warmup",
    "optim.head_lr=0.1 model.tie_embeddings=true bigram_init.steps=0": "needs model.tie_embeddings = false, not true",
    "mtp_n_tokens=2": "needs mtp.enabled = true",
    "mtp.n_tokens=2 mtp.kind=nextn mtp.enabled=true": 'needs mtp.kind = "heads" or "shared", not "nextn"',
    "collider_sparsity=0.4": "needs collider.enabled = true",
    "fire.rewarm_steps=10": "needs fire.enabled = true",
    "num_workers=6": "needs loader.enabled = true",
    "num_experts=4": "needs model.moe.enabled = true",
    "model.moe.bias_rate=0.1 use_moe=true": 'needs model.moe.balance = "bias", not "loss"',
    "model.deltanet.chunk=32": "needs model.deltanet.ratio or model.deltanet.pattern",
    "model.mhc.dynamic=false": "needs model.mhc.streams = 2 or 4, not 1",
    "group_size=128 model.quant.enabled=false": "needs model.quant.enabled = true",
    "ffn_mult=3.0 model.ffn_dim=512": "needs model.ffn_dim = none, not 512",
    "data.glob='*.rs' data.path=somewhere": "needs data.path = none, not somewhere",
    "bigram_init.head_lr=0.1 bigram_init.steps=0": "needs bigram_init.steps above 0",
    "fim.spm_rate=0.25": "needs fim.rate above 0",
    "distill.weight=0.9 distill.top_k=8": "needs distill.teacher",
    "model.quant.start=0.2 model.quant.enabled=false": "needs model.quant.enabled = true",
}


@pytest.mark.parametrize("given", IDLE)
def test_a_setting_that_nothing_reads_is_named_with_what_it_needs(given):
    said = []
    resolve_config(["quickstart"], None, given.split(), warn=said.append)
    assert len(said) == 1
    assert "(--set): no effect" in said[0]
    assert IDLE[given] in said[0]


ACTIVE = [
    "optim.lion_lr_mult=0.2 optim.lion_weight_decay=0.1 optim.other=lion",
    "use_galore=true galore_rank=64 galore_update_freq=10",
    "optim.eight_bit=true optim.state_block=128",
    "use_mtp=true mtp_n_tokens=2 mtp_weight=0.1",
    "use_collider=true collider_sparsity=0.4 collider_threshold=0.5",
    "use_async_loader=true num_workers=2 prefetch_batches=4",
    "mtp.enabled=false optim.lr=0.1 data.glob='*.rs'",
    "optim.eps=1e-8 optim.other=lion optim.matrix=adamw",
]


@pytest.mark.parametrize("given", ACTIVE)
def test_a_setting_that_is_read_is_not_mentioned(given):
    said = []
    resolve_config(["quickstart"], None, given.split(), warn=said.append)
    assert said == []


def test_settings_with_the_same_reason_are_one_line_with_their_places(tmp_path):
    file = tmp_path / "flat.toml"
    file.write_text("use_galore = false\ngalore_rank = 64\n")
    said = []
    resolve_config(["quickstart"], file, ["galore_update_freq=7"], warn=said.append)
    assert len(said) == 1
    assert said[0].startswith(f"optim.galore.rank ({file}), optim.galore.update_freq (--set): no effect")


def test_the_record_of_a_run_is_read_again_without_a_warning(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text(config_to_toml(resolve_config(["nano-125m", "llama-cpp"])))
    said = []
    resolve_config((), file, warn=said.append)
    assert said == []


SHIPPED = [preset for preset in presets.available() if preset.name != "llama-cpp"]
"""All but the overlay that turns off what other presets may turn on."""


@pytest.mark.parametrize("preset", SHIPPED, ids=lambda preset: preset.name)
def test_every_key_of_a_preset_has_an_effect(preset):
    config = resolve_config(["quickstart", preset.name] if preset.is_overlay else [preset.name])
    given = {key for one in preset.lineage() for key in read_source(one.values, one.name)}
    assert {key: why for key in given if (why := why_without_effect(key, config)) is not None} == {}


def test_every_pattern_of_the_rules_covers_a_key():
    patterns = [pattern for rule in RULES for pattern in rule.keys.split()]
    assert [pattern for pattern in patterns if not any(fnmatchcase(key, pattern) for key in leaves())] == []
