"""From the body of a request to rows for the engine, and from rows to what every answer holds."""

import secrets
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from nanochat_cli.inference.continuous_batch import Row
from nanochat_cli.inference.sampling import SamplingConfig
from nanochat_cli.inference.text_stream import TextStream
from nanochat_cli.serve.engine import Served, Ticket
from nanochat_cli.serve.schemas import Sampled

REASONS = {"eos": "stop", "stop": "stop", "length": "length", "cancelled": "stop", None: None}
"""OpenAI's words for what ended a text."""


def settings_of(body: Sampled, max_tokens: int | None, temperature: float, context: int) -> SamplingConfig:
    """temperature: where the request names none. max_tokens: -1 and None are as many as fit."""
    most = context if max_tokens is None or max_tokens < 0 else min(max_tokens, context)
    penalty = body.repetition_penalty if body.repeat_penalty is None else body.repeat_penalty
    return SamplingConfig(
        max_tokens=most,
        temperature=temperature if body.temperature is None else body.temperature,
        top_k=max(0, body.top_k or 0),
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        repetition_penalty=1.0 if penalty is None else penalty,
        stop=body.stops,
    )


def seed_of(body: Sampled) -> int:
    """The one that was asked for, or another one every time."""
    return secrets.randbits(32) if body.seed is None or body.seed < 0 else body.seed


def make_row(
    served: Served,
    prompt: Sequence[int],
    settings: SamplingConfig,
    seed: int,
    body: Sampled,
    *,
    ends: frozenset[int] = frozenset(),
    observe: Callable[[Tensor, int], None] | None = None,
    reshape: Callable[[Tensor], Tensor] | None = None,
    stream: TextStream | None = None,
) -> Row:
    """A row that ends at the context; nothing reads as EOS. Raises RequestError for ids that the vocabulary lacks."""
    served.require_known(prompt)
    stream = stream or TextStream(served.tokenizer, settings.stop)
    reuse = body.cache_prompt is not False
    ids = list(prompt) or [served.tokenizer.eos_id]
    return Row(ids, settings, seed, stream=stream, reuse=reuse, ends=ends, observe=observe, reshape=reshape)


def usage(rows: Sequence[Row], prompts: int) -> dict[str, Any]:
    """rows: of `prompts` prompts, each with equally many."""
    read = rows[:: len(rows) // prompts]
    prompt, drawn = sum(len(row.prompt) for row in read), sum(len(row.tokens) for row in rows)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": drawn,
        "total_tokens": prompt + drawn,
        "prompt_tokens_details": {"cached_tokens": sum(row.reused for row in read)},
    }


def timings(ticket: Ticket) -> dict[str, float]:
    """llama.cpp's object: times in ms, of all rows of a ticket together."""
    started, first, last = (0.0 if at is None else at for at in (ticket.started, ticket.first, ticket.last))
    read = sum(len(row.prompt) - row.reused for row in ticket.rows)
    drawn = sum(len(row.tokens) for row in ticket.rows)
    prompt_ms, predicted_ms = 1000 * (first - started), 1000 * (last - first)
    return {
        "cache_n": sum(row.reused for row in ticket.rows),
        "prompt_n": read,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": prompt_ms / read if read else 0.0,
        "prompt_per_second": 1000 * read / prompt_ms if prompt_ms else 0.0,
        "predicted_n": drawn,
        "predicted_ms": predicted_ms,
        "predicted_per_token_ms": predicted_ms / drawn if drawn else 0.0,
        "predicted_per_second": 1000 * drawn / predicted_ms if predicted_ms else 0.0,
    }
