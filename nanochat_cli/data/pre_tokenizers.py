"""The pre-tokenizers that llama.cpp implements too: how each cuts text into words, and which one a tokenizer.json has.

A tokenizer that llama.cpp would cut otherwise is refused here, not discovered after an export. Knows the splitters of
the `tokenizers` library and their names in `tokenizer.ggml.pre`; nothing of vocabularies.
"""

import json
from typing import Any

from tokenizers import Regex, pre_tokenizers

from nanochat_cli.errors import DataError

LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_REGEX = LLAMA3_REGEX.replace(r"\p{N}{1,3}", r"\p{N}")
# Those that a tokenizer can be trained with, by their name in a configuration:
# (regex, or None for ByteLevel's own; `tokenizer.ggml.pre` of llama.cpp).
PRE_TOKENIZERS: dict[str, tuple[str | None, str]] = {
    "gpt-2": (None, "gpt-2"),
    "llama3": (LLAMA3_REGEX, "smaug-bpe"),
    "qwen2": (QWEN2_REGEX, "qwen2"),
}
LLAMA_BPE = "llama-bpe"
"""As `smaug-bpe`, but a word that is a token is taken whole (`ignore_merges`), and a text begins with BOS."""
SMOLLM = "smollm"
"""Every digit alone, the rest as GPT-2; `starcoder` of llama.cpp is the same."""
SAME = {"starcoder": SMOLLM, "llama3": LLAMA_BPE, "llama-v3": LLAMA_BPE}
"""Further names of llama.cpp -> the one that we give what they mean."""
# Options of a BPE model that change its result and have no counterpart in llama.cpp.
UNSHARED_BPE_OPTIONS = ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")


def pre_tokenizer(regex: str | None) -> pre_tokenizers.PreTokenizer:
    """Cuts by a regex and spells the bytes of each piece; None: by GPT-2's."""
    if regex is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


BY_NAME: dict[str, pre_tokenizers.PreTokenizer] = {
    **{name: pre_tokenizer(regex) for regex, name in PRE_TOKENIZERS.values()},
    LLAMA_BPE: pre_tokenizer(LLAMA3_REGEX),
    SMOLLM: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizer(None)]),
}
"""By `tokenizer.ggml.pre`."""


def llama_cpp_name(definition: dict[str, Any], where: str) -> str:
    """`tokenizer.ggml.pre` of a tokenizer.json, recognised by its structure. Raises DataError on any other."""
    model = definition["model"]
    if model["type"] != "BPE":
        raise DataError(f"{where}: a {model['type']} tokenizer; only byte-level BPE is supported")
    unshared = [name for name in UNSHARED_BPE_OPTIONS if model.get(name)]
    if unshared:
        raise DataError(f"{where}: uses {unshared[0]}, which llama.cpp's byte-level BPE does not; train one without")
    if definition["normalizer"] is not None:
        raise DataError(f"{where}: has a normalizer, which llama.cpp does not apply to BPE; train one without")
    found = _steps(definition["pre_tokenizer"] or {})
    whole_words = bool(model.get("ignore_merges"))
    shapes = {name: _steps(json.loads(splitter.__getstate__())) for name, splitter in BY_NAME.items()}
    names = [name for name, steps in shapes.items() if steps == found]
    for name in names:
        if whole_words == (name == LLAMA_BPE):
            return name
    if names:
        raise DataError(f"{where}: uses ignore_merges, which llama.cpp does not with {names[0]}; train one without")
    raise DataError(
        f"{where}: llama.cpp does not share its pre-tokenizer; supported: {', '.join(PRE_TOKENIZERS)} (tokenizer.pre), "
        f"and those of Llama 3, SmolLM and StarCoder"
    )


def _steps(outer: dict[str, Any]) -> list[dict[str, Any]]:
    """What a pre-tokenizer does, without offsets, which no token id depends on, and with the library's defaults."""
    steps = outer.get("pretokenizers", [outer])
    return [
        {"use_regex": True, "invert": False} | {key: value for key, value in step.items() if key != "trim_offsets"}
        for step in steps
    ]
