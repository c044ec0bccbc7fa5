"""From rollouts to rewards: the sandbox judges their programs, `rewards` scores the outcomes.

`collect` draws and judges at the same time: while the sandbox works on one problem, the model answers the next.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from nanochat_cli.config.sections.grpo import GRPOConfig
from nanochat_cli.evaluation.problem import Problem, assemble
from nanochat_cli.report.reporter import Reporter
from nanochat_cli.rl.rewards import Attempt, Reward, RewardConfig, load_rewards, reward
from nanochat_cli.rl.rollouts import Prompt, Rollout, Sampler
from nanochat_cli.sandbox.limits import Outcome
from nanochat_cli.sandbox.pool import SandboxPool
from nanochat_cli.sandbox.sandbox import Sandbox


@dataclass(frozen=True)
class Judged:
    """A rollout with its verdict. code: the completion that was judged, cut where the function ends."""

    rollout: Rollout
    code: str
    outcome: Outcome
    reward: Reward

    @property
    def ended(self) -> bool:
        """The model finished the function: it stopped, or what it wrote after the function was cut off."""
        completion = self.rollout.completion
        return completion.finish != "length" or len(self.code) < len(completion.text)

    @property
    def compiles(self) -> bool:
        """It compiles, and was not rejected (as empty, a comment, a copy or trivial)."""
        return self.outcome.compiled and self.reward.rejected is None

    @property
    def solves(self) -> bool:
        """Every test passes, and it was not rejected."""
        return self.outcome.solved and self.reward.rejected is None


@dataclass(frozen=True)
class Judge:
    """Judges rollouts; verdicts keep their order."""

    pool: SandboxPool
    rewards: RewardConfig
    isolation: str = "none"
    """How the sandbox keeps programs apart, for reports."""

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Judged]:
        """Raises what the sandbox raises, and ConfigError when no term of the reward applies."""
        programs = [assemble(rollout.problem, rollout.completion.text) for rollout in rollouts]
        outcomes = self.pool.judge_all(programs)
        judged = []
        for rollout, program, outcome in zip(rollouts, programs, outcomes, strict=True):
            problem = rollout.problem
            code = program.source[len(problem.prompt) :]
            attempt = Attempt(
                problem.language, problem.prompt, code, outcome, len(problem.tests), rollout.prompt.examples
            )
            judged.append(Judged(rollout, code, outcome, reward(attempt, self.rewards)))
        return judged


@contextmanager
def open_judge(config: GRPOConfig, languages: Sequence[str], reporter: Reporter) -> Iterator[Judge]:
    """A judge with a sandbox for these languages. Raises ConfigError for bad rewards or a language that cannot run."""
    rewards = RewardConfig() if config.rewards is None else load_rewards(config.rewards)
    sandbox = Sandbox()
    for language in languages:
        sandbox.toolchain(language)
    reporter.info(f"sandbox: {sandbox.isolation.description}")
    with SandboxPool(sandbox, config.workers) as pool:
        yield Judge(pool, rewards, sandbox.isolation.description)


def collect(
    problems: Sequence[Problem],
    sampler: Sampler,
    judge: Judge,
    n: int,
    round_number: int,
    prompt: Callable[[Problem], Prompt],
    before_each: Callable[[int], None] = lambda _: None,
) -> Iterator[list[Judged]]:
    """n judged rollouts of each problem, in order.

    before_each: called before each problem with the number of those done; if it raises, collection ends.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="judge") as executor:
        waiting: list[Future[list[Judged]]] = []
        try:
            for done, problem in enumerate(problems):
                before_each(done)
                waiting.append(executor.submit(judge, sampler.group(problem, prompt(problem), n, round_number)))
                while len(waiting) > 1:
                    yield waiting.pop(0).result()
            for future in waiting:
                yield future.result()
        finally:
            executor.shutdown(cancel_futures=True)


def rollout_metrics(groups: Sequence[Sequence[Judged]]) -> dict[str, float]:
    """Means over all rollouts of a round; for a term of the reward, over those that have it."""
    everything = [judged for group in groups for judged in group]
    values: dict[str, list[float]] = {}
    for judged in everything:
        for name, value in judged.reward.metrics().items():
            values.setdefault(name, []).append(value)
    count = len(everything)
    differing = [len({judged.reward.total for judged in group}) > 1 for group in groups]
    return {name: sum(of_name) / len(of_name) for name, of_name in values.items()} | {
        "rollouts/pass_rate": sum(judged.solves for judged in everything) / count,
        "rollouts/compile_rate": sum(judged.compiles for judged in everything) / count,
        "rollouts/tokens": sum(len(judged.rollout.completion.tokens) for judged in everything) / count,
        "rollouts/informative_groups": sum(differing) / len(groups),
    }
