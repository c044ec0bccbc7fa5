"""Draw completions of problems, let the sandbox judge them, and write a line for each problem as it comes.

While the sandbox judges one problem, the next one is drawn. Each problem is drawn by itself with seeds of its own, so
that its completions do not depend on which problems came before. Figures are made from the lines (`suite_report`).
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from nanochat_cli.evaluation.problem import Problem, assemble
from nanochat_cli.evaluation.rejection import rejection
from nanochat_cli.evaluation.sample_file import SampleFile
from nanochat_cli.evaluation.suites import SuiteOptions
from nanochat_cli.inference.batched import Completion, sample_batch
from nanochat_cli.inference.generate import LanguageModel, TextTokenizer, encode_prompt
from nanochat_cli.inference.sampling import SamplingConfig
from nanochat_cli.report.reporter import Reporter
from nanochat_cli.sandbox.pool import SandboxPool

Draw = Callable[[Problem, float, int], list[Completion] | None]
"""(problem, temperature, seed) to its completions; None when the prompt is longer than the context of the model."""


def drawing(model: LanguageModel, tokenizer: TextTokenizer, options: SuiteOptions) -> Draw:
    """Completions by a model, `options.samples` of each problem at once."""

    def draw(problem: Problem, temperature: float, seed: int) -> list[Completion] | None:
        if len(encode_prompt(tokenizer, problem.prompt)) > model.config.max_seq_len:
            return None
        settings = SamplingConfig(
            max_tokens=options.max_tokens, temperature=temperature, top_p=options.top_p, stop=problem.stop
        )
        return sample_batch(model, tokenizer, [problem.prompt], options.samples, settings, [seed])[0]

    return draw


def fingerprint(problems: Sequence[Problem]) -> str:
    """SHA-256 over what is asked and how it is tested."""
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
    """Add the lines that `file` lacks; `what` names the suite for a person. Raises what drawing and judging raise."""
    missing = [
        (temperature, problem)
        for temperature in options.temperatures
        for problem in problems
        if (temperature, problem.id) not in file.records
    ]
    asked = len(options.temperatures) * len(problems)
    if len(missing) < asked:
        reporter.info(f"{what}: {asked - len(missing)} of {asked} are in {file.path}")
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


def problem_seed(seed: int, temperature: float, problem_id: str) -> int:
    """Completion j of a problem draws with this plus j."""
    digest = hashlib.sha256(f"{seed}/{temperature!r}/{problem_id}".encode()).digest()
    return int.from_bytes(digest[:7])


def _record(
    problem: Problem,
    temperature: float,
    seed: int,
    completions: list[Completion] | None,
    pool: SandboxPool,
    samples: int,
) -> dict[str, Any]:
    """The line of a problem. One whose prompt does not fit has `samples` completions that failed, and no texts."""
    record = {
        "problem": problem.id,
        "language": problem.language,
        "level": problem.level,
        "temperature": temperature,
        "seed": seed,
        "fits": completions is not None,
        "samples": samples,
    }
    return {**record, "completions": [] if completions is None else judge(problem, completions, pool)}


def judge(problem: Problem, completions: Sequence[Completion], pool: SandboxPool) -> list[dict[str, Any]]:
    """What became of each completion, as JSON values.

    `passed`: every test passes; of a problem without tests: it compiles, and there is work in it (`rejection`).
    """
    programs = [assemble(problem, one.text, stopped=one.finish == "stop") for one in completions]
    found = []
    for one, program, outcome in zip(completions, programs, pool.judge_all(programs), strict=True):
        code = program.source.removeprefix(problem.prompt)
        rejected = rejection(problem.language, problem.prompt, code, solved=outcome.solved)
        found.append(
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
    return found
