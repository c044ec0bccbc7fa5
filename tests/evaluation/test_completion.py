"""The suite `completion`: which places are asked, how answers are judged, and known contenders with known figures."""

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat_cli.config.sections.fim import FimConfig
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.evaluation.completion import (
    COPIED,
    LEFT_TO_RIGHT,
    WITH_SUFFIX,
    Completer,
    bits_of,
    complete_tasks,
    completion_results,
    completion_scores,
    completion_table,
    model_completers,
    training_completers,
)
from nanochat_cli.evaluation.completion_tasks import (
    Task,
    answer,
    completion_tasks,
    edit_similarity,
    is_answered,
)
from nanochat_cli.evaluation.share_intervals import wilson_interval
from nanochat_cli.evaluation.training_index import TrainingIndex
from nanochat_cli.inference.packed_model import PackedTransformer
from nanochat_cli.report.reporter import QuietReporter
from tests.data.corpora import random_text
from tests.inference.tiny_models import spread_model, tiny_config

CODE = "import os\n\n\ndef f(x, y):\n    # }\n    return x + y\n\n}\n"
TEXTS = [random_text(random.Random(seed), 1500) for seed in range(6)]


def asked(text: str, limit: int = 100) -> list[tuple[str, str]]:
    return [(task.kind, task.truth) for task in completion_tasks([("python", text)], limit)]


def test_lines_after_a_line_and_rests_after_a_blank_are_asked() -> None:
    found = asked(CODE)
    # Not after a blank line, not a line without a word, not before the only word or inside the indentation.
    assert {truth for kind, truth in found if kind == "next line"} == {"\n    return x + y"}
    assert {truth for kind, truth in found if kind == "rest of line"} == {" os", " y):", " + y"}


@given(text=st.lists(st.sampled_from(["a b", "  x", "", "}", "é = 1 # ü", "\tif a:\r"]), max_size=12).map("\n".join))
def test_a_task_is_a_piece_of_its_document(text: str) -> None:
    for task in completion_tasks([("python", text)], 100):
        assert task.prefix + task.truth + task.suffix == text
        assert task.suffix == "" or task.suffix.startswith("\n")
        assert task.prefix.strip()
        assert "\n" not in task.truth.lstrip("\n")
        assert task.truth.startswith("\n" if task.kind == "next line" else " ")


def test_the_same_documents_give_the_same_tasks_whatever_their_order() -> None:
    documents = [("python", text) for text in TEXTS[:3]] + [("rust", text) for text in TEXTS[3:]]
    found = completion_tasks(documents, 7)
    assert sorted(map(str, found)) == sorted(map(str, completion_tasks(documents[::-1], 7)))
    assert len(found) == 7 * 2 * 2
    every = completion_tasks(documents, 10_000)
    assert set(found) < set(every)
    # Fewer are a part of more.
    assert set(completion_tasks(documents, 3)) < set(found)


@pytest.mark.parametrize(
    ("kind", "text", "expected", "complete"),
    [
        ("next line", "\n    return x\n  y", "return x", True),
        ("next line", "\n\n\n    return x", "return x", False),
        ("next line", "  ", "", False),
        ("rest of line", " + y  \n", "+ y", True),
        ("rest of line", "\n    return x", "", True),
        ("rest of line", " + y", "+ y", False),
    ],
)
def test_an_answer_is_a_line_without_its_indentation(kind, text: str, expected: str, complete: bool) -> None:
    assert answer(kind, text) == expected
    assert is_answered(kind, text) == complete


def slow_distance(one: str, other: str) -> int:
    """Levenshtein's recursion."""
    if not one or not other:
        return len(one) + len(other)
    return min(
        slow_distance(one[1:], other) + 1,
        slow_distance(one, other[1:]) + 1,
        slow_distance(one[1:], other[1:]) + (one[0] != other[0]),
    )


@given(one=st.text("ab ", max_size=6), other=st.text("ab ", max_size=6))
def test_edit_similarity_is_one_minus_levenshtein_over_the_longer(one: str, other: str) -> None:
    expected = 1.0 if one == other else 1 - slow_distance(one, other) / max(len(one), len(other))
    assert edit_similarity(one, other) == pytest.approx(expected)


