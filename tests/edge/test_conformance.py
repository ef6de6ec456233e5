"""Rows of docs/conformance.md that no other test holds: fly-replay, steering, cache, choice, bad input, on the wire."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import struct
from typing import Any

import pytest

from proxy.ipc import Wake, WakeDone
from proxy.model import AppLimits, AppName, ConcurrencyType, Machine, MachineState, Port, ReplayCacheRule, WakeRules
from tests.edge.test_replay import FORCE_M1, Answer, app_of, ok, replay, replay_json, run
from tests.edge.test_replay import Machine as Scripted
from tests.support.edge import EdgeHarness, read_head


async def ask(
    edge: EdgeHarness, fields: bytes = b"", line: bytes = b"GET /", body: bytes = b"", host: bytes = b"hello.apps.test"
) -> tuple[int, bytes, bytes]:
    """Status, head and body of one answer."""
    answer = await edge.request(line + b" HTTP/1.1\r\nHost: " + host + b"\r\n" + fields + b"\r\n" + body)
    head, _, rest = answer.partition(b"\r\n\r\n")
    return int(head[9:12]), head, rest


def error_of(head: bytes) -> bytes:
    return head.lower().partition(b"wakefront-error: ")[2].partition(b"\r")[0].upper()


def says(name: bytes) -> Answer:
    return lambda head, body: ok(name)


def hands_on(directive: str, fields: bytes = b"") -> Answer:
    return lambda head, body: replay(directive, fields)


def once(directive: str) -> Answer:
    """Hands a request on, but answers what came back."""
    return lambda head, body: ok(b"back") if b"fly-replay-failed" in head else replay(directive)


def dead_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port: int = closed.getsockname()[1]
    return port


# --- where a replay may go (spec routing §2.1, §3)


@pytest.mark.parametrize(
    ("regions", "is_met"),
    [("ams", True), ("eu", True), ('"sjc,any"', True), ('"sjc,ord"', False), ("us", False), ('"sjc,eu"', True)],
)
async def test_a_replay_to_regions_is_forced_and_met_where_one_of_them_is_ours(
    edge: EdgeHarness, regions: str, is_met: bool
) -> None:
    one, two = await run(edge, hands_on(f"region={regions};elsewhere=true"), says(b"two"))
    edge.set_app(app_of(edge, [one, two]))
    status, head, body = await ask(edge, FORCE_M1)
    if is_met:
        assert (status, body) == (200, b"two")
    else:
        assert (status, error_of(head)) == (502, b"WR01")
        assert two.heads == []


@pytest.mark.parametrize(
    ("field", "status"),
    [
        (b"fly-prefer-region: sjc,us", 200), (b"fly-prefer-region: ams", 200), (b"fly-prefer-region: any", 200),
        (b"fly-force-region: ams", 200), (b"fly-force-region: sjc,eu", 200), (b"fly-force-region: sjc,any", 200),
        (b"fly-force-region: sjc", 502), (b"fly-force-region: us,apac", 502), (b"fly-force-region: nowhere", 502),
    ],
)  # fmt: skip
async def test_a_client_may_prefer_any_region_but_force_only_ours(edge: EdgeHarness, field: bytes, status: int) -> None:
    (one,) = await run(edge, says(b"one"))
    edge.set_app(app_of(edge, [one]))
    got, head, _ = await ask(edge, field + b"\r\n")
    assert got == status
    assert error_of(head) == (b"WR02" if status == 502 else b"")
    assert len(one.heads) == (status == 200)


async def test_a_preferred_target_is_taken_above_its_soft_and_below_its_hard_limit_only(edge: EdgeHarness) -> None:
    one, two, three = await run(edge, hands_on("prefer_instance=m2;elsewhere=true"), says(b"two"), says(b"three"))
    app = app_of(edge, [one, two, three])
    service = dataclasses.replace(app.services[0], soft_limit=1, hard_limit=2)
    edge.set_app(dataclasses.replace(app, services=(service,)))
    edge.edge.load.admit(2, None)  # what another request there comes to
    assert (await ask(edge, FORCE_M1))[2] == b"two"
    assert two.field(b"fly-preferred-instance-unavailable") is None
    edge.edge.load.admit(2, None)
    assert (await ask(edge, FORCE_M1))[2] == b"three"
    assert three.field(b"fly-preferred-instance-unavailable") == b"m2"
    edge.edge.load.release(2)
    edge.edge.load.release(2)


async def test_who_says_elsewhere_is_not_asked_a_second_time(edge: EdgeHarness) -> None:
    one, two = await run(edge, hands_on("elsewhere=true"), says(b"two"))
    edge.set_app(app_of(edge, [one, two]))
    for asked in range(1, 21):
        assert (await ask(edge, FORCE_M1))[2] == b"two"
        assert len(one.heads) == asked


async def test_a_replay_names_an_app_and_a_machine_of_it(edge: EdgeHarness) -> None:
    router, one, two = await run(edge, hands_on("app=tenant;instance=t2"), says(b"t1"), says(b"t2"))
    edge.set_app(app_of(edge, [router]))
    tenants = [edge.machine(each.port, f"t{at}", slot=4 + at) for at, each in enumerate((one, two), 1)]
    edge.set_app(edge.app(*tenants, name="tenant", slot=1))
    for _ in range(6):
        assert (await ask(edge))[2] == b"t2"
    router.answer = hands_on("app=tenant;instance=m1")
    status, head, _ = await ask(edge)
    assert (status, error_of(head)) == (502, b"PA03")


async def test_a_target_app_needs_a_service_on_the_port_that_the_client_used(edge: EdgeHarness) -> None:
    router, tenant = await run(edge, hands_on("app=tenant"), says(b"tenant"))
    edge.set_app(app_of(edge, [router]))
    app = edge.app(edge.machine(tenant.port, "t1", slot=7), name="tenant", slot=1)
    elsewhere = dataclasses.replace(app.services[0], ports=(Port(9090, 9090, ("http",)),))
    edge.set_app(dataclasses.replace(app, services=(elsewhere,)))
    status, head, _ = await ask(edge)
    assert (status, error_of(head)) == (502, b"WR01")
    assert tenant.heads == []
    edge.set_app(app)
    assert (await ask(edge))[2] == b"tenant"


async def test_a_suspended_target_of_another_app_is_resumed_and_waited_for(edge: EdgeHarness) -> None:
    router, tenant = await run(edge, hands_on("app=tenant"), says(b"tenant"))
    edge.set_app(app_of(edge, [router]))
    sleeping = edge.machine(tenant.port, "t1", MachineState.SUSPENDED, slot=7)
    edge.set_app(edge.app(sleeping, name="tenant", slot=1))
    edge.start_when_asked(sleeping, "tenant")
    assert (await ask(edge))[2] == b"tenant"
    assert edge.woken == {"t1"}


async def test_the_header_form_has_no_transforms(edge: EdgeHarness) -> None:
    one, two = await run(edge, hands_on("instance=m2;path=/other;transform=/other"), says(b"two"))
    edge.set_app(app_of(edge, [one, two]))
    assert (await ask(edge, FORCE_M1, b"GET /as/it/came"))[2] == b"two"
    assert two.heads[0].startswith(b"GET /as/it/came HTTP/1.1")


@pytest.mark.parametrize("size", [50_000, 300_000])
async def test_a_body_of_unknown_length_is_kept_up_to_the_limit_and_then_not_replayed(
    edge: EdgeHarness, size: int
) -> None:
    one, two = await run(edge, hands_on("instance=m2"), says(b"two"))
    edge.set_app(app_of(edge, [one, two], limits=AppLimits(replay_memory_bytes=100_000, replay_spool_bytes=0)))
    chunks = b"2710\r\n" + b"x" * 10_000 + b"\r\n"
    sent = chunks * (size // 10_000) + b"0\r\n\r\n"
    status, head, body = await ask(edge, FORCE_M1 + b"Transfer-Encoding: chunked\r\n", b"POST /", sent)
    if size < 100_000:
        assert (status, body) == (200, b"two") and two.bodies == [b"x" * size]
    else:
        assert (status, error_of(head)) == (502, b"PA01") and two.bodies == []
    assert one.bodies == [b"x" * size]


async def test_a_mebibyte_is_kept_in_memory_and_more_in_a_file_once_the_app_has_replayed(edge: EdgeHarness) -> None:
    one, two = await run(edge, hands_on("instance=m2"), lambda head, body: ok(b"%d" % len(body)))
    edge.set_app(app_of(edge, [one, two]))

    async def post(size: int) -> tuple[int, bytes, bytes]:
        status, head, body = await ask(edge, FORCE_M1 + b"Content-Length: %d\r\n" % size, b"POST /", b"x" * size)
        return status, error_of(head), body

    mebibyte = 1 << 20
    assert (await post(mebibyte + 1))[:2] == (502, b"PA01"), "nobody knew that this app replays"
    edge.edge.table.remove_app(AppName("hello"))
    edge.set_app(app_of(edge, [one, two]))
    assert await post(mebibyte) == (200, b"", b"%d" % mebibyte)
    assert await post(3 * mebibyte) == (200, b"", b"%d" % (3 * mebibyte))


async def test_an_app_that_replays_large_bodies_alone_has_them_kept_from_the_second_on(edge: EdgeHarness) -> None:
    one, two = await run(edge, hands_on("instance=m2"), lambda head, body: ok(b"%d" % len(body)))
    edge.set_app(app_of(edge, [one, two]))
    size = 2 << 20
    fields, body = FORCE_M1 + b"Content-Length: %d\r\n" % size, b"x" * size
    assert error_of((await ask(edge, fields, b"POST /", body))[1]) == b"PA01"
    assert (await ask(edge, fields, b"POST /", body))[2] == b"%d" % size


# --- failures of a replay (spec routing §2.2, §2.3)


def look_after(edge: EdgeHarness) -> list[str]:
    """Control as it is towards a machine that it takes to run: whoever asks is told so. Returns who was asked for."""
    asked: list[str] = []

    def answer(message: object) -> None:
        if isinstance(message, Wake):
            asked.append(message.machine)
            done = WakeDone(message.app, message.machine, 1)
            asyncio.get_running_loop().call_soon(edge.edge.waker.on_wake_done, done)

    edge.sent.on_send = answer
    return asked


async def test_a_forced_machine_that_refuses_is_looked_after_and_tried_again_beside_others(edge: EdgeHarness) -> None:
    (one,) = await run(edge, says(b"one"))
    edge.set_app(edge.app(edge.machine(dead_port(), "m2", slot=2), edge.machine(one.port, "m1", slot=1)))
    asked = look_after(edge)
    status, head, _ = await ask(edge, b"fly-force-instance-id: m2\r\n")
    assert status in (502, 503) and error_of(head) in (b"PC01", b"PR06"), head
    assert set(asked) == {"m2"} and one.heads == []


async def test_a_replay_to_a_machine_that_refuses_is_told_as_retries_exhausted(edge: EdgeHarness) -> None:
    (one,) = await run(edge, once("instance=m2;fallback=force_self"))
    edge.set_app(edge.app(edge.machine(one.port, "m1", slot=1), edge.machine(dead_port(), "m2", slot=2)))
    assert set(look_after(edge)) == set()
    assert (await ask(edge, FORCE_M1))[2] == b"back"
    assert b"reason=retries_exhausted" in (one.field(b"fly-replay-failed") or b"")


async def test_a_target_that_this_request_may_not_wake_is_a_failed_replay(edge: EdgeHarness) -> None:
    (one,) = await run(edge, once("app=tenant;fallback=force_self"))
    edge.set_app(app_of(edge, [one]))
    tenant = edge.app(edge.machine(1, "t1", MachineState.STOPPED, slot=5), name="tenant", slot=1)
    edge.set_app(dataclasses.replace(tenant, wake_rules=WakeRules(ignore_paths=("/*",))))
    assert (await ask(edge))[2] == b"back"


@pytest.mark.parametrize(
    ("directive", "expected"),
    [
        ("instance=m9", {b"instance": b"m9", b"app": b"hello", b"reason": b"no_candidate"}),
        ("instance=m2;timeout=200ms", {b"instance": b"m2", b"app": b"hello", b"reason": b"timeout"}),
        ("app=tenant;region=ams", {b"app": b"tenant", b"region": b"ams", b"reason": b"retries_exhausted"}),
    ],
)
async def test_the_reason_for_which_a_replay_failed_is_told_to_who_gets_it_back(
    edge: EdgeHarness, directive: str, expected: dict[bytes, bytes]
) -> None:
    (one,) = await run(edge, once(directive + ";fallback=force_self"))
    edge.set_app(edge.app(edge.machine(one.port, "m1", slot=1), edge.machine(1, "m2", MachineState.STOPPED, slot=2)))
    dead = [edge.machine(dead_port(), f"t{at}", slot=4 + at) for at in range(8)]
    edge.set_app(edge.app(*dead, name="tenant", slot=1))
    assert (await ask(edge, FORCE_M1))[2] == b"back"
    failed = dict(pair.split(b"=") for pair in (one.field(b"fly-replay-failed") or b"").split(b";"))
    elapsed = failed.pop(b"elapsed_ms")
    assert failed == {**expected, b"replay_source": b"m1"}
    assert 0 <= int(elapsed) < 2000 and (int(elapsed) >= 200) is (failed[b"reason"] == b"timeout")


async def test_a_fallback_forces_or_prefers_the_machine_that_handed_on(edge: EdgeHarness) -> None:
    for word, expected in (("force_self", 502), ("prefer_self", 200)):
        one, two = await run(edge, says(b""), says(b"two"))
        app = app_of(edge, [one, two])
        edge.set_app(app)
        first = app.machines[0]

        def answer(head: bytes, body: bytes, word: str = word, first: Machine = first) -> bytes:
            """Hands the request on, and takes nothing more from then on."""
            edge.edge.table.set_machine(AppName("hello"), dataclasses.replace(first, cordoned=True, version=2))
            return replay(f"instance=m9;fallback={word}")

        one.answer = answer
        status, head, body = await ask(edge, FORCE_M1)
        assert status == expected, word
        if expected == 200:
            assert body == b"two" and two.field(b"fly-replay-failed")
        else:
            assert error_of(head) == b"WR02" and two.heads == []
        edge.edge.table.remove_app(AppName("hello"))


async def test_what_came_back_is_handed_on_no_more(edge: EdgeHarness) -> None:
    one, two = await run(edge, hands_on("instance=m9;fallback=force_self"), says(b"two"))
    edge.set_app(app_of(edge, [one, two]))
    status, head, _ = await ask(edge, FORCE_M1)
    assert (status, error_of(head)) == (502, b"PA02")
    assert len(one.heads) == 2 and two.heads == []


async def test_once_a_connection_stands_the_targets_answer_counts_whatever_it_is(edge: EdgeHarness) -> None:
    one, two = await run(
        edge, once("instance=m2;fallback=force_self;timeout=200ms"),
        lambda head, body: b"HTTP/1.1 503 Busy\r\ncontent-length: 4\r\n\r\nbusy",
    )  # fmt: skip
    edge.set_app(app_of(edge, [one, two]))
    status, _, body = await ask(edge, FORCE_M1)
    assert (status, body) == (503, b"busy")
    assert len(one.heads) == 1


@pytest.mark.parametrize(("taken", "code"), [(2, b"PU02"), (0, b"PC03")], ids=["closes", "resets"])
async def test_a_target_that_breaks_off_once_it_was_reached_is_no_failure_of_the_replay(
    edge: EdgeHarness, taken: int, code: bytes
) -> None:
    async def breaks_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        await reader.readexactly(taken)
        if taken == 0:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    (one,) = await run(edge, once("instance=m2;fallback=force_self"))
    two = await edge.origin(breaks_off)
    edge.set_app(edge.app(edge.machine(one.port, "m1", slot=1), edge.machine(two.port, "m2", slot=2)))
    status, head, _ = await ask(edge, FORCE_M1 + b"Content-Length: 2\r\n", b"POST /", b"ab")
    assert (status, error_of(head)) == (502, code)
    assert len(one.heads) == 1 and two.connections == 1


async def test_a_target_that_was_reached_may_take_longer_than_the_timeout(edge: EdgeHarness) -> None:
    async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        await asyncio.sleep(0.6)
        writer.write(ok(b"late"))

    (one,) = await run(edge, once("instance=m2;fallback=force_self;timeout=100ms"))
    two = await edge.origin(late)
    edge.set_app(edge.app(edge.machine(one.port, "m1", slot=1), edge.machine(two.port, "m2", slot=2)))
    assert (await ask(edge, FORCE_M1))[2] == b"late"
    assert len(one.heads) == 1 and two.connections == 1


async def test_a_timeout_without_a_fallback_only_ends_the_try_sooner(edge: EdgeHarness) -> None:
    (one,) = await run(edge, hands_on("instance=m2;timeout=150ms"))
    edge.set_app(edge.app(edge.machine(one.port, "m1", slot=1), edge.machine(1, "m2", MachineState.STOPPED, slot=2)))
    status, head, _ = await ask(edge, FORCE_M1)
    assert (status, error_of(head)) == (502, b"WR01")
    assert len(one.heads) == 1, "nobody asked for it back"


async def test_a_replayed_answer_names_us_once_in_via(edge: EdgeHarness) -> None:
    one, two = await run(edge, hands_on("instance=m2"), says(b"two"))
    edge.set_app(app_of(edge, [one, two]))
    _, head, _ = await ask(edge, FORCE_M1)
    assert head.lower().count(b"\r\nvia: ") == 1 and head.count(b"1.1 wakefront") == 1
    assert two.heads[0].lower().count(b"1.1 wakefront") == 1


async def test_a_loop_of_upgrades_ends_like_any_other(edge: EdgeHarness) -> None:
    one, two = await run(edge, hands_on("instance=m2"), hands_on("instance=m1"))
    edge.set_app(app_of(edge, [one, two]))
    status, head, _ = await ask(edge, b"Connection: Upgrade\r\nUpgrade: websocket\r\n")
    assert (status, error_of(head)) == (502, b"PA02")
    assert len(one.heads) + len(two.heads) == 11


# --- the cache (spec routing §4)

KEEP = b"fly-replay-cache: %b\r\nfly-replay-cache-ttl-secs: 60\r\n"


async def test_json_orders_the_cache_too(edge: EdgeHarness) -> None:
    order = {"instance": "m2", "cache": {"prefix": "/t/*", "ttl": 60, "allow_bypass": True}}
    one, two = await run(edge, lambda head, body: replay_json(order), says(b"two"))
    edge.set_app(app_of(edge, [one, two]))
    await ask(edge, FORCE_M1, b"GET /t/a")
    assert two.field(b"fly-replay-cache-status") == b"miss"
    assert (await ask(edge, line=b"GET /t/b"))[2] == b"two"
    assert two.field(b"fly-replay-cache-status") == b"hit" and len(one.heads) == 1


async def _invalidated(edge: EdgeHarness, first: Answer, back: Answer, fields: bytes, **more: Any) -> list[Scripted]:
    """A target that at the third request gives it back to the origin, with the order to forget."""
    router, tenant = await run(edge, first, says(b"tenant"))
    edge.set_app(app_of(edge, [router], **more))
    edge.set_app(edge.app(edge.machine(tenant.port, "t1", slot=7), name="tenant", slot=1))
    for expected in (b"miss", b"hit"):
        assert (await ask(edge, fields))[2] == b"tenant"
        assert tenant.field(b"fly-replay-cache-status") == expected
    tenant.answer, router.answer = back, says(b"router")
    assert (await ask(edge, fields))[2] == b"router"
    tenant.answer = says(b"tenant")
    assert (await ask(edge, fields))[2] == b"router", "it is forgotten"
    return [router, tenant]


@pytest.mark.parametrize("is_json", [False, True])
async def test_a_target_gives_a_request_back_and_has_the_path_forgotten(edge: EdgeHarness, is_json: bool) -> None:
    header = replay("app=hello", b"fly-replay-cache: invalidate\r\n")
    written = replay_json({"app": "hello", "cache": {"invalidate": True}})
    router, _ = await _invalidated(
        edge, hands_on("app=tenant", KEEP % b"/*"), lambda head, body: written if is_json else header, b""
    )
    assert len(router.heads) == 3
    assert len(edge.edge.replays) == 0


async def test_a_target_gives_a_request_back_and_has_the_session_forgotten(edge: EdgeHarness) -> None:
    rule = ReplayCacheRule("/", 60, "header", "X-Session")
    back = replay("app=hello", b"fly-replay-cache: invalidate\r\n")
    await _invalidated(
        edge, hands_on("app=tenant"), lambda head, body: back, b"X-Session: abc\r\n", replay_cache=(rule,)
    )
    assert len(edge.edge.replays) == 0


async def test_one_lookup_is_made_for_a_request_and_a_cached_target_may_hand_it_on(edge: EdgeHarness) -> None:
    one, two, three = await run(edge, hands_on("instance=m2", KEEP % b"/*"), says(b"two"), says(b"three"))
    edge.set_app(app_of(edge, [one, two, three]))
    await ask(edge, FORCE_M1)
    two.answer = hands_on("instance=m3", KEEP % b"/*")
    for _ in range(3):
        assert (await ask(edge))[2] == b"three"
        source = three.field(b"fly-replay-src")
        assert source is not None and source.startswith(b"instance=m2;")
    assert len(one.heads) == 1 and len(two.heads) == 4 and len(three.heads) == 3


async def test_an_entry_is_of_one_host_name_even_where_the_pattern_names_none(edge: EdgeHarness) -> None:
    one, two = await run(edge, hands_on("instance=m2", KEEP % b"/*"), says(b"two"))
    app = app_of(edge, [one, two])
    edge.set_app(dataclasses.replace(app, hostnames=("hello.apps.test", "other.test")))
    await ask(edge, FORCE_M1)
    assert (await ask(edge))[2] == b"two" and len(one.heads) == 1
    await ask(edge, FORCE_M1, host=b"other.test")
    assert len(one.heads) == 2, "asked again under the other name"
    assert two.field(b"fly-replay-cache-status") == b"miss"


# --- choice, limits, attempts (spec routing §5)


async def test_attempts_end_where_every_machine_refuses(edge: EdgeHarness) -> None:
    edge.set_app(edge.app(*(edge.machine(dead_port(), f"m{at}", slot=at) for at in range(1, 9))))
    status, head, _ = await asyncio.wait_for(ask(edge), 5)
    assert (status, error_of(head)) == (502, b"PC01")
    told = {message.machine for message in edge.sent.messages if type(message).__name__ == "PassiveFailure"}
    assert len(told) == 5


@pytest.mark.slow
async def test_a_connection_to_a_machine_stays_idle_for_four_seconds(edge: EdgeHarness) -> None:
    idle: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(ok(b"kept"))
        began = asyncio.get_running_loop().time()
        assert await reader.read(1) == b""
        idle.set_result(asyncio.get_running_loop().time() - began)

    origin = await edge.origin(handle)
    edge.set_app(edge.app(edge.machine(origin.port)))
    assert (await ask(edge))[2] == b"kept"
    assert 3.5 < await asyncio.wait_for(idle, 10) < 5.5


@pytest.mark.parametrize("kind", [ConcurrencyType.REQUESTS, ConcurrencyType.CONNECTIONS])
async def test_a_place_is_free_when_the_answer_has_come_whatever_the_machine_does_then(
    edge: EdgeHarness, kind: ConcurrencyType
) -> None:
    async def busy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(ok(b"done"))
        await asyncio.sleep(30)

    origin = await edge.origin(busy)
    app = edge.app(edge.machine(origin.port), kind=kind)
    service = dataclasses.replace(app.services[0], soft_limit=1, hard_limit=1)
    edge.set_app(dataclasses.replace(app, services=(service,)))
    assert (await ask(edge))[2] == b"done"
    assert edge.edge.in_flight(1) == 0


async def test_an_open_tunnel_holds_its_place_until_it_ends(edge: EdgeHarness) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        while data := await reader.read(1000):
            writer.write(data)

    origin = await edge.origin(echo)
    app = edge.app(edge.machine(origin.port), limits=AppLimits(queue_timeout_s=0.2))
    service = dataclasses.replace(app.services[0], soft_limit=1, hard_limit=1)
    edge.set_app(dataclasses.replace(app, services=(service,)))
    reader, writer = await edge.connect()
    writer.write(b"GET / HTTP/1.1\r\nHost: hello.apps.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    for word in (b"one", b"two"):
        writer.write(word)
        assert await asyncio.wait_for(reader.readexactly(3), 5) == word
        assert edge.edge.in_flight(1) == 1
    waiting, other = await edge.connect()
    other.write(b"GET / HTTP/1.1\r\nHost: hello.apps.test\r\nConnection: close\r\n\r\n")
    answer = await asyncio.wait_for(waiting.read(), 5)
    assert answer.startswith(b"HTTP/1.1 503 ") and error_of(answer) == b"WQ02"
    writer.close()
    async with asyncio.timeout(5):
        while edge.edge.in_flight(1):
            await asyncio.sleep(0.005)


# --- bad input


@pytest.mark.parametrize("directive", ["instance=m1", "app=hello", "region=ams", "prefer_instance=m1"])
@pytest.mark.parametrize("is_json", [False, True])
async def test_an_app_that_hands_on_to_itself_for_ever_is_stopped_and_the_client_gets_one_answer(
    edge: EdgeHarness, directive: str, is_json: bool
) -> None:
    name, _, value = directive.partition("=")
    answer = replay_json({name: value}) if is_json else replay(directive)
    (one,) = await run(edge, lambda head, body: answer)
    edge.set_app(app_of(edge, [one]))
    sent = b"x" * 5000
    whole = await edge.request(
        b"POST / HTTP/1.1\r\nHost: hello.apps.test\r\nContent-Length: %d\r\n\r\n%b" % (len(sent), sent)
    )
    assert whole.startswith(b"HTTP/1.1 502 ") and whole.count(b"HTTP/1.1 ") == 1
    assert b"wakefront-error: PA02" in whole
    assert one.bodies == [sent] * 11
    assert edge.edge.in_flight(1) == 0 and edge.edge.bodies.memory_used == 0


async def test_a_huge_state_is_refused_and_no_machine_gets_it(edge: EdgeHarness) -> None:
    one, two = await run(edge, hands_on("instance=m2;state=" + "s" * 4097), says(b"two"))
    edge.set_app(app_of(edge, [one, two]))
    status, head, _ = await ask(edge, FORCE_M1)
    assert (status, error_of(head)) == (502, b"PA03")
    assert b"sss" not in head and two.heads == []


@pytest.mark.parametrize(
    ("directive", "code"),
    [
        ("app=nobody", b"PA04"), ("app=foreign", b"PA05"), ("app=foreign;instance=f1", b"PA05"),
        ("instance=f1", b"WR01"), ("instance=nobody", b"WR01"), ("app=hello;instance=f1", b"WR01"),
        ("app=foreign;instance=m1", b"PA05"), ("app=empty", b"WR01"),
    ],
)  # fmt: skip
async def test_unknown_and_foreign_targets_are_refused_and_reach_nothing(
    edge: EdgeHarness, directive: str, code: bytes
) -> None:
    one, foreign = await run(edge, hands_on(directive), says(b"foreign"))
    edge.set_app(app_of(edge, [one]))
    app = edge.app(edge.machine(foreign.port, "f1", slot=7), name="foreign", slot=1)
    edge.set_app(dataclasses.replace(app, organization="other"))
    edge.set_app(edge.app(name="empty", slot=2))
    status, head, body = await ask(edge)
    assert (status, error_of(head)) == (502, code)
    assert b"\r\nserver: wakefront" in head and b"\r\nfly-request-id: " in head and b"\r\nvia: " not in head
    assert body.startswith(code) and foreign.heads == []


@pytest.mark.slow
async def test_a_body_past_every_budget_harms_none_of_two_hundred_uploads(edge: EdgeHarness) -> None:
    one, two = await run(edge, hands_on("instance=m2"), lambda head, body: ok(b"%d" % len(body)))
    limits = AppLimits(replay_memory_bytes=100_000, replay_spool_bytes=0)
    edge.set_app(app_of(edge, [one, two], limits=limits))
    small, large = b"s" * 60_000, b"x" * 4_000_000

    async def upload(body: bytes) -> tuple[int, bytes, bytes]:
        reader, writer = await edge.connect()
        writer.write(b"POST / HTTP/1.1\r\nHost: hello.apps.test\r\n" + FORCE_M1)
        writer.write(b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body))
        for at in range(0, len(body), 20_000):
            writer.write(body[at : at + 20_000])
            await writer.drain()
            await asyncio.sleep(0)
        head, _, rest = (await asyncio.wait_for(reader.read(), 30)).partition(b"\r\n\r\n")
        return int(head[9:12]), error_of(head), rest

    answers = await asyncio.gather(upload(large), *(upload(small) for _ in range(200)))
    assert answers[0][:2] == (502, b"PA01")
    assert answers[1:] == [(200, b"", b"60000")] * 200
    assert edge.edge.bodies.memory_used == 0


async def test_a_storm_of_requests_at_a_sleeping_app_is_one_start_and_bounded(edge: EdgeHarness) -> None:
    (one,) = await run(edge, says(b"one"))
    sleeping = edge.machine(one.port, state=MachineState.STOPPED)
    edge.set_app(edge.app(sleeping, limits=AppLimits(max_waiters=50)))
    asking = [asyncio.get_running_loop().create_task(ask(edge)) for _ in range(300)]
    refused = 0
    for done in asyncio.as_completed(asking):
        status, head, body = await done
        if status == 200:
            assert body == b"one"
            continue
        assert (status, error_of(head)) == (503, b"WM02") and b"retry-after: " in head
        refused += 1
        if refused == 250:
            started = dataclasses.replace(sleeping, state=MachineState.STARTED, version=2)
            edge.edge.table.set_machine(AppName("hello"), started)
    assert refused == 250 and len(one.heads) == 50
    assert len([message for message in edge.sent.messages if isinstance(message, Wake)]) == 1
