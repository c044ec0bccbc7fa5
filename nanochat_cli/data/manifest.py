"""The manifest of a data set: what its shards hold and how they were made. `shards` writes and reads the tokens."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from nanochat_cli.errors import DataError

Split = Literal["train", "val"]
SPLITS: tuple[Split, Split] = ("train", "val")

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ShardInfo(_Record):
    """One shard file. `size` is the file's bytes; `bytes` is the text it encodes; `largest`: its largest token id."""

    file: str
    sha256: str
    size: int
    tokens: int
    documents: int
    bytes: int
    largest: int | None = None


class SplitInfo(_Record):
    tokens: int
    documents: int
    bytes: int
    shards: list[ShardInfo]


class TokenizerInfo(_Record):
    sha256: str
    vocab_size: int
    unused: int
    pre: str


class NearDuplicatesInfo(_Record):
    """Among all that was read: the number of clusters of several near-duplicates, and of documents in them."""

    clusters: int
    documents: int


class ContaminationInfo(_Record):
    """documents: problem set → documents that share words in a row with its problems; first: names of some of them.

    left_out: whether the data set is without them.
    """

    documents: dict[str, int]
    left_out: bool
    first: list[str]


class OriginInfo(_Record):
    """languages: name → (documents, bytes); licence_tags: SPDX tag → documents; licence_files: licence → files."""

    languages: dict[str, tuple[int, int]]
    licence_tags: dict[str, int]
    licence_files: dict[str, int]


class ChatInfo(_Record):
    """Of a data set of conversations. forms: how many records had each; train, val: tokens that are trained."""

    forms: dict[str, int]
    train: int
    val: int


class SidePart(_Record):
    """What a side has of one source of a mixture: its shards follow those of the source before."""

    tokens: int
    documents: int
    bytes: int
    shards: int


class PartInfo(_Record):
    """One source of a mixture, as `Manifest` for a single one; weight: how often batches draw from it."""

    name: str
    source: str
    location: str | None
    weight: float
    train: SidePart
    val: SidePart

    def side(self, name: Split) -> SidePart:
        return self.train if name == "train" else self.val


class Manifest(_Record):
    """The contents and the origin of a data set.

    `fingerprint` covers the settings and the cheap identity of the source (names, sizes, times); `content` is the
    sha256 over the documents' own hashes in order; `skipped` counts left-out files, rows and documents by reason;
    `left_out` and `long_lines` name the first of them and of the files that look minified; `location` is the absolute
    path of a local source. The setting `data.split` names the rule of the split; a data set without it was split by
    the hash of each document alone, and has no `near_duplicates`. `families`: how many duplicates
    were left out, and the name of the document that stands for them, for the largest families. `secrets` by kind.
    `chat`: only of conversations, whose shards have a `loss_mask`.
    """

    version: Literal[1] = FORMAT_VERSION
    source: str
    fingerprint: str
    content: str
    settings: dict[str, str | int | float | bool | None]
    tokenizer: TokenizerInfo
    train: SplitInfo
    val: SplitInfo
    parts: list[PartInfo] = []
    near_duplicates: NearDuplicatesInfo | None = None
    families: list[tuple[int, str]] = []
    contamination: ContaminationInfo | None = None
    origin: OriginInfo | None = None
    secrets: dict[str, int] = {}
    chat: ChatInfo | None = None
    skipped: dict[str, int]
    location: str | None = None
    left_out: list[str] = []
    long_lines: list[str] = []

    def split(self, name: Split) -> SplitInfo:
        return self.train if name == "train" else self.val


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a data set. Raises DataError if the folder is not one or the manifest is damaged."""
    path = folder / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{folder}: not a data set: no {MANIFEST}; make one with `nanochat tokenize`") from error
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        what = ": ".join(filter(None, (".".join(str(part) for part in first["loc"]), first["msg"])))
        raise DataError(f"{path}: damaged manifest ({what}); run `nanochat tokenize` again") from error
