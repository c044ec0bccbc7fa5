"""A conversation as the text that a model was trained on, by its own Jinja template, in a sandbox without the world."""

import json
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.exceptions import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanochat_cli.data.chat import END, escaped, rendered_ids
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import ConfigError, DataError, reason
from nanochat_cli.formats.gguf.file import GGUFFile
from nanochat_cli.formats.gguf.tokenizer_metadata import CHAT_TEMPLATE
from nanochat_cli.formats.run.origin import read_chat_template


def find_template(target: Path, file: Path | None = None) -> str | None:
    """The template of a file, else that of a run or a GGUF file; None where a model was trained without.

    Raises DataError for a file that cannot be read, ConfigError for what is no template.
    """
    if file is not None:
        try:
            found, where = file.read_text(encoding="utf-8"), file
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: cannot be read: {reason(error)}") from error
    elif target.suffix == ".gguf":
        found, where = GGUFFile(target).fields.get(CHAT_TEMPLATE), target
    else:
        found, where = read_chat_template(target), target
    if found is not None:
        _require_template(found, str(where))
    return found


def _require_template(template: str, where: str) -> None:
    try:
        _environment().parse(template)
    except TemplateSyntaxError as error:
        raise ConfigError(f"{where}: not a chat template: {error.message}, line {error.lineno}") from None


def render_ids(template: str | None, messages: list[dict[str, Any]], tokenizer: Tokenizer) -> list[int]:
    """`render` as token ids. Special tokens are those of the template: a message that spells one is plain text."""
    return rendered_ids(render(template, _escaped(messages, tokenizer), tokenizer), tokenizer)


def render(template: str | None, messages: list[dict[str, Any]], tokenizer: Tokenizer) -> str:
    """The conversation up to where the assistant answers. ConfigError without a template, or if it refuses."""
    if template is None:
        raise ConfigError(
            "this model has no chat template: it continues text; name one with --chat-template FILE for a model that "
            "was trained on conversations"
        )
    names = {"eos_token": tokenizer.eos_token, "bos_token": ""}
    try:
        return _environment().from_string(template).render(messages=messages, add_generation_prompt=True, **names)
    except (TemplateError, TypeError, ValueError, KeyError, RecursionError) as error:
        raise ConfigError(f"the chat template refuses these messages: {error}") from None


def turn_ends(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that end an answer, besides the end of the text."""
    return frozenset({tokenizer.special_tokens[END]} if END in tokenizer.special_tokens else ())


def _escaped(value: Any, tokenizer: Tokenizer) -> Any:
    """Messages in which no text spells a special token, roles and names of fields included."""
    if isinstance(value, str):
        return escaped(value, tokenizer)
    if isinstance(value, list):
        return [_escaped(one, tokenizer) for one in value]
    if isinstance(value, dict):
        return {_escaped(key, tokenizer): _escaped(one, tokenizer) for key, one in value.items()}
    return value


def _environment() -> ImmutableSandboxedEnvironment:
    found = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    found.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    found.globals["raise_exception"] = _refuse
    return found


def _refuse(message: str) -> None:
    raise TemplateError(message)
