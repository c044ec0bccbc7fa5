"""What every evaluation says about its data: how many documents give away problems of the built-in sets."""

from pathlib import Path
from typing import TYPE_CHECKING

from nanochat_cli.data.contamination import RUN_WORDS
from nanochat_cli.data.manifest import Manifest, read_manifest
from nanochat_cli.errors import DataError
from nanochat_cli.formats.run.dataset import read_record
from nanochat_cli.report.reporter import Reporter

if TYPE_CHECKING:
    from nanochat_cli.formats.open import LoadedRun


def report_contamination(manifest: Manifest | None, reporter: Reporter) -> dict[str, object]:
    """Say it, and return it for a result file; manifest: of the data of the model, None if it is not here."""
    info = None if manifest is None else manifest.contamination
    what = f"documents with {RUN_WORDS} words in a row of a built-in problem"
    if manifest is None:
        reporter.info(f"{what}: not known; name the data that the model was trained on with --data")
    elif info is None:
        reporter.info(f"{what}: were not counted in {manifest.source}; `nanochat tokenize` does (data.contamination)")
    else:
        counts = ", ".join(f"{count} ({name})" for name, count in info.documents.items())
        reporter.info(f"{what}: {counts}, {'left out of' if info.left_out else 'in'} the data")
    return {"contamination": None if info is None else info.model_dump(mode="json")}


def manifest_of(target: Path, run: "LoadedRun | None", data: Path | None) -> Manifest | None:
    """The manifest of `data`, or of what the run was trained on; None if it is not here or not known."""
    if data is not None:
        return read_manifest(data)
    if run is None:
        return None
    record = read_record(target)
    places = [run.config.data.path, None if record is None else Path(record.folder)]
    for place in places:
        try:
            if place is not None:
                return read_manifest(place)
        except DataError:  # moved, or removed from the cache: an evaluation of programs does not need it
            continue
    return None
