"""`nanochat validate`: its stages in order, how they run, and how the outcome is reported.

A stage runs even if others failed, unless it needs one of those, so that one run shows everything. The module of a
stage is imported when the stage runs: one that cannot be imported fails that stage alone.
"""

import importlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

from nanochat_cli.diagnose.validate.stage import Figure, NotHere, Stage, StageOutcome, Workspace
from nanochat_cli.errors import Interrupted, NanochatError, ValidationFailure
from nanochat_cli.report.reporter import Reporter


def _check(module: str, function: str) -> Callable[[Workspace], Figure]:
    def check(workspace: Workspace) -> Figure:
        return getattr(importlib.import_module(f"nanochat_cli.diagnose.validate.{module}"), function)(workspace)

    return check


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("environment", _check("environment", "environment")),
        Stage("kernels", _check("kernels", "kernels"), all_threads=True, left_out="most sizes of matrices"),
        Stage("hyper-connections", _check("hyper_connections", "hyper_connections")),
        Stage("tokenizer", _check("tokenizer", "tokenizer")),
        Stage("train", _check("training", "train")),
        Stage("resume", _check("training", "resume"), needs=("train",)),
        Stage("export", _check("exporting", "export"), needs=("train",)),
        Stage("gguf", _check("exporting", "gguf"), needs=("export",), left_out="types other than TQ2_0"),
        Stage("packed", _check("exporting", "packed"), needs=("export",)),
        Stage("llama.cpp", _check("exporting", "llama_cpp"), needs=("export",)),
        Stage("generation", _check("generating", "generation"), needs=("train",)),
        Stage("speculative", _check("generating", "speculative"), needs=("train",)),
        Stage("methods", _check("methods", "methods")),
    )
}


def validate(reporter: Reporter, *, quick: bool = False) -> None:
    """Run every stage and report. Raises ValidationFailure at the end, with all failures."""
    with workspace(reporter, quick=quick) as place:
        outcomes = run_stages(tuple(STAGES), place)
    report(outcomes, reporter, quick=quick)
    require_no_failure(outcomes)


@contextmanager
def workspace(reporter: Reporter, *, quick: bool = False) -> Iterator[Workspace]:
    with tempfile.TemporaryDirectory(prefix="nanochat-validate-") as folder:
        yield Workspace(Path(folder), quick, reporter)


def run_stages(names: Sequence[str], place: Workspace) -> list[StageOutcome]:
    """Run these stages, in this order. The stages that they need must be among them, or in `place.passed`."""
    outcomes: list[StageOutcome] = []
    for number, name in enumerate(names, 1):
        place.reporter.info(f"{number}/{len(names)} {name} …")
        outcome = _run(STAGES[name], place)
        if outcome.verdict == "passed":
            place.passed.add(name)
        else:
            place.reporter.info(f"{name}: {outcome.text}" if outcome.verdict != "failed" else f"{name} failed")
        outcomes.append(outcome)
    return outcomes


def _run(stage: Stage, place: Workspace) -> StageOutcome:
    missing = [name for name in stage.needs if name not in place.passed]
    if missing:
        return StageOutcome(stage.name, "not run", 0.0, f"not run: needs {', '.join(missing)}")
    started = time.perf_counter()

    def ended(verdict: str, text: str, figure: Figure | None = None) -> StageOutcome:
        return StageOutcome(stage.name, verdict, time.perf_counter() - started, text, figure)  # pyright: ignore[reportArgumentType]

    try:
        with nullcontext() if stage.all_threads else _one_thread():
            figure = stage.check(place)
    except NotHere as reason:
        return ended("not here", f"not here: {reason}")
    except Interrupted:
        raise
    except NanochatError as failure:
        return ended("failed", str(failure))
    except Exception as fault:  # noqa: BLE001 - a stage that crashes has failed; the others still run
        return ended("failed", f"{type(fault).__name__}: {fault}")
    return ended("passed", figure.text, figure)


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def report(outcomes: Sequence[StageOutcome], reporter: Reporter, *, quick: bool) -> None:
    """A table, and for `--json` a result file with the stages added."""
    from nanochat_cli.report.environment import environment
    from nanochat_cli.report.result_file import Result

    rows = [(o.name, o.verdict, f"{o.seconds:.1f} s", " ".join(o.text.split())) for o in outcomes]
    seconds = sum(outcome.seconds for outcome in outcomes)
    reporter.table(f"{len(outcomes)} stages in {seconds:.0f} s", ("stage", "outcome", "time", "measured"), rows)
    left_out = [f"{stage.name}: {stage.left_out}" for stage in STAGES.values() if stage.left_out]
    if quick:
        reporter.info(f"--quick left out: {'; '.join(left_out)}")
    results = [Result(o.name, "time", o.seconds, "s") for o in outcomes if o.verdict == "passed"]
    results += [Result(o.name, *value) for o in outcomes if o.figure is not None for value in o.figure.values]
    results.append(Result("all stages", "time", seconds, "s"))
    failed = [outcome for outcome in outcomes if outcome.verdict == "failed"]
    reporter.result(
        {
            "suite": "validate",
            "quick": quick,
            "environment": environment(),
            "valid": not failed,
            "failures": [f"{outcome.name}: {outcome.text}" for outcome in failed],
            "stages": [
                {
                    "name": outcome.name,
                    "verdict": outcome.verdict,
                    "seconds": outcome.seconds,
                    "measured": outcome.text,
                    "details": {} if outcome.figure is None else outcome.figure.details,
                }
                for outcome in outcomes
            ],
            "results": [asdict(result) for result in results],
            "claims": [],
        }
    )


def require_no_failure(outcomes: Sequence[StageOutcome]) -> None:
    """Raise ValidationFailure if a stage failed, naming every one and the reason."""
    failed = [f"{outcome.name}: {outcome.text}" for outcome in outcomes if outcome.verdict == "failed"]
    if failed:
        raise ValidationFailure("; ".join(failed))
