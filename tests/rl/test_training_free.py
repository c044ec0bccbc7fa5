"""Training-free GRPO: the examples in prompts, what is remembered, and rounds that can be stopped and continued."""

import io
import os
import signal

import pytest
import torch

from nanochat_cli.config.sections.grpo import GRPOConfig
from nanochat_cli.errors import DataError, Interrupted
from nanochat_cli.formats.open import load_run
from nanochat_cli.formats.run import checkpoints
from nanochat_cli.report.metrics_log import read_metrics
from nanochat_cli.report.reporter import PlainReporter
from nanochat_cli.rl.evaluation_pair import ProblemScore, differences
from nanochat_cli.rl.experience import Experience, ExperienceLibrary
from nanochat_cli.rl.judging import Judge
from nanochat_cli.rl.lessons import Lessons
from nanochat_cli.rl.rewards import RewardConfig
from nanochat_cli.rl.rollouts import Sampler
from nanochat_cli.rl.run_grpo import plain
from nanochat_cli.rl.training_free import Conditioning, remember
from nanochat_cli.sandbox.limits import Outcome
from tests.rl.tiny_run import ReadingPool, grpo_run, problems

TIMINGS = ("seconds", "throughput/")


@pytest.fixture
def sampler(source):
    model, tokenizer, _ = load_run(source)
    sampler = Sampler(tokenizer, 1.0, 20, seed=5)
    sampler.refresh(model)
    return sampler


def experience(number, advantage=0.5, language="python"):
    prompt, answer = f"def add_{number}(x):\n", f"    return x + {number}\n"
    return Experience(prompt, answer, 1.0, advantage, 0.0, {"language": language})


@pytest.fixture
def library(tmp_path):
    library = ExperienceLibrary(tmp_path / "library.jsonl")
    library.add([*(experience(n) for n in range(2, 8)), *(experience(n, 9.0, "rust") for n in range(20, 30))])
    return library


def conditioning(library, sampler, *, lessons=(), number=1, seed=0, **grpo):
    return Conditioning(library, Lessons(16, list(lessons)), sampler, GRPOConfig(**grpo), seed, number)


def test_examples_are_of_other_problems_of_the_same_language(library, sampler, tmp_path):
    shown = set()
    for number in range(30):
        make = conditioning(library, sampler, number=number)
        for problem in problems(tmp_path):
            prompt = make(problem)
            assert prompt.text.endswith(problem.prompt)
            assert prompt.text.count("def add_") == 3
            assert prompt.text.count(problem.prompt) == 1
            assert "def add_2" not in prompt.text.removesuffix(problem.prompt) or problem.id != "add-2"
            assert all(f"add_{n}" not in prompt.text for n in range(20, 30))
            assert len(prompt.examples) == 2
            assert all(example.rstrip() in prompt.text for example in prompt.examples)
            shown.add(prompt.text)
    assert len(shown) > 50


def test_the_same_round_and_problem_are_shown_the_same(library, sampler, tmp_path):
    problem = problems(tmp_path)[0]
    one = conditioning(library, sampler)(problem)
    assert one == conditioning(library, sampler)(problem)
    others = {conditioning(library, sampler, seed=seed)(problem).text for seed in range(20)}
    assert len(others) > 5


def test_examples_that_do_not_fit_the_context_are_left_out_but_never_the_problem(library, sampler, tmp_path):
    problem = problems(tmp_path)[0]
    prompt = conditioning(library, sampler, shots=5)(problem)
    assert sampler.has_room(prompt.text)
    assert 1 <= len(prompt.examples) < 5
    assert prompt.text.endswith(problem.prompt)
    advice = ["never trust a word " * 8] * 8
    assert conditioning(library, sampler, lessons=advice, shots=0)(problem).text == problem.prompt


def test_lessons_are_comments_before_the_examples(library, sampler, tmp_path):
    problem = problems(tmp_path)[0]
    prompt = conditioning(library, sampler, lessons=["Read the name."], shots=1)(problem)
    assert prompt.text.startswith("# Read the name.\n\ndef add_")
    assert "Read the name." in prompt.examples


def test_no_shots_show_nothing(library, sampler, tmp_path):
    problem = problems(tmp_path)[0]
    assert conditioning(library, sampler, shots=0)(problem).text == problem.prompt


def test_answers_better_than_their_group_are_remembered(sampler, tmp_path):
    library = ExperienceLibrary(tmp_path / "new.jsonl")
    judge = Judge(ReadingPool(), RewardConfig())
    for problem in problems(tmp_path):
        group = judge(sampler.group(problem, plain(problem), 8, 1))
        mean = sum(judged.reward.total for judged in group) / len(group)
        better = [judged for judged in group if judged.reward.total > mean]
        before = len(library)
        assert remember(library, group, GRPOConfig(), 1) == len(better)
        added = library.experiences[before:]
        assert [one.response for one in added] == [judged.code for judged in better]
        assert all(one.metadata["problem"] == problem.id and one.prompt == problem.prompt for one in added)
    assert len(library) > 5


def library_lines(run_dir):
    found = ExperienceLibrary(run_dir / "experiences.jsonl").experiences
    return [(one.prompt, one.response, one.reward, one.advantage, one.metadata) for one in found]


