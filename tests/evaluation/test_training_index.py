"""The peers of the suite `completion` against plain loops over the training tokens."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_cli.evaluation.training_index import TrainingIndex

SOME = st.lists(st.integers(0, 3), min_size=6, max_size=80)
CONTEXT = st.lists(st.integers(0, 4), max_size=12)


def followers(tokens: list[int], context: list[int], first: int) -> list[int]:
    """Places whose tokens before are `context`, from `first` on."""
    return [
        place
        for place in range(max(first, len(context)), len(tokens))
        if tokens[place - len(context) : place] == context
    ]


def slow_likely(tokens: list[int], context: list[int], before: int) -> int:
    for length in range(min(before, len(context)), -1, -1):
        places = followers(tokens, context[len(context) - length :], before)
        if places:
            counts = Counter(tokens[place] for place in places)
            return min(token for token, count in counts.items() if count == max(counts.values()))
    raise AssertionError


def slow_copied(tokens: list[int], context: list[int], before: int, most: int) -> list[int]:
    for length in range(len(context), 0, -1):
        places = followers(tokens, context[len(context) - length :], before)
        if places:
            return tokens[places[0] : places[0] + most]
    return []


@given(tokens=SOME, context=CONTEXT)
@pytest.mark.parametrize(("vocab_size", "before"), [(5, 4), (65_536, 4), (65_537, 3), (1 << 20, 3)])
def test_the_next_token_and_the_copy_are_those_of_a_search(
    tokens: list[int], context: list[int], vocab_size: int, before: int
) -> None:
    scale = (vocab_size - 1) // 4  # the highest bits count too
    spread, asked = [token * scale for token in tokens], [token * scale for token in context]
    index = TrainingIndex(np.array(spread), vocab_size)
    assert index.before == before
    assert index.likely(asked) == slow_likely(spread, asked, before)
    assert index.copied(asked, 5).tolist() == slow_copied(spread, asked, before, 5)


def test_four_tokens_of_context_are_used_and_a_longer_match_only_to_copy() -> None:
    tokens = np.array([9, 1, 2, 3, 4, 5, 8, 1, 2, 3, 4, 6, 8, 1, 2, 3, 4, 6, 0])
    index = TrainingIndex(tokens, 10)
    assert index.likely([9, 1, 2, 3, 4]) == 6  # twice, after 1 2 3 4
    assert index.copied([9, 1, 2, 3, 4], 2).tolist() == [5, 8]  # after 9 1 2 3 4
    assert index.likely([7]) == slow_likely(tokens.tolist(), [7], 4)
    assert index.copied([7], 4).tolist() == []
