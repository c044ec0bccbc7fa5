"""Ends prompts where a token ends: white space that the tokenizer joins with the next line belongs to the completion.

Where a tokenizer joins a line break with the indentation after it, the model has never seen a bare line break before an
indented line. A prompt that ends with one asks for something other than its function, most often for nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from nanochat_cli.evaluation.problem import Problem

Encode = Callable[[str], list[int]]


def at_token_boundary(problem: Problem, encode: Encode) -> Problem:
    """The same problem with a prompt that ends where a token ends.

    White space that `encode` joins with an indented line moves from the end of the prompt to the start of the solution.
    Tokenizers that end a token at each line break join nothing; with them the problem stays as it is.
    """
    prompt = problem.prompt.rstrip()
    space = problem.prompt[len(prompt) :]
    if not prompt or not space:
        return problem
    line = "x" if space[-1] in " \t" else "    x"
    tokens = encode(problem.prompt)
    if encode(problem.prompt + line)[: len(tokens)] == tokens:
        return problem
    return replace(problem, prompt=prompt, solution=None if problem.solution is None else space + problem.solution)


def at_token_boundaries(problems: Sequence[Problem], encode: Encode) -> list[Problem]:
    return [at_token_boundary(problem, encode) for problem in problems]
