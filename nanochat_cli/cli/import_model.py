"""`nanochat import`: make a run of a model that was trained elsewhere."""

from pathlib import Path
from typing import Annotated

import typer

from nanochat_cli.cli.session import session_of
from nanochat_cli.errors import ConfigError, DataError

app = typer.Typer(add_completion=False)


@app.command(name="import")
def import_(
    ctx: typer.Context,
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A Hugging Face folder with safetensors, or a .gguf file.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Folder of the new run; default: runs/ and the source's name.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare with llama.cpp and transformers, where installed.")
    ] = True,
) -> None:
    """Make a run of a float model from elsewhere, which generate, eval and export then take as any other.

    Llama, Mistral, Qwen3, SmolLM and their kind; what our model does not compute is refused by its name. Weights are
    read from safetensors or GGUF, never from pickle. The chat template stays with the run.
    """
    from nanochat_cli.config.load import CONFIG_FILE
    from nanochat_cli.config.sections.run import RunConfig
    from nanochat_cli.formats.run.find import DEFAULT_FOLDER, require_free, require_writable

    require_importable(source)
    if out is None:
        out = DEFAULT_FOLDER / (source.stem if source.is_file() else source.resolve().name)
    if (out / CONFIG_FILE).exists():
        raise ConfigError(f"--out {out}: a run of that name exists; choose another")
    run = RunConfig(dir=out.parent, name=out.name)
    require_free(run)
    require_writable(out)
    from nanochat_cli.export.import_model import import_model

    session = session_of(ctx)
    import_model(source, run, session.reporter, verify=verify)


def require_importable(source: Path) -> None:
    """Refuse what the names and documents of a source already rule out, before torch is imported."""
    from nanochat_cli.config.load import CONFIG_FILE
    from nanochat_cli.formats.huggingface.files import CONFIG_JSON, read_config, weight_files

    if not source.exists():
        advice = f"; from the hub: hf download {source} --local-dir DIR" if str(source).count("/") == 1 else ""
        raise DataError(f"{source}: no such folder or file{advice}")
    if source.is_file():
        if source.suffix != ".gguf":
            raise DataError(f"{source}: neither a Hugging Face folder nor a .gguf file")
        return
    if (source / CONFIG_FILE).exists():
        raise DataError(f"{source}: is a run already")
    if not (source / CONFIG_JSON).is_file():
        raise DataError(f"{source}: not a Hugging Face folder (it has no {CONFIG_JSON})")
    read_config(source)
    weight_files(source)
