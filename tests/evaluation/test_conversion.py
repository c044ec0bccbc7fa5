"""Agreement of two models against torch's kl_div on whole logits in float64."""

import pytest
import torch
from torch.nn import functional as F

from nanochat_cli.evaluation.conversion import agreement
from tests.architectures import build


def batches(seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(288, (3, 2, 21), generator=generator)
    found = [(rows[:, :-1], rows[:, 1:].clone()) for rows in tokens]
    found[1][1][0, :9] = -100
    return found


@torch.no_grad()
def test_shares_and_divergences_are_those_of_whole_logits():
    teacher, model = build("plain+attention+dense+untied", seed=1), build("plain+attention+dense+tied", seed=2)
    same, divergence, count = 0, 0.0, 0
    for inputs, targets in batches():
        p, q = (one.logits(one(inputs)).double()[targets >= 0].log_softmax(-1) for one in (teacher, model))
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        divergence += float(F.kl_div(q, p, log_target=True, reduction="sum"))
        count += len(p)
    assert count < 3 * 2 * 20
    assert agreement(teacher, model, batches()) == (same / count, pytest.approx(divergence / count, rel=1e-5))


def test_a_model_agrees_with_itself():
    model = build("plain+attention+dense+tied")
    assert agreement(model, model, batches()) == (1.0, 0.0)


def test_nothing_to_compare_on_is_an_error():
    model = build("plain+attention+dense+tied")
    with pytest.raises(ValueError, match="no held-out tokens"):
        agreement(model, model, [])
