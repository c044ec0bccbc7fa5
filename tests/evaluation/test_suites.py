"""Right answers score 1, wrong ones 0, and an interrupted evaluation ends with the same figures."""

import json

import pytest

from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.evaluation.complete_problems import complete_problems, drawing, fingerprint, judge_completions
from nanochat_cli.evaluation.problem import Problem
from nanochat_cli.evaluation.problems import load_problems
from nanochat_cli.evaluation.sample_file import SampleFile
from nanochat_cli.evaluation.suite_report import results, scores, table
from nanochat_cli.evaluation.suites import SuiteOptions, problem_suite
from nanochat_cli.inference.batched import Completion
from nanochat_cli.report.reporter import QuietReporter
from nanochat_cli.sandbox.pool import SandboxPool
from nanochat_cli.sandbox.sandbox import Limits, Sandbox
from tests.evaluation.authors import Author, ByteTokenizer
from tests.evaluation.programs import needs_rustc

OPTIONS = SuiteOptions(samples=2, ks=(1, 2), temperatures=(0.8,), max_tokens=600)


@pytest.fixture(scope="module")
def pool():
    with SandboxPool(Sandbox(Limits(wall=5, cpu=4))) as pool:
        yield pool


def evaluated(folder, problems, answers, pool, options=OPTIONS, resume=False, author=None):
    author = author or Author(answers)
    reporter = QuietReporter()
    with SampleFile(folder, {"problems": fingerprint(problems)}, resume=resume) as file:
        complete_problems(problems, drawing(author, ByteTokenizer(), options), pool, options, file, reporter, "test")
        return scores(file.records, options.ks, options.temperatures)


def solutions(problems):
    return {problem.prompt: problem.solution for problem in problems}


