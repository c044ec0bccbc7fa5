"""What each level of isolation available here holds back, and what it lets honest programs do."""

# ruff: noqa: E501 (a program is easier to read as it stands)

import errno
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanochat_cli.sandbox import namespaces, process, system_calls
from nanochat_cli.sandbox.limits import MIB
from nanochat_cli.sandbox.pool import SandboxPool
from nanochat_cli.sandbox.process import Command, Ended, Isolation, interpreter, run
from nanochat_cli.sandbox.python.judge import _not_compiled
from nanochat_cli.sandbox.rust.judge import toolchain
from nanochat_cli.sandbox.sandbox import Case, Limits, Outcome, Program, Sandbox
from tests.evaluation.programs import needs_rustc

LIMITS = Limits(wall=3, cpu=3, memory=192 * MIB, file_size=8 * MIB, disk=16 * MIB, files=200, processes=16)
COMPILE = Limits(wall=20, cpu=20, memory=1536 * MIB, file_size=32 * MIB, disk=64 * MIB, processes=48, open_files=256)


@pytest.fixture(scope="module", params=["namespaces", "bubblewrap", "limits, own user", "limits, shared user"])
def level(request):
    """An isolation that works here, with another interpreter if other users cannot read that of the tests."""
    mode, _, user = request.param.partition(", ")
    found = Isolation(mode, os.getuid() == 0 and user != "shared user", request.param)
    patch = pytest.MonkeyPatch()
    if user == "own user":
        if os.getuid() != 0:
            pytest.skip("only root can run programs as another user")
        patch.setattr(sys, "executable", "/usr/bin/python3")
    argv, visible = interpreter()
    try:
        ended, _, errors = run(Command([*argv, "-c", "pass"], Limits(), visible=visible), found)
        if ended.status != "ok" or ended.error:
            pytest.skip(f"{request.param}: {ended.error or errors or ended.status}")
        yield found
    finally:
        patch.undo()


@pytest.fixture(scope="module")
def sandbox(level):
    return Sandbox(LIMITS, COMPILE, isolated=level)


C = "import ctypes, os, time\nc = ctypes.CDLL(None, use_errno=True)\n"
REFUSED = {
    "POSIX shared memory": "open('/dev/shm/nanochat-hostile', 'wb').write(bytes(100))\nprint('won')\n",
    "tmpfs over its folder": (
        C
        + "uid = os.getuid()\nc.unshare(0x10020000)\ntry: open('/proc/self/uid_map', 'w').write(f'0 {uid} 1')\nexcept OSError: pass\n"
        "assert c.mount(b't', os.getcwd().encode(), b'tmpfs', 0, b'size=1g') == 0\nprint('won')\n"
    ),
    "memory of another process": C + "assert c.ptrace(16, os.getppid(), 0, 0) == 0\nprint('won')\n",
}


@pytest.fixture(scope="module")
def refused(sandbox):
    with ThreadPoolExecutor(2) as pool:
        return dict(
            zip(REFUSED, pool.map(lambda source: sandbox.execute("python", source), REFUSED.values()), strict=True)
        )


@pytest.mark.parametrize("name", REFUSED)
def test_system_calls_that_escape_the_limits_are_refused(refused, name):
    outcome = refused[name]
    assert "won" not in outcome.stdout, outcome
    assert outcome.status == "runtime error", outcome


def test_every_call_of_the_filter_fails_with_its_error(sandbox):
    if platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("there is no filter for this architecture")
    column = ("x86_64", "aarch64").index(platform.machine())
    numbers = {name: both[column] for name, both in system_calls.REFUSED.items()}
    clone, socket = ((56, 220)[column], (41, 198)[column])
    calls = [(name, number, 0) for name, number in numbers.items()] + [("clone3", 435, 0)]
    calls += [(f"clone {space:#x}", clone, space | 17) for space in (0x20000, *(1 << bit for bit in range(25, 31)))]
    calls += [(f"socket {family}", socket, family) for family in (16, 17, 38, 40)]
    source = (
        f"{C}for name, number, value in {calls!r}:\n    assert c.syscall(number, value, 0, 0, 0, 0, 0) == -1, name\n"
    )
    outcome = sandbox.execute("python", source + "    print(name, ctypes.get_errno(), sep=':')\n")
    assert outcome.status == "ok", outcome
    found = {name: int(number) for name, number in (line.rsplit(":", 1) for line in outcome.stdout.splitlines())}
    families = errno.EPERM if sandbox.isolation.mode == "limits" else errno.EAFNOSUPPORT
    special = {"clone3": errno.ENOSYS} | {name: families for name in found if name.startswith("socket ")}
    assert found == {name: special.get(name, errno.EPERM) for name, _, _ in calls}


