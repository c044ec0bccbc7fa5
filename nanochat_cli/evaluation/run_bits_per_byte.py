"""The suite `bpb`: bits per byte of a model on held-out documents, all of them, by language, and by source.

Documents keep their places in the stream, so that the figures of groups are parts of that of the whole.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nanochat_cli.config.schema import Config
from nanochat_cli.data.batches import evaluation_batches
from nanochat_cli.data.origin import OTHER
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.evaluation.held_out import encode_held_out, known_languages
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.report.reporter import Reporter
from nanochat_cli.report.result_file import Result
from nanochat_cli.training.bits_per_byte import HeldOut, evaluate, evaluate_groups, merged
from nanochat_cli.training.chat_data import ChatData


class Measured(NamedTuple):
    """sources: those of a mixture; empty for a single source."""

    whole: HeldOut
    languages: dict[str, HeldOut]
    sources: dict[str, HeldOut]

    def named(self) -> dict[str, HeldOut]:
        """All figures, in the order of a table."""
        return {"all": self.whole, **self.languages, **{f"source {name}": one for name, one in self.sources.items()}}


def measure_bits_per_byte(
    model: Transformer, tokenizer: Tokenizer, reader: ShardReader, config: Config | None, reporter: Reporter
) -> Measured:
    """Measure all held-out documents, each language, and each source of a mixture.

    Windows are as long as in the run's training (config), or without a run as the model's context. Where the source has
    changed, languages are unknown, with a warning; the documents themselves are in the shards.
    """
    seq_len = model.config.max_seq_len
    if config is None:
        config = Config()
    else:
        seq_len = min(seq_len, config.train.seq_len)
    if reader.manifest.chat is not None:
        return _measure_answers(model, reader, config, reporter)
    languages = known_languages(reader, config, reporter)
    tokens = encode_held_out(reader, tokenizer)
    sources = [part.name for part in reader.manifest.parts for _ in range(part.val.documents)] or [""] * len(languages)
    by_document = list(zip(sources, languages, strict=True))
    names = sorted(set(by_document))
    numbers = torch.tensor([names.index(pair) for pair in by_document])
    groups = numbers.repeat_interleave(torch.tensor(tokens.lengths))[1:]  # the first token is not a target
    with reporter.progress("held-out documents", len(tokens) - 1, "tokens") as progress:

        def counted() -> Iterator[tuple[Tensor, Tensor]]:
            for inputs, targets in evaluation_batches(tokens, config.eval.batch_size, seq_len):
                yield torch.from_numpy(inputs), torch.from_numpy(targets)
                progress.advance(int((targets >= 0).sum()))

        token_bytes = torch.from_numpy(tokenizer.byte_lengths())
        whole, found = evaluate_groups(model, counted(), token_bytes, groups, names)
    by_source, by_language = _together(found, 0), _together(found, 1)
    return Measured(whole, by_language, by_source if reader.manifest.parts else {})


def _measure_answers(model: Transformer, reader: ShardReader, config: Config, reporter: Reporter) -> Measured:
    """Of conversations only answers count, each read after its own conversation alone, as in training."""
    chat = ChatData(reader, config)
    model.document_end = chat.document_end
    with reporter.progress("held-out conversations", chat.held_out_batches(None), "batches") as progress:

        def counted() -> Iterator[tuple[Tensor, Tensor]]:
            for batch in chat.held_out(None):
                yield batch
                progress.advance(1)

        whole = evaluate(model, counted(), chat.token_bytes)
    return Measured(whole, {OTHER: whole}, {})


def _together(found: dict[tuple[str, str], HeldOut], which: int) -> dict[str, HeldOut]:
    """Figures by source (0) or language (1) from those of both."""
    groups: dict[str, list[HeldOut]] = {}
    for pair, one in found.items():
        groups.setdefault(pair[which], []).append(one)
    return {name: parts[0] if len(parts) == 1 else merged(parts) for name, parts in sorted(groups.items())}


def bits_per_byte_results(measured: Measured) -> list[Result]:
    """The figures as results of a result file."""
    return [
        Result(f"held-out documents, {name}", metric, value, unit)
        for name, held_out in measured.named().items()
        for metric, value, unit in (
            ("bits per byte", held_out.bits_per_byte, "bits/byte"),
            ("loss", held_out.loss, "nats per token"),
            ("accuracy", held_out.accuracy, "share"),
            ("bytes", float(held_out.bytes), "B"),
        )
    ]
