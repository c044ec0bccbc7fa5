"""Small tokenizers as other programs write them, made by the plain `tokenizers` library: no code of ours."""

import inspect
import json
import textwrap
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB = 400
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>")
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""As in Llama 3's tokenizer.json."""
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""As in Qwen 2 and 3's tokenizer.json."""
TEXTS = (
    "def f(x):\n\treturn x  # é∑😀\r\n\n",
    "it's 1234567 'LL 3.14e-10, x2y34",
    "    if value == 100:\n        return None\n\n\n",
    "Größe, naïve, 東京, Ελλάδα",
    "<|im_end|> [PAD3] <repo_name>",
)


def _split(regex: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _digits() -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


SPLITTERS = {"smollm": _digits, "qwen2": lambda: _split(QWEN2), "llama-bpe": lambda: _split(LLAMA3)}
"""By the name of llama.cpp."""


def foreign(pre: str, without: str = "", **changes: Any) -> dict[str, Any]:
    """The definition of a tokenizer.json. without: characters of the byte alphabet that the vocabulary lacks."""
    backend = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    backend.pre_tokenizer = SPLITTERS[pre]()
    backend.decoder = decoders.ByteLevel()
    alphabet = [char for char in pre_tokenizers.ByteLevel.alphabet() if char not in without]
    special = [AddedToken(text, special=True, normalized=False) for text in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    backend.train_from_iterator([*TEXTS, *TEXTS, inspect.getsource(textwrap)], trainer)
    return {**json.loads(backend.to_str()), **changes}


def plain_ids(definition: dict[str, Any], text: str) -> list[int]:
    """What the library alone makes of a text, special tokens as plain characters."""
    backend = Tokenizer.from_str(json.dumps(definition))
    backend.encode_special_tokens = True
    return backend.encode(text, add_special_tokens=False).ids
