"""The endpoints that editors use, with the bodies that llama.vim sends."""

from collections.abc import Iterator

import httpx
import pytest

from nanochat_cli.inference.generate import generate_tokens
from nanochat_cli.inference.sampling import SamplingConfig
from nanochat_cli.serve.engine import Served
from nanochat_cli.serve.errors import RequestError
from nanochat_cli.serve.infill import infill_ids
from tests.serve.live import Live, client, live, tiny_served

FIELDS = ["prompt_n", "prompt_ms", "prompt_per_token_ms", "prompt_per_second"]
FIELDS += ["predicted_n", "predicted_ms", "predicted_per_token_ms", "predicted_per_second"]
LLAMA_VIM = {
    "id_slot": 0,
    "input_prefix": "import json\n\ndef load(path):\n",
    "input_suffix": "\n    return found\n",
    "input_extra": [{"text": "def save(path): ...", "time": 1.5, "filename": "save.py"}],
    "prompt": "    found = ",
    "n_predict": 16,
    "stop": [],
    "n_indent": 4,
    "top_k": 40,
    "top_p": 0.9,
    "samplers": ["top_k", "top_p", "infill"],
    "stream": False,
    "cache_prompt": True,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 250,
    "response_fields": ["content", *(f"timings/{name}" for name in FIELDS), "truncated", "tokens_cached"],
    "model": "",
}
"""The body of a completion (autoload/llama.vim, 2026-01); 16 tokens in place of 128."""
LLAMA_VIM_WARMS = {
    "id_slot": 0,
    "input_prefix": "",
    "input_suffix": "",
    "input_extra": [{"text": "def save(path): ...", "time": [1, 2], "filename": "save.py"}],
    "prompt": "",
    "n_predict": 0,
    "temperature": 0.0,
    "samplers": [],
    "stream": False,
    "cache_prompt": True,
    "t_max_prompt_ms": 1,
    "t_max_predict_ms": 1,
    "response_fields": [""],
    "model": "",
}
"""What it sends in the background, to have what was seen elsewhere read."""
LLAMA_VSCODE = {
    "id_slot": 0,
    "input_prefix": "import json\n\ndef load(path):\n",
    "input_suffix": "\n    return found\n",
    "input_extra": [{"text": "def save(path): ...", "time": 1700000000000, "filename": "save.py"}],
    "prompt": "    found = ",
    "n_predict": 16,
    "n_cmpl": 3,
    "top_k": 40,
    "top_p": 0.99,
    "stream": False,
    "samplers": ["top_k", "top_p", "infill"],
    "cache_prompt": True,
    "n_indent": 4,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 500,
    "lora": [{"id": 0, "scale": 0.5}],
    "model": "any",
}
"""The body of a completion (llama.vscode's src/llama-server.ts, 2026-08)."""


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(waiting=20) as server:
        yield server


@pytest.fixture
def http(server: Live) -> Iterator[httpx.Client]:
    with client(server) as http:
        yield http


def test_llama_vims_requests_are_answered_with_the_fields_that_it_reads(http):
    found = http.post("/infill", json=LLAMA_VIM).json()
    assert set(found) == set(LLAMA_VIM["response_fields"])
    assert isinstance(found["content"], str)
    warmed = http.post("/infill", json=LLAMA_VIM_WARMS)
    assert (warmed.status_code, warmed.json()) == (200, {})


def test_llama_vscodes_request_is_answered_with_what_it_reads(http):
    found = http.post("/infill", json=LLAMA_VSCODE).json()
    assert isinstance(found["content"], str)
    assert {"tokens_cached", "truncated"} <= found.keys()
    assert set(FIELDS) <= found["timings"].keys()


ALL = {**LLAMA_VIM, "response_fields": None, "seed": 3}


def test_the_infill_sampler_ends_a_text_whose_tokens_are_all_improbable(http):
    """A model with random weights never gives a token a chance of 0.2: nothing is suggested, instead of noise."""
    found = http.post("/infill", json=ALL).json()
    assert (found["content"], found["stop_type"], found["tokens_predicted"]) == ("", "eos", 1)
    for samplers in (["top_k", "top_p"], "kp"):
        noise = http.post("/infill", json={**ALL, "samplers": samplers, "n_indent": 0}).json()
        assert noise["tokens_predicted"] > 1
    as_word = http.post("/infill", json={**ALL, "samplers": "kpi"}).json()
    assert as_word["tokens_predicted"] == 1


def test_samplers_that_a_request_does_not_name_are_off(http):
    """temperature is not named, so that it is 1 whatever the request says, as in llama.cpp."""
    ask = {**ALL, "samplers": ["top_k"], "n_indent": 0, "top_k": 5, "top_p": 0.1, "min_p": 0.5, "temperature": 0.01}
    plain = {**ask, "samplers": None, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0}
    assert http.post("/infill", json=ask).json()["tokens"] == http.post("/infill", json=plain).json()["tokens"]
    assert http.post("/infill", json={**ask, "samplers": None}).json()["tokens"] != plain


