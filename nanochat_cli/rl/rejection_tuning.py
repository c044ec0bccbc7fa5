"""Rejection-sampling fine-tuning: the model learns to write its own good answers again (arXiv:2308.01825).

Good answers are experiences of the library whose reward reaches `grpo.min_reward`, so that those of earlier rounds and
of other runs count too. The loss is the mean cross-entropy of their tokens; the prompt's do not count.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from nanochat_cli.config.sections.grpo import GRPOConfig
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.inference.generate import encode_prompt
from nanochat_cli.rl.experience import Experience
from nanochat_cli.rl.learner import Learner
from nanochat_cli.rl.policy import means
from nanochat_cli.rl.trajectories import Batch, Trajectory, batches, collate


class LikelihoodObjective:
    """Mean negative log-likelihood per token of the completions, at temperature 1."""

    temperature = 1.0

    def divisor(self, batch: Batch) -> Tensor:
        return batch.mask.sum()

    def __call__(self, log_probabilities: Tensor, part: Batch, divisor: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return -log_probabilities.sum() / divisor, {}


def good_answers(
    experiences: Sequence[Experience], tokenizer: Tokenizer, *, min_reward: float, context: int
) -> list[Trajectory]:
    """Each different prompt and answer once, those that the context holds, in the order of the library.

    An answer that came to its end is learned with EOS behind it; one that was cut off by its length is not.
    """
    found: dict[tuple[str, str], Trajectory] = {}
    for one in experiences:
        prompt, answer = tuple(encode_prompt(tokenizer, one.prompt)), tuple(tokenizer.encode(one.response))
        if answer and one.metadata.get("ended"):
            answer = (*answer, tokenizer.eos_id)
        if one.reward >= min_reward and answer and len(prompt) + len(answer) <= context + 1:
            found.setdefault((one.prompt, one.response), Trajectory(prompt, answer))
    return list(found.values())


def learn_answers(
    learner: Learner,
    answers: Sequence[Trajectory],
    config: GRPOConfig,
    seed: int,
    round_number: int,
    before_each: Callable[[int, int], None] = lambda _, __: None,
) -> dict[str, float]:
    """One round of updates; its metrics are means over them. before_each: (updates done, updates at most)."""
    planned = batches(answers, config.batch_size, config.epochs, seed, round_number)[: config.updates]
    objective = LikelihoodObjective()
    taken: list[dict[str, float]] = []
    for number, chosen in enumerate(planned):
        before_each(number, len(planned))
        metrics = learner.gradient(collate(chosen), objective)
        taken.append(metrics | learner.update(metrics["loss/objective"]))
    return means(taken) | {"policy/updates": len(taken), "policy/good_answers": len(answers)}
