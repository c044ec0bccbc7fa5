"""Filling in between two texts: the prompt of llama.cpp's /infill, and of `suffix` in /v1/completions."""

from collections.abc import Mapping, Sequence
from typing import Any

from nanochat_cli.data.fim import NAMES, Gap, infill_prompt
from nanochat_cli.serve.engine import Served
from nanochat_cli.serve.errors import RequestError


def infill_ids(
    served: Served,
    prefix: str,
    suffix: str,
    max_tokens: int | None,
    extra: Sequence[Mapping[str, Any]] = (),
) -> list[int]:
    """Token ids that ask for what belongs between. RequestError 501 where the vocabulary has no such tokens.

    At least half of the context is for the prompt; `extra`, texts of other files, gets what the two sides leave.
    """
    if missing := [name for name in NAMES if name not in served.tokenizer.special_tokens]:
        raise RequestError(501, f"this model cannot fill in: its vocabulary lacks {', '.join(missing)}")
    wanted = served.context if max_tokens is None or max_tokens < 0 else max_tokens
    room = max(served.context - wanted - 1, served.context // 2)
    prompt = infill_prompt(served.tokenizer, Gap(prefix, suffix), room, spm=served.spm)
    return [*_context(served, extra, room - len(prompt)), *prompt]


def _context(served: Served, extra: Sequence[Mapping[str, Any]], room: int) -> list[int]:
    """The end of the other texts, separated as llama.cpp does where no token for files was trained."""
    text = "".join(f"\n\n--- snippet ---\n\n{one.get('text', '')}" for one in extra)
    ids = served.tokenizer.encode(text) if text else []
    return ids[max(0, len(ids) - room) :] if room > 0 else []
