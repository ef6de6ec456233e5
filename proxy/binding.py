"""Binds the public addresses and the backhaul's, for the supervisor: for each, one SO_REUSEPORT socket per slot.

There are as many slots as there ever were workers: with fewer of them each accepts on several slots, for a listening
socket that is closed takes with it the clients that wait in its queue.

Standard library only. A port may be shared silently with any process of the same user once SO_REUSEPORT is set, and
then half of the clients would reach that other process; so each address is first tried without it. All faults are
collected and told at once, with the holder of a taken port where it can be found.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from proxy.process import ListenAddress, ListenSocket

BACKLOG = 4096
_RETRY_S = 0.02


class BindError(Exception):
    """Some addresses can't be bound; the message has one line for each."""


@dataclass(slots=True)
class Bound:
    """One address of the plan and its sockets: for each slot one, or several where a name has several addresses."""

    address: ListenAddress
    slots: list[list[socket.socket]]

    def sockets(self) -> list[socket.socket]:
        return [one for held in self.slots for one in held]


class Bindings:
    """All addresses that are listened on."""

    def __init__(self, bound: Sequence[Bound] = (), slots: int = 0) -> None:
        self._bound = list(bound)
        self.slots = slots

    def listeners(self, number: int, workers: int) -> list[ListenSocket]:
        """What the worker of this number, of so many, accepts on."""
        return [
            ListenSocket(one.address.public_port, sock)
            for slot in range(number, self.slots, workers)
            for one in self._bound
            for sock in one.slots[slot]
        ]

    def addresses(self) -> list[ListenAddress]:
        """The addresses as bound: a plan may say port 0."""
        found = []
        for one in self._bound:
            for sock in one.slots[0]:
                host, port = sock.getsockname()[:2]
                found.append(ListenAddress(one.address.public_port, host, port))
        return found

    def sockets(self) -> list[socket.socket]:
        return [sock for one in self._bound for sock in one.sockets()]

    def close(self, keep: Bindings | None = None) -> None:
        """Close all sockets but those that `keep` holds too."""
        kept = set(map(id, keep.sockets())) if keep is not None else set()
        for sock in self.sockets():
            if id(sock) not in kept:
                sock.close()

    def to_state(self) -> dict[str, Any]:
        """For the program that this one becomes by exec: descriptors instead of sockets."""
        bound = [
            {"address": asdict(one.address), "slots": [[sock.fileno() for sock in held] for held in one.slots]}
            for one in self._bound
        ]
        return {"slots": self.slots, "bound": bound}

    @classmethod
    def from_state(cls, raw: dict[str, Any]) -> Bindings:
        bound = [
            Bound(
                ListenAddress(**one["address"]),
                [[socket.socket(fileno=descriptor) for descriptor in held] for held in one["slots"]],
            )
            for one in raw["bound"]
        ]
        return cls(bound, raw["slots"])

    def find(self, address: ListenAddress) -> Bound | None:
        """What is bound for an address, whatever public port it stood for. Port 0 means one of its own."""
        for one in self._bound:
            same = (one.address.host, one.address.port) == (address.host, address.port)
            if same and (address.port or one.address.public_port == address.public_port):
                return one
        return None

    def has_port(self, port: int) -> bool:
        return any(one.address.port == port for one in self._bound)


def bind_all(
    listen: Sequence[ListenAddress],
    slots: int,
    patience_s: float = 0.0,
    admin: ListenAddress | None = None,
    held: Bindings | None = None,
) -> Bindings:
    """Sockets bound to every address in at least so many slots, non-blocking and closed on exec.

    `held` is what is bound already: it stays as it is, and the result shares its sockets where both have an address.
    `admin` is only looked at: it is control's to bind, but a node that nobody can talk to should not come up.
    `patience_s`: how long a taken port is tried again, for the moments in which the processes of a killed supervisor
    still end. Raises BindError naming every address that can't be had; then nothing was bound.
    """
    deadline = time.monotonic() + patience_s
    held = held or Bindings()
    slots = max(slots, held.slots)
    made: list[Bound] = []
    faults: list[str] = []
    for address in listen:
        try:
            made.append(_bind(address, slots, held, deadline))
        except OSError as error:
            faults.append(f"{_name(address)} ({address.meaning}): {_explain(error, address)}")
    if admin is not None and admin.port:
        try:
            for one in _resolve(admin):
                _wait_until_free(one, deadline)
        except OSError as error:
            faults.append(f"{_name(admin)} (admin): {_explain(error, admin)}")
    bindings = Bindings(made, slots)
    if faults:
        bindings.close(keep=held)
        raise BindError("\n".join(["can't listen:", *faults]))
    return bindings


