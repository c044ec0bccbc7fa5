"""`nanochat validate`: the stages of it, each a check that ends in equality or in a ValidationFailure.

One stage so far: the kernels against their definition and against llama.cpp. Every stage reports before any fails the
whole, so that one run tells everything.
"""

from collections.abc import Callable

from nanochat_cli.errors import ValidationFailure
from nanochat_cli.report.reporter import Reporter


def validate(reporter: Reporter) -> None:
    """Run every stage. Raises ValidationFailure, after the last, with the failures of all."""
    failures: list[str] = []
    for stage in STAGES.values():
        try:
            stage(reporter)
        except ValidationFailure as failure:
            failures.append(str(failure))
    verdicts = {"valid": not failures, "failures": failures}
    reporter.result(verdicts)
    if failures:
        raise ValidationFailure("; ".join(failures))


def kernels(reporter: Reporter) -> None:
    """Reference, CPU kernels, Triton and llama.cpp on the quick cases of the triangle."""
    from nanochat_cli.validation.triangle import quick_cases, require_equal, run_triangle

    corners = run_triangle(quick_cases(), reporter)
    columns = ("corner", "form", "cases", "comparisons", "against the reference")
    rows = [(c.name, c.form, c.cases, c.comparisons, c.verdict) for c in corners.values()]
    reporter.table("kernels: integers bit for bit, floats within 1e-5", columns, rows)
    for corner in corners.values():
        for reason, what in corner.unsupported.items():
            reporter.warn(f"kernels: {corner.name} has no {', '.join(sorted(what))} here: {reason}")
    reporter.result(
        {
            "kernels": {
                corner.name: {
                    "form": corner.form,
                    "cases": corner.cases,
                    "comparisons": corner.comparisons,
                    "verdict": corner.verdict,
                    "differences": corner.differences,
                    "unsupported": {reason: sorted(what) for reason, what in corner.unsupported.items()},
                }
                for corner in corners.values()
            }
        }
    )
    require_equal(corners.values(), required=())


STAGES: dict[str, Callable[[Reporter], None]] = {"kernels": kernels}
