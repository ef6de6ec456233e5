"""What leads a request to a machine before loads do: its own fields, its sticky cookie, a replay that is remembered.

The client's fields pass to the app as well (spec routing §3); our cookie does not. What is asked for is a `Preference`;
whether it can be had is the Exchange's to see. The replay cache is an optimisation: whatever is wrong with what it
says, the request goes the usual way (spec routing §4.3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxy.clock import unix
from proxy.decide.balance import Preference
from proxy.decide.region import RegionWish
from proxy.decide.steering import NOT_STEERED, parse_steering
from proxy.decide.sticky import find_cookie, open_sealed, seal, set_cookie, strip_cookie
from proxy.edge.handover import Handover
from proxy.errors import Code, ProxyError, Source
from proxy.model import MachineId, RegionCode, StickyCookie
from proxy.wire.http1 import RequestHead, ResponseHead

if TYPE_CHECKING:
    from proxy.edge.exchange import Exchange


def steer(exchange: Exchange) -> bool:
    """Note what the request asks for. False if it has gone its way by that, or been answered."""
    head, app, port = exchange.head, exchange.app, exchange.port
    assert app is not None and port is not None
    asked = parse_steering(head.noted) if head.noted else NOT_STEERED
    if asked.force_regions:
        exchange.wish = RegionWish(asked.force_regions, is_forced=True)
    elif asked.prefer_regions:
        exchange.wish = RegionWish(asked.prefer_regions)
    here = RegionCode(exchange.edge.region)
    if asked.is_impossible or (exchange.wish is not None and not app.is_in(exchange.wish, here)):
        detail = "the client forces where the app is not"
        exchange.refuse(ProxyError(Code.FORCED_UNREACHED, Source.DOWNSTREAM, detail=detail))
        return False
    if port.sessions is not None:
        exchange.session = port.sessions.key(head.host, head.target, head.passed, head.listed_hops)
    if app.record.sticky is not None:
        _read_cookie(exchange, app.record.sticky)
    if asked.force_instance is not None or asked.prefer_instance is not None:
        exchange.want = Preference(asked.force_instance, asked.prefer_instance)
        return True
    return not _follow_remembered(exchange, asked.skips_cache)


def _read_cookie(exchange: Exchange, sticky: StickyCookie) -> None:
    """Take our cookie out of the request, and prefer the machine that it names."""
    head, app, name = exchange.head, exchange.app, sticky.name.encode()
    assert app is not None
    values = [value for field, value in head.fields if field.lower() == b"cookie"]
    sealed = find_cookie(values, name) if values else None
    if sealed is None:
        return
    _strip(head, name)
    machine = open_sealed(exchange.edge.sticky_keys, app.record.name, sealed, unix())
    if machine is not None and app.has_machine(machine):
        exchange.cookie = machine
        exchange.want = Preference(prefer=machine)


def _strip(head: RequestHead, name: bytes) -> None:
    passed: list[bytes] = []
    for at in range(0, len(head.passed), 4):
        field = head.passed[at : at + 4]
        if field[0].lower() == b"cookie":
            field[2] = strip_cookie(field[2], name)
            if not field[2]:
                continue
        passed += field
    head.passed = passed


def stick(exchange: Exchange, head: ResponseHead, sticky: StickyCookie, machine: MachineId) -> None:
    """Have the client come back to the machine that answered."""
    assert exchange.app is not None
    expires = int(unix() + sticky.ttl_s)
    sealed = seal(exchange.edge.sticky_keys[0], exchange.app.name, machine, expires)
    cookie = set_cookie(sticky.name.encode(), sealed, sticky.ttl_s, exchange.stream.is_tls)
    head.passed += (b"set-cookie", b": ", cookie, b"\r\n")


def _follow_remembered(exchange: Exchange, skips: bool) -> bool:
    """Whether the replay cache knew where it goes, and it went there."""
    head, app, edge = exchange.head, exchange.app, exchange.edge
    assert app is not None
    found = edge.replays.find(app.name, head.host, head.target, exchange.session, skips, edge.wheel.now)
    if found is None:
        return False
    if found.is_bypassed:
        exchange.cache_status = b"bypass"
        return False
    exchange.handover = Handover(exchange)
    return exchange.handover.follow_remembered(found)
