"""Pure code of the hot path, timed alone: head parsing, head writing, choosing, ids, log lines.

`python -m bench micro [--quick] [--only NAME,...]`. Best and median of several repeats, in µs a call; one core, no I/O.
"""

from __future__ import annotations

import argparse
import os
import random
import ssl
import timeit
from collections.abc import Callable
from dataclasses import asdict, dataclass

from msgspec.structs import replace

from bench.load import FIELDS
from bench.peers import HOST
from bench.processes import BenchError, cores
from bench.report import facts, facts_text, median, result_folder, table, write_json
from bench.whole_request import whole_request
from proxy.decide import headers
from proxy.decide.balance import choose_machine
from proxy.decide.ewma import MachineScores, parse_load
from proxy.decide.nearest import ANYWHERE, Ask, Site, Sites, next_step
from proxy.decide.places import FLY
from proxy.decide.region import RegionWish
from proxy.decide.replay import _parse, parse_header
from proxy.decide.ulid import UlidMaker
from proxy.edge.access_record import Record, json_line, text_line
from proxy.model import Balance, NodeName, RegionCode
from proxy.state import SharedMemory
from proxy.wire.client_hello import HelloReader
from proxy.wire.http1 import Headers, Limits, RequestHead, RequestReader, ResponseHead, ResponseReader

REQUEST = (
    f"GET /small HTTP/1.1\r\nHost: {HOST}\r\n"
    + "".join(f"{name}: {value}\r\n" for name, value in FIELDS.items())
    + "\r\n"
).encode()
RESPONSE = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 100\r\nCache-Control: max-age=60\r\n"
    b'ETag: "5f3a-1c"\r\nServer: origin\r\n\r\n' + b"a" * 100
)


class Sink:
    """Takes what a reader reports, and keeps the last head."""

    request: RequestHead
    response: ResponseHead

    def on_head(self, head: RequestHead) -> None:
        self.request = head

    def on_response_head(self, head: ResponseHead) -> None:
        self.response = head

    def on_body(self, data: bytes) -> None: ...

    def on_response_body(self, data: bytes) -> None: ...

    def on_end(self, trailers: Headers) -> None: ...

    def on_response_end(self, trailers: Headers) -> None: ...

    def on_upgrade_bytes(self, data: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class Slot:
    slot: int


def _read_request() -> Callable[[], object]:
    reader = RequestReader(Sink(), Limits())
    return lambda: reader.feed(REQUEST)


def _read_response() -> Callable[[], object]:
    reader = ResponseReader(Sink(), Limits())

    def once() -> None:
        reader.expect(False)
        reader.feed(RESPONSE)

    return once


def _heads() -> Sink:
    sink = Sink()
    RequestReader(sink, Limits()).feed(REQUEST)
    reader = ResponseReader(sink, Limits())
    reader.expect(False)
    reader.feed(RESPONSE)
    return sink


def _write_request() -> Callable[[], object]:
    head = _heads().request
    identity = headers.identity_fields("127.0.0.1", "127.0.0.1", 80, False, "ams", 1, True)
    trace = b"00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
    return lambda: headers.request_head(head, identity, b"01J00000000000000000000000", 1_700_000_000_000_000, trace)


def _write_response() -> Callable[[], object]:
    head, rules = _heads().response, headers.ResponseRules(False, ())

    def once() -> None:
        framing, _, _ = headers.response_framing(head, False, 1)
        headers.response_head(head, rules, b"01J00000000000000000000000-ams", framing, b"wakefront", b"")

    return once


def _choose(count: int, policy: Balance = Balance.FLY, is_full: bool = False) -> Callable[[], object]:
    """Among machines with 0 to 2 requests in flight from each of two workers; `is_full`: 20 more, the soft limit."""
    descriptor, memory = SharedMemory.create(2)
    os.close(descriptor)
    slots, rng, scores, now = [Slot(at) for at in range(count)], random.Random(1), MachineScores(), 1000.0
    for worker, column in enumerate((memory.load_base(0), memory.load_base(1))):
        for at in range(count):
            memory.cells[column + at * 2] = (at + worker) % 3 + (20 if is_full and not worker else 0)
    for at in range(count):
        scores.observe(at, now - at % 7, 0.001 * (at % 5 + 1))
        scores.report(at, now - at % 7, b"0.%d" % (at % 10))
    in_flight = memory.in_flight
    return lambda: choose_machine(slots, in_flight, 20, 25, rng, policy, scores, now)


def _choose_node(here: Site, there: Site, ask: Ask = ANYWHERE, count: int = 35) -> Callable[[], object]:
    """Of an app with nodes in all of Fly's regions, `ams` being this one's; all others stand alike."""
    own = replace(here, node=NodeName("own"), region=RegionCode("ams"))
    regions = [region for region in FLY if region != own.region]
    sites, rng = Sites(own.region), random.Random(1)
    for at in range(count):
        sites.put(replace(there, node=NodeName(f"n{at}"), region=regions[at % len(regions)]))
    sites.rank({region: rank for rank, region in enumerate((own.region, *regions))})
    return lambda: next_step(ask, own, sites, rng)


def _site(below_soft: int = 0, below_hard: int = 0, full: int = 0, startable: int = 0) -> Site:
    return Site(NodeName(""), RegionCode(""), below_soft, below_hard, full, 0, startable)


def _observe() -> Callable[[], object]:
    scores, rng = MachineScores(), random.Random(1)
    return lambda: scores.observe(7, 1000.0 + rng.random(), rng.random())


def _ulid() -> Callable[[], object]:
    maker = UlidMaker(os.urandom(8))
    return lambda: maker.next(1_700_000_000_000)


def _record() -> Record:
    request_id = "01J00000000000000000000000-ams"
    return Record(
        1.7e9, "bench", "127.0.0.1", "GET", HOST, "/small", 200, 0.71, 0, 100, request_id, 443, True, "bench-1", 0.6
    )


def _line(format_line: Callable[[Record], bytes]) -> Callable[[], object]:
    record = _record()
    return lambda: format_line(record)


def _hello() -> Callable[[], object]:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname=HOST)
    try:
        client.do_handshake()
    except ssl.SSLWantReadError:
        hello = outgoing.read()
    else:
        raise BenchError("a handshake ended without a peer")
    return lambda: HelloReader().feed(hello)


