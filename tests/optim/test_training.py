"""Runs of the trainer with small state resume bit for bit, experts and released gradients included."""

import pytest

from tests.architectures import shape
from tests.training.test_architectures import TRAIN, assert_resumes

GALORE = {"enabled": True, "rank": 8, "update_freq": 2}
EXPERTS = "mhc-2+attention+moe+tied"


@pytest.mark.parametrize(
    ("combination", "optim"),
    [
        (EXPERTS, {"eight_bit": True}),
        ("plain+attention+dense+untied", {"galore": GALORE | {"release_gradients": True}}),
        (EXPERTS, {"galore": GALORE, "eight_bit": True, "other": "lion"}),
        (EXPERTS, {"galore": GALORE | {"unbiased": True, "full_rank_share": 0.5}}),
    ],
)
def test_two_steps_and_one_equal_three(tmp_path, combination, optim):
    model = shape(combination, max_seq_len=16, n_heads=2, n_kv_heads=1)
    assert_resumes(tmp_path, model=model, train=TRAIN, optim=optim)
