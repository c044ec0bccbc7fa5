"""Which of several processes this is, as the launcher says in the environment, and what several cannot do yet.

Imports no torch, so that a configuration that cannot be shared is an error within milliseconds.
"""

import os
from typing import TYPE_CHECKING

from nanochat_cli.errors import ConfigError

if TYPE_CHECKING:
    from nanochat_cli.config.schema import Config
    from nanochat_cli.config.sections.train import TrainConfig

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets. Some clusters set a few of them for every process."""


def is_launched() -> bool:
    """Whether a launcher started this process as one rank of a group."""
    return all(name in os.environ for name in LAUNCHED)


def rank() -> int:
    return int(os.environ["RANK"]) if is_launched() else 0


def world_size() -> int:
    return int(os.environ["WORLD_SIZE"]) if is_launched() else 1


def attempt() -> str:
    """How often a launcher has started the ranks again; its store still has what the earlier ones wrote."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def is_owned(config: "Config") -> bool:
    """Whether a run adds in the order of mode `owned`, which mode `fsdp` shares."""
    return config.distributed.mode != "auto" or world_size() > 1


def is_cut(config: "Config", ranks: int) -> bool:
    """Whether ranks have rows of matrices only; one alone has all of them."""
    return config.distributed.mode == "fsdp" and ranks > 1


def turns_of(config: "Config", ranks: int) -> int:
    """In how many turns a rank computes its units: in mode `fsdp` all ranks compute neighbouring ones, one each."""
    return config.train.grad_accum // ranks if is_cut(config, ranks) else 1


def units_of(rank: int, ranks: int, units: int) -> range:
    """The micro-batches of a step that a rank computes."""
    return range(rank * units // ranks, (rank + 1) * units // ranks)


def rows_of(rank: int, ranks: int, train: "TrainConfig", turns: int = 1) -> range:
    """The rows of a step's batch that a rank computes, in the first of so many turns."""
    units = units_of(rank, ranks, train.grad_accum // turns)
    return range(units.start * train.batch_size, units.stop * train.batch_size)


def require_shareable(config: "Config", ranks: int) -> None:
    """Raise ConfigError for what so many ranks cannot share, or mode `owned` does not have yet."""
    units = config.train.grad_accum
    if ranks > units:
        raise ConfigError(
            f"train.grad_accum = {units}: {ranks} ranks need at least one micro-batch each; set train.grad_accum = "
            f"{ranks} or more (and a smaller train.batch_size), or use fewer ranks"
        )
    if ranks > 1 and config.train.device.startswith("cuda:"):
        raise ConfigError(f"train.device = {config.train.device}: each rank takes the GPU of its number; use cuda")
    galore = config.optim.galore
    refused = {
        "optim.galore.unbiased = true": galore.enabled and galore.unbiased,
        "optim.galore.release_gradients = true": galore.enabled and galore.release_gradients,
        "model.quant.start or model.quant.ramp": config.model.quant.begins_in_float,
        "distill.teacher": config.distill.teacher is not None,
        "fire.trigger = dormant": config.fire.enabled and config.fire.trigger == "dormant",
    }
    for setting, is_on in refused.items():
        if is_on and (ranks > 1 or config.distributed.mode != "auto"):
            raise ConfigError(f"{setting}: not with several ranks (distributed.mode = owned) yet; train in one process")
    if config.distributed.mode == "fsdp":
        _require_cuttable(config, ranks)


def _require_cuttable(config: "Config", ranks: int) -> None:
    """Raise ConfigError for what mode `fsdp` lacks or cannot cut into rows, where ranks would wait for each other."""
    model, units = config.model, config.train.grad_accum
    widths = {"model.dim": model.dim, "model.ffn_dim": model.resolved_ffn_dim}
    refused = {
        "model.quant.enabled = false: cuts ternary matrices only": not model.quant.enabled,
        "fire.enabled = true: no rank has all latents": config.fire.enabled,
        "train.compile = on: runs eagerly": config.train.compile == "on",
        f"{ranks} ranks: adds in pairs, and needs a power of two of them": bool(ranks & (ranks - 1)),
        f"train.grad_accum = {units}: all {ranks} ranks compute a micro-batch at a time": bool(units % ranks),
        **{
            f"{name} = {width}: so many rows are not {ranks} equal parts": width % ranks > 0
            for name, width in widths.items()
        },
    }
    for reason, is_so in refused.items():
        if is_so:
            setting, _, why = reason.partition(": ")
            raise ConfigError(f"{setting}: not with distributed.mode = fsdp ({why}); change it, or use mode owned")


def speaks(exit_code: int) -> bool:
    """Whether this process is to print the error that ends it: of several ranks the first one that fails.

    A rank that was interrupted leaves that to rank 0, and all are silent after another one's error.
    """
    if world_size() == 1:
        return True
    if exit_code == 130 and rank() > 0:
        return False
    from datetime import timedelta

    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage] - documented, not in __all__

    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False)
        return store.add(f"nanochat/failed-{attempt()}", 1) == 1
    except RuntimeError:  # the launcher is gone
        return True
