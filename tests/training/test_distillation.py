"""The term of a teacher in the objective, and which teachers are refused."""

import copy

import pytest
import torch

from nanochat_cli.config.schema import Config
from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.training.methods import distillation
from nanochat_cli.training.methods.collider import TokenFilter
from nanochat_cli.training.methods.distillation import Distillation, load_teacher
from tests.architectures import build
from tests.evaluation.saved_runs import save_run
from tests.training.gradients import gradient_of, setup_of, state_of
from tests.training.test_divergence import dense

B, T = 3, 24
FLOAT = {"quant": {"enabled": False}}
TRAIN = {"batch_size": B, "seq_len": T}


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(288, (B, T + 1), generator=torch.Generator().manual_seed(0))
    targets = tokens[:, 1:].clone()
    targets[1, :3] = -100
    return tokens[:, :-1], targets


@pytest.fixture
def distilled(monkeypatch):
    """Metrics and gradients of a batch, of a model with this teacher."""

    def compute(model, teacher, *others, **values):
        monkeypatch.setattr(distillation, "load_teacher", lambda config: teacher.requires_grad_(False))
        setup = setup_of(model.train(), train=TRAIN, distill={"teacher": "somewhere", **values}, **dict(others))
        parts = [Distillation(setup)] + ([TokenFilter(setup)] if others else [])
        model.zero_grad()
        metrics = gradient_of(state_of(setup, *parts), *batch())
        return metrics, [p.grad.clone() for p in model.parameters()]

    return compute


def plain(model):
    model.train().zero_grad()
    metrics = gradient_of(state_of(setup_of(model, train=TRAIN)), *batch())
    return metrics, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_a_teacher_that_is_the_float_model_itself_is_at_distance_zero_and_adds_no_gradient(distilled, weight):
    model = build("plain+attention+dense+untied", **FLOAT)
    metrics, gradients = distilled(model, copy.deepcopy(model).eval(), weight=weight, temperature=2.0)
    assert metrics["loss/distillation"] == 0
    main, expected = plain(model)
    assert metrics["loss/main"] == main["loss/main"]
    for found, one in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, (1 - weight) * one, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (2.0, 10)])
def test_the_objective_is_the_weighted_sum_with_the_temperature_squared(distilled, temperature, top_k):
    """Against autograd of whole logits in float64, from the model's own hidden states."""
    model, teacher = build("plain+attention+dense+untied"), build("plain+attention+dense+untied", seed=5, n_layers=2)
    metrics, gradients = distilled(model, teacher, weight=0.3, temperature=temperature, top_k=top_k)
    inputs, targets = batch()
    hidden, flat = model(inputs).flatten(0, 1), targets.reshape(-1)
    told = teacher(inputs).detach().flatten(0, 1)
    divergence = dense(hidden, model.unembedding, told, teacher.unembedding.detach(), flat, temperature, top_k)
    cross_entropy = torch.nn.functional.cross_entropy((hidden @ model.unembedding.T).double(), flat)
    objective = 0.7 * cross_entropy + 0.3 * temperature**2 * divergence
    assert metrics["loss/distillation"].item() == pytest.approx(divergence.item(), rel=1e-5)
    assert metrics["loss/objective"].item() == pytest.approx(objective.item(), rel=1e-5)
    expected = torch.autograd.grad(objective, list(model.parameters()))
    for found, one in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, one.float(), rtol=2e-3, atol=2e-6)


def test_only_tokens_that_count_are_compared(distilled):
    model, teacher = build("plain+attention+dense+untied"), build("plain+attention+dense+untied", seed=5)
    filtering = ("collider", {"enabled": True, "sparsity": 0.5, "warmup_steps": 0, "threshold": 1.0})
    some, _ = distilled(model, teacher, filtering, weight=0.5)
    every, _ = distilled(model, teacher, weight=0.5)
    assert some["loss/main"].item() == pytest.approx(every["loss/main"].item(), rel=1e-5)
    assert some["loss/distillation"] != every["loss/distillation"]


def test_the_teacher_looks_across_documents_no_more_than_the_model(distilled):
    model = build("plain+attention+dense+untied", **FLOAT)
    teacher = copy.deepcopy(model).eval()
    model.document_end = int(batch()[0][0, 9])
    assert distilled(model, teacher)[0]["loss/distillation"].item() == pytest.approx(0, abs=1e-9)
    assert teacher.document_end == model.document_end


def config(teacher, **train: object) -> Config:
    model = {"vocab_size": 300, "dim": 64, "n_heads": 2, "n_kv_heads": 2}
    return Config.model_validate({"model": model, "train": {"seq_len": 32, **train}, "distill": {"teacher": teacher}})


def test_the_teacher_is_the_run_or_that_of_the_initial_weights_and_has_no_gradients(tmp_path):
    saved, _ = save_run(tmp_path / "one")
    for found in (config(tmp_path / "one"), config("init", init=tmp_path / "one" / "checkpoints" / "step-000001")):
        teacher = load_teacher(found)
        assert all(not p.requires_grad for p in teacher.parameters())
        assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), saved.parameters(), strict=True))


def test_a_teacher_that_cannot_teach_is_one_clear_line(tmp_path):
    save_run(tmp_path / "one")
    larger = config(tmp_path / "one")
    larger.model = larger.model.model_copy(update={"vocab_size": 301})
    for wrong, error, words in (
        (larger, ConfigError, "has 300 tokens and the model 301: a teacher"),
        (config(tmp_path / "none"), DataError, "none: not a run, .*no such folder"),
        (config(tmp_path), DataError, "make a run of it with: nanochat import"),
        (config(tmp_path / "one", seq_len=2048), ConfigError, "it reads at most .*, and train.seq_len = 2048: lower"),
    ):
        with pytest.raises(error, match=words) as caught:
            load_teacher(wrong)
        assert "\n" not in str(caught.value)


def test_init_without_initial_weights_is_refused_by_its_keys():
    with pytest.raises(ValueError, match=r"distill\.teacher = init needs train\.init"):
        config("init")
