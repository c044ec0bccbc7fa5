"""Continuous batching: texts that are continued together, and join and leave between the steps.

The one loop behind `generate`, the samples of `batched` (evaluation, rollouts) and `nanochat serve`. Every row has its
prompt, settings, generator, place in the cache, and end. A prompt is read alone; then one pass reads a token of every
row. So a row draws what it would draw alone: bit for bit where native code reads the token, elsewhere up to the
rounding of float products, whose sums depend on the number of rows.

A place remembers what it has read: a row with the same prompt copies keys and values, and one that asks for it
(`reuse`) reads only what follows their common beginning.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from nanochat_cli.errors import DataError
from nanochat_cli.inference.language_model import LanguageModel
from nanochat_cli.inference.sampling import SamplingConfig, as_ids, log_probabilities, sample
from nanochat_cli.inference.text_stream import TextStream
from nanochat_cli.model.cache import CacheRows, KVCache

Finish = Literal["eos", "stop", "length", "cancelled"]


class Row:
    """One text that is being continued, drawn with a generator of its own; `settings.seed` is not read.

    slides: past the context, its later half is read again, instead of ending there. stream: turns tokens into `text`,
    and ends at its stop strings. scored: keep log-probabilities. reuse: read only what a place does not hold already,
    which may round differently than a whole prompt. ends: ids besides the batch's own that end it, even those that are
    not chosen elsewhere. observe: called with the logits [V] of every token before it is drawn, and the token.
    reshape: as `sampling.sample` takes it.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        settings: SamplingConfig,
        seed: int,
        *,
        stream: TextStream | None = None,
        slides: bool = False,
        scored: bool = False,
        reuse: bool = False,
        ends: frozenset[int] = frozenset(),
        observe: Callable[[Tensor, int], None] | None = None,
        reshape: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.prompt, self.settings, self.slides = list(prompt), settings, slides
        self.stream, self.scored, self.reuse, self.ends, self.observe = stream, scored, reuse, ends, observe
        self.reshape = reshape
        self.generator = torch.Generator().manual_seed(seed)
        self.tokens: list[int] = []
        """Drawn so far, EOS included."""
        self.log_probabilities: list[float] = []
        """As in `batched.Completion`."""
        self.text = ""
        """Whole characters so far; without EOS, up to the stop string."""
        self.finish: Finish | None = None
        self.reused = 0
        """Tokens of the prompt that were not read again."""
        self.unread = self.prompt
        self.seen: Tensor | None = None

    def cancel(self, finish: Finish = "cancelled") -> None:
        """Leave at the next step; may be called from another thread."""
        self.finish = self.finish or finish

    def take(self, token: int, eos_id: int | None, limit: int) -> None:
        """Add a drawn token; decides whether it is the last one. limit: of tokens."""
        self.tokens.append(token)
        self.unread = [token]
        if token == eos_id or token in self.ends:
            self._end("eos")
            return
        if self.stream is not None:
            self.text += self.stream.feed(token)
            if self.stream.stopped:
                self.finish = "stop"
                return
        if len(self.tokens) >= limit:
            self._end("length")

    def _end(self, finish: Finish) -> None:
        if self.stream is not None:
            self.text += self.stream.finish()
            finish = "stop" if self.stream.stopped and finish == "length" else finish
        self.finish = self.finish or finish


@dataclass(eq=False)
class _Place:
    """A row of the cache. held: ids in its positions; logits: after the prompt that it read last."""

    cache: KVCache
    held: list[int] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    logits: Tensor | None = None


