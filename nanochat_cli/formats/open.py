"""A run or a GGUF file back in memory: model, tokenizer and, for a run, its configuration.

Knows the layout of a run folder; `formats.run.checkpoints`, `data.tokenizer` and `config.load` read the
files themselves. Nothing here runs the model.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from nanochat_cli.config.load import load_run_config
from nanochat_cli.config.schema import Config
from nanochat_cli.config.sections.fim import FimConfig
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import DataError
from nanochat_cli.formats.run import checkpoints
from nanochat_cli.formats.run.same_model import require_same_model, require_same_part
from nanochat_cli.model.mtp import MTP, build_mtp
from nanochat_cli.model.transformer import Transformer

TERNARY_SHARE = "ternary_share"
"""λ of the last step of a run that begins in float, among the values of a checkpoint; 1 where there is none."""


@dataclass(frozen=True)
class LoadedRun:
    """One checkpoint of a run: the model in float32 on the CPU, ready for inference, and what belongs to it."""

    folder: Path
    model: Transformer
    tokenizer: Tokenizer
    config: Config
    step: int
    sha256: str
    """Hash of the file with the model's tensors."""
    parts: dict[str, Any]
    """The checkpoint's tensors besides the model's and the optimizer's: telemetry, mtp, …"""
    ternary_share: float = 1.0
    """Below 1 the run was on its way from float to ternary (`model.quant.start`), and the model is a float one."""

    def __str__(self) -> str:
        """Tells a person who named neither which run and which checkpoint were taken, and what it is not yet."""
        way = f", {self.ternary_share:.0%} of the way from float to ternary weights"
        return f"{self.folder}, step {self.step}{'' if self.ternary_share == 1 else way}"

    def require_ternary(self) -> None:
        """Raise DataError for a checkpoint of a run that begins in float and was not ternary yet."""
        if self.ternary_share < 1:
            raise DataError(
                f"{self}: it is not exported, since the model is not what the run is for; let the run go on with: "
                f"nanochat train --resume {self.folder}"
            )

    def mtp(self) -> MTP | None:
        """The multi-token prediction, ready for inference; None if the run was trained without."""
        mtp = build_mtp(self.config.model, self.config.mtp)
        if mtp is not None:
            require_same_part(self, "mtp", self.parts.get("mtp", {}), mtp.state_dict())
            mtp.load_state_dict(self.parts["mtp"])
            mtp.requantize()
            mtp.eval()
        return mtp


def load_target(target: Path, which: checkpoints.Which = "latest") -> tuple[Transformer, Tokenizer, LoadedRun | None]:
    """Model and tokenizer of a run's checkpoint or of a `.gguf` file; for a run also the rest."""
    if target.suffix == ".gguf":
        from nanochat_cli.formats.gguf.read import load_gguf

        return (*load_gguf(target), None)
    run = open_run(target, which)
    return run.model, run.tokenizer, run


def trained_fim(target: Path, config: Config | None) -> FimConfig:
    """How a model was trained to fill in: by the configuration of its run, or by what its GGUF file says."""
    if config is not None:
        return config.fim
    from nanochat_cli.formats.gguf.file import GGUFFile

    fields = GGUFFile(target).fields
    said = {key: fields[f"nanochat.fim.{key}"] for key in FimConfig.model_fields if f"nanochat.fim.{key}" in fields}
    try:
        return FimConfig.model_validate(said)
    except ValidationError as error:
        raise DataError(f"{target}: nanochat.fim.* is damaged; export the file again") from error


def load_mtp(run_dir: Path, which: checkpoints.Which = "latest") -> MTP | None:
    """The multi-token prediction of a run, ready for inference; None if it was trained without."""
    return open_run(run_dir, which).mtp()


def load_run(run_dir: Path, which: checkpoints.Which = "latest") -> tuple[Transformer, Tokenizer, Config]:
    """Model, tokenizer and configuration of `open_run`."""
    run = open_run(run_dir, which)
    return run.model, run.tokenizer, run.config


def open_run(run_dir: Path, which: checkpoints.Which = "latest") -> LoadedRun:
    """Load a checkpoint of a run: `latest`, `best` or a step.

    Raises DataError if the folder is not a run, has no such checkpoint, or holds one of another model.
    """
    if not run_dir.is_dir():
        raise DataError(f"{run_dir} is not a folder: name a run, a folder with config.toml and checkpoints/")
    config = load_run_config(run_dir)
    tokenizer = Tokenizer.load(run_dir / "tokenizer.json")
    if tokenizer.vocab_size != config.model.vocab_size:
        raise DataError(
            f"{run_dir / 'tokenizer.json'} has {tokenizer.vocab_size} tokens and the model {config.model.vocab_size}: "
            "not the tokenizer it was trained with; copy the one from its data set"
        )
    saved = checkpoints.load(run_dir, which)
    model = Transformer(config.model)
    state = model.state_dict()
    require_same_model(saved, config.model.model_dump(mode="json"), state)
    model.load_state_dict({name: saved.tensors["model"][name] for name in state})
    share = saved.state.get(TERNARY_SHARE, 1.0)
    model = _in_float(model, share) if share < 1 else model
    model.requantize()
    parts = {name: tensors for name, tensors in saved.tensors.items() if name not in ("model", "optimizer")}
    return LoadedRun(run_dir, model.eval(), tokenizer, config, saved.step, saved.sha256["model"], parts, share)


@torch.no_grad()
def _in_float(model: Transformer, share: float) -> Transformer:
    """The float model whose weights are those that a training from float to ternary multiplies with.

    Its activations are not rounded; in training they are between x and int8(x).
    """
    config = model.config.model_copy(update={"quant": model.config.quant.model_copy(update={"enabled": False})})
    twin = Transformer(config)
    for _, layer in model.linears():
        ternary = layer.ternary().dequantize()
        layer.weight.data = layer.weight + share * (ternary - layer.weight)
    twin.load_state_dict(model.state_dict())
    return twin
