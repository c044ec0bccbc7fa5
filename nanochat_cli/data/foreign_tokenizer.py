"""A tokenizer of another program as one of ours: the same ids for the same text, and which tokens enclose one.

Programs keep the ids of BOS and EOS beside the tokenizer; ours keeps them in it, as the template of its post-processor,
so that one file says all. Knows the definition of a tokenizer.json; its callers have read the ids.
"""

import json
from collections.abc import Iterable
from typing import Any

from nanochat_cli.data.tokenizer import EOS_NAMES, Tokenizer
from nanochat_cli.errors import DataError


def adopt(definition: dict[str, Any], where: str, *, eos_id: int | None, bos_id: int | None) -> Tokenizer:
    """The tokenizer of a tokenizer.json's `definition`, with texts ended by `eos_id` and begun by `bos_id`, if any.

    eos_id: None for the one that has a name in EOS_NAMES. An NFC normaliser is left out, as llama.cpp leaves it out:
    it changes only text in decomposed characters. So are truncation and padding, which would change ids. Raises
    DataError for ids that are not in the vocabulary, and for a tokenizer that llama.cpp does not share.
    """
    if (definition.get("normalizer") or {}).get("type") == "NFC":
        definition["normalizer"] = None
    definition |= {"truncation": None, "padding": None}
    texts = {token: text for text, token in definition["model"].get("vocab", {}).items()}
    texts |= {token["id"]: token["content"] for token in definition["added_tokens"]}
    for token in (eos_id, bos_id):
        if token is None:
            continue
        if not isinstance(token, int) or token not in texts:
            raise DataError(f"{where}: the vocabulary has no token {token!r}, which ends or begins a text")
        _make_special(definition, token, texts[token])
    special = {token["content"]: token["id"] for token in definition["added_tokens"] if token["special"]}
    named = next((special[name] for name in EOS_NAMES if name in special), None)
    if bos_id is None and eos_id in (None, named):
        definition["post_processor"] = None
    else:
        eos = named if eos_id is None else eos_id
        before, after = (None if token is None else texts[token] for token in (bos_id, eos))
        definition["post_processor"] = template(before, after, special)
    return Tokenizer.from_str(json.dumps(definition), where)


def template(before: str | None, after: str | None, special: dict[str, int]) -> dict[str, Any]:
    """A post-processor that encloses a text in these special tokens; None: in nothing."""
    text = {"Sequence": {"id": "A", "type_id": 0}}
    first, last = ([] if name is None else [{"SpecialToken": {"id": name, "type_id": 0}}] for name in (before, after))
    return {
        "type": "TemplateProcessing",
        "single": [*first, text, *last],
        "pair": [*first, text, {"Sequence": {"id": "B", "type_id": 0}}, *last],
        "special_tokens": {
            name: {"id": name, "ids": [special[name]], "tokens": [name]} for name in _once((before, after))
        },
    }


def _once(names: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys(name for name in names if name is not None))


def _make_special(definition: dict[str, Any], token: int, text: str) -> None:
    """Let no text produce the token: it stands for the edge of one."""
    added = {one["id"]: one for one in definition["added_tokens"]}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added[token] = added.get(token, {"id": token, "content": text, **plain}) | {"special": True}
    definition["added_tokens"] = [added[one] for one in sorted(added)]
