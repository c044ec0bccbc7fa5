"""One run of a suite in a process of its own: `python -m nanochat_cli.bench.matched.suite_child CONFIG OUTCOME`.

Trains, or continues, the run that CONFIG (a resolved TOML file) describes, exports it to know the size of its GGUF
file, and writes OUTCOME: how it ended, and what only this process can know. It dies with its parent, so that a suite
that was killed leaves nobody behind who writes into its runs.
"""

import ctypes
import json
import os
import signal
import sys
import traceback
from dataclasses import asdict
from pathlib import Path

from nanochat_cli.bench.matched.measures import Outcome
from nanochat_cli.bench.matched.records import DIVERGED, FAILED, FINISHED, INTERRUPTED, OUT_OF_MEMORY
from nanochat_cli.bench.peak_memory import peak_memory
from nanochat_cli.config.load import CONFIG_FILE, resolve_config
from nanochat_cli.config.schema import Config, OptimConfig
from nanochat_cli.durable import write_atomically
from nanochat_cli.engine import GGUF_FILE, Engine
from nanochat_cli.errors import Diverged, Interrupted, NanochatError
from nanochat_cli.nesting import parse_json
from nanochat_cli.report.reporter import PlainReporter

PARENT = "NANOCHAT_SUITE_PARENT"
_PR_SET_PDEATHSIG = 1


def main(config_file: Path, outcome_file: Path) -> int:
    """Returns the exit code; whatever went wrong is in the outcome, and its traceback on standard error."""
    _die_with_parent()
    try:
        outcome = _train(resolve_config(file=config_file))
    except Interrupted:
        outcome = Outcome(INTERRUPTED, "stopped, with everything saved")
    except Diverged as error:
        outcome = Outcome(DIVERGED, str(error))
    except Exception as error:  # noqa: BLE001 - a run that fails is a row of the report; the traceback is in its log
        traceback.print_exc()
        outcome = Outcome(OUT_OF_MEMORY if _is_out_of_memory(error) else FAILED, _one_line(error))
    write_outcome(outcome_file, outcome)
    return 0 if outcome.status == FINISHED else 1


def write_outcome(path: Path, outcome: Outcome) -> None:
    """Whole or not at all."""
    write_atomically(path, (json.dumps(asdict(outcome), indent=1, ensure_ascii=False) + "\n").encode())


def read_outcome(path: Path) -> Outcome | None:
    """None when there is none."""
    return Outcome(**parse_json(path.read_text(encoding="utf-8"))) if path.is_file() else None


def _train(config: Config) -> Outcome:
    import nanochat_cli.training.trainer  # noqa: F401 - what importing takes is not the run's

    run = config.run.dir / str(config.run.name)
    engine = Engine(PlainReporter())
    before = peak_memory()
    result = engine.fit(config, run if (run / CONFIG_FILE).is_file() else None)
    peak = _peak_on_device()
    return Outcome(
        FINISHED,
        parameters=result.parameters,
        optimizer_state_bytes=result.optimizer_bytes,
        adamw_state_bytes=adamw_state_bytes(config),
        peak_memory_bytes=peak if peak is not None else peak_memory() - before,
        gguf_bytes=_gguf_bytes(engine, config, run),
    )


def adamw_state_bytes(config: Config) -> int:
    """Bytes that AdamW in float32 would keep for every parameter that the run trains, counted from its tensors."""
    import torch

    from nanochat_cli.model.mtp import build_mtp
    from nanochat_cli.model.transformer import Transformer
    from nanochat_cli.optim import build_optimizer

    with torch.device("meta"):
        model, mtp = Transformer(config.model), build_mtp(config.model, config.mtp)
    beside = {} if mtp is None else {"mtp": mtp}
    return build_optimizer(model, OptimConfig(matrix="adamw", other="adamw"), beside).state_bytes()


def _peak_on_device() -> int | None:
    """Bytes that torch allocated on the GPU at most; None when the run was not there."""
    import torch

    allocated = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return allocated or None


def _gguf_bytes(engine: Engine, config: Config, run: Path) -> int | None:
    """Of a file that is removed again; None, and the reason in the log, for a model that has none."""
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
    """Also when the trainer has said in a line of its own that nothing smaller is left to try."""
    from nanochat_cli.training.update import is_out_of_memory

    cause = error.__cause__
    return is_out_of_memory(error) or (cause is not None and is_out_of_memory(cause))


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, NanochatError) else f"{type(error).__name__}: {text}"


def _die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it is gone, however that ended (Linux)."""
    parent = os.environ.get(PARENT)
    if parent is None:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it was gone before the kernel knew
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
