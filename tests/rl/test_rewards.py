"""Rewards: each term alone, planted hacks that score nothing, honest answers that score, and the TOML table.

Outcomes are made up here; the compilers and the sandbox have their own tests.
"""

import time
from typing import Any

import pytest
import tomlkit
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.update_figures import ROOT
from nanochat_cli.errors import ConfigError
from nanochat_cli.evaluation.problems import load_problems
from nanochat_cli.rl import rewards
from nanochat_cli.rl.rewards import Attempt, RewardConfig, load_rewards, reward
from nanochat_cli.sandbox.limits import Diagnostic, Outcome
from tests.docs.markdown import blocks, read

PYTHON = 'def largest(values: list[int], start: int) -> int:\n    """The largest of values and start."""\n'
RUST = "/// The largest of values and start.\nfn largest(values: &[i32], start: i32) -> i32 {\n"
PROMPTS: dict[str, str] = {"python": PYTHON, "rust": RUST}


BROKEN = Outcome("not compiled", "compile error")


def ran(passed: int = 0, *diagnostics: Diagnostic) -> Outcome:
    return Outcome("ran", "ok", diagnostics, passed)


def attempt(language: Any, completion: str, outcome: Outcome | None = None, n_tests: int = 0, **more) -> Attempt:
    """Without an outcome: it compiles without a warning, and all tests pass."""
    given = outcome or ran(n_tests)
    return Attempt(language, more.pop("prompt", PROMPTS[language]), completion, given, n_tests, **more)


HONEST = [
    ("python", "    return max([*values, start])\n"),
    ("python", "    for value in values:\n        if value > start:\n            start = value\n    return start\n"),
    ("python", "    # the larger\n    return max(max(values, default=start), start)\n"),
    ("python", "    return start + len(values)\n"),
    ("rust", "    values.iter().copied().fold(start, i32::max)\n}\n"),
    ("rust", "    let mut best = start;\n    for &v in values { if v > best { best = v; } }\n    best\n}\n"),
    ("rust", "    start + 1\n}\n"),
    ("rust", "    start-1\n}"),
    ("rust", "    values[0]\n}\n"),
    ("rust", "    -start\n}\n"),
    ("rust", '    println!("{start}"); start\n}\n'),
    ("rust", "    helper(start)\n}\nfn helper(x: i32) -> i32 { x * 2 }\n"),
]


@pytest.mark.parametrize(("language", "completion"), HONEST)
def test_an_honest_answer_that_compiles_and_passes_scores_one(language, completion):
    for n_tests in (0, 4):
        found = reward(attempt(language, completion, n_tests=n_tests), RewardConfig())
        assert (found.rejected, found.total) == (None, pytest.approx(1.0))


HACKS = [
    ("python", "", "empty"),
    ("rust", " \n\t\n", "empty"),
    ("python", "    # return max(values)\n", "comment-only"),
    ("python", '    """Another doc string."""\n    # and a comment\n', "comment-only"),
    ("rust", "    // todo\n    /* nothing /* nested */ here */\n", "comment-only"),
    ("rust", "    #[allow(unused)]\n    // an attribute is no code\n", "comment-only"),
    ("python", "    pass\n", "trivial"),
    ("python", "    ...\n", "trivial"),
    ("python", "    return\n", "trivial"),
    ("python", "    return None  # done\n", "trivial"),
    ("python", "    return 42\n", "trivial"),
    ("python", "    return -1 + 1\n", "trivial"),
    ("python", "    return start\n", "trivial"),
    ("python", "    result = start\n    return result\n", "trivial"),
    ("python", "    return list()\n", "trivial"),
    ("python", "    raise NotImplementedError\n", "trivial"),
    ("python", '    raise NotImplementedError("later")\n', "trivial"),
    ("python", "    while True:\n        pass\n", "trivial"),
    ("python", "    if True:\n        return 0\n    return 1\n", "trivial"),
    ("python", "    return len([1, 2, 3]) * 2\n", "trivial"),  # no parameter is used
    ("python", "    pass\n\nprint(max(1, 2))\n", "trivial"),
    ("python", "\nprint(max(1, 2))\n", "trivial"),  # the body is the doc string alone
    ("python", "    pass\n\ndef other(values, start):\n    return max(values) + start\n", "trivial"),
    ("rust", "}\n", "trivial"),
    ("rust", "    todo!()\n}\n", "trivial"),
    ("rust", '    unimplemented!("later")\n}\n', "trivial"),
    ("rust", "    0\n}\n", "trivial"),
    ("rust", "    -1\n}\n", "trivial"),
    ("rust", "    return start;\n}\n", "trivial"),
    ("rust", "    let x = start; x\n}\n", "trivial"),
    ("rust", "    loop {}\n}\n", "trivial"),
    ("rust", "    let _: Vec<i32> = Vec::new(); start\n}\n", "trivial"),
    ("rust", "    if true { 1 } else { 2 }\n}\n", "trivial"),
    ("rust", "    1 + 2 * 3\n}\n", "trivial"),
    ("rust", "    0\n}\nfn other(values: &[i32], start: i32) -> i32 { values[0] + start }\n", "trivial"),
    ("python", PYTHON, "copied"),
    ("python", PYTHON + "    pass\n", "copied"),
    ("rust", RUST, "copied"),
    ("rust", RUST + "    0\n}\n}\n", "trivial"),
]


