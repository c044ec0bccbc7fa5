"""The second pass over a corpus: the documents that the first one took, encoded into the shards of both sides."""

import hashlib
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from nanochat_cli.config.schema import Config
from nanochat_cli.data.corpus import Corpus
from nanochat_cli.data.documents import Document, printable
from nanochat_cli.data.encoding import WORTH_A_WORKER, encode_conversations, encode_documents, given_tokens
from nanochat_cli.data.manifest import SPLITS, ChatInfo, OriginInfo, PartInfo, SidePart, Split, SplitInfo
from nanochat_cli.data.origin import language_of, licence_of, licence_tag
from nanochat_cli.data.scan import Scan, bounded
from nanochat_cli.data.shards import MAX_SHARD_TOKENS, ShardWriter
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
    parts: list[PartInfo]
    chat: ChatInfo | None


def write_sides(
    corpus: Corpus, found: Scan, tokenizer: Tokenizer, out: Path, config: Config, reporter: Reporter
) -> Written:
    """Write the shards into `out`. Raises DataError if the source is no longer what the first pass read."""
    most = config.data.workers or usable_cores()
    workers = max(1, min(most, found.size // WORTH_A_WORKER))
    taken = _Taken(corpus, found, config.data.max_bytes)
    with ExitStack() as open_files, reporter.progress("encoding", total=found.size, unit="B") as progress:
        labels = [f"-{part.name}" for part in corpus.parts] or [""]
        writers = {
            name: [
                open_files.enter_context(ShardWriter(out, name + label, tokenizer.vocab_size, MAX_SHARD_TOKENS))
                for label in labels
            ]
            for name in SPLITS
        }
        if config.data.chat:
            batches = encode_conversations((document.content for document in taken), tokenizer)
        elif corpus.tokens is None:
            batches = encode_documents((document.content for document in taken), tokenizer, workers)
        else:
            batches = given_tokens(taken, tokenizer.eos_id)
        for batch in batches:
            start = 0
            for content, length in zip(batch.documents, batch.lengths.tolist(), strict=True):
                held_out, part = taken.places.popleft()
                side, here = "val" if held_out else "train", slice(start, start + length)
                trained = None if batch.trained is None else batch.trained[here]
                writers[side][part].add(batch.tokens[here], len(content), trained)
                taken.trained[side] += 0 if trained is None else int(trained.sum())
                start += length
            progress.advance(sum(map(len, batch.documents)))
        if taken.digest.hexdigest() != found.content:
            raise DataError(f"{corpus.source}: changed while it was read; run the command again")
        sides: dict[Split, list[SplitInfo]] = {name: [writer.finish() for writer in writers[name]] for name in SPLITS}
    families = sorted(taken.families, reverse=True)
    train, val = (_whole(sides[name]) for name in SPLITS)
    chat = ChatInfo(forms=dict(corpus.forms), **taken.trained) if config.data.chat else None
    return Written(train, val, families, taken.origin(), _parts(corpus, sides), chat)


def _whole(parts: list[SplitInfo]) -> SplitInfo:
    """A side of all sources."""
    return SplitInfo(
        tokens=sum(part.tokens for part in parts),
        documents=sum(part.documents for part in parts),
        bytes=sum(part.bytes for part in parts),
        shards=[shard for part in parts for shard in part.shards],
    )


def _parts(corpus: Corpus, sides: Mapping[Split, list[SplitInfo]]) -> list[PartInfo]:
    def side(name: Split, number: int) -> SidePart:
        info = sides[name][number]
        return SidePart(tokens=info.tokens, documents=info.documents, bytes=info.bytes, shards=len(info.shards))

    return [
        PartInfo(
            name=part.name,
            source=printable(part.source),
            location=location_of(part.source),
            weight=part.weight,
            train=side("train", number),
            val=side("val", number),
        )
        for number, part in enumerate(corpus.parts)
    ]


def location_of(source: str) -> str | None:
    """The absolute path of a local source."""
    return printable(str(Path(source).absolute())) if source != "stdlib" and Path(source).exists() else None


class _Taken:
    """Iterates over the documents that were taken, and counts them.

    digest: of all that was read; places: whether each of the documents that are being encoded is held out, and its
    source; trained: tokens of each side, of conversations.
    """

    def __init__(self, corpus: Corpus, found: Scan, limit: int | None) -> None:
        self._corpus, self._found, self._limit = corpus, found, limit
        self.digest = hashlib.sha256()
        self.places: deque[tuple[bool, int]] = deque()
        self.families: list[tuple[int, str]] = []
        self.trained: dict[Split, int] = dict.fromkeys(SPLITS, 0)
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
                self.places.append((key in found.held_out, document.part))
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
