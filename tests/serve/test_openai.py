"""/v1 as OpenAI's clients use it, over HTTP against a live server on a tiny model."""

import json
from collections.abc import Iterator
from types import SimpleNamespace

import httpx
import pytest
import torch

from nanochat_cli.inference.batched import continue_tokens
from nanochat_cli.inference.generate import generate
from nanochat_cli.inference.sampling import SamplingConfig
from nanochat_cli.serve.engine import Served
from tests.evaluation.saved_runs import save_run
from tests.serve.live import Live, client, live, tiny_served


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(waiting=20) as server:
        yield server


@pytest.fixture
def http(server: Live) -> Iterator[httpx.Client]:
    with client(server) as http:
        yield http


def events(http: httpx.Client, path: str, body: dict) -> list[dict]:
    """The JSON of all events; the last one must say that it is."""
    with http.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_models_are_listed_and_found_by_name(http):
    (card,) = http.get("/v1/models").json()["data"]
    assert (card["id"], card["object"]) == ("tiny", "model")
    assert http.get("/v1/models/tiny").json() == card
    missing = http.get("/v1/models/gpt-9")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, 404)


@pytest.mark.parametrize(("temperature", "top_k"), [(0, 0), (1.0, 0), (0.7, 20)])
def test_a_completion_is_what_generate_writes(server, http, temperature, top_k):
    """Also the second time, when its prompt is known, and beside three others."""
    settings = SamplingConfig(max_tokens=24, temperature=temperature, top_k=top_k, seed=7)
    expected = "".join(generate(server.served.model, server.served.tokenizer, "def f(x", settings))
    body = {"prompt": "def f(x", "max_tokens": 24, "temperature": temperature, "top_k": top_k, "seed": 7}
    for _ in range(2):
        (choice,) = http.post("/v1/completions", json=body).json()["choices"]
        assert choice["text"] == expected
    choices = http.post("/v1/completions", json={**body, "prompt": ["x", "def f(x", "if"], "n": 2}).json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))
    assert choices[2]["text"] == expected


def test_prompts_may_be_texts_or_tokens(server, http):
    tokenizer = server.served.tokenizer
    first, second = tokenizer.encode("def f"), tokenizer.encode("import ")
    texts = []
    for prompt in ("def f", first, ["def f", "import "], [first, second]):
        body = {"prompt": prompt, "max_tokens": 5, "seed": 1}
        texts.append([choice["text"] for choice in http.post("/v1/completions", json=body).json()["choices"]])
    assert texts[0] == texts[1] == texts[2][:1]
    assert texts[2] == texts[3]


