"""Policy GRPO and rejection-sampling fine-tuning: they learn, they stay ternary, they resume bit for bit."""

import copy
import math
from itertools import chain

import pytest
import torch

from nanochat_cli.config.schema import ModelConfig
from nanochat_cli.errors import Diverged
from nanochat_cli.evaluation.problem import Problem
from nanochat_cli.formats.open import load_run
from nanochat_cli.formats.run import checkpoints
from nanochat_cli.inference.batched import Completion
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.report.metrics_log import read_metrics
from nanochat_cli.report.reporter import QuietReporter
from nanochat_cli.rl.experience import Experience
from nanochat_cli.rl.judging import Judge, Judged, collect
from nanochat_cli.rl.learner import Learner, completion_log_probabilities
from nanochat_cli.rl.policy import PolicyObjective, learn_round, trajectories_of
from nanochat_cli.rl.rejection_sampling_tuning import LikelihoodObjective, good_answers
from nanochat_cli.rl.rewards import Reward, RewardConfig
from nanochat_cli.rl.rollouts import Prompt, Rollout, Sampler
from nanochat_cli.rl.run_grpo import plain
from nanochat_cli.rl.trajectories import Trajectory, batches, collate
from nanochat_cli.sandbox.limits import Outcome
from nanochat_kernels import ternarize
from tests.architectures import shape
from tests.rl.test_training_free import StoppingPool, untimed
from tests.rl.tiny_run import ReadingPool, config_of, grpo_run, problems, texts

MODES = ["policy", "rft"]


@pytest.fixture
def learner(source, tmp_path):
    model, _, _ = load_run(source)
    return Learner(model, config_of(tmp_path), QuietReporter())


@pytest.fixture(scope="module")
def drawn(source, tmp_path_factory):
    """Trajectories of one round of the source, at temperature 0.8."""
    model, tokenizer, _ = load_run(source)
    sampler = Sampler(tokenizer, 0.8, 20, seed=2)
    sampler.refresh(model)
    everything = problems(tmp_path_factory.mktemp("drawn"))
    groups = collect(everything, sampler, Judge(ReadingPool(), RewardConfig()), 6, 1, plain)
    return trajectories_of(list(groups), tokenizer, standardise=False)


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    """A whole run of each mode."""
    runs = {}
    for mode in MODES:
        run = grpo_run(source, tmp_path_factory.mktemp(mode), mode=mode, rounds=4, group=8, limit=5, held_out=0.0)
        run.run()
        runs[mode] = run
    return runs


@pytest.mark.parametrize("mode", MODES)
def test_the_model_answers_better_after_a_few_rounds(finished, mode):
    rewards = [line["reward/total"] for line in read_metrics(finished[mode].run_dir)]
    assert rewards[-1] > rewards[0] + 0.15


@pytest.mark.parametrize("mode", MODES)
def test_the_result_is_a_run_whose_weights_are_the_quantised_latents(finished, mode):
    model, _, config = load_run(finished[mode].run_dir)
    assert config.grpo.mode == mode
    for _, layer in finished[mode].model.ternary_layers():
        assert torch.equal(layer.operand, ternarize(layer.weight, layer.quant.scale).codes.float())
    for name, parameter in finished[mode].model.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name])


@pytest.mark.parametrize("mode", MODES)
def test_codes_flip_and_the_log_says_how_many(finished, source, mode):
    lines = read_metrics(finished[mode].run_dir)
    assert all(0 < line["ternary/flip_rate"] < 0.1 for line in lines if line["policy/updates"])
    before, _, _ = load_run(source)
    flips = [
        (layer.ternary().codes != other.ternary().codes).float().mean()
        for (_, layer), (_, other) in zip(finished[mode].model.ternary_layers(), before.ternary_layers(), strict=True)
    ]
    assert max(flips) > 0


@pytest.mark.parametrize(("mode", "stop_after"), [("policy", 30), ("policy", 50), ("rft", 50)])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(source, tmp_path, mode, stop_after):
    settings = {"mode": mode, "rounds": 3, "kl_weight": 0.01 if mode == "policy" else 0.0}
    whole = grpo_run(source, tmp_path / "whole", **settings)
    whole.run()
    part = grpo_run(source, tmp_path / "part", **settings, pool=StoppingPool(stop_after))
    with pytest.raises(BaseException, match="stopped by SIGINT"):
        part.run()
    resumed = grpo_run(source, tmp_path / "part", **settings, resume=True)
    assert 0 <= resumed.round < 3
    resumed.run()
    one, other = (checkpoints.load(run.run_dir).tensors for run in (whole, resumed))
    assert_equal(one, other)
    assert untimed(whole.run_dir) == untimed(resumed.run_dir)


