"""Filling in: what belongs between two texts, asked of a model that was trained with their order (`data.fim`)."""

from dataclasses import replace

from nanochat_cli.config.sections.fim import FimConfig
from nanochat_cli.data.fim import Gap, infill_prompt
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.inference.sampling import SamplingConfig


def infill_request(
    tokenizer: Tokenizer, gap: Gap, fim: FimConfig, sampling: SamplingConfig, context: int
) -> tuple[list[int], SamplingConfig]:
    """The prompt, and `sampling` with no more tokens than the context then holds: a prompt must not slide out of it.

    At least half of the context is for the prompt. fim: of the training.
    """
    room = max(context - sampling.max_tokens, context // 2) - 1
    ids = infill_prompt(tokenizer, gap, room, spm=fim.suffix_first)
    return ids, replace(sampling, max_tokens=min(sampling.max_tokens, context - len(ids)))
