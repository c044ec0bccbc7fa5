"""`nanochat chat`: through a pipe, and (slow) on a terminal, where Ctrl-C stops an answer and not the program."""

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from nanochat_cli.cli.app import main
from nanochat_cli.config.sections.export import ExportConfig
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.formats.gguf.write import export_gguf
from nanochat_cli.inference.chat_template import find_template
from nanochat_cli.inference.generate import generate, generate_tokens
from nanochat_cli.inference.packed_model import PackedTransformer
from nanochat_cli.inference.sampling import SamplingConfig
from nanochat_cli.inference.text_stream import as_text
from nanochat_cli.inference.writer import Writer
from nanochat_cli.model.transformer import Transformer
from tests.evaluation.saved_runs import save_run

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Saved = tuple[Path, Transformer, Tokenizer]


@pytest.fixture(scope="module")
def writes(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A run without a template."""
    run = tmp_path_factory.mktemp("work") / "runs" / "writes"
    return run, *save_run(run, max_seq_len=256)


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    run = tmp_path_factory.mktemp("work") / "runs" / "talks"
    saved = save_run(run, max_seq_len=256)
    (run / "chat_template.jinja").write_text(TEMPLATE)
    return run, *saved


def chat(monkeypatch: pytest.MonkeyPatch, lines: str | bytes, *line: object) -> int:
    content = lines.encode() if isinstance(lines, str) else lines
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
    return main(["chat", *map(str, line)])


def answer_of(saved: Saved, messages: Sequence[dict], seed: int, max_tokens: int) -> str:
    """Drawn from the whole prompt, with nothing read before, and cut at the end of the turn."""
    _, model, tokenizer = saved
    text = "".join(f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in messages)
    ids = tokenizer.encode(f"{text}<|im_start|>assistant\n", allow_special=True)
    settings = SamplingConfig(max_tokens=max_tokens, temperature=0.8, top_p=0.95, seed=seed)
    end = tokenizer.special_tokens["<|im_end|>"]
    never = [token for token in tokenizer.never_sampled if token != end]
    steps = generate_tokens(PackedTransformer.from_model(model), [ids], settings, end, never)
    return "".join(as_text((None if one == tokenizer.eos_id else one for (one,) in steps), tokenizer))


def test_lines_from_a_pipe_are_a_conversation_and_only_answers_go_to_standard_output(
    talks, monkeypatch, capfd, tmp_path
):
    out = tmp_path / "out.json"
    assert chat(monkeypatch, "hello\n\nagain\n", talks[0], "--max-tokens", 12, "--seed", 5, "--json", out) == 0
    messages = json.loads(out.read_text())["messages"]
    assert [one["role"] for one in messages] == ["user", "assistant"] * 2
    assert [one["content"] for one in messages[::2]] == ["hello", "again"]
    assert messages[1]["content"] == answer_of(talks, messages[:1], 5, 12)
    assert messages[3]["content"] == answer_of(talks, messages[:3], 6, 12)
    captured = capfd.readouterr()
    said = "".join(text if text.endswith("\n") else f"{text}\n" for text in (one["content"] for one in messages[1::2]))
    assert captured.out == said
    assert "a conversation" in captured.err


def test_a_model_without_a_template_writes_a_text_in_turn_with_its_reader(writes, monkeypatch, capfd, tmp_path):
    run, model, tokenizer = writes
    saved = tmp_path / "text.txt"
    code = chat(monkeypatch, f"def f(\n(x):\\\n  \n/save {saved}\n", run, "--max-tokens", 9, "--quiet")
    assert code == 0
    text, packed = "", PackedTransformer.from_model(model)
    for seed, line in enumerate(["def f(", "(x):\n  "]):
        text += line
        settings = SamplingConfig(max_tokens=9, temperature=0.8, top_p=0.95, seed=seed)
        text += "".join(generate(packed, tokenizer, text, settings))
    assert saved.read_bytes().decode() == text
    assert capfd.readouterr().err == ""


def test_commands(talks, monkeypatch, capfd, tmp_path):
    saved = tmp_path / "said.jsonl"
    lines = f"/help\nhello\n/reset\nagain\n/save {saved}\n/save {saved}\n/save\n/sing\n/quit\nnever read\n"
    assert chat(monkeypatch, lines, talks[0], "--max-tokens", 4) == 0
    (line,) = saved.read_text().splitlines()
    messages = json.loads(line)["messages"]
    assert [one["content"] for one in messages[::2]] == ["again"]
    said = capfd.readouterr().err
    assert "/save FILE" in said
    assert f"warning: {saved}: not written: File exists" in said
    assert "warning: /save needs the name of a file" in said
    assert "warning: /sing is not a command" in said


def test_a_long_conversation_leaves_out_its_oldest_messages_and_goes_on(talks, monkeypatch, capfd, tmp_path):
    out = tmp_path / "out.json"
    lines = f"{'a' * 120}\n{'b' * 120}\n{'c' * 300}\nd\n"
    assert chat(monkeypatch, lines, talks[0], "--max-tokens", 8, "--json", out) == 0
    said = capfd.readouterr().err
    assert "the oldest messages are no longer read" in said
    assert "warning: the prompt has" in said, "one message alone is too long: it is not part of the conversation"
    messages = json.loads(out.read_text())["messages"]
    assert [one["content"][:1] for one in messages[::2]] == ["a", "b", "d"]
    assert messages[3]["content"] == answer_of(talks, messages[2:3], 1, 8)
    assert messages[5]["content"] == answer_of(talks, messages[2:5], 3, 8)


def test_any_bytes_may_be_piped_in(writes, monkeypatch, capfd, tmp_path):
    saved = tmp_path / "text"
    assert chat(monkeypatch, b"caf\xe9\n/save " + bytes(saved) + b"\n", writes[0], "--max-tokens", 2) == 0
    assert saved.read_bytes().startswith(b"caf\xe9")


def test_a_file_brings_its_own_template_and_an_option_another(talks, monkeypatch, capfd, tmp_path):
    _, model, tokenizer = talks
    export_gguf(model, tokenizer, tmp_path / "small.gguf", ExportConfig(), {}, TEMPLATE)
    assert find_template(tmp_path / "small.gguf") == TEMPLATE
    (tmp_path / "mine.jinja").write_text("{{ raise_exception('never') }}")
    assert chat(monkeypatch, "x\n", talks[0], "--chat-template", tmp_path / "mine.jinja") == 0
    assert "warning: the chat template refuses these messages: never" in capfd.readouterr().err
    (tmp_path / "bad.jinja").write_text("{% for %}")
    assert chat(monkeypatch, "x\n", talks[0], "--chat-template", tmp_path / "bad.jinja") == 2
    assert "not a chat template" in capfd.readouterr().err
    assert chat(monkeypatch, "x\n", talks[0], "--chat-template", tmp_path / "none.jinja") == 3


def test_a_text_that_is_dropped_gives_its_place_back(writes):
    _, model, tokenizer = writes
    writer = Writer(PackedTransformer.from_model(model), tokenizer)
    settings = SamplingConfig(max_tokens=20, seed=1)
    whole = "".join(writer.stream(writer.continuation("def f", settings)))
    row = writer.continuation("def f", settings)
    begun = writer.stream(row)
    first = next(begun)
    row.cancel()
    assert whole.startswith(first + "".join(begun))
    assert row.finish == "cancelled"
    assert "".join(writer.stream(writer.continuation("def f", settings))) == whole


# -- on a terminal -----------------------------------------------------------------------------------------------------


class Terminal:
    """`nanochat LINE` on a terminal of its own."""

    def __init__(self, *line: object) -> None:
        self.child, self.master = pty.fork()
        if self.child == 0:
            os.environ["OMP_NUM_THREADS"] = "1"
            os.execv(sys.executable, [sys.executable, "-m", "nanochat_cli", *map(str, line)])
        self.seen = ""

    def wait(self, pattern: str) -> str:
        """What has been shown up to the pattern, which is then forgotten."""
        deadline = time.monotonic() + 60
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < deadline, f"never {pattern}: {self.seen!r}"
            if select.select([self.master], [], [], 0.5)[0]:
                self.seen += os.read(self.master, 4096).decode(errors="replace")
        shown, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return shown

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def end(self) -> int:
        status = os.waitpid(self.child, 0)[1]
        os.close(self.master)
        return os.waitstatus_to_exitcode(status)


@pytest.mark.slow
def test_on_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_ends(tmp_path):
    run = tmp_path / "run"
    save_run(run, max_seq_len=65536)
    (run / "chat_template.jinja").write_text(TEMPLATE)
    saved = tmp_path / "said.json"
    terminal = Terminal("chat", run, "--max-tokens", 30000)
    try:
        terminal.wait("> ")
        terminal.type("hello\n")
        terminal.wait("hello\r\n(?s:.){40}")
        terminal.type("\x03")
        terminal.wait(r"\(stopped\)(?s:.)*> ")
        terminal.type("\x03")
        terminal.wait("Ctrl-D ends")
        terminal.wait("> ")
        terminal.type(f"/save {saved}\n")
        terminal.wait(r"2\s+messages")
        terminal.wait("> ")
        terminal.type("\x04")
        assert terminal.end() == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(terminal.child, signal.SIGKILL)
    said = json.loads(saved.read_text())["messages"]
    assert said[0]["content"] == "hello"
    assert 0 < len(said[1]["content"]) < 100_000
