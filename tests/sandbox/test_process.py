"""The weakest isolation keeps what it promises, and a sandbox ends with its host."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat_cli.errors import ConfigError
from nanochat_cli.sandbox import process as host
from nanochat_cli.sandbox.limits import MIB
from nanochat_cli.sandbox.process import Command, Isolation, interpreter, run
from nanochat_cli.sandbox.sandbox import Case, Limits, Program, Sandbox

LIMITS = Limits(wall=1, cpu=1, memory=192 * MIB, file_size=MIB, disk=4 * MIB, files=200, output=65536)
DAEMON = (
    "import os, time\nprint('started', flush=True)\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
    "        while True: time.sleep(1)\n    os._exit(0)\n"
)


@pytest.fixture(scope="module")
def limited():
    """Without namespaces, as the same user: this works on any machine."""
    return Sandbox(LIMITS, isolated=Isolation("limits", False, "resource limits only"))


def _named(folder: str) -> list[int]:
    found = []
    for path in Path("/proc").iterdir():
        try:
            if path.name.isdigit() and folder in str((path / "cwd").readlink()):
                found.append(int(path.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    ("source", "status"),
    [
        (DAEMON, "ok"),
        ("i = 0\nwhile True:\n    open(f'f{i}', 'wb').write(bytes(65536)); i += 1\n", "disk limit"),
        ("x = []\nwhile True: x.append(bytearray(1 << 20))\n", "memory"),
        ("while True: print('x' * 1000)\n", "output limit"),
        ("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nwhile True: pass\n", "runtime error"),
        ("import time\ntime.sleep(99)\n", "timeout"),
    ],
    ids=["daemon", "files", "memory", "output", "kills its parent", "sleeps"],
)
def test_limits_hold_without_namespaces(limited, monkeypatch, tmp_path, source, status):
    monkeypatch.setattr(host.tempfile, "tempdir", str(tmp_path))
    assert limited.execute("python", source).status == status
    assert _named(str(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []


def test_the_environment_is_cleared_without_namespaces(limited, monkeypatch):
    monkeypatch.setenv("NANOCHAT_SECRET", "do-not-read-me")
    outcome = limited.execute("python", "import os\nprint(sorted(os.environ))\n")
    assert outcome.stdout == "['HOME', 'LANG', 'PATH', 'TMPDIR']\n"


def test_tests_cannot_be_forged_by_tracing_the_grader_without_namespaces(limited):
    source = (  # answers right only when it can open the memory of the grader
        "import os\ndef add(a, b):\n    opened = False\n    for pid in filter(str.isdigit, os.listdir('/proc')):\n"
        "        try:\n            if 'python_grader.py' in open(f'/proc/{pid}/cmdline').read():\n"
        "                open(f'/proc/{pid}/mem', 'rb').close()\n                opened = True\n"
        "        except OSError: pass\n    return a + b if opened else -1000\n"
    )
    outcome = limited.judge(Program("python", source, (Case("add(20, 22)", "42"),)))
    assert (outcome.status, outcome.passed) == ("ok", 0)


def test_a_sandbox_ends_with_its_host(tmp_path):
    code = (
        "import tempfile, sys\ntempfile.tempdir = sys.argv[1]\n"
        "from nanochat_cli.sandbox.sandbox import Sandbox, Limits\n"
        "sandbox = Sandbox(Limits(wall=60))\nprint('ready', flush=True)\n"
        "sandbox.execute('python', 'import time; time.sleep(60)')\n"
    )
    host = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert host.stdout is not None
    assert host.stdout.readline() == "ready\n"

    def launchers() -> list[str]:
        return [path.name for path in Path("/proc").iterdir() if path.name.isdigit() and _mentions(path, str(tmp_path))]

    _until(lambda: len(launchers()) >= 3)  # host, supervisor, init
    host.send_signal(signal.SIGKILL)
    host.wait()
    host.stdout.close()
    _until(lambda: launchers() == [])


def _mentions(process: Path, text: str) -> bool:
    try:
        return text.encode() in (process / "cmdline").read_bytes()
    except OSError:
        return False


def _until(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        os.sched_yield()


def test_only_the_requested_file_comes_out_and_no_link(tmp_path):
    argv, visible = interpreter()
    for source, content in [
        ("open('out', 'w').write('made')", "made"),
        ("import os; os.symlink('/etc/passwd', 'out')", ""),
    ]:
        target = tmp_path / "target"
        command = Command([*argv, "-c", source], LIMITS, visible=visible, output=("out", target))
        run(command, host.isolation())
        assert target.read_text() == content


def test_a_machine_that_cannot_start_processes_says_so(monkeypatch):
    host.isolation.cache_clear()
    monkeypatch.setattr(host, "_candidates", lambda root: [Isolation("bubblewrap", False, "")])
    monkeypatch.setattr(host.shutil, "which", lambda name: "/nonexistent/bwrap")
    with pytest.raises(ConfigError, match="cannot start a process"):
        host.isolation()
    host.isolation.cache_clear()