def untimed(run_dir):
    return [{k: v for k, v in line.items() if not k.startswith(TIMINGS)} for line in read_metrics(run_dir)]


class StoppingPool(ReadingPool):
    """Sends this process a signal after judging a given number of programs."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    def judge_all(self, programs):
        if self.seen <= self.after < self.seen + len(programs):
            os.kill(os.getpid(), signal.SIGINT)
        return super().judge_all(programs)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run = grpo_run(source, folder, rounds=3, seed=4)  # one with right answers of each kind of problem
    run.run()
    return run


def test_the_weights_stay_and_the_library_grows(whole, source):
    ours, theirs = (checkpoints.load(run).tensors["model"] for run in (whole.run_dir, source))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    lines = read_metrics(whole.run_dir)
    assert [line["step"] for line in lines] == [1, 2, 3]
    sizes = [line["library/size"] for line in lines]
    assert 0 < sizes[0] <= sizes[1] <= sizes[2] == len(whole.library)
    held_out = {problem.prompt for problem in whole.problems.held_out}
    assert held_out
    assert not held_out & {one.prompt for one in whole.library.experiences}


def test_the_report_has_every_measure_before_and_after_with_intervals(whole):
    report = (whole.run_dir / "report.md").read_text()
    for words in ("practised (5)", "held out (1)", "pass@1", "best of n", "compile rate", "training-free"):
        assert words in report
    assert report.count("[") >= 3 * 4


@pytest.mark.parametrize("stop_after", [30, 50, 70])  # in the first round, in the second, in the third
def test_a_run_stopped_by_a_signal_continues_as_if_it_had_not_been(source, tmp_path, whole, stop_after, capsys):
    run = grpo_run(source, tmp_path, rounds=3, seed=4, pool=StoppingPool(stop_after))
    run.reporter = PlainReporter()
    with pytest.raises(Interrupted, match=r"stopped by SIGINT: \d of 3 rounds are saved; continue with: nanochat grpo"):
        run.run()
    said = capsys.readouterr().err
    assert "SIGINT: stopping after this problem or update" in said
    assert f"nanochat grpo --resume {run.run_dir} continues after the last whole round" in said
    resumed = grpo_run(source, tmp_path, rounds=3, seed=4, resume=True)
    assert resumed.round < 3
    resumed.run()
    assert library_lines(resumed.run_dir) == library_lines(whole.run_dir)
    assert untimed(resumed.run_dir) == untimed(whole.run_dir)
    one, other = ((run_dir / "report.md").read_text() for run_dir in (resumed.run_dir, whole.run_dir))
    assert [line for line in one.splitlines() if line[:1] == "|"] == [x for x in other.splitlines() if x[:1] == "|"]


def test_a_run_is_not_continued_with_other_problems(source, tmp_path, monkeypatch):
    run = grpo_run(source, tmp_path, rounds=1)
    run.run()
    with pytest.raises(DataError, match=r"not the problems that .* began with"):
        grpo_run(source, tmp_path, rounds=2, resume=True, limit=3)
    monkeypatch.setattr("tests.rl.tiny_run.STOP", ["\ndef ", "\nclass "])  # the same names
    with pytest.raises(DataError, match=r"its problems have changed since .* began"):
        grpo_run(source, tmp_path, rounds=2, resume=True)


class NothingCompiles:
    """A sandbox that finds a syntax error in everything."""

    def judge_all(self, programs):
        return [Outcome("not compiled", "compile error", total=len(program.tests)) for program in programs]


@pytest.mark.parametrize("mode", ["training-free", "policy"])
def test_a_run_that_learned_nothing_says_so_without_rows_of_zeros(source, tmp_path, mode):
    run = grpo_run(source, tmp_path, rounds=1, pool=NothingCompiles(), mode=mode, max_tokens=4, eval_samples=1)
    out, err = io.StringIO(), io.StringIO()
    run.reporter = PlainReporter(out=out, err=err)
    report = run.run().read_text()
    assert not run.learned
    assert "in none of 5 groups did rewards differ (mean 0.000)" in err.getvalue()
    assert "nothing was learned: " in err.getvalue()
    assert "8 of 8 measures are 0 before and after" in err.getvalue()
    assert "0.000 [" not in out.getvalue() + report


def test_a_difference_is_paired_by_problem():
    before = {
        name: ProblemScore(4, solved, 4, solved > 0, solved / 4) for name, solved in (("a", 0), ("b", 4), ("c", 1))
    }
    after = {
        name: ProblemScore(4, solved, 2, solved > 0, solved / 4) for name, solved in (("a", 1), ("b", 4), ("c", 2))
    }
    found = {(one.problems, one.measure): one for one in differences({"all": "abc", "none": ""}, before, after)}
    assert {problems for problems, _ in found} == {"all"}
    passed = found["all", "pass@1"]
    assert passed.before == pytest.approx(5 / 12)
    assert passed.after == pytest.approx(7 / 12)
    assert passed.difference == pytest.approx(2 / 12)
    for one in (passed, found["all", "compile rate"]):
        assert one.difference_interval is not None  # three problems leave room on both sides
        assert one.difference_interval[0] < one.difference - 0.1
        assert one.difference_interval[1] > one.difference + 0.1
