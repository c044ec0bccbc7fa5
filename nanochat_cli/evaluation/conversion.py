"""A converted model beside the one that it was made of, on the same held-out documents.

Bits per byte of each, how often both think the same token the most probable, KL(teacher ‖ model), and the file. The
models are loaded one after the other, beside the teacher.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from nanochat_cli.config.sections.export import ExportConfig
from nanochat_cli.formats.gguf.write import export_gguf
from nanochat_cli.formats.open import LoadedRun, open_run
from nanochat_cli.formats.run.dataset import open_run_data
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.report.quantities import format_quantity
from nanochat_cli.report.reporter import Reporter
from nanochat_cli.report.run_results import add_results
from nanochat_cli.training.bits_per_byte import evaluate
from nanochat_cli.training.chat_data import open_data
from nanochat_cli.training.divergence import token_divergences
from nanochat_cli.training.losses import IGNORE

TEACHER = "teacher"
CHUNK = 512
Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Compared:
    """One model. top1: share of the tokens whose most probable one is the teacher's; divergence: nats per token.

    file_bytes: of its GGUF file, the teacher's in F16.
    """

    bits_per_byte: float
    loss: float
    top1: float
    divergence: float
    file_bytes: int


@torch.no_grad()
def agreement(teacher: Transformer, model: Transformer, batches: Batches) -> tuple[float, float]:
    """Share of positions with the same most probable token, and mean KL(teacher ‖ model) in nats.

    batches: inputs and targets, int64 [B, T]; a target of -100 does not count. Raises ValueError without a target.
    """
    same, divergence, count = 0, 0.0, 0
    for inputs, targets in batches:
        states = [one(inputs).reshape(-1, one.config.dim) for one in (teacher, model)]
        valid = (targets != IGNORE).reshape(-1).nonzero().squeeze(1)
        for places in valid.split(CHUNK):
            told, found = (one.logits(h[places]) for one, h in zip((teacher, model), states, strict=True))
            same += int((told.argmax(-1) == found.argmax(-1)).sum())
            divergence += float(token_divergences(found, told, 1.0, 0)[0].double().sum())
            count += len(places)
    if not count:
        raise ValueError("there are no held-out tokens to compare on")
    return same / count, divergence / count


def compare_with_teacher(teacher: Path, runs: Mapping[str, Path], reporter: Reporter) -> dict[str, Compared]:
    """The teacher and the runs by their names, on the held-out documents of the first; written into its results.json.

    The runs have their GGUF file (`RUN/model.gguf`). Says what it found in a table. Raises DataError.
    """
    first = next(iter(runs.values()))
    source, converted = open_run(teacher), open_run(first)
    data = open_data(open_run_data(first, converted.config, reporter), converted.config)
    source.model.document_end = data.document_end
    most = converted.config.eval.final_max_tokens

    def batches(what: str) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
        def read() -> Iterator[tuple[Tensor, Tensor]]:
            with reporter.progress(what, data.held_out_batches(most), "batches") as progress:
                for batch in data.held_out(most):
                    yield batch
                    progress.advance(1)

        return read

    found = {TEACHER: _compare(source, source.model, batches(TEACHER), data.token_bytes, _size_in_f16(source, first))}
    for name, run in runs.items():
        loaded = converted if run == first else open_run(run)
        loaded.model.document_end = data.document_end
        size = (run / "model.gguf").stat().st_size
        found[name] = _compare(loaded, source.model, batches(name), data.token_bytes, size)
    _report(first, teacher, found, reporter)
    return found


def _compare(
    run: LoadedRun, teacher: Transformer, read: Callable[[], Batches], token_bytes: Tensor, file_bytes: int
) -> Compared:
    held_out = evaluate(run.model, read(), token_bytes)
    top1, divergence = (1.0, 0.0) if run.model is teacher else agreement(teacher, run.model, read())
    return Compared(held_out.bits_per_byte, held_out.loss, top1, divergence, file_bytes)


def _size_in_f16(run: LoadedRun, beside: Path) -> int:
    """Bytes of the GGUF file of a float model, which is written and removed again."""
    with tempfile.TemporaryDirectory(prefix=".teacher-", dir=beside) as folder:
        path = Path(folder, "model.gguf")
        return export_gguf(run.model, run.tokenizer, path, ExportConfig(type="f16", verify=False), {}).bytes


def _report(run: Path, teacher: Path, found: Mapping[str, Compared], reporter: Reporter) -> None:
    columns = (
        "model",
        "held-out bits per byte",
        "most probable token as the teacher's",
        "KL, nats a token",
        "GGUF file",
    )
    rows = [
        (name, one.bits_per_byte, f"{one.top1:.1%}", one.divergence, format_quantity(one.file_bytes, "B"))
        for name, one in found.items()
    ]
    reporter.table("the converted model beside its teacher", columns, rows)
    section = {"teacher": str(teacher), "models": {name: asdict(one) for name, one in found.items()}}
    add_results(run, conversion=section)
    reporter.result({"conversion": section})
