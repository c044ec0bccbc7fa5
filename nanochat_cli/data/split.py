"""Which documents are held out: a function of their contents, by clusters of near-duplicates.

A cluster's place is a hash of the smallest hash among its documents, so that it does not change when dissimilar
documents come or go. For the sides of an existing data set ask its shards, not this rule.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nanochat_cli.data.manifest import Split
from nanochat_cli.data.shards import ShardReader

HASH_RANGE = 1 << 64
METHOD = "clusters of near-duplicates, 1"
"""Name and version of the rule; another rule makes another data set."""
# A cluster above this share of the bytes to hold out is trained on: one family of files must not dominate the measure.
LARGEST_SHARE = 0.25
# File sizes vary, so that a share of documents may be twice that share of bytes: what exceeds this is trained on.
MOST_BYTES = 1.25


def split_key(content: bytes) -> int:
    """Hash of a document, in [0, 2^64)."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def document_keys(reader: ShardReader, side: Split) -> Counter[int]:
    """The keys of the documents on one side of a data set, whatever rules it was made by."""
    return Counter(split_key(content) for content in reader.documents(side))


def choose_held_out(
    keys: Sequence[int] | NDArray[np.uint64],
    sizes: Sequence[int] | NDArray[np.int64],
    clusters: NDArray[np.int64],
    val_fraction: float,
) -> set[int] | None:
    """The keys of the documents to hold out, given each one's key, bytes and cluster; None if all are one cluster.

    A small corpus may have no cluster on one side of the threshold, which then moves to the nearest cluster.
    """
    names, members = np.unique(clusters, return_inverse=True)
    if len(names) == 1:
        return None
    document_keys = np.array(keys, dtype=np.uint64)
    smallest = np.full(len(names), HASH_RANGE - 1, dtype=np.uint64)
    np.minimum.at(smallest, members, document_keys)
    n_bytes = np.bincount(members, weights=np.array(sizes, dtype=np.float64)).astype(np.float64)
    several = np.zeros(len(names), dtype=bool)
    several[members[document_keys != smallest[members]]] = True
    too_large = several & (n_bytes > LARGEST_SHARE * val_fraction * n_bytes.sum())
    places = np.array([split_key(key.tobytes()) for key in smallest.astype(">u8")], dtype=np.uint64)
    if too_large.all():
        too_large[:] = False
    eligible = places[~too_large]
    highest = HASH_RANGE if too_large.any() else int(places.max())
    threshold = min(max(round(val_fraction * HASH_RANGE), int(eligible.min()) + 1), highest)
    chosen = _within_share(
        places, n_bytes, ~too_large & np.array([int(place) < threshold for place in places]), val_fraction
    )
    return set(document_keys[chosen[members]].tolist())


def _within_share(
    places: NDArray[np.uint64], n_bytes: NDArray[np.float64], below: NDArray[np.bool_], val_fraction: float
) -> NDArray[np.bool_]:
    """The clusters below the threshold, in order of place, that keep to the share of bytes; at least one."""
    limit = MOST_BYTES * val_fraction * n_bytes.sum()
    chosen, used = np.zeros_like(below), 0.0
    order = [cluster for cluster in np.argsort(places) if below[cluster]]
    for cluster in order:
        if used + n_bytes[cluster] <= limit:
            chosen[cluster] = True
            used += n_bytes[cluster]
    if not chosen.any():
        chosen[order[0]] = True
    return chosen