def test_files_of_the_host_are_out_of_reach(sandbox, tmp_path):
    if sandbox.isolation.mode == "limits" and not system_calls.can_confine():
        pytest.skip("this kernel has no Landlock")
    for folder in (*tmp_path.parents[:2], tmp_path):
        folder.chmod(0o755)
    (tmp_path / "secret").write_text("do-not-read-me")
    paths = [tmp_path / "secret", tmp_path, Path("/etc/passwd"), Path(f"/proc/{os.getpid()}/environ")]
    source = (
        f"import os\nfor path in {[str(path) for path in paths]}:\n    for what in (open, os.listdir, lambda path: open(path + '.new', 'w')):\n"
        "        try: what(path); print('won', path)\n        except OSError: print('refused')\n"
    )
    assert sandbox.execute("python", source).stdout == "refused\n" * 3 * len(paths)


def test_no_socket_reaches_the_host(sandbox):
    server = socket.create_server(("127.0.0.1", 0))
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind(f"\0nanochat-levels-{os.getpid()}")
    abstract.listen()
    with server, abstract:
        for connect in (
            f"socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)",
            f"socket.socket(socket.AF_UNIX).connect({abstract.getsockname().decode()!r})",
        ):
            outcome = sandbox.execute("python", f"import socket\n{connect}\nprint('won')\n")
            assert (outcome.status, outcome.stdout) == ("runtime error", ""), outcome


HELPERS = """
import multiprocessing.pool, socket, subprocess, tempfile, threading
a, b = socket.socketpair()
a.sendall(b'pair'); assert b.recv(9) == b'pair'
thread = threading.Thread(target=print, args=('thread',)); thread.start(); thread.join()
print(subprocess.run(['/bin/sh', '-c', 'echo shell | cat'], capture_output=True, text=True, check=True).stdout, end='')
with tempfile.NamedTemporaryFile() as file: file.write(b'x')
"""


def test_what_honest_programs_need_still_works(sandbox):
    outcome = sandbox.execute("python", HELPERS)
    assert (outcome.status, outcome.stdout) == ("ok", "thread\nshell\n"), outcome


@pytest.mark.skipif(shutil.which("cc", path="/usr/bin:/bin") is None, reason="there is no C compiler in /usr/bin")
def test_a_c_compiler_and_what_it_makes_work_inside(level):
    source = (
        "import subprocess\nopen('a.c', 'w').write('int main(void) { return 42; }')\n"
        "subprocess.run(['cc', 'a.c', '-o', 'a'], check=True)\nprint(subprocess.run(['./a']).returncode)\n"
    )
    outcome = Sandbox(COMPILE, isolated=level).execute("python", source)
    assert (outcome.status, outcome.stdout) == ("ok", "42\n"), outcome


@needs_rustc
@pytest.mark.slow
def test_cargo_builds_inside(level, tmp_path):
    if level.description == "limits, own user":
        pytest.skip("rustc of the tests is readable by their user alone")
    rustc, root = toolchain()
    if not Path(root, "bin/cargo").is_file():
        pytest.skip("cargo is not installed")
    manifest = '[package]\nname = "a"\nversion = "0.1.0"\nedition = "2021"\n[[bin]]\nname = "a"\npath = "main.rs"\n'
    (tmp_path / "Cargo.toml").write_text(manifest)
    (tmp_path / "main.rs").write_text('fn main() { println!("built"); }\n')
    files = {name: tmp_path / name for name in ("Cargo.toml", "main.rs")}
    argv = [f"{root}/bin/cargo", "run", "--offline", "--config", f'build.rustc="{rustc}"']
    ended, out, errors = run(Command(argv, COMPILE, files=files, visible=[root]), level)
    assert (ended.status, out) == ("ok", "built\n"), errors


