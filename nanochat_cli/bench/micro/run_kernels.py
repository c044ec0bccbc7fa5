"""`nanochat bench kernels`: chooses the device, measures, shows and writes."""

from dataclasses import asdict
from pathlib import Path

import torch

from nanochat_cli.bench.micro.kernels import COLUMNS, FULL, QUICK, QUICK_ROUNDS, ROUNDS, Device, measure
from nanochat_cli.bench.micro.kernels_cpu import CPU, threads
from nanochat_cli.bench.micro.kernels_cuda import CUDA
from nanochat_cli.bench.micro.roofline import plot_roofline
from nanochat_cli.errors import ConfigError
from nanochat_cli.formats.run.find import require_writable
from nanochat_cli.report.quantities import format_quantity
from nanochat_cli.report.reporter import Reporter
from nanochat_cli.report.result_file import write_results
from nanochat_kernels.cpu import native

DEVICES = ("cpu", "cuda")


def run_kernels(
    reporter: Reporter,
    *,
    quick: bool = False,
    device: str | None = None,
    n_threads: int | None = None,
    out: Path | None = None,
) -> None:
    """Raises ConfigError for a missing device or an --out that does not end in .json, DataError if it is locked."""
    if out is not None:
        if out.suffix != ".json":
            raise ConfigError(f"--out {out}: must end in .json; the roofline becomes {out.with_suffix('.png')}")
        require_writable(out)
    with threads(n_threads):
        where = choose_device(device)
        measured = measure(QUICK if quick else FULL, where, reporter, QUICK_ROUNDS if quick else ROUNDS)
    roof = f"{measured.memory_roof} {format_quantity(measured.roof, 'B')}/s"
    reporter.table(f"{measured.device}: {roof}", COLUMNS, measured.rows)
    details = {
        "rotation_bytes": where.rotation_bytes,
        "activation_dtype": str(where.activation_dtype).removeprefix("torch."),
        "threads": n_threads or torch.get_num_threads(),
        "cpu_kernels": native.select(None) if where.backend == "cpu" else None,
        "quick": quick,
    }
    reporter.result({"suite": "kernels", "results": [asdict(result) for result in measured.results], **details})
    if out is not None:
        written = write_results(out, "kernels", measured.results, **details)
        picture = plot_roofline(measured, out.with_suffix(".png"))
        reporter.info(f"wrote {written} and {picture}")


def choose_device(name: str | None) -> Device:
    """`cpu` or `cuda`; None: the GPU if there is one."""
    if name is not None and name not in DEVICES:
        raise ConfigError(f"--device {name} does not exist: choose one of {', '.join(DEVICES)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device here; use --device cpu")
    return CUDA() if name == "cuda" or (name is None and torch.cuda.is_available()) else CPU()
