"""Asks a machine one health question: does this port accept a connection, does this request get a 2xx?

Machines may hang or lie: an answer has 100 fields of 8 KiB at most, its body is not waited for, a redirect is an answer
like any other, and everything ends with the check's timeout. One session serves all machines, without connections kept;
which network a socket is made in goes with the task that asks. When to ask, and what follows, is checks.py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import aiohttp
from multidict import CIMultiDict

from proxy.clock import spawn
from proxy.control.prober import SocketMaker
from proxy.model import Check

MAX_FIELDS = 100
SHOWN_CHARACTERS = 200
USER_AGENT = "wakefront-check"
_netns_pid: ContextVar[int] = ContextVar("netns_pid")


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


class CheckClient:
    """`check` any number of times at once, then `close`."""

    def __init__(self, make_socket: SocketMaker) -> None:
        self._make_socket = make_socket
        self._session: aiohttp.ClientSession | None = None
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
        except aiohttp.ClientConnectorCertificateError as error:
            return Finding(False, f"its certificate is not good: {_shown(str(error.certificate_error))}")
        except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: what was configured is no request
            return Finding(False, _reason(error))

    async def _connect(self, target: Target) -> Finding:
        family = socket.AF_INET6 if ":" in target.host else socket.AF_INET
        with contextlib.closing(self._make_socket(target.netns_pid, family)) as sock:
            await asyncio.get_running_loop().sock_connect(sock, (target.host, target.port))
            if sock.getsockname() == sock.getpeername():  # a port of loopback that nobody listens on met itself
                return Finding(False, "connection refused")
        return Finding(True, f"connected to port {target.port}")

    async def _request(self, check: Check, target: Target) -> Finding:
        _netns_pid.set(target.netns_pid)
        session = self._session = self._session or self._new_session()
        host = f"[{target.host}]" if ":" in target.host else target.host
        path = check.path if check.path.startswith("/") else f"/{check.path}"
        options: dict[str, Any] = {}  # Any: arguments of different types
        if check.protocol == "https":
            options = {"ssl": await self._context(check), "server_hostname": check.tls_server_name}
        answer = await session.request(
            check.method, f"{check.protocol}://{host}:{target.port}{path}", headers=_fields(check.headers),
            allow_redirects=False, **options,
        )  # fmt: skip
        try:
            passes = 200 <= answer.status < 300
            output = f"{check.method} {check.path}: {answer.status} {_shown(answer.reason or '')}".rstrip()
            if not passes and (text := _arrived(answer)):
                output += f": {text}"
            return Finding(passes, output)
        finally:
            answer.close()

    def _new_session(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            limit=0, force_close=True, socket_factory=lambda address: self._make_socket(_netns_pid.get(), address[0])
        )
        return aiohttp.ClientSession(
            connector=connector, timeout=aiohttp.ClientTimeout(total=None), cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False, max_headers=MAX_FIELDS,
        )  # fmt: skip

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

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


def _fields(configured: tuple[tuple[str, str], ...]) -> Mapping[str, str]:
    fields = CIMultiDict({"User-Agent": USER_AGENT, "Accept": "*/*", "Connection": "close"})
    for name, value in configured:
        fields[name] = value
    return fields


def _arrived(answer: aiohttp.ClientResponse) -> str:
    """The beginning of the body, if it came with the head: where programs say what is wrong."""
    try:
        return _shown(answer.content.read_nowait(SHOWN_CHARACTERS).decode("utf-8", "replace"))
    except (aiohttp.ClientError, OSError):  # it broke off after the head
        return ""


def _shown(text: str) -> str:
    """A machine's words, fit for a terminal and a log line."""
    return " ".join("".join(one if one.isprintable() else " " for one in text[:SHOWN_CHARACTERS]).split())


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno:
        return _shown(os.strerror(error.errno).lower())
    return _shown(str(error) or type(error).__name__)
