"""`nanochat export`: write a run as a file, or a folder, that other programs can run."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nanochat_cli.cli.options import Checkpoint, Overrides, Run
from nanochat_cli.cli.session import Session, session_of
from nanochat_cli.errors import ConfigError, DataError

if TYPE_CHECKING:
    from nanochat_cli.config.schema import Config
    from nanochat_cli.formats.run.checkpoints import Which

app = typer.Typer(add_completion=False)
GGUF_FILE = "model.gguf"
FOLDER_TYPES = "auto", "f16", "f32"


@app.command()
def export(
    ctx: typer.Context,
    run: Run = None,
    gguf: Annotated[
        bool, typer.Option("--gguf", help="Write GGUF (the default); beside --hf: into its folder.")
    ] = False,
    hf: Annotated[
        bool, typer.Option("--hf", help="Write a Hugging Face folder that transformers loads without other code.")
    ] = False,
    push: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Upload the folder of --hf to the hub, privately.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Default: RUN/model.gguf; with --hf: RUN/hf.")
    ] = None,
    tensor_type: Annotated[
        str | None,
        typer.Option("--type", metavar="TYPE", help="auto, tq2_0, tq1_0, q2_0, q4_0, f16 or f32; default: auto."),
    ] = None,
    head: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Embeddings and head: f16 or f32; default: f16.")
    ] = None,
    verify: Annotated[
        bool | None, typer.Option("--verify/--no-verify", help="Read the file back and compare; default: verify.")
    ] = None,
    checkpoint: Checkpoint = None,
    overrides: Overrides = [],  # noqa: B006 - Typer copies it
) -> None:
    """Write a GGUF file with the codes and scales that were trained, or a Hugging Face folder, and verify it.

    The GGUF file is read back and compared bit for bit; with xllamacpp installed, llama.cpp's log-probabilities
    are compared too. The folder is loaded by transformers, if that is installed: logits, greedy tokens and token ids.
    """
    from nanochat_cli.config.load import run_config
    from nanochat_cli.formats.run.find import find_run, require_writable, which_checkpoint

    session = session_of(ctx)
    if push is not None and not hf:
        raise ConfigError("--push uploads the folder of --hf: give that too")
    folder = find_run(run)
    config = run_config(
        folder,
        overrides,
        {
            "--type": {"export.type": tensor_type},
            "--head": {"export.head": head},
            "--verify": {"export.verify": verify},
        },
    )
    which = which_checkpoint(folder, checkpoint)
    if hf:
        if tensor_type not in (None, *FOLDER_TYPES) and not gguf:
            raise ConfigError(
                f"--type {tensor_type}: a type of GGUF; a Hugging Face folder takes {', '.join(FOLDER_TYPES)}"
            )
        _export_folder(session, folder, out or folder / "hf", config, which, gguf=gguf, push=push, verify=verify)
        return
    out = out or folder / GGUF_FILE
    if out.is_dir():
        raise DataError(f"--out {out}: is a folder; name a file in it, such as {out / GGUF_FILE}")
    require_writable(out)
    session.engine.export(folder, out, config.export, which)


def _export_folder(
    session: Session,
    run: Path,
    out: Path,
    config: "Config",
    which: "Which",
    *,
    gguf: bool,
    push: str | None,
    verify: bool | None,
) -> None:
    """Refuse what cannot be done before torch is imported; then write the folder, the GGUF file in it first."""
    from nanochat_cli.formats.huggingface.architecture import class_of
    from nanochat_cli.formats.huggingface.publish import require_repository
    from nanochat_cli.formats.run.find import require_writable

    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out}: is a file; --hf writes a folder")
    if out.resolve() == run.resolve():
        raise DataError(f"--out {out}: is the run itself; name a folder in it, such as {out / 'hf'}")
    if push is not None:
        require_repository(push)
    class_of(config.model)
    require_writable(out)
    if verify and find_spec("transformers") is None:
        raise ConfigError("--verify: transformers is not installed: pip install 'nanochat-ternary[hf]'")
    from nanochat_cli.export.huggingface import export_huggingface

    if gguf:
        session.engine.export(run, out / GGUF_FILE, config.export, which)
    export_huggingface(run, out, config.export, which, session.reporter, push=push)
