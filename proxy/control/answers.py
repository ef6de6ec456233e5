"""What the admin API's endpoints share: reading a request's JSON and query, and answering in Fly's form."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from aiohttp import web

MAX_BODY_BYTES = 64 * 1024
BODY_S = 30.0

Json = dict[str, Any]  # Any: JSON


class ApiError(Exception):
    """An answer in Fly's form: `{"error": text, "status": code}`."""

    def __init__(self, status: int, code: str, text: str, **more: Any) -> None:  # Any: JSON
        super().__init__(text)
        self.status = status
        self.body = {"error": text, "status": code, **more}


async def read_body(request: web.Request, required: bool = False, limit: int = MAX_BODY_BYTES) -> Json:
    """A request's JSON object, of up to `limit` bytes. Raises ApiError."""
    try:
        async with asyncio.timeout(BODY_S):
            raw = await request.read()
    except TimeoutError:
        raise ApiError(408, "deadline_exceeded", f"the body did not come within {BODY_S:g} s") from None
    if len(raw) > limit:
        raise body_too_long(limit)
    if not raw.strip():
        if required:
            raise ApiError(400, "invalid_argument", "EOF")
        return {}
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "invalid_argument", f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise ApiError(400, "invalid_argument", "the body is not a JSON object")
    return body


def query_number(request: web.Request, name: str, default: float, low: float, high: float) -> float:
    text = request.query.get(name)
    if text is None:
        return default
    try:
        value = float(text.removesuffix("s"))
    except ValueError:
        raise ApiError(400, "invalid_argument", f"{name} {text!r} is no number") from None
    if value != value:
        raise ApiError(400, "invalid_argument", f"{name} {text!r} is no number")
    return min(max(value, low), high)


def query_flag(request: web.Request, name: str) -> bool:
    return request.query.get(name, "").lower() in ("1", "true", "yes")


async def large_json_answer(body: Json | list[Any]) -> web.Response:
    """Encoded in a thread: thousands of apps must not hold up a wake."""
    return web.json_response(text=await asyncio.to_thread(json.dumps, body))


def json_answer(body: Json | list[Any], status: int = 200) -> web.Response:
    return web.json_response(body, status=status)


def body_too_long(limit: int) -> ApiError:
    return ApiError(413, "invalid_argument", f"a body of more than {limit} bytes")
