"""No bytes make a reader crash, hang or grow: fixed mutations of valid files, and every input that once did.

`found/TARGET/` holds those inputs; `python -m tests.fuzz.run` looks for more.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from nanochat_cli.sandbox.rust.cases import reports
from tests.fuzz import contract
from tests.fuzz.contract import bounded_memory, breach
from tests.fuzz.mutate import mutation
from tests.fuzz.targets import Target, targets

FOUND = Path(__file__).with_name("found")
INPUTS = sorted(path.relative_to(FOUND).as_posix() for path in FOUND.glob("*/*"))
SERVES = all(find_spec(name) is not None for name in ("fastapi", "uvicorn", "prometheus_client", "httpx"))


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Target]]:
    with targets(tmp_path_factory.mktemp("fuzz"), serving=SERVES) as found, bounded_memory():
        yield {target.name: target for target in found}


def breaches(known: dict[str, Target], times: int) -> dict[str, str]:
    """The first breach of each target among `times` its mutations."""
    found: dict[str, str] = {}
    for target in known.values():
        for number in range(target.mutations * times):
            said = breach(target.read, mutation(target.name, number, target.seeds))
            if said is not None:
                found[f"{target.name} {number}"] = said
                break
    return found


def test_every_seed_is_read(known):
    for target in known.values():
        for seed in target.seeds:
            target.read(seed)
    assert sum(target.mutations for target in known.values()) == (2000 if SERVES else 1930)


def test_a_breach_is_seen(monkeypatch):
    def hangs(_: bytes) -> None:
        while True:
            pass

    def crashes(data: bytes) -> None:
        raise IndexError(data[0])

    monkeypatch.setattr(contract, "SECONDS", 0.05)
    assert "TooSlow" in (breach(hangs, b"") or "")
    assert "IndexError" in (breach(crashes, b"") or "")


def test_a_program_that_reports_very_often_costs_its_judge_no_more_than_time_in_proportion():
    assert breach(reports, b"1 panic\n" * 200_000) is None


def test_mutations_are_fixed_and_differ(known):
    seeds = known["manifest"].seeds
    first = [mutation("manifest", number, seeds) for number in range(50)]
    assert first == [mutation("manifest", number, seeds) for number in range(50)]
    assert len(set(first)) > 45


def test_fixed_mutations_are_read_or_refused(known):
    assert breaches(known, 1) == {}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_more_mutations_are_read_or_refused(known):
    assert breaches(known, 20) == {}


@pytest.mark.parametrize("name", INPUTS)
def test_what_was_found_once_is_read_or_refused(known, name):
    target = known.get(name.partition("/")[0])
    if target is None:
        pytest.skip("fastapi is not installed")
    assert breach(target.read, (FOUND / name).read_bytes()) is None
