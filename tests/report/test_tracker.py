"""A run followed by a service, by a double with the calls that Weights & Biases and trackio share."""

import json
import os
import sys
from types import ModuleType
from typing import Any

import pytest

from nanochat_cli.config.load import resolve_config
from nanochat_cli.errors import ConfigError
from nanochat_cli.formats.run.metrics import open_metrics


class Service(ModuleType):
    """Records what it is called with, as a module named `wandb` or `trackio`."""

    class Error(Exception):
        pass

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[Any, ...]] = []

    def init(self, **settings: Any) -> None:
        if settings["project"] == "forbidden":
            raise self.Error("no API key\nconfigured")
        self.calls.append(("init", settings))

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.calls.append(("log", step, metrics))

    def finish(self) -> None:
        self.calls.append(("finish",))


@pytest.fixture(params=["wandb", "trackio"])
def service(request, monkeypatch):
    module = Service(request.param)
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


def configured(service: str, project: str = "mine"):
    return resolve_config(["quickstart"], None, [f"telemetry.tracker={service}", f"telemetry.project={project}"])


def test_it_gets_the_configuration_and_every_scalar_and_is_told_the_end(tmp_path, service):
    config = configured(service.__name__)
    with open_metrics(tmp_path / "first", config) as log:
        log.log(3, {"tokens": 7, "loss/main": 2.5, "training/lr": 0.1, "note/text": "x"})
    (init, settings), logged, end = service.calls
    assert (init, settings["project"], settings["name"], settings["resume"]) == ("init", "mine", "first", "allow")
    assert settings["config"] == config.model_dump(mode="json")
    assert logged == ("log", 3, {"loss/main": 2.5, "training/lr": 0.1})
    assert end == ("finish",)
    assert (tmp_path / "first" / "metrics.jsonl").read_text().startswith('{"step": 3')


def test_a_resumed_run_is_the_same_one_and_another_is_not(tmp_path, monkeypatch):
    module = Service("wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name, date in (("a", "1"), ("a", "1"), ("a", "2"), ("b", "1")):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "environment.json").write_text(json.dumps({"date": date}))
        open_metrics(tmp_path / name, configured("wandb"), resumed_step=0).close()
    identities = [call[1]["id"] for call in module.calls if call[0] == "init"]
    assert identities[0] == identities[1]
    assert len(set(identities)) == 3


def test_a_service_that_refuses_is_one_line_about_the_key(tmp_path, service):
    with pytest.raises(ConfigError, match=f"^telemetry.tracker = {service.__name__}: no API key configured$"):
        open_metrics(tmp_path, configured(service.__name__, "forbidden"))


def test_a_service_that_is_not_installed_is_one_line_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match="not installed; pip install trackio"):
        open_metrics(tmp_path, configured("trackio"))


@pytest.mark.slow
def test_trackio_itself_keeps_the_run_on_this_machine(tmp_path, monkeypatch):
    """Needs `pip install trackio`; nothing leaves the machine."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "kept"))
    pytest.importorskip("trackio")
    with open_metrics(tmp_path / "first", configured("trackio")) as log:
        for step in range(3):
            log.log(step, {"loss/main": 2.5 - step})
    files = [path for path in (tmp_path / "kept").rglob("*") if path.is_file()]
    assert any(path.name.startswith("mine") for path in files)
