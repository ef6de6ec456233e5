"""What the supervisor hands to the processes it forks. Standard library only: the supervisor imports it.

`ServePlan` is made by `wakefront serve` from a valid config.toml and passed to the supervisor as JSON, so that the
supervisor reads no configuration. `ChildContext` is what a forked child finds: sockets, shared memory, its place.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import ssl
from dataclasses import asdict, dataclass, field, fields
from typing import Final

BACKHAUL: Final = 0  # stands where a public port does, for the address at which other nodes reach this one


@dataclass(frozen=True, slots=True)
class ListenAddress:
    """One bind address of one public port. Clients mean `public_port`, whatever port is bound."""

    public_port: int  # or BACKHAUL
    host: str
    port: int

    @property
    def meaning(self) -> str:
        """What it is for, in messages."""
        return "backhaul" if self.public_port == BACKHAUL else f"public port {self.public_port}"


@dataclass(frozen=True, slots=True)
class ServePlan:
    """All that the supervisor needs to know. Paths are absolute."""

    config_path: str
    data_dir: str
    workers: int
    listen: tuple[ListenAddress, ...]
    drain_timeout_s: float = 30.0
    admin: ListenAddress | None = None  # control's own to bind
    retire_timeout_s: float = 900.0  # for connections of workers that others have taken over from

    @property
    def run_dir(self) -> str:
        """Sockets, the table snapshot, the pid file: what lives no longer than the processes do."""
        return os.path.join(self.data_dir, "run")

    @property
    def backhaul(self) -> ListenAddress | None:
        return next((one for one in self.listen if one.public_port == BACKHAUL), None)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ServePlan:
        """Keys of a newer version's are left out. Raises ValueError, KeyError or TypeError for what is no plan."""
        known = {one.name for one in fields(cls)}
        raw = {key: value for key, value in json.loads(text).items() if key in known}
        raw["listen"] = tuple(ListenAddress(**one) for one in raw["listen"])
        raw["admin"] = ListenAddress(**raw["admin"]) if raw["admin"] else None
        return cls(**raw)


@dataclass(slots=True)
class ListenSocket:
    """A listening socket (SO_REUSEPORT), held by the supervisor as long as its address is listened on."""

    public_port: int  # or BACKHAUL
    socket: socket.socket


@dataclass(slots=True)
class ChildContext:
    """What a child is and has. `index` is its heartbeat cell: 0 for control, 1 + slot for a worker."""

    role: str  # control | worker
    slot: int  # row of a worker in shared memory, 0-based; 0 for control
    index: int
    incarnation: int  # 1 for the first process in this place, growing
    plan: ServePlan
    shared_fd: int  # memfd of state.SharedMemory
    listeners: list[ListenSocket] = field(default_factory=list)
    control_listener: socket.socket | None = None  # Unix stream listener at run_dir/control.sock; control accepts on it
    channel: socket.socket | None = None  # Unix SEQPACKET to the supervisor, JSON messages
    tls_context: ssl.SSLContext | None = None  # the base context; owns the ticket keys, made before any fork


def raise_open_files() -> None:
    """Raise RLIMIT_NOFILE to what the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def unix_address(directory: str, name: str) -> str:
    """An address for a Unix socket in a folder whose path may be longer than sun_path takes (108 bytes)."""
    path = os.path.join(directory, name)
    if len(os.fsencode(path)) < 100:
        return path
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    return f"/proc/self/fd/{fd}/{name}"
