"""`python -m nanochat_cli.serve.llama_cpp_child`: llama.cpp's server, described by a line of JSON on standard input.

Prints its address, and ends when standard input does. Imports neither torch nor our model. `llama_cpp` starts it.
"""

import json
import signal
import sys
from typing import Any

import xllamacpp

compiled: Any = xllamacpp  # a compiled module without type information
POSITIONS = 4096
"""Of each text; llama.cpp divides its context among them."""


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    asked = json.loads(sys.stdin.readline())
    parameters = compiled.CommonParams()
    parameters.model.path, parameters.model_alias = asked["model"], {asked["name"]}
    parameters.hostnames, parameters.port = [asked["host"]], asked["port"]
    parameters.n_parallel, parameters.n_ctx = asked["slots"], asked["slots"] * POSITIONS
    parameters.api_keys = [asked["key"]] if asked["key"] else []
    parameters.endpoint_metrics, parameters.endpoint_slots = True, False  # slots show prompts
    parameters.cors_origins = "localhost"  # by default any page may ask
    parameters.fit_params = False
    parameters.n_gpu_layers = 0
    server = compiled.Server(parameters)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
