"""The vocabulary as `tokenizer.ggml.*` metadata, and back.

GGUF holds what llama.cpp needs to split text as we do: the byte-level tokens in id order with a type
each, the merges, the name of a pre-tokenizer that llama.cpp implements, and which ids end a text.
Nothing is left to a default there: without an explicit BOS, id 11 would become it.
"""

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from nanochat_cli.data.foreign_tokenizer import adopt
from nanochat_cli.data.pre_tokenizers import BY_NAME, LLAMA_BPE, SAME
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import ConfigError, DataError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
PAD_TOKEN = "<|pad|>"
INFILL_TOKENS = {
    "fim_pre": "<|fim_prefix|>",
    "fim_suf": "<|fim_suffix|>",
    "fim_mid": "<|fim_middle|>",
    "fim_pad": "<|fim_pad|>",
    "fim_rep": "<|repo_name|>",
    "fim_sep": "<|file_sep|>",
}
"""llama.cpp's names for the tokens of its `/infill`."""
CHAT_TEMPLATE = "tokenizer.chat_template"


def chat_template_of(fields: Mapping[str, Any]) -> str | None:
    """The Jinja template in the metadata of a file, if it has one."""
    template = fields.get(CHAT_TEMPLATE)
    return template if isinstance(template, str) else None


def tokenizer_metadata(tokenizer: Tokenizer, vocab_size: int, chat_template: str | None = None) -> dict[str, Any]:
    """Every `tokenizer.ggml.*` key with a plain value. vocab_size: rows of the embedding; chat_template: Jinja.

    Rows beyond the tokenizer get a unique text and the type UNUSED: llama.cpp refuses a vocabulary of another length
    and aborts on two equal texts. Raises ConfigError if the tokenizer does not fit the model or llama.cpp.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model only {vocab_size} embeddings: "
            "export with the tokenizer that the model was trained with"
        )
    padded = tokenizer.padded_to(vocab_size)
    definition = json.loads(padded.to_str())
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in definition["model"]["merges"]]
    if not merges:
        raise ConfigError(
            "the tokenizer has no merges and llama.cpp refuses such a vocabulary: "
            "train it on more text, with a larger model.vocab_size"
        )
    types = [NORMAL] * vocab_size
    for token in padded.unused_ids:
        types[token] = UNUSED
    for added in definition["added_tokens"]:
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    infill = {key: padded.special_tokens[name] for key, name in INFILL_TOKENS.items() if name in padded.special_tokens}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": padded.pre,
        "tokenizer.ggml.tokens": [padded.token_text(token) for token in range(vocab_size)],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        # Documents are separated by EOS; nothing else starts a text, except in models from elsewhere.
        "tokenizer.ggml.bos_token_id": padded.eos_id if padded.bos_id is None else padded.bos_id,
        "tokenizer.ggml.eos_token_id": padded.eos_id,
        "tokenizer.ggml.eot_token_id": padded.eos_id,
        "tokenizer.ggml.padding_token_id": padded.special_tokens.get(PAD_TOKEN, padded.eos_id),
        **{f"tokenizer.ggml.{key}_token_id": token for key, token in infill.items()},
        "tokenizer.ggml.add_bos_token": padded.bos_id is not None,
        "tokenizer.ggml.add_eos_token": False,
        **({} if chat_template is None else {CHAT_TEMPLATE: chat_template}),
    }


def tokenizer_from_metadata(fields: Mapping[str, Any]) -> Tokenizer:
    """The inverse of `tokenizer_metadata`. Raises DataError for a missing key or another kind of vocabulary."""
    if (kind := _required(fields, "model")) != "gpt2":
        raise DataError(f"tokenizer.ggml.model = {kind}: only byte-level BPE (gpt2) is supported")
    name = _required(fields, "pre")
    pre = SAME.get(name, name)
    if pre not in BY_NAME:
        raise DataError(f"tokenizer.ggml.pre = {name}: only {', '.join([*BY_NAME, *SAME])} are supported")
    tokens, types = _required(fields, "tokens"), _required(fields, "token_type")
    merges = [tuple(merge.split(" ")) for merge in _required(fields, "merges")]
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens) or any(len(merge) != 2 for merge in merges):
        raise DataError("the vocabulary is damaged: tokens, token types and merges do not fit together")
    try:
        vocabulary = {token: i for i, token in enumerate(tokens)}
        backend = Backend(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == LLAMA_BPE))
    except Exception as error:  # the library raises bare Exception, for a merge of unknown tokens for example
        raise DataError(f"the vocabulary is damaged: {' '.join(str(error).split())}") from error
    backend.pre_tokenizer = BY_NAME[pre]
    backend.decoder = decoders.ByteLevel()
    named = list(zip(tokens, types, strict=True))
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, kind in named if kind == CONTROL])
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t, kind in named if kind == USER_DEFINED])
    begins = fields.get("tokenizer.ggml.add_bos_token", pre == LLAMA_BPE)
    return adopt(
        json.loads(backend.to_str()),
        "the vocabulary",
        eos_id=fields.get("tokenizer.ggml.eos_token_id"),
        bos_id=fields.get("tokenizer.ggml.bos_token_id") if begins else None,
    )


def _required(fields: Mapping[str, Any], key: str) -> Any:
    value = fields.get(f"tokenizer.ggml.{key}")
    if value is None:
        raise DataError(f"metadata key tokenizer.ggml.{key} is missing")
    return value
