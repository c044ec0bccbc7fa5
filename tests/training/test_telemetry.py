"""Ternary statistics equal plain loops over every weight, for every granularity of the scales."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nanochat_cli.formats.run import checkpoints
from nanochat_cli.training.health.ternary import MARGIN_EDGES, Layer, TernaryTelemetry


def make_layer(name: str, rows: int, columns: int, groups: int | None, generator: torch.Generator) -> Layer:
    """A layer with random latents and absmean scales; groups: scales per row, None for a single scale."""
    latent = torch.randn(rows, columns, generator=generator) * 0.02
    if groups is None:
        scales = latent.abs().mean().half().float().reshape(1, 1)
        spread = scales.expand(rows, columns)
    else:
        scales = latent.abs().reshape(rows, groups, -1).mean(-1).half().float()
        spread = scales.repeat_interleave(columns // groups, dim=1)
    return name, (latent / spread).round().clamp(-1, 1).to(torch.int8), latent, scales


def loops(layers: list[Layer], previous: dict[str, Layer] | None) -> dict[str, object]:
    """The definitions, one weight and one scale at a time."""
    weights = zeros = flips = scale_count = dead = 0
    scale_sum = drift = 0.0
    bins = [0] * len(MARGIN_EDGES)
    for name, codes, latent, scales in layers:
        rows, columns = latent.shape
        group = columns // scales.shape[1]
        for n in range(rows):
            dead += not any(int(code) for code in codes[n])
            for k in range(columns):
                scale = scales[n if scales.shape[0] > 1 else 0, k // group]
                margin = abs(abs(np.float32(latent[n, k])) / np.float32(scale) - np.float32(0.5))
                bins[max(i for i, edge in enumerate(MARGIN_EDGES) if margin >= np.float32(edge))] += 1
                weights += 1
                zeros += int(codes[n, k]) == 0
                flips += previous is not None and int(codes[n, k]) != int(previous[name][1][n, k])
        for index, scale in enumerate(scales.flatten().tolist()):
            scale_count += 1
            scale_sum += scale
            if previous is not None:
                drift += abs(scale / previous[name][3].flatten()[index].item() - 1)
    return {
        "weights": weights,
        "zero_fraction": zeros / weights,
        "dead_rows": dead,
        "margin_histogram": pytest.approx([count / weights for count in bins], abs=1e-15),
        "scale_mean": pytest.approx(scale_sum / scale_count, rel=1e-12),
        "flip_rate": None if previous is None else flips / weights,
        "scale_drift": None if previous is None else pytest.approx(drift / scale_count, rel=1e-12),
    }


def as_dict(statistics: object) -> dict[str, object]:
    values = dict(vars(statistics))
    values["margin_histogram"] = list(values["margin_histogram"])
    return values


@pytest.mark.parametrize("seed", [0, 1])
def test_totals_and_layers_equal_plain_loops(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes: list[tuple[str, int, int, int | None]] = [("a", 5, 24, 1), ("b", 3, 32, 4), ("c", 7, 8, None)]
    first, second = ([make_layer(*shape, generator) for shape in shapes] for _ in range(2))
    telemetry = TernaryTelemetry()
    for layers, previous in ((first, None), (second, {layer[0]: layer for layer in first})):
        total, by_name = telemetry.measure(iter(layers))
        assert as_dict(total) == loops(layers, previous)
        assert list(by_name) == ["a", "b", "c"]
        for layer in layers:
            assert as_dict(by_name[layer[0]]) == loops([layer], previous)


def test_a_gaussian_latent_has_the_zero_share_and_margins_that_mathematics_gives() -> None:
    latent = torch.randn(512, 512, generator=torch.Generator().manual_seed(2))
    scale = latent.abs().mean().reshape(1, 1)
    codes = (latent / scale).round().clamp(-1, 1).to(torch.int8)
    total, _ = TernaryTelemetry().measure([("w", codes, latent, scale)])
    # P(|w| < s / 2) with s = E|w| = sqrt(2 / π): erf(s / 2 / √2) = 0.3101; four standard errors of 2¹⁸ samples
    assert total.zero_fraction == pytest.approx(0.3101, abs=4 * 0.0009)
    # P(0.45 < |w| / s < 0.55) = erf(0.55 s / √2) − erf(0.45 s / √2) = 0.0588
    assert total.margin_histogram[0] == pytest.approx(0.0588, abs=4 * 0.0005)
    assert sum(total.margin_histogram) == pytest.approx(1)


def test_measuring_keeps_its_own_copy_of_the_codes() -> None:
    name, codes, latent, scales = make_layer("a", 4, 16, 1, torch.Generator().manual_seed(3))
    telemetry = TernaryTelemetry()
    telemetry.measure([(name, codes, latent, scales)])
    codes[0, :8] = -codes[0, :8] + 1 - codes[0, :8].abs()  # 1 → −1, −1 → 1, 0 → 1: every one of the eight changes
    scales *= 1.25
    total, _ = telemetry.measure([(name, codes, latent, scales)])
    assert total.flip_rate == 8 / 64
    assert total.scale_drift == pytest.approx(0.25, rel=1e-6)


def test_a_resumed_measurement_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    first, second = (make_layer("blocks.0.attention.wq", 6, 16, 1, generator) for _ in range(2))
    telemetry = TernaryTelemetry()
    telemetry.measure([first])
    checkpoints.save(tmp_path, 1, {"telemetry": telemetry.state_dict()}, {}, model_config={})
    resumed = TernaryTelemetry()
    resumed.load_state_dict(checkpoints.load(tmp_path).tensors["telemetry"])
    assert resumed.measure([second]) == telemetry.measure([second])


def test_scalars_leave_out_unknown_values() -> None:
    layer = make_layer("a", 4, 16, 1, torch.Generator().manual_seed(5))
    telemetry = TernaryTelemetry()
    assert "ternary/flip_rate" not in telemetry.measure([layer])[0].scalars()
    scalars = telemetry.measure([layer])[0].scalars()
    assert scalars["ternary/flip_rate"] == 0
    assert all(name.startswith("ternary/") for name in scalars)


def test_no_layers_is_an_error_of_the_caller() -> None:
    with pytest.raises(ValueError, match="no ternary layers"):
        TernaryTelemetry().measure([])


def test_one_host_synchronisation(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [make_layer(name, 4, 16, 1, torch.Generator().manual_seed(6)) for name in "abc"]
    calls: list[str] = []

    def counting(method: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            calls.append(method)
            return original(*args)

        return counted

    for method in ("tolist", "item", "__bool__", "__int__", "__float__", "numpy"):
        monkeypatch.setattr(Tensor, method, counting(method, getattr(Tensor, method)))
    telemetry = TernaryTelemetry()
    telemetry.measure(layers)
    telemetry.measure(layers)
    assert calls == ["tolist", "tolist"]
