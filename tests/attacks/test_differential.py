"""A13: parsers that disagree. Generated traffic through a served node; what that sent on, read by seven other parsers.

A case is what one client sends. Each lane is an app of its own, and sends one case after the other, so that all bytes
that reach the lane's origin belong to a known case; connections are kept, so that every case also follows others. The
origin frames by the narrowest reading; then the exact bytes of each connection go to seven other parsers. All must find
the same requests: as many, with the same method, target and body. And whatever the origin was sent, h11 finds in the
client's own bytes, in the same order, so that nothing which those hide has become a request.

Seeds are printed; WAKEFRONT_SEED takes one again, WAKEFRONT_CASES multiplies the number of cases. A case that fails is
made as small as it goes and shown as a bytes literal.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.attacks import cases
from tests.attacks.conftest import Begin
from tests.support.attacks import KEPT, AttackedNode
from tests.support.hostile_traffic import HOST, Case
from tests.support.parsers import Parser, digest_of
from tests.support.parsers.libraries import LIBRARIES
from tests.support.parsers.servers import aiohttp_server, nginx, node
from tests.support.plane import static_app
from tests.support.recording import Fault, framing_of
from tests.wire.http1_support import Request, h11_requests

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
CASES = cases(3000) if cases(100) <= 100 else max(100_000, cases(3000))  # a longer run is one of 100,000 at least
LANES = 8
BATCH = 2000
SETTLE_S = 5.0
AT_ONCE = 16
SMALLER_RUNS = 400


class Disagreement(AssertionError):
    """Two parsers found different requests, or the edge sent what it should not."""


# --- the origin of a lane


@dataclass
class Connection:
    """One of the edge's connections to a lane: what it carried, in order."""

    requests: list[tuple[int, bytes, Request]] = field(default_factory=list)  # case, exact bytes, what it is
    tail: bytes = b""  # bytes of a request that never was whole, at its end


class Lane(asyncio.Protocol):
    """An app's origin, as the factory of its connections."""

    def __init__(self, number: int) -> None:
        self.name = "abcdefgh"[number] * 6  # no mutation of one is another
        self.host = f"{self.name}.apps.localhost".encode()
        self.case = -1
        self.port = 0
        self.open: set[LaneConnection] = set()
        self.connections: list[Connection] = []
        self.got: list[Request] = []  # of the case under way
        self.faults: list[str] = []

    def take(self) -> list[Connection]:
        """All that has come on connections; those that are open go on in new records."""
        taken, self.connections = self.connections, []
        for one in self.open:
            one.record = Connection()
            self.connections.append(one.record)
        return taken

    async def settle(self) -> None:
        """Until no connection stands in the middle of a request: an edge that gave one up has closed it."""
        async with asyncio.timeout(SETTLE_S):
            await asyncio.sleep(0)
            while any(one.held for one in self.open):
                await asyncio.sleep(0.001)


class LaneConnection(asyncio.Protocol):
    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.held = b""
        self.record = Connection()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.WriteTransport = transport  # type: ignore[assignment]  # uvloop's is no subclass
        self.lane.open.add(self)
        self.lane.connections.append(self.record)

    def connection_lost(self, error: Exception | None) -> None:
        self.record.tail = self.held
        self.lane.open.discard(self)

    def data_received(self, data: bytes) -> None:
        self.held += data
        try:
            while (end := end_of_request(self.held)) is not None:
                (size, request), lane = end, self.lane
                self.record.requests.append((lane.case, self.held[:size], request))
                lane.got.append(request)
                self.held = self.held[size:]
                self.transport.write(b"HTTP/1.1 200 OK\r\nX-Seen: %d\r\nContent-Length: 0\r\n\r\n" % len(lane.got))
        except Fault as fault:
            self.lane.faults.append(f"{fault}: {self.held[:300]!r}")
            self.held = b""
            self.transport.abort()


