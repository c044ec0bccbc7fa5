"""Stage `tokenizer`: text and bytes survive the round trip, and a saved tokenizer encodes alike."""

import random
from collections.abc import Iterator

from nanochat_cli.data.tokenizer import EOS, Tokenizer
from nanochat_cli.diagnose.validate.corpus import write_corpus
from nanochat_cli.diagnose.validate.stage import Figure, Value, Workspace
from nanochat_cli.errors import ValidationFailure
from nanochat_cli.inference.text_stream import as_text

VOCAB_SIZE = 512
N_TEXTS, LONGEST = 200, 120
PLANES = ((0x20, 0x7F), (0xA0, 0x24F), (0x370, 0x5FF), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF))
"""Half of the characters come from these ranges; the others come from all of Unicode."""
SURROGATES = range(0xD800, 0xE000)


def tokenizer(workspace: Workspace) -> Figure:
    """Random Unicode, random bytes, the corpus, and special tokens written as plain text."""
    write_corpus(workspace.corpus)
    corpus = [path.read_text(encoding="utf-8") for path in sorted(workspace.corpus.iterdir())]
    found = Tokenizer.train(corpus, VOCAB_SIZE)
    path = workspace.folder / "tokenizer.json"
    found.save(path)
    loaded = Tokenizer.load(path)
    texts = [*corpus, *random_texts(random.Random(1)), f"before {EOS} after", "", " \n\t\r\n  x"]
    for text in texts:
        ids = found.encode(text)
        _require(found.decode(ids) == text, f"decode(encode(text)) differs from {text[:40]!r}")
        _require("".join(as_text(ids, found)) == text, f"the streamed text differs from {text[:40]!r}")
        _require(loaded.encode(text) == ids, f"the saved tokenizer encodes {text[:40]!r} differently")
        _require(found.eos_id not in ids, f"{text[:40]!r} is encoded with the end-of-text token")
    strings = list(random_bytes(random.Random(2)))
    for content in strings:
        back = found.decode_bytes(found.encode_bytes(content))
        _require(back == content, f"decode_bytes(encode_bytes(bytes)) differs from {content[:20]!r}")
    size = sum(len(text.encode()) for text in texts) + sum(map(len, strings))
    return Figure(
        f"{len(texts)} texts and {len(strings)} byte strings, {size:,} bytes, come back unchanged",
        [Value("texts and byte strings that come back equal", len(texts) + len(strings), "strings")],
    )


def random_texts(draw: random.Random) -> Iterator[str]:
    """N_TEXTS strings of any characters but surrogates, which UTF-8 cannot encode."""
    for _ in range(N_TEXTS):
        yield "".join(_character(draw) for _ in range(draw.randint(1, LONGEST)))


def random_bytes(draw: random.Random) -> Iterator[bytes]:
    """N_TEXTS strings of any bytes; most are not UTF-8."""
    for _ in range(N_TEXTS):
        yield draw.randbytes(draw.randint(1, LONGEST))


def _character(draw: random.Random) -> str:
    if draw.random() < 0.5:
        return chr(draw.randint(*draw.choice(PLANES)))
    code = draw.randrange(0x110000 - len(SURROGATES))
    return chr(code if code < SURROGATES.start else code + len(SURROGATES))


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValidationFailure(otherwise)
