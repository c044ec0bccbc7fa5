"""The suite `memorised`: how much of its training text a model recites when it is given the beginning.

After Carlini et al. (arXiv:2202.07646): 50 tokens of training text are the prompt, and the next 50 count as memorised
if the greedy continuation is exactly those. Held-out text beside it tells what is merely predictable, such as licences.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanochat_cli.data.batches import Tokens, permuted
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import DataError
from nanochat_cli.evaluation.share_intervals import share_interval
from nanochat_cli.inference.generate import generate_tokens
from nanochat_cli.inference.language_model import LanguageModel
from nanochat_cli.inference.sampling import SamplingConfig
from nanochat_cli.report.result_file import Result

LENGTH = 50
"""Tokens of a prompt, and of a continuation."""
TOGETHER = 16


@dataclass(frozen=True)
class Recited:
    """exact: for each place whether all LENGTH tokens came back; correct: how many did before the first wrong one.

    texts: the continuations that came back.
    """

    exact: tuple[float, ...]
    correct: tuple[int, ...]
    texts: tuple[str, ...]


def places_to_recite(stream: Tokens, special: Sequence[int], count: int) -> list[NDArray[np.int64]]:
    """At most `count` different stretches of 2 · LENGTH tokens without a special one: int64 [100] each.

    The same stream gives the same ones. Raises DataError if there is none.
    """
    windows = len(stream) // (2 * LENGTH)
    found: list[NDArray[np.int64]] = []
    for place in range(windows):
        start = permuted(place, windows, 0, 0) * 2 * LENGTH
        tokens = stream[start : start + 2 * LENGTH]
        if not np.isin(tokens, special).any():
            found.append(tokens)
            if len(found) == count:
                break
    if not found:
        raise DataError(f"no document has {2 * LENGTH} tokens: there is nothing to recite")
    return found


def recite(
    model: LanguageModel,
    tokenizer: Tokenizer,
    stretches: Sequence[NDArray[np.int64]],
    advance: Callable[[int], None] = lambda done: None,
) -> Recited:
    """Continue the first half of every stretch greedily. Raises DataError if the context holds no stretch."""
    if model.config.max_seq_len < 2 * LENGTH:
        raise DataError(f"the model's context of {model.config.max_seq_len} tokens holds no {2 * LENGTH}")
    correct = []
    for first in range(0, len(stretches), TOGETHER):
        group = np.stack(stretches[first : first + TOGETHER])
        found = np.array(list(_continued(model, tokenizer, group[:, :LENGTH]))).T
        right = np.logical_and.accumulate(found == group[:, LENGTH:], axis=1)
        correct += right.sum(axis=1).tolist()
        advance(len(group))
    texts = [
        tokenizer.decode(stretch[LENGTH:].tolist())
        for stretch, count in zip(stretches, correct, strict=True)
        if count == LENGTH
    ]
    return Recited(tuple(float(count == LENGTH) for count in correct), tuple(correct), tuple(texts))


def memorised_results(recited: dict[str, Recited]) -> list[Result]:
    """The figures of both sides as results of a result file; the ends of an interval are its spread."""
    found = []
    for name, one in recited.items():
        share = sum(one.exact) / len(one.exact)
        case = f"{name} documents, {LENGTH} tokens after {LENGTH}"
        found.append(Result(case, "reproduced exactly", share, "share", spread=share_interval(one.exact)))
        mean = sum(one.correct) / len(one.correct)
        found.append(Result(case, "correct before the first wrong token", mean, "tokens"))
        found.append(Result(case, "places", float(len(one.exact)), "places"))
    return found


def _continued(model: LanguageModel, tokenizer: Tokenizer, prompts: NDArray[np.int64]) -> Iterator[list[int]]:
    """LENGTH steps of one token for each prompt; none ends before."""
    greedy = SamplingConfig(max_tokens=LENGTH, temperature=0)
    for step in generate_tokens(model, prompts.tolist(), greedy, None, tokenizer.never_sampled):
        yield [-1 if token is None else token for token in step]
