"""The script that tunes the quickstart model on instructions: its rows, its figures, and a whole short run."""

import json
import subprocess
import sys

import pytest

from tests.benchmarks.scripts import BENCHMARKS, load


@pytest.fixture(scope="module")
def script():
    return load("sft")


@pytest.mark.slow
def test_the_instructions_are_300_different_answers_and_always_the_same(script):
    rows = script.instructions()
    assert len(rows) == len({row["completion"] for row in rows}) == len({row["prompt"] for row in rows}) == 300
    assert rows == script.instructions()
    assert all(set(row) == {"prompt", "completion"} and row["completion"].endswith(".") for row in rows)


def test_figures_are_the_median_of_the_seeds_beside_the_base_model(script, tmp_path):
    before = {"loss of held-out answers": 5.0, "bits per byte of text": 1.7}
    (tmp_path / "before.json").write_text(json.dumps(before))
    for mix in script.MIXES:
        for seed, loss in ((1, 2.0), (2, 3.0), (3, 2.5)):
            run = tmp_path / "runs" / script.name_of(mix, seed)
            run.mkdir(parents=True)
            lines = [{"eval/loss": 9.0}, {"final/loss": loss + mix, "final/base_bits_per_byte": 1.8}]
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {(one.case, one.metric): one for one in script.collect(tmp_path, 3)}
    case = "quickstart, 300 instructions, mix 0.1"
    after = found[case, "loss of held-out answers, after"]
    assert (after.value, after.spread) == (2.6, (2.1, 3.1))
    assert found[case, "loss of held-out answers, before"].value == 5.0
    assert found[case, "bits per byte of text, after"].value == 1.8
    assert len(found) == 8


@pytest.mark.slow
def test_a_short_run_of_the_whole_script(tmp_path):
    line = [
        sys.executable,
        str(BENCHMARKS / "sft.py"),
        "--quick",
        "--work",
        str(tmp_path),
        "--out",
        str(tmp_path / "o.json"),
    ]
    subprocess.run(line, check=True, timeout=280)
    found = {
        (one["case"], one["metric"]): one["value"] for one in json.loads((tmp_path / "o.json").read_text())["results"]
    }
    for mix in ("0.1", "0"):
        case = f"quickstart, 300 instructions, mix {mix}"
        assert found[case, "loss of held-out answers, after"] < found[case, "loss of held-out answers, before"]