def end_of_request(data: bytes) -> tuple[int, Request] | None:
    """Size and content of the whole request that `data` begins with, by the narrowest reading. Raises Fault."""
    head, found, rest = data.partition(b"\r\n\r\n")
    if not found:
        return None
    at = len(head) + 4
    method, target, _ = head.partition(b"\r\n")[0].split(b" ")
    length = framing_of(head + b"\r\n\r\n")
    if length is not None:
        return (at + length, (method, target, rest[:length])) if len(rest) >= length else None
    body = b""
    while True:
        line, found, _ = data[at:].partition(b"\r\n")
        if not found:
            return None
        if not re.fullmatch(rb"[0-9a-f]{1,16}", line):
            raise Fault(f"chunk size {line!r}")
        size = int(line, 16)
        at += len(line) + 2
        if not size:
            break
        if len(data) < at + size + 2:
            return None
        if data[at + size : at + size + 2] != b"\r\n":
            raise Fault("chunk without its end")
        body += data[at : at + size]
        at += size + 2
    while True:
        line, found, _ = data[at:].partition(b"\r\n")
        if not found:
            return None
        at += len(line) + 2
        if not line:
            return at, (method, target, body)


# --- the client


async def run_case(lane: Lane, port: int, case: Case) -> None:
    """Send it, read what comes, and hold what the origin got against both. Raises Disagreement."""
    lane.case, lane.got = case.number, []
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    got, is_reset = b"", False
    try:
        async with asyncio.timeout(SETTLE_S * 2):
            with contextlib.suppress(ConnectionError, RuntimeError):  # uvloop: the edge has closed meanwhile
                for piece in case.pieces(lane.host):
                    writer.write(piece)
                    await asyncio.sleep(0)
                writer.write_eof()
            try:
                while piece := await reader.read(1 << 16):
                    got += piece
            except ConnectionError:
                is_reset = True
        await lane.settle()
    except TimeoutError:
        raise Disagreement("the edge neither answers nor closes, or leaves a part of a request to the origin") from None
    finally:
        writer.transport.abort()
    if lane.faults:
        raise Disagreement(f"the origin was sent {lane.faults.pop()}")
    answers = [one for one in _ANSWER.findall(got) if not one[0].startswith(b"1")]
    at_origin = [place for place, (_, fields) in enumerate(answers) if b"\r\nX-Seen: " in fields]
    if is_reset:  # it sent more after its last request, and may have lost answers by that
        at_origin = find_in_client(case.data.replace(HOST, lane.host), lane.got)
    if len(at_origin) != len(lane.got):
        raise Disagreement(f"{len(at_origin)} answers for {len(lane.got)} requests: {got!r} {lane.got}")
    hold_to_client(case.data.replace(HOST, lane.host), dict(zip(at_origin, lane.got, strict=True)))


_ANSWER = re.compile(rb"HTTP/1\.1 (\d\d\d) [^\r]*(\r\n(?:[^\r]+\r\n)*)\r\n")

# What we take and h11 does not, by the words of its refusal; tests/wire/test_http1_properties.py says why. Either way
# it is one request, in our own writing.
LAXER = ("illegal request line", "no request line received")


def hold_to_client(data: bytes, got: dict[int, Request]) -> None:
    """`got`: what the origin got, by the place of its answer; the others were answered by the edge."""
    theirs, refusal = h11_requests(data)
    for place, ours in got.items():
        if place < len(theirs):
            method, target, body = theirs[place]
            if (method, reduced(target), body) != ours:
                raise Disagreement(f"h11 finds {theirs[place]} where the origin got {ours}")
        elif refusal is not None and not refusal.startswith(LAXER):
            raise Disagreement(f"h11 refuses ({refusal}) what the origin got: {ours}")


def find_in_client(data: bytes, got: list[Request]) -> list[int]:
    """Places, in order, of what the origin got among the requests that h11 finds."""
    theirs, _ = h11_requests(data)
    places: list[int] = []
    for ours in got:
        begin = places[-1] + 1 if places else 0
        fitting = (
            at for at in range(begin, len(theirs)) if (theirs[at][0], reduced(theirs[at][1]), theirs[at][2]) == ours
        )
        places.append(next(fitting, max(begin, len(theirs))))
    return places


