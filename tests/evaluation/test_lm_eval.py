"""The model `nanochat` of lm-evaluation-harness: its numbers are the model's, and the harness runs tasks with it."""

import inspect
import json
import math

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.evaluation.lm_eval import NanochatLM
from nanochat_cli.inference.generate import generate
from nanochat_cli.inference.sampling import SamplingConfig
from tests.evaluation.saved_runs import save_run

CONTEXT = 64


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An untrained run, its model and its tokenizer."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    model, tokenizer = save_run(run, quant={"activations": False}, max_seq_len=CONTEXT)
    return run, model, tokenizer


@pytest.fixture(scope="module")
def adapter(saved):
    return NanochatLM(str(saved[0]), batch_size=3)


def request(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


@torch.no_grad()
def log_probabilities(model, ids):
    """Log-probabilities [len(ids) - 1, V] for every token after the first."""
    return model.logits(model(torch.tensor([ids[:-1]])))[0].double().log_softmax(-1)


def test_log_likelihoods_are_sums_over_the_continuation_in_batches_of_any_shape(saved, adapter):
    _, model, tokenizer = saved
    asked = [("def f(x):", " return x"), ("import", " json"), ("", "class A"), ("a ", "b"), ("x" * 90, " = 1")]
    found = adapter.loglikelihood([request("loglikelihood", *pair) for pair in asked], disable_tqdm=True)
    for (context, continuation), (nats, is_greedy) in zip(asked, found, strict=True):
        before = tokenizer.encode(context.rstrip()) or [tokenizer.eos_id]
        target = tokenizer.encode(context[len(context.rstrip()) :] + continuation)
        if context:
            assert tokenizer.encode(context + continuation) == before + target  # no token spans the border here
        whole = (before + target)[-CONTEXT - 1 :]
        predicted = log_probabilities(model, whole)[-len(target) :]
        expected = predicted.gather(1, torch.tensor(target)[:, None]).sum()
        assert nats == pytest.approx(float(expected), abs=1e-3)
        assert is_greedy == (predicted.argmax(-1).tolist() == target)


def test_the_greedy_continuation_is_reported_as_greedy(saved, adapter):
    _, model, tokenizer = saved
    best = int(log_probabilities(model, [*tokenizer.encode("def"), 0])[-1].argmax())
    ((_, is_greedy),) = adapter._loglikelihood_tokens([(None, tokenizer.encode("def"), [best])], disable_tqdm=True)
    assert is_greedy


def test_a_token_across_the_border_is_not_lost(saved, adapter):
    _, _, tokenizer = saved
    text = next(t for t in ("return", "self", "json", "def", "the", "in") if len(tokenizer.encode(t)) == 1)
    before, target = adapter._encode_pair(text[:1], text[1:])
    assert (before, target) == (tokenizer.encode(text[:1]), tokenizer.encode(text[1:]))


def test_rolling_log_likelihood_predicts_every_token_once(saved, adapter):
    _, model, tokenizer = saved
    text = inspect.getsource(json.dumps)[:400]
    ids = tokenizer.encode(text)
    assert len(ids) > 2 * CONTEXT
    (found,) = adapter.loglikelihood_rolling([request("loglikelihood_rolling", text)], disable_tqdm=True)
    expected, whole = 0.0, [tokenizer.eos_id, *ids]
    for start in range(0, len(ids), CONTEXT):
        end = min(start + CONTEXT, len(ids))
        window = whole[max(0, end - CONTEXT) : end + 1]  # the last one has a full context
        rows = log_probabilities(model, window)[start - end :]
        expected += float(rows.gather(1, torch.tensor(ids[start:end])[:, None]).sum())
    assert found == pytest.approx(expected, rel=1e-5)


def test_generation_is_that_of_nanochat_generate(saved, adapter):
    _, model, tokenizer = saved
    settings = [
        {"until": ["\n"], "max_gen_toks": 12},
        {"until": "e", "max_gen_toks": 12, "do_sample": True, "temperature": 0.9, "top_k": 40},
        {"max_gen_toks": 8, "do_sample": False, "temperature": 0.9},
    ]
    found = adapter.generate_until([request("generate_until", "def f(", one) for one in settings], disable_tqdm=True)
    ours = [
        SamplingConfig(max_tokens=12, temperature=0, stop=("\n",)),
        SamplingConfig(max_tokens=12, temperature=0.9, top_k=40, stop=("e",)),
        SamplingConfig(max_tokens=8, temperature=0),
    ]
    assert found == ["".join(generate(model, tokenizer, "def f(", one)) for one in ours]


def test_a_context_that_is_too_long_loses_its_beginning(saved, adapter):
    _, model, tokenizer = saved
    ids = tokenizer.encode("alpha beta " * 40)
    (found,) = adapter.generate_until([request("generate_until", "alpha beta " * 40, {"max_gen_toks": 10})])
    kept = tokenizer.decode(ids[-(CONTEXT - 10) :])
    assert tokenizer.encode(kept) == ids[-(CONTEXT - 10) :]
    assert found == "".join(generate(model, tokenizer, kept, SamplingConfig(max_tokens=10, temperature=0)))


def test_what_the_model_cannot_do_is_refused(adapter):
    with pytest.raises(ConfigError, match="num_beams"):
        adapter.generate_until([request("generate_until", "x", {"num_beams": 4})], disable_tqdm=True)
    with pytest.raises(DataError, match="a continuation has"):
        adapter.loglikelihood([request("loglikelihood", "x", " y" * 200)], disable_tqdm=True)


@pytest.mark.parametrize(("asked", "rows"), [("auto", 32), ("auto:4", 32), (None, 32), ("5", 5), (7, 7)])
def test_a_batch_size_is_a_number_or_automatic(saved, asked, rows):
    assert NanochatLM(str(saved[0]), batch_size=asked).batch_size == rows


def test_what_the_adapter_cannot_do_is_one_line(saved, adapter):
    for asked in ("many", "0", "-3"):
        with pytest.raises(ConfigError, match=f"--batch_size {asked}: needs a number"):
            NanochatLM(str(saved[0]), batch_size=asked)
    with pytest.raises(ConfigError, match="no chat template"):
        adapter.chat_template(True)
    with pytest.raises(ConfigError, match="no chat template"):
        adapter.apply_chat_template([{"role": "user", "content": "x"}])


def test_sequences_that_exceed_the_memory_are_scored_fewer_at_once(saved, monkeypatch):
    adapter = NanochatLM(str(saved[0]), batch_size=8)
    asked = [request("loglikelihood", "a " * n, "b") for n in range(1, 8)]
    expected = adapter.loglikelihood(asked, disable_tqdm=True)
    score, sizes = adapter._score, []

    def limited(pairs):
        sizes.append(len(pairs))
        if len(pairs) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score(pairs)

    monkeypatch.setattr(adapter, "_score", limited)
    found = adapter.loglikelihood(asked, disable_tqdm=True)
    assert sizes == [7, 4, 2, 2, 2, 1]
    assert [one for one, _ in found] == pytest.approx([one for one, _ in expected], abs=1e-4)


def test_a_device_is_ignored_with_a_warning(saved, caplog):
    assert NanochatLM(str(saved[0]), device="cuda:0").model.device.type == "cpu"
    assert "this model runs on the CPU" in caplog.text


def test_the_harness_runs_local_tasks_with_the_registered_model(saved, adapter, tmp_path):
    assert get_model("nanochat") is NanochatLM
    rows = [
        {"text": "def f(x):", "choices": [" return x", " import"], "answer": 0},
        {"text": "import", "choices": [" json", " os", " x"], "answer": 2},
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{text}}",
    }
    tasks = [
        {**common, "task": "choice", "output_type": "multiple_choice", "doc_to_choice": "choices"}
        | {"doc_to_target": "answer", "target_delimiter": "", "metric_list": [{"metric": "acc"}]},
        {**common, "task": "rolling", "output_type": "loglikelihood_rolling", "doc_to_text": ""}
        | {"doc_to_target": "{{text}}", "metric_list": [{"metric": "bits_per_byte"}]},
    ]
    found = lm_eval.simple_evaluate(
        model="nanochat",
        model_args={"target": str(saved[0])},
        tasks=tasks,
        bootstrap_iters=0,
        log_samples=False,
        task_manager=TaskManager(include_defaults=False),  # thousands of files that are not asked
    )
    assert found is not None
    expected = []
    for row in rows:
        pairs = [request("loglikelihood", row["text"], choice) for choice in row["choices"]]
        nats = [one[0] for one in adapter.loglikelihood(pairs, disable_tqdm=True)]
        expected.append(nats.index(max(nats)) == row["answer"])
    assert found["results"]["choice"]["acc,none"] == sum(expected) / len(expected)
    texts = [request("loglikelihood_rolling", row["text"]) for row in rows]
    nats = sum(adapter.loglikelihood_rolling(texts, disable_tqdm=True))
    n_bytes = sum(len(row["text"].encode()) for row in rows)
    assert found["results"]["rolling"]["bits_per_byte,none"] == pytest.approx(-nats / n_bytes / math.log(2))
