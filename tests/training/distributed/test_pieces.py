"""Embedding and head in pieces that several ranks step: the bits of one, and a checkpoint that tells nothing of it."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nanochat_cli.config.sections.model import ModelConfig
from nanochat_cli.config.sections.optim import OptimConfig
from nanochat_cli.config.sections.train import TrainConfig
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.optim import build_optimizer
from nanochat_cli.optim.build import trained_parameters
from nanochat_cli.training.distributed import pieces
from nanochat_cli.training.distributed.group import Group
from nanochat_cli.training.distributed.owned import Owned
from nanochat_cli.training.distributed.pieces import ALIGNED, SMALLEST, rows_of_pieces
from tests.training.distributed.threads import on_ranks

MODEL = ModelConfig(vocab_size=640, dim=64, n_layers=1, n_heads=1, n_kv_heads=1, ffn_dim=64, max_seq_len=16)
OPTIMIZERS = {
    "adamw": {},
    "lion": {"other": "lion"},
    "adamw-8bit": {"eight_bit": True, "eight_bit_other": True},
    "lion-8bit-long": {"eight_bit": True, "eight_bit_other": True, "other": "lion", "state_block": 2048},
}
STEPS = 3


@given(rows=st.integers(1, 200_000), width=st.sampled_from([64, 96, 768, 1280]))
def test_pieces_are_neighbouring_rows_of_whole_blocks_of_state(rows, width):
    found = rows_of_pieces("head.weight", (rows, width))
    if rows * width % ALIGNED:
        assert not found
        return
    assert [row for one in found.values() for row in (one.start, one.stop)][1:-1] == [
        row for one in list(found.values())[1:] for row in (one.start, one.start)
    ]
    assert next(iter(found.values())).start == 0
    assert list(found.values())[-1].stop == rows
    assert all(len(one) * width % ALIGNED == 0 for one in found.values())
    assert all(SMALLEST <= len(one) * width < 3 * SMALLEST for one in found.values()) or len(found) == 1


def test_matrices_stay_whole():
    assert rows_of_pieces("blocks.0.feed_forward.w_up.weight", (2**15, 2**10)) == {}


def stepped(group: Group, settings: dict[str, Any], start: dict[str, Any] | None = None) -> dict[str, Any]:
    """What this rank writes after some steps; start: what all wrote before, to go on from."""
    model = Transformer(MODEL)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # ranks are threads, and share torch's generator
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(sum(name.encode())))
    named = trained_parameters(model, {})
    owned = Owned(group, named, dict(model.linears()), TrainConfig(batch_size=1, grad_accum=4))
    optimizers = build_optimizer(model, OptimConfig.model_validate(settings), {}, owned.stepped)
    if start is not None:
        model.load_state_dict(start["model"])
        optimizers.load_state_dict(owned.own_state(start["optimizer"]))
    owned.publish()
    for step in range(STEPS):
        owned.begin([])
        for unit in owned.units:
            generator = torch.Generator().manual_seed(100 * step + unit)
            for parameter in named.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            owned.collect(unit, {"loss": torch.zeros(())})
        owned.finish([])
        optimizers.step(step, 10)
        optimizers.zero_grad()
        owned.publish()
    assert all(parameter.grad is None for parameter in owned.parameters.values())
    return owned.share_of({"model": model.state_dict(), "optimizer": optimizers.state_dict()})


def joined(shares: list[dict[str, Any]]) -> dict[str, Any]:
    """The checkpoint that the ranks wrote together, none of which wrote what another did."""
    whole: dict[str, Any] = {"model": {}, "optimizer": {}}
    for share in shares:
        assert not whole["model"].keys() & share["model"].keys()
        whole["model"] |= share["model"]
        for kind, states in share["optimizer"].items():
            of_kind = whole["optimizer"].setdefault(kind, {})
            assert not of_kind.keys() & states.keys()
            of_kind |= states
    return whole


def flat(tree: Any, name: str = "") -> dict[str, Tensor]:
    if isinstance(tree, Tensor):
        return {name: tree}
    return {key: tensor for part, value in tree.items() for key, tensor in flat(value, f"{name}/{part}").items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pieces_are_stepped_saved_and_read_as_a_whole_is(name, monkeypatch):
    settings = {**OPTIMIZERS[name], "warmup_steps": 0}
    whole = joined(on_ranks(1, lambda group: stepped(group, settings)))
    later = flat(joined(on_ranks(1, lambda group: stepped(group, settings, whole))))
    monkeypatch.setattr(pieces, "SMALLEST", 6000)
    assert len(rows_of_pieces("embedding.weight", (640, 64))) == 6
    for ranks in (1, 2, 3):
        found = joined(on_ranks(ranks, lambda group: stepped(group, settings)))
        again = joined(on_ranks(ranks, lambda group: stepped(group, settings, whole)))
        for mine, expected in ((flat(found), flat(whole)), (flat(again), later)):
            assert mine.keys() == expected.keys()
            assert all(torch.equal(tensor, expected[key]) for key, tensor in mine.items())


def test_several_ranks_share_the_work_of_the_embedding(monkeypatch):
    monkeypatch.setattr(pieces, "SMALLEST", 6000)

    def state(group: Group) -> dict[str, int]:
        model = Transformer(MODEL)
        owned = Owned(
            group, trained_parameters(model, {}), dict(model.linears()), TrainConfig(batch_size=1, grad_accum=4)
        )
        optimizers = build_optimizer(model, OptimConfig(), {}, owned.stepped)
        return {one.name: one.state_bytes() for one in optimizers.groups}

    of_ranks = on_ranks(3, state)
    held = [one.get("embedding", 0) + one.get("head", 0) for one in of_ranks]
    assert sum(held) == 2 * 8 * 640 * 64
    assert max(held) <= sum(held) / 2
