"""The picture of the live view in the README: the panel of a finished run, as it stood at one of its steps.

    python benchmarks/live_view.py build/quickstart --out docs/images/live-view.svg

FOLDER holds the metrics.jsonl and results.json of a run, as `benchmarks/quickstart.py` keeps them. Nothing is measured:
the logged numbers go through the live view itself, and Rich draws the picture.
"""

import argparse
import io
import json
import re
from pathlib import Path

from rich.console import Console

from nanochat_cli.report.live import LiveView
from nanochat_cli.report.reporter import QuietReporter

READINGS = {
    "loss": "loss/main",
    "eval_loss": "eval/loss",
    "bits_per_byte": "eval/bits_per_byte",
    "tokens_per_second": "throughput/tokens_per_second",
    "utilisation": "throughput/utilisation",
    "data_wait_ms": "throughput/data_wait_ms",
    "lr": "training/lr",
    "grad_norm": "training/grad_norm",
    "skipped": "training/skipped",
}
"""What the live view shows, and what the log calls it."""


def picture(folder: Path, share: float) -> str:
    """An SVG of the panel after `share` of the run's steps."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))["results"]
    total, now = max(line["step"] for line in lines), 0.0
    view = LiveView(
        QuietReporter(), total, total, title="quickstart-1", peak_flops=results.get("peak_flops"), clock=lambda: now
    )
    for line in lines:
        if line["step"] > share * total:
            break
        now = line["seconds"]
        view.update(line["step"], **{name: line[key] for name, key in READINGS.items() if key in line})
    console = Console(record=True, force_terminal=True, width=80, file=io.StringIO())
    console.print(view.panel())
    # Rich names a font on a server; the reader's own monospace font does as well.
    return re.sub(r"\s*@font-face \{.*?\}", "", console.export_svg(title="nanochat train"), flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--share", type=float, default=0.7, help="of the run's steps, where it is drawn")
    parser.add_argument("--out", type=Path, default=Path("docs/images/live-view.svg"))
    arguments = parser.parse_args()
    arguments.out.write_text(picture(arguments.folder, arguments.share), encoding="utf-8")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
