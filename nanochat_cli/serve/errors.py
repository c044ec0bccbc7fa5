"""One form of every error, OpenAI's and llama.cpp's: {"error": {"message", "type", "param", "code"}}."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from nanochat_cli.errors import NanochatError

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    501: "not_supported_error",
    503: "unavailable_error",
}


class RequestError(Exception):
    """A request that cannot be answered. param: the field at fault."""

    def __init__(self, status: int, message: str, param: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.param = status, param
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def error_response(error: RequestError) -> JSONResponse:
    return JSONResponse(error_body(error.status, str(error), error.param), error.status, error.headers)


def install(app: FastAPI) -> None:
    """Answer every exception in that form; what nobody expected says nothing of the inside."""

    @app.exception_handler(RequestError)
    async def expected(_: Request, error: RequestError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(NanochatError)
    async def refused(_: Request, error: NanochatError) -> JSONResponse:
        return error_response(RequestError(400, str(error)))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return error_response(RequestError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', '')}"))
        if len(first["loc"]) < 2:
            return error_response(RequestError(400, "send a JSON object, with Content-Type: application/json"))
        field = str(first["loc"][1])
        return error_response(RequestError(400, f"{field}: {first['msg']}", field))

    @app.exception_handler(HTTPException)
    async def plain(_: Request, error: HTTPException) -> JSONResponse:
        return error_response(RequestError(error.status_code, str(error.detail)))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        return error_response(RequestError(500, f"internal error: {type(error).__name__}"))
