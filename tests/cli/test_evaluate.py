"""`nanochat eval --suite` from the command line to its files, and what it refuses before a model is loaded."""

import json
import random

import pytest

from nanochat_cli.data.prepare import prepare_dataset
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.formats.gguf.write import export_gguf
from nanochat_cli.formats.open import load_run
from nanochat_cli.report.reporter import QuietReporter
from tests.data.corpora import make_config, random_text
from tests.evaluation.saved_runs import save_run

SMALL = ["--suite", "python", "--limit", "2", "--samples", "3", "--max-tokens", "6", "--temperature", "0.5,1"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A data set of Python files, and the [data] section of a run trained on it."""
    source = tmp_path_factory.mktemp("corpus")
    for number in range(30):
        (source / f"a{number}.py").write_text(f"def f{number}(x):\n    return x * {number} + {number * 7}\n" * 3)
    out = tmp_path_factory.mktemp("data") / "python"
    data = {"source": str(source), "val_fraction": 0.3, "path": str(out)}
    config = make_config(data=data, model={"vocab_size": 300})
    prepare_dataset(str(source), out, config, QuietReporter())
    return out, data


@pytest.fixture
def run(folder, dataset):
    out, data = dataset
    save_run(folder / "runs" / "tiny", Tokenizer.load(out / "tokenizer.json"), data=data, max_seq_len=256)
    (folder / "runs" / "tiny" / "checkpoints" / "latest").touch()
    return folder / "runs" / "tiny"


def test_a_suite_is_evaluated_once_and_continues_with_resume(nanochat, run, folder):
    first = nanochat("eval", *SMALL, "--k", "1,3", "--json", "all.json")
    assert first.code == 0, first.err
    out = run / "eval" / "python-step-000001"
    lines = (out / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 4  # two problems at two temperatures
    assert [len(json.loads(line)["completions"]) for line in lines] == [3] * 4
    document = json.loads((out / "results.json").read_text())
    assert document["suite"] == "eval python"
    assert {"python, temperature 0.5", "python, temperature 1"} == {one["case"] for one in document["results"]}
    assert {"pass@1", "pass@3"} <= {one["metric"] for one in document["results"]}
    assert "pass@3" in first.out
    again = nanochat("eval", *SMALL)
    assert again.code == 2
    assert "continue it with --resume" in again.err
    (out / "samples.jsonl").write_text("\n".join(lines[:2]) + "\n" + lines[2][:30])
    resumed = nanochat("eval", *SMALL, "--k", "1,3", "--resume")
    assert (resumed.code, resumed.out) == (0, first.out)
    assert (out / "samples.jsonl").read_text().splitlines() == lines
    values = json.loads((folder / "all.json").read_text())
    assert values["settings"]["sha256"] == document["settings"]["sha256"]
    other = nanochat("eval", *SMALL, "--seed", "5", "--resume")
    assert other.code == 2
    assert "seed = 0, not 5" in other.err


def test_a_stop_says_how_to_continue(nanochat, run, monkeypatch):
    from nanochat_cli.evaluation import complete_problems

    draw, calls = complete_problems.sample_batch, []

    def stopped_at_the_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(complete_problems, "sample_batch", stopped_at_the_third)
    outcome = nanochat("eval", *SMALL)
    assert outcome.code == 130
    assert "continue with --resume" in outcome.err
    resumed = nanochat("eval", *SMALL, "--resume")
    assert resumed.code == 0, resumed.err
    assert "of 4 are already in" in resumed.err


def test_held_out_documents_of_a_run_and_of_a_file(nanochat, run, folder, dataset):
    assert nanochat("eval", "--suite", "bpb", "--json", "run.json").code == 0
    found = json.loads((folder / "run.json").read_text())
    assert nanochat("eval", "--json", "plain.json").code == 0
    plain = json.loads((folder / "plain.json").read_text())
    assert found["bits_per_byte"] == plain["bits_per_byte"]
    assert found["languages"]["python"] == {key: found[key] for key in found["languages"]["python"]}
    assert (run / "eval" / "bpb-step-000001" / "results.json").is_file()
    model, tokenizer, config = load_run(run)
    export_gguf(model, tokenizer, folder / "model.gguf", config.export, {})
    assert nanochat("eval", "model.gguf", "--data", dataset[0], "--json", "file.json").code == 0
    assert json.loads((folder / "file.json").read_text())["bytes"] == found["bytes"]
    refused = nanochat("eval", "model.gguf")
    assert (refused.code, "give a data set with --data" in refused.error) == (2, True)


def test_the_compile_rate_asks_for_held_out_functions(nanochat, run, dataset):
    outcome = nanochat("eval", "--suite", "compile", "--limit", "2", "--samples", "2", "--max-tokens", "6")
    assert outcome.code == 0, outcome.err
    assert "compile rate" in outcome.out
    lines = (run / "eval" / "compile-step-000001" / "samples.jsonl").read_text().splitlines()
    assert all(json.loads(line)["problem"].startswith("held-out/python/") for line in lines)
    assert len(lines) == 2
    assert len(list(ShardReader(dataset[0]).documents("val"))) >= 2


def test_lines_of_held_out_files_are_completed_by_the_model_and_its_peers(nanochat, run):
    outcome = nanochat("eval", "--suite", "completion", "--limit", "4", "--max-tokens", "8", "--json", "all.json")
    assert outcome.code == 0, outcome.err
    folder = run / "eval" / "completion-step-000001"
    lines = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    contenders = ["model, left to right", "5-gram with back-off", "longest match in training"]
    assert [line["contender"] for line in lines] == contenders * 8
    found = {(one["case"], one["metric"]): one for one in json.loads((folder / "results.json").read_text())["results"]}
    for name in contenders:
        mine = [line["exact"] for line in lines if line["contender"] == name and line["kind"] == "next line"]
        assert found[f"next line, python, {name}", "exact match"]["value"] == sum(mine) / len(mine)
        assert name in outcome.out
    # Held-out files differ from those of training in their numbers only.
    assert found["next line, python, longest match in training", "edit similarity"]["value"] > 0.6
    assert ("next line, python, model, left to right", "bits per byte") in found


def test_what_a_model_recites_is_compared_with_held_out_text(nanochat, folder):
    source = folder / "texts"
    source.mkdir()
    for number in range(12):
        (source / f"{number}.txt").write_text(random_text(random.Random(number), 1500))
    config = make_config(data={"source": str(source), "val_fraction": 0.3}, model={"vocab_size": 300})
    prepare_dataset(str(source), folder / "data", config, QuietReporter())
    tokenizer = Tokenizer.load(folder / "data" / "tokenizer.json")
    save_run(folder / "one", tokenizer, data={"path": str(folder / "data")}, max_seq_len=128)
    outcome = nanochat("eval", "one", "--suite", "memorised", "--limit", "3")
    assert outcome.code == 0, outcome.err
    document = json.loads((folder / "one" / "eval" / "memorised-step-000001" / "results.json").read_text())
    found = {(one["case"], one["metric"]): one["value"] for one in document["results"]}
    for side in ("training", "held-out"):
        assert found[f"{side} documents, 50 tokens after 50", "places"] == 3
        assert found[f"{side} documents, 50 tokens after 50", "reproduced exactly"] == 0  # its weights are random
    assert document["recited"] == []


def test_a_suite_on_training_text_needs_the_tokens_of_the_model(nanochat, run, dataset, folder):
    other = Tokenizer.train(["x = y + z\n" * 30], 300)
    save_run(folder / "other", other, max_seq_len=256)
    outcome = nanochat("eval", "other", "--suite", "completion", "--data", dataset[0])
    assert outcome.code == 3
    assert "has a different tokenizer from other; give the data set of its training" in outcome.err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--suite completion --temperature 0.5", "--temperature: this suite draws no completions"),
        ("--suite memorised --max-tokens 5", "--max-tokens: this suite draws no completions"),
        ("--suite python --samples 4 --k 1,5", "--samples 4 is too few for pass@5: draw at least 5"),
        ("--suite python --k many", "--k many: needs numbers separated by commas, such as 1,5,10"),
        ("--suite python --temperature 0,1", "--temperature 0 draws the same completion 10 times"),
        ("--suite pyton", "--suite pyton: choose from bpb, compile, python"),
        ("--samples 3", "--samples: bits per byte draw no completions"),
        ("--suite bpb --k 2", "--k: bits per byte draw no completions"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(nanochat, run, line, message):
    outcome = nanochat("eval", *line.split())
    assert outcome.code == 2
    assert message in outcome.error
    assert not (run / "eval").exists()


def test_a_file_of_problems_that_does_not_exist_is_bad_data(nanochat, run):
    outcome = nanochat("eval", "--suite", "mine.jsonl")
    assert (outcome.code, outcome.error) == (3, "mine.jsonl: no such file")
