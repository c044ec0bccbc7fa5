"""What ranks exchange in a step: gradients by the tree, weights as codes and scales; ranks are threads here."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from nanochat_cli.config.sections.model import QuantConfig
from nanochat_cli.config.sections.train import TrainConfig
from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.model.bitlinear import BitLinear
from nanochat_cli.training.distributed.group import Group
from nanochat_cli.training.distributed.owned import Owned
from nanochat_cli.training.distributed.weight_bytes import (
    byte_count,
    from_bytes,
    from_rows,
    row_bytes,
    to_bytes,
    to_rows,
)
from nanochat_cli.training.phases import Phases
from nanochat_cli.training.update import accumulate_units
from nanochat_kernels import ternarize
from tests.training.distributed.threads import Thread, on_ranks

WIDTHS = (256, 128, 384)


def layers() -> dict[str, BitLinear]:
    generator = torch.Generator().manual_seed(0)
    found = {f"layer{i}": BitLinear(WIDTHS[i % 3], 64 + 32 * i, QuantConfig()) for i in range(5)}
    for layer in found.values():
        nn.init.normal_(layer.weight, std=0.1, generator=generator)
        layer.requantize()
    return found


def gradient_of(unit: int, name: str, parameter: torch.Tensor) -> torch.Tensor:
    seed = 1000 * unit + sum(name.encode())
    return torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (unit % 3)


def a_step(group: Group, units: int) -> Owned:
    return exchanged(group, units)[0]


def exchanged(group: Group, units: int) -> tuple[Owned, dict[str, torch.Tensor], torch.Tensor]:
    """After a step of made-up gradients: what was exchanged, the metrics, and a counter."""
    own = layers()
    parameters = {f"{name}.weight": layer.weight for name, layer in own.items()} | {
        "norm.weight": nn.Parameter(torch.arange(7.0))
    }
    owned = Owned(group, parameters, own, TrainConfig(batch_size=1, grad_accum=units))
    counter = torch.full((2,), 5.0)
    owned.begin([counter])
    for unit in owned.units:
        counter += unit
        for name, parameter in parameters.items():
            parameter.grad = gradient_of(unit, name, parameter)
        owned.collect(unit, {"loss": torch.tensor(0.1 * unit), "other": torch.tensor(1.0)})
    return owned, owned.finish([counter]), counter


def added(values: list[torch.Tensor]) -> torch.Tensor:
    """The balanced tree, as recursion over halves of the next power of two."""
    if len(values) == 1:
        return values[0]
    half = 1 << (len(values) - 1).bit_length() - 1
    return added(values[:half]) + added(values[half:])


@pytest.mark.parametrize("units", [1, 2, 3, 5, 6, 8])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_owner_has_the_sum_by_the_tree_and_all_have_the_metrics(size, units):
    if size > units:
        pytest.skip("more ranks than units are refused")
    seen = []
    for owned, metrics, counter in on_ranks(size, lambda group: exchanged(group, units)):
        for name, parameter in owned.parameters.items():
            if name not in owned.mine:
                assert parameter.grad is None
                continue
            seen.append(name)
            assert parameter.grad is not None
            gradients = [gradient_of(unit, name, parameter) for unit in range(units)]
            assert torch.equal(parameter.grad, added(gradients))
            exact = torch.stack(gradients).double().sum(dim=0)
            torch.testing.assert_close(parameter.grad.double(), exact, rtol=1e-5, atol=1e-4)
        assert torch.equal(metrics["loss"], added([torch.tensor(0.1 * unit) for unit in range(units)]))
        assert metrics["other"] == units
        assert counter.tolist() == [5.0 + sum(range(units))] * 2
    assert sorted(seen) == sorted([*(f"{name}.weight" for name in layers()), "norm.weight"])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_clipping_is_that_of_the_norm_of_all_gradients(size):
    units = 4

    def clipped(group: Group) -> tuple[float, dict[str, torch.Tensor]]:
        owned = a_step(group, units)
        norm = float(owned.clip_grad_norm(1.0))
        return norm, {name: g for name in owned.mine if (g := owned.parameters[name].grad) is not None}

    found = on_ranks(size, clipped)
    whole = {name: gradient for _, mine in found for name, gradient in mine.items()}
    sums = {
        name: added([gradient_of(unit, name, gradient) for unit in range(units)]) for name, gradient in whole.items()
    }
    norm = torch.cat([gradient.double().flatten() for gradient in sums.values()]).norm().item()
    assert {one for one, _ in found} == {found[0][0]}
    assert found[0][0] == pytest.approx(norm, rel=1e-12)
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient, sums[name] / norm, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("size", [2, 3])
def test_codes_and_scales_reach_all_ranks_and_latents_stay_with_their_owner(size):
    def stepped(group: Group) -> Owned:
        owned = a_step(group, 4)
        for name in owned.mine:
            owned.parameters[name].data.add_(gradient_of(0, name, owned.parameters[name]), alpha=0.05)
        owned.publish()
        return owned

    ranks = on_ranks(size, stepped)
    for name, layer in ranks[0].layers.items():
        owner = next(owned for owned in ranks if name in owned.mine)
        latent = owner.parameters[name].detach()
        expected = ternarize(latent, layer.quant.scale)
        assert latent.isfinite().all()
        for owned in ranks:
            there = owned.layers[name]
            assert torch.equal(there.operand, expected.codes.float())
            assert torch.equal(there.scales, expected.scales)
            assert torch.equal(there.ternary().codes, expected.codes)
            if owned is not owner:
                assert owned.parameters[name].isnan().all()
                there.requantize()  # as a part of training might
                assert torch.equal(there.operand, expected.codes.float())
    norms = [owned.parameters["norm.weight"] for owned in ranks]
    assert all(torch.equal(norm, norms[0]) for norm in norms)
    assert not torch.equal(norms[0], torch.arange(7.0))


def test_a_ternary_weight_is_little_more_than_a_quarter_of_a_byte_on_the_wire():
    def sent(group: Group) -> tuple[int, int]:
        owned = a_step(group, 4)
        owned.publish()
        assert isinstance(group, Thread)
        return group.sent, sum(owned.parameters[name].numel() for name in owned.mine if name in owned.layers)

    found = on_ranks(2, sent)
    assert sum(bytes_ for bytes_, _ in found) - 4 * 7 <= 0.27 * sum(weights for _, weights in found)


@pytest.mark.parametrize("scale", ["row", "tensor", 64])
@pytest.mark.parametrize("shape", [(3, 64), (128, 192), (1, 64)])
def test_bytes_of_a_layer_give_back_its_codes_and_scales(scale, shape):
    layer = BitLinear(shape[1], shape[0], QuantConfig(scale=scale))
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(1))
    layer.requantize()
    ternary = layer.ternary()
    data = to_bytes(layer.weight, ternary)
    assert len(data) == byte_count(layer.weight, layer)
    back = from_bytes(torch.cat((torch.zeros(1, dtype=torch.uint8), data))[1:], layer)  # at an odd place
    assert torch.equal(back.codes, ternary.codes)
    assert torch.equal(back.scales, ternary.scales)
    assert back.granularity == ternary.granularity


@pytest.mark.parametrize("scale", ["row", "tensor", 64])
@pytest.mark.parametrize("shape", [(4, 64), (128, 192), (2, 128)])
def test_a_layer_computes_with_rows_that_came_apart_what_it_did(scale, shape):
    layer, other = (BitLinear(shape[1], shape[0], QuantConfig(scale=scale)) for _ in range(2))
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(1))
    layer.requantize()
    rows = to_rows(layer.ternary(), layer)
    assert rows.shape == (shape[0], row_bytes(layer))
    assert rows.shape[1] == shape[1] / 4 + 2 * (shape[1] // 64 if scale == 64 else 1)
    other.hold(from_rows(torch.cat(rows.chunk(2)), other))
    assert torch.equal(other.operand, layer.operand)
    assert torch.equal(other.scales, layer.scales)


def test_codes_of_a_width_that_four_does_not_divide_are_packed_too():
    layer = BitLinear(7, 3, QuantConfig())
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(1))
    ternary = layer.ternary()
    assert torch.equal(from_rows(to_rows(ternary, layer), layer).codes, ternary.codes)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_write_each_tensor_once_and_none_that_they_lack(size):
    def share(group: Group) -> dict[str, dict[str, torch.Tensor]]:
        owned = a_step(group, 4)
        owned.publish()
        model = {name: parameter.detach() for name, parameter in owned.parameters.items()}
        state = {name: torch.ones(1) for name in owned.mine}
        return owned.share_of({"model": model, "optimizer": state, "other": {"layer0.weight": torch.ones(1)}})

    shares = on_ranks(size, share)
    written = [f"{part}/{name}" for one in shares for part, tree in one.items() for name in tree]
    names = [*(f"{name}.weight" for name in layers()), "norm.weight"]
    expected = [*(f"{part}/{name}" for part in ("model", "optimizer") for name in names), "other/layer0.weight"]
    assert sorted(written) == sorted(expected)
    assert all(tensor.isfinite().all() for one in shares for tensor in one["model"].values())
    assert all(one["model"].keys() == one["optimizer"].keys() for one in shares)


@pytest.mark.parametrize("fails", [False, True])
def test_an_error_of_one_rank_ends_all_with_its_message(fails):
    def ending(group: Group) -> str:
        try:
            with group.failing_together():
                if fails and group.rank == 1:
                    raise DataError("no space left")
        except DataError as error:
            return str(error)
        return "went on"

    assert on_ranks(3, ending) == ["no space left" if fails else "went on"] * 3


def test_ranks_that_meet_in_every_block_do_not_start_a_step_again_for_lack_of_memory():
    def loss(rows: slice) -> Any:
        raise torch.OutOfMemoryError

    state: Any = SimpleNamespace(parts=[], progress=SimpleNamespace(micro_batch=1), phases=Phases())
    owned: Any = SimpleNamespace(lockstep=True, begin=list, collect=max, units=[0], rows_of=lambda unit: slice(0, 1))
    with pytest.raises(ConfigError, match=r"^out of memory.*lower train\.batch_size"):
        accumulate_units(state, owned, loss)
