"""One run of a suite in a separate process: `python -m nanochat_cli.bench.matched.suite_child CONFIG OUTCOME`.

Trains, or continues, the run that CONFIG (a resolved TOML file) describes, exports it to learn the size of its GGUF
file, and writes OUTCOME: how it ended, and what only this process can know. It dies with its parent, so that a killed
suite leaves no process behind that still writes into its runs.
"""

import json
import os
import sys
import traceback
from dataclasses import asdict
from pathlib import Path

from nanochat_cli.atomic_write import write_atomically
from nanochat_cli.bench.matched.measures import RunOutcome
from nanochat_cli.bench.matched.run_record import DIVERGED, FAILED, FINISHED, INTERRUPTED, OUT_OF_MEMORY
from nanochat_cli.bench.peak_memory import peak_memory
from nanochat_cli.config.load import CONFIG_FILE, resolve_config
from nanochat_cli.config.schema import Config, OptimConfig
from nanochat_cli.end_with_parent import end_with_parent
from nanochat_cli.engine import GGUF_FILE, Engine
from nanochat_cli.errors import DataError, Diverged, Interrupted, NanochatError, reason
from nanochat_cli.nesting import parse_json
from nanochat_cli.report.reporter import PlainReporter

PARENT = "NANOCHAT_SUITE_PARENT"


def main(config_file: Path, outcome_file: Path) -> int:
    """Returns the exit code. Any error goes into the outcome, and its traceback to standard error."""
    if (parent := os.environ.get(PARENT)) is not None:
        end_with_parent(int(parent))
    try:
        outcome = _train(resolve_config(file=config_file))
    except Interrupted:
        outcome = RunOutcome(INTERRUPTED, "stopped, with everything saved")
    except Diverged as error:
        outcome = RunOutcome(DIVERGED, str(error))
    except Exception as error:  # noqa: BLE001 - a run that fails is a row of the report; the traceback is in its log
        traceback.print_exc()
        outcome = RunOutcome(OUT_OF_MEMORY if _is_out_of_memory(error) else FAILED, _one_line(error))
    write_outcome(outcome_file, outcome)
    return 0 if outcome.status == FINISHED else 1


def write_outcome(path: Path, outcome: RunOutcome) -> None:
    write_atomically(path, (json.dumps(asdict(outcome), indent=1, ensure_ascii=False) + "\n").encode())


def read_outcome(path: Path) -> RunOutcome | None:
    """None if there is none. Raises DataError for a file in another form."""
    try:
        return RunOutcome(**parse_json(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not the outcome of a run ({reason(error)}); remove it to run that again") from error


def _train(config: Config) -> RunOutcome:
    import nanochat_cli.training.trainer  # noqa: F401 - so that the run's memory does not include importing

    run = config.run.dir / str(config.run.name)
    engine = Engine(PlainReporter())
    before = peak_memory()
    result = engine.fit(config, run if (run / CONFIG_FILE).is_file() else None)
    peak = _peak_on_device()
    return RunOutcome(
        FINISHED,
        parameters=result.parameters,
        optimizer_state_bytes=result.optimizer_bytes,
        adamw_state_bytes=adamw_state_bytes(config),
        peak_memory_bytes=peak if peak is not None else peak_memory() - before,
        gguf_bytes=_gguf_bytes(engine, config, run),
    )


def adamw_state_bytes(config: Config) -> int:
    """Bytes of AdamW's state in float32 for every parameter of the run, counted from its tensors."""
    import torch

    from nanochat_cli.model.mtp import build_mtp
    from nanochat_cli.model.transformer import Transformer
    from nanochat_cli.optim import build_optimizer

    with torch.device("meta"):
        model, mtp = Transformer(config.model), build_mtp(config.model, config.mtp)
    beside = {} if mtp is None else {"mtp": mtp}
    return build_optimizer(model, OptimConfig(matrix="adamw", other="adamw"), beside).state_bytes()


def _peak_on_device() -> int | None:
    """Peak bytes that torch allocated on the GPU; None if the run did not use one."""
    import torch

    allocated = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return allocated or None


def _gguf_bytes(engine: Engine, config: Config, run: Path) -> int | None:
    """Size of a temporary export; None, with the reason in the log, for a model that cannot be exported."""
    file = run / GGUF_FILE
    try:
        engine.export(run, file, config.export.model_copy(update={"verify": False}))
        return file.stat().st_size
    except NanochatError as error:
        engine.reporter.warn(f"no GGUF file: {error}")
        return None
    finally:
        file.unlink(missing_ok=True)


def _is_out_of_memory(error: BaseException) -> bool:
    """Also true of the trainer's own error after it has tried every smaller micro-batch."""
    from nanochat_cli.training.update import is_out_of_memory

    cause = error.__cause__
    return is_out_of_memory(error) or (cause is not None and is_out_of_memory(cause))


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, NanochatError) else f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