def _bind(address: ListenAddress, slots: int, held: Bindings, deadline: float) -> Bound:
    """One address in all slots. Raises OSError, and leaves nothing open then."""
    before = held.find(address)
    kept = list(map(list, before.slots)) if before is not None else []
    made: list[list[socket.socket]] = [[] for _ in range(slots - len(kept))]
    try:
        if kept:
            wanted = [(sock.family, sock.getsockname()) for sock in kept[0]]
        else:
            wanted = _resolve(address)
            if not held.has_port(address.port):  # else it is ours, and shared as long as both addresses are in use
                for one in wanted:
                    _wait_until_free(one, deadline)
        for one in wanted:
            for slot, bound in enumerate(_bind_slots(one, len(made))):
                made[slot].append(bound)
    except OSError:
        for sock in [sock for slot in made for sock in slot]:
            sock.close()
        raise
    return Bound(address, kept + made)


def _name(address: ListenAddress) -> str:
    return f"[{address.host}]:{address.port}" if ":" in address.host else f"{address.host}:{address.port}"


_Address = tuple[socket.AddressFamily, tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]]


def _resolve(address: ListenAddress) -> list[_Address]:
    found = socket.getaddrinfo(
        address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
    )
    return list(dict.fromkeys((family, sockaddr) for family, _, _, _, sockaddr in found))


def _new_socket(family: socket.AddressFamily) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    # Connections of the last run in TIME_WAIT must not keep the port; a listener still does.
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    return made


def _wait_until_free(address: _Address, deadline: float) -> None:
    """Bind without SO_REUSEPORT: that fails whenever anybody listens there, sharing or not."""
    family, sockaddr = address
    while True:
        try:
            with _new_socket(family) as probe:
                probe.bind(sockaddr)
            return
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() >= deadline:
                raise
        time.sleep(_RETRY_S)


def _bind_slots(address: _Address, slots: int) -> Iterator[socket.socket]:
    """One listening socket a slot. Port 0 means one free port, the same for all."""
    family, sockaddr = address
    for _ in range(slots):
        bound = _new_socket(family)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            bound.bind(sockaddr)
            bound.listen(BACKLOG)
        except OSError:
            bound.close()
            raise
        sockaddr = bound.getsockname()
        yield bound


def _explain(error: OSError, address: ListenAddress) -> str:
    if isinstance(error, socket.gaierror):
        return f"{address.host!r} is no address of this host ({error.strerror}); write an IP address in [listen]"
    if error.errno == errno.EADDRINUSE:
        holder = _holder(address.port) or "not visible to this user"
        return f"something else listens there ({holder}); stop it or choose another port in [listen]"
    if error.errno in (errno.EACCES, errno.EPERM):
        return (
            f"not permitted: ports below {_first_unprivileged_port()} need root, CAP_NET_BIND_SERVICE or a lower "
            "sysctl net.ipv4.ip_unprivileged_port_start; or bind a higher port in [listen]"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return "no network interface of this host has that address; correct it in [listen]"
    return f"{error.strerror or error}"


def _first_unprivileged_port() -> str:
    try:
        with open("/proc/sys/net/ipv4/ip_unprivileged_port_start") as file:
            return file.read().strip()
    except OSError:
        return "1024"


def _holder(port: int) -> str | None:
    """The process that listens on a port, as far as we may look into it; only for the message."""
    inodes = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            for fd in os.listdir(f"/proc/{pid}/fd"):
                if os.readlink(f"/proc/{pid}/fd/{fd}") in inodes:
                    with open(f"/proc/{pid}/comm") as file:
                        return f"{file.read().strip()}, pid {pid}"
        except OSError:  # ended meanwhile, or another user's
            continue
    return None


def _listening_inodes(port: int) -> Iterator[str]:
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            with open(table) as file:
                lines = file.read().splitlines()[1:]
        except OSError:
            continue
        for fields in map(str.split, lines):
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                yield fields[9]
