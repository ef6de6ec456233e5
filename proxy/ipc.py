"""The messages between control and workers, and their framing over a Unix stream socket.

A frame is a little-endian 32-bit length and a msgpack body, a tagged union. Control listens; a worker connects, says
`WorkerHello`, gets `Settings`, the table between `TableStart` and `TableEnd`, and from then on single changes. A worker
that lost its connection connects afresh and sends again what it still waits for, so every request here may come twice.

Both sides ignore fields they do not know and refuse a peer whose protocol differs by more than one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from collections.abc import Iterator

import msgspec

from proxy.model import App, AppName, Machine, MachineId, NodeName, Peer, RegionCode, RemoteLoad, RemoteMachine

PROTOCOL = 1
MAX_FRAME_BYTES = 16 * 1024 * 1024
_LENGTH = struct.Struct("<I")


class Message(msgspec.Struct, tag=True, frozen=True, omit_defaults=True):
    """Base of all messages."""


# --- worker -> control


class WorkerHello(Message, frozen=True):
    protocol: int
    slot: int
    pid: int
    handed_at: str = ""  # path of the datagram socket where it takes connections that others made ("": none)


class Wake(Message, frozen=True):
    """Start this machine (or say at once that it runs). `hint` asks on behalf of a ClientHello: nobody waits yet."""

    app: AppName
    machine: MachineId
    hint: bool = False


class NeedCertificate(Message, frozen=True):
    name: str


class CordonAck(Message, frozen=True):
    """This worker sends nothing new to the machine; what it had admitted before is in its counters."""

    machine: MachineId
    sequence: int


class PassiveFailure(Message, frozen=True):
    """A connection to a machine that should run failed."""

    app: AppName
    machine: MachineId
    version: int
    code: str


# --- control -> worker


class Settings(Message, frozen=True):
    """What of config.toml a worker needs beside the apps."""

    protocol: int
    node: str
    region: str
    domain: str
    access_log: str = ""  # path, "-" for standard output, "" for none
    access_log_format: str = "json"  # json | text
    max_head_bytes: int = 65_536
    max_headers: int = 100
    max_target_bytes: int = 16_384
    max_connections: int = 0  # per worker; 0 = from RLIMIT_NOFILE
    handshake_timeout_s: float = 10.0
    head_timeout_s: float = 30.0
    idle_timeout_s: float = 75.0
    drain_timeout_s: float = 30.0
    wake_hints_per_source_s: float = 5.0  # ClientHello starts a second that one source address may cause
    wake_hints_per_s: float = 100.0  # and all sources together, per worker
    source_connections: int = 0  # of one source, per worker; 0 = a quarter of max_connections
    source_connects_s: float = 1000.0  # new ones a second of one source, over all workers; 0 = no limit
    source_handshakes_s: float = 200.0  # TLS handshakes likewise
    exempt_sources: tuple[str, ...] = ("127.0.0.0/8", "::1/128")  # networks without limits for a source
    max_memory_bytes: int = 0  # of a worker; 0 = its share of four fifths of the host's
    on_demand: bool = False  # names that no app has may get a certificate: control decides


class TableStart(Message, frozen=True):
    """Forget what is not named again before `TableEnd`."""

    apps: int


class TableEnd(Message, frozen=True):
    pass


class AppSet(Message, frozen=True):
    app: App


class AppGone(Message, frozen=True):
    name: AppName


class MachineSet(Message, frozen=True):
    """A machine changed. A lower version than the one known is ignored."""

    app: AppName
    machine: Machine


class WakeDone(Message, frozen=True):
    """The end of a wake. `code` is None when the machine runs; its `MachineSet` was sent before."""

    app: AppName
    machine: MachineId
    version: int
    code: str | None = None  # a value of errors.Code
    detail: str = ""
    retry_after_s: int | None = None


class CordonAsk(Message, frozen=True):
    """Send nothing new to this machine, then say so with the same sequence."""

    app: AppName
    machine: MachineId
    sequence: int


class CordonLift(Message, frozen=True):
    """The machine had load after all: it is a candidate again."""

    app: AppName
    machine: MachineId


class EndTunnels(Message, frozen=True):
    """The machine is about to be stopped: end what it has open, WebSockets with 1001 (RFC 6455 §7.4.1, going away)."""

    app: AppName
    machine: MachineId


class IdentityReady(Message, frozen=True):
    """What this node shows to others of its fleet is in its storage, or has been renewed."""


class PeerSet(Message, frozen=True):
    """Another node, new or changed."""

    peer: Peer


class PeerGone(Message, frozen=True):
    name: NodeName


class RegionsSet(Message, frozen=True):
    """All regions that are known, nearest first."""

    order: tuple[RegionCode, ...]


class SiteSet(Message, frozen=True):
    """All machines that an app has at another node; none: it has left there."""

    app: AppName
    node: NodeName
    machines: tuple[RemoteMachine, ...]


class LoadsSet(Message, frozen=True):
    """The loads at another node, of all apps that have running machines there."""

    node: NodeName
    loads: tuple[RemoteLoad, ...]


class CertificateReady(Message, frozen=True):
    """The record of this name is in the certificate file, or there will be none and why."""

    name: str
    error: str | None = None


# --- control -> worker, beside the link


class Handed(msgspec.Struct, frozen=True, array_like=True):
    """What goes with a connection (SCM_RIGHTS) to a machine, in a datagram sent before its `MachineSet`."""

    machine: MachineId
    version: int  # of that MachineSet
    internal_port: int
    at: float  # monotonic seconds


ToControl = WorkerHello | Wake | NeedCertificate | CordonAck | PassiveFailure
ToWorker = (
    Settings | TableStart | TableEnd | AppSet | AppGone | MachineSet | WakeDone | CordonAsk | CordonLift
    | EndTunnels | CertificateReady | IdentityReady | PeerSet | PeerGone | RegionsSet | SiteSet | LoadsSet
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()
decode_to_control = msgspec.msgpack.Decoder(ToControl).decode
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
encode_handed = _encoder.encode
decode_handed = msgspec.msgpack.Decoder(Handed).decode


def encode(message: Message) -> bytes:
    """One frame.

    Raises ValueError if the message is larger than MAX_FRAME_BYTES.
    """
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"{type(message).__name__} of {len(body)} bytes: a frame may have {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + body


def write(transport: asyncio.WriteTransport, frame: bytes) -> None:
    """Send a frame within this call: a transport sends at the end of the loop's turn, and a wake is worth hurrying.

    What the kernel does not take, and every failure, is left to the transport.
    """
    if not transport.get_write_buffer_size() and not transport.is_closing():
        with contextlib.suppress(OSError):
            frame = frame[os.write(transport.get_extra_info("socket").fileno(), frame) :]
    if frame:
        transport.write(frame)


class FrameReader:
    """Cuts a byte stream into frame bodies; feeding byte by byte or at once gives the same."""

    def __init__(self, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max_bytes = max_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield each body completed by `data`.

        Raises ValueError if a frame claims more than may be.
        """
        buffer = self._buffer
        buffer += data
        at = 0
        try:
            while len(buffer) - at >= 4:
                (length,) = _LENGTH.unpack_from(buffer, at)
                if length > self._max_bytes:
                    raise ValueError(f"a frame of {length} bytes is over the {self._max_bytes} allowed")
                if len(buffer) - at - 4 < length:
                    break
                body = bytes(buffer[at + 4 : at + 4 + length])
                at += 4 + length
                yield body
        finally:
            del buffer[:at]
