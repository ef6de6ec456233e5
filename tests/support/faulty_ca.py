"""A man in the middle of a real CA: passes all on to Pebble and back, but for what a test has it do wrong.

It also adds what Pebble 2.4 is too old for: renewal information (RFC 9773) and profiles. Those answers are scripted;
that the client's requests carry what they should is seen in `seen`. Pebble makes the URLs in its answers out of the
Host it is asked by, so that the client stays with us.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime
import json
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import trustme
from aiohttp import web

from tests.support.pebble import Pebble

PROBLEM = "application/problem+json"
_HOP = {"content-length", "transfer-encoding", "connection", "date", "content-encoding"}

# What a request is for, by the beginning of its path at Pebble.
ENDPOINTS = {
    "directory": "/dir", "nonce": "/nonce-plz", "account": "/sign-me-up", "new order": "/order-plz",
    "order": "/my-order/", "authorization": "/authZ/", "challenge": "/chalZ/", "finalize": "/finalize-order/",
    "certificate": "/certZ/", "orders": "/list-orderz/", "renewal": "/renewal-info/",
}  # fmt: skip


@dataclass
class Answer:
    """What is sent back."""

    status: int
    headers: dict[str, str]
    body: bytes


Forward = Callable[[], Awaitable[Answer]]
Act = Callable[[web.Request, Forward], Awaitable["Answer | web.StreamResponse"]]


@dataclass
class Fault:
    """What goes wrong at an endpoint: the first `times` times, `after` as many that went well."""

    endpoint: str
    act: Act
    times: int = 1_000_000
    after: int = 0


@dataclass
class Seen:
    endpoint: str
    payload: dict[str, Any]  # Any: JSON; of the JWS, unverified


@dataclass
class FaultyCa:
    directory_url: str
    ca_file: Path
    faults: list[Fault] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    window: tuple[datetime.datetime, datetime.datetime] | None = None  # suggested, for every certificate
    renewal_retry_after: str = "21600"
    replaced: set[str] = field(default_factory=set)  # certificate ids that a new order may not name any more
    profiles: dict[str, str] = field(default_factory=dict)

    def heal(self) -> None:
        self.faults.clear()

    def count(self, endpoint: str) -> int:
        return sum(one.endpoint == endpoint for one in self.seen)


@contextlib.contextmanager
def faulty_ca(folder: Path, ca: Pebble) -> Iterator[FaultyCa]:
    """Stand in front of a CA."""
    folder.mkdir(parents=True, exist_ok=True)
    authority = trustme.CA()
    own = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(str(folder / "front-ca.pem"))
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    own.configure_cert(server_context)
    client_context = ssl.create_default_context(cafile=ca.ca_file)
    upstream = ca.directory_url.removesuffix("/dir")
    made = FaultyCa("", folder / "front-ca.pem")
    loop = asyncio.new_event_loop()
    up, down = threading.Event(), asyncio.Event()

    async def handle(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        endpoint = next((name for name, start in ENDPOINTS.items() if request.path.startswith(start)), "other")
        payload = _payload(body)
        made.seen.append(Seen(endpoint, payload))

        async def forward() -> Answer:
            return await _forward(request, body)

        answer: Answer | web.StreamResponse
        for fault in made.faults:
            if fault.endpoint == endpoint and fault.times > 0:
                if fault.after > 0:
                    fault.after -= 1
                    continue
                fault.times -= 1
                answer = await fault.act(request, forward)
                break
        else:
            answer = _scripted(endpoint, payload) or await forward()
        if isinstance(answer, web.StreamResponse):
            return answer
        if endpoint == "directory":
            answer = _with_extensions(request, answer)
        return web.Response(status=answer.status, headers=answer.headers, body=answer.body)

    async def _forward(request: web.Request, body: bytes) -> Answer:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP}
        async with session.request(
            request.method, upstream + request.path_qs, data=body or None, headers=headers, allow_redirects=False
        ) as got:
            kept = {name: value for name, value in got.headers.items() if name.lower() not in _HOP}
            return Answer(got.status, kept, await got.read())

    def _scripted(endpoint: str, payload: dict[str, Any]) -> Answer | None:
        if endpoint == "renewal" and made.window is not None:
            begins, ends = (one.isoformat().replace("+00:00", "Z") for one in made.window)
            body = {"suggestedWindow": {"start": begins, "end": ends}, "explanationURL": "https://ca.example/why"}
            return Answer(200, {"Retry-After": made.renewal_retry_after}, json.dumps(body).encode())
        if endpoint == "new order" and payload.get("replaces") in made.replaced:
            return problem_answer("alreadyReplaced", 409)
        return None

    def _with_extensions(request: web.Request, answer: Answer) -> Answer:
        directory = json.loads(answer.body)
        if made.window is not None:
            directory["renewalInfo"] = f"https://{request.host}/renewal-info"
        if made.profiles:
            directory["meta"]["profiles"] = made.profiles
        return Answer(answer.status, answer.headers, json.dumps(directory).encode())

    async def run() -> None:
        nonlocal session
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=client_context)) as session:
            app = web.Application(client_max_size=1 << 20)
            app.router.add_route("*", "/{tail:.*}", handle)
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=server_context)
            await site.start()
            made.directory_url = f"https://127.0.0.1:{runner.addresses[0][1]}/dir"
            up.set()
            await down.wait()
            await runner.cleanup()
            left = asyncio.all_tasks() - {asyncio.current_task()}  # those that were told to hang
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    session: aiohttp.ClientSession
    thread = threading.Thread(target=loop.run_until_complete, args=(run(),), name="faulty CA")
    thread.start()
    try:
        if not up.wait(10):
            raise RuntimeError("the CA's front did not start")
        yield made
    finally:
        loop.call_soon_threadsafe(down.set)
        thread.join(20)
        loop.close()


def _payload(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(base64.urlsafe_b64decode(json.loads(body)["payload"] + "=="))
    except (ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


# --- what can go wrong


def problem_answer(code: str, status: int, retry_after: str = "", detail: str = "scripted") -> Answer:
    body = {"type": f"urn:ietf:params:acme:error:{code}", "detail": detail, "status": status}
    headers = {"Content-Type": PROBLEM}
    return Answer(status, headers | ({"Retry-After": retry_after} if retry_after else {}), json.dumps(body).encode())


def problem(code: str, status: int = 400, retry_after: str = "", detail: str = "scripted") -> Act:
    async def act(request: web.Request, forward: Forward) -> Answer:
        return problem_answer(code, status, retry_after, detail)

    return act


def says(status: int, body: bytes, content_type: str = "text/html") -> Act:
    async def act(request: web.Request, forward: Forward) -> Answer:
        return Answer(status, {"Content-Type": content_type}, body)

    return act


async def hang(request: web.Request, forward: Forward) -> Answer:
    await asyncio.sleep(60)
    return await forward()


async def drip(request: web.Request, forward: Forward) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    for _ in range(600):
        await response.write(b" ")
        await asyncio.sleep(0.1)
    return response


async def endless(request: web.Request, forward: Forward) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    for _ in range(1000):
        await response.write(b"x" * 65_536)
    return response


async def reset(request: web.Request, forward: Forward) -> Answer:
    assert request.transport is not None
    request.transport.abort()
    await asyncio.sleep(0)
    raise asyncio.CancelledError


def then_resets(forwarded: bool) -> Act:
    """The CA has done what was asked, and its answer is lost."""

    async def act(request: web.Request, forward: Forward) -> Answer:
        if forwarded:
            await forward()
        return await reset(request, forward)

    return act


def without(header: str) -> Act:
    async def act(request: web.Request, forward: Forward) -> Answer:
        answer = await forward()
        kept = {name: value for name, value in answer.headers.items() if name.lower() != header.lower()}
        return Answer(answer.status, kept, answer.body)

    return act


def changed(**keys: object) -> Act:
    """The CA's JSON, with these keys set to something else."""

    async def act(request: web.Request, forward: Forward) -> Answer:
        answer = await forward()
        return Answer(answer.status, answer.headers, json.dumps(json.loads(answer.body) | keys).encode())

    return act


def gives(body: Callable[[bytes], bytes]) -> Act:
    """The CA's answer with another body."""

    async def act(request: web.Request, forward: Forward) -> Answer:
        answer = await forward()
        return Answer(answer.status, answer.headers, body(answer.body))

    return act