def test_shared_pages_of_several_processes_count_as_memory(sandbox):
    source = (  # each stays within the address space that a process may have
        "import mmap, os, time\nos.fork(); os.fork()\nm = mmap.mmap(-1, 90 << 20)\n"
        "for start in range(0, len(m), 1 << 20): m[start : start + (1 << 20)] = b'x' * (1 << 20)\ntime.sleep(9)\n"
    )
    assert sandbox.execute("python", source).status == "memory"


def test_pages_that_processes_share_count_once(sandbox):
    source = (
        "import mmap, os, time\nm = mmap.mmap(-1, 70 << 20)\n"
        "for start in range(0, len(m), 1 << 20): m[start : start + (1 << 20)] = b'x' * (1 << 20)\n"
        "os.fork(); os.fork()\nsum(m[i] for i in range(0, len(m), 4096))\ntime.sleep(0.2)\n"
    )
    assert sandbox.execute("python", source).status == "ok"


@pytest.mark.parametrize(
    "source",
    [
        "import time\nheld = []\nfor i in range(5):\n    f = open('x', 'wb'); f.write(bytes(7 << 20)); f.flush()\n"
        "    import os; os.unlink('x'); held.append(f)\nprint('won', flush=True)\ntime.sleep(9)\n",
        "import mmap, os, time\nheld = []\nfor i in range(5):\n    f = open('x', 'w+b'); f.write(bytes(7 << 20)); f.flush()\n"
        "    held.append(mmap.mmap(f.fileno(), 0)); os.unlink('x'); f.close()\nprint('won', flush=True)\ntime.sleep(9)\n",
    ],
    ids=["open", "mapped"],
)
def test_files_without_a_name_count_as_disk(sandbox, source):
    outcome = sandbox.execute("python", source)
    assert outcome.status == "disk limit" or (outcome.status == "runtime error" and "won" not in outcome.stdout)


def test_empty_folders_count_as_files(sandbox):
    source = "import os\nfor i in range(10**6):\n    os.mkdir(str(i))\nprint('won')\n"
    outcome = sandbox.execute("python", source)
    assert outcome.status in ("disk limit", "runtime error"), outcome


RUST = r"""
extern "C" {
    fn shmget(key: i32, size: usize, flags: i32) -> i32;
    fn memfd_create(name: *const u8, flags: u32) -> i32;
    fn unshare(flags: i32) -> i32;
    fn mount(a: *const u8, b: *const u8, c: *const u8, d: u64, e: *const u8) -> i32;
}
fn main() {
    let found = unsafe { [shmget(0, 1 << 27, 0o1600), memfd_create(c"x".as_ptr().cast(), 0), unshare(0x10020000),
        mount(c"t".as_ptr().cast(), c".".as_ptr().cast(), c"tmpfs".as_ptr().cast(), 0, std::ptr::null())] };
    let threads = std::thread::spawn(|| 42).join().unwrap();
    println!("{found:?} {threads} {}", std::fs::write("/dev/shm/nanochat-hostile", "x").is_ok());
}
"""


@needs_rustc
def test_rust_is_refused_the_same_and_still_has_threads(sandbox):
    if sandbox.isolation.description == "limits, own user":
        pytest.skip("rustc of the tests is readable by their user alone")
    outcome = sandbox.execute("rust", RUST)
    assert outcome.stdout == "[-1, -1, -1, -1] 42 false\n", outcome


KILLERS = {
    "all at once": "import os, signal, time\nfor _ in range(40):\n    try: os.kill(-1, signal.SIGKILL)\n    except OSError: pass\n    time.sleep(0.02)\n",
    "one by one": (
        "import os, signal, time\nfor _ in range(40):\n    for pid in filter(str.isdigit, os.listdir('/proc')):\n"
        "        if int(pid) not in (os.getpid(), os.getppid(), 1):\n            try: os.kill(int(pid), signal.SIGKILL)\n            except OSError: pass\n"
        "    time.sleep(0.02)\n"
    ),
}


