"""`nanochat import`: a model of another program as a run, once it has been shown to compute the same.

Knows the order of the steps; `formats.huggingface.read` and `formats.gguf.read` read, and refuse by name what our model
cannot compute. The run has one checkpoint, of step 0, with float weights.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanochat_cli.config.schema import Config
from nanochat_cli.config.sections.export import ExportConfig
from nanochat_cli.config.sections.run import RunConfig
from nanochat_cli.config.sections.train import TrainConfig
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.export import llama_cpp, transformers_parity
from nanochat_cli.export.import_parity import compare_with_llama_cpp
from nanochat_cli.formats.gguf.file import GGUFFile
from nanochat_cli.formats.gguf.float_copy import write_float_copy
from nanochat_cli.formats.gguf.read import load_float_gguf
from nanochat_cli.formats.gguf.tokenizer_metadata import chat_template_of
from nanochat_cli.formats.gguf.write import export_gguf
from nanochat_cli.formats.huggingface.read import read_folder
from nanochat_cli.formats.run import checkpoints
from nanochat_cli.formats.run.create import create_run
from nanochat_cli.formats.run.find import new_run
from nanochat_cli.formats.run.origin import Origin, write_origin
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.report.reporter import Reporter
from nanochat_cli.report.run_results import add_results


@dataclass(frozen=True)
class Imported:
    """A model from elsewhere, in float32 on the CPU, with what belongs to it."""

    model: Transformer
    tokenizer: Tokenizer
    chat_template: str | None
    origin: Origin


def import_model(source: Path, run: RunConfig, reporter: Reporter, *, verify: bool = True) -> Path:
    """Make a run of a Hugging Face folder or a GGUF file; returns its folder.

    Raises DataError for what our model cannot compute, ConfigError if the run exists, ValidationFailure if llama.cpp or
    transformers, where they are installed, compute something else; then nothing is written.
    """
    imported = read_gguf(source) if source.is_file() else read_huggingface(source)
    total = imported.model.config.count_parameters().total
    reporter.info(f"{source}: {imported.origin.format}, {imported.origin.name}, {total:,} parameters")
    if missing := imported.tokenizer.missing_bytes:
        shown = ", ".join(f"0x{byte:02x}" for byte in missing[:4])
        reporter.warn(f"its vocabulary lacks {len(missing)} of the 256 bytes ({shown} …): text loses them")
    with new_run(run, "import", "imports") as folder:
        checks = list(_verified(source, imported, folder, reporter)) if verify else []
        for check in checks:
            for line in check.lines():
                reporter.info(line)
        config = _config(imported.model, run)
        create_run(folder, config, imported.tokenizer, None)
        write_origin(folder, imported.origin, imported.chat_template)
        described = config.model.model_dump(mode="json")
        checkpoints.save(folder, 0, {"model": imported.model.state_dict()}, {}, model_config=described)
        verification = {type(check).__name__: asdict(check) for check in checks}
        add_results(folder, verification=verification)
    reporter.info(f"next: nanochat generate {folder} -p ''   or: nanochat export {folder} --hf")
    reporter.result({"run": str(folder), "origin": asdict(imported.origin), "verification": verification})
    return folder


def read_huggingface(folder: Path) -> Imported:
    """Raises DataError."""
    content = read_folder(folder)
    origin = Origin(folder.resolve().name, "Hugging Face folder", str(folder.absolute()), content.license)
    return Imported(content.model, content.tokenizer, content.chat_template, origin)


def read_gguf(path: Path) -> Imported:
    """Raises DataError, also for a file that is ternary already: as floats it would compute something else."""
    model, tokenizer = load_float_gguf(path)
    fields = GGUFFile(path).fields
    name, license_name = (fields.get(f"general.{key}") for key in ("name", "license"))
    origin = Origin(
        str(name or path.stem), "GGUF file", str(path.absolute()), None if license_name is None else str(license_name)
    )
    return Imported(model, tokenizer, chat_template_of(fields), origin)


def _config(model: Transformer, run: RunConfig) -> Config:
    """The configuration of the run: the model in float, and its own tokenizer for data sets."""
    assert run.name is not None
    context = model.config.max_seq_len
    return Config.model_validate(
        {
            "run": run.model_dump(),
            "model": {**model.config.model_dump(), "quant": {"enabled": False}},
            "train": {"seq_len": min(TrainConfig().seq_len, context)},
            "tokenizer": {"path": Path(run.name, "tokenizer.json")},  # found beside the run, wherever that is
        }
    )


def _verified(source: Path, imported: Imported, folder: Path, reporter: Reporter) -> Iterator[Any]:
    """Comparisons that succeeded; says how to get those that cannot be made here. Raises ValidationFailure."""
    model, tokenizer = imported.model, imported.tokenizer
    if source.is_dir():
        if transformers_parity.is_available():
            yield transformers_parity.compare_with_transformers(source, model, tokenizer)
        else:
            reporter.info("transformers was not asked: pip install 'nanochat-ternary[hf]' to compare what it computes")
    if llama_cpp.is_available():
        with _float_file(source, imported, folder) as path:
            yield compare_with_llama_cpp(path, model, tokenizer, str(source))
    else:
        reporter.info("llama.cpp was not asked: pip install 'nanochat-ternary[llama-cpp]' to compare what it computes")


@contextmanager
def _float_file(source: Path, imported: Imported, folder: Path) -> Iterator[Path]:
    """A GGUF file of float32 to compare with: a copy of the source, or what we make of a Hugging Face folder."""
    with tempfile.TemporaryDirectory(prefix=".import-", dir=folder) as temporary:
        path = Path(temporary, "model.gguf")
        if source.is_file():
            write_float_copy(source, path)
        else:
            settings = ExportConfig(type="f32", head="f32")
            export_gguf(imported.model, imported.tokenizer, path, settings, {}, imported.chat_template)
        yield path
