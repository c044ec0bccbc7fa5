"""`nanochat convert`: make a ternary model of a float one, with that as its teacher, and compare the two."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nanochat_cli.cli.import_model import require_importable
from nanochat_cli.cli.options import Overrides, Presets
from nanochat_cli.cli.session import Session, session_of
from nanochat_cli.errors import ConfigError, DataError

if TYPE_CHECKING:
    from nanochat_cli.config.schema import Config

app = typer.Typer(add_completion=False)
OVERLAY = "convert"
GGUF_FILE = "model.gguf"
TIED_LR = 0.003
"""Of a matrix that is both embedding and head, from random weights: that of the overlay `bitnet`."""


@app.command()
def convert(
    ctx: typer.Context,
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="A float run, a Hugging Face folder, or a .gguf file."),
    ],
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="A data set of the model's tokenizer, or any source of text.")
    ] = None,
    preset: Presets = [],  # noqa: B006 - Typer copies it
    overrides: Overrides = [],  # noqa: B006
    out: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Folder of the new run; default: runs/MODEL-ternary.")
    ] = None,
    scratch: Annotated[
        bool, typer.Option("--scratch", help="Also train the same model from random weights, on as many tokens.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the conversion in --out, and compare.")] = False,
) -> None:
    """Make a ternary model of a float one: same architecture, its weights, over a ramp, with itself as the teacher.

    Short for nanochat import, nanochat train --preset convert --set train.init=RUN --set distill.teacher=init, and
    nanochat export. The end is a comparison of both on the held-out documents, in results.json too.
    """
    session = session_of(ctx)
    out = out or Path("runs", f"{(model.stem if model.is_file() else model.resolve().name)}-ternary")
    _require_architecture_of_model(overrides)
    if resume:
        teacher, runs = _resume(session, out, overrides, scratch=scratch)
    else:
        teacher, runs = _begin(session, model, data, preset, overrides, out, scratch=scratch)
    from nanochat_cli.atomic_write import write_atomically
    from nanochat_cli.evaluation.conversion import compare_with_teacher
    from nanochat_cli.formats.run.origin import CHAT_TEMPLATE_FILE

    for run in runs.values():
        if (teacher / CHAT_TEMPLATE_FILE).is_file():
            write_atomically(run / CHAT_TEMPLATE_FILE, (teacher / CHAT_TEMPLATE_FILE).read_bytes())
        config = _config_of(run)
        session.engine.export(run, run / GGUF_FILE, config.export)
    compare_with_teacher(teacher, runs, session.reporter)
    session.reporter.info(f"next: nanochat generate {out} -p ''   or: nanochat serve {out / GGUF_FILE}")
    session.reporter.result({"run": str(out), "teacher": str(teacher)})


def _begin(
    session: Session,
    model: Path,
    data: str | None,
    preset: list[str],
    overrides: list[str],
    out: Path,
    *,
    scratch: bool,
) -> tuple[Path, dict[str, Path]]:
    """Import, if need be, and train; the teacher, and the runs that were trained by their names."""
    from nanochat_cli.cli.train import require_startable
    from nanochat_cli.config.load import resolve_config

    where = _data_key(data)
    twin = out.with_name(f"{out.name}-scratch")
    for run in (out, twin) if scratch else (out,):
        _require_free(run)
    resolve_config([OVERLAY, *preset], None, overrides)  # an error of it comes at once
    teacher = _teacher(session, model, out)
    options: dict[str, dict[str, object]] = {str(teacher): _architecture(teacher), "--data": {where: data}}
    if where == "data.source":
        options["--data"]["tokenizer.path"] = str((teacher / "tokenizer.json").absolute())
    trained = {"distill.teacher": "init", "train.init": str(teacher.absolute())}
    named = {run: {"run.dir": str(run.parent), "run.name": run.name} for run in (out, twin)}
    own = {**options, "nanochat convert": trained, "--out": named[out]}
    config = resolve_config([OVERLAY, *preset], None, overrides, own, session.reporter.warn)
    require_startable(config, out.name)
    runs = {"converted": session.engine.train(config, None)}
    if scratch:
        own = {**options, "--scratch": _random_start(config, overrides), "--out": named[twin]}
        runs["from scratch"] = session.engine.train(resolve_config(preset, None, overrides, own), None)
    return teacher, runs


def _random_start(config: "Config", overrides: list[str]) -> dict[str, object]:
    """Keys of the run from random weights, where it is not the default recipe that suits them."""
    keys: dict[str, object] = {"model.quant.start": 0.0, "model.quant.ramp": 0.0}
    given = {text.partition("=")[0].strip() for text in overrides}
    if config.model.tie_embeddings and "optim.embedding_lr" not in given:
        keys["optim.embedding_lr"] = TIED_LR
    return keys


def _resume(session: Session, out: Path, overrides: list[str], *, scratch: bool) -> tuple[Path, dict[str, Path]]:
    from nanochat_cli.config.load import run_config
    from nanochat_cli.formats.run.find import find_run

    run = find_run(out)
    config = run_config(run, overrides, warn=session.reporter.warn)
    if config.train.init is None:
        raise ConfigError(f"{run}: not a conversion (it has no train.init); continue it with: nanochat train --resume")
    runs, twin = {"converted": run}, run.with_name(f"{run.name}-scratch")
    has_twin = (twin / "checkpoints" / "latest").is_file()
    if scratch and not has_twin:
        raise ConfigError(f"--scratch: {twin} was not begun, and --resume begins nothing; leave it out")
    session.engine.train(config, run)
    if has_twin:
        session.engine.train(run_config(twin), twin)
        runs["from scratch"] = twin
    return config.train.init, runs


def _teacher(session: Session, model: Path, out: Path) -> Path:
    """The run of the float model: MODEL itself, or what it was or now is imported as."""
    from nanochat_cli.config.load import CONFIG_FILE
    from nanochat_cli.config.sections.run import RunConfig
    from nanochat_cli.formats.run.find import DEFAULT_FOLDER, require_writable
    from nanochat_cli.formats.run.origin import read_origin

    for run in (model, DEFAULT_FOLDER / model):
        if (run / CONFIG_FILE).is_file():
            if _config_of(run).model.quant.enabled:
                raise ConfigError(f"{run} is ternary: train it further with nanochat train --set train.init={run}")
            return run
    teacher = out.with_name(f"{out.name}-teacher")
    require_importable(model)
    if (teacher / CONFIG_FILE).exists():
        origin = read_origin(teacher)
        if origin is None or Path(origin.location) != model.absolute():
            raise ConfigError(f"{teacher}: is no import of {model}, which would take its place; choose another --out")
        session.reporter.info(f"{teacher}: {model} was imported before")
        return teacher
    require_writable(teacher)
    from nanochat_cli.export.import_model import import_model

    return import_model(model, RunConfig(dir=teacher.parent, name=teacher.name), session.reporter)


def _architecture(teacher: Path) -> dict[str, object]:
    """The keys of [model] that the student has from its teacher, beside those that are as by default."""
    from nanochat_cli.config.effects import value_of
    from nanochat_cli.config.keys import leaves
    from nanochat_cli.config.schema import Config

    config, default = _config_of(teacher), Config()
    keys = [key for key in leaves() if key.startswith("model.") and not key.startswith("model.quant.")]
    return {key: value for key in keys if (value := value_of(config, key)) != value_of(default, key)}


def _data_key(data: str | None) -> str:
    """The key that stands for --data. Raises ConfigError, DataError."""
    if data is None:
        raise ConfigError("--data: what the model is trained on, a data set or a source of text, must be named")
    if Path(data, "manifest.json").is_file():
        return "data.path"
    if not (Path(data).exists() or ":" in data or data == "stdlib"):
        raise DataError(f"--data {data}: no such data set, folder or file")
    return "data.source"


def _config_of(run: Path) -> "Config":
    from nanochat_cli.config.load import load_run_config

    return load_run_config(run)


def _require_free(run: Path) -> None:
    from nanochat_cli.config.sections.run import RunConfig
    from nanochat_cli.formats.run.find import require_free, require_writable

    require_free(RunConfig(dir=run.parent, name=run.name))
    require_writable(run)


def _require_architecture_of_model(overrides: list[str]) -> None:
    """Raise ConfigError for a key that would make the student another model than its teacher."""
    for text in overrides:
        key = text.partition("=")[0].strip()
        if key.startswith("model.") and not key.startswith("model.quant."):
            raise ConfigError(f"--set {text}: the converted model has the architecture of its teacher; leave it out")
