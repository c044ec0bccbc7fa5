"""A local OpenAI-compatible endpoint that gives the answers of a test."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = str | Callable[[BaseHTTPRequestHandler], None]
"""The text of an answer, or a function that a handler calls instead of answering."""


@dataclass
class ChatServer:
    """answer: to a question (system, user); asked: every request's headers and body."""

    answer: Callable[[str, str], Answer]
    url: str = ""
    asked: list[tuple[dict[str, str], dict[str, Any]]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    """Set when the server closes: what a handler that never answers waits for."""


def completion(text: str) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def send(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


@contextmanager
def chat_server(answer: Callable[[str, str], Answer]) -> Iterator[ChatServer]:
    state = ChatServer(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.asked.append((dict(self.headers), {"path": self.path, **body}))
            system, user = (message["content"] for message in body["messages"])
            answer = state.answer(system, user)
            try:
                if isinstance(answer, str):
                    send(self, completion(answer))
                else:
                    answer(self)
            except OSError:
                pass  # the client has gone, as it should

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        state.url = f"http://127.0.0.1:{server.server_port}/v1"
        try:
            yield state
        finally:
            state.ended.set()
            server.shutdown()
            thread.join()
