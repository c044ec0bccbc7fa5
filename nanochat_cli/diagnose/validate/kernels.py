"""Stage `kernels`: reference, CPU kernels, Triton and llama.cpp compute the same products (see `triangle`)."""

from nanochat_cli.diagnose.validate import triangle
from nanochat_cli.diagnose.validate.stage import Figure, NotHere, Value, Workspace


def kernels(workspace: Workspace) -> Figure:
    """Integers bit for bit, floats within 1e-5 of what was summed; a corner that cannot run here is named."""
    cases = triangle.fewest_cases() if workspace.quick else triangle.quick_cases()
    corners = triangle.run_triangle(cases, workspace.reporter)
    for corner in corners.values():
        for reason, what in corner.unsupported.items():
            workspace.reporter.warn(f"kernels: {corner.name} has no {', '.join(sorted(what))} here: {reason}")
    triangle.require_equal(corners.values(), required=())
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
