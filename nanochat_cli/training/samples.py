"""Samples that show what a run has learnt: held-out documents continued by the model, beside what followed in truth.

Knows documents as bytes and a model that continues text. DEMONSTRATION is how text is drawn to be looked at; it was
chosen by `benchmarks/sampling.py`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from nanochat_cli.atomic_write import write_atomically
from nanochat_cli.data.chat import chat_tokens
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.inference.continuous_batch import ContinuousBatch, Row
from nanochat_cli.inference.generate import generate
from nanochat_cli.inference.language_model import LanguageModel
from nanochat_cli.inference.sampling import SamplingConfig
from nanochat_cli.inference.text_stream import TextStream

DEMONSTRATION = SamplingConfig(max_tokens=96, temperature=0.7, min_p=0.05, seed=0)
SAMPLES = 3
PROMPT_TOKENS = 64
"""Tokens of a document that a prompt may have at most; fewer where the context of the model is short."""
SHORTEST = 200
"""Bytes below which a document has no middle worth showing."""


@dataclass(frozen=True)
class HeldOutPrompt:
    """The lines around the middle of a held-out document. truth: what follows, as long as a sample may become.

    ids: of a conversation up to its first answer, whose texts are not its prompt.
    """

    prompt: str
    truth: str
    ids: list[int] | None = None


@dataclass(frozen=True)
class Sample:
    """A prompt, its continuation by the model, and what followed in the document."""

    prompt: str
    continuation: str
    truth: str

    @property
    def beginning(self) -> str:
        """The first word of the first line that has one, and the blank behind it: a prompt to type."""
        words = self.prompt.split()
        return f"{words[0]} " if words else ""


def held_out_prompts(documents: Iterable[bytes], tokenizer: Tokenizer, context: int, count: int) -> list[HeldOutPrompt]:
    """At most `count` prompts, from documents spread over the held-out side; fewer where fewer are long enough.

    A prompt begins and ends with lines. White space that the tokenizer joins with the indentation after it belongs to
    what follows: after a bare line break, which the model knows only before lines without one, it would write those.
    """
    texts = [text for text in documents if len(text) >= SHORTEST]
    chosen = [texts[len(texts) * i // count] for i in range(count)] if len(texts) >= count else texts
    room = max(1, min(PROMPT_TOKENS, context // 2))
    found = []
    for text in chosen:
        lines = text.decode("utf-8", "replace").splitlines(keepends=True)
        middle, length = 0, 0
        while middle < len(lines) - 1 and length < len(text) // 2:
            length += len(lines[middle].encode())
            middle += 1
        start = middle
        while start > 0 and len(tokenizer.encode("".join(lines[start - 1 : middle]))) <= room:
            start -= 1
        prompt, following = "".join(lines[start:middle]), "".join(lines[middle:])
        ids = tokenizer.encode(prompt)
        if tokenizer.encode(prompt + following)[: len(ids)] != ids:
            shorter = prompt.rstrip()
            prompt, following = shorter, prompt[len(shorter) :] + following
        rest = tokenizer.encode(following)
        if not prompt.strip():  # the lines are longer than the room
            ids = tokenizer.encode("".join(lines))
            prompt, rest = tokenizer.decode(ids[: len(ids) // 2][-room:]), ids[len(ids) // 2 :]
        found.append(HeldOutPrompt(prompt, tokenizer.decode(rest[: DEMONSTRATION.max_tokens])))
    return found


def draw_samples(model: LanguageModel, tokenizer: Tokenizer, reader: ShardReader) -> list[Sample]:
    """SAMPLES held-out documents continued; of a data set without a long document, a document from nothing."""
    context = model.config.max_seq_len
    if reader.manifest.chat is not None:
        prompts = list(islice(held_out_questions(reader, context // 2), SAMPLES))
    else:
        prompts = held_out_prompts(reader.documents("val"), tokenizer, context, SAMPLES)
    return [
        Sample(one.prompt, _continued(model, tokenizer, one), one.truth) for one in prompts or [HeldOutPrompt("", "")]
    ]


def held_out_questions(reader: ShardReader, room: int) -> Iterator[HeldOutPrompt]:
    """Held-out conversations up to their first answer, where that begins within `room` tokens."""
    tokenizer = reader.tokenizer
    turn_end = chat_tokens(tokenizer).end
    for shard in reader.shards("val"):
        assert shard.loss_mask is not None, "shards of conversations have a loss mask"
        for start, stop in zip(shard.doc_offsets[:-1].tolist(), shard.doc_offsets[1:].tolist(), strict=True):
            ids, answer = shard.tokens[start:stop].tolist(), int(shard.loss_mask[start:stop].argmax())
            if answer <= room:
                truth = ids[answer : ids.index(turn_end, answer)]
                yield HeldOutPrompt(tokenizer.decode(ids[:answer]), tokenizer.decode(truth), ids[:answer])


def _continued(model: LanguageModel, tokenizer: Tokenizer, prompt: HeldOutPrompt) -> str:
    if prompt.ids is None:
        return "".join(generate(model, tokenizer, prompt.prompt, DEMONSTRATION))
    ends = frozenset({chat_tokens(tokenizer).end})
    row = Row(prompt.ids, DEMONSTRATION, DEMONSTRATION.seed, stream=TextStream(tokenizer), ends=ends)
    batch = ContinuousBatch(model, 1, eos_id=tokenizer.eos_id, never=tokenizer.never_sampled)
    batch.submit(row)
    while batch.step():
        pass
    return row.text


def write_samples(run_dir: Path, step: int, samples: list[Sample]) -> Path:
    """`samples/step-000500.txt`, to read; returns its path."""
    folder = run_dir / "samples"
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:06d}.txt"
    parts = [
        f"===== {number}: held-out text\n{one.prompt}\n===== {number}: the model goes on\n{one.continuation}\n"
        f"===== {number}: in truth\n{one.truth}\n"
        for number, one in enumerate(samples, 1)
    ]
    write_atomically(path, "\n".join(parts).encode())
    return path
