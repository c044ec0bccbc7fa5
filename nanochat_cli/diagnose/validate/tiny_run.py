"""The run that the stages train: a model of a million parameters on the corpus in `corpus`, in seconds."""

from collections.abc import Mapping
from pathlib import Path

from nanochat_cli.config.schema import Config
from nanochat_cli.data.manifest import MANIFEST
from nanochat_cli.diagnose.validate.corpus import write_corpus
from nanochat_cli.diagnose.validate.stage import Muted, Workspace
from nanochat_cli.engine import Engine

VOCAB_SIZE = 512
SEQ_LEN = 64


Sections = Mapping[str, Mapping[str, object]]


def train_run(
    workspace: Workspace, name: str, steps: int, sections: Sections | None = None, *, resume: Path | None = None
) -> Path:
    """Train `runs/NAME` for `steps` steps (or resume `resume` up to them) through the Engine; returns its folder.

    sections: merged over the configuration.
    """
    config = run_config(workspace, name, steps, sections or {})
    engine = Engine(Muted())
    if not (workspace.folder / "data" / MANIFEST).exists():
        write_corpus(workspace.corpus)
        engine.tokenize(str(workspace.corpus), workspace.folder / "data", config)
    return engine.train(config, resume)


def run_config(workspace: Workspace, name: str, steps: int, sections: Sections) -> Config:
    """Width 256, which fits every ternary type of GGUF, and the multi-token prediction that drafting needs."""
    values: dict[str, Mapping[str, object]] = {
        "run": {"dir": str(workspace.folder / "runs"), "name": name},
        "model": {
            "vocab_size": VOCAB_SIZE,
            "dim": 256,
            "n_layers": 2,
            "n_heads": 4,
            "n_kv_heads": 2,
            "ffn_dim": 256,
            "max_seq_len": 128,
            "qk_norm": True,
            "embedding_std": 0.8,
            "head_std": 0.001,
        },
        "data": {"path": str(workspace.folder / "data"), "glob": "*.py", "val_fraction": 0.1},
        "train": {
            "total_steps": steps,
            "batch_size": 4,
            "seq_len": SEQ_LEN,
            "device": "cpu",
            "dtype": "fp32",
            "compile": "off",
            "log_interval": 1,
        },
        "eval": {"interval": 1000, "batch_size": 8},
        "optim": {"schedule": "constant", "warmup_steps": 2, "embedding_lr": 0.03},
        "mtp": {"enabled": True, "n_tokens": 2},
        "checkpoint": {"interval": 1000},
        "telemetry": {"interval": 10, "tensorboard": False},
    }
    for section, entries in sections.items():
        values[section] = {**values.get(section, {}), **entries}
    return Config.model_validate(values)
