"""A Hugging Face folder as our model and tokenizer: the inverse of `write`, for folders of other programs too.

Reads config.json, safetensors (never pickle, which may run code), tokenizer.json and what names the ends of a text.
What our model cannot compute is refused by its name.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import Tensor

from nanochat_cli.config.sections.model import ModelConfig
from nanochat_cli.data.foreign_tokenizer import adopt
from nanochat_cli.data.tokenizer import Tokenizer, enclosing_tokens
from nanochat_cli.errors import DataError, reason
from nanochat_cli.formats.buildable import buildable, shapes_of
from nanochat_cli.formats.huggingface.checksums import require_intact
from nanochat_cli.formats.huggingface.files import (
    CARD,
    CHAT_TEMPLATE,
    CONFIG_JSON,
    GENERATION_CONFIG,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    document,
    read_config,
    weight_files,
)
from nanochat_cli.formats.huggingface.tensors import file_names
from nanochat_cli.model.transformer import Transformer

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# Buffers that some programs store and every program can compute.
_COMPUTED = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")


@dataclass(frozen=True)
class FolderContent:
    """model: float32 on the CPU, ready for inference. tokenizer: of as many ids as the model has embeddings."""

    model: Transformer
    tokenizer: Tokenizer
    chat_template: str | None
    license: str | None


def read_folder(folder: Path) -> FolderContent:
    """Model, tokenizer and chat template of a folder. Raises DataError, with file and reason, for what does not fit."""
    config = read_config(folder)
    files = weight_files(folder)
    tokenizer, described = read_tokenizer(folder, config)
    model = _read_model(folder, files, config)
    require_intact(folder)  # last, since what does not fit has a better message
    return FolderContent(model, tokenizer, chat_template(folder, described), _license(folder))


def read_tokenizer(folder: Path, config: ModelConfig) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer, filled up to the model's embeddings, and tokenizer_config.json (empty if it is missing)."""
    path = folder / TOKENIZER_JSON
    if not path.is_file():
        raise DataError(f"{path}: no such file; only byte-level BPE tokenizers are read, from {TOKENIZER_JSON}")
    definition = document(path)
    described = document(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).is_file() else {}
    try:
        ids = dict(definition["model"].get("vocab", {})) | {
            token["content"]: token["id"] for token in definition["added_tokens"]
        }
        before, _ = enclosing_tokens(definition)
        if before is None and described.get("add_bos_token"):
            before = _text(described.get("bos_token"))
        eos = ids.get(_text(described.get("eos_token")) or "", _eos_of_config(folder))
        tokenizer = adopt(definition, str(path), eos_id=eos, bos_id=None if before is None else ids.get(before))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: damaged ({type(error).__name__}: {error})") from error
    if tokenizer.vocab_size > config.vocab_size:
        raise DataError(
            f"{path}: {tokenizer.vocab_size} tokens and the model has {config.vocab_size} embeddings: "
            "not the tokenizer it was trained with"
        )
    return tokenizer.padded_to(config.vocab_size), described


@torch.no_grad()
def _read_model(folder: Path, files: list[Path], config: ModelConfig) -> Transformer:
    found = _load(files)
    last = f"model.layers.{config.n_layers - 1}."
    if not any(name.startswith(last) for name in found):  # before millions of layers are built
        raise DataError(f"{folder}: num_hidden_layers = {config.n_layers}, but there is no tensor {last}…")
    shapes = {key: list(value.shape) for key, value in shapes_of(config, str(folder)).state_dict().items()}
    names = {key: file_names(key, config) for key in shapes}
    expected = {name for several in names.values() for name in several}
    if missing := sorted(expected - found.keys()):
        raise DataError(f"{folder}: tensor {missing[0]} is missing")
    twice = {"lm_head.weight"} if config.tie_embeddings else set()  # some programs store the tied matrix once more
    extra = sorted(name for name in found.keys() - expected - twice if not name.endswith(_COMPUTED))
    if extra:
        what = "a bias, which is not computed" if extra[0].endswith(".bias") else "not part of a model that we compute"
        raise DataError(f"{folder}: tensor {extra[0]} is {what}")
    for key, shape in shapes.items():
        stored = [len(names[key]) * n if at == 0 else n for at, n in enumerate(found[names[key][0]].shape)]
        if stored != shape or any(found[name].shape != found[names[key][0]].shape for name in names[key]):
            raise DataError(f"{folder}: tensor {names[key][0]} has another shape than {CONFIG_JSON} asks for {shape}")
    with buildable(str(folder)):
        model = Transformer(config)
    for key, parameter in model.state_dict().items():
        parameter.copy_(torch.cat([_float(folder, name, found.pop(name)) for name in names[key]]))
    return model.eval()


def _load(files: list[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            tensors |= safetensors_torch.load_file(path)
        except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:  # torch's for a failing disk
            raise DataError(f"{path}: damaged or incomplete ({reason(error)}); download it again") from error
    return tensors


def _float(folder: Path, name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in FLOATS:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise DataError(f"{folder}: tensor {name} is {kind}; only float16, bfloat16 and float32 are read")
    if not tensor.isfinite().all():
        raise DataError(f"{folder}: tensor {name} holds values that are not finite")
    return tensor.float()


def _eos_of_config(folder: Path) -> int | None:
    """The first id that ends a text according to generation_config.json or else config.json."""
    for name in (GENERATION_CONFIG, CONFIG_JSON):
        value = document(folder / name).get("eos_token_id") if (folder / name).is_file() else None
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, int):
            return first
    return None


def _text(token: object) -> str | None:
    """A token of tokenizer_config.json: its text, or an object with it."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def chat_template(folder: Path, described: Mapping[str, Any]) -> str | None:
    """The template in its own file, or in tokenizer_config.json: a text, or several by name, of which the default."""
    path = folder / CHAT_TEMPLATE
    if path.is_file():
        try:
            return path.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot read the chat template: {reason(error)}") from error
    template = described.get("chat_template")
    if isinstance(template, list):
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


_LICENSE = re.compile(r"^license: *[\"']?([\w.+-]+)[\"']?\s*$", re.MULTILINE)


def _license(folder: Path) -> str | None:
    """What the header of README.md names, if it names one."""
    try:
        head = (folder / CARD).read_text(encoding="utf-8").split("---", 2)
    except (OSError, UnicodeDecodeError):  # a card is not needed
        return None
    match = _LICENSE.search(head[1]) if len(head) == 3 and not head[0].strip() else None
    return None if match is None else match[1]
