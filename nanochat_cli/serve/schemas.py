"""The bodies of requests. Unknown fields are ignored, as llama.cpp's clients send many; what would change the answer
and is not supported is refused, since silence is worse.
"""

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, model_validator

from nanochat_cli.serve.errors import RequestError

MAX_CHOICES = 128
"""Texts that one request may ask for: prompts times n."""
MAX_STOPS = 16

Stop = Annotated[str, Field(min_length=1, max_length=256)]
Tokens = list[Annotated[StrictInt, Field(ge=0)]]

REFUSED = {
    "tools": (None, [], "none"),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "grammar": (None, ""),
    "json_schema": (None, {}),
    "logit_bias": (None, {}, []),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "audio": (None,),
}
"""Fields with the values that change nothing."""


class Body(BaseModel):
    """What every request may hold."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> "Body":
        for name, harmless in REFUSED.items():
            if (value := (self.model_extra or {}).get(name)) not in harmless:
                raise RequestError(400, f"{name} = {str(value)[:80]} is not supported: leave it out", name)
        return self

    @model_validator(mode="after")
    def _refuse_half_characters(self) -> "Body":
        """Of messages, whose values may be anything; JSON can spell half of a surrogate pair, which is no text."""
        try:
            json.dumps(getattr(self, "messages", None), ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise RequestError(400, "messages: half of a surrogate pair is no text", "messages") from None
        return self


class Sampled(Body):
    """How to draw: OpenAI's names, and llama.cpp's for what OpenAI lacks."""

    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1 << 20)
    min_p: float | None = Field(None, ge=0, le=1)
    repeat_penalty: float | None = Field(None, ge=0.001, le=1000)
    repetition_penalty: float | None = Field(None, ge=0.001, le=1000)
    seed: int | None = Field(None, ge=-1, lt=1 << 62)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = False
    stream_options: dict[str, Any] | None = None
    cache_prompt: bool | None = True

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))


class CompletionRequest(Sampled):
    """POST /v1/completions."""

    model: str | None = None
    prompt: str | list[str] | Tokens | list[Tokens] = ""
    suffix: str | None = None
    max_tokens: int | None = Field(16, ge=-1)
    n: int | None = Field(1, ge=1, le=MAX_CHOICES)
    best_of: int | None = None
    echo: bool | None = False
    logprobs: int | None = Field(None, ge=0, le=20)


class ChatRequest(Sampled):
    """POST /v1/chat/completions."""

    model: str | None = None
    messages: list[dict[str, Any]] = Field(min_length=1, max_length=4096)
    max_tokens: int | None = Field(None, ge=-1)
    max_completion_tokens: int | None = Field(None, ge=-1)
    n: int | None = Field(1, ge=1, le=MAX_CHOICES)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)


class InfillRequest(Sampled):
    """POST /infill."""

    input_prefix: str = ""
    input_suffix: str = ""
    input_extra: list[dict[str, Any]] | None = Field(None, max_length=256)
    prompt: str = ""
    n_predict: int | None = Field(None, ge=-1)
    n_indent: int | None = Field(None, ge=0)
    samplers: list[str] | str | None = None
    t_max_predict_ms: float | None = None
    response_fields: list[str] | None = None


class TokenizeRequest(Body):
    """POST /tokenize."""

    content: str = ""
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeRequest(Body):
    """POST /detokenize."""

    tokens: Tokens = []


class TemplateRequest(Body):
    """POST /apply-template."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=4096)
