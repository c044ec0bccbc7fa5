"""A server on a tiny random model, on a free port, in threads of this process."""

import contextlib
import inspect
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import httpx
import uvicorn

from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.inference.packed_model import PackedTransformer
from nanochat_cli.serve.app import create_app
from nanochat_cli.serve.engine import NativeEngine, Served
from nanochat_cli.serve.rules import Rules, rules_for
from nanochat_cli.serve.run import _listen
from tests.inference.tiny_models import spread_model, tiny_config

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class Live:
    """url: without a path. served: what the server answers with."""

    url: str
    served: Served
    engine: NativeEngine


def tiny_served(context: int = 256, template: str | None = TEMPLATE) -> Served:
    tokenizer = Tokenizer.train([inspect.getsource(json)], 300)
    model = spread_model(tiny_config(vocab_size=tokenizer.vocab_size, max_seq_len=context))
    return Served("tiny", PackedTransformer.from_model(model), tokenizer, template)


@contextlib.contextmanager
def live(
    served: Served | None = None,
    *,
    slots: int = 2,
    waiting: int = 4,
    rules: Rules | None = None,
    load: Callable[[], Served] | None = None,
) -> Iterator[Live]:
    """load: what the engine loads in its thread; default: what is served."""
    served = served or tiny_served()
    engine = NativeEngine(load or (lambda: served), slots, waiting)
    listening = _listen("127.0.0.1", 0)
    rules = rules or rules_for("127.0.0.1", None)
    config = uvicorn.Config(create_app(engine, rules), log_level="warning", access_log=False, lifespan="on")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield Live(f"http://127.0.0.1:{listening.getsockname()[1]}", served, engine)
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()


@contextlib.contextmanager
def client(server: Live, **headers: str) -> Iterator[httpx.Client]:
    """Of a server that has loaded its model."""
    with httpx.Client(base_url=server.url, timeout=60, headers=headers) as http:
        while http.get("/health").status_code != 200:
            pass
        yield http
