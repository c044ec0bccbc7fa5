"""The forms of a linear layer's product, forward and backward, against a float twin in bf16.

`python benchmarks/bitlinear_forms.py --from FILE` puts the rows into the table that `choose_form` reads.
"""

import time

from benchmarks.bitlinear_forms import FORMS, LOW_PRECISION, measure
from benchmarks.gpu_sections.task import NO_FP8, Task

SHAPES = ((768, 2816), (2816, 768), (768, 768), (2048, 5632), (2048, 2048), (5632, 2048))
"""Inputs and outputs: feed-forward and attention of 125 million parameters, then of one billion."""
ROWS, ROUNDS = 32768, 9
MARGIN = 1.3
"""A shape may take this many times as long as the slowest before it: each compiles every form."""


def run(task: Task) -> None:
    shapes, rows, rounds = (((128, 256),), 64, 1) if task.quick else (SHAPES, ROWS, ROUNDS)
    slowest, low_precision = 0.0, dict(LOW_PRECISION)
    for name in [name for name in low_precision if "fp8" in name and not task.has_fp8]:
        task.leave_out(name, NO_FP8)
        del low_precision[name]
    for shape in shapes:
        if task.left() < MARGIN * slowest:
            task.leave_out(f"{shape[0]} inputs, {shape[1]} outputs", f"the slowest before it took {slowest:.0f} s")
            continue
        started = time.monotonic()
        for forms in ({**FORMS, **low_precision}, FORMS):  # the second if the first fails
            before = len(task.results)
            with task.attempt(f"{shape[0]} inputs, {shape[1]} outputs, {', '.join(forms)}"):
                task.add(measure(shape, rows, rounds, task.device, forms))
            if len(task.results) > before:
                break
        slowest = max(slowest, time.monotonic() - started)
