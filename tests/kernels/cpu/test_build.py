"""Compiling the C sources once, into a cache that survives parallel processes, read-only homes and damaged files."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat_kernels.backends import Unsupported
from nanochat_kernels.cpu import build
from nanochat_kernels.cpu.build import cache_folder, shared_library

ANSWER = '#include "answer.h"\nint answer(void) { return ANSWER; }\n'
CHILD = """
import ctypes, sys
from pathlib import Path
from nanochat_kernels.cpu.build import shared_library
print("ready", flush=True)
sys.stdin.readline()
path = shared_library(Path(sys.argv[1]))
print(path, ctypes.CDLL(str(path)).answer())
"""
TOGETHER = """
import ctypes, os, sys
from pathlib import Path
from nanochat_kernels.cpu.build import shared_library
reader, writer = os.pipe()
for _ in range(6):
    if os.fork() == 0:
        os.close(writer)
        os.read(reader, 1)  # ends for all of them at once, when the last writer is closed
        path = shared_library(Path(sys.argv[1]))
        os.write(1, f"{path} {ctypes.CDLL(str(path)).answer()}\\n".encode())  # whole, whatever others write
        os._exit(0)
os.close(writer)
for _ in range(6):
    os.wait()
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(build, "_private", [])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source", 42)


def write_source(folder: Path, answer: int) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "answer.c").write_text(ANSWER)
    (folder / "answer.h").write_text(f"#define ANSWER {answer}\n")
    return folder


def answer_of(path: Path) -> int:
    return ctypes.CDLL(str(path)).answer()


def counting_compiler(folder: Path) -> tuple[str, Path]:
    """A CC that logs every compilation, and its log."""
    notes, script = folder / "notes", folder / "counting-cc"
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] || echo compiled >> {notes}\nexec cc "$@"\n')
    script.chmod(0o755)
    return str(script), notes


def cannot_be_written(folder: Path) -> Path:
    """A cache root in which nothing can be created; not even root can write below a file."""
    if os.geteuid() == 0:
        folder.write_text("in the way")
    else:
        folder.mkdir(mode=0o500)
    return folder


def test_the_library_computes_and_lies_in_the_cache(source: Path, tmp_path: Path) -> None:
    path = shared_library(source)
    assert path.parent == cache_folder() == tmp_path / "cache" / "kernels"
    assert answer_of(path) == 42


def test_the_cache_defaults_to_the_home_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NANOCHAT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "nanochat" / "kernels"


def test_it_is_compiled_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, notes = counting_compiler(tmp_path)
    monkeypatch.setenv("CC", compiler)
    assert shared_library(source) == shared_library(source)
    assert notes.read_text() == "compiled\n"


@pytest.mark.parametrize("name", ["answer.c", "answer.h", "more.c"])
def test_a_changed_or_added_source_is_another_library(source: Path, name: str) -> None:
    first = shared_library(source)
    with (source / name).open("a") as file:
        file.write("int more(void) { return 1; }\n" if name == "more.c" else "/* changed */\n")
    assert shared_library(source) != first


def test_other_flags_are_another_library(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = shared_library(source)
    monkeypatch.setenv("CC", "cc -DUNUSED")
    second = shared_library(source)
    assert second.name.split("-")[0] != first.name.split("-")[0]


def test_cc_may_hold_arguments(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source / "answer.h").write_text("")
    monkeypatch.setenv("CC", "cc '-DANSWER=6 * 7'")
    assert answer_of(shared_library(source)) == 42


def test_processes_that_compile_at_the_same_time_all_get_a_whole_library(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", TOGETHER, str(source)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    answers = [line.split() for line in child.stdout.splitlines()]
    assert [answer for _, answer in answers] == ["42"] * 6
    assert {Path(path).parent for path, _ in answers} == {cache_folder()}
    assert not list(cache_folder().glob(".*")), "no partial file stays"


def truncated(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def one_bit_flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncated, emptied, one_bit_flipped])
def test_a_damaged_file_is_built_again(source: Path, damage) -> None:
    path = shared_library(source)
    whole = path.read_bytes()
    damage(path)
    again = shared_library(source)
    assert again.read_bytes() == whole
    assert answer_of(again) == 42


def test_a_read_only_cache_is_reported_and_replaced_for_this_process(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler, notes = counting_compiler(tmp_path)
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("NANOCHAT_CACHE", str(cannot_be_written(tmp_path / "locked")))
    path = shared_library(source)
    assert answer_of(path) == 42
    assert (tmp_path / "locked") not in path.parents
    assert path.parent.stat().st_mode & 0o077 == 0, "nobody else may put a library there"
    assert shared_library(source) == path
    assert notes.read_text() == "compiled\n"
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "kept for this process only" in said
    assert "locked" in said


def test_the_private_folder_ends_with_the_process(source: Path, tmp_path: Path) -> None:
    locked = cannot_be_written(tmp_path / "locked")
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(source)],
        input="go\n",
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "NANOCHAT_CACHE": str(locked)},
    )
    path, answer = child.stdout.splitlines()[1].split()
    assert answer == "42"
    assert not Path(path).parent.exists()


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_folder_that_others_may_write_is_not_trusted(source: Path, mode: int) -> None:
    kept = shared_library(source)
    kept.parent.chmod(mode)
    path = shared_library(source)
    assert path.parent != kept.parent
    assert answer_of(path) == 42


def test_a_file_that_others_may_write_is_built_again(source: Path) -> None:
    kept = shared_library(source)
    kept.chmod(0o666)
    assert shared_library(source).stat().st_mode & 0o022 == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else_is_not_trusted(source: Path) -> None:
    kept = shared_library(source)
    os.chown(kept.parent, 65534, 65534)
    assert shared_library(source).parent != kept.parent


def test_without_a_compiler_the_backend_is_unsupported(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(Unsupported, match=r"^no C compiler \(cc, gcc, clang\): install one"):
        shared_library(source)


def test_a_cc_that_is_not_a_program_is_named(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -O1")
    with pytest.raises(Unsupported, match=r"^CC = no-such-compiler -O1 is not a program here$"):
        shared_library(source)


def test_a_compile_error_is_one_line_with_its_place(source: Path) -> None:
    (source / "broken.c").write_text("int broken(void) {\n  return nothing_of_that_name;\n}\n")
    with pytest.raises(Unsupported, match=r"broken\.c:2:.*error.*nothing_of_that_name") as failure:
        shared_library(source)
    assert "\n" not in str(failure.value)
    assert not list(cache_folder().glob("*"))


def test_a_linker_error_is_reported_too(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "cc -lno_such_library")
    with pytest.raises(Unsupported, match="cannot find -lno_such_library"):
        shared_library(source)


def test_a_second_compiler_is_tried_when_the_first_fails(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "cc").write_text("#!/bin/sh\necho 'error: no OpenMP here' >&2\nexit 1\n")
    (programs / "cc").chmod(0o755)
    compiler = shutil.which("gcc") or shutil.which("clang")
    assert compiler is not None, "the tests need a C compiler"
    (programs / "gcc").symlink_to(compiler)
    monkeypatch.setattr(build.shutil, "which", lambda name: shutil_which(name, programs))
    assert answer_of(shared_library(source)) == 42


def shutil_which(name: str, folder: Path) -> str | None:
    path = folder / name
    return str(path) if path.exists() else None


def test_a_folder_without_sources_is_unsupported(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="no C sources in"):
        shared_library(tmp_path)


def test_the_sources_of_this_package_compile() -> None:
    assert shared_library().suffix == ".so"
