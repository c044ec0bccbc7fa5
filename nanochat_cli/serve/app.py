"""The application: routes around one engine, behind the guard."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from nanochat_cli import __version__
from nanochat_cli.serve import errors, llama_cpp_routes, openai_routes, page
from nanochat_cli.serve.engine import NativeEngine
from nanochat_cli.serve.guard import Guard, Rules


def create_app(engine: NativeEngine, rules: Rules, cors_origins: Sequence[str] = ()) -> FastAPI:
    """Starts the engine when it starts. cors_origins: web pages that may ask; none by default."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            engine.close()

    app = FastAPI(title="nanochat", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    errors.install(app)
    app.include_router(openai_routes.routes(engine))
    app.include_router(llama_cpp_routes.routes(engine))
    app.include_router(page.routes())
    app.add_middleware(Guard, rules=rules)
    if cors_origins:
        # Outside the guard, so that a page may read a refusal. No credentials: the key is a header of its own.
        app.add_middleware(
            CORSMiddleware, allow_origins=list(cors_origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return app