def known(answers: Sequence[str]) -> Completer:
    left = list(answers)
    return lambda task: (left.pop(0), None)


def test_figures_are_means_over_tasks_by_kind_and_language() -> None:
    tasks = [Task("next line", "python", "x = 1", "\n  y = 2", ""), Task("next line", "rust", "x", "\nlet a = b;", "")]
    completers = {"right": known(["\ny = 2\nz", "\nlet a = b;"]), "half": known(["", "let a"])}
    answered = complete_tasks(tasks, completers, QuietReporter())
    found = {(one.language, one.contender): one for one in completion_scores(answered)}
    assert (found["all", "right"].exact, found["all", "right"].similarity) == (1.0, 1.0)
    assert found["all", "half"].similarity == pytest.approx((0 + 0.5) / 2)  # "let a" of "let a = b;"
    assert found["rust", "half"].exact == 0
    assert found["all", "right"].exact_interval == wilson_interval(1.0, 2)
    assert found["all", "right"].bits_per_byte is None
    columns, rows = completion_table(list(found.values()))
    assert len(columns) == len(rows[0])
    values = {(one.case, one.metric): one for one in completion_results(list(found.values()))}
    assert values["next line, all, right", "exact match"].value == 1.0
    assert values["next line, all, right", "exact match"].spread == wilson_interval(1.0, 2)


def test_a_line_that_training_has_is_copied_and_counted() -> None:
    tokenizer = Tokenizer.train(TEXTS, 400)
    training = "".join(f"def f{n}(x):\n    return x * {n}\n\n" for n in range(50))
    tail, eos = tokenizer.encode("tail of it"), tokenizer.eos_id
    ids = [*tokenizer.encode(training), eos, *tail, eos, *tokenizer.encode(training)]
    index = TrainingIndex(np.array(ids), tokenizer.vocab_size)
    completers = training_completers(index, tokenizer, 64)
    assert list(completers) == ["5-gram with back-off", COPIED]
    task = Task("next line", "python", "# x\n\ndef f37(x):", "\n    return x * 37", "\n")
    assert answer("next line", completers[COPIED](task)[0]) == "return x * 37"
    assert answer("next line", completers["5-gram with back-off"](task)[0]).startswith("return x * ")
    last = Task("rest of line", "python", "tail of", " it", "")
    assert all(answer("rest of line", completer(last)[0]) == "it" for completer in completers.values())


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_model_reads_the_suffix_only_if_it_was_trained_to(rate: float) -> None:
    tokenizer = Tokenizer.train(TEXTS, 400)
    model = spread_model(tiny_config(vocab_size=400, max_seq_len=128))
    packed = PackedTransformer.from_model(model)
    completers = model_completers(packed, tokenizer, FimConfig(rate=rate), 8)
    assert list(completers) == [LEFT_TO_RIGHT, WITH_SUFFIX][: 1 + (rate > 0)]
    tasks = completion_tasks([("python", TEXTS[0])], 2)
    for task in tasks:
        for name, completer in completers.items():
            text, bits = completer(task)
            other, changed = completer(Task(task.kind, task.language, task.prefix, task.truth, "\n(((((\n" * 9))
            assert bits is not None
            assert bits > 0
            assert ((text, bits) == (other, changed)) == (name == LEFT_TO_RIGHT)


def test_bits_are_those_of_one_token_after_the_other() -> None:
    model = spread_model(tiny_config(vocab_size=64, max_seq_len=32))
    packed = PackedTransformer.from_model(model, fused=False)
    ids = torch.randint(0, 64, (12,), generator=torch.Generator().manual_seed(0)).tolist()
    bits = 0.0
    for place in range(5, 12):
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([ids[:place]])))[0, -1].double()
        bits -= float(logits.log_softmax(-1)[ids[place]] / torch.tensor(2.0).log())
    assert bits_of(packed, ids[:5], ids[5:]) == pytest.approx(bits, rel=1e-4)
