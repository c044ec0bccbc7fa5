"""Rollouts: their random numbers, their log-probabilities against the trained model, and the code that is judged."""

from itertools import product

import pytest
import torch

from nanochat_cli.errors import Interrupted
from nanochat_cli.evaluation.complete_problems import problem_seed
from nanochat_cli.formats.open import load_run
from nanochat_cli.rl.judging import Judge, collect
from nanochat_cli.rl.learner import completion_log_probabilities
from nanochat_cli.rl.policy import trajectories_of
from nanochat_cli.rl.rewards import RewardConfig
from nanochat_cli.rl.rollouts import Prompt, Sampler
from nanochat_cli.rl.run_grpo import plain
from nanochat_cli.rl.trajectories import collate
from tests.rl.tiny_run import STOP, ReadingPool, problems


@pytest.fixture(scope="module")
def loaded(source):
    model, tokenizer, _ = load_run(source)
    return model, tokenizer


@pytest.fixture
def sampler(loaded):
    model, tokenizer = loaded
    sampler = Sampler(tokenizer, 1.0, 20, seed=5)
    sampler.refresh(model)
    return sampler


def texts(rollouts):
    return [rollout.completion.text for rollout in rollouts]


def test_a_seed_depends_on_seed_round_and_problem_and_on_nothing_else():
    seeds = {problem_seed(s, r, p) for s in range(5) for r in range(5) for p in ("a", "b", "a/b")}
    assert len(seeds) == 75
    assert problem_seed(1, 2, "a") == problem_seed(1, 2, "a")
    assert all(0 <= seed < 2**56 for seed in seeds)


def test_a_rollout_depends_neither_on_its_neighbours_nor_on_what_was_drawn_before(sampler, tmp_path):
    first, second = problems(tmp_path)[:2]
    alone = texts(sampler.group(first, plain(first), 3, 1))
    sampler.group(second, plain(second), 8, 1)
    assert texts(sampler.group(first, plain(first), 8, 1))[:3] == alone
    assert texts(sampler.group(first, plain(first), 3, 2)) != alone
    assert len(set(texts(sampler.group(first, plain(first), 8, 1)))) > 1


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_log_probabilities_are_those_of_the_forward_pass_that_is_trained(loaded, tmp_path, temperature):
    model, tokenizer = loaded
    sampler = Sampler(tokenizer, temperature, 20, seed=1)
    sampler.refresh(model)
    groups = collect(problems(tmp_path), sampler, Judge(ReadingPool(), RewardConfig()), 4, 1, plain)
    batch = collate(trajectories_of(list(groups), tokenizer, standardise=False))
    with torch.no_grad():
        found = completion_log_probabilities(model, batch, temperature)
    assert batch.mask.sum() > 50
    # One more rounding than the packed runtime; a tie would make a larger difference, in a token or two.
    close = (found - batch.old).abs()[batch.mask] < 1e-3
    assert close.float().mean() > 0.98
    assert torch.equal(batch.old[~batch.mask], torch.zeros_like(batch.old[~batch.mask]))


def test_a_completion_ends_at_a_stop_sequence_or_after_max_tokens(sampler, tmp_path):
    ends = set()
    for problem, sampler.max_tokens in product(problems(tmp_path), (3, 20)):
        for rollout in sampler.group(problem, plain(problem), 8, 1):
            ends.add(rollout.completion.finish)
            assert not any(stop in rollout.completion.text for stop in STOP)
            assert len(rollout.completion.tokens) <= sampler.max_tokens
            if rollout.completion.finish == "length":
                assert len(rollout.completion.tokens) == sampler.max_tokens
    assert ends == {"stop", "length"}  # both cases occurred


def test_refreshed_weights_draw_differently_and_old_ones_stay_unchanged(sampler, source, tmp_path):
    problem = problems(tmp_path)[0]
    before = texts(sampler.group(problem, plain(problem), 8, 1))
    model, _, _ = load_run(source)
    with torch.no_grad():
        for _, layer in model.linears():
            layer.weight.copy_(layer.weight.flip(0))
    model.requantize()
    assert texts(sampler.group(problem, plain(problem), 8, 1)) == before
    sampler.refresh(model)
    assert texts(sampler.group(problem, plain(problem), 8, 1)) != before


def test_a_prompt_that_fills_the_context_leaves_no_room(sampler, tmp_path):
    assert sampler.has_room("def add_3(x):\n")
    assert sampler.room("x + " * 40) < sampler.max_tokens
    assert sampler.room("x + " * 400) <= 0


def test_judged_rollouts_come_in_order_with_the_code_that_was_judged(sampler, tmp_path):
    pool = ReadingPool()
    everything = problems(tmp_path)
    groups = list(collect(everything, sampler, Judge(pool, RewardConfig()), 4, 1, plain))
    assert [group[0].rollout.problem for group in groups] == everything
    assert pool.seen == 4 * len(everything)
    for judged in (one for group in groups for one in group):
        assert judged.rollout.completion.text.startswith(judged.code.rstrip("\n")[:10])
        assert judged.solves == (f"return x + {judged.rollout.problem.id[4:]}\n" in judged.code)
        assert not (judged.reward.rejected and judged.compiles)


def test_an_answer_copied_from_the_prompt_is_worth_nothing(sampler, tmp_path):
    problem = problems(tmp_path)[0]
    honest = sampler.group(problem, plain(problem), 1, 1)[0]
    long_answer = f"    total = x + 1\n    total = total + {problem.id[4:]} - 1\n    return total\n"
    completion = type(honest.completion)(long_answer, (1,), (-1.0,), "stop")
    judge = Judge(ReadingPool(), RewardConfig())
    for prompt, rejected in ((Prompt(problem.prompt), None), (Prompt(problem.prompt, (long_answer,)), "copied")):
        (judged,) = judge([type(honest)(problem, 0, prompt, completion)])
        assert judged.reward.rejected == rejected
        assert (judged.reward.total == 0) == (rejected is not None)


def test_an_error_before_a_problem_ends_the_collection(sampler, tmp_path):
    pool = ReadingPool()

    def before_each(done):
        if done == 2:
            raise Interrupted("stop")

    with pytest.raises(Interrupted):
        list(collect(problems(tmp_path), sampler, Judge(pool, RewardConfig()), 2, 1, plain, before_each))
    assert pool.seen <= 4
