"""An even sample of a stream of documents, in bounded memory, whatever the stream's length."""

import heapq
from collections.abc import Collection


class TextSample:
    """Keeps the documents with the highest keys, up to `limit` bytes in total (one longer document is cut to it).

    Keys are hashes of the content, so the sample is even over the stream and depends neither on its order nor on its
    length; a bottom-k sketch counted in bytes. Memory: `limit` and one document.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self._heap: list[tuple[int, bytes]] = []

    def offer(self, key: int, content: bytes) -> None:
        if self.size + len(content) > self.limit and self._heap and key < self._heap[0][0]:
            return
        heapq.heappush(self._heap, (key, content))
        self.size += len(content)
        while self.size > self.limit and len(self._heap) > 1:
            self.size -= len(heapq.heappop(self._heap)[1])

    def documents(self, leave_out: Collection[int] = ()) -> list[bytes]:
        """The sampled documents, except those whose keys are in `leave_out`."""
        return [content[: self.limit] for key, content in self._heap if key not in leave_out]
