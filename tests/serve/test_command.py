"""`nanochat serve` as a command: what it refuses in one line, and a server from its start to Ctrl-C."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from nanochat_cli.cli.app import main
from nanochat_cli.config.sections.export import ExportConfig
from nanochat_cli.export.llama_cpp import is_available
from nanochat_cli.formats.gguf.write import export_gguf
from nanochat_cli.serve import run as starting
from tests.evaluation.saved_runs import save_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("work") / "runs" / "tiny-1"
    save_run(run)
    return run


def refused(capfd: pytest.CaptureFixture[str], *line: object) -> tuple[int, str]:
    code = main(["serve", *map(str, line)])
    captured = capfd.readouterr()
    assert captured.out == ""
    (error,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    return code, error


def test_without_the_extra_one_line_says_how_to_get_it(run, capfd, monkeypatch):
    monkeypatch.setattr(starting, "PACKAGES", ("fastapi", "no_such_package"))
    assert refused(capfd, run) == (
        2,
        "error: nanochat serve needs no_such_package: pip install 'nanochat-ternary[serve]'",
    )


def test_what_cannot_be_served_is_refused(run, capfd, tmp_path):
    code, error = refused(capfd, run, "--host", "0.0.0.0")
    assert (code, "--api-key or NANOCHAT_API_KEY" in error) == (2, True)
    code, error = refused(capfd, run, "--engine", "llama.cpp")
    assert (code, "export the run first" in error) == (2, True)
    (tmp_path / "bad.jinja").write_text("{% for %}")
    code, error = refused(capfd, run, "--chat-template", tmp_path / "bad.jinja")
    assert (code, "not a chat template" in error) == (2, True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, error = refused(capfd, run, "--port", taken.getsockname()[1])
    assert (code, "choose --port" in error) == (2, True)


def test_a_model_that_cannot_be_loaded_ends_the_command(capfd, tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF, but not one")
    code, error = refused(capfd, tmp_path / "broken.gguf", "--port", 0)
    assert (code, "broken.gguf" in error) == (3, True)


@contextlib.contextmanager
def command(*line: object, **environment: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """The process and its address."""
    child = subprocess.Popen(
        [sys.executable, "-m", "nanochat_cli", "serve", *map(str, line), "--port", "0"],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stderr is not None
    try:
        said = next((line for line in child.stderr if "http://" in line), "")
        yield child, next(word for word in said.split() if word.startswith("http://"))
    finally:
        child.kill()
        child.wait()


def answer(http: httpx.Client, path: str, body: dict) -> dict:
    while http.get("/health").status_code != 200:
        pass
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.slow
def test_a_served_run_writes_what_generate_writes_and_ends_in_good_order(run, capfd):
    line = ["generate", str(run), "-p", "def f", "--max-tokens", "20", "--seed", "6", "--temperature", "0.9", "--quiet"]
    assert main(line) == 0
    text = capfd.readouterr().out.removeprefix("def f").removesuffix("\n")
    with (
        command(run, NANOCHAT_API_KEY="k") as (child, url),
        httpx.Client(base_url=url, headers={"Authorization": "Bearer k"}) as http,
    ):
        body = {"prompt": "def f", "max_tokens": 20, "seed": 6, "temperature": 0.9}
        assert answer(http, "/v1/completions", body)["choices"][0]["text"] == text
        assert httpx.get(f"{url}/v1/models").status_code == 401
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 0
        assert child.stderr is not None
        assert "Traceback" not in child.stderr.read()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["native", "llama.cpp"])
def test_both_engines_answer_the_same_requests_about_a_file(tmp_path, engine):
    if engine == "llama.cpp" and not is_available():
        pytest.skip("xllamacpp is not installed")
    model, tokenizer = save_run(tmp_path / "run")
    export_gguf(model, tokenizer, tmp_path / "small.gguf", ExportConfig(), {})
    greedy = {"temperature": 0, "max_tokens": 8, "seed": 1}
    with command(tmp_path / "small.gguf", "--engine", engine) as (child, url), httpx.Client(base_url=url) as http:
        found = answer(http, "/v1/completions", {"prompt": "def f(x", **greedy})
        assert found["usage"]["prompt_tokens"] == len(tokenizer.encode("def f(x"))
        assert found["choices"][0]["finish_reason"] in ("length", "stop")
        filled = answer(http, "/infill", {"input_prefix": "def f(", "input_suffix": "):\n", "n_predict": 4})
        assert {"content", "timings", "tokens_cached", "truncated", "stop_type"} <= filled.keys()
        assert answer(http, "/tokenize", {"content": "def f"})["tokens"] == tokenizer.encode("def f")
        assert answer(http, "/detokenize", {"tokens": tokenizer.encode("x = 1")})["content"] == "x = 1"
        assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["small"]
        assert http.get("/props").json()["default_generation_settings"]["n_ctx"] > 0
        assert http.post("/v1/completions", json={"prompt": "x", "temperature": "hot"}).status_code >= 400
        with http.stream("POST", "/v1/completions", json={"prompt": "def f(x", "stream": True, **greedy}) as response:
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        assert lines[-1] == "[DONE]"
        text = "".join(choice["text"] for line in lines[:-1] for choice in json.loads(line)["choices"])
        assert text == found["choices"][0]["text"]
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 0
