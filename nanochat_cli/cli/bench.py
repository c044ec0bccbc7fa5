"""`nanochat bench`: comparisons with named peers, measured here and now."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nanochat_cli.cli.bench_compare import compare
from nanochat_cli.cli.bench_suites import ab, e3
from nanochat_cli.cli.options import Overrides, Presets, resolve
from nanochat_cli.cli.session import session_of
from nanochat_cli.errors import ConfigError

if TYPE_CHECKING:
    from nanochat_cli.report.reporter import Reporter
    from nanochat_cli.report.result_file import Claim, Result

app = typer.Typer(add_completion=False, no_args_is_help=True)

Quick = Annotated[bool, typer.Option("--quick", help="Fewer cases: under a minute.")]
Threads = Annotated[int | None, typer.Option(min=1, metavar="N", help="CPU threads; default: what torch chooses.")]
Out = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the measurements as JSON.")]


@app.callback()
def bench() -> None:
    """Measure the kernels, or whole models against llama.cpp. Ratios above 1 mean faster than the peer."""


@app.command()
def kernels(
    ctx: typer.Context,
    quick: Quick = False,
    device: Annotated[str | None, typer.Option(metavar="DEVICE", help="cpu or cuda; default: cuda if any.")] = None,
    threads: Threads = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write JSON here, and the roofline beside it as PNG.")
    ] = None,
) -> None:
    """Time packed ternary products against F.linear in bf16 and fp32, on weights too large for any cache.

    Includes activation quantisation; all contenders take turns in one process. Also reports bytes of packed weights
    per second, as a share of the memory's read rate (CPU) or copy rate (GPU), which is measured in between.
    """
    from nanochat_cli.bench.micro.run_kernels import run_kernels

    run_kernels(session_of(ctx).reporter, quick=quick, device=device, n_threads=threads, out=out)


@app.command()
def decode(
    ctx: typer.Context,
    target: Annotated[
        Path | None, typer.Argument(metavar="TARGET", help="A run or a .gguf file; default: a preset's shape.")
    ] = None,
    preset: Presets = [],  # noqa: B006 - Typer copies it
    overrides: Overrides = [],  # noqa: B006
    quick: Quick = False,
    threads: Threads = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, metavar="N", help="Default: 512, or what fits.")] = None,
    new_tokens: Annotated[int | None, typer.Option(min=2, metavar="N", help="Default: 128, or what fits.")] = None,
    out: Out = None,
) -> None:
    """Time prefill and decode of a whole model against llama.cpp on the same GGUF file.

    Without TARGET: random weights in the shape of --preset (default nano-125m), written as TQ2_0. The two sides take
    turns in separate processes; the waiting one is suspended.
    """
    from nanochat_cli.formats.run.find import find_run_or_gguf

    session = session_of(ctx)
    if target is not None and (preset or overrides):
        raise ConfigError("TARGET brings its own shape: leave out --preset and --set, or leave out TARGET")
    config = None
    if target is None:
        config = resolve(session, preset, None, overrides, default_preset="nano-125m")
    else:
        target = find_run_or_gguf(target)
    from nanochat_cli.bench.micro.run_decode import run_decode

    run_decode(
        session.reporter,
        target,
        config,
        quick=quick,
        n_threads=threads,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        out=out,
    )


@app.command()
def architectures(
    ctx: typer.Context,
    preset: Annotated[
        str, typer.Option(metavar="NAME", help="The plain model that the variants are made from.")
    ] = "quickstart",
    overrides: Overrides = [],  # noqa: B006
    quick: Quick = False,
    out: Out = None,
) -> None:
    """Measure what several residual streams, DeltaNet, experts and MTP add to a training step's time and memory.

    Every variant has the width and depth of the plain model and trains in its own process; they take turns.
    """
    from nanochat_cli.bench.micro.architectures import measure_architectures

    reporter = session_of(ctx).reporter
    variants = ["plain", "mhc-2", "mhc-4"] if quick else None
    results = measure_architectures(preset, overrides, reporter, rounds=1 if quick else 3, variants=variants)
    _publish(reporter, "training step; ratio: plain / variant", out, "architectures-cost", results)


@app.command()
def loader(
    ctx: typer.Context,
    overrides: Overrides = [],  # noqa: B006
    quick: Quick = False,
    out: Out = None,
) -> None:
    """Time the wait for batches with and without processes that read ahead (loader.enabled), from shards and text.

    Without a step (the loader's own rate) and with one that sleeps, as the CPU does while a GPU computes.
    """
    from tempfile import TemporaryDirectory

    from nanochat_cli.bench.micro.loader import FULL, QUICK, measure_loader
    from nanochat_cli.config.load import resolve_config

    session = session_of(ctx)
    # A batch for a small GPU instead of the preset's; little text, since its amount does not matter.
    shape = ["train.batch_size=8", "train.seq_len=1024", "model.max_seq_len=1024", "loader.workers=2"]
    shape.append(f"data.max_bytes={4_000_000 if quick else 16_000_000}")
    config = resolve_config(["quickstart"], None, shape + overrides)
    with TemporaryDirectory() as folder:
        results = measure_loader(Path(folder), config, QUICK if quick else FULL, session.reporter)
    settings = {"workers": config.loader.workers, "prefetch": config.loader.prefetch}
    settings |= {"batch_size": config.train.batch_size * config.train.grad_accum, "seq_len": config.train.seq_len}
    title = "loader; ratio: to reading in the trainer"
    _publish(session.reporter, title, out, "loader", results, settings=settings)


@app.command()
def optim(ctx: typer.Context, quick: Quick = False, out: Out = None) -> None:
    """Compare state bytes, step time and held-out loss of 8-bit and low-rank optimizers with plain Muon and AdamW.

    Bytes are counted for the shapes of every preset; times and losses are measured on small models.
    """
    from nanochat_cli.bench.micro.optim import measure_optim

    reporter = session_of(ctx).reporter
    results, claims = measure_optim(reporter, quick=quick)
    _publish(reporter, "ratio above 1: better than the peer", out, "optim", results, claims)


@app.command()
def collider(ctx: typer.Context, quick: Quick = False, out: Out = None) -> None:
    """Measure time and memory of training steps that leave filtered tokens out of the backward pass.

    At three widths, five shares of filtered tokens take turns; so do keeping all, and choosing before the forward pass.
    """
    from nanochat_cli.bench.micro.collider import measure_collider

    reporter = session_of(ctx).reporter
    if quick:
        results = measure_collider(reporter, widths=(512,), sparsities=(0.0, 0.4), rounds=2)
    else:
        results = measure_collider(reporter)
    _publish(reporter, "training step; ratio: nothing filtered / filtered", out, "collider", results)


def _publish(
    reporter: "Reporter",
    title: str,
    out: Path | None,
    suite: str,
    results: "Sequence[Result]",
    claims: "Sequence[Claim]" = (),
    **details: Any,
) -> None:
    """Show the results, and write them where `--out` asks for it."""
    from nanochat_cli.report.result_file import show_results, write_results

    show_results(reporter, title, results, claims)
    if out is not None:
        write_results(out, suite, results, claims, **details)


app.command()(compare)
app.command()(e3)
app.command()(ab)
