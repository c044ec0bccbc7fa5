"""`nanochat grpo` from the command line: a run that other commands take, its view, and what a mistake costs."""

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from nanochat_cli.cli.app import main
from nanochat_cli.config.load import load_run_config
from nanochat_cli.evaluation.complete_problems import fingerprint
from nanochat_cli.evaluation.problems import load_problems
from nanochat_cli.report.reporter import PlainReporter, QuietReporter, RichReporter
from nanochat_cli.rl.problem_split import load_split, split
from nanochat_cli.rl.rounds_view import RoundsView
from nanochat_cli.sandbox.sandbox import Sandbox
from tests.e2e.tiny import TINY, write_corpus
from tests.rl.tiny_run import NUMBERS, grpo_run, problem, write_problems

QUICK = ["--rounds", "1", "--group", "2", "--set", "grpo.max_tokens=12", "--set", "grpo.eval_samples=2"]
QUICK += ["--set", "grpo.limit=3", "--set", "grpo.held_out=0.34"]


@pytest.fixture
def folder(tmp_path, monkeypatch, source):
    """A working folder with the run `source` and the task `p.jsonl`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    shutil.copytree(source, tmp_path / "runs" / "source")
    write_problems(tmp_path / "p.jsonl")
    return tmp_path


@pytest.fixture
def nanochat(folder, capfd):
    def run(line, *more):
        capfd.readouterr()
        code = main([*line.split(), *more])
        return code, *capfd.readouterr()

    return run


def test_a_run_in_the_real_sandbox_is_a_run_for_other_commands(nanochat, folder):
    code, out, err = nanochat("grpo source --task p.jsonl --mode policy --json found.json", *QUICK)
    assert code == 0, err
    assert "round 1/1  reward" in err
    assert "compiles" in err
    assert "practised (2)" in out
    found = json.loads((folder / "found.json").read_text())
    assert {(one["problems"], one["count"]) for one in found["differences"]} == {("practised", 2), ("held out", 1)}
    isolation = Sandbox().isolation.description
    assert f"sandbox: {isolation}" in err
    assert found["isolation"] == isolation
    run = Path(found["run"])
    assert run == Path("runs/source-policy-1")
    assert {one["measure"] for one in found["differences"]} == {"pass@1", "best of n", "compile rate", "mean reward"}
    for name in ("config.toml", "environment.json", "tokenizer.json", "metrics.jsonl", "grpo.json", "report.md"):
        assert (run / name).is_file()
    config = load_run_config(run)
    found = config.grpo.source, config.grpo.task, config.grpo.mode
    assert found == (folder / "runs/source", str(folder / "p.jsonl"), "policy")

    code, out, err = nanochat("generate source-policy-1 --max-tokens 5 -p", "def add_3(x):\n")
    assert (code, err) == (0, "runs/source-policy-1, step 1\n")
    assert out.startswith("def add_3(x):\n")
    assert nanochat("export source-policy-1 --gguf --type f16")[0] == 0
    assert (run / "model.gguf").is_file()

    code, out, err = nanochat("grpo --resume source-policy-1 --rounds 2")
    assert code == 0, err
    assert "resumed after round 1 of 2" in err
    assert "round 2/2" in err
    assert load_run_config(run).grpo.rounds == 2

    code, out, err = nanochat("train --resume source-policy-1")
    assert (code, err.count("\n")) == (2, 1)
    assert "nanochat grpo --resume" in err

    code, out, err = nanochat("grpo source-policy-1 --task p.jsonl --mode rft --out tuned -q", *QUICK, "--group", "6")
    said = [
        line for line in err.splitlines() if "uncommitted changes" not in line
    ]  # of this checkout, while it is edited
    assert (code, said) == (0, [])
    assert load_run_config(Path("tuned")).grpo.source == run.resolve()


def test_prompts_are_read_without_the_line_break_that_the_tokenizer_joins(nanochat, folder, source):
    """In practice and in evaluation: the run's tokenizer joins a line break and the indentation behind it."""
    asked = [f"def add_{number}(x):" for number in NUMBERS]
    run = grpo_run(source, folder / "practice")
    assert sorted(one.prompt for one in (*run.problems.practised, *run.problems.held_out)) == asked

    assert nanochat("eval source --suite p.jsonl --samples 1 --max-tokens 2")[0] == 0
    (settings,) = folder.rglob("settings.json")
    without = [{**problem(number), "prompt": prompt} for number, prompt in zip(NUMBERS, asked, strict=True)]
    (folder / "q.jsonl").write_text("".join(json.dumps(one) + "\n" for one in without))
    assert json.loads(settings.read_text())["problems"] == fingerprint(load_problems(folder / "q.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["python", "rust"])
def test_a_trained_run_practises_built_in_problems_and_is_evaluated(nanochat, folder, task):
    write_corpus(folder / "corpus")
    data = ["--set", "data.path=data", "--set", "data.val_fraction=0.2"]
    assert nanochat("tokenize --source corpus --out data --vocab-size 300")[0] == 0
    assert nanochat("train --name tiny --set train.total_steps=5 --set model.max_seq_len=512", *TINY, *data)[0] == 0
    code, out, err = nanochat(f"grpo tiny --task {task} --mode policy --out tuned", *QUICK)
    assert code == 0, err
    assert "practised (2)" in out or "8 of 8 measures are 0 before and after" in err
    assert nanochat("eval tuned")[0] == 0
    assert nanochat("inspect tuned")[0] == 0
    # Training its configuration from the beginning gives an ordinary run.
    assert nanochat("train --config tuned/config.toml --name again", *data)[0] == 0
    assert nanochat("train --resume again --set train.total_steps=6")[0] == 0


MISTAKES = [
    ("grpo nowhere --task python", 3, "nowhere: no such run"),
    ("grpo source", 2, "--task: name the problems to practise"),
    ("grpo source --task pyton", 2, "no problem set 'pyton'; choose from python, rust"),
    ("grpo source --task missing.jsonl", 3, "missing.jsonl: no such file"),
    ("grpo source --task bad.jsonl", 3, "bad.jsonl:1: not JSON"),
    ("grpo source --task p.jsonl --mode polic", 2, 'grpo.mode = "polic" (--mode): must be'),
    ("grpo source --task p.jsonl --rounds 0", 2, "grpo.rounds = 0 (--rounds): must be greater than 0"),
    ("grpo source --task p.jsonl --rounds many", 2, "--rounds"),
    ("grpo source --task p.jsonl --group 1", 2, "grpo.group = 1 (--group): must be greater than or equal to 2"),
    ("grpo source --task p.jsonl --set grpo.grup=4", 2, "did you mean grpo.group?"),
    ("grpo source --task p.jsonl --set grpo.ratio_cap=1.1", 2, "must be 1 + grpo.clip_high or more"),
    ("grpo source --task p.jsonl --set grpo.rewards=missing.toml", 2, "missing.toml: no such rewards file"),
    ("grpo source --task unlevelled.jsonl --set grpo.max_level=1", 2, "has no problem of that level"),
    ("grpo source --task p.jsonl --lessons localhost:80", 2, "must start with http:// or https://"),
    ("grpo source --task p.jsonl --mode rft --lessons http://localhost", 2, "needs grpo.mode = training-free"),
    ("grpo source --task p.jsonl --lessons http://127.0.0.1:9", 3, "no answer"),
    ("grpo source --task p.jsonl --out runs/source", 2, "a run of that name exists"),
    ("grpo source --task p.jsonl --out p.jsonl/x", 3, "p.jsonl is not a folder"),
    ("grpo source --task p.jsonl --set train.device=cuda:7", 2, "this machine has no such device"),
    ("grpo source --task long.jsonl", 3, "no problem leaves the model room to answer"),
    ("grpo source --resume", 2, "not a run of nanochat grpo"),
    ("grpo source --resume --task p.jsonl", 2, "--task does not go with --resume"),
    ("grpo source --resume --out x", 2, "--out does not go with --resume"),
    ("grpo begun --resume --set grpo.mode=rft", 2, "began with mode = training-free"),
    ("grpo begun --resume --set grpo.limit=2", 2, "began with limit = None; start a new run"),
]


@pytest.mark.parametrize(("line", "code", "words"), MISTAKES, ids=[line for line, _, _ in MISTAKES])
def test_a_mistake_is_one_line_and_leaves_nothing_behind(nanochat, folder, line, code, words):
    (folder / "bad.jsonl").write_text("{\n")
    (folder / "unlevelled.jsonl").write_text(json.dumps({**problem(3), "level": None}) + "\n")
    (folder / "long.jsonl").write_text(json.dumps({**problem(3), "prompt": "x = 1 + 2\n" * 99}) + "\n")
    begun = folder / "runs" / "begun"
    begun.mkdir()
    text = (folder / "runs" / "source" / "config.toml").read_text()
    (begun / "config.toml").write_text(text.replace("[grpo]", '[grpo]\nsource = "runs/source"\ntask = "p.jsonl"'))
    before = sorted(folder.rglob("*"))
    found, out, err = nanochat(line, "-q")
    lines = [one for one in err.splitlines() if not one.startswith("warning: ")]
    assert (found, len(lines), out) == (code, 1, "")
    assert lines[0].startswith("error: ")
    assert words in lines[0]
    assert sorted(folder.rglob("*")) == before


# -- problems ------------------------------------------------------------------------------------------------


def test_a_problem_is_held_out_by_its_id_wherever_it_is_listed(folder):
    config = load_run_config(Path("runs/source")).grpo.model_copy(update={"task": "python"})
    first = load_split(config, QuietReporter())
    everything = [*first.practised, *first.held_out]
    again = split(everything[::-1], config.held_out)
    assert {one.id for one in again.held_out} == {one.id for one in first.held_out}
    assert len(first.held_out) == int(0.25 * len(everything))
    assert first.languages == ["python"]
    rounds = [[one.id for one in first.of_round(config, 1, number)] for number in (1, 1, 2)]
    assert rounds[0] == rounds[1] != rounds[2]
    assert sorted(rounds[0]) == sorted(rounds[2]) == sorted(one.id for one in first.practised)
    few = config.model_copy(update={"problems": 5, "max_level": 1})
    easy = load_split(few, QuietReporter())
    assert {one.level for one in (*easy.practised, *easy.held_out)} == {1}
    assert len(easy.of_round(few, 1, 1)) == 5


# -- the view ------------------------------------------------------------------------------------------------

METRICS = {
    "reward/total": 0.25,
    "reward/tests": 0.5,
    "rollouts/pass_rate": 0.125,
    "rollouts/compile_rate": 0.75,
    "library/size": 17,
    "throughput/tokens_per_second": 1234.0,
}


def test_without_a_terminal_a_round_is_a_line_and_so_is_a_long_silence():
    now, err = [0.0], io.StringIO()
    with RoundsView(PlainReporter(err=err), 3, title="tuned", clock=lambda: now[0]) as view:
        view.phase("round 1: rollouts", 0, 40)
        now[0] = 31.0
        view.phase("round 1: rollouts", 10, 40)
        now[0] = 40.0
        view.phase("round 1: rollouts", 20, 40)
        view.round(1, METRICS)
    lines = err.getvalue().splitlines()
    assert lines == [
        "round 1: rollouts: 10 of 40, ETA 1:33",
        "round 1/3  reward 0.250  passed 0.125  compiled 0.750  tests 0.50  library 17  1,234 tok/s  elapsed 0:40",
    ]


def test_a_round_shows_its_language_and_only_terms_that_occur():
    metrics = {**METRICS, "reward/no_panics": 0.5, "reward/warnings": 0.0}
    for languages, words, others in ((["python"], "no exits 0.50", "panic"), (["rust"], "no panics 0.50", "exits")):
        err = io.StringIO()
        with RoundsView(PlainReporter(err=err), 3, title="tuned", languages=languages) as view:
            view.round(1, metrics)
        assert words in err.getvalue()
        assert others not in err.getvalue()
        assert "warnings" not in err.getvalue()


def test_on_a_terminal_it_is_a_panel():
    reporter = RichReporter(io.StringIO(), io.StringIO())
    reporter.console = Console(file=io.StringIO(), force_terminal=True, width=90)
    with RoundsView(reporter, 3, title="tuned") as view:
        view.round(1, METRICS)
        view.phase("round 2: rollouts", 5, 40)
    shown = reporter.console.file.getvalue()
    for words in ("tuned · round 1 of 3", "round 2: rollouts: 5 of 40", "reward 0.250", "library 17", "1,234 tok/s"):
        assert words in shown
