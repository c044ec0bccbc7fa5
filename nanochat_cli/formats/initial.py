"""What a training may begin with (`train.init`): a run, a checkpoint in one, a GGUF file, a Hugging Face folder.

Knows the kinds of source; the readers of each refuse what our model does not compute. torch is imported where weights
are read, and for the shape of a GGUF file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat_cli.config.load import CONFIG_FILE, load_run_config
from nanochat_cli.config.sections.model import ModelConfig
from nanochat_cli.errors import DataError
from nanochat_cli.formats.run.find import DEFAULT_FOLDER, is_in_run, run_and_checkpoint
from nanochat_cli.formats.run.origin import read_chat_template

if TYPE_CHECKING:
    from torch import Tensor

    from nanochat_cli.data.shards import ShardReader
    from nanochat_cli.data.tokenizer import Tokenizer
    from nanochat_cli.formats.run.checkpoints import Which

WAY = ("start", "ramp")
"""Keys of [model.quant] that are about one training, and not about the model."""


def initial_shape(named: Path) -> dict[str, Any]:
    """The section [model] of what train.init names, without a way from float to ternary. Raises DataError."""
    path, which = _located(named)
    if which is not None:
        described = _written(load_run_config(path).model)
        described["quant"] = {key: value for key, value in described["quant"].items() if key not in WAY}
        return described
    if path.is_file():
        from nanochat_cli.formats.gguf.file import GGUFFile
        from nanochat_cli.formats.gguf.read import model_config

        config = model_config(GGUFFile(path))
    else:
        from nanochat_cli.formats.huggingface.files import read_config

        config = read_config(path)
    return {**_written(config), "quant": {"enabled": False}}


def _written(config: ModelConfig) -> dict[str, Any]:
    """Without what is not set, as in a file."""
    return {key: value for key, value in config.model_dump(mode="json").items() if value is not None}


def initial_weights(named: Path) -> "tuple[ModelConfig, Mapping[str, Tensor]]":
    """[model] and the float32 tensors of what train.init names; of a run its latents.

    Raises DataError, also for a GGUF file that is ternary: it has none, and they are what training moves.
    """
    path, which = _located(named)
    if which is not None:
        from nanochat_cli.formats.run import checkpoints

        saved = checkpoints.load(path, which)
        return ModelConfig.model_validate(saved.model_config), saved.tensors["model"]
    if path.is_file():
        from nanochat_cli.formats.gguf.read import load_float_gguf

        model, _ = load_float_gguf(path)
    else:
        from nanochat_cli.formats.huggingface.read import read_folder

        model = read_folder(path).model
    return model.config, model.state_dict()


def initial_template(named: Path, data: "ShardReader") -> str | None:
    """The chat template of what train.init names. Raises DataError unless the data set is in its tokens."""
    path, which = _located(named)
    if which is not None:
        from nanochat_cli.data.tokenizer import Tokenizer

        tokenizer, template = Tokenizer.load(path / "tokenizer.json"), read_chat_template(path)
    elif path.is_file():
        from nanochat_cli.formats.gguf.file import GGUFFile
        from nanochat_cli.formats.gguf.tokenizer_metadata import chat_template_of, tokenizer_from_metadata

        fields = GGUFFile(path).fields
        tokenizer, template = tokenizer_from_metadata(fields), chat_template_of(fields)
    else:
        from nanochat_cli.formats.huggingface.files import read_config
        from nanochat_cli.formats.huggingface.read import chat_template, read_tokenizer

        tokenizer, described = read_tokenizer(path, read_config(path))
        template = chat_template(path, described)
    if not _same_tokens(tokenizer, data.tokenizer):
        raise DataError(
            f"train.init = {named} has another tokenizer than {data.folder}, whose tokens would mean something else to "
            "it; prepare the data again with its tokenizer: nanochat tokenize --tokenizer RUN (a model from elsewhere "
            "becomes a run with nanochat import)"
        )
    return template


def _same_tokens(one: "Tokenizer", other: "Tokenizer") -> bool:
    facts = [(each.pre, each.vocab_size, each.eos_id, each.special_tokens) for each in (one, other)]
    return facts[0] == facts[1] and all(
        one.token_text(token) == other.token_text(token) for token in range(one.vocab_size)
    )


def place_of(named: Path) -> Path:
    """The path, also of a run in runs/ that is named without it."""
    inside = DEFAULT_FOLDER / named
    return inside if not (named / CONFIG_FILE).is_file() and (inside / CONFIG_FILE).is_file() else named


def _located(named: Path) -> "tuple[Path, Which | None]":
    """The path, and the checkpoint of a run; None for a GGUF file or a Hugging Face folder."""
    path = place_of(named)
    if is_in_run(path):
        try:
            return run_and_checkpoint(path)
        except DataError as error:
            raise DataError(f"train.init = {error}") from None
    if (named.suffix == ".gguf" and named.is_file()) or (named / "config.json").is_file():
        return named, None
    what = "neither a run nor a Hugging Face folder nor a .gguf file" if named.exists() else "no such file or folder"
    raise DataError(f"train.init = {named}: {what}")