def test_a_stream_is_the_text_in_pieces_with_a_reason_at_the_end_and_usage_if_asked(http):
    body = {"prompt": "x = ", "max_tokens": 30, "seed": 3, "n": 2, "stream_options": {"include_usage": True}}
    whole = http.post("/v1/completions", json=body).json()
    pieces = events(http, "/v1/completions", body)
    assert pieces[-1]["choices"] == []
    assert pieces[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert all(piece["usage"] is None for piece in pieces[:-1])
    for index, expected in enumerate(whole["choices"]):
        own = [piece["choices"][0] for piece in pieces[:-1] if piece["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in own) == expected["text"]
        assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + [expected["finish_reason"]]


def test_stop_strings_end_a_text_before_them(http):
    body = {"prompt": "a", "max_tokens": 40, "seed": 5}
    free = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    stop = free[len(free) // 2]
    (choice,) = http.post("/v1/completions", json={**body, "stop": [stop]}).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == (free[: free.index(stop)], "stop")
    assert http.post("/v1/completions", json=body).json()["choices"][0]["finish_reason"] == "length"


def test_echo_with_logprobs_scores_a_prompt_as_lm_eval_asks(server, http):
    """Against one pass of the model: values, the best token of every place, and what is None."""
    model, tokenizer = server.served.model, server.served.tokenizer
    ids = tokenizer.encode("def f(x):\n    return")
    body = {"prompt": ids, "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234}
    (choice,) = http.post("/v1/completions", json=body).json()["choices"]
    found = choice["logprobs"]
    assert len(found["tokens"]) == len(found["token_logprobs"]) == len(found["top_logprobs"]) == len(ids) + 1
    assert choice["text"].startswith("def f(x):\n    return")
    expected = model.logits(model(torch.tensor([ids])))[0].log_softmax(-1)
    values = expected[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    assert found["token_logprobs"][1:-1] == pytest.approx(values, abs=1e-5)
    assert [max(top.values()) for top in found["top_logprobs"][1:-1]] == pytest.approx(
        expected[:-1].amax(-1).tolist(), abs=1e-5
    )
    assert found["text_offset"][:2] == [0, len(tokenizer.decode(ids[:1]))]


def test_logprobs_of_drawn_tokens_are_those_of_the_model_at_temperature_1(server, http):
    tokenizer = server.served.tokenizer
    settings = SamplingConfig(max_tokens=6, temperature=1.0)
    (drawn,) = continue_tokens(server.served.model, tokenizer, [tokenizer.encode("y")], settings, [9])
    body = {"prompt": "y", "max_tokens": 6, "seed": 9, "logprobs": 3}
    (choice,) = http.post("/v1/completions", json=body).json()["choices"]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(list(drawn.log_probabilities), abs=1e-6)
    streamed = [event["choices"][0]["logprobs"] for event in events(http, "/v1/completions", body)]
    assert [token for part in streamed for token in part["tokens"]] == choice["logprobs"]["tokens"]
    assert all(len(top) <= 3 for top in choice["logprobs"]["top_logprobs"])


def test_a_conversation_is_continued_after_its_template_and_ends_at_the_end_of_a_turn(server, http):
    messages = [{"role": "user", "content": "sum"}]
    text = http.post("/apply-template", json={"messages": messages}).json()["prompt"]
    assert text == "<|im_start|>user\nsum<|im_end|>\n<|im_start|>assistant\n"
    ids = http.post("/tokenize", json={"content": text}).json()["tokens"]
    assert ids[0] == server.served.tokenizer.special_tokens["<|im_start|>"]
    body = {"messages": messages, "max_tokens": 12, "seed": 2, "logprobs": True, "top_logprobs": 2}
    (choice,) = http.post("/v1/chat/completions", json=body).json()["choices"]
    assert choice["message"]["role"] == "assistant"
    assert [len(one["top_logprobs"]) for one in choice["logprobs"]["content"]] == [2] * len(
        choice["logprobs"]["content"]
    )
    pieces = events(http, "/v1/chat/completions", body)
    assert pieces[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert {piece["object"] for piece in pieces} == {"chat.completion.chunk"}
    content = "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces)
    assert content == choice["message"]["content"]


def test_without_a_template_there_is_no_chat_and_the_error_says_what_to_do():
    with live(tiny_served(template=None)) as server, client(server) as http:
        found = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]})
        assert found.status_code == 400
        assert "--chat-template" in found.json()["error"]["message"]


def test_a_suffix_asks_for_what_belongs_between_as_infill_does(http):
    body = {"prompt": "def f(", "suffix": "):\n", "max_tokens": 9, "temperature": 0}
    (choice,) = http.post("/v1/completions", json=body).json()["choices"]
    asked = {"input_prefix": "def f(", "input_suffix": "):\n", "n_predict": 9, "temperature": 0}
    assert choice["text"] == http.post("/infill", json=asked).json()["content"]


@pytest.mark.slow
def test_lm_evals_own_client_reads_the_numbers_of_our_adapter(tmp_path):
    """Its code makes the request and reads the answer of several prompts at once; only the connection is ours."""
    client_class = pytest.importorskip("lm_eval.models.openai_completions").LocalCompletionsAPI
    from lm_eval.api.instance import Instance

    from nanochat_cli.evaluation.lm_eval import NanochatLM

    save_run(tmp_path / "tiny")
    adapter = NanochatLM(str(tmp_path / "tiny"), batch_size=1)
    pairs = [("def f(x):", " return x"), ("import", " json"), ("for i in range(", "10):\n    pass"), ("x", " = é")]
    asked = [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs]
    expected = adapter.loglikelihood(asked, disable_tqdm=True)
    encoded = [adapter._encode_pair(*pair) for pair in pairs]
    payload = client_class._create_payload(SimpleNamespace(model="tiny"), [before + after for before, after in encoded])
    with live(Served("tiny", adapter.model, adapter.tokens)) as server, client(server) as http:
        answer = http.post("/v1/completions", json=payload).json()
    found = client_class.parse_logprobs(answer, ctxlens=[len(before) for before, _ in encoded])
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.slow
def test_the_openai_sdk_works_with_it(server):
    openai = pytest.importorskip("openai")
    sdk = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in sdk.models.list()] == ["tiny"]
    assert sdk.models.retrieve("tiny").id == "tiny"
    asked = {"model": "tiny", "prompt": "def f", "max_tokens": 8, "seed": 4}
    whole = sdk.completions.create(**asked, n=2, logprobs=2)
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert len(whole.choices[0].logprobs.tokens) == 8
    assert sdk.completions.create(**asked).choices[0].text == whole.choices[0].text
    streamed = list(sdk.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(one.choices[0].text for one in streamed if one.choices) == whole.choices[0].text
    assert streamed[-1].usage.completion_tokens == 8
    messages = [{"role": "user", "content": "hello"}]
    answer = sdk.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=6, seed=1)
    chunks = sdk.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=6, seed=1, stream=True)
    assert "".join(one.choices[0].delta.content or "" for one in chunks) == answer.choices[0].message.content
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("other")
    with pytest.raises(openai.BadRequestError, match="context holds 256"):
        sdk.completions.create(model="tiny", prompt="x" * 3000)
    with pytest.raises(openai.BadRequestError, match="tools"):
        sdk.chat.completions.create(model="tiny", messages=messages, tools=[{"type": "function"}])
