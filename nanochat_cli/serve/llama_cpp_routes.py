"""The endpoints of llama.cpp's server that editors use: /infill, /tokenize, /detokenize, /apply-template, /props."""

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from nanochat_cli import __version__
from nanochat_cli.inference.chat_template import render
from nanochat_cli.serve.asking import timings
from nanochat_cli.serve.engine import NativeEngine, Ticket
from nanochat_cli.serve.errors import error_body
from nanochat_cli.serve.infill import TEMPERATURE, infill_ids, infill_row, is_cut
from nanochat_cli.serve.log_probabilities import token_text
from nanochat_cli.serve.schemas import DetokenizeRequest, InfillRequest, TemplateRequest, TokenizeRequest
from nanochat_cli.serve.streaming import REQUEST_SECONDS, Events, Pieces, finished

STOP_TYPES = {"eos": "eos", "stop": "word", "length": "limit"}


def routes(engine: NativeEngine) -> APIRouter:
    """The endpoints of an engine."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> JSONResponse:
        if not engine.ready:
            return JSONResponse(error_body(503, "the model is loading"), 503)
        return JSONResponse({"status": "ok"})

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(engine.metrics.text(), media_type="text/plain; version=0.0.4")

    @router.get("/props")
    async def props() -> dict[str, Any]:
        served = engine.served
        return {
            "default_generation_settings": {"n_ctx": served.context, "params": {"temperature": TEMPERATURE}},
            "total_slots": engine.slots,
            "model_alias": served.name,
            "model_path": served.name,
            "chat_template": served.template or "",
            "infill": served.fills_in,
            "modalities": {"vision": False, "audio": False},
            "build_info": f"nanochat {__version__}",
        }

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        tokenizer = engine.served.tokenizer
        ids = tokenizer.encode(body.content, allow_special=body.parse_special)
        if body.with_pieces:
            return {"tokens": [{"id": token, "piece": token_text(tokenizer, token)} for token in ids]}
        return {"tokens": ids}

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        return {"content": engine.served.decode(body.tokens)}

    @router.post("/apply-template")
    async def apply_template(body: TemplateRequest) -> dict[str, Any]:
        served = engine.served
        return {"prompt": render(served.template, body.messages, served.tokenizer)}

    @router.post("/infill", response_model=None)
    async def infill(body: InfillRequest, request: Request) -> dict[str, Any] | Response:
        return await fill_in(engine, body, request)

    return router


async def fill_in(engine: NativeEngine, body: InfillRequest, request: Request) -> dict[str, Any] | Response:
    """llama.cpp appends `prompt`, what was typed since the prefix was taken, to the prefix. n_predict 0 only reads."""
    served, prefix = engine.served, body.input_prefix + body.prompt
    ids = infill_ids(served, prefix, body.input_suffix, body.n_predict, body.input_extra or ())
    # A prompt that is only to be read is read for one token, which is not answered.
    ticket = engine.submit([infill_row(served, ids, body, 1 if body.n_predict == 0 else body.n_predict)])
    if not body.stream:
        await finished(ticket, request)
        answer = {"content": "" if body.n_predict == 0 else ticket.rows[0].text, **_end(ticket, served.name)}
        return answer if body.response_fields is None else _only(answer, body.response_fields)

    async def events() -> AsyncIterator[dict[str, Any]]:
        pieces = Pieces(ticket.rows)
        async for _ in ticket.changes(REQUEST_SECONDS):
            for number, text, ended in pieces.new():
                what = {"index": number, "content": "" if body.n_predict == 0 else text, "stop": ended is not None}
                yield {**what, **(_end(ticket, served.name) if ended else {})}

    return Events(ticket, events())


def _end(ticket: Ticket, name: str) -> dict[str, Any]:
    (row,) = ticket.rows
    return {
        "index": 0,
        "id_slot": 0,
        "stop": True,
        "model": name,
        "tokens": row.tokens,
        "tokens_predicted": len(row.tokens),
        "tokens_evaluated": len(row.prompt),
        "tokens_cached": len(row.prompt) + len(row.tokens),
        "truncated": False,
        "has_new_line": "\n" in row.text,
        "stop_type": "limit" if is_cut(row) else STOP_TYPES.get(row.finish or "", "none"),
        "stopping_word": "",
        "timings": timings(ticket),
    }


def _only(answer: dict[str, Any], fields: list[str]) -> dict[str, Any]:
    """Those fields; one inside another is named "timings/prompt_n", also in the answer. Unknown ones are left out."""
    found: dict[str, Any] = {}
    for name in fields:
        value: Any = answer
        for part in name.split("/"):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            found[name] = value
    return found
