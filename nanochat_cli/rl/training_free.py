"""Training-free GRPO (arXiv:2510.08191): the weights stay the same, and later rollouts see more in their prompts.

A round answers every problem a few times, conditioned on earlier rounds: experiences of other problems as examples, and
lessons in words if there are any. Answers that did better than their group become experiences.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nanochat_cli.config.sections.grpo import GRPOConfig
from nanochat_cli.evaluation.problem import Problem
from nanochat_cli.rl.experience import Experience, ExperienceLibrary, few_shot_prompt
from nanochat_cli.rl.judging import Judged
from nanochat_cli.rl.lessons import Lessons
from nanochat_cli.rl.rollouts import Prompt, Sampler


@dataclass(frozen=True)
class Conditioning:
    """Makes the prompts of a round from the library and the lessons; seed, round and problem decide what is drawn."""

    library: ExperienceLibrary
    lessons: Lessons
    sampler: Sampler
    config: GRPOConfig
    seed: int
    round_number: int

    def __call__(self, problem: Problem) -> Prompt:
        """Lessons, examples, then the problem. Leaves out what does not fit, and every answer to the same problem."""
        advice = self.lessons.comment(problem.language)
        if not self.sampler.has_room(advice + problem.prompt):
            advice = ""
        shown = self.experiences(problem)
        fits = self.sampler.has_room
        text = few_shot_prompt(shown, problem.prompt, fits=lambda examples: fits(advice + examples))
        examples = [one.response for one in shown if one.prompt + one.response.rstrip() in text]
        return Prompt(advice + text, (*examples, *(self.lessons.texts if advice else ())))

    def experiences(self, problem: Problem) -> list[Experience]:
        """Up to `grpo.shots` in the problem's language, drawn ∝ exp(advantage / `grpo.shot_temperature`)."""
        digest = hashlib.sha256(f"shots/{self.seed}/{self.round_number}/{problem.id}".encode()).digest()
        drawn = self.library.sample(
            len(self.library) if self.config.shots else 0,
            np.random.default_rng(int.from_bytes(digest[:8])),
            temperature=self.config.shot_temperature,
            exclude_prompt=problem.prompt,
        )
        # All are drawn without replacement: the first of this language are a draw of that many from this language.
        same = [one for one in drawn if one.metadata.get("language", problem.language) == problem.language]
        return same[: self.config.shots]


def remember(library: ExperienceLibrary, group: Sequence[Judged], config: GRPOConfig, round_number: int) -> int:
    """Add those answers to one problem that did better than the others; returns how many."""
    problem = group[0].rollout.problem
    kept = library.add_group(
        problem.prompt,
        [judged.code for judged in group],
        [judged.reward.total for judged in group],
        threshold=config.threshold,
        standardise=config.standardise,
        metadata=[
            {
                "problem": problem.id,
                "language": problem.language,
                "round": round_number,
                "solved": judged.solves,
                "ended": judged.ended,
                "terms": dict(judged.reward.terms),
            }
            for judged in group
        ],
    )
    return len(kept)