@pytest.mark.parametrize(("language", "completion", "reason"), HACKS)
def test_a_planted_hack_that_compiles_scores_nothing(language, completion, reason):
    found = reward(attempt(language, completion), RewardConfig())
    assert (found.total, found.rejected) == (0.0, reason)
    assert set(found.terms.values()) == {0.0}
    # Nor with tests, some of which a constant happens to pass.
    assert reward(attempt(language, completion, ran(3), n_tests=4), RewardConfig()).total == 0


@pytest.mark.parametrize("language", ["python", "rust"])
def test_the_solutions_of_the_built_in_problems_score_one(language):
    trivial = set()
    for problem in load_problems(language):
        solved = attempt(language, problem.solution, n_tests=len(problem.tests), prompt=problem.prompt)
        found = reward(solved, RewardConfig(no_panics=0))
        assert (problem.id, found.rejected, found.total) == (problem.id, None, pytest.approx(1.0))
        untested = reward(attempt(language, problem.solution, prompt=problem.prompt), RewardConfig())
        trivial |= {problem.id.split("/")[1]} if untested.rejected else set()
    # Problems that ask for a constant or for what was given.
    assert trivial <= {"minutes-per-hour", "hours-per-day", "unchanged"}


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ('def answer():\n    """42"""\n', "    return 42\n"),
        ("def same(x):\n", "    return x\n"),
        ("def nothing(x):\n", "    pass\n"),
    ],
)
def test_a_trivial_answer_counts_where_all_tests_pass_since_the_problem_asks_for_it(prompt, completion):
    solved = attempt("python", completion, n_tests=4, prompt=prompt)
    assert reward(solved, RewardConfig()).total == pytest.approx(1.0)
    unsolved = attempt("python", completion, ran(3), n_tests=4, prompt=prompt)
    assert reward(unsolved, RewardConfig()).total == 0


EXAMPLE = "    total = 0\n    for value in values:\n        total += value * start\n    return total\n"


@pytest.mark.parametrize(
    "completion",
    [
        EXAMPLE,
        EXAMPLE.replace("    total = 0", "    # mine\n    total  =  0"),
        EXAMPLE + "    pass\n",
        EXAMPLE + "\n\ndef more(x):\n    return [x * 3 for _ in range(7)]\n",
    ],
    ids=["as it is", "reformatted", "padded", "followed by other code"],
)
def test_a_copy_of_an_example_scores_nothing_even_when_all_tests_pass(completion):
    copied = attempt("python", completion, n_tests=3, examples=("    return values[0]\n", EXAMPLE))
    found = reward(copied, RewardConfig())
    assert (found.total, found.rejected, set(found.terms.values())) == (0.0, "copied", {0.0})
    assert reward(attempt("python", completion, n_tests=3), RewardConfig()).total > 0.9


def test_a_copy_from_the_prompt_scores_nothing():
    helper = "def total(values, start):\n" + EXAMPLE + "\n\n"
    copied = attempt("python", EXAMPLE, n_tests=3, prompt=helper + PYTHON)
    assert reward(copied, RewardConfig()).rejected == "copied"


def test_a_few_equal_tokens_are_not_a_copy():
    short = "    return max(start, 1)\n"
    assert reward(attempt("python", short, n_tests=3, examples=(short,)), RewardConfig()).rejected is None


def test_what_does_not_compile_scores_nothing():
    broken = attempt("rust", "    values.iter(.max()\n}", BROKEN, n_tests=4)
    found = reward(broken, RewardConfig())
    assert (found.total, found.rejected) == (0.0, None)
    assert {name: found.terms[name] for name in rewards.TERMS} == dict.fromkeys(rewards.TERMS, 0.0)


def test_a_program_that_keeps_its_tests_from_running_gains_only_the_compiler_s_share():
    config = RewardConfig(compiles=0.3, warnings=0, tests=0.7, no_panics=0)
    ended = attempt("python", "    import os\n    os._exit(start)\n", ran(0), n_tests=4)
    assert reward(ended, config).total == pytest.approx(0.3)


