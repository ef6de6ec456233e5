"""Parsers that run in this process."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import httptools
from gunicorn.config import Config
from gunicorn.http.body import LengthReader
from gunicorn.http.parser import RequestParser
from waitress.adjustments import Adjustments
from waitress.parser import HTTPRequestParser

from tests.support.parsers import Reading, digest_of
from tests.wire.http1_support import h11_requests


class Httptools:
    """llhttp as uvicorn drives it."""

    name = "httptools"
    drops = False

    async def read(self, data: bytes, expected: int, may_have_more: bool) -> Reading:
        sink = _Sink()
        try:
            sink.parser.feed_data(data)
        except httptools.HttpParserUpgrade:  # what follows is not HTTP
            return Reading(sink.found, False)
        except httptools.HttpParserError as error:
            return Reading(sink.found, True, str(error))
        return Reading(sink.found, False)


class _Sink:
    def __init__(self) -> None:
        self.found: list[str] = []
        self.parser = httptools.HttpRequestParser(self)
        self.on_message_begin()

    def on_message_begin(self) -> None:
        self._url = b""
        self._body: list[bytes] = []

    def on_url(self, piece: bytes) -> None:
        self._url += piece

    def on_body(self, piece: bytes) -> None:
        self._body.append(piece)

    def on_message_complete(self) -> None:
        self.found.append(digest_of(self.parser.get_method(), self._url, b"".join(self._body)))


class H11:
    name = "h11"
    drops = False

    async def read(self, data: bytes, expected: int, may_have_more: bool) -> Reading:
        found, refusal = h11_requests(data)
        return Reading([digest_of(*one) for one in found], refusal is not None, refusal or "")


class Gunicorn:
    name = "gunicorn"
    drops = False

    def __init__(self) -> None:
        self._config = Config()
        self._config.set("limit_request_line", 0)
        self._config.set("limit_request_field_size", 0)

    async def read(self, data: bytes, expected: int, may_have_more: bool) -> Reading:
        found: list[str] = []
        parser = RequestParser(self._config, _once(data), ("127.0.0.1", 1))
        try:
            for request in parser:
                reader = request.body.reader
                owed = reader.length if isinstance(reader, LengthReader) else 0
                body = request.body.read()
                if getattr(request.body, "failed", False) is True:
                    return Reading(found, True, "the body failed")
                if len(body) < owed:
                    return Reading(found, False)  # it is given to the app at once, and its end has not come
                found.append(digest_of(request.method.encode(), request.uri.encode("latin-1"), body))
        except StopIteration:
            return Reading(found, False)
        except Exception as error:  # its errors have no common base but OSError's
            return Reading(found, type(error).__name__ != "NoMoreData", repr(error))
        return Reading(found, False)


def _once(data: bytes) -> Iterator[bytes]:
    yield data


class Waitress:
    name = "waitress"
    drops = False

    def __init__(self) -> None:
        self._adjustments = Adjustments()

    async def read(self, data: bytes, expected: int, may_have_more: bool) -> Reading:
        found: list[str] = []
        while data:
            parser: Any = HTTPRequestParser(self._adjustments)
            while data and not parser.completed:
                taken = parser.received(data)
                data = data[taken:]
            if not parser.completed:
                break
            if parser.error:
                return Reading(found, True, str(parser.error.body))
            if parser.empty:
                continue
            stream = parser.get_body_stream() or io.BytesIO()
            stream.seek(0)
            found.append(digest_of(parser.command.encode(), _target(parser), stream.read()))
        return Reading(found, False)


def _target(parser: Any) -> bytes:
    """The request target as it stood in the request line: what is kept of it has been decoded."""
    line: bytes = parser.first_line
    return line.split(b" ")[1]


LIBRARIES = (Httptools, H11, Gunicorn, Waitress)
