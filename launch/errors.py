"""Every error answer of the HTTP server, in OpenAI's shape: `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from .frontend import RequestError

_TYPES = {401: "authentication_error", 404: "not_found_error", 503: "service_unavailable_error"}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """What every answer with a status of 400 or above holds."""

    error: ErrorDetail


def dumps(value: Any) -> bytes:
    """JSON in UTF-8. Lone surrogates, which have no UTF-8, become `?`; a NaN or infinity is a bug and raises."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


class JSON(Response):
    """A JSON answer, written by `dumps`."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dumps(content)


def error_body(error: RequestError) -> dict[str, Any]:
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def error_response(error: RequestError, headers: Mapping[str, str] | None = None) -> Response:
    """The answer to a refused request, with `Retry-After` or `WWW-Authenticate` where they belong."""
    sent = dict(headers or {})
    if error.retry_after is not None:
        sent["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    if error.status == 401:
        sent["www-authenticate"] = "Bearer"
    return JSON(error_body(error), status_code=error.status, headers=sent)


def body_error(
    errors: Sequence[Mapping[str, Any]], request: Request, fields: Mapping[str, Sequence[str]]
) -> RequestError:
    """One 400 for pydantic's complaints about a body; `fields` has the known names per path, for a suggestion."""
    error = errors[0]
    kind, context = error["type"], error.get("ctx", {})
    path = _path(error["loc"][1:])
    if not request.headers.get("content-type", "").lower().startswith("application/json"):
        return RequestError("the request needs the header Content-Type: application/json", status=400)
    if kind == "json_invalid":
        return RequestError(f"the body is not valid JSON: {context.get('error', 'syntax error')}", status=400)
    if not path and "param" not in context:
        return RequestError("the body must be a JSON object", status=400)
    if kind == "extra_forbidden":
        known = fields.get(request.url.path, ()) if len(error["loc"]) == 2 else ()
        near = difflib.get_close_matches(path, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return RequestError(f"unknown field {path}{hint}", status=400, param=path, code="unknown_field")
    if kind == "missing":
        return RequestError(f"{path} is required", status=400, param=path, code="missing_field")
    if kind == "bad_value":
        path = context.get("param", path)
        return RequestError(f"{path}: {context['reason']}", status=400, param=path)
    return RequestError(f"{path}: {error['msg']}", status=400, param=path)


def _path(loc: Sequence[str | int]) -> str:
    """`("messages", 0, "content")` -> `messages[0].content`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")
