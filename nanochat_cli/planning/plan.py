"""The whole plan of a configuration: what it has, what a token costs, how large it gets, how long it takes."""

from dataclasses import dataclass

from nanochat_cli.config.schema import Config
from nanochat_cli.config.size import ParameterCounts, count_parameters
from nanochat_cli.planning.memory import Memory, training_memory
from nanochat_cli.training.flops import model_flops_per_token

TERNARY_BITS = 2.0625
"""Of TQ2_0 per weight, scales included."""
VOCABULARY_BYTES_PER_TOKEN = 24
"""Text, type and merge of a token in a GGUF file, about; the rest of the metadata is negligible."""


@dataclass(frozen=True)
class Plan:
    """memory: of a training step; gguf_bytes: TQ2_0 with an F16 embedding and head; tokens: of the whole run."""

    parameters: ParameterCounts
    mtp_parameters: int
    flops_per_token: float
    memory: Memory
    gguf_bytes: int
    tokens: int
    utilisation: float
    peak_flops: float

    @property
    def seconds(self) -> float:
        """Of training, at the stated utilisation of the peak."""
        return self.tokens * self.flops_per_token / (self.utilisation * self.peak_flops)


def make_plan(config: Config, *, tokens: int | None, utilisation: float, peak_flops: float) -> Plan:
    """tokens: default those of train.total_steps."""
    train = config.train
    counts = count_parameters(config.model)
    return Plan(
        parameters=counts,
        mtp_parameters=_mtp_parameters(config),
        flops_per_token=model_flops_per_token(config.model, train.seq_len),
        memory=training_memory(config),
        gguf_bytes=gguf_bytes(config, counts),
        tokens=tokens or train.total_steps * train.batch_size * train.grad_accum * train.seq_len,
        utilisation=utilisation,
        peak_flops=peak_flops,
    )


def gguf_bytes(config: Config, counts: ParameterCounts) -> int:
    """Ternary matrices at 2.0625 bits, embedding and head in F16, everything else in F32."""
    ternary = counts.matrices * (TERNARY_BITS / 8 if config.model.quant.enabled else 2)
    halves = 2 * (counts.embedding + counts.head)
    floats = 4 * (counts.total - counts.matrices - counts.embedding - counts.head)
    return round(ternary + halves + floats + VOCABULARY_BYTES_PER_TOKEN * config.model.vocab_size)


def _mtp_parameters(config: Config) -> int:
    import torch

    from nanochat_cli.model.mtp import build_mtp

    with torch.device("meta"):
        mtp = build_mtp(config.model, config.mtp)
    return 0 if mtp is None else sum(p.numel() for p in mtp.parameters())
