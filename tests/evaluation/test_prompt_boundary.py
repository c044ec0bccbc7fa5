"""A prompt ends where a token ends, and moving white space changes neither the problem nor its judgement."""

from dataclasses import replace

import pytest

from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.evaluation.problem import Problem, assemble
from nanochat_cli.evaluation.problems import load_problems
from nanochat_cli.evaluation.prompt_boundary import at_token_boundaries, at_token_boundary
from nanochat_cli.evaluation.rejection_reason import rejection_reason

TEXT = 'def f(a, b):\n    """Return it."""\n    return a + b\n\n\npub fn f(a: u32) -> u32 {\n    a + 1\n}\n' * 20
PROBLEMS = load_problems("python") + load_problems("rust")


@pytest.fixture(scope="module")
def joins() -> Tokenizer:
    """Line breaks and indentation are one token."""
    return Tokenizer.train([TEXT], 400, pre="gpt-2")


@pytest.fixture(scope="module")
def ends_lines() -> Tokenizer:
    """A token ends at each line break."""
    return Tokenizer.train([TEXT], 400, pre="llama3")


def asked(prompt: str) -> Problem:
    return Problem("p", "python", prompt, (), solution="    return a + b\n")


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.id)
def test_a_prompt_and_its_solution_are_the_tokens_of_their_text(problem: Problem, joins: Tokenizer) -> None:
    moved = at_token_boundary(problem, joins.encode)
    assert moved.prompt == problem.prompt.rstrip()
    whole = problem.prompt + (problem.solution or "")
    assert moved.prompt + (moved.solution or "") == whole
    assert joins.encode(moved.prompt) + joins.encode(moved.solution or "") == joins.encode(whole)
    assert joins.encode(problem.prompt) != joins.encode(whole)[: len(joins.encode(problem.prompt))]


def test_a_tokenizer_that_ends_tokens_at_line_breaks_keeps_every_prompt(ends_lines: Tokenizer) -> None:
    problem = asked('def f(a, b):\n    """Return it."""\n')
    assert at_token_boundary(problem, ends_lines.encode) is problem


@pytest.mark.parametrize("prompt", ["def f(a, b):", "def f(a, b): # x", "\n", " "])
def test_a_prompt_without_white_space_to_move_stays(prompt: str, joins: Tokenizer) -> None:
    problem = asked(prompt)
    assert at_token_boundary(problem, joins.encode) is problem


def test_indentation_that_a_token_joins_with_the_line_break_moves_too(joins: Tokenizer) -> None:
    moved = at_token_boundary(replace(asked("def f(a, b):\n    "), solution="return a + b\n"), joins.encode)
    assert (moved.prompt, moved.solution) == ("def f(a, b):", "\n    return a + b\n")
    assert at_token_boundary(replace(asked("def f(a, b):\n"), solution=None), joins.encode).solution is None


@pytest.mark.parametrize("language", ["python", "rust"])
def test_answers_are_assembled_and_rejected_as_before(language: str, joins: Tokenizer) -> None:
    problems = [problem for problem in PROBLEMS if problem.language == language]
    answers = [
        "",
        "    # nothing\n",
        "    return 1\n",
        "    a + 1\n",
        "    pass\n",
        "    b = a\n    return b\n",
        "\n\nx = 1\n",
    ]
    for problem, moved in zip(problems, at_token_boundaries(problems, joins.encode), strict=True):
        space = problem.prompt[len(moved.prompt) :]
        for answer in (problem.solution or "", *answers):
            for stopped in (True, False):
                one = assemble(problem, answer, stopped=stopped)
                other = assemble(moved, space + answer, stopped=stopped)
                assert other.source == one.source
                for solved in (True, False):
                    verdicts = [
                        rejection_reason(problem.language, p.prompt, program.source[len(p.prompt) :], solved=solved)
                        for p, program in ((problem, one), (moved, other))
                    ]
                    assert verdicts[0] == verdicts[1], (problem.id, answer, stopped, solved)


def test_where_tokens_join_no_indented_line_follows_a_line_break_alone(joins: Tokenizer) -> None:
    """Why prompts must not end with a line break: after it, a model of this text learns to write at the margin."""
    tokens = joins.encode(TEXT)
    (line_break,) = joins.encode("\n")
    following = {tokens[index + 1] for index, token in enumerate(tokens[:-1]) if token == line_break}
    assert following
    assert not any(joins.token_bytes(token).startswith(b" ") for token in following)
