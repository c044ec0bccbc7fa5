"""Several corpora, one after the other, as one: near-duplicates are found across them, and one split holds for all."""

import hashlib
import json
from collections.abc import Iterator, Sequence

from nanochat_cli.config.source_parts import Part
from nanochat_cli.data.corpus import Corpus
from nanochat_cli.data.documents import Document, LongLines, Skipped
from nanochat_cli.errors import ConfigError, DataError


def mixed(parts: Sequence[Part], corpora: Sequence[Corpus]) -> Corpus:
    """The corpora in the order of the parts; the ids of documents begin with the name of their source.

    Raises ConfigError for files of token ids; reading raises DataError for a source without a document.
    """
    for part, corpus in zip(parts, corpora, strict=True):
        if corpus.tokens is not None:
            raise ConfigError(f"{part.name}: {part.source} holds token ids, which cannot be mixed")

    def read() -> Iterator[Document | Skipped | LongLines]:
        for number, (part, corpus) in enumerate(zip(parts, corpora, strict=True)):
            empty = True
            for item in corpus.read():
                named = item._replace(id=f"{part.name}/{item.id}")
                if isinstance(named, Document):
                    empty = False
                    named = named._replace(part=number)
                yield named
            if empty:
                raise DataError(f"{part.name}: {part.source} has no usable document; leave the source out")

    identity = [[part.name, corpus.fingerprint] for part, corpus in zip(parts, corpora, strict=True)]
    sizes = [corpus.size_bytes for corpus in corpora]
    return Corpus(
        source=", ".join(map(str, parts)),
        fingerprint=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        size_bytes=None if None in sizes else sum(size or 0 for size in sizes),
        read=read,
        files=tuple(file for corpus in corpora for file in corpus.files),
        filters=corpora[0].filters,
        licences=tuple(file for corpus in corpora for file in corpus.licences),
        ignored=sum(corpus.ignored for corpus in corpora),
        parts=tuple(parts),
    )
