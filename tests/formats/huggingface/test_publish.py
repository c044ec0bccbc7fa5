"""Uploading, to a hub of our own on this machine that speaks the protocol of huggingface_hub."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.formats.huggingface.publish import push_folder, require_repository


class Hub(ThreadingHTTPServer):
    """Remembers what was asked, and the files of the commit. status: of every answer."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.status = 200
        self.created: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}
        self.message = ""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/repos/create"):
            self.server.created = json.loads(body)
            answer = {"url": f"{self.server.address}/ada/tiny", "name": "ada/tiny"}
        elif self.path.endswith("/validate-yaml"):
            bad = "license: nonsense" in json.loads(body)["content"]
            answer = {"errors": [{"message": "license must be one of…"}] * bad, "warnings": []}
            self._send(answer, 400 if bad else self.server.status)
            return
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        else:
            lines = [json.loads(line) for line in body.splitlines()]
            self.server.message = lines[0]["value"]["summary"]
            for line in lines[1:]:
                self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.server.address}/ada/tiny/commit/0"}
        self._send(answer)

    def do_GET(self) -> None:
        self._send({"id": "ada/tiny", "sha": "0" * 40, "siblings": []})

    def _send(self, answer: dict[str, Any], status: int | None = None) -> None:
        content = json.dumps(answer if self.server.status == 200 else {"error": "no"}).encode()
        self.send_response(self.server.status if status is None else status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in {
        "config.json": "{}",
        "README.md": "# x",
        ".lock": "held",
        ".model.gguf.partial": "half",
    }.items():
        (tmp_path / name).write_text(content)
    return tmp_path


def test_the_folder_is_uploaded_as_one_commit_of_a_private_repository(hub: Hub, folder: Path) -> None:
    address = push_folder(folder, "ada/tiny", "quickstart-1, step 5", HfApi(endpoint=hub.address, token="hf_test"))
    assert address == f"{hub.address}/ada/tiny"
    assert (hub.created["name"], hub.created["organization"]) == ("tiny", "ada")
    assert hub.created.get("private") is True or hub.created.get("visibility") == "private"
    assert hub.message == "quickstart-1, step 5"
    assert hub.files == {"config.json": b"{}", "README.md": b"# x"}


@pytest.mark.parametrize(
    ("status", "advice"), [(401, "log in"), (403, "log in"), (500, "try again"), (404, "try again")]
)
def test_a_hub_that_refuses_is_one_clear_line(
    hub: Hub, folder: Path, status: int, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # retries
    hub.status = status
    with pytest.raises(DataError, match=advice) as refused:
        push_folder(folder, "ada/tiny", "x", HfApi(endpoint=hub.address, token="hf_test"))
    assert "\n" not in str(refused.value)
    assert "hf_test" not in str(refused.value)


def test_a_card_that_the_hub_does_not_accept_is_one_clear_line(hub: Hub, folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: nonsense\n---\n# x\n")
    with pytest.raises(DataError, match="license must be one of") as refused:
        push_folder(folder, "ada/tiny", "x", HfApi(endpoint=hub.address, token="hf_test"))
    assert "\n" not in str(refused.value)
    assert hub.files == {}


def test_a_hub_that_is_not_there_is_one_clear_line(folder: Path) -> None:
    with pytest.raises(DataError, match="cannot be reached") as refused:
        push_folder(folder, "ada/tiny", "x", HfApi(endpoint="http://127.0.0.1:9", token="hf_test"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["tiny", "ada/tiny/x", "", "ada/", "/tiny", "ada/ti ny", "ada/ti--ny", "a/b.git"])
def test_a_name_that_no_repository_can_have_is_refused_without_asking(name: str) -> None:
    with pytest.raises(ConfigError, match="USER/NAME"):
        require_repository(name)
    require_repository("ada/tiny")
