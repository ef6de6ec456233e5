"""What a client may ask of routing, taken from its own fields before a machine is chosen (spec routing §3).

The fields pass to the app as well. What is asked for is a `Preference`; whether it can be had is the Exchange's to see.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from proxy.decide.balance import Preference
from proxy.errors import Code, ProxyError, Source
from proxy.model import MachineId

if TYPE_CHECKING:
    from proxy.edge.exchange import Exchange

_MACHINE = re.compile(rb"[0-9A-Za-z][0-9A-Za-z_-]{0,62}\Z")


def steer(exchange: Exchange) -> bool:
    """Note what the client asks for. False if that can't be: then the request has been answered."""
    force = prefer = None
    for name, value in exchange.head.noted:
        if name == b"fly-force-instance-id":
            if not _MACHINE.match(value):
                exchange.refuse(ProxyError(Code.FORCED_UNREACHED, Source.DOWNSTREAM, detail="no machine has that id"))
                return False
            force = MachineId(value.decode("ascii"))
        elif name == b"fly-prefer-instance-id" and _MACHINE.match(value):
            prefer = MachineId(value.decode("ascii"))
    if force is not None or prefer is not None:
        exchange.want = Preference(force, prefer)
    return True
