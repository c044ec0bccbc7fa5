"""/v1: models, completions and chat completions, with the fields of OpenAI's API."""

import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from nanochat_cli.inference.chat_template import render_ids, turn_ends
from nanochat_cli.inference.continuous_batch import Row
from nanochat_cli.serve.asking import REASONS, make_row, seed_of, settings_of, timings, usage
from nanochat_cli.serve.engine import NativeEngine, Served, Ticket
from nanochat_cli.serve.errors import RequestError
from nanochat_cli.serve.infill import infill_ids
from nanochat_cli.serve.log_probabilities import Scored, legacy, of_chat, score_prompt
from nanochat_cli.serve.schemas import MAX_CHOICES, ChatRequest, CompletionRequest, Sampled
from nanochat_cli.serve.streaming import REQUEST_SECONDS, Events, Pieces, finished

TEMPERATURE = 1.0
"""OpenAI's, where a request names none."""
MAX_TOKENS = 16
"""Of a completion, likewise; an answer in a conversation may be as long as the context."""

Answer = dict[str, Any] | Response


@dataclass(frozen=True)
class Form:
    """How one endpoint writes a choice. kinds: `object` of an answer and of an event.

    whole: (number, row); part: (number, new text, the row if it has ended); opening: of the first events.
    """

    prefix: str
    kinds: tuple[str, str]
    whole: Callable[[int, Row], dict[str, Any]]
    part: Callable[[int, str, Row | None], dict[str, Any]]
    opening: Sequence[dict[str, Any]]


