"""llama.cpp's own server in a child process, for a GGUF file: the same endpoints by another program.

The child is separate because llama.cpp answers a bad file with abort(). It ends with us: it waits for the end of its
standard input.
"""

import json
import subprocess
import sys
from pathlib import Path

from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.export.llama_cpp import is_available
from nanochat_cli.report.reporter import Reporter
from nanochat_cli.serve.rules import rules_for


def serve_with_llama_cpp(
    target: Path, reporter: Reporter, *, host: str, port: int, key: str | None, slots: int
) -> None:
    """Serve a file until interrupted. Raises ConfigError for what llama.cpp cannot serve, DataError if it fails."""
    rules_for(host, key)
    if target.suffix != ".gguf":
        raise ConfigError(f"{target}: llama.cpp serves .gguf files: export the run first, or use --engine native")
    if not is_available():
        raise ConfigError("xllamacpp is not installed: pip install 'nanochat-ternary[llama-cpp]'")
    asked = {"model": str(target.resolve()), "name": target.stem, "host": host, "port": port, "slots": slots}
    command = [sys.executable, "-m", "nanochat_cli.serve.llama_cpp_child"]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(json.dumps({**asked, "key": key}) + "\n")  # not on the command line, which others can read
        child.stdin.flush()
        if address := child.stdout.readline().strip():
            reporter.info(f"{target}: {address} (llama.cpp: /v1, /infill); Ctrl-C ends it")
            reporter.result({"target": str(target), "address": address})
        code = child.wait()
    except KeyboardInterrupt:
        return
    finally:
        child.stdin.close()
        child.terminate()
        child.wait()
    raise DataError(f"{target}: llama.cpp's server ended with exit code {code}")
