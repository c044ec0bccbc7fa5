"""The suite `memorised`: a model that knows its text recites all of it, one that does not none."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import DataError
from nanochat_cli.evaluation.held_out import TokenArray
from nanochat_cli.evaluation.memorised import LENGTH, Recited, memorised_results, places_to_recite, recite
from nanochat_cli.inference.sampling import SamplingConfig
from tests.data.corpora import random_text
from tests.inference.tiny_models import tiny_config

TOKENIZER = Tokenizer.train([random_text(random.Random(seed), 2000) for seed in range(5)], 400)


def stream(documents: int, size: int) -> TokenArray:
    ids: list[int] = []
    for seed in range(documents):
        ids += [*TOKENIZER.encode(random_text(random.Random(seed), size)), TOKENIZER.eos_id]
    return TokenArray(np.array(ids), TOKENIZER.eos_id, ())


class Reciter:
    """Knows a text by heart and says how it goes on after a piece of it, except at the places `wrong`."""

    def __init__(self, text: list[int], wrong: set[int]) -> None:
        self.config = tiny_config(vocab_size=400, max_seq_len=128)
        self.text, self.wrong = text, wrong

    def steps(
        self, model: object, prompts: list[list[int]], sampling: SamplingConfig, *unused: object
    ) -> Iterator[list[int]]:
        """In place of `generate_tokens`."""
        assert model is self
        assert sampling.temperature == 0
        starts = [
            next(at + LENGTH for at in range(len(self.text)) if self.text[at : at + LENGTH] == prompt)
            for prompt in prompts
        ]
        for step in range(sampling.max_tokens):
            yield [-2 if start + step in self.wrong else self.text[start + step] for start in starts]


@pytest.fixture
def recited(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recited]:
    def run(model: Reciter, *arguments: Any) -> Recited:
        monkeypatch.setattr("nanochat_cli.evaluation.memorised.generate_tokens", model.steps)
        return recite(model, TOKENIZER, *arguments)  # pyright: ignore[reportArgumentType] - it needs no more of a model

    return run


def test_stretches_are_different_pieces_of_documents_and_always_the_same() -> None:
    text = stream(8, 3000)
    found = places_to_recite(text, [TOKENIZER.eos_id], 12)
    assert [one.tolist() for one in found] == [one.tolist() for one in places_to_recite(text, [TOKENIZER.eos_id], 12)]
    assert len({tuple(one) for one in found}) == 12
    whole = text.ids.tolist()
    for one in found:
        assert len(one) == 2 * LENGTH
        assert TOKENIZER.eos_id not in one
        assert any(whole[at : at + 2 * LENGTH] == one.tolist() for at in range(0, len(whole), 2 * LENGTH))
    with pytest.raises(DataError, match="no document has 100 tokens"):
        places_to_recite(stream(30, 20), [TOKENIZER.eos_id], 12)


def test_a_model_that_knows_its_text_recites_it_and_a_slip_counts_from_there(
    recited: Callable[..., Recited],
) -> None:
    text = stream(8, 3000)
    stretches = places_to_recite(text, [TOKENIZER.eos_id], 20)
    ids, done = text.ids.tolist(), []
    by_heart = recited(Reciter(ids, set()), stretches, done.append)
    assert by_heart.exact == (1.0,) * 20
    assert by_heart.texts[3] == TOKENIZER.decode(stretches[3][LENGTH:].tolist())
    assert sum(done) == 20
    start = next(at for at in range(len(ids)) if ids[at : at + 100] == stretches[5].tolist())
    slipped = recited(Reciter(ids, {start + LENGTH + 3}), stretches)
    assert slipped.exact == tuple(float(number != 5) for number in range(20))
    assert slipped.correct[5] == 3
    found = {(one.case, one.metric): one for one in memorised_results({"training": slipped})}
    assert found["training documents, 50 tokens after 50", "reproduced exactly"].value == 0.95
    assert found["training documents, 50 tokens after 50", "correct before the first wrong token"].value == 47.65


def test_a_context_that_holds_no_stretch_is_one_line(recited: Callable[..., Recited]) -> None:
    model = Reciter([], set())
    model.config = tiny_config(vocab_size=400, max_seq_len=96)
    with pytest.raises(DataError, match="context of 96 tokens holds no 100"):
        recited(model, [np.zeros(100, dtype=np.int64)])
