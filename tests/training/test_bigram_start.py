"""The bigram start: counts against a dictionary, gradient against autograd, the loss against the entropy."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from nanochat_cli.config.schema import BigramInitConfig, Config, ModelConfig
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.report.reporter import QuietReporter
from nanochat_cli.training.methods import bigram_start
from nanochat_cli.training.methods.bigram_start import BigramCounts, accumulate_gradient, count_bigrams, fit_bigrams
from nanochat_cli.training.trainer import Trainer
from tests.training.synthetic import SyntheticData, tiny_config

VOCAB = 40


def stream(seed: int = 0) -> np.ndarray:
    """A text in which every token strongly prefers a few followers."""
    generator = np.random.default_rng(seed)
    table = generator.dirichlet(np.full(VOCAB, 0.1), size=VOCAB)
    tokens = [0]
    for _ in range(6000):
        tokens.append(int(generator.choice(VOCAB, p=table[tokens[-1]])))
    return np.array(tokens)


def model(dim: int = 32) -> Transformer:
    torch.manual_seed(0)
    shape = {"vocab_size": VOCAB, "dim": dim, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "ffn_dim": 64}
    return Transformer(ModelConfig.model_validate({**shape, "embedding_std": 0.8, "head_std": 0.001}))


def bigram_loss(model: Transformer, bigrams: BigramCounts) -> torch.Tensor:
    """The definition, by plain autograd: mean cross-entropy of the block-less model over all pairs, 0-dim."""
    hidden = model.norm(model.embedding.weight)
    log_probabilities = model.logits(hidden).log_softmax(dim=-1)
    return -(bigrams.rows(0, bigrams.vocab_size) * log_probabilities).sum() / bigrams.total


@pytest.mark.parametrize("size", [10_000, 1000, 7])
def test_counts_are_those_of_a_dictionary_however_the_stream_is_cut(size):
    tokens = stream()
    pieces = (tokens[s : s + size + 1] for s in range(0, len(tokens) - 1, size))
    bigrams = count_bigrams(pieces, VOCAB)
    expected = Counter(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True))
    dense = bigrams.rows(0, VOCAB)
    assert {(x, y): dense[x, y] for x, y in expected} == dict(expected)
    assert dense.sum() == bigrams.total == len(tokens) - 1
    assert torch.equal(torch.cat((bigrams.rows(0, 13), bigrams.rows(13, VOCAB))), dense)


def test_the_closed_form_gradient_is_that_of_autograd(monkeypatch):
    monkeypatch.setattr(bigram_start, "CONTEXTS_AT_A_TIME", 16)
    bigrams = count_bigrams([stream()], VOCAB)
    one, other = model(), model()
    for network in (one, other):
        torch.nn.init.normal_(network.unembedding, std=0.3, generator=torch.Generator().manual_seed(1))
    plain = bigram_loss(one, bigrams)
    plain.backward()
    loss = accumulate_gradient(other, bigrams)
    assert float(loss) == pytest.approx(float(plain.detach()), rel=1e-6)
    for name in ("embedding.weight", "head.weight", "norm.weight"):
        a, b = one.get_parameter(name).grad, other.get_parameter(name).grad
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7, msg=name)


def test_the_fit_reaches_the_entropy_of_the_bigrams_when_the_width_allows():
    tokens = stream()
    bigrams = count_bigrams([tokens], VOCAB)
    counts = bigrams.rows(0, VOCAB)
    conditional = counts / counts.sum(1, keepdim=True).clamp(min=1)
    entropy = -float((counts * conditional.clamp(min=1e-12).log()).sum()) / bigrams.total
    *_, last = fit_bigrams(model(dim=64), bigrams, BigramInitConfig(steps=150, head_lr=0.05))
    assert entropy <= last < entropy + 0.05
    assert last < 0.7 * math.log(VOCAB)


def test_the_rate_is_flat_for_half_of_the_steps_and_then_falls_to_zero():
    """Against torch's Adam and autograd through the definition, the rates of six steps written down."""
    bigrams = count_bigrams([stream()], VOCAB)
    config = BigramInitConfig(steps=6, embedding_lr=0.02, head_lr=0.05)
    ours, plain = model(), model()
    losses = list(fit_bigrams(ours, bigrams, config))
    embedding, head = plain.embedding.weight, plain.unembedding
    groups = [{"params": [embedding], "lr": 0.02}, {"params": [head], "lr": 0.05}]
    optimizer = torch.optim.Adam(groups, betas=(0.8, 0.95), eps=1e-10)
    for factor, loss in zip((1, 1, 1, 1, 2 / 3, 1 / 3), losses, strict=True):
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = 0.02 * factor, 0.05 * factor
        optimizer.zero_grad()
        expected = bigram_loss(plain, bigrams)
        assert loss == pytest.approx(float(expected.detach()), rel=1e-4)
        expected.backward()
        optimizer.step()
    torch.testing.assert_close(ours.embedding.weight, embedding, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.unembedding, head, rtol=1e-3, atol=1e-4)


def test_only_embedding_and_head_change_and_no_gradient_is_left():
    network = model()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    list(fit_bigrams(network, count_bigrams([stream()], VOCAB), BigramInitConfig(steps=3)))
    changed = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"embedding.weight", "head.weight"}
    assert all(p.grad is None for p in network.parameters())


def test_a_run_starts_from_bigrams_once_and_resumes_without(tmp_path):
    config = tiny_config(tmp_path, bigram_init={"steps": 5}, train={"total_steps": 4})
    (tmp_path / "tiny").mkdir()
    data = SyntheticData(8, 16)
    calls = []
    pieces = data.pieces
    data.pieces = lambda: calls.append(1) or pieces()
    result = Trainer(config, data, tmp_path / "tiny", QuietReporter()).fit()
    longer = tiny_config(tmp_path, bigram_init={"steps": 5}, train={"total_steps": 6})
    Trainer(longer, data, tmp_path / "tiny", QuietReporter(), resume=True).fit()
    assert calls == [1]
    assert result.held_out.loss < math.log(64)


def test_a_tied_model_is_refused_with_the_key_to_change():
    with pytest.raises(ValueError, match="tie_embeddings"):
        Config.model_validate({"model": {"tie_embeddings": True}, "bigram_init": {"steps": 10}})
