"""A disk that is full, broken or read-only at any moment costs nothing that was saved; `sweep` says what is checked."""

import pytest

from tests.faults.disk import compiler
from tests.faults.sweep import Swept, run_sweep

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C compiler: the failing disk cannot be built")


def require_survived(found: list[Swept]) -> None:
    careless, *work = found
    assert careless.lost > 0, "the sweep sees nothing"
    assert {one.name: one.problems for one in work if one.problems} == {}
    assert all(one.struck > 0 for one in work)


def test_a_few_faults_of_every_kind_of_work_lose_nothing():
    require_survived(run_sweep(cases=2))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_fault_at_every_operation_loses_nothing():
    found = run_sweep()
    require_survived(found)
    assert all(one.cases > one.operations for one in found[1:])
