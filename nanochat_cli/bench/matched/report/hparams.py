"""The runs of a comparison for TensorBoard's HParams tab: what differs between them, and how each ended.

Knows a Suite and TensorBoard's protocol buffers; no torch. One folder per run, named `CONFIG-seed-N`.
"""

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanochat_cli.bench.matched.report.configs import Settings, differing_keys
from nanochat_cli.bench.matched.report.tables import plain_value
from nanochat_cli.bench.matched.run_record import FINISHED, MEASURES, RunRecord, Suite
from nanochat_cli.errors import DataError

FOLDER = "hparams"
_SUFFIX = ".comparison"


def write_hparams(folder: Path, suite: Suite, settings: Mapping[str, Settings]) -> list[Path]:
    """Writes `folder/hparams/*`, replacing what an earlier call wrote there; returns the folders of the runs.

    settings: by folder of the run; a run without settings shows only its configuration's name and its seed. The metrics
    are the run's MEASURES, as scalars at step 0. Raises DataError.
    """
    root = folder / FOLDER
    keys = differing_keys(settings.values())
    try:
        for old in root.glob(f"*/events.out.tfevents.*{_SUFFIX}"):
            old.unlink()
        return [_write_run(root, run, settings.get(run.run), keys) for run in suite.runs]
    except OSError as error:
        raise DataError(f"cannot write {root}: {error.strerror}; free space or choose another place") from error


def hyper_parameters(run: RunRecord, settings: Settings | None, keys: list[str]) -> dict[str, Any]:
    """Name -> bool, number or text. A key without a value is left out; an array is text."""
    set_here = {} if settings is None else {key: settings[key] for key in keys if settings[key] is not None}
    return {"config": run.config, "seed": run.seed} | {
        key: value if isinstance(value, bool | int | float | str) else plain_value(value)
        for key, value in set_here.items()
    }


def _write_run(root: Path, run: RunRecord, settings: Settings | None, keys: list[str]) -> Path:
    # protobuf creates these classes at import, where no type checker sees them
    from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2, summary_v2
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    place = root / re.sub(r"[^\w.=,+-]", "_", f"{run.config}-seed-{run.seed}")
    status = api_pb2.STATUS_SUCCESS if run.status == FINISHED else api_pb2.STATUS_FAILURE  # pyright: ignore[reportAttributeAccessIssue]
    end = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())  # pyright: ignore[reportAttributeAccessIssue]
    data = plugin_data_pb2.HParamsPluginData(session_end_info=end)  # pyright: ignore[reportAttributeAccessIssue]
    ended = Summary.Value(
        tag=metadata.SESSION_END_INFO_TAG,
        metadata=metadata.create_summary_metadata(data),
        tensor=metadata.NULL_TENSOR,
    )
    measured = [(name, run.measures.get(name)) for name in MEASURES]
    scalars = [Summary.Value(tag=name, simple_value=value) for name, value in measured if value is not None]
    writer = EventFileWriter(str(place), filename_suffix=_SUFFIX)
    try:
        for summary in (
            summary_v2.hparams_pb(hyper_parameters(run, settings, keys), trial_id=place.name),
            Summary(value=scalars),
            Summary(value=[ended]),
        ):
            writer.add_event(Event(wall_time=time.time(), step=0, summary=summary))
    finally:
        writer.close()
    return place
