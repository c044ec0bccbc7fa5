"""Starting the server: what can be refused before the model is loaded, then one event loop until Ctrl-C.

Imports the extra only inside `serve`, which names the command that installs it.
"""

import importlib.util
import logging
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat_cli.errors import ConfigError
from nanochat_cli.report.reporter import Reporter

if TYPE_CHECKING:
    from nanochat_cli.formats.run.checkpoints import Which
    from nanochat_cli.serve.engine import Served

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
SHUTDOWN_SECONDS = 3
"""After Ctrl-C, for answers that are being written."""


def require_packages() -> None:
    """Raise ConfigError, with the command, if the extra is not installed."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"nanochat serve needs {', '.join(missing)}: pip install 'nanochat-ternary[serve]'")


def serve(
    target: Path,
    reporter: Reporter,
    *,
    host: str,
    port: int,
    key: str | None,
    slots: int,
    waiting: int,
    cors_origins: Sequence[str] = (),
    template: Path | None = None,
    which: "Which" = "latest",
    backend: str | None = None,
    verbose: bool = False,
) -> None:
    """Serve a run or a GGUF file with the native engine until it is interrupted. port: 0 for any that is free.

    Raises ConfigError and DataError as loading does, and for an address that cannot be used.
    """
    require_packages()
    import uvicorn

    from nanochat_cli.serve.app import create_app
    from nanochat_cli.serve.engine import NativeEngine
    from nanochat_cli.serve.rules import rules_for

    rules = rules_for(host, key)
    if verbose:
        logging.basicConfig(stream=sys.stderr, format="%(message)s")
        logging.getLogger("nanochat_cli.serve").setLevel(logging.INFO)
    listening = _listen(host, port)
    engine = NativeEngine(_loading(target, which, backend, template), slots, waiting)
    config = uvicorn.Config(
        create_app(engine, rules, cors_origins),
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    server = uvicorn.Server(config)

    def stop() -> None:
        server.should_exit = True

    engine.on_stop = stop
    address = f"http://{host if ':' not in host else f'[{host}]'}:{listening.getsockname()[1]}"
    reporter.info(f"{target}: {address} (a page to try it, /v1, /infill); Ctrl-C ends it")
    with suppress(KeyboardInterrupt):  # which uvicorn raises again after it has ended in good order
        server.run(sockets=[listening])
    if engine.failure is not None:
        raise engine.failure
    reporter.result({"target": str(target), "address": address})


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host.strip("[]"), port), family=family)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}, port {port}: {error.strerror or error}; choose --port") from None


def _loading(target: Path, which: "Which", backend: str | None, template: Path | None) -> "Callable[[], Served]":
    """What the thread of the engine loads; the template at once, since a mistake in it is the user's."""
    from nanochat_cli.inference.chat_template import find_template

    chat = find_template(target, template)

    def load() -> "Served":
        from nanochat_cli.formats.open import load_target, trained_fim
        from nanochat_cli.formats.run.origin import read_origin
        from nanochat_cli.inference.packed_model import PackedTransformer
        from nanochat_cli.serve.engine import Served

        model, tokenizer, run = load_target(target, which)
        trained = trained_fim(target, None if run is None else run.config)
        fim = trained.rate > 0 or (run is not None and read_origin(target) is not None)  # or nobody knows
        name = target.stem if target.suffix == ".gguf" else target.resolve().name
        return Served(name, PackedTransformer.from_model(model, backend), tokenizer, chat, trained.suffix_first, fim)

    return load
