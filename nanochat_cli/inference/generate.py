"""Continuing a prompt: tokens one at a time, and text that streams as it comes.

`generate_tokens` knows token ids only; `generate` also the tokenizer. The loop is `continuous_batch`'s. Nothing here
prints.

Context: when the positions of the model are used up, the later half of them is read again from position
0 and generation goes on (a sliding window). Only a prompt that itself is longer than the context is an error.
"""

from collections.abc import Iterator, Sequence

from nanochat_cli.inference.continuous_batch import ContinuousBatch, Row
from nanochat_cli.inference.language_model import LanguageModel, TextTokenizer
from nanochat_cli.inference.sampling import SamplingConfig
from nanochat_cli.inference.text_stream import as_text


def generate(
    model: LanguageModel, tokenizer: TextTokenizer, prompt: str | Sequence[int], sampling: SamplingConfig
) -> Iterator[str]:
    """Yield the continuation of `prompt` in pieces of whole characters, up to EOS, a stop string or max_tokens.

    The prompt is text or token ids; an empty text starts a new document (it reads as EOS). Raises DataError when it is
    too long.
    """
    ids = encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else prompt
    batches = generate_tokens(model, [ids], sampling, tokenizer.eos_id, tokenizer.never_sampled)
    yield from as_text((tokens[0] for tokens in batches), tokenizer, sampling.stop)


def encode_prompt(tokenizer: TextTokenizer, prompt: str) -> list[int]:
    """Token ids to start from; documents are separated by EOS in training, so that nothing reads as EOS.

    Imported models may want every text to begin with BOS.
    """
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return [*start, *tokenizer.encode(prompt)] or [tokenizer.eos_id]


def generate_tokens(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    eos_id: int | None = None,
    never: Sequence[int] = (),
) -> Iterator[list[int | None]]:
    """Yield, step by step, the next token of every prompt, at most max_tokens times.

    prompts: lists of ids, each at least one. A row that has produced `eos_id` yields None from there on (EOS itself is
    not yielded); iteration ends when every row has. Ids in `never` are not chosen. Raises DataError when a prompt is
    longer than the context of the model.
    """
    rows = [Row(prompt, sampling, sampling.seed + i, slides=True) for i, prompt in enumerate(prompts)]
    longest = max(len(prompt) for prompt in prompts) + sampling.max_tokens
    batch = ContinuousBatch(model, len(rows), longest, eos_id, never)
    for row in rows:
        batch.submit(row)
    while drawn := batch.step():
        tokens = [row.tokens[-1] if row in drawn and row.finish != "eos" else None for row in rows]
        if all(token is None for token in tokens):
            return
        yield tokens
