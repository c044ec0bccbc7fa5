"""The files of a Hugging Face folder: their names, config.json, and which of them hold weights. No torch.

A folder that cannot be imported is an error within milliseconds, wherever its documents say why.
"""

from pathlib import Path
from typing import Any

from nanochat_cli.config.sections.model import ModelConfig
from nanochat_cli.errors import DataError, reason
from nanochat_cli.formats.huggingface.architecture import from_config_json
from nanochat_cli.nesting import parse_json

CONFIG_JSON, GENERATION_CONFIG, TOKENIZER_JSON = "config.json", "generation_config.json", "tokenizer.json"
TOKENIZER_CONFIG, CHAT_TEMPLATE, CARD = "tokenizer_config.json", "chat_template.jinja", "README.md"
CHECKSUMS = "checksums.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_config(folder: Path) -> ModelConfig:
    """The configuration of the folder's model. Raises DataError, naming file and key."""
    path = folder / CONFIG_JSON
    values = document(path)
    try:
        return from_config_json(values)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except (TypeError, AttributeError, ValueError) as error:  # a list where an object belongs, for example
        raise DataError(f"{path}: damaged ({' '.join(str(error).split())})") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder. Raises DataError if it has none, or its index names others."""
    index = folder / INDEX
    if not index.is_file():
        if (folder / WEIGHTS).is_file():
            return [folder / WEIGHTS]
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        if pickles:
            raise DataError(
                f"{folder}: its weights are pickle ({pickles[0]}), which is never read since it may run code: "
                "save it as safetensors first"
            )
        raise DataError(f"{folder}: no {WEIGHTS} in it")
    places = document(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise DataError(f"{index}: damaged (it has no weight_map)")
    names = sorted({str(name) for name in places.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise DataError(f"{index}: names {name!r}, which is not a safetensors file of the folder")
        if not (folder / name).is_file():
            raise DataError(f"{folder / name}: missing, and {INDEX} names it; download it again")
    return [folder / name for name in names]


def document(path: Path) -> dict[str, Any]:
    """A JSON object. Raises DataError."""
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({reason(error)})") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: a JSON {type(found).__name__} where an object belongs")
    return found
