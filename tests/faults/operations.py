"""What is swept: six kinds of work that save something, each on a folder that already holds something.

An operation does its work again from the same folder, so that its files are the same bits each time; models and data
are tiny, and what only measures or draws is left out.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from nanochat_cli.atomic_write import write_atomically
from nanochat_cli.bench.matched import suite
from nanochat_cli.bench.matched.measures import RunOutcome
from nanochat_cli.bench.matched.plan import plan_ab
from nanochat_cli.bench.matched.report import comparison
from nanochat_cli.bench.matched.run_record import FINISHED
from nanochat_cli.bench.matched.suite_runs import Place
from nanochat_cli.config.load import CONFIG_FILE, config_to_toml
from nanochat_cli.config.schema import Config, ExportConfig
from nanochat_cli.data.shards import STAGED, ShardReader
from nanochat_cli.engine import Engine
from nanochat_cli.errors import DataError
from nanochat_cli.export.huggingface import export_huggingface
from nanochat_cli.formats.huggingface.files import CONFIG_JSON
from nanochat_cli.formats.run import checkpoints, create
from nanochat_cli.formats.run.dataset import record_of
from nanochat_cli.report.metrics_log import MetricsLog
from nanochat_cli.report.reporter import QuietReporter
from nanochat_cli.rl.experience import Experience, ExperienceLibrary
from nanochat_cli.training import trainer as training
from nanochat_cli.training.shard_data import ShardData
from nanochat_cli.training.trainer import Trainer
from tests.bench.matched.suites import read_suite
from tests.data.corpora import make_config, write_folder

ENVIRONMENT = {"date": "2026-11-28", "git": {"commit": "c", "dirty": False}, "device": "a machine"}
SHAPE = {"dim": 64, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "ffn_dim": 256, "max_seq_len": 32, "vocab_size": 400}


@dataclass(frozen=True)
class Operation:
    """folder: holds what was saved before `act`. intact: raises if what is there after a fault is not whole."""

    name: str
    folder: Path
    act: Callable[[], None]
    intact: Callable[[], None] = field(default=lambda: None)
    may_miss: frozenset[str] = frozenset()
    """Names that `intact` answers for while they are missing."""
    grows: frozenset[str] = frozenset()
    """Names that have other contents, which `intact` checks, on the way to the last."""


def operations(work: Path) -> list[Operation]:
    """All of them, ready to be repeated, in folders of `work`."""
    write_folder(work / "corpus", 24)
    config = make_config(
        run={"dir": str(work), "name": "run"},
        model=SHAPE,
        train={"total_steps": 4, "batch_size": 2, "seq_len": 32, "compile": "off", "device": "cpu", "log_interval": 1},
        checkpoint={"interval": 2, "keep_last": 1},
        telemetry={"tensorboard": False},
        bigram_init={"steps": 0},
    )
    engine = Engine(QuietReporter())
    engine.tokenize(str(work / "corpus"), work / "data", config)
    trainer = _trained(work, config)
    shutil.copytree(work / "run", work / "exported")
    return [
        _checkpoint(work, trainer),
        _new_run(work, config),
        _data_set(work, engine, config),
        _gguf(work, engine),
        _folder(work),
        *_library(work),
        _suite(work, "suite from its beginning"),
        _suite(work, "suite continued", begun=True),
    ]


def _trained(work: Path, config: Config) -> Trainer:
    reader = ShardReader(work / "data")
    with mock.patch.object(create, "environment", return_value=ENVIRONMENT):
        create.create_run(work / "run", config, reader.tokenizer, record_of(reader))
    with mock.patch.object(training, "measured_peak", return_value=1e9):
        trainer = Trainer(config, ShardData(reader, config), work / "run", QuietReporter())
    trainer.fit()
    trainer.log = MetricsLog(work / "run", tensorboard=False, resumed_step=4)
    return trainer


def _checkpoint(work: Path, trainer: Trainer) -> Operation:
    """A step is saved, replaced by itself as the best one, and the step before it removed."""
    run = work / "run"
    shutil.rmtree(run / "checkpoints")
    model = trainer.config.model.model_dump(mode="json")
    checkpoints.save(run, 2, {"model": trainer.state.model.state_dict()}, {"before": True}, model_config=model)
    trainer.progress.best_step = 4

    def act() -> None:
        trainer.save()
        trainer.save(best=True)

    def intact() -> None:
        found = checkpoints.load(run)
        assert found.step == 4 or found.state == {"before": True}, "the pointer names another checkpoint"

    return Operation("checkpoint", run, act, intact)


def _new_run(work: Path, config: Config) -> Operation:
    """Everything that a run has before its first step."""
    reader = ShardReader(work / "data")
    folder = work / "new"
    folder.mkdir()

    def act() -> None:
        with mock.patch.object(create, "environment", return_value=ENVIRONMENT):
            create.create_run(folder, config, reader.tokenizer, record_of(reader))

    return Operation("beginning of a run", folder, act)


def _data_set(work: Path, engine: Engine, config: Config) -> Operation:
    """A data set is replaced by another one in its folder."""
    out, other = work / "tokenized", config.model_copy(deep=True)
    engine.tokenize(str(work / "corpus"), out, config)
    other.model.vocab_size = 420

    def act() -> None:
        engine.tokenize(str(work / "corpus"), out, other)

    def intact() -> None:
        try:
            assert ShardReader(out, verify="full").tokenizer.vocab_size in (400, 420)
        except DataError:
            assert (out / STAGED / "manifest.json").is_file(), "neither the old data set nor the new one"

    return Operation("tokenize", out, act, intact, frozenset({"manifest.json"}))


def _gguf(work: Path, engine: Engine) -> Operation:
    """The file of a run is replaced by one of another type."""
    run = work / "exported"
    engine.export(run, run / "model.gguf", ExportConfig(type="f16", verify=False))

    def act() -> None:
        engine.export(run, run / "model.gguf", ExportConfig(type="q2_0", verify=False))

    return Operation("export --gguf", run, act)


def _folder(work: Path) -> Operation:
    """A Hugging Face folder is replaced by one of another type."""
    run, out = work / "hf-run", work / "hf-run" / "hf"
    shutil.copytree(work / "exported", run)
    export_huggingface(run, out, ExportConfig(type="f16", verify=False), "latest", QuietReporter())
    old = {path.name: path.read_bytes() for path in out.iterdir()}

    def act() -> None:
        export_huggingface(run, out, ExportConfig(type="f32", verify=False), "latest", QuietReporter())

    def intact() -> None:
        if (out / CONFIG_JSON).is_file():  # without it the folder is no model
            same = {name for name in old if (out / name).is_file() and (out / name).read_bytes() == old[name]}
            both = {"config.json", "model.safetensors"}
            assert both <= same or not both & same, "the configuration of one export and the weights of another"

    return Operation("export --hf", run, act, intact, frozenset({CONFIG_JSON, "README.md"}))


def _library(work: Path) -> Iterator[Operation]:
    """Answers are added, all of a group or none; and the library is pruned."""
    folder = work / "library"
    path = folder / "experiences.jsonl"
    kept = [Experience(f"prompt {n}", "x" * 100 * n, 1.0, n / 8, 10.0) for n in range(8)]
    ExperienceLibrary(path).add(kept)
    added = [Experience("another prompt", "y" * 3000, 1.0, 0.5, 11.0)] * 4
    yield Operation("experience library: add", folder, lambda: ExperienceLibrary(path).add(added))
    pruned = work / "pruned"
    shutil.copytree(folder, pruned)

    def prune() -> None:
        ExperienceLibrary(pruned / path.name).prune(max_size=3)

    yield Operation("experience library: prune", pruned, prune)


def _suite(work: Path, name: str, *, begun: bool = False) -> Operation:
    """`bench ab`: two runs, which here only leave what real ones would."""
    folder = work / name.replace(" ", "-")
    folder.mkdir()
    given = ["train.time_budget=none", f"data.path={work / 'data'}", "model.vocab_size=400"]
    plan = plan_ab(
        base=["quickstart"], vary=["optim.muon_momentum=0.8"], overrides=(), seeds=1, match="steps", given=given
    )

    def act() -> None:
        with _made_up_runs():
            if (folder / "suite.json").exists():
                suite.resume_suite(folder, QuietReporter())
            else:
                suite.begin_suite(plan, folder, QuietReporter())

    def intact() -> None:
        if (folder / "report.json").exists():
            assert len(read_suite(folder).runs) in (1, 2)

    if begun:
        act()
        next((folder / "outcomes").glob("optim*")).unlink()
    return Operation(name, folder, act, intact, grows=frozenset({"report.json"}))


def _run(place: Place, config: Config, *_: object) -> RunOutcome:
    """A run of four steps."""
    place.prepare(config)
    run = config.run.dir / str(config.run.name)
    run.mkdir(parents=True, exist_ok=True)
    step = {"loss/main": 2.0, "training/skipped": 0, "throughput/step_ms": 9.0, "throughput/data_wait_ms": 1.0}
    lines = [{"step": n, "tokens": 100 * n, "seconds": float(n), **step} for n in range(1, 5)]
    lines.append({"step": 4, "tokens": 400, "seconds": 4.0, "final/bits_per_byte": 2.5, "final/loss": 2.0})
    write_atomically(run / CONFIG_FILE, config_to_toml(config).encode())
    write_atomically(run / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    outcome = RunOutcome(FINISHED, parameters=1000)
    place.record(outcome)
    return outcome


@contextmanager
def _made_up_runs() -> Iterator[None]:
    with (
        mock.patch.object(suite, "run_in_process", _run),
        mock.patch.object(suite, "environment", return_value=ENVIRONMENT),
        mock.patch.object(comparison, "write_comparison", return_value=[]),
        mock.patch.object(comparison, "show_comparison"),
    ):
        yield
