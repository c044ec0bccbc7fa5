"""Who owns what: a pure function, complete, and balanced."""

import random

from hypothesis import given
from hypothesis import strategies as st

from nanochat_cli.training.distributed.ownership import cost, owners

SHAPES = st.dictionaries(
    st.text("abc.", min_size=1, max_size=4),
    st.one_of(st.tuples(st.integers(1, 64)), st.tuples(st.integers(1, 64), st.integers(1, 64))),
    min_size=1,
    max_size=30,
)


@given(shapes=SHAPES, ranks=st.integers(1, 8), seed=st.integers(0, 9))
def test_each_parameter_has_one_owner_whatever_the_order_of_the_names(shapes, ranks, seed):
    found = owners(shapes, ranks)
    names = list(shapes)
    random.Random(seed).shuffle(names)
    assert owners({name: shapes[name] for name in names}, ranks) == found
    assert found.keys() == shapes.keys()
    assert set(found.values()) <= set(range(ranks))


@given(shapes=SHAPES, ranks=st.integers(1, 8))
def test_no_rank_has_more_than_another_by_more_than_its_cheapest_parameter(shapes, ranks):
    work = [0] * ranks
    cheapest = [0] * ranks
    for name, owner in owners(shapes, ranks).items():
        work[owner] += cost(shapes[name])
        cheapest[owner] = min(cheapest[owner] or cost(shapes[name]), cost(shapes[name]))
    assert all(mine - min(work) <= least for mine, least in zip(work, cheapest, strict=True))


def test_a_matrix_costs_what_its_orthogonalisation_multiplies():
    assert cost((3, 5)) == 45
    assert cost((7,)) == 7
