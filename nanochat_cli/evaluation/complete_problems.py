"""Draw completions of problems, let the sandbox judge them, and write one line per problem as it is done.

While the sandbox judges one problem, the next one is drawn. Each problem is drawn alone and with its own seeds, so that
its completions do not depend on the problems before it. `suite_report` computes the figures from the lines.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from nanochat_cli.evaluation.problem import Problem, assemble
from nanochat_cli.evaluation.rejection_reason import rejection_reason
from nanochat_cli.evaluation.sample_file import SampleFile
from nanochat_cli.evaluation.suites import SuiteOptions
from nanochat_cli.inference.batched import Completion, sample_batch
from nanochat_cli.inference.generate import encode_prompt
from nanochat_cli.inference.language_model import LanguageModel, TextTokenizer
from nanochat_cli.inference.sampling import SamplingConfig
from nanochat_cli.report.reporter import Reporter
from nanochat_cli.sandbox.pool import SandboxPool

Draw = Callable[[Problem, float, int], list[Completion] | None]
"""(problem, temperature, seed) → completions; None when the prompt is longer than the model's context."""


def drawing(model: LanguageModel, tokenizer: TextTokenizer, options: SuiteOptions) -> Draw:
    """Draw from a model, `options.samples` completions of a problem at once."""

    def draw(problem: Problem, temperature: float, seed: int) -> list[Completion] | None:
        if len(encode_prompt(tokenizer, problem.prompt)) > model.config.max_seq_len:
            return None
        settings = SamplingConfig(
            max_tokens=options.max_tokens, temperature=temperature, top_p=options.top_p, stop=problem.stop
        )
        return sample_batch(model, tokenizer, [problem.prompt], options.samples, settings, [seed])[0]

    return draw


def fingerprint(problems: Sequence[Problem]) -> str:
    """SHA-256 of what the problems ask and how they are tested."""
    content = [
        [problem.id, problem.language, problem.prompt, problem.stop, problem.support]
        + [[test.call, test.expected] for test in problem.tests]
        for problem in problems
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def complete_problems(
    problems: Sequence[Problem],
    draw: Draw,
    pool: SandboxPool,
    options: SuiteOptions,
    file: SampleFile,
    reporter: Reporter,
    what: str,
) -> None:
    """Add the lines that `file` lacks. what: the suite, for messages. Raises what drawing and judging raise."""
    missing = [
        (temperature, problem)
        for temperature in options.temperatures
        for problem in problems
        if (temperature, problem.id) not in file.records
    ]
    asked = len(options.temperatures) * len(problems)
    if len(missing) < asked:
        reporter.info(f"{what}: {asked - len(missing)} of {asked} are already in {file.path}")
    with (
        ThreadPoolExecutor(1, thread_name_prefix="judge") as executor,
        reporter.progress(what, total=len(missing), unit="problems") as progress,
    ):
        judged: Future[dict[str, Any]] | None = None
        for temperature, problem in missing:
            seed = problem_seed(options.seed, temperature, problem.id)
            completions = draw(problem, temperature, seed)
            if judged is not None:
                file.append(judged.result())
                progress.advance()
            judged = executor.submit(_record, problem, temperature, seed, completions, pool, options.samples)
        if judged is not None:
            file.append(judged.result())
            progress.advance()


def problem_seed(seed: int, turn: float, problem_id: str) -> int:
    """The seed of completion 0 of a problem; completion j draws with this plus j. turn: a temperature or a round."""
    digest = hashlib.sha256(f"{seed}/{turn!r}/{problem_id}".encode()).digest()
    return int.from_bytes(digest[:7])  # below 2⁵⁶, so that adding j keeps it a seed


def _record(
    problem: Problem,
    temperature: float,
    seed: int,
    completions: list[Completion] | None,
    pool: SandboxPool,
    samples: int,
) -> dict[str, Any]:
    """The line of a problem. If its prompt does not fit, it counts `samples` failed completions and has no texts."""
    record = {
        "problem": problem.id,
        "language": problem.language,
        "level": problem.level,
        "temperature": temperature,
        "seed": seed,
        "fits": completions is not None,
        "samples": samples,
    }
    return {**record, "completions": [] if completions is None else judge_completions(problem, completions, pool)}


def judge_completions(problem: Problem, completions: Sequence[Completion], pool: SandboxPool) -> list[dict[str, Any]]:
    """The verdict about each completion, as JSON values.

    `passed`: every test passes; for a problem without tests: it compiles and is not rejected (`rejection_reason`).
    """
    programs = [assemble(problem, one.text, stopped=one.finish == "stop") for one in completions]
    verdicts = []
    for one, program, outcome in zip(completions, programs, pool.judge_all(programs), strict=True):
        code = program.source.removeprefix(problem.prompt)
        rejected = rejection_reason(problem.language, problem.prompt, code, solved=outcome.solved)
        verdicts.append(
            {
                "passed": outcome.solved if problem.tests else outcome.compiled and rejected is None,
                "compiled": outcome.compiled,
                "rejected": rejected,
                "status": outcome.status,
                "tests_passed": outcome.passed,
                "tests": outcome.total,
                "finish": one.finish,
                "tokens": len(one.tokens),
                "text": one.text,
            }
        )
    return verdicts
