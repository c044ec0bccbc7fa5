"""One `nanochat validate --quick` for all tests, into whose run and file they plant faults."""

import contextlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nanochat_cli.cli.app import main
from nanochat_cli.diagnose.validate import stages
from nanochat_cli.diagnose.validate.stage import Muted, Workspace


@dataclass(frozen=True)
class Chain:
    """The command's result, and the workspace that it left."""

    code: int
    found: dict[str, Any]
    place: Workspace


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """`nanochat validate --quick --json FILE`, in a folder that stays."""
    folder = tmp_path_factory.mktemp("validate")
    places: list[Workspace] = []

    @contextlib.contextmanager
    def kept(reporter, *, quick):
        places.append(Workspace(folder / "place", quick, reporter))
        places[0].folder.mkdir()
        yield places[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "workspace", kept)
        code = main(["validate", "--quick", "--quiet", "--json", str(folder / "found.json")])
    return Chain(code, json.loads((folder / "found.json").read_text(encoding="utf-8")), places[0])


@pytest.fixture
def place(chain: Chain, tmp_path: Path) -> Workspace:
    """A copy of the chain's data, run and file, in which every stage has passed; nothing is printed."""
    folder = tmp_path / "place"
    (folder / "runs").mkdir(parents=True)
    for name in ("corpus", "data", "runs/whole"):
        shutil.copytree(chain.place.folder / name, folder / name)
    shutil.copy(chain.place.gguf, folder)
    return Workspace(folder, quick=True, reporter=Muted(), passed=set(chain.place.passed))
