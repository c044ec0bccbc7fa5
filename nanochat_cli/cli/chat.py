"""`nanochat chat`: a conversation with a model in the terminal, or a text that both write in turn."""

import io
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nanochat_cli.cli.options import Backend, Checkpoint
from nanochat_cli.cli.session import session_of
from nanochat_cli.errors import NanochatError, reason

if TYPE_CHECKING:
    from nanochat_cli.inference.continuous_batch import Row
    from nanochat_cli.inference.sampling import SamplingConfig
    from nanochat_cli.inference.writer import Writer
    from nanochat_cli.report.reporter import Reporter

app = typer.Typer(add_completion=False)

HELP = """/reset       begin anew
/save FILE   write the {what} to a new file
/quit        end, as Ctrl-D does
A line that ends in \\ goes on in the next one. Ctrl-C stops an answer."""


@app.command()
def chat(
    ctx: typer.Context,
    target: Annotated[
        Path | None, typer.Argument(metavar="TARGET", help="A run or a .gguf file; default: the latest run.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the most probable token.")] = 0.8,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="Draw from the smallest set that reaches this probability; 1: from all.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="The same seed and lines draw the same answers.")] = 0,
    chat_template: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Jinja template of conversations; default: the model's own."),
    ] = None,
    checkpoint: Checkpoint = None,
    backend: Backend = None,
) -> None:
    """Talk with a model that was trained on conversations, or write a text in turn with any other.

    What was said before is remembered until /reset. Without a terminal, lines are read from standard input and only
    answers go to standard output.
    """
    from nanochat_cli.formats.run.find import find_run_or_gguf, which_checkpoint
    from nanochat_cli.inference.chat_template import find_template

    reporter = session_of(ctx).reporter
    path = find_run_or_gguf(target)
    which = which_checkpoint(path, checkpoint)
    template = find_template(path, chat_template)
    from nanochat_cli.formats.open import load_target
    from nanochat_cli.inference.packed_model import PackedTransformer
    from nanochat_cli.inference.sampling import SamplingConfig
    from nanochat_cli.inference.writer import Writer

    settings = SamplingConfig(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    model, tokenizer, run = load_target(path, which)
    reporter.info(str(path if run is None else run))
    writer = Writer(PackedTransformer.from_model(model, backend), tokenizer, template)
    del model
    talk = Talk(writer, settings, reporter)
    talk.hold()
    reporter.result({"target": str(path), **talk.content()})


class Talk:
    """The loop: lines in, answers out, and what has been said so far. A command that fails is one line."""

    def __init__(self, writer: "Writer", settings: "SamplingConfig", reporter: "Reporter") -> None:
        self.writer, self.settings, self.reporter = writer, settings, reporter
        self.messages: list[dict[str, str]] = []
        self.text = ""
        self.answers = 0
        self.terminal = sys.stdin.isatty() and sys.stdout.isatty()

    def hold(self) -> None:
        """Until /quit or the end of the input."""
        chats = self.writer.template is not None
        self.reporter.info(
            "a conversation: /help lists the commands"
            if chats
            else "no chat template: a text, written in turn; /help lists the commands"
        )
        for line in _lines(self.terminal):
            command, _, rest = line.strip().partition(" ")
            if command == "/quit":
                return
            if command in ("/help", "/reset", "/save"):
                self._obey(command, rest.strip())
            elif command.startswith("/") and chats:
                self.reporter.warn(f"{command} is not a command: /help lists them")
            elif line.strip() or not chats:
                self._answer(line)

    def content(self) -> dict[str, object]:
        """What has been said."""
        return {"text": self.text} if self.writer.template is None else {"messages": self.messages}

    def _obey(self, command: str, argument: str) -> None:
        if command == "/help":
            self.reporter.info(HELP.format(what="text" if self.writer.template is None else "conversation"))
        elif command == "/reset":
            self.messages, self.text = [], ""
        elif not argument:
            self.reporter.warn("/save needs the name of a file")
        else:
            self._save(Path(argument).expanduser())

    def _save(self, path: Path) -> None:
        """As one line of JSON, which `nanochat tokenize` reads, or as text."""
        text = self.text if self.writer.template is None else json.dumps(self.content(), ensure_ascii=False) + "\n"
        try:
            with path.open("x", encoding="utf-8", errors="surrogateescape") as file:
                file.write(text)
        except OSError as error:
            self.reporter.warn(f"{path}: not written: {reason(error)}")
        else:
            self.reporter.info(f"{path}: {len(self.messages)} messages" if self.messages else str(path))

    def _answer(self, line: str) -> None:
        settings = replace(self.settings, seed=self.settings.seed + self.answers)
        self.answers += 1
        asked = [*self.messages, {"role": "user", "content": line}]
        try:
            if self.writer.template is None:
                self.text += line
                self.text += self._written(self.writer.continuation(self.text, settings))
                return
            kept = self.writer.fitting(asked, settings)
            if len(kept) < len(asked):
                self.reporter.info("the context is full: the oldest messages are no longer read")
            answer = self._written(self.writer.answer(kept, settings))
        except NanochatError as error:
            self.reporter.warn(str(error))
        else:
            self.messages = [*asked, {"role": "assistant", "content": answer}]

    def _written(self, row: "Row") -> str:
        """The answer, which is printed as it comes."""
        pieces = []
        with _stops(row) if self.terminal else nullcontext():
            for piece in self.writer.stream(row):
                pieces.append(piece)
                self.reporter.write(piece)
        text = "".join(pieces)
        self.reporter.write("" if text.endswith("\n") else "\n")
        if row.finish == "cancelled":
            self.reporter.info("(stopped)")
        return text


@contextmanager
def _stops(row: "Row") -> Iterator[None]:
    """Ctrl-C ends this answer, at its next token, and not the program."""
    before = signal.signal(signal.SIGINT, lambda *_: row.cancel())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _lines(terminal: bool) -> Iterator[str]:
    """What is typed, or piped in, without line ends; one that ends in a backslash together with the next."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # any bytes are text to the tokenizer
    if terminal:
        import readline  # noqa: F401 - lines can be edited, and called back with the arrow keys
    parts: list[str] = []
    while True:
        try:
            line = input(("> " if not parts else "  ") if terminal else "")
        except EOFError:
            if terminal:
                print()
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            print("\n/quit or Ctrl-D ends")
            parts = []
            continue
        parts.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            yield "\n".join(parts)
            parts = []
