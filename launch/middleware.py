"""What every HTTP request passes first: a request id, the API key, the size of its body, and a net for our own bugs."""

from __future__ import annotations

import hmac
import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import error_response
from .frontend import RequestError

MAX_BODY_BYTES = 32 * 2**20
MAX_ID_CHARS = 128
# Probes and scrapers carry no key and learn nothing from these about anybody's text.
OPEN_PATHS = frozenset({"/health", "/ready", "/version", "/metrics", "/openapi.json"})

logger = logging.getLogger(__name__)


def clean_request_id(text: str | None) -> str:
    """The client's id without characters that do not belong into a header or a log line; a new one if none is left."""
    return re.sub(r"[^A-Za-z0-9._:-]", "", text or "")[:MAX_ID_CHARS] or uuid.uuid4().hex


class Gate:
    """Pure ASGI, so that `receive` reaches the handlers untouched and they can see a client go away."""

    def __init__(self, app: ASGIApp, *, api_key: str | None = None, max_body: int = MAX_BODY_BYTES) -> None:
        self.app = app
        self.api_key = api_key.encode() if api_key else None
        self.max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = clean_request_id(headers.get("x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id
        started = False
        received = 0

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        async def receive_bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_body:
                # An HTTPException is the one exception that FastAPI's body reader lets through.
                raise HTTPException(413, self._too_large())
            return message

        try:
            refused = self._refuse(scope["path"], headers)
            if refused is not None:
                await error_response(refused)(scope, receive, send_with_id)
            else:
                await self.app(scope, receive_bounded, send_with_id)
        except Exception:
            logger.exception("request %s failed", request_id)
            if started:
                raise
            error = RequestError("internal error; the server's log has the details", status=500)
            await error_response(error)(scope, receive, send_with_id)

    def _refuse(self, path: str, headers: Headers) -> RequestError | None:
        if self.api_key is not None and path not in OPEN_PATHS:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            given = key.strip().encode("latin-1")  # the bytes as they came
            if scheme.lower() != "bearer" or not hmac.compare_digest(given, self.api_key):
                message = "this server needs a valid API key: Authorization: Bearer KEY"
                return RequestError(message, status=401, code="invalid_api_key")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.max_body:
            return RequestError(self._too_large(), status=413, code="body_too_large")
        return None

    def _too_large(self) -> str:
        return f"the body is larger than the limit of {self.max_body} bytes"