class ContinuousBatch:
    """Continues up to n_rows texts at once with a model; more wait in order. One thread at a time.

    capacity: positions of a row, at most and by default the context of the model. eos_id: ends a row. never: ids that
    are not chosen.
    """

    def __init__(
        self,
        model: LanguageModel,
        n_rows: int,
        capacity: int | None = None,
        eos_id: int | None = None,
        never: Sequence[int] = (),
    ) -> None:
        self.model, self.context, self.eos_id = model, model.config.max_seq_len, eos_id
        self._never = {frozenset[int](): as_ids(never, model.device)}
        """By the ends of a row."""
        memory = KVCache(model.config, n_rows, capacity, model.dtype, model.device)
        self._places = [_Place(memory.row(i)) for i in range(n_rows)]
        self._free = list(self._places)
        """The one that was left longest ago first."""
        self._waiting: deque[Row] = deque()
        self._running: dict[Row, _Place] = {}

    @property
    def running(self) -> int:
        """Rows that have a place."""
        return len(self._running)

    def submit(self, row: Row) -> None:
        """Let a row wait for a place. Raises DataError for a prompt that exceeds the context, ValueError for none."""
        if not row.prompt:
            raise ValueError("a prompt must have at least one token")
        if len(row.prompt) > self.context:
            raise DataError(
                f"the prompt has {len(row.prompt)} tokens and the model's context holds {self.context}: "
                "shorten the prompt"
            )
        if not self._limit(row):
            row.finish = "length"
        self._waiting.append(row)

    @torch.no_grad()
    def step(self) -> list[Row]:
        """Draw one token of every row that has a place, after those that ended made room; returns these rows.

        Empty when no row is left. Raises DataError for logits that are not finite.
        """
        self._leave()
        self._join()
        rows = list(self._running)
        if rows:
            self._draw(rows, self._read(rows))
        return rows

    def _limit(self, row: Row) -> int:
        """Most tokens of a row; the last one is not read."""
        most = row.settings.max_tokens
        return most if row.slides else min(most, self.context - len(row.prompt) + 1)

    def _leave(self) -> None:
        for row, place in list(self._running.items()):
            if row.finish is not None:
                del self._running[row]
                ids = [*row.prompt, *row.tokens]
                place.held = ids[: place.cache.length] if len(ids) <= self.context else []  # or it has slid
                self._free.append(place)

    def _join(self) -> None:
        while self._waiting and self._free:
            row = self._waiting.popleft()
            if row.finish is None:
                place = max(self._free, key=lambda place: self._worth(place, row))  # of equals the first
                self._free.remove(place)
                self._running[row] = place

    def _worth(self, place: _Place, row: Row) -> int:
        """How many tokens of the prompt a free place could save."""
        if place.prompt == row.prompt and not place.cache.recurrent:
            return len(row.prompt)
        return _common(place.held, row.prompt) if row.reuse and not place.cache.recurrent else 0

    def _read(self, rows: Sequence[Row]) -> Tensor:
        """Logits [rows, V] after the unread tokens of every row."""
        logits: dict[Row, Tensor] = {}
        together: list[Row] = []
        for row in rows:
            place = self._running[row]
            if not row.tokens:
                logits[row] = self._read_prompt(row, place)
            elif place.cache.length + 1 > self.context:
                place.cache.clear()
                place.prompt = []
                logits[row] = self._next(([*row.prompt, *row.tokens])[-max(1, self.context // 2) :], place.cache)
            else:
                together.append(row)
        if together:
            caches = [self._running[row].cache for row in together]
            unread = torch.tensor([row.unread for row in together], dtype=torch.int64, device=self.model.device)
            found = self.model.next_logits(unread, caches[0] if len(caches) == 1 else CacheRows(caches))
            logits.update(zip(together, found.split(1), strict=True))
        return torch.cat([logits[row] for row in rows]).float()

    def _read_prompt(self, row: Row, place: _Place) -> Tensor:
        prompt, length = row.prompt, len(row.prompt)
        for other in self._places:
            fits = not other.cache.recurrent or other.cache.length == length
            if other.prompt == prompt and other.logits is not None and fits:
                if other is place:
                    place.cache.truncate(length)
                else:
                    place.cache.copy_from(other.cache, length)
                place.prompt, place.logits, row.reused = prompt, other.logits, length
                return other.logits
        if row.reuse and not place.cache.recurrent:
            row.reused = min(_common(place.held, prompt), length - 1)
        if row.reused:
            place.cache.truncate(row.reused)
        else:
            place.cache.clear()
        place.prompt = []
        place.logits = self._next(prompt[row.reused :], place.cache).clone()
        place.prompt = prompt
        return place.logits

    def _next(self, ids: list[int], cache: KVCache) -> Tensor:
        return self.model.next_logits(torch.tensor([ids], dtype=torch.int64, device=self.model.device), cache)

    def _draw(self, rows: Sequence[Row], logits: Tensor) -> None:
        groups: dict[tuple[Any, ...], list[int]] = {}
        for number, row in enumerate(rows):
            groups.setdefault((row.settings, row.ends, row.reshape), []).append(number)
        for (settings, ends, reshape), numbers in groups.items():
            some = [rows[number] for number in numbers]
            part = logits if len(some) == len(rows) else logits[numbers]
            seen = self._seen(some) if settings.repetition_penalty != 1 else None
            generators = [row.generator for row in some]
            chosen = sample(part, settings, seen, generators, self._left_out(ends), reshape)
            if any(row.scored for row in some):
                scores = log_probabilities(part, chosen, settings.temperature)
                for row, score in zip(some, scores, strict=True):
                    row.log_probabilities.append(score)
            for row, own, token in zip(some, part, chosen.tolist(), strict=True):
                if row.observe is not None:
                    row.observe(own, token)
                if row.finish is None:
                    row.take(token, self.eos_id, self._limit(row))

    def _left_out(self, ends: frozenset[int]) -> Tensor | None:
        """What rows with these ends do not choose."""
        if ends not in self._never:
            never = self._never[frozenset()]
            ids = [] if never is None else [one for one in never.tolist() if one not in ends]
            self._never[ends] = as_ids(ids, self.model.device)
        return self._never[ends]

    def _seen(self, rows: Sequence[Row]) -> Tensor:
        """bool [rows, V]: the tokens of prompts and those drawn."""
        for row in rows:
            if row.seen is None:
                row.seen = torch.zeros(self.model.config.vocab_size, dtype=torch.bool, device=self.model.device)
                row.seen[row.prompt] = True
            row.seen[row.unread] = True
        return torch.stack([row.seen for row in rows if row.seen is not None])


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning."""
    most = min(len(first), len(second))
    return next((i for i in range(most) if first[i] != second[i]), most)
