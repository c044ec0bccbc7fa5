"""Filling in between two texts: the prompt of llama.cpp's /infill, and of `suffix` in /v1/completions."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

from nanochat_cli.data.fim import NAMES, Gap, infill_prompt
from nanochat_cli.inference.continuous_batch import Row
from nanochat_cli.inference.sampling import SamplingConfig
from nanochat_cli.inference.suggestion import InfillSampler, Suggestion
from nanochat_cli.serve.asking import make_row, seed_of, settings_of
from nanochat_cli.serve.engine import Served
from nanochat_cli.serve.errors import RequestError
from nanochat_cli.serve.schemas import InfillRequest

TEMPERATURE = 0.8
"""llama.cpp's, where a request names none."""
NEUTRAL = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0, "penalties": 1.0}
"""What a sampler that `samplers` leaves out is set to."""
USUAL = {"top_k": 40, "top_p": 0.95, "min_p": 0.05}
"""llama.cpp's values of samplers that it names and gives no value."""
LETTERS = {"k": "top_k", "p": "top_p", "m": "min_p", "t": "temperature", "e": "penalties", "i": "infill"}
"""Of `samplers` as one word."""
ENDS = ("<|im_end|>", "<|fim_pad|>", "<|repo_name|>", "<|fim_repo|>", "<|file_sep|>")
"""Tokens that end a middle in llama.cpp, besides the end of text."""


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


def infill_row(served: Served, ids: Sequence[int], body: InfillRequest, max_tokens: int | None) -> Row:
    """A row that fills in as the request says: within its lines and its time, by the samplers that it names."""
    settings = settings_of(body, max_tokens, TEMPERATURE, served.context)
    named = None if body.samplers is None else {LETTERS.get(name, name) for name in body.samplers}
    if named is not None:
        settings = _only_named(settings, body, named)
    milliseconds = body.t_max_predict_ms or 0
    seconds = milliseconds / 1000 if milliseconds > 0 else None
    stream = Suggestion(served.tokenizer, settings.stop, body.n_indent or 0, seconds)
    ends, sampler = frozenset[int](), None
    if named is not None and "infill" in named:
        special, eos = served.tokenizer.special_tokens, served.tokenizer.eos_id
        ends = frozenset(special[name] for name in ENDS if name in special)
        sampler = InfillSampler(served.tokenizer, eos, ends | {eos})
    return make_row(served, ids, settings, seed_of(body), body, ends=ends, reshape=sampler, stream=stream)


def is_cut(row: Row) -> bool:
    """Whether a rule for lines has ended it."""
    return isinstance(row.stream, Suggestion) and row.stream.cut


def _only_named(settings: SamplingConfig, body: InfillRequest, named: Set[str]) -> SamplingConfig:
    values = {name: value for name, value in USUAL.items() if name in named and getattr(body, name) is None}
    values |= {name: value for name, value in NEUTRAL.items() if name not in named}
    if "penalties" in values:
        values["repetition_penalty"] = values.pop("penalties")
    return replace(settings, **values)
