"""The whole flat configuration of each published preset, as `nanochat train --config` reads it."""

import pytest
import tomlkit

from nanochat_cli.config.aliases import ALIASES
from nanochat_cli.config.effects import value_of
from nanochat_cli.config.load import resolve_config, with_default_model
from nanochat_cli.config.schema import Config
from nanochat_cli.errors import ConfigError

NANO = """
vocab_size = 32768
hidden_dim = 768
num_layers = 12
num_heads = 12
num_kv_heads = 4
ffn_mult = 3.5
max_seq_len = 2048
group_size = 128
mhc_n_streams = 2
use_mtp = true
mtp_n_tokens = 4
mtp_weight = 0.2
use_collider = true
collider_threshold = 0.35
collider_sparsity = 0.35
use_async_loader = true
async_n_workers = 4
async_prefetch_size = 8
use_8bit_optim = false
total_steps = 20000
batch_size = 2
seq_length = 2048
learning_rate = 0.02
warmup_steps = 200
weight_decay = 0.1
grad_clip = 1.0
entropy_weight = 0.0001
schedule_type = "wsd"
stable_ratio = 0.6
min_lr_ratio = 0.1
gradient_checkpointing = false
muon_momentum = 0.95
"""
MEDIUM = """
vocab_size = 32768
dim = 1536
n_layers = 27
n_heads = 24
n_kv_heads = 8
ffn_mult = 1.8
max_seq_len = 4096
group_size = 128
mhc_n_streams = 4
deltanet_ratio = 0.3
use_moe = true
n_experts = 8
n_active_experts = 2
use_mtp = true
mtp_n_tokens = 3
mtp_weight = 0.2
use_async_loader = true
num_workers = 6
prefetch_batches = 12
use_8bit_optim = true
total_steps = 50000
batch_size = 2
seq_length = 4096
lr = 0.015
warmup_steps = 500
weight_decay = 0.05
grad_clip = 0.5
schedule_type = "wsd"
decay_start_frac = 0.8
min_lr_ratio = 0.05
gradient_checkpointing = true
muon_momentum = 0.9
"""
FULL = """
hidden_dim = 1280
num_layers = 20
num_heads = 20
num_kv_heads = 4
ffn_mult = 4.0
max_seq_len = 2048
use_moe = true
num_experts = 4
num_active_experts = 2
use_mtp = true
mtp_n_tokens = 3
mtp_weight = 0.2
use_collider = true
collider_threshold = 0.3
collider_sparsity = 0.35
use_async_loader = true
async_n_workers = 6
async_prefetch_size = 12
use_8bit_optim = true
use_galore = true
galore_rank = 256
galore_update_freq = 200
lion_lr_mult = 0.2
lion_weight_decay = 0.01
total_steps = 20000
batch_size = 8
seq_length = 2048
learning_rate = 0.02
[optim]
other = "lion"
"""
PUBLISHED = {"nano": NANO, "medium": MEDIUM, "full": FULL}


def resolve(tmp_path, text: str) -> tuple[Config, list[str]]:
    """The configuration that `nanochat train --config FILE` uses, and its warnings."""
    file = tmp_path / "published.toml"
    file.write_text(text)
    said: list[str] = []
    return resolve_config(with_default_model([], file, "quickstart"), file, warn=said.append), said


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_flat_key_reaches_its_place_and_has_an_effect(tmp_path, name):
    config, said = resolve(tmp_path, PUBLISHED[name])
    flat = tomlkit.parse(PUBLISHED[name]).unwrap()
    flat.pop("optim", None)
    assert {key: value_of(config, ALIASES[key]) for key in flat} == flat
    assert said == []
    assert config.model.ffn_dim is None
    assert config.train.time_budget is None


def test_the_sizes_of_the_published_models_follow_from_their_flat_keys(tmp_path):
    nano, medium = (resolve(tmp_path, text)[0].model for text in (NANO, MEDIUM))
    assert (nano.resolved_ffn_dim, nano.resolved_head_dim) == (2816, 64)  # 3.5 × 768 = 2688, up to 256
    assert (medium.resolved_ffn_dim, medium.resolved_head_dim) == (2816, 64)  # 1.8 × 1536 = 2765
    assert sum(medium.delta_layers) == 8  # 30 % of 27


def test_the_published_files_together_use_every_flat_spelling():
    used = {key for text in PUBLISHED.values() for key in tomlkit.parse(text).unwrap()} - {"optim"}
    assert used == ALIASES.keys()


def test_token_filtering_of_the_published_medium_is_refused_with_its_reason(tmp_path):
    with pytest.raises(ConfigError, match=r"collider\.enabled needs model\.deltanet off: .* tokens"):
        resolve(tmp_path, MEDIUM + "use_collider = true\n")
