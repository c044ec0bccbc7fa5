"""Server-sent events, as OpenAI's clients read them; and waiting for a whole answer while its client waits too."""

import json
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from nanochat_cli.inference.continuous_batch import Row
from nanochat_cli.serve.engine import Ticket
from nanochat_cli.serve.errors import RequestError, error_body

REQUEST_SECONDS = 600.0
"""After which texts end where they are."""


async def finished(ticket: Ticket, request: Request, seconds: float = REQUEST_SECONDS) -> None:
    """Wait until all rows have ended, or the client has left. Closes the ticket."""
    try:
        async for _ in ticket.changes(seconds, request):
            pass
    finally:
        ticket.close()


class Events(StreamingResponse):
    """The events of a ticket; closes it, also when the client leaves before the first one."""

    def __init__(self, ticket: Ticket, events: AsyncIterator[dict[str, Any]], end: str = "") -> None:
        super().__init__(_encoded(events, end), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ticket.close()


async def _encoded(events: AsyncIterator[dict[str, Any]], end: str) -> AsyncIterator[str]:
    try:
        async for event in events:
            yield f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
    except RequestError as error:  # the status has been sent
        yield f"data: {json.dumps(error_body(error.status, str(error)))}\n\n"
    if end:
        yield f"data: {end}\n\n"


class Pieces:
    """What is new in the texts of rows since one looked last."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows, self._sent, self._ended = rows, [0] * len(rows), [False] * len(rows)

    def new(self) -> Iterator[tuple[int, str, Row | None]]:
        """(number of the row, new text, the row if it has ended now)."""
        for number, row in enumerate(self._rows):
            ended = row.finish is not None  # before the text is looked at
            piece = row.text[self._sent[number] :]
            if self._ended[number] or not (piece or ended):
                continue
            self._sent[number] += len(piece)
            self._ended[number] = ended
            yield number, piece, row if ended else None
