"""Which TCP port a machine without a network of its own gets. Whoever asks keeps the answer, so that it stays.

Ports lie outside `ip_local_port_range`: inside it a poll of a port nobody listens on yet may be given that very port as
its own and connect to itself, and an outgoing connection of anybody's may hold it when the machine wants it.
"""

from __future__ import annotations

import errno
import random
import socket

from proxy.machines.driver import DriverError

_LOWEST = 20000  # below are the well-known ones and what operators choose by hand
_HIGHEST = 65535
_RANGE_FILE = "/proc/sys/net/ipv4/ip_local_port_range"


def choose_port(taken: set[int], rng: random.Random, range_file: str = _RANGE_FILE) -> int:
    """A free port that is not in `taken`. Raises DriverError when there is none."""
    low, high = ephemeral_range(range_file)
    candidates: list[int] = [*range(_LOWEST, low), *range(max(high + 1, _LOWEST), _HIGHEST + 1)]
    start: int = rng.randrange(len(candidates)) if candidates else 0
    for port in candidates[start:] + candidates[:start]:
        if port not in taken and _is_free(port):
            return port
    raise DriverError(
        f"no free TCP port for a machine: {len(candidates)} ports of {_LOWEST}-{_HIGHEST} lie outside "
        f"ip_local_port_range ({low}-{high}), all are in use; narrow the range with sysctl net.ipv4.ip_local_port_range"
    )


def ephemeral_range(range_file: str = _RANGE_FILE) -> tuple[int, int]:
    """The ports the system gives to outgoing connections, both ends included."""
    with open(range_file, encoding="ascii") as file:
        low, high = file.read().split()
    return int(low), int(high)


def _is_free(port: int) -> bool:
    """Bound on all addresses, so that a listener on any of them counts; old connections in TIME_WAIT do not."""
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind((address, port))
        except OSError as error:
            if family == socket.AF_INET6 and error.errno in _NO_IPV6:
                continue
            return False
    return True


_NO_IPV6 = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL})
