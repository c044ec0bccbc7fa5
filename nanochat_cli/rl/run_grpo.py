"""A GRPO run: rounds of rollouts, verdicts and learning, from one run's model into the folder of another.

Knows the order of events and the layout of the folder; a checkpoint after every round holds everything that the next
one depends on, the run's own library included, so that a resumed run equals the uninterrupted one. How a round learns
is in `training_free`, `policy` and `rejection_sampling_tuning`.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat_cli.config.schema import Config, GRPOConfig
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import DataError, Interrupted
from nanochat_cli.evaluation.complete_problems import fingerprint
from nanochat_cli.evaluation.problem import Problem
from nanochat_cli.formats.open import load_run, open_run
from nanochat_cli.formats.run import checkpoints
from nanochat_cli.formats.run.metrics import open_metrics
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.report.metrics_log import MetricsLog
from nanochat_cli.report.quantities import counted
from nanochat_cli.report.reporter import Reporter
from nanochat_cli.rl.chat_endpoint import ChatEndpoint
from nanochat_cli.rl.evaluation_pair import COLUMNS, ProblemScore, Scores, differences, rows, score, write_report
from nanochat_cli.rl.experience import Experience, ExperienceLibrary
from nanochat_cli.rl.judging import Judge, Judged, collect, rollout_metrics
from nanochat_cli.rl.learner import Learner
from nanochat_cli.rl.lessons import Lessons, require_answer
from nanochat_cli.rl.policy import PolicyObjective, learn_round, trajectories_of
from nanochat_cli.rl.problem_split import ProblemSplit
from nanochat_cli.rl.rejection_sampling_tuning import LikelihoodObjective, good_answers
from nanochat_cli.rl.rollouts import Prompt, Sampler
from nanochat_cli.rl.rounds_view import RoundsView
from nanochat_cli.rl.training_free import Conditioning, remember
from nanochat_cli.training.devices import choose_device
from nanochat_cli.training.stop_signals import StopSignals

LIBRARY_FILE = "experiences.jsonl"
MEASURED = 0
"""The round number for the random numbers of before and after; rounds of practice count from 1."""


@dataclass
class Start:
    """What a run starts from: the latest checkpoint of its source, or of its own after some rounds.

    reference: the model whose distance to the policy is penalised. mtp: the source's multi-token prediction, which is
    kept unchanged, since it only drafts. saved: the checkpoint of a run that continues.
    """

    model: Transformer
    tokenizer: Tokenizer
    reference: Transformer | None
    mtp: dict[str, Any] | None
    saved: checkpoints.Checkpoint | None = None

    @classmethod
    def of_source(cls, source: Path, config: Config) -> "Start":
        """The beginning of a run. Raises DataError if the endpoint of lessons does not answer."""
        if (endpoint := _endpoint(config.grpo)) is not None:
            require_answer(endpoint)
        torch.manual_seed(config.run.seed)
        run = open_run(source)
        reference = copy.deepcopy(run.model) if config.grpo.kl_weight and config.grpo.mode == "policy" else None
        return cls(run.model, run.tokenizer, reference, run.parts.get("mtp"))

    @classmethod
    def of_run(cls, run_dir: Path, config: Config) -> "Start":
        """After the last round that was saved. Raises DataError for another kind of run."""
        model, tokenizer, _ = load_run(run_dir)
        saved = checkpoints.load(run_dir)
        if "grpo" not in saved.state:
            raise DataError(f"{saved.path}: not a checkpoint of nanochat grpo; name a run that it began")
        reference = None
        if (weights := saved.tensors.get("reference")) is not None:
            reference = Transformer(config.model)
            reference.load_state_dict(weights)
            reference.requantize()
        return cls(model, tokenizer, reference, saved.tensors.get("mtp"), saved)


class GRPORun:
    """One run in `run_dir`, ready for `run`."""

    def __init__(
        self, config: Config, run_dir: Path, problems: ProblemSplit, judge: Judge, reporter: Reporter, start: Start
    ) -> None:
        self.config, self.run_dir, self.reporter, self.judge = config, run_dir, reporter, judge
        self.grpo = grpo = config.grpo
        self.round = 0
        """Rounds that are done."""
        self.before: Scores | None = None
        self.lessons = Lessons(grpo.max_lessons)
        self.endpoint = _endpoint(grpo)
        self.tokenizer, self.mtp, self.reference = start.tokenizer, start.mtp, start.reference
        self.learner = None if grpo.mode == "training-free" else Learner(start.model, config, reporter)
        model = start.model.to(choose_device(config.train.device)) if self.learner is None else self.learner.model
        self.model = model
        self.sampler = Sampler(self.tokenizer, grpo.temperature, grpo.max_tokens, config.run.seed)
        self.sampler.refresh(model)
        self.problems = self._fitting(problems.for_tokenizer(self.tokenizer.encode))
        self.view = RoundsView(reporter, grpo.rounds, title=run_dir.name, languages=self.problems.languages)
        self.stop = StopSignals(self._say_stopping)
        if self.reference is not None:
            self.reference = self.reference.to(model.device).eval().requires_grad_(False)
        if self.learner is not None and start.saved is None:
            self.learner.ternary_statistics()  # what the first round's flips are counted from
        self.library = self._restore(start.saved) if start.saved is not None else self._open_library()

    def _restore(self, saved: checkpoints.Checkpoint) -> ExperienceLibrary:
        """Continue after a round; returns the library as it was then."""
        state = saved.state["grpo"]
        if self.learner is not None:
            self.learner.restore(checkpoints.load(self.run_dir, device=self.model.device).tensors, state["learner"])
            self.learner.saved(f"that of round {saved.step}")
        self.round, self.lessons.texts = saved.step, list(state["lessons"])
        self.before = {problem: ProblemScore(**values) for problem, values in state["before"].items()}
        if self.before.keys() != {problem.id for problem in (*self.problems.practised, *self.problems.held_out)}:
            raise DataError(f"{self.grpo.task}: not the problems that {self.run_dir} began with; start a new run")
        if state.get("problems", self._fingerprint()) != self._fingerprint():  # same ids, other prompts or tests
            raise DataError(f"{self.grpo.task}: its problems have changed since {self.run_dir} began; start a new run")
        if state["library"] is not None:
            (self.run_dir / LIBRARY_FILE).unlink(missing_ok=True)  # it may hold answers of an unfinished round
        library = self._open_library()
        if state["library"] is not None:
            library.add(Experience(**values) for values in state["library"])
        checkpoints.restore_rng_state(saved.tensors["random"])
        self.reporter.info(f"resumed after round {self.round} of {self.grpo.rounds}")
        return library

    def _fitting(self, problems: ProblemSplit) -> ProblemSplit:
        """The problems whose prompt leaves room for an answer."""
        practised, held_out = (
            tuple(p for p in part if self.sampler.room(p.prompt) > 0)
            for part in (problems.practised, problems.held_out)
        )
        if left_out := len(problems.practised) + len(problems.held_out) - len(practised) - len(held_out):
            context = self.sampler.context
            self.reporter.warn(f"left out {counted(left_out, 'problem')}: no room in the context of {context} tokens")
        if not practised:
            raise DataError(
                f"{self.grpo.task}: no problem leaves the model room to answer; train with a longer context"
            )
        return ProblemSplit(practised, held_out)

    def _fingerprint(self) -> str:
        return fingerprint((*self.problems.practised, *self.problems.held_out))

    def _open_library(self) -> ExperienceLibrary:
        return ExperienceLibrary(self.grpo.library or self.run_dir / LIBRARY_FILE)

    # -- rounds ----------------------------------------------------------------------------------------------

    def run(self) -> Path:
        """All rounds that are left, and the report; returns its path. Raises Interrupted after a signal."""
        resumed = self.round if self.before is not None else None
        log = open_metrics(self.run_dir, self.config, resumed)
        with self.stop, log, self.view:
            if self.before is None:
                self.before = self._measure("before", plain)
                self.save()
            while self.round < self.grpo.rounds:
                self._round(self.round + 1, log)
                self.save()
            after = self._measure("after", self._conditioning(MEASURED))
        path = self._report(self.before, after)
        if not self.learned:
            what = "the library is empty" if self.learner is None else f"the weights are those of {self.grpo.source}"
            self.reporter.warn(
                f"nothing was learned: {what}. Try easier problems (--set grpo.max_level=1), more and more varied "
                "answers (--group 16 --set grpo.temperature=1), or a model that was trained for longer"
            )
        return path

    @property
    def learned(self) -> bool:
        """Something differs from the source: the weights, or what precedes a prompt."""
        if self.learner is not None:
            return self.learner.updates > 0
        return len(self.library) > 0 or bool(self.lessons.texts)

    def _say_stopping(self, signal_name: str) -> None:
        saved = f"{self.round} of {self.grpo.rounds} rounds are saved" if self.before else "nothing is saved yet"
        self.reporter.info(
            f"{signal_name}: stopping after this problem or update ({saved}); Ctrl-C again stops at once; "
            f"either way nanochat grpo --resume {self.run_dir} continues after the last whole round"
        )

    def _round(self, number: int, log: MetricsLog) -> None:
        problems = self.problems.of_round(self.grpo, self.config.run.seed, number)
        rate = self.sampler.rate
        tokens, seconds = rate.tokens, rate.seconds
        groups = list(
            self._collect(f"round {number}: rollouts", problems, self.grpo.group, number, self._conditioning(number))
        )
        metrics = rollout_metrics(groups)
        if metrics["rollouts/informative_groups"] == 0:
            total = metrics["reward/total"]
            self.reporter.warn(
                f"round {number}: in none of {len(groups)} groups did rewards differ (mean {total:.3f}), "
                "so that no answer is known to be better than another"
            )
        metrics["throughput/tokens_per_second"] = (rate.tokens - tokens) / (rate.seconds - seconds)
        metrics |= self._learn(groups, number)
        self.sampler.refresh(self.model)
        self.round = number
        log.log(number, metrics)
        log.sync()
        self.view.round(number, metrics)

    def _learn(self, groups: Sequence[Sequence[Judged]], number: int) -> dict[str, float]:
        grpo, seed = self.grpo, self.config.run.seed

        def before_each(done: int, of: int) -> None:
            self._check_stop()
            self.view.phase(f"round {number}: updates", done, of)

        if self.learner is not None and grpo.mode == "policy":
            trajectories = trajectories_of(groups, self.tokenizer, standardise=grpo.standardise)
            objective = PolicyObjective(grpo, self.reference, self.learner.state.score.autocast_dtype)
            metrics = learn_round(self.learner, objective, trajectories, grpo, seed, number, before_each)
            return metrics | self.learner.ternary_statistics()
        added = sum(remember(self.library, group, grpo, number) for group in groups)
        self.library.prune(max_size=grpo.max_experiences)
        metrics: dict[str, float] = {"library/added": added, "library/size": len(self.library)}
        if self.learner is not None:
            held_out = [problem.prompt for problem in self.problems.held_out]
            allowed = self.library.without(held_out)
            answers = good_answers(
                allowed, self.tokenizer, min_reward=grpo.min_reward, context=self.config.model.max_seq_len
            )
            metrics |= learn_round(self.learner, LikelihoodObjective(), answers, grpo, seed, number, before_each)
            metrics["policy/good_answers"] = len(answers)
            metrics |= self.learner.ternary_statistics()
        elif self.endpoint is not None:
            metrics |= self._learn_lessons(self.endpoint, groups, number)
        return metrics

    def _learn_lessons(
        self, endpoint: ChatEndpoint, groups: Sequence[Sequence[Judged]], number: int
    ) -> dict[str, float]:

        def before_each(done: int) -> None:
            self._check_stop()
            self.view.phase(f"round {number}: lessons", done, len(groups))

        counts = self.lessons.learn(endpoint, groups, before_each)
        if counts.failed or counts.refused:
            self.reporter.warn(
                f"lessons: {counts.failed} of {counts.asked} questions failed, {counts.refused} answers or operations "
                f"were refused ({counts.last_failure or 'not one of ADD, UPDATE, DELETE, KEEP within the bounds'})"
            )
        return {
            "lessons/size": len(self.lessons.texts),
            "lessons/applied": counts.applied,
            "lessons/refused": counts.refused,
            "lessons/failed": counts.failed,
        }

    def _conditioning(self, number: int) -> Callable[[Problem], Prompt]:
        """The prompts of a round: plain ones for a policy that learns, since it is used with them too."""
        if self.grpo.mode != "training-free":
            return plain
        return Conditioning(self.library, self.lessons, self.sampler, self.grpo, self.config.run.seed, number)

    def _collect(
        self, phase: str, problems: Sequence[Problem], n: int, number: int, prompt: Callable[[Problem], Prompt]
    ) -> Iterator[list[Judged]]:
        def before_each(done: int) -> None:
            self._check_stop()
            self.view.phase(phase, done, len(problems))

        return collect(problems, self.sampler, self.judge, n, number, prompt, before_each)

    def _measure(self, phase: str, prompt: Callable[[Problem], Prompt]) -> Scores:
        problems = [*self.problems.practised, *self.problems.held_out]
        groups = self._collect(phase, problems, self.grpo.eval_samples, MEASURED, prompt)
        return {problem.id: score(group) for problem, group in zip(problems, groups, strict=True)}

    def _check_stop(self) -> None:
        if self.stop.requested:
            saved = f"{self.round} of {self.grpo.rounds} rounds are saved" if self.before else "nothing is saved yet"
            raise Interrupted(
                f"stopped by {self.stop.name}: {saved}; continue with: nanochat grpo --resume {self.run_dir}"
            )

    # -- what stays ------------------------------------------------------------------------------------------

    def save(self) -> None:
        """A checkpoint of everything that the next round depends on; its step is the number of rounds."""
        tensors = {"model": self.model.state_dict()} if self.learner is None else self.learner.state.tensors()
        tensors["random"] = checkpoints.rng_state()
        if self.mtp is not None:
            tensors["mtp"] = self.mtp
        if self.reference is not None:
            tensors["reference"] = self.reference.state_dict()
        own = self.grpo.library is None
        state = {
            "before": {problem: asdict(one) for problem, one in (self.before or {}).items()},
            "problems": self._fingerprint(),
            "library": [asdict(one) for one in self.library.experiences] if own else None,
            "lessons": self.lessons.texts,
            "learner": None if self.learner is None else self.learner.values(),
        }
        checkpoints.save(
            self.run_dir,
            self.round,
            tensors,
            {"grpo": state},
            model_config=self.config.model.model_dump(mode="json"),
        )
        if self.learner is None or self.learner.saved(f"that of round {self.round}"):
            checkpoints.prune(self.run_dir, self.config.checkpoint.keep_last)

    def _report(self, before: Scores, after: Scores) -> Path:
        sets = {
            "practised": [problem.id for problem in self.problems.practised],
            "held out": [problem.id for problem in self.problems.held_out],
        }
        compared = differences(sets, before, after)
        grpo = self.grpo
        notes = [
            f"`nanochat grpo`, mode {grpo.mode}, task `{grpo.task}`, from `{grpo.source}`. Rounds: {self.round}, each "
            f"with {grpo.group} rollouts per problem.",
            f"Before and after: {grpo.eval_samples} completions of every problem at temperature {grpo.temperature:g}.",
        ]
        if grpo.mode == "training-free":
            notes.append(
                f"After: up to {grpo.shots} of {len(self.library)} experiences and {len(self.lessons.texts)} lessons "
                "before each prompt. The weights are unchanged."
            )
        isolation = self.judge.isolation
        notes.append(f"Programs were judged in a sandbox: {isolation}.")
        details = {"mode": grpo.mode, "task": grpo.task, "lessons": self.lessons.texts, "isolation": isolation}
        path = write_report(self.run_dir, compared, before, after, notes=notes, details=details)
        shown = rows(compared)
        if shown:
            self.reporter.table(str(self.run_dir), COLUMNS, shown)
        if len(shown) < len(compared):
            self.reporter.info(f"{len(compared) - len(shown)} of {len(compared)} measures are 0 before and after")
        self.reporter.info(f"report: {path}")
        self.reporter.result(
            {
                "run": str(self.run_dir),
                "rounds": self.round,
                "isolation": isolation,
                "differences": [asdict(one) for one in compared],
            }
        )
        return path


def _endpoint(grpo: GRPOConfig) -> ChatEndpoint | None:
    """The model that writes lessons, if there is one."""
    url = grpo.lessons_url
    return None if url is None else ChatEndpoint(url, grpo.lessons_model, grpo.lessons_timeout)


def plain(problem: Problem) -> Prompt:
    """The problem's own prompt, with nothing before it."""
    return Prompt(problem.prompt)
