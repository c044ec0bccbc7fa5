"""The whole chain with the network closed: nothing needs it, and nothing even tries to reach it.

Each command runs in a network namespace of its own, where only the loopback interface is up, and ends at once when
Python code connects elsewhere or looks up a name. Only sources that say so (`hf:`) and `--push` may use the network.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.tiny import TINY, write_corpus

CLOSED = """
import fcntl, os, socket, struct, sys
with socket.socket() as any_socket:  # llama.cpp answers on the loopback interface
    fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh22x", b"lo", 1))  # SIOCSIFFLAGS, IFF_UP
def forbid(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        address = arguments[1] if event in ("socket.connect", "socket.sendto") else arguments[0]
        host = address[0] if isinstance(address, tuple) else address
        if host not in ("127.0.0.1", "localhost", "::1") and not str(host).startswith("/"):
            os.write(2, f"it uses the network: {event} {arguments!r}".encode())
            os._exit(99)
sys.addaudithook(forbid)
"""
RUN = CLOSED + "from nanochat_cli.cli.app import main\nsys.exit(main(sys.argv[1:]))\n"
UNSHARE = shutil.which("unshare")
COMMANDS = [
    ["tokenize", "--source", "src", "--out", "data", "--vocab-size", "300"],
    ["data", "data"],
    ["train", *TINY, "--set", "data.path=data", "--set", "train.total_steps=4", "--name", "tiny"],
    ["eval", "tiny"],
    ["export", "tiny"],
    ["export", "tiny", "--hf"],
    ["verify", "tiny"],
    ["generate", "tiny", "-p", "def ", "--max-tokens", "4"],
    ["generate", "runs/tiny/model.gguf", "-p", "def ", "--max-tokens", "4"],
    ["inspect", "tiny"],
    ["plan", "--preset", "quickstart"],
    ["doctor"],
    ["validate", "--quick"],
]


def closed(*command: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    assert UNSHARE is not None
    return subprocess.run(
        [UNSHARE, "--map-root-user", "--net", *command], cwd=cwd, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_no_command_needs_or_tries_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if UNSHARE is None or closed("true", cwd=tmp_path).returncode:
        pytest.skip("no network namespace can be made here")
    reach = "import socket; socket.create_connection(('192.0.2.1', 80), 1)"
    assert "unreachable" in closed(sys.executable, "-c", CLOSED.partition("def")[0] + reach, cwd=tmp_path).stderr
    assert closed(sys.executable, "-c", CLOSED + reach, cwd=tmp_path).returncode == 99
    monkeypatch.setenv("NANOCHAT_CACHE", str(tmp_path / "cache"))
    write_corpus(tmp_path / "src")
    for line in COMMANDS:
        ended = closed(sys.executable, "-c", RUN, *line, cwd=tmp_path)
        assert ended.returncode == 0, f"{line}: {ended.stdout[-2000:]}{ended.stderr[-2000:]}"
