"""A finished or interrupted run back in memory: model, tokenizer and configuration.

Knows the layout of a run folder; the files themselves are read by `training.checkpoints`,
`data.tokenizer` and `config.load`. Nothing here runs the model.
"""

from pathlib import Path

from nanochat_cli.config.load import load_run_config
from nanochat_cli.config.schema import Config
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import DataError
from nanochat_cli.model.mtp import MTP, build_mtp
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.training import checkpoints


def load_target(target: Path) -> tuple[Transformer, Tokenizer, Config | None]:
    """Model and tokenizer of a run's latest checkpoint or of a `.gguf` file; the configuration of a run."""
    if target.suffix == ".gguf":
        from nanochat_cli.inference.load_gguf import load_gguf

        return (*load_gguf(target), None)
    return load_run(target)


def load_mtp(run_dir: Path, checkpoint: checkpoints.Which = "latest") -> MTP | None:
    """The multi-token prediction of a run, ready for inference; None when it was trained without."""
    config = load_run_config(run_dir)
    mtp = build_mtp(config.model, config.mtp)
    if mtp is not None:
        mtp.load_state_dict(checkpoints.load(run_dir, checkpoint).tensors["mtp"])
        mtp.requantize()
        mtp.eval()
    return mtp


def load_run(run_dir: Path, checkpoint: checkpoints.Which = "latest") -> tuple[Transformer, Tokenizer, Config]:
    """The model of a checkpoint (`latest`, `best` or a step) in float32 on the CPU, ready for inference.

    Raises DataError when the folder is no run, has no such checkpoint, or holds one of another model.
    """
    if not run_dir.is_dir():
        raise DataError(f"{run_dir} is not a folder: name a run, that is a folder with config.toml and checkpoints/")
    config = load_run_config(run_dir)
    tokenizer = Tokenizer.load(run_dir / "tokenizer.json")
    if tokenizer.vocab_size != config.model.vocab_size:
        raise DataError(
            f"{run_dir / 'tokenizer.json'} has {tokenizer.vocab_size} tokens and the model {config.model.vocab_size}: "
            "not the tokenizer it was trained with; copy that of its data set"
        )
    saved = checkpoints.load(run_dir, checkpoint)
    model = Transformer(config.model)
    state = model.state_dict()
    checkpoints.require_same_model(saved, config.model.model_dump(mode="json"), state)
    model.load_state_dict({name: saved.tensors["model"][name] for name in state})
    model.requantize()
    return model.eval(), tokenizer, config
