"""Byte-level BPE: train, save, load, encode, decode.

Knows tokens and bytes; `pre_tokenizers` knows which ones llama.cpp shares. The BPE itself is the `tokenizers` library;
the file is a plain `tokenizer.json` that `tokenizers.Tokenizer.from_file` loads. Knows nothing of corpora, shards or
chat templates.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, decoders, models, trainers
from tokenizers import Tokenizer as Backend

from nanochat_cli.atomic_write import write_atomically
from nanochat_cli.data.pre_tokenizers import PRE_TOKENIZERS, llama_cpp_name, pre_tokenizer
from nanochat_cli.data.training_words import interruptibly, with_short_words
from nanochat_cli.errors import ConfigError, DataError, reason
from nanochat_cli.nesting import parse_json

EOS = "<|endoftext|>"
SPECIAL_TOKENS = (
    EOS,  # ends every document; also what generation stops at
    "<|pad|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
"""Ids 0 to 9 of every tokenizer that is trained. Another one would move the ids of all text, so those that nothing
trains yet have their places too. Earlier versions had the first seven."""
BASE_VOCAB = len(SPECIAL_TOKENS) + 256  # the smallest vocabulary: special tokens and one token per byte
MAX_VOCAB = 1 << 20  # the library's trainer allocates memory for all of it at once, and aborts if it cannot

# End-of-text tokens of tokenizers that were trained elsewhere, in the order in which they are looked for.
EOS_NAMES = (EOS, "<|end_of_text|>", "</s>", "<|eos|>")


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's table).

    Printable Latin-1 stands for itself, the other 68 bytes move to U+0100 and up in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(moved)) for byte in range(256)]


_GAPS = "token ids or texts are not unique and gapless; GGUF cannot hold this vocabulary"
_INVALID = re.compile("([\udc80-\udcff]+)")
BYTE_TO_CHAR = _byte_alphabet()
CHAR_TO_BYTE = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}


class Tokenizer:
    """A byte-level BPE tokenizer. Every string of bytes round-trips, unless the vocabulary lacks one (`missing_bytes`):
    `decode_bytes(encode_bytes(b)) == b`.

    Text never produces a special token: `<|endoftext|>` in a source file is encoded as its characters.
    `encode(text, allow_special=True)` parses them, for prompts that a program wrote.
    """

    def __init__(self, backend: Backend, where: str = "tokenizer") -> None:
        self.backend = backend
        self.backend.encode_special_tokens = True
        definition = json.loads(backend.to_str())
        self.pre = llama_cpp_name(definition, where)
        self.special_tokens: dict[str, int] = {
            token["content"]: token["id"] for token in definition["added_tokens"] if token["special"]
        }
        before, after = enclosing_tokens(definition)
        names = EOS_NAMES if after is None else (after,)
        eos = next((name for name in names if name in self.special_tokens), None)
        if eos is None:
            raise DataError(f"{where}: no end-of-text token among its special tokens (one of {', '.join(names)})")
        self.eos_token = eos
        self.eos_id = self.special_tokens[eos]
        self.bos_id = None if before is None else self.special_tokens.get(before)
        """What a text begins with; None, as in all that are trained here: with nothing."""
        self._texts = _token_texts(definition, where)
        added = {token["id"] for token in definition["added_tokens"]}
        self._bytes = [_text_bytes(text, token in added) for token, text in enumerate(self._texts)]
        by_bytes = {content: token for token, content in enumerate(self._bytes) if len(content) == 1}
        self.missing_bytes = [byte for byte in range(256) if bytes([byte]) not in by_bytes]
        """Bytes without a token, of a tokenizer from elsewhere; encoding leaves them out, as llama.cpp does."""
        self._byte_ids = [[by_bytes[bytes([byte])]] if bytes([byte]) in by_bytes else [] for byte in range(256)]

    # -- making one ------------------------------------------------------------------------------------

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        pre: str = "gpt-2",
        max_token_length: int = 24,
        waiting: Callable[[], None] = lambda: None,
    ) -> "Tokenizer":
        """Train a BPE of exactly `vocab_size` tokens on `texts`.

        A corpus too small to supply that many merges leaves unused ids, filled with unique `[PAD{i}]` entries
        that no text encodes to (`unused_ids`). Words (what the pre-tokenizer splits text into) are cut after
        `MAX_TRAINING_WORD` characters for training, not for encoding. `texts` is read in another thread; meanwhile
        `waiting` is called in this one, a few times per second, and Ctrl-C works. Raises ConfigError if `vocab_size`
        cannot hold the byte alphabet, or is above `MAX_VOCAB`.
        """
        if vocab_size > MAX_VOCAB:
            raise ConfigError(f"model.vocab_size = {vocab_size} is too large: at most {MAX_VOCAB}")
        if vocab_size < BASE_VOCAB:
            raise ConfigError(
                f"model.vocab_size = {vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} special tokens "
                f"need at least {BASE_VOCAB}"
            )
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizer(PRE_TOKENIZERS[pre][0])
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,  # a pair seen once compresses nothing
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
            initial_alphabet=BYTE_TO_CHAR,
            max_token_length=max_token_length,
            show_progress=False,
        )
        words = with_short_words(texts, pre_tokenizer(PRE_TOKENIZERS[pre][0]))
        interruptibly(lambda read: backend.train_from_iterator(read, trainer), words, waiting)
        return cls(backend).padded_to(vocab_size)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a tokenizer.json. Raises DataError if it is missing, damaged, or one that llama.cpp cannot follow."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot read the tokenizer: {reason(error)}") from error
        return cls.from_str(text, where=str(path))

    @classmethod
    def from_str(cls, text: str, where: str = "tokenizer") -> "Tokenizer":
        try:
            _require_reachable_ids(parse_json(text), where)
            return cls(Backend.from_str(text), where)
        except DataError:
            raise
        except Exception as error:  # the library raises bare Exception for every parse error
            raise DataError(f"{where}: not a tokenizer.json: {' '.join(str(error).split())}") from error

    def to_str(self) -> str:
        return self.backend.to_str()

    def save(self, path: Path) -> None:
        """Raises OSError."""
        write_atomically(Path(path), self.to_str().encode())

    def padded_to(self, vocab_size: int) -> "Tokenizer":
        """The same tokenizer with `[PAD{i}]` entries up to `vocab_size`; llama.cpp needs every text to be unique.

        They are vocabulary entries without a merge, not added tokens, so no text can ever produce one.
        """
        size = self.vocab_size
        if size > vocab_size:
            raise DataError(
                f"the tokenizer has {size} tokens but model.vocab_size = {vocab_size}; set model.vocab_size={size}"
            )
        if size == vocab_size:
            return self
        if vocab_size > MAX_VOCAB:
            raise DataError(f"a vocabulary of {vocab_size} entries is too large: at most {MAX_VOCAB}")
        definition = json.loads(self.to_str())
        definition["model"]["vocab"].update({f"[PAD{i}]": i for i in range(size, vocab_size)})
        return Tokenizer(Backend.from_str(json.dumps(definition)))

    # -- facts about it --------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        return len(self._bytes)

    @property
    def unused_ids(self) -> list[int]:
        """Ids that only fill up the vocabulary; their GGUF token type is UNUSED."""
        return [token for token, text in enumerate(self._texts) if text == f"[PAD{token}]"]

    @property
    def never_sampled(self) -> list[int]:
        """Ids that generation must not choose: unused ones, and special tokens other than the end of text."""
        return sorted({*self.unused_ids, *self.special_tokens.values()} - {self.eos_id})

    def token_text(self, token: int) -> str:
        """The token as tokenizer.json spells it (byte-level characters), which is what a GGUF stores."""
        return self._texts[token]

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token decodes to; a special or unused token decodes to its own name."""
        return self._bytes[token]

    def byte_lengths(self) -> NDArray[np.int64]:
        """int64 [V]: bytes of text per token, 0 for special and unused tokens, which stand for no text."""
        lengths = np.array([len(content) for content in self._bytes], dtype=np.int64)
        lengths[[*self.special_tokens.values(), *self.unused_ids]] = 0
        return lengths

    # -- text to tokens and back -----------------------------------------------------------------------

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Token ids of `text`; special tokens are plain characters unless `allow_special`."""
        if _has_surrogates(text):
            return self.encode_bytes(text.encode("utf-8", "surrogatepass"))
        backend = self._special_backend if allow_special else self.backend
        return backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many valid texts at once, on the library's own threads."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_bytes(self, content: bytes) -> list[int]:
        """Token ids of any byte string: valid UTF-8 runs by the BPE, every other byte as its own token."""
        ids: list[int] = []
        for valid, invalid in _utf8_runs(content):
            if valid:
                ids += self.encode(valid)
            ids += [token for byte in invalid for token in self._byte_ids[byte]]
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join([self._bytes[token] for token in ids])

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of `ids`; bytes that are not UTF-8 (a sequence cut inside a character) become U+FFFD."""
        if skip_special:
            special = set(self.special_tokens.values())
            ids = [token for token in ids if token not in special]
        return self.decode_bytes(ids).decode("utf-8", "replace")

    @cached_property
    def _special_backend(self) -> Backend:
        # Whether special tokens are parsed is a property of the object, so a second one keeps calls independent.
        backend = Backend.from_str(self.backend.to_str())
        backend.encode_special_tokens = False
        return backend


