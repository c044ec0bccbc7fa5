"""What only a CUDA machine can tell, in under ten minutes: whether kernels are exact, how fast they and training are.

    python benchmarks/gpu.py [--only SECTION] [--rounds 5] [--steps 10] [--train-steps 300] [--out FILE]

Sections: `reference` (the definitions on the GPU, bit for bit against the CPU), `triton` (every Triton operation
against the reference), `products` (packed products against cuBLAS and a copy of memory, as CUDA graphs over rotating
weights), `training`, `losses` and `training-1b` (whole steps in three forms, alternating, and what they learn; see
`gpu_training`), and `sweep` (other configurations of the kernels, while time is left). If a section fails, that is
reported and the others still run; the file is written after each. Exit code 2 without CUDA, 4 when a section failed.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# So that the sections can be imported from benchmarks/ when this file is run as a script.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_kernels import check_triton, measure_table, sweep
from benchmarks.gpu_training import PRESET, billion, measure_training, train_forms
from nanochat_cli.bench.micro.kernels_cuda import CUDA
from nanochat_cli.config.load import resolve_config
from nanochat_cli.config.schema import Config
from nanochat_cli.diagnose.validate.three_way_parity import all_cases
from nanochat_cli.errors import ConfigError, NanochatError, ValidationFailure
from nanochat_cli.report.reporter import Reporter, open_reporter
from nanochat_cli.report.result_file import Claim, Result, write_results
from nanochat_kernels import (
    Granularity,
    fake_quantize_activations,
    fake_ternarize,
    pack_plane128,
    quantize_activations,
    ternarize,
    unpack_plane128,
)

ROOT = Path(__file__).resolve().parents[1]
GRANULARITIES: tuple[Granularity, ...] = ("row", "tensor", 256, 128, 64)
TOTAL_SECONDS = 540.0
"""After this the sweep stops, or does not start."""
LEAST_SWEEP_SECONDS = 20.0


@dataclass(frozen=True)
class Findings:
    """A section's contribution to the file. details: further keys of it."""

    results: Sequence[Result] = ()
    claims: Sequence[Claim] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


def run_sections(wanted: Mapping[str, Callable[[float], Findings]], out: Path) -> list[str]:
    """Run all sections, each with the seconds that are left, and write the file after each.

    Returns a line for each section that failed.
    """
    began = time.monotonic()
    results: list[Result] = []
    claims: list[Claim] = []
    details: dict[str, Any] = {}
    failures: list[str] = []
    seconds: dict[str, float] = {}
    for name, section in wanted.items():
        started = time.monotonic()
        print(f"--- {name}", flush=True)
        try:
            findings = section(TOTAL_SECONDS - (started - began))
            results += findings.results
            claims += findings.claims
            details |= findings.details
        except ValidationFailure as failure:
            failures.append(f"{name}: {failure}")
        except Exception as error:  # noqa: BLE001 - a GPU machine is borrowed: the other sections must still run
            traceback.print_exc()
            failures.append(f"{name}: {type(error).__name__}: {error}")
        seconds[name] = round(time.monotonic() - started, 1)
        write_results(out, "gpu", results, claims, failures=failures, seconds=seconds, **details)
        print(f"--- {name}: {seconds[name]} s", flush=True)
    return failures


def check_kernels(device: torch.device) -> list[Result]:
    """Every reference operation on `device` against the CPU. Raises ValidationFailure for the first that differs."""
    generator = torch.Generator().manual_seed(0)
    # Multiples of 2⁻¹⁰ below 1 have exact sums in any order, so that the scales are equal and not only close.
    weight = torch.randint(-1023, 1024, (512, 1024), generator=generator) / 1024
    x = torch.randn(64, 1024, generator=generator) * torch.logspace(-6, 3, 64).unsqueeze(1)
    x[0] = 0.0
    codes = ternarize(weight).codes
    packed = pack_plane128(codes)
    pairs = {
        "quantize_activations: codes": (quantize_activations(x)[0], quantize_activations(x.to(device))[0]),
        "quantize_activations: scale": (quantize_activations(x)[1], quantize_activations(x.to(device))[1]),
        "fake_quantize_activations": (fake_quantize_activations(x), fake_quantize_activations(x.to(device))),
        "pack_plane128": (packed, pack_plane128(codes.to(device))),
        "unpack_plane128": (codes, unpack_plane128(packed.to(device), codes.shape[1])),
    }
    for granularity in GRANULARITIES:
        here, there = ternarize(weight, granularity), ternarize(weight.to(device), granularity)
        pairs[f"ternarize, {granularity}: codes"] = here.codes, there.codes
        pairs[f"ternarize, {granularity}: scales"] = here.scales, there.scales
        pairs[f"fake_ternarize, {granularity}"] = here.dequantize(), fake_ternarize(weight.to(device), granularity)
    for name, (expected, actual) in pairs.items():
        if not torch.equal(expected, actual.cpu()):
            differing = int((expected != actual.cpu()).sum())
            raise ValidationFailure(f"{name}: {differing} of {expected.numel()} values on {device} differ from the CPU")
    print(f"{len(pairs)} results of the reference operations are equal bit for bit on {device} and the CPU", flush=True)
    return [Result("reference kernels", f"{name} equal to the CPU", 1.0, "1: yes, 0: no") for name in pairs]


def sections(
    device: torch.device, reporter: Reporter, rounds: int, steps: int, train_steps: int
) -> dict[str, Callable[[float], Findings]]:
    """All sections by name, the most important first."""
    nano = resolve_config([PRESET, "llama-cpp", "h200"])

    def training(name: str, config: Config) -> Findings:
        torch.cuda.empty_cache()
        return Findings(measure_training(name, config, device, rounds, steps))

    def losses(_: float) -> Findings:
        torch.cuda.empty_cache()
        results, curves = train_forms(nano, device, train_steps)
        return Findings(results, details={"losses": curves})

    def sweep_what_is_left(seconds: float) -> Findings:
        torch.cuda.empty_cache()
        if seconds < LEAST_SWEEP_SECONDS:
            print("no time left: run it alone with --only sweep", flush=True)
            return Findings()
        return Findings(sweep(CUDA(), reporter, seconds))

    return {
        "reference": lambda _: Findings(check_kernels(device)),
        "triton": lambda _: Findings(check_triton(all_cases(), reporter)),
        "products": lambda _: Findings(*measure_table(CUDA(), reporter)),
        "training": lambda _: training(PRESET, nano),
        "losses": losses,
        "training-1b": lambda _: training("1 B", billion(nano)),
        "sweep": sweep_what_is_left,
    }


def run(options: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise ConfigError("benchmarks/gpu.py needs a CUDA device, and torch finds none: run it on a machine with a GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    wanted = sections(device, open_reporter(), options.rounds, options.steps, options.train_steps)
    unknown = set(options.only or ()) - wanted.keys()
    if unknown:
        raise ConfigError(f"--only {sorted(unknown)[0]} does not exist: choose from {', '.join(wanted)}")
    if options.only:
        wanted = {name: section for name, section in wanted.items() if name in options.only}
    failures = run_sections(wanted, options.out)
    print(f"wrote {options.out}")
    if failures:
        raise ValidationFailure("; ".join(failures))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="SECTION", help="may be repeated; default: all")
    parser.add_argument("--rounds", type=int, default=5, help="training rounds")
    parser.add_argument("--steps", type=int, default=10, help="training steps per round")
    parser.add_argument("--train-steps", type=int, default=300, help="steps of the runs whose losses are compared")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    try:
        run(parser.parse_args())
    except NanochatError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
