"""Rejection-sampling fine-tuning: the model learns to write its own good answers again (arXiv:2308.01825).

Good answers are experiences of the library whose reward reaches `grpo.min_reward`, so that those of earlier rounds and
of other runs count too. The loss is the mean cross-entropy over the tokens of the answers, without the prompts.
"""

from collections.abc import Sequence

from torch import Tensor

from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.inference.generate import encode_prompt
from nanochat_cli.rl.experience import Experience
from nanochat_cli.rl.trajectories import Batch, Trajectory


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
    """Each different pair of prompt and answer once, if the context holds it, in the order of the library.

    An answer that was finished is learned with EOS after it; one that was cut off by its length is not.
    """
    answers: dict[tuple[str, str], Trajectory] = {}
    for one in experiences:
        prompt, answer = tuple(encode_prompt(tokenizer, one.prompt)), tuple(tokenizer.encode(one.response))
        if answer and one.metadata.get("ended"):
            answer = (*answer, tokenizer.eos_id)
        if one.reward >= min_reward and answer and len(prompt) + len(answer) <= context + 1:
            answers.setdefault((one.prompt, one.response), Trajectory(prompt, answer))
    return list(answers.values())
