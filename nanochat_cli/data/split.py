"""Which documents are held out: a function of their contents, by clusters of near-duplicates.

A cluster's place is a hash of the smallest hash among its documents, so that it stays where it is when documents that
are like none of them come or go. Whoever needs the sides of an existing data set asks its shards, not this rule.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nanochat_cli.data.shards import ShardReader

HASH_RANGE = 1 << 64
METHOD = "clusters of near-duplicates, 1"
"""Name and version of the rule; another one makes another data set."""
# A cluster above this share of what is to be held out is trained on: one family of files must not be the measure.
LARGEST_SHARE = 0.25


def split_key(content: bytes) -> int:
    """Hash of a document, in [0, 2^64)."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def held_out_keys(reader: ShardReader) -> set[int]:
    """The keys of the documents that a data set holds out, by whatever rule it was made."""
    return {split_key(content) for content in reader.documents("val")}


def choose_held_out(
    keys: Sequence[int], sizes: Sequence[int], clusters: NDArray[np.int64], val_fraction: float
) -> set[int] | None:
    """The keys of the documents to hold out, by key, bytes and cluster of each; None when all are one cluster.

    A small corpus may have no cluster on one side of the share asked for: the threshold moves to the nearest that has.
    """
    names, members = np.unique(clusters, return_inverse=True)
    if len(names) == 1:
        return None
    document_keys = np.array(keys, dtype=np.uint64)
    smallest = np.full(len(names), HASH_RANGE - 1, dtype=np.uint64)
    np.minimum.at(smallest, members, document_keys)
    n_bytes = np.bincount(members, weights=np.array(sizes, dtype=np.float64))
    several = np.zeros(len(names), dtype=bool)
    several[members[document_keys != smallest[members]]] = True
    too_large = several & (n_bytes > LARGEST_SHARE * val_fraction * n_bytes.sum())
    places = np.array([split_key(key.tobytes()) for key in smallest.astype(">u8")], dtype=np.uint64)
    eligible = places if too_large.all() else places[~too_large]
    highest = int(places.max()) if len(eligible) == len(places) else HASH_RANGE
    threshold = min(max(round(val_fraction * HASH_RANGE), int(eligible.min()) + 1), highest)
    held_out = np.array([int(place) < threshold for place in places]) & (too_large.all() | ~too_large)
    return set(document_keys[held_out[members]].tolist())