def _require_reachable_ids(definition: Any, where: str) -> None:
    """Raise DataError for an id beyond the number of tokens: the library allocates memory up to the largest.

    Raises KeyError or TypeError for what is no definition of a tokenizer.
    """
    vocab, added = definition["model"]["vocab"], definition["added_tokens"]
    ids = [*(vocab.values() if isinstance(vocab, dict) else ()), *(token["id"] for token in added)]
    if ids and max(ids) >= len(ids):
        raise DataError(f"{where}: {_GAPS}")


def enclosing_tokens(definition: dict[str, Any]) -> tuple[str | None, str | None]:
    """The special tokens that the template of a tokenizer.json puts before and after a text; None: nothing."""
    outer = definition["post_processor"] or {}
    for step in outer.get("processors", [outer]):
        if step.get("type") == "TemplateProcessing" and step["single"]:
            before, after = (step["single"][end].get("SpecialToken", {}).get("id") for end in (0, -1))
            return before, after
    return None, None


def _token_texts(definition: dict, where: str) -> list[str]:
    """Text of every id as the file spells it. Raises DataError unless ids are gapless and texts unique."""
    texts = {token: text for text, token in definition["model"]["vocab"].items()}
    texts |= {token["id"]: token["content"] for token in definition["added_tokens"]}
    if sorted(texts) != list(range(len(texts))) or len(set(texts.values())) != len(texts):
        raise DataError(f"{where}: {_GAPS}")
    return [texts[token] for token in range(len(texts))]


def _text_bytes(text: str, added: bool) -> bytes:
    """The bytes a token decodes to; added tokens, and entries outside the byte alphabet, are their own text."""
    if added or not all(char in CHAR_TO_BYTE for char in text):
        return text.encode("utf-8")
    return bytes(CHAR_TO_BYTE[char] for char in text)


def _has_surrogates(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _utf8_runs(content: bytes) -> Iterator[tuple[str, bytes]]:
    """(valid text, the invalid bytes after it) until `content` is used up; linear in its length."""
    # An invalid byte becomes one of U+DC80 … U+DCFF, which valid UTF-8 cannot hold.
    parts = _INVALID.split(content.decode("utf-8", "surrogateescape"))
    for number in range(0, len(parts), 2):
        invalid = parts[number + 1] if number + 1 < len(parts) else ""
        yield parts[number], invalid.encode("utf-8", "surrogateescape")
