"""`runs/NAME/report.md`: what was trained, on what, and with what result, on one page that a person can judge.

Knows plain dictionaries and Markdown; its callers have measured what they hold. A section without values is left
out: nothing is made up, and what was not measured is not shown as zero.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanochat_cli.atomic_write import write_atomically
from nanochat_cli.errors import DataError
from nanochat_cli.report.quantities import format_duration, format_quantity

FILE_NAME = "report.md"

_COUNT = "{:,}".format
_RESULTS = {
    "loss": ("held-out loss, nats per token", "{:.4f}".format),
    "perplexity": ("held-out perplexity", "{:.2f}".format),
    "accuracy": ("held-out next-token accuracy", "{:.1%}".format),
    "bits_per_byte": ("held-out bits per byte", "**{:.4f}**".format),
    "tokens": ("held-out tokens scored", _COUNT),
    "bytes": ("held-out bytes scored", _COUNT),
    "steps": ("optimizer steps", _COUNT),
    "training_tokens": ("training tokens", _COUNT),
    "training_seconds": ("training time", format_duration),
    "tokens_per_second": ("training speed, tokens per second", "{:,.0f}".format),
    "utilisation": ("utilisation: model FLOP/s over the measured matmul peak", "{:.1%}".format),
    "peak_flops": ("measured matmul peak", lambda value: format_quantity(value / 1e9, "GFLOP/s")),
    "skipped": ("skipped steps", _COUNT),
}
"""Names of results, in the order of the table; other results follow under their key."""

_SETTINGS = {
    "model": ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size", "tie_embeddings", "quant"),
    "train": ("seq_len", "batch_size", "grad_accum", "total_steps", "time_budget", "dtype"),
    "optim": ("matrix", "other", "lr", "embedding_lr", "head_lr", "schedule", "warmup_steps"),
    "data": ("path", "source", "sources", "glob"),
    "run": ("seed",),
}
_LONG_MAPPING = 8


def write_report(
    run_dir: Path,
    *,
    config: Mapping[str, Any],
    parameters: Mapping[str, int],
    environment: Mapping[str, Any],
    results: Mapping[str, Any],
    baselines: Mapping[str, float] | None = None,
    measured: Mapping[str, Mapping[str, float]] | None = None,
    plot: Path | None = None,
    samples: Sequence[tuple[str, str, str]] = (),
    export: Mapping[str, Any] | None = None,
    verification: Mapping[str, Any] | None = None,
) -> Path:
    """Write the report of a run and return its path. Raises DataError if it cannot be written.

    config: the resolved configuration as plain values. parameters: name → count, including `total`.
    results: final figures by name, see the keys of `_RESULTS`; others are shown under their own name.
    baselines: compressor → bits per byte of the same held-out files. measured: title of a section → the last values of
    its metrics, whose names begin with a group and a "/".
    plot: an image, linked relative to the run. samples: prompt, continuation, and the true continuation if known.
    export, verification: results of the exporter and of its check.
    """
    sections = [
        f"# {run_dir.name}",
        _headline(parameters, results, baselines or {}),
        "## Results\n\n" + _table(("measure", "value"), _result_rows(results, baselines or {})),
    ]
    if plot is not None:
        relative = plot.relative_to(run_dir) if plot.is_relative_to(run_dir) else plot
        sections.append(f"![loss and held-out bits per byte over training tokens]({relative.as_posix()})")
    for title, values in (measured or {}).items():
        rows = [(name.partition("/")[2].replace("_", " "), value) for name, value in values.items()]
        sections.append(f"## {title}\n\n" + _table(("statistic", "value"), rows))
    for number, (prompt, continuation, truth) in enumerate(samples, 1):
        sections.append(f"## Sample {number}\n\n" + _fenced(prompt + continuation))
        if truth:
            sections.append("The held-out document itself continues:\n\n" + _fenced(truth))
    if export:
        sections.append("## Export\n\n" + _table(("property", "value"), _flat(export)))
    if verification:
        sections.append("## Verification of the export\n\n" + _table(("check", "value"), _flat(verification)))
    settings = {section: {key: config.get(section, {}).get(key) for key in keys} for section, keys in _SETTINGS.items()}
    sections.append("## Configuration\n\n" + _table(("key", "value"), _flat(settings)))
    sections[-1] += "\n\n`config.toml` has all of it, and reproduces the run."
    sections.append("## Parameters\n\n" + _table(("part", "parameters"), parameters.items()))
    sections.append("## Environment\n\n" + _table(("what", "value"), _flat(environment)))
    path = run_dir / FILE_NAME
    try:
        write_atomically(path, ("\n\n".join(sections) + "\n").encode())
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}; free space or check its permissions") from error
    return path


def _headline(parameters: Mapping[str, int], results: Mapping[str, Any], baselines: Mapping[str, float]) -> str:
    """One sentence: the size, and how held-out bits per byte compare with those of the compressors."""
    sentence = f"A model of {format_quantity(parameters['total'], 'parameters')}"
    if (own := results.get("bits_per_byte")) is None:
        return sentence + "."
    others = ", ".join(f"{name} {value:.3f}" for name, value in baselines.items())
    compared = f" ({others} on the same files)" if others else ""
    return f"{sentence} that needs {own:.3f} bits per byte for held-out documents{compared}."


def _result_rows(results: Mapping[str, Any], baselines: Mapping[str, float]) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, (name, form) in _RESULTS.items():
        if results.get(key) is not None:
            rows.append((name, form(results[key])))
        if key == "bits_per_byte":
            rows += [(f"{name}, bits per byte of the same files", f"{value:.4f}") for name, value in baselines.items()]
    return [*rows, *_flat({key: value for key, value in results.items() if key not in _RESULTS})]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested mappings as rows with dotted names; None is left out, a long mapping of names to words is summarised."""
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            if len(value) > _LONG_MAPPING and all(isinstance(item, str) for item in value.values()):
                rows.append((name, ", ".join(f"{count} × {word}" for word, count in Counter(value.values()).items())))
            else:
                rows += _flat(value, f"{name}.")
        elif value is not None and value != []:
            rows.append((name, value))
    return rows


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return "; ".join(_cell(item) for item in value)
    return " ".join(str(value).replace("|", "\\|").split())


def _fenced(text: str) -> str:
    """A code block that the text cannot close."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
