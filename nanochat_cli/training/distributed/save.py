"""A checkpoint that all ranks write together: each the tensors of its own, rank 0 what lists them and points to it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanochat_cli.formats.run import checkpoints
from nanochat_cli.training.distributed.group import Group


def save_together(
    group: Group,
    run_dir: Path,
    step: int,
    tensors: Mapping[str, Any],
    state: Mapping[str, Any],
    *,
    model_config: Mapping[str, Any],
    best: bool = False,
) -> None:
    """`checkpoints.save` of one rank or more. tensors: what this rank writes. Raises DataError on all ranks."""
    with group.failing_together():
        if group.is_first:
            checkpoints.prepare(run_dir, step)
    written = None
    with group.failing_together():
        written = checkpoints.write(run_dir, step, tensors, group.rank, group.size)
    all_written = group.collect(written)
    with group.failing_together():
        if group.is_first:
            checkpoints.publish(run_dir, step, all_written, state, model_config=model_config, best=best)
