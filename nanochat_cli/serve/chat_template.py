"""A conversation as the text that a model was trained on, by its own Jinja template, in a sandbox without the world."""

import json
from typing import Any

from jinja2 import TemplateError
from jinja2.exceptions import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import ConfigError
from nanochat_cli.serve.errors import RequestError

TURN_END = "<|im_end|>"


def require_template(template: str, where: str) -> None:
    """Raise ConfigError for a template that cannot be read."""
    try:
        _environment().parse(template)
    except TemplateSyntaxError as error:
        raise ConfigError(f"{where}: not a chat template: {error.message}, line {error.lineno}") from None


def render(template: str | None, messages: list[dict[str, Any]], tokenizer: Tokenizer) -> str:
    """The conversation up to where the assistant answers. RequestError without a template, or if it refuses."""
    if template is None:
        raise RequestError(
            400,
            "this model has no chat template: it continues text, at /v1/completions; "
            "start nanochat serve with --chat-template FILE for a model that was trained on conversations",
        )
    names = {"eos_token": tokenizer.eos_token, "bos_token": ""}
    try:
        return _environment().from_string(template).render(messages=messages, add_generation_prompt=True, **names)
    except (TemplateError, TypeError, ValueError, KeyError, RecursionError) as error:
        raise RequestError(400, f"the chat template refuses these messages: {error}", "messages") from None


def turn_ends(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that end an answer, besides the end of the text."""
    return frozenset({tokenizer.special_tokens[TURN_END]} if TURN_END in tokenizer.special_tokens else ())


def _environment() -> ImmutableSandboxedEnvironment:
    found = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    found.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    found.globals["raise_exception"] = _refuse
    return found


def _refuse(message: str) -> None:
    raise TemplateError(message)
