"""What must be refused, each by one JSON error, with the server alive; and clients that leave or come too often."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.inference.continuous_batch import ContinuousBatch
from nanochat_cli.serve.engine import NativeEngine
from nanochat_cli.serve.rules import Rules, rules_for
from tests.serve.live import Live, client, live, tiny_served

ANY_HOST = "127.0.0.1"
COMPLETION = "/v1/completions"


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(tiny_served(), slots=1, waiting=1) as server:
        yield server


@pytest.fixture
def asked(server: Live) -> Iterator[httpx.Client]:
    with client(server) as http:
        yield http
        assert http.get("/health").status_code == 200, "the server is alive"


BAD = [
    (COMPLETION, {"prompt": "x", "temperature": "hot"}, 400, "temperature"),
    (COMPLETION, {"prompt": "x", "temperature": -1}, 400, "temperature"),
    (COMPLETION, {"prompt": "x", "temperature": 1e-9}, 400, "temperature"),
    (COMPLETION, {"prompt": "x", "top_p": 0}, 400, "top_p"),
    (COMPLETION, {"prompt": {"a": 1}}, 400, "prompt"),
    (COMPLETION, {"prompt": []}, 400, "empty list"),
    (COMPLETION, {"prompt": [[]]}, 400, "empty list"),
    (COMPLETION, {"prompt": [10**9]}, 400, "outside the vocabulary"),
    (COMPLETION, {"prompt": [-1]}, 400, "prompt"),
    (COMPLETION, {"prompt": ["x"] * 129}, 400, "more than 128 texts"),
    (COMPLETION, {"prompt": "x", "n": 10**6}, 400, "n: "),
    (COMPLETION, {"prompt": "x", "max_tokens": "many"}, 400, "max_tokens"),
    (COMPLETION, {"prompt": "x" * 1000}, 400, "1000 tokens and the model's context holds 256"),
    (COMPLETION, {"prompt": "x", "stop": ["a"] * 17}, 400, "stop"),
    (COMPLETION, {"prompt": "x", "stop": [""]}, 400, "stop"),
    (COMPLETION, {"prompt": "x", "logprobs": 10**6}, 400, "logprobs"),
    (COMPLETION, {"prompt": "x", "seed": 2**70}, 400, "seed"),
    (COMPLETION, {"prompt": "x", "best_of": 5}, 400, "best_of"),
    (COMPLETION, {"prompt": "x", "response_format": {"type": "json_object"}}, 400, "response_format"),
    (COMPLETION, {"prompt": "x", "suffix": "y", "echo": True}, 400, "echo"),
    ("/v1/chat/completions", {"messages": []}, 400, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, 400, "tools"),
    ("/infill", {"input_prefix": 5}, 400, "input_prefix"),
    ("/tokenize", {"content": ["x"]}, 400, "content"),
    ("/nowhere", {}, 404, "Not Found"),
]


@pytest.mark.parametrize(
    ("path", "body", "status", "said"), BAD, ids=[f"{i}-{said}" for i, (*_, said) in enumerate(BAD)]
)
def test_a_bad_request_is_one_json_error(asked, path, body, status, said):
    found = asked.post(path, json=body)
    assert found.status_code == status
    error = found.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert said in error["message"]
    assert "\n" not in error["message"]


def test_a_billion_tokens_are_as_many_as_the_context_holds(asked):
    found = asked.post(COMPLETION, json={"prompt": "x", "max_tokens": 10**9, "seed": 1}).json()
    assert found["usage"]["total_tokens"] <= 257


def test_what_is_no_json_is_refused(asked):
    headers = {"Content-Type": "application/json"}
    broken = asked.post(COMPLETION, content=b'{"prompt": ', headers=headers)
    assert (broken.status_code, "not JSON" in broken.json()["error"]["message"]) == (400, True)
    deep = asked.post(COMPLETION, content=b"[" * 100_000, headers=headers)
    assert deep.status_code == 400
    page = asked.post(COMPLETION, content=b'{"prompt": "x"}', headers={"Content-Type": "text/plain"})
    assert page.status_code == 400, "a web page may send text/plain anywhere without being asked"
    assert asked.get(COMPLETION).json()["error"]["code"] == 405


def test_a_body_that_is_too_large_is_refused_however_it_comes(asked):
    large = b'{"prompt": "' + b"x" * (1 << 20) + b'"}'
    headers = {"Content-Type": "application/json"}
    for content in (large, iter([large[: 1 << 19], large[1 << 19 :]])):
        found = asked.post(COMPLETION, content=content, headers=headers)
        assert (found.status_code, found.json()["error"]["code"]) == (413, 413)


def test_a_slow_body_times_out(server, asked, monkeypatch):
    monkeypatch.setattr("nanochat_cli.serve.guard.BODY_SECONDS", 0.2)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as slow:
        slow.sendall(f"POST {COMPLETION} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{{".encode())
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8012", ""])
def test_another_name_in_host_is_refused(server, asked, host):
    found = asked.get("/v1/models", headers={"Host": host})
    assert (found.status_code, found.json()["error"]["type"]) == (403, "permission_error")
    for ours in ("localhost:8012", "127.0.0.1", "[::1]:80"):
        assert asked.get("/v1/models", headers={"Host": ours}).status_code == 200


def test_a_key_is_demanded_of_everything_but_health():
    with live(rules=Rules(None, "secret")) as server:
        with client(server) as http:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
                found = http.post(COMPLETION, json={"prompt": "x"}, headers=headers)
                assert (found.status_code, found.json()["error"]["type"]) == (401, "authentication_error")
            assert http.get("/metrics").status_code == 401
        with client(server, Authorization="Bearer secret") as http:
            assert http.post(COMPLETION, json={"prompt": "x", "max_tokens": 1}).status_code == 200
            assert http.get("/v1/models", headers={"Host": "elsewhere"}).status_code == 200


def test_only_this_machine_needs_no_key():
    for host in ("127.0.0.1", "localhost", "::1", "127.9.9.9"):
        assert rules_for(host, None).key is None
    for host in ("0.0.0.0", "192.168.1.5", "::", "example.org"):
        with pytest.raises(ConfigError, match="set a key"):
            rules_for(host, None)
        assert rules_for(host, "k").key == "k"
    with pytest.raises(ConfigError, match="is empty"):
        rules_for("127.0.0.1", " ")


def test_no_origin_is_allowed_by_default(asked):
    found = asked.get("/v1/models", headers={"Origin": "https://evil.example"})
    assert not [name for name in found.headers if name.startswith("access-control")]


class Held:
    """Lets the engine step only as often as a test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._steps, step = threading.Semaphore(0), ContinuousBatch.step
        self.free = threading.Event()

        def held(batch: ContinuousBatch):
            while not self.free.is_set() and not self._steps.acquire(timeout=0.01):
                pass
            return step(batch)

        monkeypatch.setattr(ContinuousBatch, "step", held)

    def step(self) -> None:
        self._steps.release()


