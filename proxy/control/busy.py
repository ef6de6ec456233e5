"""Asks a machine whether it may be stopped: `busy = "/path"` of an app, on the machine's first internal port.

409 and 423 (RFC 9110 §15.5.10, RFC 4918 §11.3) say that it is busy. Every other status, a machine that does not answer
in time, and one that cannot be reached say nothing of the kind: a fault never keeps a machine up for ever. What follows
from an answer is idle.py's; how it is got, and bounded, is check_client.py's.
"""

from __future__ import annotations

import logging

from proxy.control.check_client import CheckClient, Target
from proxy.control.machines import Owned
from proxy.control.prober import SocketMaker
from proxy.model import Check

log = logging.getLogger(__name__)

TIMEOUT_S = 2.0
_BUSY = (409, 423)


async def says_it_is_busy(machine: Owned, path: str, make_socket: SocketMaker, timeout_s: float = TIMEOUT_S) -> bool:
    """One GET, past the workers: it is no load. The body is not waited for, redirects are not followed."""
    if not machine.spec.endpoints:
        return False
    endpoint = machine.spec.endpoints[0]
    target = Target(endpoint.host, endpoint.port, machine.running.netns_pid if machine.running else 0)
    question = Check("http", 0.0, timeout_s, 0.0, path=path, headers=(("User-Agent", "wakefront-busy"),))
    finding = await CheckClient(make_socket).check(question, target)
    if finding.status is None:
        log.info("machine %s of %s does not say whether it is busy: %s", machine.id, machine.app.name, finding.output)
    return finding.status in _BUSY
