"""Stage `methods`: all training methods that presets combine, at once, for a few steps."""

from pathlib import Path

import numpy as np
import torch

from nanochat_cli.data.async_loader import AsyncLoader
from nanochat_cli.data.loader import open_batches, source_spec
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.diagnose.validate.stage import Figure, Muted, Value, Workspace
from nanochat_cli.diagnose.validate.tiny_run import SEQ_LEN, Sections, run_config, train_run
from nanochat_cli.diagnose.validate.training import finite_losses, state_of
from nanochat_cli.errors import ValidationFailure
from nanochat_cli.report.metrics_log import read_metrics

STEPS, FIRE_AFTER = 12, 6
SPARSITY = 0.4
EXPECTED = (
    *("loss/mtp_1", "loss/mtp_2", "collider/kept_fraction", "collider/kept_loss", "throughput/busy_fraction"),
    *("fire/dfi_before", "fire/dfi_after", "ternary/flip_rate", "ternary/zero_fraction"),
)
METHODS: Sections = {
    "model": {"dim": 128, "ffn_dim": 256, "max_seq_len": SEQ_LEN, "mhc": {"streams": 2}},
    "optim": {
        "schedule": "constant",
        "eight_bit": True,
        "galore": {"enabled": True, "rank": 16, "update_freq": 5},
    },
    "mtp": {"enabled": True, "n_tokens": 2},
    "collider": {"enabled": True, "sparsity": SPARSITY, "warmup_steps": 3},
    "loader": {"enabled": True, "workers": 1, "prefetch": 2},
    "fire": {"enabled": True, "steps": [FIRE_AFTER], "rewarm_steps": 2},
    "telemetry": {"interval": 4, "tensorboard": False},
}
"""mHC-lite, multi-token prediction, Collider, the asynchronous loader, 8-bit state, GaLore and FIRE."""


def methods(workspace: Workspace) -> Figure:
    """Losses stay finite, and the telemetry of every method shows that it had an effect."""
    run = train_run(workspace, "methods", STEPS, METHODS)
    losses = finite_losses(run, STEPS)
    seen: dict[str, float] = {}
    for line in read_metrics(run):
        seen |= {name: value for name, value in line.items() if value is not None}
    if missing := [name for name in EXPECTED if name not in seen]:
        raise ValidationFailure(f"no finite {missing[0]} in metrics.jsonl of a run with every method on")
    kept = seen["collider/kept_fraction"]
    if not abs(1 - SPARSITY - kept) < 0.1:
        raise ValidationFailure(f"Collider kept {kept:.0%} of the tokens instead of {1 - SPARSITY:.0%}")
    optimized = _require_small_state(run)
    n_batches = _require_same_batches(workspace)
    before, after = seen["fire/dfi_before"], seen["fire/dfi_after"]
    if not after < before:
        raise ValidationFailure(f"FIRE left matrices {after:.2e} from isometries, no closer than {before:.2e} before")
    return Figure(
        f"loss {losses[0]:.2f} → {losses[-1]:.2f} in {STEPS} steps; Collider kept {kept:.0%} of the tokens; FIRE: "
        f"deviation from isometry {before:.1e} → {after:.1e}; {n_batches} batches read ahead equal",
        [
            Value("training loss, first step", losses[0], "nats per token"),
            Value("training loss, last step", losses[-1], "nats per token"),
            Value("tokens that Collider kept", kept, "share"),
            Value("deviation from isometry before FIRE", before, "1"),
            Value("deviation from isometry after FIRE", after, "1"),
            Value("matrices with an int8 subspace and momentum", optimized, "matrices"),
            Value("batches read ahead that are those read directly", n_batches, "batches"),
        ],
    )


def _require_small_state(run: Path) -> int:
    """How many matrices keep GaLore's projection and its momentum as int8 codes: all, or ValidationFailure."""
    matrices = state_of(run)["optimizer"]["matrix"]
    for name, state in matrices.items():
        for kind in ("projection_codes", "momentum_codes"):
            if kind not in state or state[kind].dtype != torch.int8:
                raise ValidationFailure(f"the optimizer has no int8 {kind.removesuffix('_codes')} of {name}")
    return len(matrices)


def _require_same_batches(workspace: Workspace) -> int:
    """How many batches read ahead equal those read directly: all, or ValidationFailure."""
    config = run_config(workspace, "methods", STEPS, METHODS)
    reader = ShardReader(workspace.folder / "data", vocab_size=config.model.vocab_size)
    ahead = open_batches(reader, config)
    direct = source_spec(reader, config, Muted()).open()
    if not isinstance(ahead, AsyncLoader):
        raise ValidationFailure("loader.enabled = true, but batches are not read ahead")
    with ahead:
        for index in range(STEPS):
            pairs = zip(ahead.batch(index), direct.batch(index), strict=True)
            if not all(np.array_equal(one, other) for one, other in pairs):
                raise ValidationFailure(f"batch {index} read ahead differs from the one read directly")
    return STEPS
