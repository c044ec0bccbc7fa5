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
    "stream": False,
    "samplers": ["top_k", "top_p", "infill"],
    "cache_prompt": True,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 10000,
    "response_fields": ["content", "timings/prompt_n", "timings/predicted_per_second", "tokens_cached", "truncated"],
}
"""The body of a completion (autoload/llama.vim, 2026-01), with a longer time for a busy machine."""


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(waiting=20) as server:
        yield server


@pytest.fixture
def http(server: Live) -> Iterator[httpx.Client]:
    with client(server) as http:
        yield http


def test_llama_vims_request_is_answered_with_the_fields_that_it_reads(http):
    found = http.post("/infill", json=LLAMA_VIM).json()
    assert set(found) == set(LLAMA_VIM["response_fields"])
    assert isinstance(found["content"], str)
    assert http.post("/infill", json={**LLAMA_VIM, "n_predict": 0}).json()["content"] == ""


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
