"""Compiles the C sources of the CPU backend into a shared library, once per source, compiler and machine.

Knows compilers and the folder where the result is kept; leaves loading and calling it to `native`. The library stays
in `$NANOCHAT_CACHE/kernels` (default ~/.cache/nanochat/kernels) under the name KEY-DIGEST.so: KEY is a hash of what it
was made from, DIGEST a hash of its own bytes. So a damaged file is recognised by its name and rebuilt, and processes
that build at the same time need no lock: each writes its own file and renames it. The sources choose instructions at
run time, so a file stays valid on another processor.
"""

import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from nanochat_kernels.backends import Unsupported

SOURCE_FOLDER = Path(__file__).resolve().parent / "source"
FLAGS = (
    *("-O3", "-std=c11", "-fopenmp", "-fPIC", "-shared"),
    "-ffp-contract=off",  # a product and a sum round twice, as the reference does
)
LIBRARIES = ("-lm",)
COMPILERS = ("cc", "gcc", "clang")
COMPILE_SECONDS = 300
_HASH_DIGITS = 24

_log = logging.getLogger("nanochat_kernels")


def shared_library(source: Path = SOURCE_FOLDER) -> Path:
    """The library of every *.c in `source`, compiled unless the cache holds it.

    Call it after `import torch`, whose OpenMP runtime the library then shares. Raises Unsupported, in one line, if
    there is no C compiler, or if the sources do not compile.
    """
    sources = {path.name: path.read_bytes() for path in sorted([*source.glob("*.c"), *source.glob("*.h")])}
    if not any(name.endswith(".c") for name in sources):
        raise Unsupported(f"no C sources in {source}")
    failures: list[str] = []
    for compiler in _compilers():
        try:
            key = _key(sources, compiler)
            return _kept(key) or _keep(key, _compile(compiler, sources))
        except _CompilerFailed as failure:
            failures.append(str(failure))
    raise Unsupported(failures[0])


def cache_folder() -> Path:
    """The folder of compiled kernels, by the application's rule: in $NANOCHAT_CACHE or ~/.cache/nanochat.

    Raises OSError if this user has no home folder.
    """
    root = os.environ.get("NANOCHAT_CACHE")
    try:
        return (Path(root) if root else Path.home() / ".cache" / "nanochat").absolute() / "kernels"
    except RuntimeError as error:
        raise OSError(str(error)) from error


class _CompilerFailed(Exception):
    """One compiler failed; the message says why. Another may succeed."""


def _compilers() -> Iterator[list[str]]:
    """Command lines to try in order: only $CC if it is set. Raises Unsupported if there is none."""
    chosen = os.environ.get("CC", "").strip()
    try:
        commands = [shlex.split(chosen)] if chosen else [[name] for name in COMPILERS]
    except ValueError as error:
        raise Unsupported(f"CC = {chosen} cannot be read: {error}") from None
    available = [[path, *arguments] for name, *arguments in commands if (path := shutil.which(name))]
    if not available:
        if chosen:
            raise Unsupported(f"CC = {chosen} is not a program here")
        raise Unsupported(f"no C compiler ({', '.join(COMPILERS)}): install one, such as gcc")
    seen: set[Path] = set()
    for command in available:  # cc is usually a link to one of the others
        program = Path(command[0]).resolve()
        if program not in seen:
            seen.add(program)
            yield command


def _key(sources: Mapping[str, bytes], compiler: list[str]) -> str:
    """Hash of all that determines what the library does; the compiler by its version message."""
    digest = hashlib.sha256()
    for part in (*FLAGS, *LIBRARIES, *compiler[1:], _run([*compiler, "--version"]), platform.machine()):
        digest.update(part.encode() + b"\0")
    for name, content in sources.items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:_HASH_DIGITS]


def _kept(key: str) -> Path | None:
    """An undamaged library that was built before, in a folder that only this user could have written."""
    for folder in _folders():
        if not folder.is_dir() or not _ours(folder):
            continue
        for path in folder.glob(f"{key}-*.so"):
            with suppress(OSError):
                if _ours(path) and path.name == _name(key, path.read_bytes()):
                    return path
                path.unlink()
    return None


def _folders() -> list[Path]:
    with suppress(OSError):
        return [cache_folder(), *_private_folders()]
    return _private_folders()


def _name(key: str, library: bytes) -> str:
    return f"{key}-{hashlib.sha256(library).hexdigest()[:_HASH_DIGITS]}.so"


def _ours(path: Path) -> bool:
    """Whether only this user, or root, could have changed it."""
    status = path.stat()
    return status.st_uid in (os.getuid(), 0) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _compile(compiler: list[str], sources: Mapping[str, bytes]) -> bytes:
    """The library's bytes, made from copies: what is compiled is what was hashed, even if a source is edited now."""
    _log.info("compiling the CPU kernels with %s, once", compiler[0])
    try:
        with tempfile.TemporaryDirectory(prefix="nanochat-kernels-") as folder:
            for name, content in sources.items():
                (Path(folder) / name).write_bytes(content)
            names = [name for name in sources if name.endswith(".c")]
            _run([*compiler, *FLAGS, *names, "-o", "kernels.so", *LIBRARIES], cwd=folder)
            return (Path(folder) / "kernels.so").read_bytes()
    except OSError as error:
        raise _CompilerFailed(f"{compiler[0]} left no library: {error}") from error


def _run(command: list[str], cwd: str | None = None) -> str:
    """Standard output of a command. Raises _CompilerFailed with the first line that names an error."""
    try:
        child = subprocess.run(
            command,
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMPILE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _CompilerFailed(f"{command[0]} failed: {error}") from error
    if child.returncode:
        lines = [line.strip() for line in child.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line or "cannot find" in line]
        why = [*errors, *lines, f"exit code {child.returncode}"][0]
        raise _CompilerFailed(f"{command[0]} failed: {why}")
    return child.stdout


def _keep(key: str, library: bytes) -> Path:
    """Write the library where the next process finds it or, if that fails, for this process alone."""
    try:
        folder = cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _ours(folder):
            raise PermissionError(f"{folder} may be written by others")
        return _write(folder / _name(key, library), library)
    except OSError as error:
        _log.warning("compiled CPU kernels are kept for this process only: %s", error)
    try:
        return _write(_private_folder() / _name(key, library), library)
    except OSError as error:
        raise Unsupported(f"compiled kernels cannot be written anywhere: {error}") from error


def _write(path: Path, library: bytes) -> Path:
    """Write atomically: another process sees all of the file or none of it."""
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".partial")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(library)
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    return path


_private: list["tempfile.TemporaryDirectory[str]"] = []


def _private_folder() -> Path:
    """This process's temporary folder, removed at its end."""
    if not _private:
        _private.append(tempfile.TemporaryDirectory(prefix="nanochat-kernels-"))
    return Path(_private[0].name)


def _private_folders() -> list[Path]:
    return [Path(folder.name) for folder in _private]
