"""What a request must pass before anything reads it: the name of the host, the key, and the size of the body.

Answers in the one form of errors. The check of Host keeps web pages from reaching a server on this machine through a
name that they control (DNS rebinding); a server elsewhere is kept by its key.
"""

import asyncio
import logging
import time
from contextlib import suppress
from secrets import compare_digest

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat_cli.serve.errors import RequestError, error_response
from nanochat_cli.serve.rules import Rules

BODY_SECONDS = 30.0
"""Within which a body must have arrived."""
DISCARD_SECONDS, DISCARD_BYTES = 2.0, 1 << 26
"""How much of a body that is too large is read, and thrown away."""
OPEN_PATHS = frozenset({"/health", "/"})
"""Answered without a key; the page at / asks its reader for it."""

_log = logging.getLogger(__name__)


class Guard:
    """ASGI middleware that applies Rules, and logs method, path, status and time of every request: no content."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self.app, self.rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check(scope)
            body = await self._body(scope, receive)
        except RequestError as error:
            await error_response(error)(scope, receive, noting)
        else:
            await self.app(scope, _replayed(body, receive), noting)
        _log.info("%s %s: %d, %.3f s", scope["method"], scope["path"], status, time.perf_counter() - started)

    def _check(self, scope: Scope) -> None:
        """Raises RequestError for a host that is not ours, or a missing or wrong key."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        name = host[: host.rfind("]") + 1] if host.startswith("[") else host.partition(":")[0]
        if self.rules.hosts is not None and name.lower() not in self.rules.hosts:
            raise RequestError(403, "this server answers to localhost only: the request names another host")
        if self.rules.key is None or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not compare_digest(key.strip().encode(), self.rules.key.encode()):
            raise RequestError(401, "missing or wrong API key", WWW_Authenticate="Bearer")

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """All of it. Raises RequestError if it is too large or too slow."""
        limit = self.rules.max_body
        too_large = RequestError(413, f"the body is larger than {limit} bytes", Connection="close")
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdigit() and int(declared) > limit:
            await _discard(receive)
            raise too_large
        parts, size = list[bytes](), 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise RequestError(400, "the client left")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        await _discard(receive)
                        raise too_large
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise RequestError(408, f"the body took longer than {BODY_SECONDS:g} s", Connection="close") from None


async def _discard(receive: Receive) -> None:
    """Read what a client is still sending, for a while: closing on unread bytes would reset the connection, and the
    client would never see the answer."""
    size = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            while size < DISCARD_BYTES:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    return
                size += len(message.get("body", b""))


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Delivers the body that was read, then what the connection says."""
    delivered = False

    async def again() -> Message:
        nonlocal delivered
        if delivered:
            return await receive()
        delivered = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
