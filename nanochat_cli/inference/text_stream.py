"""Token ids in, text out, as it comes: whole characters, up to a stop string."""

import codecs
from collections.abc import Iterable, Iterator, Sequence

from nanochat_cli.inference.language_model import TextTokenizer


def as_text(tokens: Iterable[int | None], tokenizer: TextTokenizer, stop: Sequence[str] = ()) -> Iterator[str]:
    """Pieces of whole characters of a stream of token ids, up to a stop string or None."""
    stream = TextStream(tokenizer, stop)
    for token in tokens:
        if token is None:
            break
        if piece := stream.feed(token):
            yield piece
        if stream.stopped:
            return
    if rest := stream.finish():
        yield rest


class TextStream:
    """Token ids in, text out; a character or a possible stop string is held back until it is complete."""

    def __init__(self, tokenizer: TextTokenizer, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        """A stop string was reached; nothing comes after it."""
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def feed(self, token_id: int) -> str:
        """The text that is certain after this token, possibly empty. Bytes that are no UTF-8 become U+FFFD."""
        return self._release(self._decoder.decode(self._tokenizer.token_bytes(token_id)))

    def finish(self) -> str:
        """What was held back when generation ended otherwise than by a stop string."""
        text = self._release(self._decoder.decode(b"", final=True))
        if self.stopped:
            return text
        text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
