"""What benchmarks/other_optimizer.py concludes from its runs."""

import pytest

from tests.benchmarks.scripts import load

judge = load("other_optimizer").judge


@pytest.mark.parametrize(("lion", "verdict"), [([2.2, 2.3, 2.5], "supported"), ([2.2, 2.3, 2.3], "not supported")])
def test_adamw_is_better_only_when_it_is_with_every_seed(lion, verdict):
    results, claim = judge({"adamw": {1.0: 2.1}, "lion": {0.1: 2.2}}, {"adamw": [2.1, 2.2, 2.4], "lion": lion}, 10)
    assert claim.verdict == verdict
    assert claim.interval == pytest.approx((min(b - a for a, b in zip([2.1, 2.2, 2.4], lion, strict=True)), 0.1))
    assert results[-1].ratio == pytest.approx(2.2 / 2.3)  # the middle seed: below 1 is worse than AdamW
