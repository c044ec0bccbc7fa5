"""What benchmarks/method_forms.py counts and concludes."""

import pytest
import torch

from tests.benchmarks.scripts import load

script = load("method_forms")
MATRICES = 4 * (4 * 256 * 256 + 3 * 256 * 768) + 4096 * 256
STEP = 6 * MATRICES + 12 * 4 * 256 * 256 / 2
"""FLOPs of the quickstart's step for one token, by hand."""


def test_work_is_that_of_the_rows_and_of_the_heads():
    def work(case: str, backward: float = 1.0, ahead: float = 0.0) -> float:
        return script.token_work(case, {"backward": backward, "ahead": ahead})

    assert work("plain") == 1
    assert work("half of the rows") == 0.5
    assert work("a tenth more steps") == pytest.approx(1.1)
    assert work("filter", backward=0.4) == pytest.approx((1 + 2 * 0.4) / 3)
    logits, module = 6 * 4096 * 256, 6 * 256 * 256
    assert work("heads", ahead=3) == pytest.approx(1 + 3 * (logits + module) / STEP)
    assert work("heads, one row in 4", ahead=0.75) == pytest.approx(1 + 3 * (logits / 4 + module) / STEP)


def test_differences_are_paired_by_seed_and_a_seed_without_its_plain_run_does_not_count():
    def run(bits: float, backward: float = 1.0) -> dict[str, float]:
        return {"bits_per_byte": bits, "backward": backward, "ahead": 0.0}

    runs = {
        "plain": {"1": run(2.0), "2": run(2.5)},
        "filter": {"1": run(2.1, 0.7), "2": run(2.4, 0.7), "3": run(9.0, 0.7)},
    }
    found = {result.metric: result for result in script.judge(runs) if result.case == "filter"}
    assert found["held-out bits per byte, less plain"].runs == pytest.approx([0.1, -0.1])
    assert found["token work"].value == pytest.approx(0.8)
    assert found["bits per byte lost per share of the work saved"].runs == pytest.approx([0.5, -0.5])


class ModelOf:
    """Predicts these logits, [B, T, V]."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.known = logits

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.known


def test_where_half_of_the_rows_tell_nothing_the_best_choice_is_worth_one_and_a_half():
    """Without them the whole gradient is left, for 1/3 + 2/3 · 1/2 of the work."""
    logits = torch.zeros(1, 8, 3)
    logits[0, :4, 1] = 100.0
    found = script.best_choice(ModelOf(logits), torch.zeros(1, 8), torch.ones(1, 8, dtype=torch.int64))
    assert found["best choice of rows"] == pytest.approx(1.5, abs=0.01)
    assert found["rows kept by the best choice"] == pytest.approx(0.5, abs=0.01)
    assert found["tokens below one nat"] == 0.5
