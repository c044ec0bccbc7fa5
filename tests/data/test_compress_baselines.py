"""The compression baselines equal the compressors' own output sizes for the same bytes."""

import gzip
import lzma
import random

import pytest

from nanochat_cli.data.compress_baselines import compress_baselines
from tests.data.corpora import random_text


def test_baselines_equal_the_standard_library_on_the_concatenation_and_on_each_document() -> None:
    rng = random.Random(5)
    documents = [random_text(rng, size).encode() for size in (10, 3000, 500)]
    whole = b"".join(documents)

    def xz(content: bytes) -> int:
        return len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))

    def gz(content: bytes) -> int:
        return len(gzip.compress(content, 9, mtime=0))

    found = compress_baselines(iter(documents))
    assert found.documents == 3
    assert found.bytes == len(whole)
    assert found.gzip * found.bytes / 8 == pytest.approx(gz(whole))
    assert found.xz * found.bytes / 8 == pytest.approx(xz(whole))
    assert found.gzip_per_document * found.bytes / 8 == pytest.approx(sum(map(gz, documents)))
    assert found.xz_per_document * found.bytes / 8 == pytest.approx(sum(map(xz, documents)))


def test_nothing_to_compress_is_an_error() -> None:
    with pytest.raises(ValueError, match="no bytes"):
        compress_baselines([b""])
