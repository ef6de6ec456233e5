"""Asks a machine one question: does this port accept a connection, what does this request get?

Machines may hang or lie. An answer is read by the same rules as those that pass through the edge, and only as far as
its head: 64 KiB, 100 fields, 8 informational answers before it. A redirect is an answer like any other, and all ends
with the check's timeout. No connection is kept. When to ask, and what follows, is checks.py's; why this is not done
with aiohttp, docs/decisions/0005.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import ssl
from dataclasses import dataclass
from urllib.parse import quote

from proxy.clock import spawn
from proxy.control.prober import SocketMaker
from proxy.descriptors import adopt
from proxy.errors import Code, ProxyError, Source
from proxy.model import Check
from proxy.wire.http1 import Headers, Limits, ResponseHead, ResponseReader

SHOWN_CHARACTERS = 200
MAX_INFORMATIONAL = 8
USER_AGENT = "wakefront-check"
_LIMITS = Limits(max_head_bytes=65_536, max_headers=100)
_PIECE = 4096  # bytes parsed before we look whether that was enough
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_FRAMING = frozenset({"connection", "content-length", "transfer-encoding"})


@dataclass(frozen=True, slots=True)
class Target:
    """Where a check goes; `netns_pid` as in model.Machine."""

    host: str
    port: int
    netns_pid: int = 0


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found, and that in words for an operator."""

    passes: bool
    output: str
    status: int | None = None  # of the answer, if one came


class CheckClient:
    """`check` any number of times at once."""

    def __init__(self, make_socket: SocketMaker) -> None:
        self._make_socket = make_socket
        self._verifying: asyncio.Task[ssl.SSLContext] | None = None
        self._trusting: ssl.SSLContext | None = None

    async def check(self, check: Check, target: Target) -> Finding:
        """The finding; a machine's fault is never an exception."""
        try:
            async with asyncio.timeout(check.timeout_s):
                if check.type == "tcp":
                    return await self._connect(target)
                return await self._request(check, target)
        except TimeoutError:
            return Finding(False, f"no answer within {check.timeout_s:g} s")
        except ssl.SSLCertVerificationError as error:
            return Finding(False, f"its certificate is not good: {_shown(error.verify_message)}")
        except ProxyError as error:
            return Finding(False, f"its answer is not valid: {_shown(error.detail)}")
        except (OSError, ValueError) as error:  # ValueError: what was configured is no request
            return Finding(False, _reason(error))

    async def _connected(self, target: Target) -> socket.socket:
        sock = self._make_socket(target.netns_pid, socket.AF_INET6 if ":" in target.host else socket.AF_INET)
        try:
            await asyncio.get_running_loop().sock_connect(sock, (target.host, target.port))
            if sock.getsockname() == sock.getpeername():  # a port of loopback that nobody listens on met itself
                raise ConnectionRefusedError("connection refused")
        except BaseException:
            sock.close()
            raise
        return sock

    async def _connect(self, target: Target) -> Finding:
        with contextlib.closing(await self._connected(target)):
            return Finding(True, f"connected to port {target.port}")

    async def _request(self, check: Check, target: Target) -> Finding:
        request = request_bytes(check, target)
        context = await self._context(check) if check.protocol == "https" else None
        name = (check.tls_server_name or target.host) if context is not None else None
        sock = await self._connected(target)
        loop = asyncio.get_running_loop()
        transport, answer = await adopt(loop, lambda: _Answer(check.method == "HEAD"), sock, context, name)
        try:
            transport.write(request)
            head = await answer.head
        finally:
            transport.abort()  # at once: a TLS goodbye would wait for the machine's
        output = f"{check.method} {check.path}: {head.status} {_text(head.reason)}".rstrip()
        passes = 200 <= head.status < 300
        if not passes and (text := _text(bytes(answer.body))):
            output += f": {text}"  # where programs say what is wrong
        return Finding(passes, output, head.status)

    async def _context(self, check: Check) -> ssl.SSLContext:
        """Reading the system's authorities takes some 20 ms, so that is done once and in a thread."""
        if check.tls_skip_verify:
            if self._trusting is None:
                self._trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                self._trusting.check_hostname = False
                self._trusting.verify_mode = ssl.CERT_NONE
            return self._trusting
        if self._verifying is None:
            self._verifying = spawn(asyncio.to_thread(ssl.create_default_context), "read authorities")
        return await asyncio.shield(self._verifying)