def reduced(target: bytes) -> bytes:
    """An absolute-form target as we pass it on."""
    short = re.sub(rb"\Ahttps?://[^/?]*", b"", target, flags=re.IGNORECASE)
    return short if short.startswith(b"/") or short == target else b"/" + short


# --- the other parsers


async def hold_all(parser: Parser, connections: list[Connection], refused: Counter[str]) -> None:
    waiting = iter(connections)

    async def hold_some() -> None:
        for connection in waiting:
            await hold_to_parser(parser, connection, refused)

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(hold_some())


async def hold_to_parser(parser: Parser, connection: Connection, refused: Counter[str]) -> None:
    """All that the connection carried, as one: every request is found, or refused by itself as well."""
    requests = connection.requests
    at = 0
    while at < len(requests) or (at == 0 and connection.tail):
        data = b"".join(raw for _, raw, _ in requests[at:]) + connection.tail
        reading = await parser.read(data, len(requests) - at, bool(connection.tail))
        meant = [digest_of(*request) for _, _, request in requests[at:]]
        for offset, digest in enumerate(reading.found):
            if offset >= len(meant) or digest != meant[offset]:
                raise _apart(parser, connection, at + offset, "finds another request")
        at += len(reading.found)
        if at >= len(requests):
            return
        if parser.drops and reading.refused and len(requests) - at + bool(connection.tail) > 1:
            half = (at + len(requests) + 1) // 2
            await hold_to_parser(parser, Connection(requests[at:half]), refused)
            await hold_to_parser(parser, Connection(requests[half:], connection.tail), refused)
            return
        alone = await parser.read(requests[at][1], 1, False)
        if alone.found or not (alone.refused and (reading.refused or not reading.found)):
            raise _apart(parser, connection, at, f"stops: {reading.detail}")
        refused[f"{parser.name}: {alone.detail[:60]}"] += 1
        at += 1


def _apart(parser: Parser, connection: Connection, at: int, what: str) -> Disagreement:
    near = [f"case {number}: {raw!r}" for number, raw, _ in connection.requests[max(0, at - 1) : at + 2]]
    return Disagreement(
        f"{parser.name} {what} at request {at} of {len(connection.requests)}: {near} {connection.tail!r}"
    )


# --- the run


@contextlib.asynccontextmanager
async def lanes() -> AsyncIterator[list[Lane]]:
    loop = asyncio.get_running_loop()
    made = [Lane(number) for number in range(LANES)]
    servers = []
    for lane in made:
        server = await loop.create_server(lambda lane=lane: LaneConnection(lane), "127.0.0.1", 0)  # type: ignore[misc]
        lane.port = server.sockets[0].getsockname()[1]
        servers.append(server)
    try:
        yield made
    finally:
        for server in servers:
            server.close()
        for lane in made:
            for one in list(lane.open):
                one.transport.abort()


@pytest.fixture(scope="module")
def parsers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Parser]]:
    with node() as one, nginx(tmp_path_factory.mktemp("nginx")) as two, aiohttp_server() as three:
        found = [server for server in (one, two, three) if server is not None]
        print("".join(f"no {name} here; " for name, server in (("node", one), ("nginx", two)) if server is None))
        yield [*(kind() for kind in LIBRARIES), *found]


async def run_batch(all_lanes: list[Lane], port: int, numbers: range, seed: int) -> None:
    waiting = iter(numbers)

    async def run_lane(lane: Lane) -> None:
        for number in waiting:
            case = Case.of(seed, number)
            try:
                await run_case(lane, port, case)
            except Disagreement as why:
                smallest, again = await smaller(lane, port, case)
                told = f"{again}\nsmallest: {smallest!r}" if again else f"{why}\nnot seen again when sent alone"
                raise Disagreement(
                    f"seed {seed}, case {number}: {told}\nall of it: {case.data!r} {case.cuts}"
                ) from None

    async with asyncio.TaskGroup() as group:
        for lane in all_lanes:
            group.create_task(run_lane(lane))