def assert_equal(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_equal(one[name], other[name])
    else:
        assert one == other


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_parts_of_a_batch_add_up_to_its_gradient(learner, drawn, tmp_path, micro_batch, aggregation):
    objective = PolicyObjective(config_of(tmp_path, temperature=0.8, aggregation=aggregation).grpo)
    batch = collate(drawn[:7])
    learner.state.progress.micro_batch = len(batch.mask)
    whole = learner.gradient(batch, objective)
    expected = [parameter.grad.clone() for parameter in learner.model.parameters()]
    learner.state.progress.micro_batch = micro_batch
    parts = learner.gradient(batch, objective)
    assert parts == pytest.approx(whole, abs=1e-5)
    for parameter, gradient in zip(learner.model.parameters(), expected, strict=True):
        scale = gradient.abs().max().item() + 1e-8
        assert torch.allclose(parameter.grad, gradient, atol=1e-4 * scale + 1e-7)


def test_the_gradient_is_that_of_the_advantage_weighted_likelihood_where_nothing_has_moved(learner, drawn, tmp_path):
    """At a ratio of 1 the objective's gradient is −mean A ∇ log p (policy gradient theorem)."""
    batch = collate(drawn[:6])
    learner.gradient(batch, PolicyObjective(config_of(tmp_path, temperature=0.8).grpo))
    found = learner.model.embedding.weight.grad.clone()
    learner.discard()
    log_probabilities = completion_log_probabilities(learner.model, batch, 0.8)
    weighted = (log_probabilities * batch.advantages.unsqueeze(1)).sum() / batch.mask.sum()
    (-weighted).backward()
    expected = learner.model.embedding.weight.grad
    assert torch.allclose(found, expected, atol=1e-3 * expected.abs().max().item())


def test_an_update_makes_better_answers_more_probable(learner, drawn, tmp_path):
    config = config_of(tmp_path, temperature=0.8, updates=1, batch_size=64).grpo
    batch = collate(drawn)

    def expected_advantage():
        with torch.no_grad():
            found = completion_log_probabilities(learner.model, batch, 0.8)
        return ((found - batch.old) * batch.advantages.unsqueeze(1)).sum().item()

    assert abs(expected_advantage()) < 0.05
    learn_round(learner, PolicyObjective(config), drawn, config, 0, 1)
    assert learner.updates == 1
    assert expected_advantage() > 0.5


def test_rollouts_of_an_old_policy_are_not_learned_from(learner, drawn, tmp_path):
    config = config_of(tmp_path, temperature=0.8, batch_size=8, updates=8, epochs=4, max_divergence=1e-4).grpo
    metrics = learn_round(learner, PolicyObjective(config), drawn, config, 0, 1)
    taken = metrics["policy/updates"]
    assert 1 <= taken < 8  # the first batch is always on-policy
    assert metrics["policy/stale_batches"] == 8 - taken
    assert learner.updates == taken
    stale = copy.deepcopy(learner.model.state_dict())
    again = learn_round(learner, PolicyObjective(config), drawn, config, 0, 1)
    assert again["policy/updates"] == 0
    assert_equal(learner.model.state_dict(), stale)


def test_groups_of_equal_rewards_teach_nothing(source, tmp_path):
    class FailingPool(ReadingPool):
        def _judge(self, program):
            return super()._judge(program).__class__("not compiled", "compile error", total=len(program.tests))

    for mode in MODES:
        run = grpo_run(source, tmp_path / mode, mode=mode, rounds=1, pool=FailingPool())
        run.run()
        ours, theirs = (checkpoints.load(one).tensors["model"] for one in (run.run_dir, source))
        assert_equal(ours, theirs)
        assert read_metrics(run.run_dir)[0]["policy/updates"] == 0


def test_good_answers_are_those_with_a_large_reward_that_fit_each_once(source):
    _, tokenizer, _ = load_run(source)
    experiences = [
        Experience(prompt, answer, reward, 0.1, 0.0)
        for prompt, answer, reward in (
            ("def a(x):\n", "    return x + 1\n", 1.0),
            ("def a(x):\n", "    return x + 1\n", 0.9),
            ("def a(x):\n", "    return x + 2\n", 0.4),
            ("def a(x):\n", "    return x" + " + 1" * 500, 1.0),
            ("def a(x):\n", "", 1.0),
            ("def b(x):\n", "    return x + 1\n", 0.5),
        )
    ]
    found = good_answers(experiences, tokenizer, min_reward=0.5, context=96)
    written = [(tokenizer.decode(one.prompt), tokenizer.decode(one.completion)) for one in found]
    assert written == [("def a(x):\n", "    return x + 1\n"), ("def b(x):\n", "    return x + 1\n")]


def test_a_finished_answer_is_learned_with_the_token_that_ends_it(source):
    _, tokenizer, _ = load_run(source)
    answers = {"    return x + 1\n": {"ended": True}, "    return x +": {"ended": False}, "    return x + 2\n": {}}
    experiences = [Experience("def a(x):\n", answer, 1.0, 0.1, 0.0, metadata) for answer, metadata in answers.items()]
    found = good_answers(experiences, tokenizer, min_reward=0.5, context=96)
    assert [one.completion[-1] == tokenizer.eos_id for one in found] == [True, False, False]
    learned = [target for row, mask in zip(*collate(found[:1])[1:3], strict=True) for target in row[mask].tolist()]
    assert learned == [*tokenizer.encode("    return x + 1\n"), tokenizer.eos_id]


@pytest.mark.parametrize(
    ("text", "finish", "code", "ended"),
    [
        ("    return 1\n", "eos", "    return 1\n", True),
        ("    return 1\n", "stop", "    return 1\n", True),
        ("    return 1 + ", "length", "    return 1 + ", False),
        ("    return 1\ndef g", "length", "    return 1\n", True),
    ],
)
def test_an_answer_cut_off_by_its_length_is_not_finished(text, finish, code, ended):
    rollout = Rollout(Problem("a", "python", "", ()), 0, Prompt(""), Completion(text, (1,), (0.0,), finish))
    assert Judged(rollout, code, Outcome("ran", "ok"), Reward(1.0, {})).ended is ended


def test_answers_to_held_out_problems_are_not_learned_though_a_library_holds_them(source, tmp_path):
    library = tmp_path / "library.jsonl"
    first = grpo_run(source, tmp_path / "first", library=library, rounds=1)
    held_out = first.problems.held_out[0]
    first.library.add([Experience(held_out.prompt, "    return x + 1\n", 1.0, 9.0, 0.0)])
    run = grpo_run(source, tmp_path / "second", mode="rft", library=library, rounds=1, min_reward=1.0)
    learned = []
    run.learner.gradient = lambda batch, _: learned.append(batch) or {"loss/objective": 0.0}
    run.learner.update = lambda loss: {"training/grad_norm": 0.0}
    run.run()
    assert learned
    prompts = {run.tokenizer.decode(row.tolist()).partition(":")[0] for batch in learned for row in batch.inputs}
    assert held_out.prompt.partition(":")[0] not in prompts


def test_the_objective_of_good_answers_is_their_cross_entropy(learner, source):
    _, tokenizer, _ = load_run(source)
    examples = [Trajectory(tuple(tokenizer.encode(p)), tuple(tokenizer.encode(a))) for p, a in texts()[:5]]
    found = learner.gradient(collate(examples), LikelihoodObjective())["loss/objective"]
    total = count = 0
    for example in examples:  # one at a time, without padding
        tokens = torch.tensor([[*example.prompt, *example.completion]])
        logits = learner.model.logits(learner.model(tokens[:, :-1]))[0, len(example.prompt) - 1 :]
        total += torch.nn.functional.cross_entropy(logits, tokens[0, len(example.prompt) :], reduction="sum").item()
        count += len(example.completion)
    assert found == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize(
    "combination", ["mhc-2+hybrid+moe+tied", "plain+attention+moe+untied", "mhc-4+hybrid+dense+untied"]
)
def test_every_architecture_learns_from_what_its_packed_form_drew(source, tmp_path, combination):
    _, tokenizer, _ = load_run(source)
    torch.manual_seed(1)
    model = Transformer(ModelConfig.model_validate(shape(combination, vocab_size=300)))
    config = config_of(tmp_path, temperature=1.0)
    learner = Learner(model, config, QuietReporter())
    sampler = Sampler(tokenizer, 1.0, 8, seed=4)
    sampler.refresh(learner.model)
    problem = problems(tmp_path)[0]
    drawn = [rollout.completion for rollout in sampler.group(problem, plain(problem), 4, 1)]
    prompt = tuple(tokenizer.encode(problem.prompt))
    trajectories = [
        Trajectory(prompt, one.tokens, sign, one.log_probabilities)
        for one, sign in zip(drawn, (1, -1, 1, -1), strict=True)
    ]
    metrics = learner.gradient(collate(trajectories), PolicyObjective(config.grpo))
    assert metrics["policy/kl_old"] < 1e-4
    before = copy.deepcopy(learner.model.state_dict())
    assert learner.update(metrics["loss/objective"])["training/grad_norm"] > 0
    assert any(not torch.equal(before[name], value) for name, value in learner.model.state_dict().items())
    assert learner.state.skip_policy.skipped == 0


def test_updates_that_are_not_finite_end_the_run_naming_the_last_good_round(learner):
    learner.state.skip_policy.max_skipped_steps = 2
    assert learner.saved("that of round 1")
    learner.update(math.nan)
    assert not learner.saved("that of round 2")
    with pytest.raises(Diverged, match=r"the last good checkpoint is that of round 1; lower grpo.lr_factor$"):
        learner.update(math.nan)


def test_batches_hold_everything_once_per_pass_and_depend_on_seed_and_round():
    items = list(range(25))
    found = batches(items, 8, 2, seed=1, round_number=3)
    assert [len(batch) for batch in found] == [8, 8, 8, 1] * 2
    first, second = (list(chain(*found[start : start + 4])) for start in (0, 4))
    assert sorted(first) == sorted(second) == items
    assert first != second
    assert found == batches(items, 8, 2, seed=1, round_number=3)
    assert found != batches(items, 8, 2, seed=1, round_number=4)
    assert found != batches(items, 8, 2, seed=2, round_number=3)
