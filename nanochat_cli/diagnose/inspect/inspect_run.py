"""`nanochat inspect`: tables, pictures and verdicts of a run."""

from pathlib import Path

from nanochat_cli.diagnose.inspect.isometry import measure_isometry
from nanochat_cli.diagnose.inspect.plots import plot_isometry, plot_streams, plot_ternary
from nanochat_cli.diagnose.inspect.ternary import layer_health
from nanochat_cli.errors import ConfigError
from nanochat_cli.formats.open import open_run
from nanochat_cli.formats.run.checkpoints import Which
from nanochat_cli.formats.run.dataset import open_run_data
from nanochat_cli.report.reporter import Reporter
from nanochat_cli.training.chat_data import open_data
from nanochat_cli.training.health.streams import measure_streams
from nanochat_cli.training.health.ternary import TernaryTelemetry
from nanochat_cli.training.methods.fire import stacked

SEQUENCES = 4
"""Held-out sequences on which streams are measured."""


def inspect_run(run: Path, which: Which, out: Path, reporter: Reporter, *, mhc: bool, isometry: bool) -> None:
    """Tables and pictures of a checkpoint: its ternary layers by default, or its residual streams and isometry."""
    if mhc:
        inspect_streams(run, which, out, reporter)
    if isometry:
        inspect_isometry(run, which, out, reporter)
    if not (mhc or isometry):
        inspect_ternary(run, which, out, reporter)


def inspect_ternary(run: Path, which: Which, out: Path, reporter: Reporter) -> None:
    """Health of every ternary layer of a checkpoint. ConfigError for a float model."""
    loaded = open_run(run, which)
    model = loaded.model
    if loaded.ternary_share < 1:
        raise ConfigError(f"{loaded}: it has no ternary layers yet")
    if not model.config.quant.enabled:
        raise ConfigError(f"{run} was trained with model.quant.enabled = false: it has no ternary layers")
    telemetry = TernaryTelemetry()
    telemetry.load_state_dict(loaded.parts.get("telemetry", {"codes": {}, "scales": {}}))
    layers = layer_health(model.ternary_layers(), telemetry)
    rows = []
    for layer in layers:
        s = layer.statistics
        flips = "" if s.flip_rate is None else f"{s.flip_rate:.2%}"
        drift = "" if s.scale_drift is None else f"{s.scale_drift:.2%}"
        verdict = ", ".join(layer.warnings()) or "ok"
        near = f"{s.margin_histogram[0]:.1%}"
        rows.append(
            (layer.name, f"{s.zero_fraction:.1%}", s.dead_rows, near, f"{s.scale_mean:.4g}", flips, drift, verdict)
        )
    columns = ("layer", "zeros", "dead rows", "at a threshold", "mean scale", "flips", "scale drift", "verdict")
    reporter.table(f"ternary layers of {run.name}", columns, rows)
    picture = plot_ternary(layers, out / "ternary.png")
    unhealthy = [layer.name for layer in layers if layer.warnings()]
    reporter.info(f"{len(layers) - len(unhealthy)} of {len(layers)} layers healthy; {picture}")
    reporter.result({"run": str(run), "layers": [layer.as_dict() for layer in layers], "healthy": not unhealthy})


def inspect_streams(run: Path, which: Which, out: Path, reporter: Reporter) -> None:
    """The hyper-connections of a checkpoint, on held-out text. ConfigError for a plain residual."""
    loaded = open_run(run, which)
    model, config = loaded.model, loaded.config
    if config.model.mhc.streams == 1:
        raise ConfigError(f"{run} was trained with model.mhc.streams = 1: it has a plain residual")
    reader = open_run_data(run, config, reporter)
    batches = open_data(reader, config).held_out(SEQUENCES * config.train.seq_len)
    inputs, targets = next(iter(batches))
    report = measure_streams(model, inputs[:SEQUENCES], targets[:SEQUENCES])
    rows = [
        (
            layer.name,
            f"{layer.alpha:.3f}",
            f"{layer.entropy:.3f}",
            f"{layer.orthogonality:.3f}",
            f"{layer.pre_balance:.2f}",
            f"{layer.post_balance:.2f}",
            f"{layer.diversity:.4f}",
            " ".join(f"{norm:.1e}" for norm in layer.gradient_norms),
            ", ".join(layer.warnings()) or ("copies, as they begin" if layer.reads_copies else "ok"),
        )
        for layer in report.layers
    ]
    columns = ("sublayer", "alpha", "entropy", "‖HᵀH−I‖", "pre", "post", "diversity", "gradients", "verdict")
    reporter.table(f"residual streams of {run.name}", columns, rows)
    picture = plot_streams(report, out / "mhc.png")
    healthy = not any(layer.warnings() for layer in report.layers)
    reporter.info(
        f"composite gain {report.composite_gain:.4f} (1 by construction); "
        f"{'the streams differ' if healthy else 'see the verdicts'}; {picture}"
    )
    reporter.result({"run": str(run), "mhc": report.as_dict(), "healthy": healthy})


def inspect_isometry(run: Path, which: Which, out: Path, reporter: Reporter) -> None:
    """Distance from isometry of every matrix of a checkpoint's blocks."""
    model = open_run(run, which).model
    layers = measure_isometry((name, stacked(layer)) for name, layer in model.linears())
    rows = [
        (
            layer.name,
            f"{layer.shape[0]} × {layer.shape[1]}",
            f"{layer.deviation:.3f}",
            f"{layer.against_random:.2f}",
            f"{layer.relative_sfe:.3f}",
            f"{layer.condition:.3g}",
            f"{layer.spectral_norm:.3g}",
            f"{layer.effective_rank:.1%}",
            ", ".join(layer.warnings()) or "ok",
        )
        for layer in layers
    ]
    columns = ("layer", "shape", "DfI / rank", "of random", "SFE", "condition", "norm", "effective rank", "verdict")
    reporter.table(f"isometry of {run.name}", columns, rows)
    picture = plot_isometry(layers, out / "isometry.png")
    notable = sum(bool(layer.warnings()) for layer in layers)
    reporter.info(f"{len(layers) - notable} of {len(layers)} matrices without a finding; {picture}")
    reporter.result({"run": str(run), "isometry": [layer.as_dict() for layer in layers], "healthy": notable == 0})
