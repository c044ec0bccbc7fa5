"""`nanochat bench`: comparisons with named peers, measured here and now."""

from pathlib import Path
from typing import Annotated

import typer

from nanochat_cli.cli.bench_compare import compare
from nanochat_cli.cli.bench_suites import ab, e3
from nanochat_cli.cli.options import Overrides, Presets, resolve
from nanochat_cli.cli.session import session_of
from nanochat_cli.errors import ConfigError

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
    device: Annotated[str | None, typer.Option(metavar="DEVICE", help="cpu or cuda; default: cuda if there.")] = None,
    threads: Threads = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write JSON here, and the roofline beside it as PNG.")
    ] = None,
) -> None:
    """Time packed ternary products against F.linear in bf16 and fp32, on weights that no cache holds.

    Activation quantisation included; all contenders take turns in one process. Beside the times: bytes of packed
    weights per second, as a share of the read rate (CPU) or copy rate (GPU) of memory that is measured in between.
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

    Without TARGET: random weights of the shape of --preset (default nano-125m), written as TQ2_0. The two sides take
    turns in processes of their own; the one that waits is stopped.
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
        str, typer.Option(metavar="NAME", help="The plain model that the others are made of.")
    ] = "quickstart",
    overrides: Overrides = [],  # noqa: B006
    quick: Quick = False,
    out: Out = None,
) -> None:
    """Time and memory of a training step with several residual streams, DeltaNet, experts or MTP, against without.

    Every variant has the width and depth of the plain model and trains in a process of its own; they take turns.
    """
    from nanochat_cli.bench.micro.architectures import measure_architectures
    from nanochat_cli.report.result_file import show_results, write_results

    reporter = session_of(ctx).reporter
    variants = ["plain", "mhc-2", "mhc-4"] if quick else None
    results = measure_architectures(preset, overrides, reporter, rounds=1 if quick else 3, variants=variants)
    show_results(reporter, "training step; ratio: plain / variant", results)
    if out is not None:
        write_results(out, "architectures-cost", results)


@app.command()
def loader(
    ctx: typer.Context,
    overrides: Overrides = [],  # noqa: B006
    quick: Quick = False,
    out: Out = None,
) -> None:
    """Time the wait for batches, read ahead by processes (loader.enabled) or not, from shards and from text.

    Without a step (the loader's own rate) and with one that sleeps, as the CPU does while a GPU computes.
    """
    from tempfile import TemporaryDirectory

    from nanochat_cli.bench.micro.loader import FULL, QUICK, measure_loader
    from nanochat_cli.config.load import resolve_config
    from nanochat_cli.report.result_file import show_results, write_results

    session = session_of(ctx)
    # The batch of a small GPU, whatever the preset's model is trained with; little text, as its amount changes nothing.
    shape = ["train.batch_size=8", "train.seq_len=1024", "model.max_seq_len=1024", "loader.workers=2"]
    shape.append(f"data.max_bytes={4_000_000 if quick else 16_000_000}")
    config = resolve_config(["quickstart"], None, shape + overrides)
    with TemporaryDirectory() as folder:
        results = measure_loader(Path(folder), config, QUICK if quick else FULL, session.reporter)
    show_results(session.reporter, "loader; ratio: to reading in the trainer", results)
    if out is not None:
        shown = {"workers": config.loader.workers, "prefetch": config.loader.prefetch}
        tokens = {"batch_size": config.train.batch_size * config.train.grad_accum, "seq_len": config.train.seq_len}
        write_results(out, "loader", results, settings={**shown, **tokens})


@app.command()
def optim(ctx: typer.Context, quick: Quick = False, out: Out = None) -> None:
    """State bytes, step time and held-out loss of 8-bit and low-rank optimizers, against whole Muon and AdamW.

    Bytes are counted for the shapes of every preset; times and losses are of small models.
    """
    from nanochat_cli.bench.micro.optim import measure_optim
    from nanochat_cli.report.result_file import show_results, write_results

    reporter = session_of(ctx).reporter
    results, claims = measure_optim(reporter, quick=quick)
    show_results(reporter, "ratio above 1: better than the peer", results, claims)
    if out is not None:
        write_results(out, "optim", results, claims)


@app.command()
def collider(ctx: typer.Context, quick: Quick = False, out: Out = None) -> None:
    """Time and memory of training steps that leave filtered tokens out of the backward pass.

    Three widths, five shares of filtered tokens, which take turns; also: all kept, and chosen before the forward pass.
    """
    from nanochat_cli.bench.micro.collider import measure_collider
    from nanochat_cli.report.result_file import show_results, write_results

    reporter = session_of(ctx).reporter
    if quick:
        results = measure_collider(reporter, widths=(512,), sparsities=(0.0, 0.4), rounds=2)
    else:
        results = measure_collider(reporter)
    show_results(reporter, "training step; ratio: nothing filtered / filtered", results)
    if out is not None:
        write_results(out, "collider", results)


app.command()(compare)
app.command()(e3)
app.command()(ab)
