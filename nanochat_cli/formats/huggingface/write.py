"""Writing a model as a Hugging Face folder that transformers and most other programs load without code of ours.

All files are written beside those of an earlier export, and take their places when they are complete; config.json,
without which a folder is no model, is there only while all belong together. The card, which `card` writes, is that of
one export and goes with it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import Tensor

from nanochat_cli.atomic_write import install, staging, sync, write_atomically
from nanochat_cli.config.sections.model import ModelConfig
from nanochat_cli.data.chat import END
from nanochat_cli.data.foreign_tokenizer import template
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import DataError, reason
from nanochat_cli.formats.huggingface.architecture import class_of, to_config_json
from nanochat_cli.formats.huggingface.checksums import checksums, sha256_of
from nanochat_cli.formats.huggingface.files import (
    CARD,
    CHAT_TEMPLATE,
    CHECKSUMS,
    CONFIG_JSON,
    GENERATION_CONFIG,
    INDEX,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    WEIGHTS,
)
from nanochat_cli.formats.huggingface.tensors import in_file

SHARD_BYTES = 5_000_000_000
STAGED = ".writing"
PAD_TOKEN = "<|pad|>"
MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class FolderReport:
    """path: the folder; kind: the class of transformers; dtype: of the matrices; bytes: of the weights."""

    path: Path
    kind: str
    dtype: str
    tensors: int
    bytes: int
    files: list[str]


def write_folder(
    config: ModelConfig,
    values: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    out: Path,
    chat_template: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> FolderReport:
    """Write all files of the folder `out`, replacing those that are there.

    values: `tensors.stored_values` of the model. Raises ConfigError for a model without a class,
    DataError if the folder cannot be written.
    """
    dtype = str(values["blocks.0.feed_forward.w_down.weight"].dtype).removeprefix("torch.")
    tokenizer = tokenizer.padded_to(config.vocab_size)
    ids = token_ids(tokenizer)
    shards = list(_shards(config, values, shard_bytes))
    names = [WEIGHTS] if len(shards) == 1 else [_shard_name(at, len(shards)) for at in range(len(shards))]
    documents: dict[str, bytes] = {
        TOKENIZER_JSON: tokenizer_json(tokenizer).encode(),
        TOKENIZER_CONFIG: _json(tokenizer_config(tokenizer, config.max_seq_len, chat_template)),
        GENERATION_CONFIG: _json({**ids, **turn_ends(tokenizer, chat_template), "max_new_tokens": MAX_NEW_TOKENS}),
        **({} if chat_template is None else {CHAT_TEMPLATE: chat_template.encode()}),
        **({} if len(shards) == 1 else {INDEX: _index(names, shards)}),
        CONFIG_JSON: _json(to_config_json(config, ids, dtype)),
    }
    digests: dict[str, str] = {}
    try:
        out.mkdir(parents=True, exist_ok=True)
        with staging(out, STAGED) as staged:
            for name, tensors in zip(names, shards, strict=True):
                safetensors_torch.save_file(tensors, staged / name, metadata={"format": "pt"})  # 4.x insists on it
                sync(staged / name)
                digests[name] = sha256_of(staged / name)
            documents = {CHECKSUMS: _json(checksums(digests, documents)), **documents}
            for name, content in documents.items():
                write_atomically(staged / name, content)
            stale = {*out.glob("model*.safetensors"), out / INDEX, out / CHAT_TEMPLATE, out / CARD} - {
                out / name for name in (*names, *documents)
            }
            install(staged, out, {*names, *documents} - {CONFIG_JSON}, CONFIG_JSON, stale)
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot write {out}: {reason(error)}; free space or choose another --out") from error
    size = sum(tensor.numel() * tensor.element_size() for shard in shards for tensor in shard.values())
    count = sum(len(shard) for shard in shards)
    return FolderReport(out, class_of(config).name, dtype, count, size, [*names, *documents])


def token_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """The ids that config.json and generation_config.json name."""
    pad = tokenizer.special_tokens.get(PAD_TOKEN, tokenizer.eos_id)
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": pad}


def turn_ends(tokenizer: Tokenizer, chat_template: str | None) -> dict[str, list[int]]:
    """The ids that end an answer, where a template has ChatML's token for it besides the end of a text."""
    end = tokenizer.special_tokens.get(END)
    if end in (None, tokenizer.eos_id) or END not in (chat_template or ""):
        return {}
    return {"eos_token_id": [tokenizer.eos_id, end]}


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """tokenizer.json as AutoTokenizer needs it: it adds BOS where the model wants it, and no EOS after a prompt."""
    definition = json.loads(tokenizer.to_str())
    bos = None if tokenizer.bos_id is None else tokenizer.token_text(tokenizer.bos_id)
    definition["post_processor"] = None if bos is None else template(bos, None, tokenizer.special_tokens)
    return json.dumps(definition, ensure_ascii=False, indent=1) + "\n"


def tokenizer_config(tokenizer: Tokenizer, context: int, chat_template: str | None) -> dict[str, Any]:
    """tokenizer_config.json; the chat template is in it too for programs that do not know the separate file."""
    roles = {key.removesuffix("_id"): token for key, token in token_ids(tokenizer).items() if token is not None}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{role: tokenizer.token_text(token) for role, token in roles.items()},
        "add_bos_token": tokenizer.bos_id is not None,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        **({} if chat_template is None else {"chat_template": chat_template}),
    }


def _shards(config: ModelConfig, values: Mapping[str, Tensor], limit: int) -> Iterator[dict[str, Tensor]]:
    """The tensors of the files, in the order of the model, at most `limit` bytes in a file of several tensors."""
    shard: dict[str, Tensor] = {}
    size = 0
    for key, value in values.items():
        for name, tensor in in_file(key, value, config):
            n_bytes = tensor.numel() * tensor.element_size()
            if shard and size + n_bytes > limit:
                yield shard
                shard, size = {}, 0
            # safetensors refuses tensors that share memory, as the experts of one matrix do.
            shard[name] = tensor.clone() if tensor.untyped_storage().nbytes() > n_bytes else tensor
            size += n_bytes
    yield shard


def _shard_name(at: int, count: int) -> str:
    return f"model-{at + 1:05d}-of-{count:05d}.safetensors"


def _index(names: list[str], shards: list[dict[str, Tensor]]) -> bytes:
    size = sum(tensor.numel() * tensor.element_size() for shard in shards for tensor in shard.values())
    places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    return _json({"metadata": {"total_size": size}, "weight_map": places})


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
