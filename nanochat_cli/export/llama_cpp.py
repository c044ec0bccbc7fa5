"""Asking llama.cpp about a GGUF file: generated text, full-vocabulary log-probabilities, tokenisation.

Runs `llama_cpp_client` in a child process with a timeout, so that whatever llama.cpp does to a file, an
abort included, comes back as one ValidationFailure. Needs the xllamacpp package (extra `llama-cpp`).
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat_cli.errors import ConfigError, ValidationFailure

DEFAULT_TIMEOUT = 600.0
"""Seconds for one child process, from loading the file to the last answer."""
MAX_CONTEXT = 4096
"""Positions that llama.cpp allocates at most; the tests and samples here are short."""


@dataclass(frozen=True)
class Completion:
    """One prompt to continue. prompt: token ids, or text that llama.cpp tokenises itself."""

    prompt: Sequence[int] | str
    n_predict: int
    n_probs: int = 0
    """Log-probabilities wanted per step: 0, or the vocabulary size for all."""
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Continuation:
    """What llama.cpp made of a Completion. logprobs: one row per generated token, in order of ids."""

    text: str
    tokens: list[int]
    logprobs: list[list[float]] = field(repr=False)


def is_available() -> bool:
    """Whether xllamacpp is installed; imports nothing."""
    return importlib.util.find_spec("xllamacpp") is not None


def complete(path: Path, completions: Sequence[Completion], timeout: float = DEFAULT_TIMEOUT) -> list[Continuation]:
    """Continue each prompt, from an empty cache. Raises ValidationFailure when llama.cpp cannot."""
    jobs = [
        {
            "prompt": job.prompt if isinstance(job.prompt, str) else list(job.prompt),
            "n_predict": job.n_predict,
            "n_probs": job.n_probs,
            "temperature": job.temperature,
            "seed": job.seed,
        }
        for job in completions
    ]
    longest = max((len(job.prompt) + job.n_predict for job in completions), default=0)
    answer = _ask(path, {"completions": jobs, "context": _context(longest)}, timeout)
    return [Continuation(**entry) for entry in answer["completions"]]


def tokenize(path: Path, texts: Sequence[str], timeout: float = DEFAULT_TIMEOUT) -> list[list[int]]:
    """Token ids of each text, special tokens as plain characters. Raises ValidationFailure when llama.cpp cannot."""
    return _ask(path, {"texts": list(texts), "context": _context(0)}, timeout)["tokens"]


def llama_cpp_generate(
    path: Path, prompt: Sequence[int] | str, n_tokens: int, temperature: float = 0.0, seed: int = 0
) -> str:
    """The continuation of a prompt by llama.cpp, as text. Raises ConfigError without xllamacpp."""
    job = Completion(prompt, n_tokens, temperature=temperature, seed=seed)
    return complete(path, [job])[0].text


def _context(longest: int) -> int:
    # A text prompt has at most as many tokens as characters of UTF-8; a multiple of 256 is what llama.cpp rounds to.
    return min(MAX_CONTEXT, -(-max(longest, 1) // 256) * 256)


def _ask(path: Path, request: dict[str, Any], timeout: float) -> dict[str, Any]:
    if not is_available():
        raise ConfigError("xllamacpp is not installed: pip install 'nanochat[llama-cpp]'")
    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="nanochat-llama-cpp-") as folder:
        asked, answered = Path(folder, "request.json"), Path(folder, "response.json")
        asked.write_text(json.dumps({**request, "model": str(path.resolve()), "threads": threads}), encoding="utf-8")
        command = [sys.executable, "-m", "nanochat_cli.export.llama_cpp_client", str(asked), str(answered)]
        try:
            child = subprocess.run(command, capture_output=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired as error:
            raise ValidationFailure(f"llama.cpp did not finish with {path} within {timeout:g} s") from error
        if child.returncode or not answered.exists():
            raise ValidationFailure(f"llama.cpp failed on {path} ({_reason(child)})")
        return json.loads(answered.read_text(encoding="utf-8"))


def _reason(child: "subprocess.CompletedProcess[bytes]") -> str:
    """The line of its log that says most, and how the process ended."""
    lines = (child.stderr + b"\n" + child.stdout).decode(errors="replace").splitlines()
    telling = [line.strip() for line in lines if "error" in line.lower() or "assert" in line.lower()]
    end = f"signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
    return f"{end}: {telling[0]}" if telling else end
