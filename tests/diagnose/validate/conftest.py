"""One `nanochat validate --quick` for all tests, into whose run and file they plant faults."""

import contextlib
import fcntl
import json
import os
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
    """`nanochat validate --quick --json FILE`, in a folder that stays; once for all workers of a run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "validate"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "chain.json").is_file():
            code, place = validate(folder)
            kept = {"code": code, "quick": place.quick, "passed": sorted(place.passed)}
            (folder / "chain.json").write_text(json.dumps(kept), encoding="utf-8")
    chain, found = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("chain.json", "found.json"))
    return Chain(chain["code"], found, Workspace(folder / "place", chain["quick"], passed=set(chain["passed"])))


def validate(folder: Path) -> tuple[int, Workspace]:
    """The exit code and the workspace of one validation, whose result is in `found.json`."""
    places: list[Workspace] = []

    @contextlib.contextmanager
    def kept(reporter, *, quick):
        places.append(Workspace(folder / "place", quick, reporter))
        places[0].folder.mkdir()
        yield places[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "workspace", kept)
        code = main(["validate", "--quick", "--quiet", "--json", str(folder / "found.json")])
    return code, places[0]


@pytest.fixture
def place(chain: Chain, tmp_path: Path) -> Workspace:
    """A copy of the chain's data, run and file, in which every stage has passed; nothing is printed."""
    folder = tmp_path / "place"
    (folder / "runs").mkdir(parents=True)
    for name in ("corpus", "data", "runs/whole"):
        shutil.copytree(chain.place.folder / name, folder / name)
    shutil.copy(chain.place.gguf, folder)
    return Workspace(folder, quick=True, reporter=Muted(), passed=set(chain.place.passed))
