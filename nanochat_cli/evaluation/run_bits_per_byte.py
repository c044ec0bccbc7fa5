"""The suite `bpb`: bits per byte of a model on held-out documents, all of them and by language.

Every document keeps its place among the others, so that the figures of the languages are parts of that of the whole.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from nanochat_cli.config.schema import Config
from nanochat_cli.data.batches import evaluation_batches
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import DataError
from nanochat_cli.evaluation.held_out import document_languages, encode_held_out
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.report.reporter import Reporter
from nanochat_cli.report.result_file import Result
from nanochat_cli.training.bits_per_byte import HeldOut, evaluate_groups

UNKNOWN = "unknown"


def measure_bits_per_byte(
    model: Transformer, tokenizer: Tokenizer, reader: ShardReader, config: Config | None, reporter: Reporter
) -> tuple[HeldOut, dict[str, HeldOut]]:
    """Of all held-out documents, and of each language.

    Windows have the length that the run was trained with (config), without a run the context of the model. Where the
    source has changed since, languages are unknown, with a warning; the documents themselves are in the shards.
    """
    seq_len = model.config.max_seq_len
    if config is None:
        config = Config()
    else:
        seq_len = min(seq_len, config.train.seq_len)
    try:
        languages = document_languages(reader, config, reporter)
    except DataError as error:
        reporter.warn(f"no figures by language: {error}")
        languages = [UNKNOWN] * reader.manifest.val.documents
    tokens = encode_held_out(reader, tokenizer)
    names = sorted(set(languages))
    of_documents = torch.tensor([names.index(language) for language in languages])
    groups = of_documents.repeat_interleave(torch.tensor(tokens.lengths))[1:]  # the first token is no target
    with reporter.progress("held-out documents", len(tokens) - 1, "tokens") as progress:

        def counted() -> Iterator[tuple[Tensor, Tensor]]:
            for inputs, targets in evaluation_batches(tokens, config.eval.batch_size, seq_len):
                yield torch.from_numpy(inputs), torch.from_numpy(targets)
                progress.advance(int((targets >= 0).sum()))

        token_bytes = torch.from_numpy(tokenizer.byte_lengths())
        return evaluate_groups(model, counted(), token_bytes, groups, names)


def bits_per_byte_results(whole: HeldOut, languages: dict[str, HeldOut]) -> list[Result]:
    """The figures in the form of result files."""
    named = {"all": whole, **languages}
    return [
        Result(f"held-out documents, {name}", metric, value, unit)
        for name, found in named.items()
        for metric, value, unit in (
            ("bits per byte", found.bits_per_byte, "bits/byte"),
            ("loss", found.loss, "nats per token"),
            ("accuracy", found.accuracy, "share"),
            ("bytes", float(found.bytes), "B"),
        )
    ]
