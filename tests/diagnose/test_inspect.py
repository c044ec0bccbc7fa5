"""Measures of residual streams and ternary layers, on cases with known answers and on a model."""

import math

import pytest
import torch

from nanochat_cli.diagnose.inspect import plots
from nanochat_cli.diagnose.inspect.isometry import measure_isometry
from nanochat_cli.diagnose.inspect.plots import plot_streams, plot_ternary
from nanochat_cli.diagnose.inspect.ternary import layer_health
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.training.health.streams import (
    balance,
    entropy_share,
    measure_streams,
    orthogonality_error,
    stream_diversity,
)
from nanochat_cli.training.health.ternary import MARGIN_EDGES, TernaryTelemetry
from tests.architectures import build

TOKENS = torch.randint(288, (2, 17), generator=torch.Generator().manual_seed(0))


def test_the_identity_and_the_even_mixture_have_known_values():
    identity, even = torch.eye(4), torch.full((4, 4), 0.25)
    assert orthogonality_error(identity) == 0
    assert orthogonality_error(even) == pytest.approx(math.sqrt(3), abs=1e-6)
    assert entropy_share(torch.tensor([1.0, 0.0])) == 0
    assert entropy_share(torch.full((24,), 1 / 24)) == pytest.approx(1)
    assert balance(torch.tensor([1.0, 1.0, 1.0, 5.0])) == pytest.approx(2.5)


def test_diversity_is_0_for_copies_1_for_orthogonal_streams_and_2_for_opposites():
    row = torch.randn(8)
    assert stream_diversity(torch.stack([row, 3 * row])) == pytest.approx(0, abs=1e-6)
    assert stream_diversity(torch.eye(4)) == pytest.approx(1)
    assert stream_diversity(torch.stack([row, -row])) == pytest.approx(2)


@pytest.mark.parametrize("combination", ["mhc-2+attention+dense+tied", "mhc-4+hybrid+moe+untied"])
def test_a_model_is_measured_and_left_as_it_was(combination, tmp_path):
    model = build(combination).train()
    model.embedding.weight.grad = torch.ones_like(model.embedding.weight)
    random = torch.get_rng_state()
    report = measure_streams(model, TOKENS[:, :-1], TOKENS[:, 1:])
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(model.embedding.weight.grad, torch.ones_like(model.embedding.weight))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "embedding.weight")
    assert all(not moe.load.any() for _, moe in model.mixtures())
    assert len(report.layers) == 2 * model.config.n_layers
    assert report.composite_gain == pytest.approx(1, abs=1e-5)
    assert report.gain_product == pytest.approx(1, abs=1e-4)
    assert report.layers[0].diversity == pytest.approx(0, abs=1e-6)
    assert all(layer.diversity > 0 for layer in report.layers[1:])
    assert all(norm > 0 for layer in report.layers for norm in layer.gradient_norms)
    assert all(sum(row) == pytest.approx(1, abs=1e-5) for layer in report.layers for row in layer.matrix)
    assert all(math.isfinite(value) for value in report.scalars().values())
    assert plot_streams(report, tmp_path / "mhc.png").stat().st_size > 1000


def test_streams_that_stay_copies_are_reported():
    model = build("mhc-2+attention+dense+tied", mhc={"streams": 2, "dynamic": False})
    for _, mix in model.hyper_connections():
        mix.pre_bias.data.zero_()
        mix.post_bias.data.zero_()
    report = measure_streams(model, TOKENS[:, :-1], TOKENS[:, 1:])
    assert all("copies" in " ".join(layer.warnings()) for layer in report.layers[1:])


@pytest.mark.parametrize("init", ["identity", "balanced", "high-entropy", "layer-dependent"])
@pytest.mark.parametrize("streams", [2, 4])
def test_a_model_is_healthy_wherever_its_mixing_begins(streams, init):
    """Alpha starts at 0.9997, a half or 1 / n!; models that train well keep it (benchmarks/stream_health.py)."""
    model = build(f"mhc-{streams}+attention+dense+tied", mhc={"streams": streams, "init": init})
    report = measure_streams(model, TOKENS[:, :-1], TOKENS[:, 1:])
    assert [layer.warnings() for layer in report.layers] == [[]] * len(report.layers)
    assert [layer.reads_copies for layer in report.layers] == [True] + [False] * (len(report.layers) - 1)


def test_a_plain_residual_has_no_streams_to_measure():
    with pytest.raises(ValueError, match="one residual stream"):
        measure_streams(build("plain+attention+dense+tied"), TOKENS, TOKENS)


def dead(model: Transformer) -> Transformer:
    layer = next(layer for _, layer in model.ternary_layers())
    layer.weight.data[:3] = 1e-9
    layer.requantize()
    return model


def test_dead_rows_and_flips_are_found(tmp_path):
    model = build("plain+attention+dense+tied")
    telemetry = TernaryTelemetry()
    before = layer_health(model.ternary_layers(), telemetry)
    assert not any(layer.warnings() for layer in before)
    assert before[0].statistics.flip_rate is None
    after = layer_health(dead(model).ternary_layers(), telemetry)
    assert after[0].statistics.dead_rows == 3
    assert "3 dead rows" in after[0].warnings()
    assert after[0].statistics.flip_rate
    assert not any(layer.warnings() for layer in after[1:])
    assert plot_ternary(after, tmp_path / "ternary.png").stat().st_size > 1000


def test_every_picture_of_an_inspection_has_named_axes_and_bins_as_wide_as_they_are(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, out: drawn.append(figure) or out)
    model = build("mhc-2+attention+dense+tied")
    layers = layer_health(model.ternary_layers(), TernaryTelemetry())
    plot_ternary(layers, tmp_path)
    plots.plot_isometry(
        measure_isometry((name, layer.weight.detach()[None]) for name, layer in model.ternary_layers()), tmp_path
    )
    plot_streams(measure_streams(model, TOKENS[:, :-1], TOKENS[:, 1:]), tmp_path)
    axes = [axes for figure in drawn for axes in figure.axes if not axes.images]
    assert len(axes) == 5
    assert all(one.get_xlabel() and one.get_ylabel() for one in axes)
    bars = axes[1].patches
    assert [bar.get_x() for bar in bars] == list(MARGIN_EDGES[:-1])
    assert [bar.get_x() + bar.get_width() for bar in bars] == pytest.approx(MARGIN_EDGES[1:])
    shares = sum(bar.get_width() * bar.get_height() for bar in bars)
    weights = [layer.statistics.weights for layer in layers]
    beyond = [layer.statistics.margin_histogram[-1] for layer in layers]
    assert shares == pytest.approx(1 - sum(b * n for b, n in zip(beyond, weights, strict=True)) / sum(weights))