def routes(engine: NativeEngine) -> APIRouter:
    """The endpoints of an engine."""
    router, created = APIRouter(prefix="/v1"), int(time.time())

    def card() -> dict[str, Any]:
        served = engine.served
        meta = {"n_ctx_train": served.context, "n_vocab": served.tokenizer.vocab_size}
        return {"id": served.name, "object": "model", "created": created, "owned_by": "nanochat", "meta": meta}

    @router.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card()]}

    @router.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != engine.served.name:
            raise RequestError(404, f"there is no model {name[:100]}: this server has {engine.served.name}", "model")
        return card()

    @router.post("/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Answer:
        return await complete(engine, body, request)

    @router.post("/chat/completions", response_model=None)
    async def chat_completions(body: ChatRequest, request: Request) -> Answer:
        return await chat(engine, body, request)

    return router


async def complete(engine: NativeEngine, body: CompletionRequest, request: Request) -> Answer:
    """Continue every prompt n times."""
    served, n = engine.served, body.n or 1
    if body.best_of not in (None, 1, n):
        raise RequestError(400, f"best_of = {body.best_of} is not supported: leave it out", "best_of")
    if body.echo and body.suffix is not None:
        raise RequestError(400, "echo and suffix exclude each other", "echo")
    prompts = _prompts(served, body)
    max_tokens = MAX_TOKENS if body.max_tokens is None else body.max_tokens
    settings, seed = settings_of(body, max_tokens, TEMPERATURE, served.context), seed_of(body)
    scores = _scores(len(prompts) * n, body.logprobs)
    rows = [
        make_row(served, prompts[i // n], settings, seed + i % n, body, observe=score and score.observe)
        for i, score in enumerate(scores)
    ]
    ticket = engine.submit(rows)
    before = [served.tokenizer.decode(row.prompt) if body.echo else "" for row in rows]
    known = await _score_prompts(engine, ticket, rows, n, body) if body.echo and body.logprobs is not None else []

    def choice(number: int, text: str, parts: Sequence[Scored], length: int | None, row: Row | None) -> dict[str, Any]:
        found = legacy(parts, served.tokenizer, length) if parts else None
        return {"index": number, "text": text, "logprobs": found, "finish_reason": row and REASONS[row.finish]}

    def whole(number: int, row: Row) -> dict[str, Any]:
        text, score = before[number] + row.text, scores[number]
        parts = [] if score is None else [*known[number // n : number // n + 1], score]
        return choice(number, text, parts, len(text) if row.finish == "stop" else None, row)

    def part(number: int, text: str, row: Row | None) -> dict[str, Any]:
        score = scores[number]
        return choice(number, text, [] if score is None else [score.fresh()], None, row)

    opening = [choice(i, text, known[i // n : i // n + 1], None, None) for i, text in enumerate(before) if text]
    form = Form("cmpl", ("text_completion", "text_completion"), whole, part, opening)
    return await _answer(ticket, body, request, served, form, len(prompts))


async def chat(engine: NativeEngine, body: ChatRequest, request: Request) -> Answer:
    """Answer a conversation n times."""
    served, n = engine.served, body.n or 1
    ids = render_ids(served.template, body.messages, served.tokenizer)
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    settings, seed = settings_of(body, max_tokens, TEMPERATURE, served.context), seed_of(body)
    scores, ends = _scores(n, (body.top_logprobs or 0) if body.logprobs else None), turn_ends(served.tokenizer)
    rows = [
        make_row(served, ids, settings, seed + i, body, ends=ends, observe=score and score.observe)
        for i, score in enumerate(scores)
    ]

    def choice(number: int, what: dict[str, Any], score: Scored | None, row: Row | None) -> dict[str, Any]:
        found = None if score is None else of_chat(score, served.tokenizer)
        return {"index": number, **what, "logprobs": found, "finish_reason": row and REASONS[row.finish]}

    def whole(number: int, row: Row) -> dict[str, Any]:
        return choice(number, {"message": {"role": "assistant", "content": row.text}}, scores[number], row)

    def part(number: int, text: str, row: Row | None) -> dict[str, Any]:
        score = scores[number]
        return choice(number, {"delta": {"content": text} if text else {}}, score and score.fresh(), row)

    opening = [choice(i, {"delta": {"role": "assistant", "content": ""}}, None, None) for i in range(n)]
    form = Form("chatcmpl", ("chat.completion", "chat.completion.chunk"), whole, part, opening)
    return await _answer(engine.submit(rows), body, request, served, form, 1)


async def _answer(ticket: Ticket, body: Sampled, request: Request, served: Served, form: Form, prompts: int) -> Answer:
    head = {"id": f"{form.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": served.name}
    if not body.stream:
        await finished(ticket, request)
        choices = [form.whole(number, row) for number, row in enumerate(ticket.rows)]
        counts = {"usage": usage(ticket.rows, prompts), "timings": timings(ticket)}
        return {**head, "object": form.kinds[0], "choices": choices, **counts}

    async def events() -> AsyncIterator[dict[str, Any]]:
        event = {**head, "object": form.kinds[1], **({"usage": None} if body.include_usage else {})}
        for choice in form.opening:
            yield {**event, "choices": [choice]}
        pieces = Pieces(ticket.rows)
        async for _ in ticket.changes(REQUEST_SECONDS):
            for new in pieces.new():
                yield {**event, "choices": [form.part(*new)]}
        if body.include_usage:
            yield {**event, "choices": [], "usage": usage(ticket.rows, prompts), "timings": timings(ticket)}

    return Events(ticket, events(), "[DONE]")


def _scores(count: int, top: int | None) -> list[Scored | None]:
    return [None if top is None else Scored(top) for _ in range(count)]


async def _score_prompts(
    engine: NativeEngine, ticket: Ticket, rows: Sequence[Row], n: int, body: CompletionRequest
) -> list[Scored]:
    model, top = engine.served.model, body.logprobs or 0
    try:
        return [await engine.compute(lambda ids=row.prompt: score_prompt(model, ids, top)) for row in rows[::n]]
    except BaseException:
        ticket.close()
        raise


def _prompts(served: Served, body: CompletionRequest) -> list[list[int]]:
    """Token ids of every prompt; with a suffix, those that ask for what belongs between."""
    prompt, encode = body.prompt, served.tokenizer.encode
    if body.suffix is not None:
        if not isinstance(prompt, str):
            raise RequestError(400, "suffix needs a prompt that is one text", "suffix")
        return [infill_ids(served, prompt, body.suffix, body.max_tokens)]
    if isinstance(prompt, str):
        return [encode(prompt)]
    texts = [one if isinstance(one, str) else list(one) for one in prompt if not isinstance(one, int)]
    found = [encode(one) if isinstance(one, str) else one for one in texts]
    found = found or [[one for one in prompt if isinstance(one, int)]]
    if not found[0]:
        raise RequestError(400, "prompt is an empty list", "prompt")
    if len(found) * (body.n or 1) > MAX_CHOICES:
        raise RequestError(400, f"{len(found)} prompts × n = {body.n} are more than {MAX_CHOICES} texts", "n")
    return found