def test_a_suggestion_keeps_its_indentation_and_ends_with_a_line_when_its_time_is_over(http):
    ask = {**ALL, "samplers": ["temperature"], "temperature": 3.0, "n_predict": 60}
    cut, late = 0, 0
    for seed in range(6):
        found = http.post("/infill", json={**ask, "seed": seed, "t_max_predict_ms": 0}).json()
        _, *lines = found["content"].split("\n")
        assert all(line[:4].strip(" \t") == "" and len(line) >= 4 for line in lines[:-1])
        cut += found["stop_type"] == "limit" and found["tokens_predicted"] < 60
        found = http.post("/infill", json={**ask, "seed": seed, "n_indent": 0, "t_max_predict_ms": 1e-3}).json()
        assert "\n" not in found["content"][:-1], "a line is not cut off, and no other is begun"
        late += found["content"].endswith("\n")
    assert min(cut, late) > 0


def test_infill_continues_the_prompt_of_its_parts(server, http):
    """Typed text belongs to the prefix; parts are tokenised alone, in the order prefix, suffix, middle."""
    served = server.served
    special, encode = served.tokenizer.special_tokens, served.tokenizer.encode
    ids = [special["<|fim_prefix|>"], *encode("def f(x):\n    ret")]
    ids += [special["<|fim_suffix|>"], *encode("\n\n"), special["<|fim_middle|>"]]
    tokens = [
        step[0]
        for step in generate_tokens(
            *(served.model, [ids], SamplingConfig(max_tokens=12, temperature=0), served.tokenizer.eos_id),
            served.tokenizer.never_sampled,
        )
    ]
    body = {
        "input_prefix": "def f(x):\n",
        "prompt": "    ret",
        "input_suffix": "\n\n",
        "n_predict": 12,
        "temperature": 0,
    }
    found = http.post("/infill", json=body).json()
    assert found["tokens"][: len(tokens)] == tokens
    assert found["tokens_evaluated"] == len(ids)
    with http.stream("POST", "/infill", json={**body, "stream": True}) as response:
        lines = list(response.iter_lines())
    assert '"stop": true' in lines[-2]
    assert "[DONE]" not in "".join(lines)


@pytest.mark.parametrize("spm", [False, True])
@pytest.mark.parametrize("max_tokens", [None, 8, 250])
def test_a_long_surrounding_keeps_what_is_next_to_the_cursor(spm, max_tokens):
    served = tiny_served()
    served = Served(**{**vars(served), "spm": spm})
    ids = infill_ids(served, "a" * 900 + "<", ">" + "b" * 900, max_tokens, [{"text": "c" * 900}])
    assert 100 < len(ids) <= served.context - min(max_tokens or 256, served.context // 2) + 1
    text = served.tokenizer.decode(ids)
    before, after = ("<<|fim_middle|>", "<|fim_suffix|>>") if spm else ("<<|fim_suffix|>>", "<|fim_middle|>")
    assert before in text
    assert after in text


def test_a_vocabulary_without_the_tokens_is_one_error():
    served = tiny_served()
    special = {name: id for name, id in served.tokenizer.special_tokens.items() if "suffix" not in name}
    served.tokenizer.special_tokens = special
    with pytest.raises(RequestError, match=r"vocabulary lacks <\|fim_suffix\|>") as refused:
        infill_ids(served, "a", "b", 4)
    assert refused.value.status == 501


def test_tokens_and_texts_of_the_tokenizer(server, http):
    tokenizer = server.served.tokenizer
    text = "def f(x): # ∑ <|im_end|>"
    ids = http.post("/tokenize", json={"content": text}).json()["tokens"]
    assert ids == tokenizer.encode(text, allow_special=True)
    plain = http.post("/tokenize", json={"content": text, "parse_special": False}).json()["tokens"]
    assert plain == tokenizer.encode(text) != ids
    assert http.post("/detokenize", json={"tokens": plain}).json()["content"] == text
    pieces = http.post("/tokenize", json={"content": "if", "with_pieces": True}).json()["tokens"]
    assert "".join(one["piece"] for one in pieces) == "if"
    assert http.post("/detokenize", json={"tokens": [9999]}).status_code == 400


def test_props_and_metrics_say_what_clients_ask(server, http):
    props = http.get("/props").json()
    assert props["default_generation_settings"]["n_ctx"] == 256
    assert props["total_slots"] == server.engine.slots

    def total(name: str) -> float:
        lines = http.get("/metrics").text.splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith(f"nanochat:{name} ")))

    before = total("tokens_predicted_total")
    http.post("/v1/completions", json={"prompt": "z", "max_tokens": 5, "seed": 0})
    assert total("tokens_predicted_total") == before + 5
    assert total("requests_processing") == 0
