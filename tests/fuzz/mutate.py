"""Deterministic mutations of bytes: the n-th mutation of a target is the same everywhere.

Knows bytes, the numbers at which sizes and offsets break, and the words of JSON and TOML; not what they mean.
"""

import random
import re
import struct
from collections.abc import Callable, Sequence

NUMBERS = (
    0,
    1,
    -1,
    2**7,
    2**8 - 1,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**53,
    2**60,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
WORDS = (
    *(b"null", b"true", b"[]", b"{}", b'""', b"-1", b"1e999", b"-0.0", b"NaN", b"1" * 400, b"9" * 5000, b'"\\ud800"'),
    *(
        b"[" * 2000,
        b'{"a":' * 500,
        b"\x00",
        b"\xff\xfe",
        b"\xf0\x9f\x98\x80",
        b"\n",
        b"\r\n",
        b",",
        b'"',
        b"]",
        b"}",
        b"=",
    ),
)


def mutation(name: str, number: int, seeds: Sequence[bytes]) -> bytes:
    """One to four changes to one of the seeds."""
    source = random.Random(f"{name} {number}")
    data = bytearray(source.choice(seeds))
    for _ in range(source.choice((1, 1, 2, 4))):
        source.choice(CHANGES)(data, source, seeds)
    return bytes(data)


def _place(data: bytearray, source: random.Random) -> int:
    """Half of the time near the beginning, where headers are."""
    return source.randrange(min(len(data), 512) if source.random() < 0.5 else len(data)) if data else 0


def _flip(data: bytearray, source: random.Random, _: Sequence[bytes]) -> None:
    if data:
        data[_place(data, source)] ^= 1 << source.randrange(8)


def _number(data: bytearray, source: random.Random, _: Sequence[bytes]) -> None:
    """An integer of one to eight bytes, little-endian."""
    at, size = _place(data, source), source.choice((1, 2, 4, 8))
    data[at : at + size] = struct.pack("<Q", source.choice(NUMBERS) % 2**64)[:size]


def _text_number(data: bytearray, source: random.Random, _: Sequence[bytes]) -> None:
    """A number in text."""
    found = list(re.finditer(rb"-?\d+(\.\d+)?", data))
    if found:
        match = source.choice(found)
        data[slice(*match.span())] = str(source.choice(NUMBERS)).encode()


def _value(data: bytearray, source: random.Random, _: Sequence[bytes]) -> None:
    """A quoted text, or a number, becomes another kind of value."""
    found = list(re.finditer(rb'"[^"\n]*"|\d+|true|false|null', data))
    if found:
        match = source.choice(found)
        data[slice(*match.span())] = source.choice(WORDS)


def _insert(data: bytearray, source: random.Random, _: Sequence[bytes]) -> None:
    at = _place(data, source)
    data[at:at] = source.choice(WORDS)


def _cut(data: bytearray, source: random.Random, _: Sequence[bytes]) -> None:
    del data[_place(data, source) :]


def _remove(data: bytearray, source: random.Random, _: Sequence[bytes]) -> None:
    at = _place(data, source)
    del data[at : at + source.choice((1, 2, 8, 64))]


def _repeat(data: bytearray, source: random.Random, _: Sequence[bytes]) -> None:
    at, size = _place(data, source), source.choice((1, 8, 64, 512))
    data[at:at] = data[at : at + size] * source.choice((1, 2, 16))


def _splice(data: bytearray, source: random.Random, seeds: Sequence[bytes]) -> None:
    """The rest of another seed."""
    other = source.choice(seeds)
    at = _place(data, source)
    data[at:] = other[source.randrange(len(other) + 1) :]


CHANGES: tuple[Callable[[bytearray, random.Random, Sequence[bytes]], None], ...] = (
    *(_flip, _number, _number, _text_number, _text_number, _value, _value, _value),
    *(_insert, _cut, _remove, _repeat, _splice),
)