def wait_for(what, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_more_requests_than_may_wait_are_told_when_to_come_back(server, asked, monkeypatch):
    held = Held(monkeypatch)
    with ThreadPoolExecutor(2) as others:
        answers = [
            others.submit(httpx.post, server.url + COMPLETION, json={"prompt": "x", "max_tokens": 3}, timeout=60)
            for _ in range(2)
        ]
        wait_for(lambda: len(server.engine._open) == 2)
        found = asked.post(COMPLETION, json={"prompt": "x"})
        assert (found.status_code, found.headers["retry-after"]) == (429, "1")
        held.free.set()
        assert [answer.result().status_code for answer in answers] == [200, 200]
    wait_for(lambda: not server.engine._open)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(server, asked, monkeypatch, stream):
    held = Held(monkeypatch)
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": "x", "max_tokens": 200, "stream": stream})
    leaving = http.client.HTTPConnection(host, int(port))
    leaving.request("POST", COMPLETION, body, {"Content-Type": "application/json"})
    wait_for(lambda: len(server.engine._open) == 1)
    held.step()
    (ticket,) = server.engine._open
    wait_for(lambda: ticket.rows[0].tokens)
    leaving.close()
    wait_for(lambda: not server.engine._open)
    held.free.set()
    assert asked.post(COMPLETION, json={"prompt": "x", "max_tokens": 2}).status_code == 200
    assert ticket.rows[0].finish == "cancelled"
    assert len(ticket.rows[0].tokens) < 10


def test_an_error_of_the_engine_is_an_error_of_its_requests_and_the_next_one_works(asked, monkeypatch):
    def broken(batch: ContinuousBatch):
        raise RuntimeError("a kernel failed, with a prompt in its message")

    with monkeypatch.context() as patch:
        patch.setattr(ContinuousBatch, "step", broken)
        found = asked.post(COMPLETION, json={"prompt": "x"})
        assert found.status_code == 500
        assert "prompt in its" not in found.text
    assert asked.post(COMPLETION, json={"prompt": "x", "max_tokens": 2}).status_code == 200


def test_while_the_model_loads_health_says_so():
    loaded, served = threading.Event(), tiny_served()

    def load():
        loaded.wait(20)
        return served

    with live(served, load=load) as server:
        with httpx.Client(base_url=server.url) as http:
            for path in ("/health", "/v1/models"):
                assert http.get(path).status_code == 503
        loaded.set()
        with client(server):
            pass


def test_a_model_that_cannot_be_loaded_ends_the_server():
    def load():
        raise DataError("the file is damaged")

    engine = NativeEngine(load, 1, 1)
    stopped = threading.Event()
    engine.on_stop = stopped.set
    engine.start()
    assert stopped.wait(10)
    assert str(engine.failure) == "the file is damaged"


def test_no_prompt_and_no_answer_is_logged(server, asked, caplog):
    with caplog.at_level("DEBUG"):
        answer = asked.post(COMPLETION, json={"prompt": "MYSECRET", "max_tokens": 20, "seed": 3}).json()
    ours = "\n".join(record.getMessage() for record in caplog.records if not record.name.startswith("httpcore"))
    assert f"POST {COMPLETION}: 200" in ours
    assert "MYSECRET" not in ours
    assert answer["choices"][0]["text"] not in ours


@pytest.mark.slow
def test_a_thousand_clients_that_leave_leave_nothing_behind(server, asked):
    body = json.dumps({"prompt": "x", "max_tokens": 250, "stream": True}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST {COMPLETION} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for number in range(1000):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            if number % 2:
                connection.recv(100)
    wait_for(lambda: not server.engine._open)
    wait_for(lambda: not server.engine._tickets)
    assert asked.post(COMPLETION, json={"prompt": "x", "max_tokens": 2}).status_code == 200