@pytest.fixture
def bystander():
    """A process of the tests' user that a program might try to kill."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield child
    child.communicate(b"\n")


def test_a_program_cannot_disturb_its_neighbours(level, bystander):
    sources = list(KILLERS.values())
    if (
        level.mode == "limits" and not level.drop and os.getuid() == 0
    ):  # a fault here must not kill every process of root
        sources = [
            f"import os\nos.kill({bystander.pid}, 9)\n",
            f"import resource\nresource.prlimit({bystander.pid}, resource.RLIMIT_CPU, (0, 0))\n",
        ]
    victim = "import time\ntime.sleep({})\ndef f(x):\n    return x * x\n"
    victims = [Program("python", victim.format(0.3 + i / 100), (Case("f(3)", "9"),)) for i in range(3)]
    killers = [Program("python", source + "def f(x): return 0\n", (Case("f(3)", "9"),)) for source in sources]
    programs = [killers[0], victims[0], killers[1], *victims[1:]]
    with SandboxPool(Sandbox(LIMITS, isolated=level), workers=3) as pool:
        outcomes = pool.judge_all(programs)
    assert [outcome.solved for outcome in outcomes] == [False, True, False, True, True], outcomes
    assert pool.judged <= len(programs) + 2, "a neighbour had to be judged again"
    assert bystander.poll() is None


def test_a_disturbed_program_is_judged_again_when_all_others_are_done(tmp_path: Path):
    calls: list[str] = []

    class Disturbed(Sandbox):
        def judge(self, program):
            calls.append(program.source)
            killed = program.source == "b" and calls.count("b") == 1
            return Outcome("ran", "killed" if killed else "ok", passed=int(not killed), total=1)

    programs = [Program("python", source, (Case("1", "1"),)) for source in "abc"]
    with SandboxPool(Disturbed(), workers=1, cache=tmp_path) as pool:
        assert [outcome.solved for outcome in pool.judge_all(programs)] == [True] * 3
    assert calls == ["a", "b", "c", "b"]
    with SandboxPool(Disturbed(), workers=1, cache=tmp_path) as pool:
        assert [outcome.solved for outcome in pool.judge_all(programs)] == [True] * 3
        assert pool.judged == 0


def _descendants() -> list[int]:
    return namespaces.descendants(os.getpid())


def test_a_killed_grader_gives_no_verdict():
    def kill() -> None:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            for pid in _descendants():
                try:
                    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if b"grader.py" in words and time.monotonic() > begin + 1:
                    os.kill(pid, signal.SIGKILL)
                    return
            time.sleep(0.02)

    begin = time.monotonic()
    thread = threading.Thread(target=kill)
    thread.start()
    source = "import time\ndef f(): time.sleep(5)\n"
    outcome = Sandbox(Limits(wall=8)).judge(Program("python", source, (Case("f()", "None"),)))
    thread.join()
    assert outcome.status == "killed"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_killed_compiler_is_not_a_compile_error(number):
    ended = Ended(-number, None, None, 0.1)
    outcome = _not_compiled(Outcome("ran", ended.status), [], ended)
    assert outcome.status == "killed"


def test_a_compiler_that_crashes_is_a_compile_error():
    ended = Ended(-signal.SIGSEGV, None, None, 0.1)
    assert _not_compiled(Outcome("ran", ended.status), [], ended).status == "compile error"


def test_the_few_users_of_a_container_are_used_in_turn(monkeypatch):
    monkeypatch.setattr(process.Path, "read_text", lambda self, **_: "0 100000 65536\n")
    process._users.cache_clear()
    drawn = {process._uid() for _ in range(500)}
    monkeypatch.undo()
    process._users.cache_clear()
    assert len(drawn) == 500
    assert all(1000 <= uid < 65534 for uid in drawn)
