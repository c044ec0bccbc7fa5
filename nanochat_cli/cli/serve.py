"""`nanochat serve`: a run or an exported file over HTTP."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from nanochat_cli.cli.options import Backend, Checkpoint
from nanochat_cli.cli.session import session_of

app = typer.Typer(add_completion=False)


@app.command()
def serve(
    ctx: typer.Context,
    target: Annotated[
        Path | None, typer.Argument(metavar="TARGET", help="A run or a .gguf file; default: the latest run.")
    ] = None,
    engine: Annotated[
        Literal["auto", "native", "llama.cpp"],
        typer.Option(help="native: our kernels; llama.cpp: its own server, of a .gguf file; auto: native."),
    ] = "auto",
    host: Annotated[str, typer.Option(help="Address; one that other machines reach needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8012,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="NANOCHAT_API_KEY", metavar="KEY", help="Demanded from every request, as a bearer token."),
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, max=64, help="Texts that are written together.")] = 4,
    queue: Annotated[int, typer.Option(min=0, max=1024, help="Requests that may wait; beyond them: 429.")] = 8,
    cors_origin: Annotated[
        list[str], typer.Option(metavar="ORIGIN", help="A web page that may ask; may be repeated.")
    ] = [],  # noqa: B006
    chat_template: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Jinja template of conversations; default: RUN/chat_template.jinja."),
    ] = None,
    checkpoint: Checkpoint = None,
    backend: Backend = None,
) -> None:
    """Answer OpenAI's clients at /v1 and llama.cpp's editor plugins at /infill, on this machine unless --host says
    otherwise."""
    from nanochat_cli.formats.run.find import find_run_or_gguf, which_checkpoint
    from nanochat_cli.serve.run import require_packages

    session = session_of(ctx)
    path = find_run_or_gguf(target)
    if engine == "llama.cpp":
        from nanochat_cli.serve.llama_cpp import serve_with_llama_cpp

        serve_with_llama_cpp(path, session.reporter, host=host, port=port, key=api_key, slots=parallel)
        return
    require_packages()
    from nanochat_cli.serve.run import serve

    serve(
        path,
        session.reporter,
        host=host,
        port=port,
        key=api_key,
        slots=parallel,
        waiting=queue,
        cors_origins=cors_origin,
        template=chat_template,
        which=which_checkpoint(path, checkpoint),
        backend=backend,
        verbose=session.verbose,
    )