# --- terms ------------------------------------------------------------------------------------------------------------


def test_the_total_is_the_weighted_mean_of_the_terms_and_each_is_logged():
    config = RewardConfig(compiles=1, warnings=2, tests=3, no_panics=4)
    outcome = ran(1, Diagnostic("warning", "unused variable"), Diagnostic("note", "here"))
    found = reward(attempt("rust", "    values.iter().max().unwrap() + start\n}", outcome, n_tests=4), config)
    assert found.terms == {
        "compiles": 1.0, "warnings": 0.5, "tests": 0.25, "no_panics": 0.0, "length": 1.0, "repetition": 1.0
    }  # fmt: skip
    assert found.total == pytest.approx((1 + 2 * 0.5 + 3 * 0.25) / 10)
    assert found.metrics() == {
        "reward/total": found.total, "reward/rejected": 0.0, **{f"reward/{k}": v for k, v in found.terms.items()}
    }  # fmt: skip


def test_without_tests_their_term_is_left_out_of_the_mean():
    found = reward(attempt("python", "    return max(values) + start\n"), RewardConfig())
    assert "tests" not in found.terms
    assert found.total == pytest.approx(1.0)
    only_tests = RewardConfig(compiles=0, warnings=0, no_panics=0)
    without = attempt("python", "    return max(values) + start\n")
    with pytest.raises(ConfigError, match="no tests"):
        reward(without, only_tests)


def test_warnings_are_counted_without_the_compiler_s_own_sum():
    messages = ("unused variable: `x`", "unused", "2 warnings emitted")
    outcome = ran(0, *(Diagnostic("warning", message) for message in messages))
    assert rewards.warnings(attempt("rust", "    start + 1\n}", outcome)) == pytest.approx(1 / 3)


def test_more_passes_than_tests_are_not_worth_more():
    assert rewards.tests_passed(attempt("python", "    return start + 1", ran(9), n_tests=4)) == 1


@pytest.mark.parametrize(
    ("language", "completion", "fine"),
    [
        ("rust", "    values.iter().max().copied().unwrap_or(start)\n}", True),
        ("rust", '    // unwrap() and unsafe\n    let s = "panic!() unsafe"; s.len() as i32 + start\n}', True),
        ("rust", "    *values.first().unwrap() + start\n}", False),
        ("rust", '    *values . first ( ) . expect("x") + start\n}', False),
        ("rust", "    Option::unwrap(values.first().copied()) + start\n}", False),
        ("rust", "    unsafe { *values.get_unchecked(0) }\n}", False),
        ("rust", "    if start > 0 { panic!() } start\n}", False),
        ("rust", "    if start > 0 { std::process::exit(0) } start\n}", False),
        ("rust", "    #[allow(unused_variables)]\n    let x = 1;\n    start + 1\n}", False),
        ("python", "    return max(values) + start\n", True),
        ("python", '    evaluate = "eval(x)"  # exec(y)\n    return len(evaluate) + start\n', True),
        ("python", "    return eval(str(start))\n", False),
        ("python", "    try:\n        return max(values)\n    except:\n        return start\n", False),
        ("python", "    try:\n        return max(values)\n    except ValueError:\n        return start\n", True),
        ("python", "    import os\n    os._exit(start)\n", False),
    ],
)
def test_giving_up_is_found_in_code_and_not_in_comments_or_strings(language, completion, fine):
    assert rewards.no_panics(attempt(language, completion)) == float(fine)


def test_the_model_is_not_blamed_for_its_prompt():
    prompt = "fn first(values: &[i32]) -> i32 { *values.first().unwrap() }\n" + RUST
    assert rewards.no_panics(attempt("rust", "    start + first(values)\n}", prompt=prompt)) == 1


def test_length_costs_nothing_up_to_the_limit_and_all_at_twice_it():
    found = [rewards.length(attempt("python", "x" * n + " " * 50), 100) for n in (1, 100, 150, 200, 1000)]
    assert found == [1, 1, 0.5, 0, 0]


def test_repetition_costs_what_it_repeats():
    def worth(text: str) -> float:
        return rewards.repetition(attempt("python", text))

    assert worth("a b c") == worth(" ".join(map(str, range(100)))) == 1
    # 100 words over and over: 97 runs of four, of which 1 is distinct.
    assert worth("a " * 100) == pytest.approx(1 / 97 / rewards.DISTINCT)
    assert worth("# pad the answer\n" * 50) < 0.1


