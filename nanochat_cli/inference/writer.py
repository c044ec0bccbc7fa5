"""One text after the other from one model: continuations, and answers in a conversation, as they come.

What a text shares with the one before is not read again, as in `nanochat serve`, whose rows these are. Knows messages
and text; nothing of terminals, files or HTTP.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.inference.chat_template import render_ids, turn_ends
from nanochat_cli.inference.continuous_batch import ContinuousBatch, Row
from nanochat_cli.inference.generate import encode_prompt
from nanochat_cli.inference.language_model import LanguageModel
from nanochat_cli.inference.sampling import SamplingConfig
from nanochat_cli.inference.text_stream import TextStream

Messages = Sequence[Mapping[str, Any]]


class Writer:
    """Writes one text at a time. template: of conversations, Jinja; None for a model that was trained without."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, template: str | None = None) -> None:
        self.tokenizer, self.template = tokenizer, template
        self._context = model.config.max_seq_len
        self._batch = ContinuousBatch(model, 1, None, tokenizer.eos_id, tokenizer.never_sampled)

    def answer(self, messages: Messages, settings: SamplingConfig) -> Row:
        """The next turn. Raises ConfigError without a template or if it refuses the messages."""
        ids = render_ids(self.template, [dict(one) for one in messages], self.tokenizer)
        return self._row(ids, settings, turn_ends(self.tokenizer))

    def continuation(self, text: str, settings: SamplingConfig) -> Row:
        """What follows a text, of which as much is read as leaves room for it."""
        return self._row(encode_prompt(self.tokenizer, text)[-self._room(settings) :], settings)

    def fitting(self, messages: Messages, settings: SamplingConfig) -> Messages:
        """The messages without the oldest exchanges, as far as an answer needs their room; the last one stays."""
        while len(messages) > 2 and len(self.answer(messages, settings).prompt) > self._room(settings):
            messages = messages[2:]
        return messages

    def stream(self, row: Row) -> Iterator[str]:
        """The text of a row in pieces of whole characters; ends early where the row is cancelled.

        Raises DataError for a prompt that is longer than the context.
        """
        self._batch.submit(row)
        sent = 0
        try:
            while row.finish is None and self._batch.step():
                if piece := row.text[sent:]:
                    sent += len(piece)
                    yield piece
        finally:
            row.cancel()
            self._batch.step()  # gives its place back

    def _room(self, settings: SamplingConfig) -> int:
        """Tokens of a prompt that leave room for the answer, and at least half of the context."""
        return max(self._context - settings.max_tokens, self._context // 2)

    def _row(self, ids: list[int], settings: SamplingConfig, ends: frozenset[int] = frozenset()) -> Row:
        stream = TextStream(self.tokenizer, settings.stop)
        return Row(ids, settings, settings.seed, stream=stream, reuse=True, ends=ends)
