"""`runs/NAME/results.json`: what was found out about a run so far, and the report that is rendered from it.

Training writes the first sections (results, baselines, sample …); export and verification add theirs later. The
report is rendered anew each time, so that it always shows everything.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanochat_cli.atomic_write import write_atomically
from nanochat_cli.errors import DataError
from nanochat_cli.folders import held_file
from nanochat_cli.nesting import parse_json
from nanochat_cli.report.run_report import write_report

FILE_NAME = "results.json"
SECTIONS = (
    "config",
    "parameters",
    "environment",
    "results",
    "baselines",
    "measured",
    "plot",
    "sample",
    "samples",
    "export",
    "verification",
)


def add_results(run_dir: Path, **sections: Any) -> Path | None:
    """Add or replace sections of SECTIONS and render the report; returns its path.

    measured: further sections → their titles, each a mapping of metrics to their last values.
    Returns None, and writes no report, while the sections that training writes are not there (a run that was
    interrupted can be exported). Raises DataError when the files cannot be written.
    """
    unknown = sections.keys() - {*SECTIONS, *sections.get("measured", ())}
    if unknown:
        raise TypeError(f"unknown sections: {', '.join(sorted(unknown))}")
    path = run_dir / FILE_NAME
    try:
        # Read and written by one process at a time: a run may be exported while its training ends.
        with held_file(path, "writes", waiting=lambda _: None):
            found = {**read_results(run_dir), **sections}
            text = json.dumps(found, indent=2, ensure_ascii=False, default=str) + "\n"
            write_atomically(path, text.encode())
            if not {"config", "parameters", "environment", "results"} <= found.keys():
                return None
            return _render(run_dir, found)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}; free space or check its permissions") from error


def read_results(run_dir: Path) -> dict[str, Any]:
    """All sections so far; empty before the first. Raises DataError for a damaged file."""
    path = run_dir / FILE_NAME
    if not path.exists():
        return {}
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"a JSON {type(found).__name__} where an object belongs")
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); remove it and run the command again") from error
    return found


def _render(run_dir: Path, found: Mapping[str, Any]) -> Path:
    samples = [(one["prompt"], one["continuation"], one["truth"]) for one in found.get("samples") or ()]
    if not samples and (old := found.get("sample")):  # of a run before samples had held-out prompts
        samples = [(old[0], old[1], "")]
    titles = found.get("measured", {"ternary": "Ternary weights"})  # by default those of an older run
    return write_report(
        run_dir,
        config=found["config"],
        parameters=found["parameters"],
        environment=found["environment"],
        results=found["results"],
        baselines=found.get("baselines"),
        measured={title: found[name] for name, title in titles.items() if found.get(name)},
        plot=run_dir / found["plot"] if found.get("plot") else None,
        samples=samples,
        export=found.get("export"),
        verification=found.get("verification"),
    )
