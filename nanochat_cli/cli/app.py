"""`nanochat`: the table of subcommands, each imported when it is called, and the handling of every error.

Only Typer is imported here: `nanochat --help` costs what an empty Typer app costs. A subcommand is a
module with a Typer app named `app`; its line in the help comes from the table below.
"""

import contextlib
import errno
import importlib
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException
from typer.main import get_command

from nanochat_cli import __version__
from nanochat_cli.cli.options import require_known_backend
from nanochat_cli.cli.session import Session, common_parameters
from nanochat_cli.errors import ConfigError, DataError, NanochatError
from nanochat_cli.home import provide_home
from nanochat_cli.training.distributed.ranks import speaks, world_size


@dataclass(frozen=True)
class Entry:
    """One subcommand: the module that holds it and its line in `nanochat --help`."""

    module: str
    help: str
    hidden: bool = False


COMMANDS: dict[str, Entry] = {
    "quickstart": Entry("quickstart", "The whole chain on this machine: tokenize, train, measure, export, run."),
    "tokenize": Entry("tokenize", "Train a tokenizer and encode a corpus into shards."),
    "data": Entry("data", "Print the card of a data set, or export it as token files of other programs."),
    "train": Entry("train", "Train a ternary model."),
    "eval": Entry("evaluate", "Measure bits per byte, compile rate or pass@k."),
    "grpo": Entry("grpo", "Let a run practise problems that a sandbox judges, and report before and after."),
    "generate": Entry("generate", "Continue a prompt with a run or a GGUF file."),
    "chat": Entry("chat", "Talk with a run or a GGUF file in the terminal."),
    "serve": Entry("serve", "Answer OpenAI's clients and editors over HTTP, with a run or a GGUF file."),
    "export": Entry("export", "Write a verified GGUF file or Hugging Face folder."),
    "verify": Entry("verify", "Compare an export, or a run's checkpoints, with the checksums it was written with."),
    "import": Entry("import_model", "Make a run of a model from elsewhere: a Hugging Face folder or a GGUF file."),
    "convert": Entry("convert", "Make a ternary model of a float one, and compare the two."),
    "export-gguf": Entry("export", "Write a verified GGUF file.", hidden=True),
    "validate": Entry("validate", "Check the whole chain on a tiny model, in under a minute."),
    "validate-e2e": Entry("validate", "Check the whole chain on a tiny model.", hidden=True),
    "bench": Entry("bench", "Measure the kernels, or whole models against llama.cpp."),
    "benchmark": Entry("bench", "Measure the kernels, or whole models against llama.cpp.", hidden=True),
    "plan": Entry("plan", "Print parameters, memory, file size and time of a configuration."),
    "score": Entry("score", "Write the loss of every training token under a run, for token filtering."),
    "inspect": Entry("inspect", "Look into a run: health of its ternary layers and its residual streams."),
    "doctor": Entry("doctor", "Show what is installed, what can compute, and what is missing."),
    "config": Entry("config", "Print the JSON schema of configuration files, for editors."),
    "presets": Entry("presets", "List presets with their true sizes, or show one."),
}


class LazyGroup(TyperGroup):
    """Lists subcommands from the table and imports the module of the one that is called."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, entry in COMMANDS.items():
            self.add_command(TyperCommand(name, help=entry.help, hidden=entry.hidden))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Load the subcommand's module first. ctx: Typer's private Context class."""
        if args[0] in COMMANDS:
            require_known_backend()
            if world_size() > 1 and args[0] != "train":
                raise ConfigError(f"nanochat {args[0]} runs in one process: several ranks can only train")
            provide_home()
            self.add_command(_load(args[0]), args[0])
        return super().resolve_command(ctx, args)


def _load(name: str) -> Any:
    module = importlib.import_module(f"nanochat_cli.cli.{COMMANDS[name].module}")
    command = get_command(module.app)
    command.name = name
    for part in [command, *getattr(command, "commands", {}).values()]:
        part.params.extend(common_parameters())
        # The source's line breaks do not fit the terminal: each paragraph is rewrapped.
        part.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in (part.help or "").split("\n\n"))
    return command


app = typer.Typer(cls=LazyGroup, no_args_is_help=True)


