"""The report, rendered by an independent Markdown parser, holds what was measured and nothing else."""

from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from nanochat_cli.config.schema import Config
from nanochat_cli.errors import DataError
from nanochat_cli.report.run_report import write_report

GIVEN: dict[str, Any] = {
    "config": Config().model_dump(mode="json"),
    "parameters": {"embedding": 1_000_000, "matrices": 1_100_000, "total": 2_100_000},
    "environment": {"date": "2026-11-22", "git": {"commit": "abc", "dirty": False}, "gpu": None, "cores": 2},
    "results": {
        "loss": 4.15625, "perplexity": 63.83, "accuracy": 0.304, "bits_per_byte": 2.0371, "tokens": 262_144,
        "tokens_per_second": 12_345.6, "utilisation": 0.612, "peak_flops": 98.3e9, "skipped": 0, "optimizer_bytes": 12,
    },
}  # fmt: skip
EVERYTHING: dict[str, Any] = GIVEN | {
    "baselines": {"gzip -9": 2.31, "xz": 2.05},
    "measured": {"Ternary weights": {"ternary/flip_rate": 0.0125, "ternary/zero_fraction": 0.31}},
    "samples": [("def ", "f(x):\n    return ```x``` | 1\n", "g(): pass\n"), ("fn ", "main() {\n", "")],
    "export": {"arch": "llama", "tensor_types": {f"blk.{i}": "tq2_0" for i in range(9)} | {"head": "f16"}},
    "verification": {"tensors_equal": True, "max_difference": 1.25e-4, "notes": ["a|b", "c"]},
}


def parsed(path: Path) -> tuple[dict[str, dict[str, str]], dict[str, str], list[str]]:
    """Tables by the heading above them (first column → second), code by heading, and the targets of images."""
    tables: dict[str, dict[str, str]] = {}
    code: dict[str, str] = {}
    images: list[str] = []
    heading, cells = "", []
    tokens = MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8"))
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type == "inline" and before is not None and before.type == "heading_open":
            heading = token.content
        elif token.type == "inline" and before is not None and before.type == "td_open":
            cells.append(token.content)
        elif token.type == "tr_close" and cells:
            assert len(cells) == 2
            tables.setdefault(heading, {})[cells[0]] = cells[1]
            cells = []
        elif token.type == "fence":
            code[heading] = token.content
        images += [str(child.attrs["src"]) for child in token.children or [] if child.type == "image"]
    return tables, code, images


def test_everything_that_was_given_is_in_it(tmp_path: Path) -> None:
    path = write_report(tmp_path, **EVERYTHING, plot=tmp_path / "plots" / "curve.png")
    assert path == tmp_path / "report.md"
    tables, code, images = parsed(path)
    assert tables["Results"] == {
        "held-out loss, nats per token": "4.1562",
        "held-out perplexity": "63.83",
        "held-out next-token accuracy": "30.4%",
        "held-out bits per byte": "**2.0371**",
        "gzip -9, bits per byte of the same files": "2.3100",
        "xz, bits per byte of the same files": "2.0500",
        "held-out tokens scored": "262,144",
        "training speed, tokens per second": "12,346",
        "utilisation: model FLOP/s over the measured matmul peak": "61.2%",
        "measured matmul peak": "98 GFLOP/s",
        "skipped steps": "0",
        "optimizer_bytes": "12",
    }
    assert tables["Ternary weights"] == {"flip rate": "0.0125", "zero fraction": "0.31"}
    assert tables["Export"] == {"arch": "llama", "tensor_types": "9 × tq2_0, 1 × f16"}
    assert tables["Verification of the export"] == {
        "tensors_equal": "yes",
        "max_difference": "0.000125",
        "notes": "a|b; c",
    }
    assert tables["Configuration"]["model.dim"] == "768"
    assert tables["Configuration"]["model.quant.scale"] == "row"
    assert tables["Parameters"]["total"] == "2,100,000"
    assert tables["Environment"] == {"date": "2026-11-22", "git.commit": "abc", "git.dirty": "no", "cores": "2"}
    assert list(code) == ["Sample 1", "Sample 2"]
    assert "def f(x):\n    return ```x``` | 1\n" in (tmp_path / "report.md").read_text()
    assert "g(): pass" in code["Sample 1"]  # the last block below the heading: what followed in truth
    assert code["Sample 2"].startswith("fn main() {")
    assert images == ["plots/curve.png"]
    assert (
        "needs 2.037 bits per byte for held-out documents (gzip -9 2.310, xz 2.050 on the same files)"
        in path.read_text()
    )


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    given: dict[str, Any] = GIVEN | {"results": {"skipped": 3}}
    tables, code, images = parsed(write_report(tmp_path, **given))
    assert tables["Results"] == {"skipped steps": "3"}
    assert set(tables) == {"Results", "Configuration", "Parameters", "Environment"}
    assert (code, images) == ({}, [])


def test_a_place_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot write .*report.md"):
        write_report(tmp_path / "missing", **GIVEN)
