"""Asking llama.cpp about a GGUF file: generated text, full-vocabulary log-probabilities, tokenisation.

Runs `llama_cpp_client` in a child process with a timeout, so that any failure of llama.cpp, even an abort,
comes back as one ValidationFailure. Needs the xllamacpp package (extra `llama-cpp`).
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanochat_cli.errors import ConfigError, ValidationFailure
from nanochat_cli.nesting import parse_json

DEFAULT_TIMEOUT = 600.0
"""Seconds for one child process, from loading the file to the last answer."""
MAX_CONTEXT = 4096
"""Most positions that llama.cpp allocates; the tests and samples here are short."""
ONE_THREAD_BYTES = 500_000_000


@dataclass(frozen=True)
class Continuation:
    text: str
    tokens: list[int]


def is_available() -> bool:
    """Whether xllamacpp is installed; imports nothing."""
    return importlib.util.find_spec("xllamacpp") is not None


def complete(
    path: Path,
    prompts: Sequence[Sequence[int] | str],
    n_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    timeout: float = DEFAULT_TIMEOUT,
) -> list[Continuation]:
    """Continue each prompt (token ids, or text that llama.cpp tokenises itself) by at most n_tokens, up to EOS.

    Each starts from an empty cache. Raises ValidationFailure if llama.cpp fails.
    """
    jobs = [
        {
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "n_predict": n_tokens,
            "temperature": temperature,
            "seed": seed,
        }
        for prompt in prompts
    ]
    answer = _ask(path, {"completions": jobs, "context": _context(prompts, n_tokens)}, timeout)
    return [Continuation(**entry) for entry in answer["completions"]]


def logprobs(
    path: Path, prompts: Sequence[Sequence[int]], vocab_size: int, timeout: float = DEFAULT_TIMEOUT
) -> NDArray[np.float64]:
    """Log-probabilities [prompts, V] of the token after each prompt. Raises ValidationFailure if llama.cpp fails."""
    request = {"prompts": [list(prompt) for prompt in prompts], "vocab_size": vocab_size}
    answer = _ask(path, {**request, "context": _context(prompts, 1)}, timeout)
    return np.array(answer["logprobs"], dtype=np.float64).reshape(len(prompts), vocab_size)


def tokenize(path: Path, texts: Sequence[str], timeout: float = DEFAULT_TIMEOUT) -> list[list[int]]:
    """Token ids of each text, special tokens as plain characters. Raises ValidationFailure if llama.cpp fails."""
    return _ask(path, {"texts": list(texts), "context": _context([], 0)}, timeout)["tokens"]


def chat_tokens(path: Path, conversations: Sequence[Any], timeout: float = DEFAULT_TIMEOUT) -> list[list[int]]:
    """Token ids of each conversation up to where the assistant answers, by the file's template and llama.cpp's Jinja.

    conversations: lists of messages, with role and content. Raises ValidationFailure if llama.cpp fails.
    """
    return _ask(path, {"conversations": list(conversations), "context": _context([], 0)}, timeout)["chats"]


def llama_cpp_generate(
    path: Path, prompt: Sequence[int] | str, n_tokens: int, temperature: float = 0.0, seed: int = 0
) -> str:
    """The continuation of a prompt by llama.cpp, as text. Raises ConfigError without xllamacpp."""
    return complete(path, [prompt], n_tokens, temperature, seed)[0].text


def _context(prompts: Sequence[Sequence[int] | str], n_tokens: int) -> int:
    """Positions to allocate: a text has at most as many tokens as bytes; llama.cpp rounds up to 256."""
    lengths = [len(prompt.encode()) if isinstance(prompt, str) else len(prompt) for prompt in prompts]
    return min(MAX_CONTEXT, -(-max(max(lengths, default=0) + n_tokens, 1) // 256) * 256)


def _ask(path: Path, request: dict[str, Any], timeout: float) -> dict[str, Any]:
    if not is_available():
        raise ConfigError("xllamacpp is not installed: install the extra [llama-cpp] of nanochat")
    # llama.cpp's threads spin at every barrier: on a busy machine a second one costs more than it gains.
    threads = 1 if path.stat().st_size < ONE_THREAD_BYTES else len(os.sched_getaffinity(0))
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
        return parse_json(answered.read_text(encoding="utf-8"))


def _reason(child: "subprocess.CompletedProcess[bytes]") -> str:
    """How the process ended, and the most telling line of its log."""
    lines = (child.stderr + b"\n" + child.stdout).decode(errors="replace").splitlines()
    telling = [line.strip() for line in lines if "error" in line.lower() or "assert" in line.lower()]
    end = f"signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
    return f"{end}: {telling[0]}" if telling else end
