"""The end of a run: compressors on the same held-out files, the curve, samples, `results.json` and the report.

Knows what a finished run is judged by; the figures come from the trainer, the drawing from `report`.
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from nanochat_cli.config.schema import Config
from nanochat_cli.data.compress_baselines import compress_baselines
from nanochat_cli.data.mixture import Mixture, shares_of, too_often
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.formats.open import load_run
from nanochat_cli.inference.packed_model import PackedTransformer
from nanochat_cli.report.environment import environment, read_environment
from nanochat_cli.report.metrics_log import read_metrics
from nanochat_cli.report.plots import plot_run, text_curve
from nanochat_cli.report.reporter import Reporter
from nanochat_cli.report.run_results import add_results
from nanochat_cli.training.build import METHODS
from nanochat_cli.training.progress import TrainResult
from nanochat_cli.training.samples import Sample, draw_samples, write_samples

MAX_COMPRESSED_BYTES = 16_000_000
"""xz reads about a megabyte a second: larger held-out sets are not compressed."""
CURVE_FILE = "curve.png"


def summarise(run_dir: Path, config: Config, result: TrainResult, reader: ShardReader, reporter: Reporter) -> Sample:
    """Write everything into the run's folder, and say the essence; returns the sample that was shown."""
    chats = reader.manifest.chat is not None
    baselines = {} if chats else _baselines(reader, reporter)  # of answers alone a compressor knows nothing
    records = read_metrics(run_dir)
    text = [record for record in records if "final/base_bits_per_byte" in record]
    base = {"base_bits_per_byte": text[-1]["final/base_bits_per_byte"]} if text else {}
    own = {"all held-out files": result.held_out.bits_per_byte}
    plot_run(records, run_dir / CURVE_FILE, title=run_dir.name, baselines=own | baselines)
    samples = _samples(run_dir, result.progress.step, reader)
    counts = config.model.count_parameters()
    epochs = _epochs(result, config, reader, reporter)
    measured = {part.report[0]: part.report[1] for part in METHODS if part.report is not None}
    report = add_results(
        run_dir,
        config=config.model_dump(mode="json"),
        parameters={**asdict(counts), "total": counts.total},
        environment=read_environment(run_dir) or environment(),
        results={
            **result.held_out.as_dict(),
            **base,
            "steps": result.progress.step,
            "training_tokens": result.progress.tokens,
            "training_seconds": result.progress.seconds,
            "tokens_per_second": result.tokens_per_second,
            "utilisation": result.utilisation,
            "peak_flops": result.peak_flops,
            "skipped": result.skipped,
            "optimizer_state_bytes": result.optimizer_bytes,
            **({"epochs": epochs} if epochs else {}),
        },
        baselines=baselines,
        measured=measured,
        **{group: last_values(records, group) for group in measured},
        plot=CURVE_FILE,
        samples=[asdict(one) for one in samples],
    )
    reporter.info(text_curve(records, baselines))
    shown = samples[0]
    reporter.info(f"a held-out document, continued by the model:\n{shown.prompt}▶{shown.continuation}")
    if shown.truth:
        reporter.info(f"and in truth:\n{shown.prompt}▶{shown.truth}")
    rows: list[tuple[str, object]] = [(f"held-out bits per byte, {run_dir.name}", result.held_out.bits_per_byte)]
    rows += [(f"held-out bits per byte, {name}", value) for name, value in baselines.items()]
    rows += [
        ("held-out loss, nats per token", result.held_out.loss),
        ("parameters", result.parameters),
        ("steps", result.progress.step),
        ("tokens", result.progress.tokens),
        ("tokens per second", round(result.tokens_per_second)),
        ("model FLOP/s over the matmul peak", f"{result.utilisation:.0%}"),
    ]
    rows += [("bits per byte of data.base", value) for value in base.values()]
    rows += [(f"epochs of {name}", round(count, 2)) for name, count in epochs.items()]
    reporter.table(str(run_dir), ("measure", "value"), rows)
    reporter.info(f"report: {report}   curve: {run_dir / CURVE_FILE}")
    reporter.result({"baselines": baselines, "samples": [asdict(one) for one in samples]})
    return shown


def _epochs(result: TrainResult, config: Config, reader: ShardReader, reporter: Reporter) -> dict[str, float]:
    """How often each source of a mixture was read; empty for a single source."""
    shares = shares_of(reader.manifest)
    if not shares:
        return {}
    seq_len = config.train.seq_len
    epochs = Mixture(shares, seq_len, config.run.seed).epochs(result.progress.tokens // seq_len)
    if config.train.time_budget is not None and (line := too_often(epochs)) is not None:
        reporter.warn(line)  # without a budget it was said at the beginning
    return epochs


def _baselines(reader: ShardReader, reporter: Reporter) -> dict[str, float]:
    """Bits per byte of gzip and xz on the held-out documents; empty when there are too many of them."""
    size = reader.manifest.val.bytes
    if size > MAX_COMPRESSED_BYTES:
        reporter.info(f"gzip and xz are not measured: {size / 1e6:.0f} MB of held-out documents would take minutes")
        return {}
    with reporter.progress("compressing the held-out files", size, "B") as progress:

        def counted() -> Iterator[bytes]:
            for document in reader.documents("val"):
                yield document
                progress.advance(len(document))

        measured = compress_baselines(counted())
    return {
        "gzip -9": measured.gzip,
        "xz -9e": measured.xz,
        "gzip -9, each file alone": measured.gzip_per_document,
        "xz -9e, each file alone": measured.xz_per_document,
    }


def _samples(run_dir: Path, step: int, reader: ShardReader) -> list[Sample]:
    """Continuations of held-out documents by the saved model, also written to `samples/`."""
    model, tokenizer, _ = load_run(run_dir)
    samples = draw_samples(PackedTransformer.from_model(model), tokenizer, reader)
    write_samples(run_dir, step, samples)
    return samples


def last_values(records: list[dict[str, float]], group: str) -> dict[str, float]:
    """The last value of every metric `group/…`."""
    found: dict[str, float] = {}
    for record in records:
        found |= {name: value for name, value in record.items() if name.startswith(f"{group}/") and value is not None}
    return found