async def smaller(lane: Lane, port: int, case: Case) -> tuple[bytes, Disagreement | None]:
    """The fewest bytes found that still fail, and how."""
    why = await fails(lane, port, case.data, case.cuts)
    if why is None:
        return case.data, None
    data, runs = case.data, 0
    size = len(data) // 2
    while size and runs < SMALLER_RUNS:
        at = 0
        while at < len(data) and runs < SMALLER_RUNS:
            less, runs = data[:at] + data[at + size :], runs + 1
            again = await fails(lane, port, less, ())
            if again is None:
                at += size
            else:
                data, why = less, again
        size //= 2
    return data, why


async def fails(lane: Lane, port: int, data: bytes, cuts: tuple[int, ...]) -> Disagreement | None:
    try:
        await run_case(lane, port, Case(-1, data, cuts))
    except Disagreement as why:
        return why
    return None


async def test_what_parsers_read_differently_is_found(parsers: list[Parser]) -> None:
    """Of the harness: bytes that no edge should send are told apart by someone, a wrong count by all."""
    fields = b"Host: a.test\r\nContent-Length: 3\r\n"
    honest = (0, b"POST / HTTP/1.1\r\n" + fields + b"\r\nabc", (b"POST", b"/", b"abc"))
    for parser in parsers:
        await hold_to_parser(parser, Connection([honest, honest], b"GET / HT"), Counter())
        for wrong in ((b"POST", b"/", b"abcd"), (b"GET", b"/", b"abc"), (b"POST", b"/x", b"abc")):
            with pytest.raises(Disagreement, match=parser.name):
                await hold_to_parser(parser, Connection([honest, (0, honest[1], wrong)]), Counter())
        with pytest.raises(Disagreement, match=parser.name):
            await hold_to_parser(parser, Connection([honest], honest[1]), Counter())
    with pytest.raises(Disagreement, match="h11 finds"):
        hold_to_client(honest[1], {0: (b"GET", b"/hidden", b"")})
    with pytest.raises(Disagreement, match="h11 refuses"):
        hold_to_client(b"POST / HTTP/1.1\r\n" + fields * 2 + b"Content-Length: 4\r\n\r\nabc", {0: honest[2]})
    for data in (b"5;a\r\nabcde\r\n0\r\n\r\n", b"5\r\nabcdeXX0\r\n\r\n", b"0x5\r\n"):
        with pytest.raises(Fault):
            end_of_request(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + data)


def test_a_case_is_the_same_each_time_and_most_ways_of_breaking_it_occur() -> None:
    generated = [Case.of(7, number) for number in range(500)]
    assert generated == [Case.of(7, number) for number in range(500)]
    for word in (b"/hidden", b"chunked", b"Expect", b"HTTP/1.0", b"\n\n", b"\x00", b"Upgrade"):
        assert any(word in one.data for one in generated), word
    assert all(b"".join(one.pieces(HOST)) == one.data for one in generated)


async def test_no_two_parsers_find_different_requests_in_what_we_send_on(
    tmp_path: Path, parsers: list[Parser], attack: Begin
) -> None:
    seed = int(os.environ.get("WAKEFRONT_SEED") or random.randrange(1 << 32))
    print(f"seed {seed}, {CASES} cases, {', '.join(parser.name for parser in parsers)}")
    refused: Counter[str] = Counter()
    requests = 0
    async with lanes() as all_lanes:
        apps = [static_app(tmp_path, lane.name, f"127.0.0.1:{lane.port}", KEPT) for lane in all_lanes]
        with (
            AttackedNode(tmp_path / "node", apps="\n".join(apps)) as served,
            attack("A13", "generated traffic, eight parsers", served, bystander=False) as run,
        ):
            for start in range(0, CASES, BATCH):
                numbers = range(start, min(CASES, start + BATCH))
                await run_batch(all_lanes, served.http_port, numbers, seed)
                carried = [one for lane in all_lanes for one in lane.take()]
                requests += sum(len(one.requests) for one in carried)
                for parser in parsers:
                    await hold_all(parser, carried, refused)
                run.figures.cases += len(numbers)
            run.note(f"seed {seed}: {requests} requests reached the origin; {len(parsers) + 1} parsers")
    print(f"{requests} requests; refused by one of the others: {dict(refused)}")
    assert requests > CASES // 4, "too little of what was generated is taken to compare anything"
