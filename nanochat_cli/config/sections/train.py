"""`[train]`: batches, steps, the objective, and how they are computed."""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from nanochat_cli.config.sections.section import Section


class TrainConfig(Section):
    total_steps: PositiveInt = Field(default=1000, description="optimizer steps of the run")
    time_budget: PositiveFloat | None = Field(
        default=None, description="seconds of training; after a few timed steps total_steps is lowered to what fits"
    )
    init: Path | None = Field(
        default=None,
        description="initial weights: of a run, a checkpoint folder, a GGUF file, a Hugging Face folder; none: random",
    )
    mix: float = Field(default=0.0, ge=0, lt=1, description="share of rows of text from data.base among conversations")
    batch_size: PositiveInt = Field(default=8, description="sequences per micro-batch")
    grad_accum: PositiveInt = Field(default=1, description="micro-batches per step")
    seq_len: PositiveInt = Field(default=256, description="tokens per sequence")
    grad_clip: NonNegativeFloat = Field(default=1.0, description="limit of the global gradient norm; 0: off")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="label smoothing of the objective")
    z_loss: NonNegativeFloat = Field(default=0.0, description="weight of the squared log-sum-exp (arXiv:2204.02311)")
    entropy_weight: NonNegativeFloat = Field(default=0.0, description="weight of an entropy bonus in the objective")
    loss_chunk: PositiveInt = Field(default=512, description="tokens whose logits are held at once")
    device: str = Field(default="auto", description="cpu, cuda or cuda:N; auto: CUDA if there is a GPU")
    dtype: Literal["auto", "fp32", "bf16"] = Field(default="auto", description="auto: bf16 autocast on CUDA, else fp32")
    compile: Literal["auto", "on", "off"] = Field(
        default="auto", description="auto: if a compiler exists and the run is long enough"
    )
    forward: Literal["auto", "float", "int8", "nvfp4", "nvfp4-emulated"] = Field(
        default="auto",
        description="how ternary layers multiply: in int8 kernels or exact floats, equal in value; auto: the faster; "
        "nvfp4: activations rounded to 4 bits (compute capability 10 or 12); emulated: the same anywhere, slowly",
    )
    backward: Literal["auto", "exact", "bf16", "int8"] = Field(
        default="exact",
        description="number format of gradients in ternary layers and, on a CPU, the head; auto: the fastest here",
    )
    attention: Literal["auto", "torch", "blocks"] = Field(
        default="torch",
        description="causal attention of training: torch's, or blocks, our own (CPU, float32); auto: the faster here",
    )
    grad_input: Literal["exact", "fp8"] = Field(
        default="exact",
        description="fp8: input gradients of ternary layers in float8 (compute capability 8.9 or later; not measured)",
    )
    gradient_checkpointing: bool = Field(default=False, description="recompute blocks in backward: less memory, slower")
    log_interval: PositiveInt = Field(default=10, description="steps between lines of metrics")
    spike_factor: PositiveFloat = Field(
        default=4.0, description="skip a step whose gradient norm exceeds this multiple of its running mean"
    )
    max_skipped_steps: PositiveInt = Field(default=20, description="non-finite steps in a row that end the run")

    def held(self) -> dict[str, object]:
        return {"mix": self.mix} if self.mix else {}

    @property
    def four_bit(self) -> bool:
        """Whether activations of ternary layers are in NVFP4."""
        return self.forward in ("nvfp4", "nvfp4-emulated")
