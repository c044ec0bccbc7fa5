"""A real vim with llama.vim, in tmux, shows what the server suggests and takes it over. Slow.

The plugin is looked for where plugin managers put it, and in the folder that LLAMA_VIM names.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from nanochat_cli.inference.packed_model import PackedTransformer
from nanochat_cli.serve.engine import Served
from tests.inference.tiny_models import spread_model, tiny_config
from tests.serve.live import Live, client, live, tiny_served

SECONDS = 30
PLACES = ("plugged/llama.vim", "bundle/llama.vim", "pack/*/start/llama.vim", "pack/*/opt/llama.vim")


def plugin() -> Path | None:
    named = [Path(os.environ["LLAMA_VIM"])] if "LLAMA_VIM" in os.environ else []
    found = [*named, *(path for place in PLACES for path in (Path.home() / ".vim").glob(place))]
    return next((path for path in found if (path / "autoload" / "llama.vim").is_file()), None)


MISSING = [name for name in ("vim", "tmux", "curl") if shutil.which(name) is None]
MISSING += [] if plugin() else ["the plugin llama.vim (LLAMA_VIM)"]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")]


def confident_served() -> Served:
    """A model that is nearly certain of its next token, and knows only letters."""
    served = tiny_served()
    model = spread_model(tiny_config(vocab_size=served.tokenizer.vocab_size, max_seq_len=served.context))
    letters = [token for token in range(served.tokenizer.vocab_size) if served.tokenizer.token_bytes(token).isalpha()]
    with torch.no_grad():
        kept = model.unembedding[letters] * 30
        model.unembedding.zero_()
        model.unembedding[letters] = kept
    return Served("confident", PackedTransformer.from_model(model), served.tokenizer)


@pytest.fixture
def server() -> Iterator[Live]:
    with live(confident_served()) as server, client(server):
        yield server


def tmux(*line: str) -> str:
    """What it says; empty once vim, and tmux with it, has ended."""
    command = ["tmux", "-L", f"nanochat-{os.getpid()}", *line]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def until(found: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not found():
        assert time.monotonic() < deadline, f"never {what}:\n{tmux('capture-pane', '-p')}"
        time.sleep(0.1)


def test_vim_shows_a_suggestion_and_tab_takes_it_over(server, tmp_path):
    file, rc = tmp_path / "one.py", tmp_path / "vimrc"
    file.write_text("def one():\n    ret\n")
    config = f"{{'endpoint_fim': '{server.url}/infill', 'n_predict': 6, 'show_info': 0, 'ring_n_chunks': 0}}"
    rc.write_text(f"set nocompatible noswapfile\nlet g:llama_config = {config}\nset rtp^={plugin()}\n")
    tmux("new-session", "-d", "-x", "80", "-y", "20", f"vim -u {rc} {file}")
    try:
        until(lambda: "def one" in (screen := tmux("capture-pane", "-p")) or "Press ENTER" in screen, "opened")
        if "Press ENTER" in tmux("capture-pane", "-p"):  # a warning of the plugin about vim 9.0
            tmux("send-keys", "Enter")
            until(lambda: "def one" in tmux("capture-pane", "-p"), "opened")
        tmux("send-keys", "2GA", "x")
        until(lambda: "retx" in (screen := tmux("capture-pane", "-p")) and "retx\n" not in screen, "suggested")
        (line,) = [line for line in tmux("capture-pane", "-p").splitlines() if "retx" in line]
        suggested = line.strip()
        assert suggested.removeprefix("retx").isalpha()
        assert file.read_text() == "def one():\n    ret\n", "it is not in the text yet"
        tmux("send-keys", "Tab")
        tmux("send-keys", "Escape", ":wq", "Enter")
        until(lambda: suggested in file.read_text(), "saved")
        assert file.read_text() == f"def one():\n    {suggested}\n"
    finally:
        tmux("kill-server")