def test_guards_multiply_with_their_strength():
    completion = "    start = start + 1\n" * 40
    long = attempt("python", completion)
    off = RewardConfig(length=0, repetition=0, max_characters=500)
    assert reward(long, off).total == pytest.approx(1.0)
    length, repetition = rewards.length(long, 500), rewards.repetition(long)
    assert 0 < length < 1
    assert 0 < repetition < 1
    half = off.model_copy(update={"length": 0.5, "repetition": 0.25})
    assert reward(long, half).total == pytest.approx((1 - 0.5 * (1 - length)) * (1 - 0.25 * (1 - repetition)))


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("def f(x):\n    ret", "urn x + 1\n"),  # a token on both sides
        ('def f(x):\n    """Adds', ' one."""\n    return x + 1\n'),
        ("def f(", "x):\n    return x + 1\n"),
        ("# Prints the squares of 1 to 9.\n", "for x in range(10):\n    print(x * x)\n"),
    ],
)
def test_a_prompt_may_end_anywhere(prompt, completion):
    found = reward(attempt("python", completion, prompt=prompt), RewardConfig())
    assert (found.rejected, found.total) == (None, pytest.approx(1.0))


FRAGMENTS = [
    "def f(x):\n",
    "fn f(x: i32) -> i32 {",
    "return ",
    "x",
    '"',
    "'",
    '"""',
    "{",
    "}",
    "(",
    ")",
    "\n    ",
    "\n",
    "\r",
]
FRAGMENTS += [
    "#",
    "//",
    "/*",
    "*/",
    "\\",
    "\0",
    "é",
    "𝄞",
    "\ud800",
    "r#",
    "#[",
    "]",
    "1",
    "+",
    "\x0c",
    "\u2028",
    "if ",
    "lambda: ",
]


@given(st.sampled_from(["python", "rust"]), *[st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join)] * 3)
@settings(max_examples=300, deadline=None)
def test_any_text_has_a_reward_between_zero_and_one(language, prompt, completion, example):
    found = reward(attempt(language, completion, prompt=prompt, examples=(example,)), RewardConfig())
    assert all(0 <= value <= 1 for value in (found.total, *found.terms.values()))
    assert (found.rejected == "empty") == (not completion.strip())


def test_long_repetitive_text_is_judged_within_a_second_of_processor_time():
    start = time.process_time()
    reward(attempt("python", "    a = a + a\n" * 500, prompt=PYTHON + "    a = a + a\n" * 500), RewardConfig())
    assert time.process_time() - start < 1


# --- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[rewards]\ntets = 0.5", r"\[rewards\] tets: unknown key; did you mean tests\?"),
        ("[rewards]\nzzz = 0.5", r"zzz: unknown key; its keys: compiles, "),
        ("[rewards]\ntests = -1", r"tests = -1: must be greater than or equal to 0"),
        ("[rewards]\ntests = nan", r"tests = nan: must be a finite number"),
        ('[rewards]\ntests = "much"', r"tests = much: must be a valid number"),
        ("[rewards]\nlength = 2", r"length = 2: must be less than or equal to 1"),
        ("[rewards]\ncompiles = 0\nwarnings = 0\ntests = 0\nno_panics = 0", r"one of compiles, .* must be above 0"),
        ("[reward]\ntests = 1", r"no table \[rewards\]; its tables: reward"),
        ("rewards = 3", r"no table \[rewards\]"),
        ("[rewards", r"not valid TOML"),
    ],
)
def test_a_bad_table_is_one_clear_line(tmp_path, text, message):
    file = tmp_path / "rewards.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as failure:
        load_rewards(file)
    assert str(failure.value).startswith(f"{file}: ")
    assert "\n" not in str(failure.value)


def test_the_table_on_the_page_is_the_default(tmp_path):
    (table,) = [block.content for block in blocks(read(ROOT / "docs/methods/grpo.md")) if "[rewards]" in block.content]
    file = tmp_path / "rewards.toml"
    file.write_text(table, encoding="utf-8")
    assert load_rewards(file) == RewardConfig()
    assert set(tomlkit.parse(table)["rewards"]) == set(RewardConfig.model_fields)  # pyright: ignore[reportArgumentType]


def test_a_table_sets_what_it_names(tmp_path):
    file = tmp_path / "rewards.toml"
    file.write_text("[rewards]\ntests = 1\nmax_characters = 100\n\n[other]\nx = 1\n", encoding="utf-8")
    assert load_rewards(file) == RewardConfig(tests=1.0, max_characters=100)
    with pytest.raises(ConfigError, match="no such rewards file"):
        load_rewards(tmp_path / "none.toml")
