"""The result file of `benchmarks/grpo.py` agrees with its runs."""

import json

import pytest

from tests.benchmarks.scripts import load


@pytest.fixture
def script():
    return load("grpo")


def score(compiled: int, solved: int = 0) -> dict[str, object]:
    return {"samples": 4, "solved": solved, "compiled": compiled, "best": solved > 0, "reward": compiled / 4}


def test_figures_cover_all_problems_the_practised_and_the_held_out_ones(script, tmp_path):
    run = tmp_path / "runs" / "python-policy"
    run.mkdir(parents=True)
    saved = {
        "environment": {"device": "a"},
        "differences": [{"problems": "practised", "count": 2}, {"problems": "held out", "count": 1}],
        "before": {"a": score(0), "b": score(2), "c": score(1)},
        "after": {"a": score(4, 1), "b": score(2), "c": score(4)},
    }
    (run / "grpo.json").write_text(json.dumps(saved))
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    (run / "config.toml").write_text("[grpo]\ngroup = 16\n")
    start = tmp_path / "runs" / "python"
    (start / "eval" / "python-step-1").mkdir(parents=True)
    trained = {"bits_per_byte": 1.5, "training_seconds": 10, "training_tokens": 100}
    (start / "results.json").write_text(json.dumps({"results": trained}))
    result = {"metric": "pass@1", "value": 0.5, "unit": "share", "spread": None}
    evaluated = [{"case": "python, temperature 0.2", **result}, {"case": "python, level 1, temperature 0.2", **result}]
    (start / "eval" / "python-step-1" / "results.json").write_text(json.dumps({"results": evaluated}))

    script.collect(tmp_path, tmp_path / "out.json")

    found = json.loads((tmp_path / "out.json").read_text())
    values = {(one["case"], one["metric"]): one["value"] for one in found["results"]}
    case = "python, policy"
    assert values[case, "rounds"] == 2
    assert values[case, "completions before"] == values[case, "completions after"] == 12
    assert values[case, "compile rate, all, before"] == pytest.approx(3 / 12)
    assert values[case, "compile rate, all, after"] == pytest.approx(10 / 12)
    assert values[case, "compile rate, all, change"] == pytest.approx(7 / 12)
    assert values[case, "compile rate, practised, change"] == pytest.approx(4 / 8)
    assert values[case, "compile rate, held out, change"] == pytest.approx(3 / 4)
    assert values[case, "pass@1, all, after"] == pytest.approx(1 / 12)
    assert values["python, trained", "held-out bits per byte"] == 1.5
    assert [one["case"] for one in found["results"] if "eval" in one["case"]] == [
        "python, nanochat eval, python, temperature 0.2"
    ]
    assert found["runs"]["python-policy"]["settings"] == {"group": 16}
