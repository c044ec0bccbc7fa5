"""llama.cpp in a process of its own: `python -m nanochat_cli.export.llama_cpp_client REQUEST RESPONSE`.

Reads a JSON request, loads the file it names through xllamacpp's server, and writes a JSON response.
A process of its own because llama.cpp answers a bad file with abort(), which would take us with it.
Called by `llama_cpp`, which documents the two objects; imports neither torch nor our model.

Set for comparison, not for speed: F32 key/value cache and no flash attention (an F16 cache alone moves
int8 roundings), no repacking of weights, one sequence at a time.
"""

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp


def main(request_path: str, response_path: str) -> None:
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    server = xllamacpp.Server(_parameters(request))
    url = server.listening_address
    response = {
        "completions": [_complete(url, job) for job in request.get("completions", [])],
        "tokens": [
            _post(url, "/tokenize", {"content": text, "add_special": False, "parse_special": False})["tokens"]
            for text in request.get("texts", [])
        ],
    }
    Path(response_path).write_text(json.dumps(response), encoding="utf-8")


def _parameters(request: dict[str, Any]) -> Any:
    parameters: Any = xllamacpp.CommonParams()
    parameters.model.path = request["model"]
    parameters.n_ctx = request["context"]
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = request["threads"]
    parameters.n_parallel = 1
    parameters.warmup = False
    parameters.port = 0
    parameters.fit_params = False
    parameters.no_extra_bufts = True
    parameters.n_gpu_layers = 0
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return parameters


def _complete(url: str, job: dict[str, Any]) -> dict[str, Any]:
    body = {
        "prompt": job["prompt"],
        "n_predict": job["n_predict"],
        "temperature": job.get("temperature", 0.0),
        "seed": job.get("seed", 0),
        "n_probs": job.get("n_probs", 0),
        "return_tokens": True,
        "cache_prompt": False,
    }
    answer = _post(url, "/completion", body)
    logprobs = []
    for step in answer.get("completion_probabilities", []):
        row = [0.0] * len(step["top_logprobs"])
        for entry in step["top_logprobs"]:
            row[entry["id"]] = entry["logprob"]
        logprobs.append(row)
    return {"text": answer["content"], "tokens": answer["tokens"], "logprobs": logprobs}


def _post(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)


if __name__ == "__main__":
    main(*sys.argv[1:])
