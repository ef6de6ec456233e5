"""Access rules, wake rules, sticky cookies and the replay cache, as clients and machines see them."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from typing import Any

import pytest

from proxy.ipc import Wake
from proxy.model import AccessRules, App, AppName, MachineState, ReplayCacheRule, StickyCookie, WakeRules
from tests.edge.test_replay import Answer, Machine, app_of, ok, replay, run
from tests.support.edge import EdgeHarness, read_head

STOPPED = MachineState.STOPPED


async def ask(
    edge: EdgeHarness, fields: bytes = b"", line: bytes = b"GET /", body: bytes = b""
) -> tuple[int, bytes, bytes]:
    """Status, head and body of one answer."""
    answer = await edge.request(line + b" HTTP/1.1\r\nHost: hello.apps.test\r\n" + fields + b"\r\n" + body)
    head, _, rest = answer.partition(b"\r\n\r\n")
    return int(head[9:12]), head, rest


def _hands_on(fields: bytes) -> Answer:
    return lambda head, body: replay("instance=m2", fields)


def _says(name: bytes) -> Answer:
    return lambda head, body: ok(name)


async def served(edge: EdgeHarness, count: int = 1, **more: Any) -> tuple[list[Machine], App]:
    machines = await run(edge, *(_says(b"m%d" % at) for at in range(1, count + 1)))
    app = dataclasses.replace(app_of(edge, machines), **more)
    edge.set_app(app)
    return machines, app


# --- who is let in


async def test_sources_that_the_lists_exclude_are_refused_and_reach_no_machine(edge: EdgeHarness) -> None:
    machines, app = await served(edge)
    for rules, expected in (
        (AccessRules(deny=("127.0.0.0/8",)), 403),
        (AccessRules(allow=("10.0.0.0/8",)), 403),
        (AccessRules(allow=("127.0.0.0/8", "10.0.0.0/8")), 200),
        (AccessRules(allow=("127.0.0.0/8",), deny=("127.0.0.1",)), 403),
    ):
        edge.set_app(dataclasses.replace(app, access=rules))
        status, head, body = await ask(edge)
        assert status == expected, rules
        if expected == 403:
            assert b"wakefront-error: WA01" in head and b"127.0.0.1" not in body
    assert len(machines[0].heads) == 1


async def test_a_source_over_its_rate_is_told_when_to_come_back(edge: EdgeHarness) -> None:
    await served(edge, access=AccessRules(requests_per_s=0.5, requests_burst=3))
    statuses = [(await ask(edge))[0] for _ in range(5)]
    assert statuses == [200, 200, 200, 429, 429]
    _, head, _ = await ask(edge)
    after = re.search(rb"\r\nretry-after: (\d+)", head)
    assert after is not None and 1 <= int(after[1]) <= 6 and b"PL02" in head


async def test_a_source_may_have_so_many_connections_and_gets_the_place_of_one_that_ended(edge: EdgeHarness) -> None:
    await served(edge, access=AccessRules(connections=2))
    request = b"GET / HTTP/1.1\r\nHost: hello.apps.test\r\n\r\n"
    held = []
    for _ in range(2):
        reader, writer = await edge.connect()
        writer.write(request)
        assert (await reader.readuntil(b"m1")).startswith(b"HTTP/1.1 200")
        held.append(writer)
    assert (await ask(edge))[0] == 429
    held[0].write(request)  # those that are in go on
    held.pop().close()
    async with asyncio.timeout(5):
        while (await ask(edge))[0] != 200:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("framing", "body"),
    [
        (b"Content-Length: 2000\r\n", b"x" * 2000),
        (b"Transfer-Encoding: chunked\r\n", b"3e8\r\n" + b"x" * 1000 + b"\r\n3e8\r\n" + b"x" * 1000 + b"\r\n0\r\n\r\n"),
    ],
)
async def test_a_body_over_the_limit_is_refused_announced_or_not(
    edge: EdgeHarness, framing: bytes, body: bytes
) -> None:
    machines, _ = await served(edge, access=AccessRules(max_body_bytes=1500))
    status, head, _ = await ask(edge, framing, b"POST /", body)
    assert status == 413 and b"WD12" in head
    assert machines[0].bodies == []
    assert (await ask(edge, b"Content-Length: 1500\r\n", b"POST /", b"x" * 1500))[0] == 200


# --- what wakes


async def _asleep(edge: EdgeHarness, **rules: Any) -> App:
    app = edge.app(edge.machine(1, state=STOPPED))
    app = dataclasses.replace(app, wake_rules=WakeRules(**rules), wake_timeout_s=0.3)
    edge.set_app(app)
    return app


async def test_requests_that_the_rules_ignore_wake_nothing_and_reach_what_runs(edge: EdgeHarness) -> None:
    rules = {"ignore_paths": ("/healthz", "/wp-*"), "ignore_methods": ("OPTIONS",), "ignore_agents": ("badbot",)}
    app = await _asleep(edge, **rules)
    for line, fields in (
        (b"GET /healthz?x", b""), (b"GET /%77p-login.php", b""), (b"OPTIONS /", b""),
        (b"GET /", b"User-Agent: BadBot/2\r\n"),
    ):  # fmt: skip
        status, head, _ = await ask(edge, fields, line)
        assert status == 503 and b"WM04" in head, line
    assert edge.sent.messages == []
    (one,) = await run(edge, lambda h, b: ok(b"m1"))
    edge.set_app(dataclasses.replace(app, machines=(edge.machine(one.port, version=2),)))
    assert (await ask(edge, line=b"GET /healthz"))[0] == 200


async def test_a_source_causes_only_so_many_starts(edge: EdgeHarness) -> None:
    await _asleep(edge, starts_per_source_s=0.01)
    first = asyncio.get_running_loop().create_task(ask(edge))
    await asyncio.sleep(0.05)
    second = asyncio.get_running_loop().create_task(ask(edge))  # waits for the same start, and causes none
    assert b"PM03" in (await first)[1] and b"PM03" in (await second)[1]
    status, head, _ = await ask(edge)
    assert status == 503 and b"WM05" in head and b"retry-after: " in head
    assert len(edge.sent.messages) == 1


async def test_a_browser_is_shown_a_page_while_the_app_starts_and_others_are_held(edge: EdgeHarness) -> None:
    await _asleep(edge, waiting_page=True)
    status, head, body = await ask(edge, b"Accept: text/html,*/*;q=0.8\r\nSec-Fetch-Mode: navigate\r\n")
    assert status == 503 and b"content-type: text/html" in head and b"retry-after: 2" in head
    assert body.startswith(b"<!doctype html>") and b"cache-control: no-store" in head and b"WM06" in head
    assert [type(one) for one in edge.sent.messages] == [Wake]
    status, head, _ = await ask(edge, b"Accept: */*\r\n")
    assert b"PM03" in head, "it waited"


# --- sticky


def _cookie(head: bytes) -> bytes:
    found = re.search(rb"\r\nset-cookie: (wakefront-sticky=[^;]+); ([^\r]*)", head)
    assert found is not None
    assert b"HttpOnly" in found[2] and b"Path=/" in found[2]
    return found[1]


async def test_a_client_stays_with_its_machine_and_the_app_sees_nothing_of_the_cookie(edge: EdgeHarness) -> None:
    machines, _ = await served(edge, 3, sticky=StickyCookie())
    status, head, mine = await ask(edge)
    cookie = _cookie(head)
    for _ in range(12):
        status, head, body = await ask(edge, b"Cookie: a=1; %b; b=2\r\n" % cookie)
        assert (status, body) == (200, mine) and b"set-cookie" not in head
    machine = machines[int(mine[1:]) - 1]
    assert machine.field(b"cookie") == b"a=1; b=2"
    assert (await ask(edge, b"Cookie: %b\r\n" % cookie))[2] == mine
    assert machine.field(b"cookie") is None


async def test_a_client_whose_machine_is_gone_is_pinned_to_another(edge: EdgeHarness) -> None:
    machines, app = await served(edge, 2, sticky=StickyCookie())
    _, head, mine = await ask(edge)
    other = next(one for one in app.machines if one.id.encode() != mine)
    edge.set_app(dataclasses.replace(app, machines=(other,)))
    status, head, body = await ask(edge, b"Cookie: %b\r\n" % _cookie(head))
    assert (status, body) == (200, other.id.encode())
    assert _cookie(head)
    assert all(one.field(b"fly-preferred-instance-unavailable") is None for one in machines if one.heads)


async def test_forged_and_foreign_cookies_choose_nothing(edge: EdgeHarness) -> None:
    _, app = await served(edge, 2, sticky=StickyCookie())
    _, head, _ = await ask(edge)
    cookie = _cookie(head)
    name, _, value = cookie.partition(b"=")
    forged = (value[:-1] + (b"A" if value[-1:] != b"A" else b"B"), b"m1", b"", b"x" * 5000)
    for bad in forged:
        status, head, _ = await ask(edge, b"Cookie: %b=%b\r\n" % (name, bad))
        assert status == 200 and _cookie(head)
    edge.set_app(dataclasses.replace(app, name=AppName("other"), hostnames=("hello.apps.test",)))
    assert _cookie((await ask(edge, b"Cookie: %b\r\n" % cookie))[1])


async def test_an_upgrade_pins_its_client_too(edge: EdgeHarness) -> None:
    async def switch(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")

    origin = await edge.origin(switch)
    edge.set_app(dataclasses.replace(edge.app(edge.machine(origin.port)), sticky=StickyCookie()))
    reader, writer = await edge.connect()
    fields = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
    writer.write(b"GET / HTTP/1.1\r\nHost: hello.apps.test\r\n" + fields + b"\r\n")
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    assert head.startswith(b"HTTP/1.1 101 ") and _cookie(head)


# --- the replay cache


async def test_a_remembered_replay_goes_straight_to_its_target_and_is_told_so(edge: EdgeHarness) -> None:
    cached = b"fly-replay-cache: /tenant/*\r\nfly-replay-cache-ttl-secs: 60\r\n"
    one, two = await run(edge, lambda h, b: replay("instance=m2", cached), lambda h, b: ok(b"two"))
    edge.set_app(app_of(edge, [one, two]))
    first = b"fly-force-instance-id: m1\r\n"
    assert (await ask(edge, first, b"GET /tenant/a"))[2] == b"two"
    assert two.field(b"fly-replay-cache-status") == b"miss" and two.field(b"fly-replay-src") is not None
    for path in (b"/tenant/b?x=1", b"/tenant", b"/tenant/a"):
        assert (await ask(edge, line=b"GET " + path))[2] == b"two"
        assert two.field(b"fly-replay-cache-status") == b"hit" and two.field(b"fly-replay-src") is None
    assert len(one.heads) == 1
    await ask(edge, first, b"GET /tenancy")
    assert len(one.heads) == 2, "another path is not under the prefix"


async def test_a_session_is_remembered_by_its_cookie_alone(edge: EdgeHarness) -> None:
    rule = ReplayCacheRule("/", 60, "cookie", "session")
    one, two = await run(edge, lambda h, b: replay("instance=m2"), lambda h, b: ok(b"two"))
    edge.set_app(app_of(edge, [one, two], replay_cache=(rule,)))
    first = b"fly-force-instance-id: m1\r\n"
    await ask(edge, first + b"Cookie: session=abc\r\n")
    assert (await ask(edge, b"Cookie: x=y; session=abc\r\n"))[2] == b"two"
    assert two.field(b"fly-replay-cache-status") == b"hit"
    before = len(one.heads)
    await ask(edge, first + b"Cookie: session=other\r\n")
    await ask(edge, first)
    assert len(one.heads) == before + 2


async def test_a_remembered_target_that_is_gone_is_forgotten_and_the_request_goes_the_usual_way(
    edge: EdgeHarness,
) -> None:
    cached = b"fly-replay-cache: /*\r\nfly-replay-cache-ttl-secs: 60\r\n"
    one, two = await run(edge, lambda h, b: replay("instance=m2", cached), lambda h, b: ok(b"two"))
    app = app_of(edge, [one, two])
    edge.set_app(app)
    body, length = b"payload", b"Content-Length: 7\r\n"
    assert (await ask(edge, b"fly-force-instance-id: m1\r\n" + length, b"POST /", body))[2] == b"two"
    one.answer = lambda h, b: ok(b"one")
    edge.set_app(dataclasses.replace(app, machines=app.machines[:1]))
    assert (await ask(edge, length, b"POST /", body))[2] == b"one"
    assert one.bodies[-1] == body and one.field(b"fly-replay-cache-status") is None
    edge.set_app(app)
    assert len(edge.edge.replays) == 0


async def test_a_client_may_skip_the_cache_only_where_that_is_allowed(edge: EdgeHarness) -> None:
    for allow in (b"", b"fly-replay-cache-allow-bypass: yes\r\n"):
        cached = b"fly-replay-cache: /*\r\nfly-replay-cache-ttl-secs: 60\r\n" + allow
        one, two = await run(edge, _hands_on(cached), _says(b"two"))
        edge.set_app(app_of(edge, [one, two]))
        edge.edge.replays.forget_app(AppName("hello"))
        await ask(edge, b"fly-force-instance-id: m1\r\n")
        for _ in range(10):
            await ask(edge, b"fly-replay-cache-control: skip\r\n")
        assert (len(one.heads) > 1) is bool(allow)
        if allow:
            assert b"bypass" in {two.field(b"fly-replay-cache-status", at) for at in range(len(two.heads))}


async def test_an_order_to_remember_for_another_host_or_path_is_refused(edge: EdgeHarness) -> None:
    for pattern in (b"other.test/*", b"/elsewhere/*", b"*", b"hello.apps.test:8080/*"):
        cached = b"fly-replay-cache: %b\r\nfly-replay-cache-ttl-secs: 60\r\n" % pattern
        one, two = await run(edge, _hands_on(cached), _says(b"two"))
        edge.set_app(app_of(edge, [one, two]))
        status, head, _ = await ask(edge, b"fly-force-instance-id: m1\r\n")
        assert status == 502 and b"PA03" in head, pattern
    assert len(edge.edge.replays) == 0
