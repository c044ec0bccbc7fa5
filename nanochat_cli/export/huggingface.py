"""`nanochat export --hf`: a checkpoint of a run as a Hugging Face folder, verified by transformers, and uploaded.

Knows the order of the steps: values, files, comparison, card, upload. The form of the files is `formats.huggingface`'s.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat_cli import __version__
from nanochat_cli.config.sections.export import ExportConfig
from nanochat_cli.errors import DataError
from nanochat_cli.export import transformers_parity
from nanochat_cli.folders import held_folder
from nanochat_cli.formats.huggingface.architecture import class_of
from nanochat_cli.formats.huggingface.card import CardFacts, write_card
from nanochat_cli.formats.huggingface.files import CARD
from nanochat_cli.formats.huggingface.publish import push_folder
from nanochat_cli.formats.huggingface.tensors import float_twin, stored_values
from nanochat_cli.formats.huggingface.write import FolderReport, write_folder
from nanochat_cli.formats.open import LoadedRun, open_run
from nanochat_cli.formats.run.checkpoints import Which
from nanochat_cli.formats.run.create import provenance
from nanochat_cli.formats.run.origin import read_chat_template, read_origin
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.nesting import parse_json
from nanochat_cli.report.quantities import format_quantity
from nanochat_cli.report.reporter import Reporter
from nanochat_cli.report.run_results import add_results, read_results

GGUF_FILE = "model.gguf"


@dataclass(frozen=True)
class ActivationDifference:
    """What leaving out the rounding of activations to int8 changes in the logits of some prompts.

    top1: share of positions whose most probable token stays the same.
    """

    rms: float
    maximum: float
    top1: float

    def line(self) -> str:
        return (
            f"without the int8 rounding of activations, which transformers does not do, logits differ from the trained "
            f"model's by {self.rms:.2g} (root mean square; at most {self.maximum:.2g}), and {self.top1:.1%} of the "
            "most probable tokens stay the same"
        )


def export_huggingface(
    run: Path, out: Path, export: ExportConfig, which: Which, reporter: Reporter, *, push: str | None = None
) -> None:
    """Write a checkpoint of a run to the folder `out`; verify it unless `export.verify` is off; upload it to `push`.

    A GGUF file that is in the folder is named in its card. Raises ConfigError for a model that no class of transformers
    computes, ValidationFailure if transformers computes another one; then nothing is uploaded.
    """
    loaded = open_run(run, which)
    loaded.require_ternary()
    reporter.info(str(loaded))
    class_of(loaded.model.config)  # refuses what has no class, before anything is written
    with held_folder(out, "writes"):
        values, template = stored_values(loaded.model, export), read_chat_template(run)
        report = write_folder(loaded.model.config, values, loaded.tokenizer, out, template)
        reporter.info(
            f"{out}: {report.kind}, {report.tensors} tensors of {format_quantity(report.bytes, 'B')}, matrices in "
            f"{report.dtype}"
        )
        sections: dict[str, Any] = {"folder": asdict(report)}
        checks: list[str] = []
        if export.verify and not transformers_parity.is_available():
            reporter.info("transformers was not asked: pip install 'nanochat-ternary[hf]' to compare what it computes")
        elif export.verify:
            checks, verified = _verify(loaded, out, float_twin(loaded.model.config, values))
            sections |= verified
        for line in checks:
            reporter.info(line)
        origin_of = provenance(run, loaded.config, loaded.step, reporter)
        facts = _facts(loaded, report, push or out.name, origin_of, checks, chat=template is not None)
        write_card(out, facts)
    if facts.license is None:
        reporter.info(f"the card names no licence: add one to {out / CARD} before you publish it")
    add_results(run, huggingface=sections)
    reporter.result({"run": str(run), "huggingface": sections})
    if push is not None:
        address = push_folder(out, push, f"{run.name}, step {loaded.step}")
        reporter.info(f"uploaded to {address} (a new repository is private)")
        reporter.result({"address": address})


def _verify(loaded: LoadedRun, out: Path, twin: Transformer) -> tuple[list[str], dict[str, Any]]:
    """The lines of the report, and the same as values."""
    compared = transformers_parity.compare_with_transformers(out, twin, loaded.tokenizer)
    lines, values = compared.lines(), {"transformers": asdict(compared)}
    quant = loaded.model.config.quant
    if quant.enabled and quant.activations:
        prompts = transformers_parity.sample_prompts(loaded.tokenizer, loaded.model.config.max_seq_len)
        difference = activation_difference(loaded.model, twin, prompts)
        lines.append(difference.line())
        values["activations"] = asdict(difference)
    return lines, values


@torch.no_grad()
def activation_difference(model: Transformer, twin: Transformer, prompts: list[list[int]]) -> ActivationDifference:
    """Logits of the model against those of its float twin, on all positions of the prompts."""
    tokens = [torch.tensor([prompt]) for prompt in prompts]
    ours, theirs = (torch.cat([one.logits(one(t))[0] for t in tokens]) for one in (model, twin))
    difference = ours - theirs
    same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean()
    return ActivationDifference(float(difference.square().mean().sqrt()), float(difference.abs().max()), float(same))


def _facts(
    loaded: LoadedRun, report: FolderReport, place: str, origin_of: Mapping[str, Any], checks: list[str], *, chat: bool
) -> CardFacts:
    results, origin = read_results(loaded.folder), read_origin(loaded.folder)
    figures = results.get("results", {})
    if figures.get("steps") != loaded.step:  # they are about the end of the training
        figures = {}
    gguf = report.path / GGUF_FILE
    return CardFacts(
        name=loaded.folder.name,
        place=place,
        config=loaded.model.config,
        kind=report.kind,
        version=__version__,
        step=loaded.step,
        weight_bytes=report.bytes,
        dataset=origin_of["dataset"],
        license=None if origin is None else origin.license,
        origin=None if origin is None else origin.name,
        gguf=GGUF_FILE if gguf.is_file() else None,
        gguf_bytes=gguf.stat().st_size if gguf.is_file() else 0,
        chat=chat,
        figures=figures,
        baselines=results.get("baselines") or {} if figures else {},
        suites=_suites(loaded),
        checks=checks,
    )


def _suites(loaded: LoadedRun) -> dict[tuple[str, str], float]:
    """Figures of `nanochat eval --suite` on the same checkpoint, where they are where it puts them."""
    found: dict[tuple[str, str], float] = {}
    for path in sorted(loaded.folder.glob(f"eval/*-step-{loaded.step:06d}/results.json")):
        try:
            results = parse_json(path.read_text(encoding="utf-8"))["results"]
            suite = path.parent.name.rpartition("-step-")[0]
            found |= {(f"{suite}, {one['case']}", one["metric"]): float(one["value"]) for one in results}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is not a result file ({error}); remove it or evaluate again") from error
    return found
