"""Stage `kernels`: reference, CPU kernels, Triton and llama.cpp compute the same products (see `three_way_parity`)."""

from nanochat_cli.diagnose.validate import three_way_parity
from nanochat_cli.diagnose.validate.stage import Figure, NotHere, Value, Workspace


def kernels(workspace: Workspace) -> Figure:
    """Integers are equal, floats within 1e-5 of the summed magnitudes; a corner that cannot run here is named."""
    cases = three_way_parity.fewest_cases() if workspace.quick else three_way_parity.quick_cases()
    corners = three_way_parity.run_corners(cases, workspace.reporter)
    for corner in corners.values():
        for reason, what in corner.unsupported.items():
            workspace.reporter.warn(f"kernels: {corner.name} has no {', '.join(sorted(what))} here: {reason}")
    three_way_parity.require_equal(corners.values(), required=())
    there = [corner for corner in corners.values() if corner.comparisons]
    if not there:
        raise NotHere("neither a C compiler nor Triton nor llama.cpp: nothing to compare with the reference")
    text = ", ".join(f"{corner.name} ({corner.form}) {corner.comparisons}" for corner in there)
    return Figure(
        f"comparisons with the reference, all equal: {text}",
        [Value(f"comparisons, {corner.name}", corner.comparisons, "comparisons") for corner in corners.values()],
        {
            corner.name: {
                "form": corner.form,
                "cases": corner.cases,
                "comparisons": corner.comparisons,
                "verdict": corner.verdict,
                "unsupported": {reason: sorted(what) for reason, what in corner.unsupported.items()},
            }
            for corner in corners.values()
        },
    )
