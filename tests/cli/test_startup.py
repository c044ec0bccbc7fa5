"""Help and version come before anything heavy; the cost is compared with an empty Typer app."""

import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from nanochat_cli.cli.app import COMMANDS

HEAVY = ("torch", "torch._dynamo", "pydantic", "numpy", "datasets", "tokenizers", "tomlkit", "matplotlib")

PROBE = """
import sys
from nanochat_cli.cli.app import main
code = main(sys.argv[1:])
print("LOADED", *sorted(set(sys.modules) & set({heavy!r})), file=sys.stderr)
sys.exit(code)
"""

EMPTY_APP = """
import typer
app = typer.Typer()
@app.callback()
def main() -> None: "An empty app."
@app.command()
def nothing() -> None: "Nothing."
app()
"""


def loaded_by(*arguments: str) -> set[str]:
    """The heavy modules that a command line imports in a separate process."""
    child = subprocess.run(
        [sys.executable, "-c", PROBE.format(heavy=HEAVY), *arguments], capture_output=True, text=True, check=True
    )
    line = next(line for line in child.stderr.splitlines() if line.startswith("LOADED"))
    return set(line.split()[1:])


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_nothing_heavy(option):
    assert loaded_by(option) == set()


@pytest.mark.parametrize("line", ["train --help", "export --help", "presets list"])
def test_no_torch_before_there_is_work(line):
    assert "torch" not in loaded_by(*line.split())


def test_generating_from_a_run_does_not_load_torchs_compiler():
    """It takes longer than all else that torch loads, and training alone needs it."""
    run = Path(__file__).parents[1] / "fixtures" / "written" / "runs" / "plain"
    loaded = loaded_by("generate", str(run), "-p", "def ", "--max-tokens", "2")
    assert "torch" in loaded
    assert "torch._dynamo" not in loaded


def test_help_lists_every_visible_command(nanochat):
    outcome = nanochat("--help")
    assert outcome.code == 0
    for name, entry in COMMANDS.items():
        assert entry.hidden or f" {name} " in outcome.out
    assert "export-gguf" not in outcome.out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_the_common_options(nanochat, name):
    outcome = nanochat(name, "--help")
    assert outcome.code == 0
    for option in ("--json", "--quiet", "--verbose"):
        assert option in outcome.out


def seconds(*command: str) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


@pytest.mark.slow
def test_help_costs_at_most_1_3_times_an_empty_typer_app():
    ours, empty = [], []
    for _ in range(15):  # alternating, so that a busy moment hits both
        ours.append(seconds(sys.executable, "-m", "nanochat_cli.cli.app", "--help"))
        empty.append(seconds(sys.executable, "-c", EMPTY_APP, "--help"))
    assert statistics.median(ours) <= 1.3 * statistics.median(empty)


@pytest.mark.parametrize("name", [name for name in COMMANDS if not COMMANDS[name].hidden])
@pytest.mark.parametrize("columns", [80, 100])
def test_a_description_is_wrapped_to_the_terminal_and_not_to_the_source(nanochat, monkeypatch, name, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = nanochat(name, "--help").out.split("Usage:", 1)[1].split("╭", 1)[0].splitlines()
    for line, following in pairwise(shown[1:]):
        if line.strip() and following.strip():
            assert len(line.strip()) + 1 + len(following.split()[0]) > columns - 4, line
