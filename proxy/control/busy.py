"""Asks a machine whether it may be stopped: `busy = "/path"` of an app, on the machine's first internal port.

409 and 423 (RFC 9110 §15.5.10, RFC 4918 §11.3) say that it is busy. Every other status, a machine that does not answer
in time, and one that cannot be reached say nothing of the kind: a fault never keeps a machine up for ever. What follows
from an answer is idle.py's.
"""

from __future__ import annotations

import logging

import aiohttp

from proxy.control.machines import Owned
from proxy.control.prober import SocketMaker

log = logging.getLogger(__name__)

TIMEOUT_S = 2.0
_BUSY = (409, 423)


async def says_it_is_busy(machine: Owned, path: str, make_socket: SocketMaker, timeout_s: float = TIMEOUT_S) -> bool:
    """One GET, past the workers: it is no load. The body is not read, redirects are not followed."""
    if not machine.spec.endpoints:
        return False
    endpoint = machine.spec.endpoints[0]
    netns_pid = machine.running.netns_pid if machine.running else 0
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    connector = aiohttp.TCPConnector(
        socket_factory=lambda address: make_socket(netns_pid, address[0]), force_close=True, limit=1
    )
    session = aiohttp.ClientSession(
        connector=connector, timeout=aiohttp.ClientTimeout(total=timeout_s), cookie_jar=aiohttp.DummyCookieJar()
    )
    try:
        async with session:
            url = f"http://{host}:{endpoint.port}{path}"
            async with session.get(url, allow_redirects=False, headers={"User-Agent": "wakefront-busy"}) as answer:
                return answer.status in _BUSY
    except (TimeoutError, aiohttp.ClientError, OSError) as error:
        log.info(
            "machine %s of %s does not say whether it is busy: %s", machine.id, machine.app.name, error or "no answer"
        )
        return False
