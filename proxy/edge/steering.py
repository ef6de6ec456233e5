"""What a client may ask of routing, taken from its own fields before a machine is chosen (spec routing §3).

The fields pass to the app as well. What is asked for is a `Preference`; whether it can be had is the Exchange's to see.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxy.decide.balance import Preference
from proxy.decide.region import expand_regions
from proxy.decide.steering import parse_steering
from proxy.errors import Code, ProxyError, Source
from proxy.model import RegionCode

if TYPE_CHECKING:
    from proxy.edge.exchange import Exchange


def steer(exchange: Exchange) -> bool:
    """Note what the client asks for. False if that can't be: then the request has been answered."""
    if not exchange.head.noted:
        return True
    asked = parse_steering(exchange.head.noted)
    here = RegionCode(exchange.edge.region)
    if asked.is_impossible or (asked.force_regions and not expand_regions(asked.force_regions, here, ())):
        detail = "the client forces what is not here"
        exchange.refuse(ProxyError(Code.FORCED_UNREACHED, Source.DOWNSTREAM, detail=detail))
        return False
    if asked.force_instance is not None or asked.prefer_instance is not None:
        exchange.want = Preference(asked.force_instance, asked.prefer_instance)
    return True
