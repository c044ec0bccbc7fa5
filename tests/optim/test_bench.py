"""`nanochat bench optim`: what it counts and how it judges; the times themselves are not the subject."""

import pytest
import torch

from nanochat_cli.bench.optim import CONTENDERS, Size, _loss, _windows, byte_stream, claims, state_bytes
from nanochat_cli.bench.result_file import Result
from nanochat_cli.optim import build_optimizer


def test_bytes_of_a_preset_are_those_of_the_optimizers_and_whole_muon_is_counted_by_hand():
    found = {result.case: result for result in state_bytes("test-mtp")}
    linears = 2 * (4 * 256 * 256 + 3 * 256 * 768)
    others = 2 * 4096 * 256 + 5 * 256 + 4 * 64
    assert found["test-mtp / adamw-fp32"].value == 8 * (linears + others)
    assert found["test-mtp / muon-fp32"].value == 4 * linears + 8 * others
    assert found["test-mtp / muon-8bit"].ratio == pytest.approx(
        found["test-mtp / adamw-fp32"].value / found["test-mtp / muon-8bit"].value
    )


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_takes_a_step_that_lowers_the_loss_it_was_taken_on(name):
    size = Size(32, 1, 8, seq_len=16, batch_size=4)
    torch.manual_seed(0)
    model = size.model()
    optimizers = build_optimizer(model, size.optim(CONTENDERS[name]))
    stream = torch.arange(2000) % 7
    windows = _windows(stream, size, 4, torch.Generator().manual_seed(0))
    losses = []
    for step in range(6):
        loss = _loss(model, windows)
        losses.append(loss.item())
        loss.backward()
        optimizers.step(step, 100)
        model.requantize()
        optimizers.zero_grad()
    assert losses[-1] < losses[0]


def test_train_and_held_out_bytes_are_of_different_documents():
    train, held_out = byte_stream(200_000)
    assert len(train) > len(held_out) > 0
    assert 0 <= int(train.min()) <= int(train.max()) < 256


def test_a_promise_is_judged_by_the_worst_size():
    def results(ratio):
        names = [*CONTENDERS, "hybrid, lion, block 2048"]
        sizes = [Result(f"d20 / {name}", "state bytes", 1.0, "B", "adamw-fp32", 10.0) for name in names]
        times = [Result(f"{s} / {n}", "step", 1.0, "ms", "muon-fp32", r) for s, r in ratio for n in CONTENDERS]
        return {claim.id: claim.verdict for claim in claims([*sizes, *times])}

    verdicts = results([("a", 2.0), ("b", 0.8)])
    assert verdicts["galore time"] == "not supported"
    assert verdicts["muon-8bit state"] == "supported"
    assert verdicts["hybrid state"] == "not supported"
    assert results([("a", 2.0), ("b", 1.0)])["galore time"] == "supported"
