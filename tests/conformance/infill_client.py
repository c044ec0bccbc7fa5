"""llama.cpp's `/infill` in a process of its own: `python -m tests.conformance.infill_client REQUEST RESPONSE`.

As `nanochat_cli.export.llama_cpp_client`, whose server it starts: `gaps` are bodies for `/infill`, `prompts` token ids
for `/completion`; every answer has the text of the prompt that was read, the number of its tokens, and what came next.
"""

import json
import sys
from pathlib import Path
from typing import Any

from nanochat_cli.export import llama_cpp_client as client


def main(request_path: str, response_path: str) -> None:
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    parameters = client._parameters(request)
    parameters.n_batch, parameters.n_predict = request["batch"], request["predict"]
    server = client.compiled.Server(parameters)  # ends with its last reference
    url = server.listening_address
    settings = {"n_predict": 8, "temperature": 0.0, "return_tokens": True, "cache_prompt": False}
    answers = [client._post(url, "/infill", {**settings, **gap}) for gap in request["gaps"]]
    answers += [client._post(url, "/completion", {**settings, "prompt": ids}) for ids in request["prompts"]]
    Path(response_path).write_text(json.dumps([_known(answer) for answer in answers]), encoding="utf-8")


def _known(answer: dict[str, Any]) -> dict[str, Any]:
    return {key: answer[key] for key in ("prompt", "tokens_evaluated", "tokens")}


if __name__ == "__main__":
    main(*sys.argv[1:])
