"""llama.cpp in a separate process: `python -m nanochat_cli.export.llama_cpp_client REQUEST RESPONSE`.

Reads a JSON request, loads the file it names through xllamacpp's server, and writes a JSON response.
The process is separate because llama.cpp answers a bad file with abort(), which would kill us too.
Called by `llama_cpp`, which documents the two objects; imports neither torch nor our model.

Configured for comparison, not for speed: F32 key/value cache and no flash attention (an F16 cache alone
changes int8 roundings), no repacking of weights, one sequence at a time.
"""

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp

compiled: Any = xllamacpp  # a compiled module without type information


def main(request_path: str, response_path: str) -> None:
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    server = compiled.Server(_parameters(request))
    url = server.listening_address
    response = {
        "completions": [_complete(url, job) for job in request.get("completions", [])],
        "logprobs": _logprobs(url, request.get("prompts", []), request.get("vocab_size", 0)),
        "tokens": [_tokenize(url, text) for text in request.get("texts", [])],
        "chats": [_chat(url, messages) for messages in request.get("conversations", [])],
    }
    Path(response_path).write_text(json.dumps(response), encoding="utf-8")


def _parameters(request: dict[str, Any]) -> Any:
    parameters = compiled.CommonParams()
    parameters.model.path = request["model"]
    parameters.n_ctx = request["context"]
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = request["threads"]
    parameters.n_parallel = 1
    parameters.warmup = False
    parameters.port = 0
    parameters.fit_params = False
    parameters.no_extra_bufts = True
    parameters.n_gpu_layers = 0
    parameters.cache_type_k = parameters.cache_type_v = compiled.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = compiled.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return parameters


def _complete(url: str, job: dict[str, Any]) -> dict[str, Any]:
    answer = _post(url, "/completion", {**job, "return_tokens": True, "cache_prompt": False})
    return {"text": answer["content"], "tokens": answer["tokens"]}


def _logprobs(url: str, prompts: list[list[int]], vocab_size: int) -> list[list[float]]:
    """Log-probabilities of the token after each prompt, in order of ids.

    The server omits the probabilities if the sampled token ends inside a UTF-8 character. They are taken before
    sampling, so a bias makes it choose a plain letter without changing them.
    """
    if not prompts:
        return []
    letter = _tokenize(url, "a")[0]
    body = {
        "n_predict": 1,
        "temperature": 0.0,
        "n_probs": vocab_size,
        "logit_bias": [[letter, 1e6]],
        "cache_prompt": False,
    }
    rows = []
    for prompt in prompts:
        (step,) = _post(url, "/completion", {**body, "prompt": prompt})["completion_probabilities"]
        row = [float("-inf")] * vocab_size
        for entry in step["top_logprobs"]:
            row[entry["id"]] = entry["logprob"]
        rows.append(row)
    return rows


def _chat(url: str, messages: list[dict[str, str]]) -> list[int]:
    prompt = _post(url, "/apply-template", {"messages": messages})["prompt"]
    return _tokenize(url, prompt, special=True)


def _tokenize(url: str, text: str, *, special: bool = False) -> list[int]:
    return _post(url, "/tokenize", {"content": text, "add_special": False, "parse_special": special})["tokens"]


def _post(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)


if __name__ == "__main__":
    main(*sys.argv[1:])