def _print_version(value: bool) -> None:
    if value:
        print(f"nanochat {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Train, measure, validate and export small ternary (1.58-bit) language models."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; every expected error becomes one line."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    session = Session(arguments)
    for stream in (sys.stdout, sys.stderr):
        # A terminal that is not UTF-8 shows "?" for an unknown character, instead of ending the command.
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
    try:
        _require_text(arguments)
        status = get_command(app).main(
            args=arguments,
            prog_name="nanochat",
            standalone_mode=False,
            obj=session,
        )
        code = status if isinstance(status, int) else 0
        if code == 130:
            return _fail(session, "interrupted", code)
        session.write_json({})
        return code
    except (NanochatError, TyperException) as error:
        if session.verbose:
            _print_traceback()
        message = str(error) if isinstance(error, NanochatError) else error.format_message()
        return _fail(session, message, error.exit_code)
    except SystemExit as exiting:
        # Typer exits when the reader of our output, such as `head`, closes the pipe: not an error.
        return 0 if isinstance(exiting.__context__, BrokenPipeError) else 1
    except OSError as error:
        if error.errno not in _FILE_TROUBLE:
            return _fail_unexpectedly(session, error)
        if session.verbose:
            _print_traceback()
        where = f"{error.filename}: " if error.filename is not None else ""
        return _fail(session, f"{where}{error.strerror}", DataError.exit_code)
    except typer.Abort:
        return _fail(session, "interrupted", 130)
    except Exception as error:  # noqa: BLE001 - the last line of defence; the traceback is kept
        if _is_out_of_memory(error):
            if session.verbose:
                _print_traceback()
            return _fail(session, f"out of memory: lower train.batch_size, train.seq_len or the model ({error})", 2)
        return _fail_unexpectedly(session, error)


_ANY_BYTES = {"-p", "--prompt", "--stop"}
"""Options of `generate` whose text goes to the tokenizer, which takes any bytes."""


def _require_text(arguments: Sequence[str]) -> None:
    """Raise ConfigError for an argument that is not UTF-8, which configurations and reports cannot hold.

    Prompts may be any bytes, and so may the file names of a corpus that `tokenize` reads.
    """
    for option, argument in zip(["", *arguments], arguments, strict=False):
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            if arguments[0] == "tokenize" or option in _ANY_BYTES or argument.partition("=")[0] in _ANY_BYTES:
                continue
            shown = argument.encode("utf-8", "backslashreplace").decode()
            raise ConfigError(f"the argument {shown:.200} is not UTF-8: retype it, or rename the file") from None


_FILE_TROUBLE = {
    errno.EACCES,
    errno.EBUSY,
    errno.EDQUOT,
    errno.EEXIST,
    errno.EFBIG,
    errno.EINTR,
    errno.EIO,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.ENOTEMPTY,
    errno.EPERM,
    errno.EROFS,
    errno.ESTALE,
}
"""The user's file system is at fault; any other OSError is an internal error."""


def _fail(session: Session, message: str, code: int) -> int:
    line = " ".join(message.split())
    if line and speaks(code):
        with contextlib.suppress(OSError, DataError):  # standard output may be what failed
            session.end_line()
        print(f"error: {line}", file=sys.stderr)
    try:
        session.write_json({"error": line, "exit_code": code})
    except DataError as error:
        print(f"warning: {error}", file=sys.stderr)
    return code


def _fail_unexpectedly(session: Session, error: Exception) -> int:
    """Report an internal error: one line, and the traceback in a file unless `--verbose` shows it."""
    summary = f"internal error: {type(error).__name__}: {error}"
    if session.verbose:
        _print_traceback()
        return _fail(session, summary, 1)
    import tempfile
    import traceback

    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", prefix="nanochat-", suffix=".traceback.txt", delete=False
    ) as file:
        traceback.print_exc(file=file)
    return _fail(session, f"{summary} (traceback in {file.name}; --verbose shows it)", 1)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether it is a MemoryError or torch's error on CPU or CUDA; does not import torch."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def _print_traceback() -> None:
    import traceback

    traceback.print_exc()


if __name__ == "__main__":
    sys.exit(main())
