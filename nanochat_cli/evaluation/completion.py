"""The suite `completion`: lines of held-out files, completed by a model and by what training text alone suggests.

The model is greedy. It reads what comes before the place and, if it was trained to fill in, what comes after as well;
its peers are those of `training_index`, in the same tokens. Knows models and tokens; `completion_tasks` has the tasks.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nanochat_cli.config.sections.fim import FimConfig
from nanochat_cli.data.fim import Gap
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.evaluation.completion_tasks import KINDS, Kind, Task, answer, edit_similarity, is_answered
from nanochat_cli.evaluation.share_intervals import share_interval
from nanochat_cli.evaluation.training_index import TrainingIndex
from nanochat_cli.inference.generate import generate
from nanochat_cli.inference.infill import infill_request
from nanochat_cli.inference.packed_model import PackedTransformer
from nanochat_cli.inference.sampling import SamplingConfig
from nanochat_cli.inference.text_stream import as_text
from nanochat_cli.report.reporter import Reporter
from nanochat_cli.report.result_file import Result

LEFT_TO_RIGHT, WITH_SUFFIX = "model, left to right", "model, with the suffix"
COPIED = "longest match in training"

Completer = Callable[[Task], tuple[str, float | None]]
"""The completion of a task, which may go on after the answer, and the bits of the truth if there is a distribution."""


@dataclass(frozen=True)
class Answered:
    """What a contender said to a task. exact: 0 or 1; similarity: see `edit_similarity`; bits: of the truth."""

    task: Task
    contender: str
    text: str
    exact: float
    similarity: float
    bits: float | None

    def as_dict(self) -> dict[str, Any]:
        """As a line of completions.jsonl."""
        task = self.task
        asked = {"kind": task.kind, "language": task.language, "before": task.prefix[-200:], "truth": task.truth}
        return {**asked, "contender": self.contender, "answer": self.text, "exact": self.exact, "bits": self.bits}


@dataclass(frozen=True)
class CompletionScore:
    """Means over the tasks of a kind and a language with 95 % intervals; bits_per_byte: of the truths, for a model."""

    kind: Kind
    language: str
    contender: str
    tasks: int
    exact: float
    exact_interval: tuple[float, float] | None
    similarity: float
    similarity_interval: tuple[float, float] | None
    bits_per_byte: float | None


def model_completers(
    model: PackedTransformer, tokenizer: Tokenizer, fim: FimConfig, max_tokens: int
) -> dict[str, Completer]:
    """From left to right, and with the suffix if the model was trained so."""
    context = model.config.max_seq_len
    greedy = SamplingConfig(max_tokens=min(max_tokens, context // 2), temperature=0)

    def left_to_right(task: Task) -> tuple[str, float | None]:
        ids = tokenizer.encode(task.prefix)[-(context - greedy.max_tokens) :]
        return complete(task, ids, greedy)

    def with_suffix(task: Task) -> tuple[str, float | None]:
        return complete(task, *infill_request(tokenizer, Gap(task.prefix, task.suffix), fim, greedy, context))

    def complete(task: Task, ids: list[int], settings: SamplingConfig) -> tuple[str, float | None]:
        text, truth = (
            _until_answered(task.kind, generate(model, tokenizer, ids, settings)),
            tokenizer.encode(task.truth),
        )
        return text, bits_of(model, ids, truth) if len(ids) + len(truth) <= context else None

    return {LEFT_TO_RIGHT: left_to_right} | ({WITH_SUFFIX: with_suffix} if fim.rate else {})


def training_completers(index: TrainingIndex, tokenizer: Tokenizer, max_tokens: int) -> dict[str, Completer]:
    """The peers: a greedy n-gram model with back-off, and a copy of what followed the longest match."""

    def counted(task: Task) -> tuple[str, None]:
        context = tokenizer.encode(task.prefix)

        def tokens() -> Iterator[int | None]:
            for _ in range(max_tokens):
                token = index.likely(context)
                yield None if token == tokenizer.eos_id else token
                context.append(token)

        return _until_answered(task.kind, as_text(tokens(), tokenizer)), None

    def copied(task: Task) -> tuple[str, None]:
        found = index.copied(tokenizer.encode(task.prefix), max_tokens).tolist()
        end = found.index(tokenizer.eos_id) if tokenizer.eos_id in found else len(found)
        return tokenizer.decode(found[:end]), None

    return {f"{index.before + 1}-gram with back-off": counted, COPIED: copied}


def complete_tasks(tasks: Sequence[Task], completers: dict[str, Completer], reporter: Reporter) -> list[Answered]:
    """What every contender says to every task."""
    answered = []
    with reporter.progress("completions", len(tasks) * len(completers), "completions") as progress:
        for task in tasks:
            truth = answer(task.kind, task.truth)
            for name, completer in completers.items():
                completion, bits = completer(task)
                text = answer(task.kind, completion)
                exact = float(text == truth)
                answered.append(Answered(task, name, text, exact, edit_similarity(text, truth), bits))
                progress.advance(1)
    return answered


def completion_scores(answered: Sequence[Answered]) -> list[CompletionScore]:
    """By kind: all languages if there are several, then each; of every contender, in the order of the answers."""
    languages = sorted({one.task.language for one in answered})
    groups = (["all"] if len(languages) > 1 else []) + languages
    contenders = list(dict.fromkeys(one.contender for one in answered))
    found = []
    for kind in KINDS:
        for group in groups:
            for name in contenders:
                chosen = [
                    one
                    for one in answered
                    if one.task.kind == kind and one.contender == name and group in ("all", one.task.language)
                ]
                if chosen:
                    found.append(_score(kind, group, name, chosen))
    return found


def completion_table(scores: Sequence[CompletionScore]) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
    """The columns and rows of the table that is printed."""
    columns = ("asked", "language", "answered by", "tasks", "exact", "95 % interval")
    columns += ("edit similarity", "95 % interval", "bits per byte")
    return columns, [
        (
            one.kind,
            one.language,
            one.contender,
            one.tasks,
            one.exact,
            _shown(one.exact_interval),
            one.similarity,
            _shown(one.similarity_interval),
            "—" if one.bits_per_byte is None else one.bits_per_byte,
        )
        for one in scores
    ]


def completion_results(scores: Sequence[CompletionScore]) -> list[Result]:
    """The figures as results of a result file; the ends of an interval are its spread."""
    found = []
    for one in scores:
        case = f"{one.kind}, {one.language}, {one.contender}"
        found.append(Result(case, "exact match", one.exact, "share", spread=one.exact_interval))
        found.append(Result(case, "edit similarity", one.similarity, "share", spread=one.similarity_interval))
        if one.bits_per_byte is not None:
            found.append(Result(case, "bits per byte", one.bits_per_byte, "bits/byte"))
        found.append(Result(case, "tasks", float(one.tasks), "tasks"))
    return found


def bits_of(model: PackedTransformer, prompt: list[int], truth: list[int]) -> float:
    """−log2 of the probability of `truth` after `prompt`."""
    ids = torch.tensor([[*prompt, *truth]], dtype=torch.int64, device=model.device)
    logits = model.logits(model(ids[:, :-1])[0, len(prompt) - 1 :]).float()
    chosen = logits.log_softmax(dim=-1).gather(1, ids[0, len(prompt) :, None])
    return -float(chosen.double().sum()) / math.log(2)


def _until_answered(kind: Kind, pieces: Iterator[str]) -> str:
    text = ""
    for piece in pieces:
        text += piece
        if is_answered(kind, text):
            break
    return text


def _score(kind: Kind, group: str, contender: str, chosen: Sequence[Answered]) -> CompletionScore:
    exact, similarity = [one.exact for one in chosen], [one.similarity for one in chosen]
    bits = [one.bits for one in chosen if one.bits is not None]
    n_bytes = sum(len(one.task.truth.encode("utf-8", "surrogatepass")) for one in chosen if one.bits is not None)
    return CompletionScore(
        kind,
        group,
        contender,
        len(chosen),
        sum(exact) / len(exact),
        share_interval(exact),
        sum(similarity) / len(similarity),
        share_interval(similarity),
        math.fsum(bits) / n_bytes if bits else None,
    )


def _shown(interval: tuple[float, float] | None) -> str:
    return "—" if interval is None else "{:.3f} – {:.3f}".format(*interval)