@pytest.mark.parametrize("language", ["python", pytest.param("rust", marks=needs_rustc)])
def test_known_solutions_score_one_and_known_bad_ones_zero(language, pool, tmp_path):
    every = load_problems(language)
    problems = every[:: len(every) // (6 if language == "python" else 2)]
    good = evaluated(tmp_path / "good", problems, solutions(problems), pool)
    assert [one.value for one in good[0].passes] == [1.0, 1.0]
    assert (good[0].compiled, good[0].rejected, good[0].cut) == (1.0, 0.0, 0.0)
    nothing = "    pass\n" if language == "python" else "    todo!()\n}\n"
    bad = evaluated(tmp_path / "bad", problems, {problem.prompt: nothing for problem in problems}, pool)
    assert [one.value for one in bad[0].passes] == [0.0, 0.0]
    assert bad[0].compiled == 1.0
    assert bad[0].rejected == 1.0


def test_figures_are_those_of_pass_at_k_over_problems(pool, tmp_path):
    problems = load_problems("python")[:3]
    answers: dict[str, str | list[str]] = {problem.prompt: "    pass\n" for problem in problems}
    answers[problems[0].prompt] = problems[0].solution or ""
    answers[problems[1].prompt] = [problems[1].solution or "", "    pass\n", "    return (\n", "    pass\n"]
    options = SuiteOptions(samples=4, ks=(1, 2), temperatures=(0.5,), max_tokens=600)
    found = evaluated(tmp_path, problems, answers, pool, options)
    first, second = found[0].passes
    assert first.value == pytest.approx((1 + 1 / 4 + 0) / 3)
    assert second.value == pytest.approx((1 + 1 / 2 + 0) / 3)  # 1 − C(3, 2) / C(4, 2)
    assert first.interval is not None
    assert first.interval[0] < first.value < first.interval[1]
    assert found[0].compiled == pytest.approx((1 + 3 / 4 + 1) / 3)
    columns, rows = table("python", found)
    assert columns[3:7] == ("pass@1", "95 % interval", "pass@2", "95 % interval")
    assert rows[0][:4] == (0.5, "all", 3, first.value)
    named = {(one.case, one.metric): one.value for one in results("python", found)}
    assert named["python, temperature 0.5", "pass@1"] == first.value
    assert named["python, temperature 0.5", "pass@1, low end of the 95 % interval"] == first.interval[0]


def test_an_interrupted_evaluation_continues_where_it_was_and_gives_the_same_figures(pool, tmp_path):
    problems = load_problems("python")[:5]
    answers = {problem.prompt: [problem.solution or "", "    pass\n"] for problem in problems}
    options = SuiteOptions(samples=3, ks=(1, 3), temperatures=(0.2, 0.8), max_tokens=600)
    whole = evaluated(tmp_path / "whole", problems, answers, pool, options)

    class Killed(Author):
        def next_logits(self, tokens, cache, /):
            if len(self.read) == 4:
                raise KeyboardInterrupt
            return super().next_logits(tokens, cache)

    folder = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        evaluated(folder, problems, answers, pool, options, author=Killed(answers))
    lines = (folder / "samples.jsonl").read_bytes().splitlines(keepends=True)
    assert 2 <= len(lines) < 5
    with (folder / "samples.jsonl").open("ab") as file:
        file.write(lines[0][:40])  # what a power cut may leave
    with pytest.raises(ConfigError, match="continue it with --resume"):
        evaluated(folder, problems, answers, pool, options)
    author = Author(answers)
    assert evaluated(folder, problems, answers, pool, options, resume=True, author=author) == whole
    assert len(author.read) == 10 - len(lines)
    assert (folder / "samples.jsonl").read_bytes() == (tmp_path / "whole" / "samples.jsonl").read_bytes()


def test_other_problems_or_a_second_writer_are_refused(pool, tmp_path):
    problems = load_problems("python")[:2]
    evaluated(tmp_path, problems, solutions(problems), pool)
    with pytest.raises(ConfigError, match=r"was evaluated with problems = .*choose another --out"):
        evaluated(tmp_path, problems[:1], solutions(problems), pool, resume=True)
    with (
        SampleFile(tmp_path, {}, resume=True),
        pytest.raises(DataError, match="another evaluation writes to it"),
    ):
        SampleFile(tmp_path, {}, resume=True)


def test_a_prompt_that_does_not_fit_counts_as_failed(pool, tmp_path):
    problems = load_problems("python")[:2]
    problems[1] = Problem("long", "python", problems[1].prompt + "    # " + "x" * 2100 + "\n", problems[1].tests)
    found = evaluated(tmp_path, problems, solutions(problems), pool)
    assert (found[0].problems, found[0].too_long, found[0].passes[0].value) == (2, 1, 0.5)


@needs_rustc
def test_the_brace_of_rust_is_restored_only_where_generation_stopped_at_it(pool):
    asked = Problem("f", "rust", "fn f(a: i32) -> i32 {\n", (), stop=("\n}",))
    for finish in ("stop", "length", "eos"):
        (found,) = judge_completions(asked, [Completion("    a + 1", (1,), (0.0,), finish)], pool)
        assert found["compiled"] == found["passed"] == (finish == "stop"), finish


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"samples": 4, "ks": (1, 5)}, "--samples 4 is too few for pass@5"),
        ({"ks": (0,)}, "--k 0: needs whole numbers of at least 1"),
        ({"temperatures": (-1.0,)}, "--temperature -1"),
        ({"temperatures": (0.0, 0.8)}, "--temperature 0 draws the same completion 10 times"),
        ({"ks": (1, 1)}, "each value once"),
        ({"top_p": 0.0}, "--top-p 0"),
    ],
)
def test_senseless_settings_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        SuiteOptions(**values)


def test_problems_that_nothing_can_pass_are_left_out_and_an_unknown_suite_is_named(tmp_path):
    row = {"task_id": "Rust/1", "prompt": "fn f() -> u8 {\n", "declaration": "use rand::Rng;\nfn f() -> u8 {\n"}
    row |= {"canonical_solution": "    rand::random()\n}\n", "test": "mod tests {\n#[test]\nfn t() { f(); }\n}\n"}
    ours = {"id": "a", "language": "python", "prompt": "def f():\n", "tests": [{"call": "f()", "expected": "1"}]}
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{json.dumps(row)}\n{json.dumps(ours)}\n")
    reporter = QuietReporter()
    assert [problem.id for problem in problem_suite(str(path), None, reporter)] == ["a"]
    with pytest.raises(ConfigError, match="--suite humanevil: choose from bpb, compile, python, rust, humaneval"):
        problem_suite("humanevil", None, reporter)