CASES: dict[str, Callable[[], Callable[[], object]]] = {
    "a whole request through the edge, sockets apart": lambda: whole_request(REQUEST, RESPONSE),
    "the same, to a machine with a hard limit": lambda: whole_request(REQUEST, RESPONSE, 100_000),
    "read a 10-header request": _read_request,
    "read a 5-header response with its 100-byte body": _read_response,
    "write the request's head for the machine": _write_request,
    "write the response's head for the client": _write_response,
    "choose of 1 machine": lambda: _choose(1),
    "choose of 10 machines": lambda: _choose(10),
    "choose of 1,000 machines": lambda: _choose(1_000),
    "choose of 10, all at their soft limit": lambda: _choose(10, is_full=True),
    "choose of 1,000, all at their soft limit": lambda: _choose(1_000, is_full=True),
    "choose of 1,000, least-loaded": lambda: _choose(1_000, Balance.LEAST_LOADED),
    "choose of 1,000, peak-ewma": lambda: _choose(1_000, Balance.PEAK_EWMA),
    "choose of 1,000, app-load": lambda: _choose(1_000, Balance.APP_LOAD),
    "choose of 36 nodes, room here": lambda: _choose_node(_site(1), _site(1)),
    "choose of 36 nodes, none here": lambda: _choose_node(_site(), _site(1)),
    "choose of 36 nodes, all asleep": lambda: _choose_node(_site(), _site(startable=1)),
    "choose of 36 nodes, all above their soft limit": lambda: _choose_node(_site(0, 1), _site(0, 1)),
    "choose of 36 nodes, the same and some asleep": lambda: _choose_node(_site(0, 1), _site(0, 1, startable=1)),
    "choose of 36 nodes, all full": lambda: _choose_node(_site(full=1), _site(full=1)),
    "choose of 36 nodes, us preferred": lambda: _choose_node(_site(1), _site(1), Ask(wish=RegionWish(("us",)))),
    "choose of 300 nodes, all full": lambda: _choose_node(_site(full=1), _site(full=1), count=300),
    "read a fly-replay header seen before": lambda: lambda: parse_header(b"region=ams;state=http_method"),
    "read a fly-replay header for the first time": lambda: lambda: _parse(b"region=ams;state=http_method"),
    "note a response time": _observe,
    "read a reported load": lambda: lambda: parse_load(b"0.75"),
    "request id": _ulid,
    "make an access record": lambda: _record,
    "access line, JSON": lambda: _line(json_line),
    "access line, text": lambda: _line(text_line),
    "read a ClientHello": _hello,
}


@dataclass(frozen=True, slots=True)
class Timing:
    name: str
    best_us: float
    median_us: float
    calls: int


def time_one(name: str, build: Callable[[], Callable[[], object]], repeats: int) -> Timing:
    timer = timeit.Timer(build())
    calls, _ = timer.autorange()
    calls = max(1, calls // 4)
    took = [one / calls * 1e6 for one in timer.repeat(repeats, calls)]
    return Timing(name, min(took), median(took), calls)


def run(arguments: argparse.Namespace) -> int:
    known = facts(["python", "-m", "bench", "micro", *arguments.given])
    out = result_folder("micro", arguments.quick)
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cores()[0]})
    try:
        wanted = {name: build for name, build in CASES.items() if arguments.only in name}
        timings = [time_one(name, build, 3 if arguments.quick else 15) for name, build in wanted.items()]
    finally:
        os.sched_setaffinity(0, allowed)
    write_json(out / "results.json", {**known, "timings": [asdict(one) for one in timings]})
    rows = [[one.name, f"{one.best_us:.2f}", f"{one.median_us:.2f}"] for one in timings]
    text = "# Micro\n\n" + facts_text(known) + "\n" + table(["what", "best µs", "median µs"], rows)
    (out / "results.md").write_text(text)
    print(text)
    print(f"written to {out}")
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="three repeats: for a look, not for the record")
    parser.add_argument("--only", default="", help="only cases whose name has this in it")
