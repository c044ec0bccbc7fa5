"""Token filtering against its slow form: keys and values of filtered tokens detached, and a masked loss."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nanochat_cli.cli.app import main
from nanochat_cli.config.load import load_run_config, resolve_config
from nanochat_cli.config.schema import MTPConfig
from nanochat_cli.data.batches import Batches
from nanochat_cli.data.prepare import cached_dataset
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.formats.open import load_run
from nanochat_cli.model import attention as attention_module
from nanochat_cli.model import moe as moe_module
from nanochat_cli.model.mtp import build_mtp, shifted_targets
from nanochat_cli.report.reporter import PlainReporter, QuietReporter
from nanochat_cli.training.losses import IGNORE, cross_entropy, token_scores
from nanochat_cli.training.methods.collider import TokenFilter, select_kept
from nanochat_cli.training.shard_data import ShardData
from nanochat_cli.training.state import TrainState
from nanochat_cli.training.trainer import Trainer
from nanochat_kernels import operations
from nanochat_kernels.operations import attention_backward
from tests.architectures import COMBINATIONS, build
from tests.e2e.tiny import TINY, write_corpus
from tests.training.gradients import gradient_of, setup_of, state_of
from tests.training.synthetic import SyntheticData, tiny_config

B, T = 3, 24
ADMITTED = [name for name in COMBINATIONS if "hybrid" not in name and "+tied" not in name] + [
    "plain+attention+dense+tied"
]


def batch(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(288, (B, T + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[1, :3] = IGNORE
    return tokens[:, :-1], targets


def filtering(model, mtp=None, of_file=None, **values) -> tuple[TrainState, TokenFilter]:
    data = SimpleNamespace(scores=lambda step: of_file)
    train = {"batch_size": B, "seq_len": T}
    setup = setup_of(model, mtp, data, train=train, collider={"enabled": True, **values})
    token_filter = TokenFilter(setup)
    return state_of(setup, token_filter), token_filter


def plain(model) -> TrainState:
    return state_of(setup_of(model, train={"batch_size": B, "seq_len": T}))


def parameters(model, mtp):
    named = dict(model.named_parameters())
    return named if mtp is None else named | {f"mtp.{name}": p for name, p in mtp.named_parameters()}


def gradients(model, mtp):
    return {name: None if p.grad is None else p.grad.clone() for name, p in parameters(model, mtp).items()}


def clear(model, mtp=None):
    for parameter in parameters(model, mtp).values():
        parameter.grad = None


def slow_gradients(model, mtp, inputs, targets, keep, monkeypatch):
    """Plain autograd of everything, with `where(keep, k, k.detach())` in every attention layer and a masked loss."""
    whole = attention_module.attend_in_training

    def attend(q, k, v, form):
        mask = keep.view(B, 1, T, 1)
        return whole(q, torch.where(mask, k, k.detach()), torch.where(mask, v, v.detach()), form)

    def detach_rows(probabilities, _):
        return torch.where(keep.reshape(-1, 1), probabilities, probabilities.detach())

    with monkeypatch.context() as patch:
        patch.setattr(attention_module, "attend_in_training", attend)
        patch.setattr(moe_module, "drop_filtered", detach_rows)
        clear(model, mtp)
        hidden = model(inputs)
        rows = keep.reshape(-1)
        loss = cross_entropy(hidden.flatten(0, 1)[rows], model.unembedding, targets.reshape(-1)[rows])[0]
        if mtp is not None:
            states = mtp.hidden_states(model, hidden, targets)
            for i, (state, weight) in enumerate(zip(states, mtp.weights(0.0), strict=True)):
                ahead = shifted_targets(targets, i + 1).reshape(-1)[rows]
                loss = loss + weight * cross_entropy(state.flatten(0, 1)[rows], model.unembedding, ahead)[0]
        loss.backward()
    return gradients(model, mtp)


@pytest.mark.parametrize(
    ("combination", "kind"),
    [(name, None) for name in ADMITTED] + [("plain+attention+dense+untied", k) for k in ("heads", "shared", "nextn")],
)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_gradients_are_those_of_the_slow_form(combination, kind, qk_norm, monkeypatch):
    model = build(combination, qk_norm=qk_norm).train()
    mtp = None if kind is None else build_mtp(model.config, MTPConfig(enabled=True, kind=kind, n_tokens=2))
    inputs, targets = batch()
    state, _ = filtering(model, mtp, sparsity=0.4)
    loss = gradient_of(state, inputs, targets)
    fast = gradients(model, mtp)
    with torch.no_grad():
        scores, _ = token_scores(model(inputs).flatten(0, 1), model.unembedding, targets.reshape(-1))
    kept = select_kept(scores, targets.reshape(-1) >= 0, 0.4)
    keep = torch.zeros(B * T, dtype=torch.bool).index_fill_(0, kept, True).view(B, T)
    assert float(loss["collider/kept_fraction"]) == pytest.approx(len(kept) / (B * T))
    slow = slow_gradients(model, mtp, inputs, targets, keep, monkeypatch)
    for name, expected in slow.items():
        if expected is None:
            assert fast[name] is None, name
        else:
            torch.testing.assert_close(fast[name], expected, rtol=1e-4, atol=1e-5, msg=name)


def test_attention_by_blocks_sees_only_the_queries_that_are_kept(monkeypatch):
    model = build("plain+attention+dense+untied", head_dim=32).train()
    inputs, targets = batch()
    state, filter_ = filtering(model, sparsity=0.4)
    gradient_of(state, inputs, targets)
    wanted, queries = gradients(model, None), []
    clear(model)
    for block in model.blocks:
        block.attention.form = "blocks"

    def backward(dy, *others):
        queries.append(dy.abs().amax(dim=(1, 3)) > 0)
        return attention_backward(dy, *others)

    monkeypatch.setattr(operations, "attention_backward", backward)
    gradient_of(state, inputs, targets)
    for name, found in gradients(model, None).items():  # activations are rounded to int8: some code is another
        assert (found - wanted[name]).norm() <= 0.01 * wanted[name].norm(), name
    assert len(queries) == len(model.blocks)
    assert all(torch.equal(kept.flatten().nonzero().squeeze(1), filter_._kept.chosen) for kept in queries)


@pytest.mark.parametrize("combination", ADMITTED)
def test_filtered_rows_have_exactly_no_gradient_at_every_layer(combination):
    model = build(combination).train()
    inputs, targets = batch(1)
    seen = {}

    def watch(name):
        def hook(_module, arguments, _output):
            x = arguments[0]
            if x.requires_grad and x.ndim == 3 and x.shape[:2] == (B, T):
                x.register_hook(lambda gradient: seen.__setitem__(name, gradient.detach().clone()))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.ModuleList)) or not name:
            continue
        module.register_forward_hook(watch(name))
    state, filter_ = filtering(model, sparsity=0.4)
    gradient_of(state, inputs, targets)
    rows = filter_._kept.chosen
    filtered = torch.ones(B * T, dtype=torch.bool).index_fill_(0, rows, False)
    assert len(seen) >= 2 * len(model.blocks)
    for name, gradient in seen.items():
        flat = gradient.reshape(B * T, -1)
        assert not flat[filtered].any(), name
        assert flat[~filtered].any(), name


def test_keeping_all_is_the_plain_backward_pass_bit_for_bit():
    model = build("plain+attention+dense+untied", qk_norm=True).train()
    inputs, targets = batch(2)
    targets = targets.where(targets >= 0, 0)
    found = []
    # Every token but the least important one reaches the threshold, so less than a sixteenth is left to filter.
    for state in (plain(model), filtering(model, sparsity=0.05, threshold=1e-9)[0]):
        loss = gradient_of(state, inputs, targets)
        found.append(gradients(model, None))
    assert float(loss["collider/kept_fraction"]) == 1.0
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_the_headline_loss_is_that_of_all_tokens():
    model = build("plain+attention+dense+untied").train()
    inputs, targets = batch(3)
    expected = gradient_of(plain(model), inputs, targets)["loss/main"]
    found = gradient_of(filtering(model, sparsity=0.5)[0], inputs, targets)
    torch.testing.assert_close(found["loss/main"], expected, rtol=1e-5, atol=1e-6)
    assert found["loss/objective"] > expected  # the easier half is left out


def test_accumulation_filters_every_micro_batch_by_itself():
    model = build("plain+attention+dense+untied").train()
    inputs, targets = batch(4)
    state, _ = filtering(model, sparsity=0.4)
    state.progress.micro_batch = 1
    gradient_of(state, inputs, targets)
    together = gradients(model, None)
    expected = None
    for row in range(B):
        single, _ = filtering(model, sparsity=0.4)
        gradient_of(single, inputs[row : row + 1], targets[row : row + 1])
        part = gradients(model, None)
        expected = part if expected is None else {name: expected[name] + part[name] for name in part}
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, expected[name] / B, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("known", [False, True])
def test_scores_from_a_file_choose_the_tokens(known, tmp_path):
    model = build("mhc-2+attention+moe+untied").train()
    inputs, targets = batch(5)
    scores = torch.rand(B, T, generator=torch.Generator().manual_seed(0))
    values = {"score": "ce"} if known else {"score": "excess"}
    values["scores"] = tmp_path / "scores.safetensors"
    state, filter_ = filtering(model, None, scores, sparsity=0.5, **values)
    gradient_of(state, inputs, targets)
    importance = scores.reshape(-1)
    if not known:
        with torch.no_grad():
            losses, _ = token_scores(model(inputs).flatten(0, 1), model.unembedding, targets.reshape(-1))
        importance = losses - importance
    expected = select_kept(importance, targets.reshape(-1) >= 0, 0.5)
    assert torch.equal(filter_._kept.chosen, expected)


def test_entropy_is_that_of_the_whole_distribution():
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(50, 16, generator=generator), torch.randn(40, 16, generator=generator)
    _, entropies = token_scores(hidden, head, torch.zeros(50, dtype=torch.int64), 7, entropy=True)
    expected = torch.distributions.Categorical(logits=hidden @ head.T).entropy()
    torch.testing.assert_close(entropies, expected, rtol=1e-5, atol=1e-5)


def test_the_lowest_are_filtered_and_those_without_a_target_first():
    importance = torch.tensor([5.0, 1.0, 3.0, 2.0, 4.0, 9.0])
    valid = torch.tensor([True, True, True, True, True, False])
    assert select_kept(importance, valid, 0.5).tolist() == [0, 2, 4]
    assert select_kept(importance, valid, 0.0).tolist() == list(range(6))


def test_a_token_at_the_threshold_is_never_filtered():
    importance = torch.linspace(0, 1, 101)
    kept = select_kept(importance, torch.ones(101, dtype=torch.bool), 0.9, threshold=0.25)
    assert set(range(25, 101)) <= set(kept.tolist())
    assert len(kept) < 101


def test_deltanet_is_refused_since_filtering_does_not_define_it():
    with pytest.raises(ConfigError, match=r"collider\.enabled needs model\.deltanet off"):
        resolve_config(["quickstart"], None, ["use_collider=true", "deltanet_ratio=0.5"])


def test_a_run_with_filtering_resumes_bit_for_bit_and_logs_what_it_kept(tmp_path):
    def run(name, stop=None, resume=False):
        config = tiny_config(
            tmp_path,
            run={"name": name},
            train={"total_steps": 8, "log_interval": 1, "compile": "off"},
            optim={"schedule": "constant"},
            collider={"enabled": True, "sparsity": 0.4, "warmup_steps": 2},
        )
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        rows = config.train.batch_size * config.train.grad_accum
        trainer = Trainer(config, SyntheticData(rows, config.train.seq_len), folder, QuietReporter(), resume=resume)
        if stop is None:
            trainer.fit()
        else:
            with trainer.log:
                for _ in range(stop):
                    trainer._step()
                trainer.save()
        return {name: p.detach().clone() for name, p in trainer.state.model.named_parameters()}

    whole = run("whole")
    run("halves", stop=4)
    resumed = run("halves", resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    kept = {line["step"]: line["collider/kept_fraction"] for line in lines if "collider/kept_fraction" in line}
    assert set(kept) == set(range(3, 9))
    assert all(value == pytest.approx(0.6, abs=0.05) for value in kept.values())


def run_with_threshold(folder, threshold):
    """The messages of a run of 13 steps, of which 12 filter 35 % as far as the threshold allows."""
    lines: list[str] = []

    class Listening(PlainReporter):
        def info(self, message: str) -> None:
            lines.append(message)

        warn = info

    config = tiny_config(
        folder,
        train={"total_steps": 13, "log_interval": 1, "compile": "off"},
        collider={"enabled": True, "sparsity": 0.35, "threshold": threshold, "warmup_steps": 1},
    )
    data = SyntheticData(config.train.batch_size * config.train.grad_accum, config.train.seq_len)
    Trainer(config, data, folder, Listening()).fit()
    return lines


def test_a_threshold_that_defeats_the_share_is_reported_once_with_the_share(tmp_path):
    lines = run_with_threshold(tmp_path, 0.05)
    told = [line for line in lines if "collider.threshold" in line]
    assert len(told) == 1
    assert re.match(r"token filtering keeps \d+% of the tokens, not 65%: collider\.threshold = 0\.05", told[0])
    assert any(re.search(r"9\d% of the tokens kept|100% of the tokens kept", line) for line in lines)


def test_a_threshold_that_lets_the_share_decide_is_not_mentioned(tmp_path):
    lines = run_with_threshold(tmp_path, 1.0)
    assert not any("collider.threshold" in line for line in lines)
    assert any("6" in line and "% of the tokens kept" in line for line in lines)


def test_scores_of_a_run_choose_tokens_of_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "corpus")

    def nanochat(*words):
        assert main(list(words)) == 0

    data = ["--set", f"data.source={tmp_path / 'corpus'}", "--set", "eval.max_tokens=64"]
    nanochat("train", *TINY, *data, "--set", "train.total_steps=2", "--set", "run.name=reference")
    nanochat("score", "runs/reference", "--out", "scores.safetensors")
    filtering = ["--set", "use_collider=true", "--set", "collider.scores=scores.safetensors"]
    for score in ("ce", "excess"):
        more = [*filtering, "--set", f"collider.score={score}", "--set", f"run.name={score}"]
        nanochat("train", *TINY, *data, *more, "--set", "train.total_steps=2")
    scores = load_file(tmp_path / "scores.safetensors")["scores"].float()
    reader = ShardReader(cached_dataset(load_run_config(tmp_path / "runs/ce"), QuietReporter()))
    model, _, _ = load_run(tmp_path / "runs/reference")
    stream = reader.tokens("train")
    window = torch.from_numpy(stream[64:97])  # the third window of 32 tokens and the token after it
    losses, _ = token_scores(model(window[None, :-1]).flatten(0, 1), model.unembedding, window[1:])
    torch.testing.assert_close(scores[65:97], losses, rtol=2e-3, atol=2e-3)
    config = load_run_config(tmp_path / "runs/ce")
    config.collider.scores = tmp_path / "scores.safetensors"
    data_ = ShardData(reader, config)
    _, targets = data_.batch(1)
    tokens = torch.from_numpy(stream[0 : len(stream)])
    of_step = data_.scores(1)
    for row, line in zip(of_step, targets, strict=True):
        starts = [s for s in range(1, len(tokens) - 31, 32) if torch.equal(tokens[s : s + 32], line)]
        assert any(torch.equal(scores[s : s + 32], row) for s in starts)

    # The windows that a run of the same seed reads first, which is enough for its first step.
    nanochat("score", "runs/reference", "--out", "part.safetensors", "--max-tokens", "70")
    part = load_file(tmp_path / "part.safetensors")["scores"].float()
    known = ~part.isnan()
    assert int(known[1:].sum()) == 3 * 32
    torch.testing.assert_close(part[known], scores[known])
    first = Batches(stream, 1, 32, config.run.seed).window_order(0, 3)
    assert sorted(first) == [int(start) // 32 for start in known[1:].nonzero().flatten()[::32]]
    config.collider.scores, config.train.batch_size = tmp_path / "part.safetensors", 1
    few = ShardData(reader, config)
    assert not few.scores(2).isnan().any()
    with pytest.raises(DataError, match=r"scores of the first 3 windows .* step 3 needs others"):
        few.scores(3)
