"""What benchmarks/soak.py concludes from its samples, and that it runs."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from tests.benchmarks.scripts import BENCHMARKS, load

soak = load("soak")
HOUR = 3600.0


def samples(per_hour: float, noise: float, seed: int = 0, warm: float = 0.0) -> list[tuple[float, float]]:
    """Two hours, one sample in ten seconds; warm: what is added in the first quarter of an hour."""
    random = np.random.default_rng(seed)
    seconds = np.arange(0, 2 * HOUR, 10.0)
    values = 3e8 + per_hour * seconds / HOUR + random.normal(0, noise, len(seconds))
    values += warm * np.minimum(seconds / 900, 1)
    return list(zip(seconds.tolist(), values.tolist(), strict=True))


def test_a_leak_is_found_with_its_size_and_warming_up_is_not_one():
    for seed in range(5):
        leak = soak.slope_of(samples(5e6, 2e6, seed, warm=4e8))
        assert leak.low <= 5e6 <= leak.high or abs(leak.value - 5e6) < 1e6
        assert leak.grows(1e6)
        assert not soak.slope_of(samples(0, 2e6, seed, warm=4e8)).grows(1e6)


def test_a_slope_is_that_of_least_squares_and_its_interval_covers_as_often_as_it_says():
    inside = 0
    for seed in range(200):
        found = soak.slope_of(samples(3e6, 5e6, seed))
        inside += found.low <= 3e6 <= found.high
    assert 180 <= inside <= 199  # 190 expected
    exact = samples(7e6, 0.0)
    late = [(s, v) for s, v in exact if s >= 0.2 * exact[-1][0]]
    expected = np.polyfit([s / HOUR for s, _ in late], [v for _, v in late], 1)[0]
    assert soak.slope_of(exact).value == pytest.approx(expected, rel=1e-6)


def test_a_constant_number_does_not_grow_and_one_more_file_an_hour_does():
    assert not soak.slope_of([(float(s), 12.0) for s in range(7200)]).grows(0.0)
    assert soak.slope_of([(float(s), float(12 + s // 3600)) for s in range(4 * 3600)]).grows(0.0)
    assert soak.slope_of([(0.0, 1.0)]) is None


def test_a_process_is_sampled_with_its_children():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert child.pid in soak.tree_of(os.getpid())
        used = soak.usage(child.pid)
        assert used["processes"] == 1
        assert used["open files"] >= 3
        assert used["resident memory"] > 1e6
    assert soak.usage(child.pid) == {}
    assert soak.usage(os.getpid())["threads"] >= threading.active_count()


def test_a_process_that_is_left_over_is_found(tmp_path):
    assert soak.left_over(tmp_path) == []
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, cwd=tmp_path) as child:
        assert soak.left_over(tmp_path.resolve()) == [child.pid]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("script", ["soak", "reliability"])
def test_the_quick_form_runs(script, tmp_path):
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), "--quick", "--out", str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wrote " in done.stdout
