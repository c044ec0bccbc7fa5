"""`runs/NAME/results.json`: everything measured about a run so far, and the report that is rendered from it.

Training writes the first sections (results, baselines, sample …); export and verification add theirs later. The
report is rendered again each time, so that it always shows everything.
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
    "huggingface",
    "conversion",
)


def add_results(run_dir: Path, **sections: Any) -> Path | None:
    """Add or replace sections of SECTIONS and render the report; returns its path.

    measured: further sections → their titles, each a mapping of metrics to their last values. Returns None, and writes
    no report, until training has written its sections (an interrupted run can be exported). Raises DataError if the
    files cannot be written.
    """
    unknown = sections.keys() - {*SECTIONS, *sections.get("measured", ())}
    if unknown:
        raise TypeError(f"unknown sections: {', '.join(sorted(unknown))}")
    path = run_dir / FILE_NAME
    try:
        # One process at a time: a run may be exported while its training ends.
        with held_file(path, "writes", waiting=lambda _: None):
            merged = {**read_results(run_dir), **sections}
            text = json.dumps(merged, indent=2, ensure_ascii=False, default=str) + "\n"
            write_atomically(path, text.encode())
            if not {"config", "parameters", "environment", "results"} <= merged.keys():
                return None
            return _render(run_dir, merged)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}; free space or check its permissions") from error


def read_results(run_dir: Path) -> dict[str, Any]:
    """All sections so far; empty before the first. Raises DataError for a damaged file."""
    path = run_dir / FILE_NAME
    if not path.exists():
        return {}
    try:
        sections = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(sections, dict):
            raise ValueError(f"a JSON {type(sections).__name__} where an object belongs")
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); remove it and run the command again") from error
    return sections


def _render(run_dir: Path, sections: Mapping[str, Any]) -> Path:
    samples = [(one["prompt"], one["continuation"], one["truth"]) for one in sections.get("samples") or ()]
    if not samples and (old := sections.get("sample")):  # a run from before samples had held-out prompts
        samples = [(old[0], old[1], "")]
    titles = sections.get("measured", {"ternary": "Ternary weights"})  # by default an older run's
    return write_report(
        run_dir,
        config=sections["config"],
        parameters=sections["parameters"],
        environment=sections["environment"],
        results=sections["results"],
        baselines=sections.get("baselines"),
        measured={title: sections[name] for name, title in titles.items() if sections.get(name)},
        plot=run_dir / sections["plot"] if sections.get("plot") else None,
        samples=samples,
        export=sections.get("export"),
        verification=sections.get("verification"),
    )
