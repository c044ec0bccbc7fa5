"""The plan of a configuration: its parameters, the cost of a token, the size of its file, the length of its run."""

from dataclasses import dataclass
from typing import Literal

from nanochat_cli.config.schema import Config
from nanochat_cli.config.size import ParameterCounts
from nanochat_cli.diagnose.plan.memory import Memory, training_memory
from nanochat_cli.training.flops import training_flops_per_token

TERNARY_BITS = 2.0625
"""Bits per weight in TQ2_0, scales included."""
VOCABULARY_BYTES_PER_TOKEN = 24
"""Roughly the text, type and merge of a token in a GGUF file; the rest of the metadata is negligible."""


@dataclass(frozen=True)
class Plan:
    """memory: of a training step; gguf_bytes: TQ2_0 with an F16 embedding and head.

    tokens, seconds: for the whole run, at the given utilisation of the peak; None if they depend on a peak that is
    unknown. bound: what ends the run.
    """

    parameters: ParameterCounts
    mtp_parameters: int
    flops_per_token: float
    memory: Memory
    gguf_bytes: int
    tokens_per_step: int
    tokens: int | None
    seconds: float | None
    bound: Literal["--tokens", "train.total_steps", "train.time_budget"]

    @property
    def steps(self) -> int | None:
        return None if self.tokens is None else max(1, self.tokens // self.tokens_per_step)


def make_plan(config: Config, *, tokens: int | None, utilisation: float, peak_flops: float | None) -> Plan:
    """tokens: by default what train.total_steps and train.time_budget allow, whichever ends first."""
    train = config.train
    counts = config.model.count_parameters()
    flops = training_flops_per_token(config, config.collider.kept_share(train.total_steps))
    rate = None if peak_flops is None else utilisation * peak_flops / flops
    per_step = train.batch_size * train.grad_accum * train.seq_len
    planned: int | None = tokens or train.total_steps * per_step
    seconds = None if rate is None else planned / rate
    bound = "train.total_steps" if tokens is None else "--tokens"
    if tokens is None and train.time_budget is not None and (seconds is None or train.time_budget < seconds):
        planned = None if rate is None else max(1, int(train.time_budget * rate / per_step)) * per_step
        seconds, bound = train.time_budget, "train.time_budget"
    return Plan(
        parameters=counts,
        mtp_parameters=_mtp_parameters(config),
        flops_per_token=flops,
        memory=training_memory(config),
        gguf_bytes=gguf_bytes(config, counts),
        tokens_per_step=per_step,
        tokens=planned,
        seconds=seconds,
        bound=bound,
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
