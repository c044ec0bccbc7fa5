"""The second pass over a corpus: the documents that the first one took, encoded into the shards of both sides."""

import hashlib
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from nanochat_cli.config.schema import Config
from nanochat_cli.data.corpus import Corpus
from nanochat_cli.data.documents import Document, printable
from nanochat_cli.data.encoding import WORTH_A_WORKER, encode_documents, given_tokens
from nanochat_cli.data.origin import language_of, licence_of, licence_tag
from nanochat_cli.data.scan import Scan, bounded
from nanochat_cli.data.shards import MAX_SHARD_TOKENS, OriginInfo, ShardWriter, SplitInfo
from nanochat_cli.data.split import split_key
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import DataError
from nanochat_cli.report.environment import usable_cores
from nanochat_cli.report.reporter import Reporter


class Written(NamedTuple):
    """Both sides; families: how many duplicates were left out, and the name of the document that stands for them."""

    train: SplitInfo
    val: SplitInfo
    families: list[tuple[int, str]]
    origin: OriginInfo


def write_sides(
    corpus: Corpus, found: Scan, tokenizer: Tokenizer, out: Path, config: Config, reporter: Reporter
) -> Written:
    """Write the shards into `out`. Raises DataError if the source is no longer what the first pass read."""
    most = config.data.workers or usable_cores()
    workers = max(1, min(most, found.size // WORTH_A_WORKER))
    taken = _Taken(corpus, found, config.data.max_bytes)
    with (
        ShardWriter(out, "train", tokenizer.vocab_size, MAX_SHARD_TOKENS) as train,
        ShardWriter(out, "val", tokenizer.vocab_size, MAX_SHARD_TOKENS) as val,
        reporter.progress("encoding", total=found.size, unit="B") as progress,
    ):
        if corpus.tokens is None:
            batches = encode_documents((document.content for document in taken), tokenizer, workers)
        else:
            batches = given_tokens(taken, tokenizer.eos_id)
        for batch in batches:
            start = 0
            for content, length in zip(batch.documents, batch.lengths.tolist(), strict=True):
                writer = val if taken.held_out.popleft() else train
                writer.add(batch.tokens[start : start + length], len(content))
                start += length
            progress.advance(sum(map(len, batch.documents)))
        if taken.digest.hexdigest() != found.content:
            raise DataError(f"{corpus.source}: changed while it was read; run the command again")
        return Written(train.finish(), val.finish(), sorted(taken.families, reverse=True), taken.origin())


class _Taken:
    """Iterates over the documents that were taken, and counts them.

    digest: of all that was read; held_out: whether each of the documents that are being encoded is.
    """

    def __init__(self, corpus: Corpus, found: Scan, limit: int | None) -> None:
        self._corpus, self._found, self._limit = corpus, found, limit
        self.digest = hashlib.sha256()
        self.held_out: deque[bool] = deque()
        self.families: list[tuple[int, str]] = []
        self._documents, self._bytes, self._tags = Counter[str](), Counter[str](), Counter[str]()

    def __iter__(self) -> Iterator[Document]:
        found = self._found
        for number, document in enumerate(bounded(self._corpus, self._limit)):
            key = split_key(document.content)
            self.digest.update(key.to_bytes(8, "big"))
            if document.tokens is not None:
                self.digest.update(document.tokens.tobytes())
            if number in found.families:
                self.families.append((found.families[number], printable(document.id)))
            if number < len(found.taken) and found.taken[number]:
                self.held_out.append(key in found.held_out)
                self._count(document)
                yield document

    def _count(self, document: Document) -> None:
        language = language_of(document.id)
        self._documents[language] += 1
        self._bytes[language] += len(document.content)
        if (tag := licence_tag(document.content)) is not None:
            self._tags[tag] += 1

    def origin(self) -> OriginInfo:
        return OriginInfo(
            languages={printable(name): (count, self._bytes[name]) for name, count in sorted(self._documents.items())},
            licence_tags=dict(sorted(self._tags.items())),
            licence_files=dict(sorted(Counter(map(licence_of, self._corpus.licences)).items())),
        )
