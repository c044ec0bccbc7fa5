"""The library in a few lines: load a trained model, continue or complete text with it, and score text.

    import nanochat_cli as nanochat

    model = nanochat.load("runs/quickstart-1")
    print(model.generate("def ", max_tokens=40))

A facade over `inference` and `evaluation`, which do the work; training, export and everything that prints belong to
the command line and its Engine. Importing this module imports no torch: `load` does, once its target exists.
"""

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack

from nanochat_cli.errors import DataError
from nanochat_cli.formats.run.find import find_run_or_gguf

if TYPE_CHECKING:
    from nanochat_cli.config.schema import Config
    from nanochat_cli.data.tokenizer import Tokenizer
    from nanochat_cli.inference.packed_model import PackedTransformer
    from nanochat_cli.model.transformer import Transformer
    from nanochat_cli.training.bits_per_byte import HeldOut


class Sampling(TypedDict, total=False):
    """Settings of a continuation: the fields of `inference.sampling.SamplingConfig`, which describes each."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int
    stop: tuple[str, ...]


def load(
    target: str | os.PathLike[str] | None = None,
    *,
    checkpoint: Literal["latest", "best"] | int = "latest",
    backend: str | None = None,
) -> "Model":
    """Load a run, by path or by its name in `runs/`, or a `.gguf` file; default: the latest run in `runs/`.

    checkpoint: a run's `latest`, `best` or a kept step; a GGUF file has only one. backend: the kernels' (reference,
    cpu, triton); None: the fastest that works here. Raises DataError for a target that is neither or is damaged,
    ValueError for an unknown backend.
    """
    path = find_run_or_gguf(None if target is None else Path(target))
    from nanochat_cli.formats.gguf.read import load_gguf
    from nanochat_cli.formats.open import load_run
    from nanochat_kernels.backends import requested_backend

    requested_backend(backend)  # refuses an unknown name before anything large is read
    if path.suffix == ".gguf":
        if checkpoint != "latest":
            raise DataError(f"{path}: a GGUF file holds one model; only a run has checkpoint = {checkpoint}")
        return Model(path, *load_gguf(path), None, backend)
    return Model(path, *load_run(path, checkpoint), backend)


class Model:
    """A model in float32 on the CPU, with its tokenizer. One thread at a time.

    path: where it was loaded from. network: the PyTorch module (tokens int64 [B, T] to hidden states, which
    `network.logits` takes). config: the resolved configuration of its run; None for a GGUF file.
    """

    def __init__(
        self,
        path: Path,
        network: "Transformer",
        tokenizer: "Tokenizer",
        config: "Config | None",
        backend: str | None = None,
    ) -> None:
        self.path, self.network, self.tokenizer, self.config = path, network, tokenizer, config
        self._backend = backend

    def __repr__(self) -> str:
        return f"nanochat_cli.Model({str(self.path)!r})"

    def generate(self, prompt: str = "", **sampling: Unpack[Sampling]) -> str:
        """The continuation of `prompt`, without it; an empty prompt starts a new document.

        Raises ConfigError for a setting out of range, DataError for a prompt longer than the context of the model.
        """
        return "".join(self.stream(prompt, **sampling))

    def stream(self, prompt: str = "", **sampling: Unpack[Sampling]) -> Iterator[str]:
        """Like `generate`, but yields whole characters as they come."""
        from nanochat_cli.inference.generate import generate
        from nanochat_cli.inference.sampling import SamplingConfig

        return generate(self._packed, self.tokenizer, prompt, SamplingConfig(**sampling))

    def infill(self, prefix: str, suffix: str, **sampling: Unpack[Sampling]) -> str:
        """What belongs between two texts, for a model trained with fill-in-the-middle (`fim.rate`).

        Of what does not fit the context the parts next to the gap are kept. Raises ConfigError for a setting out of
        range, DataError for a vocabulary without the tokens.
        """
        from nanochat_cli.data.fim import Gap
        from nanochat_cli.formats.open import trained_fim
        from nanochat_cli.inference.generate import generate
        from nanochat_cli.inference.infill import infill_request
        from nanochat_cli.inference.sampling import SamplingConfig

        fim, context = trained_fim(self.path, self.config), self.network.config.max_seq_len
        ids, settings = infill_request(self.tokenizer, Gap(prefix, suffix), fim, SamplingConfig(**sampling), context)
        return "".join(generate(self._packed, self.tokenizer, ids, settings))

    def score(self, text: str) -> "HeldOut":
        """Loss, perplexity, accuracy and bits per byte of `text`, read as a document from its beginning.

        Text longer than the context is scored in windows, as held-out documents are: the first token of a window is
        predicted from the last one of the window before. Raises DataError for an empty text.
        """
        import numpy as np
        import torch

        from nanochat_cli.data.batches import evaluation_batches
        from nanochat_cli.evaluation.held_out import TokenArray
        from nanochat_cli.training.bits_per_byte import evaluate

        ids = self.tokenizer.encode(text)
        if not ids:
            raise DataError("the text is empty: there is nothing to score")
        eos = self.tokenizer.eos_id
        tokens = TokenArray(np.array([eos, *ids], dtype=np.int64), eos, (len(ids),))
        seq_len = self.network.config.max_seq_len
        if self.config is not None:
            seq_len = min(seq_len, self.config.train.seq_len)
        windows = evaluation_batches(tokens, 1, seq_len)
        batches = ((torch.from_numpy(inputs), torch.from_numpy(targets)) for inputs, targets in windows)
        return evaluate(self.network, batches, torch.from_numpy(self.tokenizer.byte_lengths()))

    @cached_property
    def _packed(self) -> "PackedTransformer":
        """The fast form for inference, made on first use."""
        from nanochat_cli.inference.packed_model import PackedTransformer

        return PackedTransformer.from_model(self.network, self._backend)
