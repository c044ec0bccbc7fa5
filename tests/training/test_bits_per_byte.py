"""Bits per byte against numbers computed token by token."""

import math

import pytest
import torch

from nanochat_cli.config.schema import ModelConfig
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.training.bits_per_byte import evaluate, evaluate_groups


def model():
    torch.manual_seed(0)
    shape = {"vocab_size": 32, "dim": 64, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "ffn_dim": 64, "max_seq_len": 8}
    return Transformer(ModelConfig.model_validate(shape | {"head_std": 0.5}))


def batch(seed):
    tokens = torch.randint(0, 32, (3, 9), generator=torch.Generator().manual_seed(seed))
    targets = tokens[:, 1:].clone()
    targets[2, 5:] = -100
    return tokens[:, :-1], targets


def test_every_measure_equals_its_definition():
    network = model()
    token_bytes = (torch.arange(32) + 3) % 5  # tokens 2, 7, 12, … stand for no text; token 0 does
    batches = [batch(1), batch(2)]
    got = evaluate(network, batches, token_bytes, chunk=7)

    nats, text_nats, n_bytes, correct, count = 0.0, 0.0, 0, 0, 0
    with torch.no_grad():
        for inputs, targets in batches:
            probabilities = network.logits(network(inputs)).double().softmax(-1)
            for row in range(3):
                for t in range(8):
                    target = int(targets[row, t])
                    if target == -100:
                        continue
                    loss = -math.log(probabilities[row, t, target])
                    nats, count = nats + loss, count + 1
                    correct += int(probabilities[row, t].argmax()) == target
                    if (target + 3) % 5:
                        text_nats, n_bytes = text_nats + loss, n_bytes + (target + 3) % 5
    assert got.tokens == count
    assert got.bytes == n_bytes
    assert got.loss == pytest.approx(nats / count, rel=1e-5)
    assert got.perplexity == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert got.accuracy == pytest.approx(correct / count)
    assert got.bits_per_byte == pytest.approx(text_nats / math.log(2) / n_bytes, rel=1e-5)


@pytest.mark.parametrize("chunk", [4, 5, 1000])
def test_groups_are_those_of_the_targets_that_count_wherever_others_stand_between(chunk):
    """A group scores the same among others as when every other target is left out."""
    network, token_bytes = model(), 1 + torch.arange(32) % 3
    inputs, targets = batch(3)
    targets[0, 2:4] = targets[1, 0] = -100
    counted = targets[targets >= 0]
    groups = torch.arange(len(counted)) % 3
    whole, found = evaluate_groups(network, [(inputs, targets)], token_bytes, groups, "abc", chunk=chunk)
    assert whole.tokens == len(counted)
    for index, name in enumerate("abc"):
        own = targets.clone()
        own[targets >= 0] = torch.where(groups == index, counted, -100)
        alone = evaluate(network, [(inputs, own)], token_bytes)
        assert (found[name].tokens, found[name].bytes) == (alone.tokens, alone.bytes)
        assert found[name].loss == pytest.approx(alone.loss, rel=1e-6)


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match="no held-out tokens"):
        evaluate(model(), [], torch.ones(32, dtype=torch.int64))
