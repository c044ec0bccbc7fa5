"""A model and a corpus so small that the whole chain runs in seconds."""

from pathlib import Path

TINY = [
    *("--preset", "quickstart", "--preset", "cpu", "--set", "model.vocab_size=300", "--set", "model.n_layers=1"),
    *("--set", "model.dim=64", "--set", "model.ffn_dim=256", "--set", "train.time_budget=none"),
    *("--set", "train.seq_len=32", "--set", "train.batch_size=2", "--set", "train.compile=off"),
    *("--set", "telemetry.tensorboard=false", "--set", "train.backward=exact", "--set", "train.attention=torch"),
    *("--set", "optim.muon_format=fp32"),
]
"""Options of `nanochat train`. A width of 64 fits llama.cpp's blocks of 64 weights and not those of 256.

Number formats are fixed: a run that measures them is not the same on a busy machine.
"""


def write_corpus(folder: Path, files: int = 60, lines: int = 4) -> None:
    """A folder of small sources, no two alike."""
    folder.mkdir(parents=True)
    for number in range(files):
        body = "".join(f"    x = x * {number + i} + {i}\n" for i in range(lines))
        (folder / f"f{number}.py").write_text(f"def f{number}(x):\n{body}    return x\n")
