"""What controls of one fleet tell each other, in frames as ipc.py cuts them, over TLS (ALPN `wakefront-control/1`).

A control dials each peer and talks; what it hears on that connection is only the echo of its probes. It says who it is,
then all its apps, then single changes; four times a second how its machines stand. A peer may be of the version before
or after: fields that are not known are passed over, and so are kinds of messages.
"""

from __future__ import annotations

import msgspec

from proxy.model import App, AppName, MachineId, RemoteLoad, RemoteMachine
from proxy.wire.joining import NodeRow

VERSION = 1
MAX_FRAME_BYTES = 4 * 1024 * 1024


class PeerMessage(msgspec.Struct, tag=True, frozen=True, omit_defaults=True):
    """Base of all."""


class PeerHello(PeerMessage, frozen=True):
    """The first: what was told before by an earlier start of this node counts no more once `AllTold` has come."""

    version: int
    node: str
    region: str
    started_at: float  # unix seconds, of the service
    nodes: tuple[NodeRow, ...] = ()  # that it knows


class AppTold(PeerMessage, frozen=True):
    """An app that the node has machines of, without them."""

    app: App


class MachinesTold(PeerMessage, frozen=True):
    """All machines of one of its apps."""

    app: AppName
    machines: tuple[RemoteMachine, ...]


class AppLeft(PeerMessage, frozen=True):
    name: AppName


class AllTold(PeerMessage, frozen=True):
    """From here on come changes."""


class StateTold(PeerMessage, frozen=True):
    """How the node is. It is silent once none has come for a second."""

    sequence: int
    is_draining: bool
    loads: tuple[RemoteLoad, ...]
    rtts: dict[str, float] = {}  # node -> seconds, by its own probes


class WakeAsked(PeerMessage, frozen=True):
    """Start this machine of the node that is told so: nobody waits for it. Nodes of before this kind pass it over."""

    app: AppName
    machine: MachineId


class KnownNode(PeerMessage, frozen=True):
    """Begins what is known of one node, in the file that a control leaves to the next; never sent."""

    name: str
    region: str
    host: str
    port: int


class Probe(PeerMessage, frozen=True):
    """To be sent back as an Echo at once."""

    id: int


class Echo(PeerMessage, frozen=True):
    id: int


Told = WakeAsked | KnownNode | PeerHello | AppTold | MachinesTold | AppLeft | AllTold | StateTold | Probe | Echo
_KINDS = {kind.__name__ for kind in PeerMessage.__subclasses__()}
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Told).decode


class _Kind(msgspec.Struct):
    type: str


_kind_of = msgspec.msgpack.Decoder(_Kind).decode


def encode(message: PeerMessage) -> bytes:
    """One frame. Raises ValueError if it is larger than a frame may be."""
    body = _encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"{type(message).__name__} of {len(body)} bytes: a frame may have {MAX_FRAME_BYTES}")
    return len(body).to_bytes(4, "little") + body


def decode(body: bytes) -> PeerMessage | None:
    """The message; None for a kind of a newer version's. Raises ValueError for what is none."""
    if _kind_of(body).type not in _KINDS:
        return None
    message: PeerMessage = _decode(body)
    return message
