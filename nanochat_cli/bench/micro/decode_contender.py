"""One side of `nanochat bench decode`: `python -m nanochat_cli.bench.micro.decode_contender REQUEST`.

REQUEST is a JSON file: contender (nanochat or llama.cpp), gguf, threads, prompt (token ids), new_tokens. Loads the
GGUF, prints READY, and for every line on standard input continues the prompt greedily once and prints
`RATES {"prefill": …, "decode": …}` in tokens per second. `WARNING …` lines are passed on, other output is ignored. Each
side is a separate process because two thread pools in one would wait for each other, and because the other side must be
stopped, not idle, during a measurement: idle OpenMP threads spin.

llama.cpp's figures come from its server: prefill is the prompt's tokens over the time until their logits are there;
decode is all new tokens over the time since the first of them was chosen. Ours are counted the same way.
"""

import json
import logging
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

Rates = dict[str, float]


def main(request_path: str) -> None:
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    measure = CONTENDERS[request["contender"]](request)
    print("READY", flush=True)
    for _ in sys.stdin:
        print("RATES", json.dumps(measure()), flush=True)


def _nanochat(request: dict[str, Any]) -> Callable[[], Rates]:
    import torch

    from nanochat_cli.formats.gguf.read import load_gguf
    from nanochat_cli.inference.packed_model import PackedTransformer
    from nanochat_cli.model.cache import KVCache

    logging.basicConfig(stream=sys.stdout, format="WARNING %(message)s", level=logging.WARNING)
    torch.set_num_threads(request["threads"])
    model = PackedTransformer.from_model(load_gguf(Path(request["gguf"]))[0])
    prompt, new_tokens = torch.tensor([request["prompt"]]), request["new_tokens"]
    cache = KVCache(model.config, 1, prompt.shape[1] + new_tokens)

    def next_token(tokens: torch.Tensor) -> torch.Tensor:
        return model.next_logits(tokens, cache).argmax(dim=-1, keepdim=True)

    def measure() -> Rates:
        cache.clear()
        started = time.perf_counter()
        token = next_token(prompt)
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            token = next_token(token)
        return {"prefill": prompt.shape[1] / (first - started), "decode": new_tokens / (time.perf_counter() - first)}

    return measure


def _llama_cpp(request: dict[str, Any]) -> Callable[[], Rates]:
    import xllamacpp

    compiled: Any = xllamacpp  # a compiled module without type information
    parameters = compiled.CommonParams()  # cache, attention, batches: its defaults
    parameters.model.path = request["gguf"]
    parameters.n_ctx = len(request["prompt"]) + request["new_tokens"]
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = request["threads"]
    parameters.n_parallel = 1
    parameters.port = 0
    parameters.fit_params = False
    parameters.n_gpu_layers = 0
    server = compiled.Server(parameters)
    body = {
        "prompt": request["prompt"],
        "n_predict": request["new_tokens"],
        "ignore_eos": True,
        "cache_prompt": False,
        "temperature": 0.0,
        "samplers": ["top_k"],
        "top_k": 1,
    }

    def measure() -> Rates:
        asked = urllib.request.Request(
            server.listening_address + "/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked) as response:
            timings = json.load(response)["timings"]
        counts = {"prompt_n": len(request["prompt"]), "predicted_n": request["new_tokens"]}
        for name, count in counts.items():
            if timings[name] != count:
                raise SystemExit(f"error: llama.cpp counted {timings[name]} tokens as {name} instead of {count}")
        return {"prefill": timings["prompt_per_second"], "decode": timings["predicted_per_second"]}

    return measure


CONTENDERS: dict[str, Callable[[dict[str, Any]], Callable[[], Rates]]] = {
    "nanochat": _nanochat,
    "llama.cpp": _llama_cpp,
}


if __name__ == "__main__":
    main(*sys.argv[1:])