class _Answer(asyncio.Protocol):
    """One answer: its head, or the exception that there is instead, and what of its body came with it."""

    def __init__(self, head_only: bool) -> None:
        self.head: asyncio.Future[ResponseHead] = asyncio.get_running_loop().create_future()
        self.body = bytearray()
        self._reader = ResponseReader(self, _LIMITS)
        self._reader.expect(head_only)
        self._informational = 0
        self._final: ResponseHead | None = None

    def data_received(self, data: bytes) -> None:
        if self.head.done():
            return
        try:
            for at in range(0, len(data), _PIECE):
                self._reader.feed(data[at : at + _PIECE])
                if self._final is not None:
                    self.head.set_result(self._final)
                    return
        except ProxyError as error:
            self._fail(error)

    def eof_received(self) -> None:
        self._fail(ConnectionResetError("it closed the connection without an answer"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(exc or ConnectionResetError("it closed the connection without an answer"))
        self._reader.close()

    def _fail(self, error: Exception) -> None:
        """The answer may have been whole although what follows it is not."""
        if self.head.done():
            return
        if self._final is not None:
            self.head.set_result(self._final)
        else:
            self.head.set_exception(error)

    # --- wire.http1.ResponseSink

    def on_response_head(self, head: ResponseHead) -> None:
        if head.status >= 200 or head.status == 101:
            self._final = self._final or head
            return
        self._informational += 1
        if self._informational > MAX_INFORMATIONAL:
            raise ProxyError(Code.RESPONSE_INVALID, Source.UPSTREAM, detail="informational answers without end")

    def on_response_body(self, data: bytes) -> None:
        self.body += data[: SHOWN_CHARACTERS - len(self.body)]

    def on_response_end(self, trailers: Headers) -> None:
        pass

    def on_upgrade_bytes(self, data: bytes) -> None:
        pass


def request_bytes(check: Check, target: Target) -> bytes:
    """The request of a check. Raises ValueError if what was configured makes none."""
    if not _TOKEN.fullmatch(check.method):
        raise ValueError(f"{check.method!r} is no method")
    path = quote(check.path if check.path.startswith("/") else f"/{check.path}", safe="%/?&=:;,@!$'()*+~[]")
    host = f"[{target.host}]" if ":" in target.host else target.host
    fields = {
        "host": ("Host", f"{host}:{target.port}"),
        "user-agent": ("User-Agent", USER_AGENT),
        "accept": ("Accept", "*/*"),
    }
    for name, value in check.headers:
        if not _TOKEN.fullmatch(name) or not _VALUE.fullmatch(value):
            raise ValueError(f"header {name!r} of the check is not valid")
        if name.lower() not in _FRAMING:
            fields[name.lower()] = (name, value)
    lines = [f"{check.method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.values())]
    lines.append("Connection: close")
    if check.method not in ("GET", "HEAD"):
        lines.append("Content-Length: 0")
    return "\r\n".join((*lines, "", "")).encode("latin-1")


def _text(raw: bytes) -> str:
    return _shown(raw.decode("utf-8", "replace"))


def _shown(text: str) -> str:
    """A machine's words, fit for a terminal and a log line."""
    return " ".join("".join(one if one.isprintable() else " " for one in text[:SHOWN_CHARACTERS]).split())


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno and not isinstance(error, ssl.SSLError):
        return os.strerror(error.errno).lower()
    return _shown(str(error) or type(error).__name__)
