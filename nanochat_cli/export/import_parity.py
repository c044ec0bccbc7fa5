"""Proof that llama.cpp computes the same from a GGUF file of float32 as the imported model does.

Nothing is rounded on either side, so that every prompt must agree: log-probabilities over the whole vocabulary, greedy
tokens, and the ids of texts.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import ValidationFailure
from nanochat_cli.export import llama_cpp
from nanochat_cli.export.transformers_parity import GREEDY_TOKENS, greedy_tokens, sample_prompts, sample_texts
from nanochat_cli.export.verify import LOWEST_LOGPROB
from nanochat_cli.model.transformer import Transformer

TOLERANCE = 1e-4
"""Largest difference of log-probabilities, in units of the standard deviation of logits."""


@dataclass(frozen=True)
class LlamaCppParity:
    """A successful comparison; a failed one raises ValidationFailure. Differences are of log-probabilities."""

    n_prompts: int
    max_difference: float
    logit_std: float
    n_greedy: int
    n_texts: int

    def lines(self) -> list[str]:
        return [
            f"verified: llama.cpp computes the same in float32: log-probabilities of {self.n_prompts} prompts within "
            f"{self.max_difference:.1e} (the standard deviation of logits is {self.logit_std:.2g}), {self.n_greedy} "
            f"greedy tokens and the ids of {self.n_texts} texts equal"
        ]


@torch.no_grad()
def compare_with_llama_cpp(path: Path, model: Transformer, tokenizer: Tokenizer, what: str) -> LlamaCppParity:
    """Compare the GGUF file of float32 with the model. what: the source, for messages."""
    prompts = sample_prompts(tokenizer, model.config.max_seq_len)
    logits = torch.stack([model.logits(model(torch.tensor([prompt]))[:, -1])[0] for prompt in prompts]).double()
    ours, std = logits.log_softmax(dim=-1).numpy(), float(logits.std())
    theirs = llama_cpp.logprobs(path, prompts, model.config.vocab_size)
    comparable = np.minimum(ours, theirs) > LOWEST_LOGPROB
    worst = float(np.abs(np.where(comparable, theirs - ours, 0)).max())
    if not worst <= TOLERANCE * std:
        raise ValidationFailure(
            f"{what}: llama.cpp computes log-probabilities {worst:.1e} away from the imported model's, whose logits "
            f"have a standard deviation of {std:.2g}: it was not imported"
        )
    n_greedy = 0
    continued = llama_cpp.complete(path, prompts, GREEDY_TOKENS)
    for mine, found in zip(greedy_tokens(model, prompts), continued, strict=True):
        if found.tokens != mine[: len(found.tokens)]:  # it stops at any token that ends a turn or a file
            raise ValidationFailure(
                f"{what}: llama.cpp continues a prompt with the tokens {found.tokens} and the imported model with "
                f"{mine}: it was not imported"
            )
        n_greedy += len(found.tokens)
    texts = sample_texts()
    for text, found in zip(texts, llama_cpp.tokenize(path, texts), strict=True):
        if found != tokenizer.encode(text):
            mine = tokenizer.encode(text)
            raise ValidationFailure(f"{what}: llama.cpp splits {text[:40]!r} into {found[:8]}, we into {mine[:8]}")
    return LlamaCppParity(len(prompts), worst, std, n_greedy, len(texts))
