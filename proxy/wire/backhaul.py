"""What one edge tells another with a request it sends there: the field `wakefront-hop`, and the word of a refusal.

Requests cross the backhaul as HTTP/1.1. The head is the one a machine would get, identity fields and all; what the next
edge needs beside that is in one field, which neither clients nor machines ever see. The next edge decides last: it
serves, wakes or refuses, and a refusal says whether a machine may have had the request.

Both are `key=value` pairs joined by `;`. A reader passes over keys that it does not know, so that a newer version may
say more; `v` grows only where an older one must not go on. What a peer says is not believed further than this: lengths
and characters are checked, and every fault is a HopError.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from proxy.model import MachineId

VERSION: Final = 1
FIELD: Final = b"wakefront-hop"
REFUSED: Final = b"wakefront-refused"
SERVED_BY: Final = b"wakefront-machine"  # of an answer: which machine gave it
MAX_HOPS: Final = 3  # edges that a request may pass: the first, one that it was sent on by, the last
_MAX_BYTES: Final = 4_096
_MAX_EXCLUDED: Final = 64

_is_app = re.compile(rb"[a-z0-9][a-z0-9-]{0,62}").fullmatch
_is_machine = re.compile(rb"[0-9A-Za-z][0-9A-Za-z_-]{0,62}").fullmatch
_is_request_id = re.compile(rb"[0-9A-Za-z-]{1,96}").fullmatch
_is_ip = re.compile(rb"[0-9A-Fa-f:.]{0,45}").fullmatch
_is_node = re.compile(rb"[a-z0-9][a-z0-9-]{0,62}").fullmatch
_is_number = re.compile(rb"[0-9]{1,5}").fullmatch
_is_word = re.compile(rb"[A-Za-z0-9_-]{1,64}").fullmatch


class HopError(ValueError):
    """The field says what no edge says."""


class Hop(msgspec.Struct, frozen=True):
    """Where a request goes at the next edge, and what may be done for it there."""

    app: str
    port: int  # public port that it came in by, at the first edge
    request_id: bytes
    client_ip: str
    is_tls: bool
    hops: int  # edges passed, the sender counted
    may_wake: bool = False  # a machine that sleeps may be started for it
    may_wait: bool = False  # it may stand in line where all are at their hard limit
    wants_go: bool = False  # its body follows once a 100 has said that a machine takes it
    force: MachineId | None = None
    prefer: MachineId | None = None
    exclude: tuple[MachineId, ...] = ()
    via: str = ""  # the node that it is for, where the receiver is only to send it on


def hop_line(hop: Hop) -> bytes:
    """The field as a header line."""
    flags = (b"w" if hop.may_wake else b"") + (b"q" if hop.may_wait else b"") + (b"g" if hop.wants_go else b"")
    more = b""
    if hop.force is not None:
        more += b";force=" + hop.force.encode("ascii")
    if hop.prefer is not None:
        more += b";prefer=" + hop.prefer.encode("ascii")
    if hop.exclude:
        more += b";not=" + ",".join(hop.exclude[:_MAX_EXCLUDED]).encode("ascii")
    if hop.via:
        more += b";via=" + hop.via.encode("ascii")
    return b"wakefront-hop: v=1;app=%b;port=%d;id=%b;ip=%b;tls=%d;hops=%d;may=%b%b\r\n" % (
        hop.app.encode("ascii"), hop.port, hop.request_id, hop.client_ip.encode("ascii"), hop.is_tls, hop.hops,
        flags, more,
    )  # fmt: skip


def parse_hop(value: bytes) -> Hop:
    """Raises HopError, naming the key, for what no edge of a version that we understand would write."""
    said = _pairs(value)
    if said.get(b"v") != b"1":
        raise HopError(f"version {said.get(b'v', b'')[:8]!r}: this edge speaks {VERSION}")
    app, request_id = said.get(b"app", b""), said.get(b"id", b"")
    client_ip, via = said.get(b"ip", b""), said.get(b"via", b"")
    if not _is_app(app):
        raise HopError("app: not the name of one")
    if not _is_request_id(request_id):
        raise HopError("id: not that of a request")
    if not _is_ip(client_ip):
        raise HopError("ip: no address")
    if via and not _is_node(via):
        raise HopError("via: not the name of a node")
    port, hops = _number(said, b"port", 65_535), _number(said, b"hops", 99)
    flags = said.get(b"may", b"")
    excluded = said.get(b"not", b"")
    return Hop(
        app.decode("ascii"), port, request_id, client_ip.decode("ascii"), said.get(b"tls") == b"1", hops,
        b"w" in flags, b"q" in flags, b"g" in flags, _machine(said, b"force"), _machine(said, b"prefer"),
        tuple(_machines(excluded)) if excluded else (), via.decode("ascii"),
    )  # fmt: skip


def _pairs(value: bytes) -> dict[bytes, bytes]:
    if len(value) > _MAX_BYTES:
        raise HopError(f"{len(value)} bytes: it has {_MAX_BYTES} at the most")
    said: dict[bytes, bytes] = {}
    for pair in value.split(b";"):
        key, equals, word = pair.partition(b"=")
        if not equals or not key or key in said:
            raise HopError("not `key=value` pairs, each key once")
        said[key] = word
    return said


def _number(said: dict[bytes, bytes], key: bytes, most: int) -> int:
    word = said.get(key, b"")
    if not _is_number(word) or int(word) > most:
        raise HopError(f"{key.decode('ascii')}: not a number up to {most}")
    return int(word)


def _machine(said: dict[bytes, bytes], key: bytes) -> MachineId | None:
    word = said.get(key)
    if word is None:
        return None
    if not _is_machine(word):
        raise HopError(f"{key.decode('ascii')}: not the id of a machine")
    return MachineId(word.decode("ascii"))


def _machines(value: bytes) -> list[MachineId]:
    words = value.split(b",")
    if len(words) > _MAX_EXCLUDED or not all(map(_is_machine, words)):
        raise HopError("not: no list of machines")
    return [MachineId(word.decode("ascii")) for word in words]


class Refusal(msgspec.Struct, frozen=True):
    """Why an edge did not serve what another sent it."""

    code: str  # a value of errors.Code; another version's may be unknown here
    is_unsent: bool  # no machine has had any of it
    retry_after_s: int | None = None
    detail: str = ""


def refused_value(refusal: Refusal) -> bytes:
    """The value of the field `wakefront-refused`."""
    after = b";after=%d" % refusal.retry_after_s if refusal.retry_after_s is not None else b""
    detail = "".join(one if " " <= one <= "~" and one not in ";=" else " " for one in refusal.detail[:200])
    return b"code=%b;sent=%d%b;why=%b" % (
        refusal.code.encode("ascii"), not refusal.is_unsent, after, detail.encode("ascii").strip()
    )  # fmt: skip


def parse_refused(value: bytes) -> Refusal:
    """Raises HopError where it is no refusal. One that does not say so counts as sent: it is not tried again."""
    said = _pairs(value)
    code = said.get(b"code", b"")
    if not _is_word(code):
        raise HopError("code: no word")
    after = _number(said, b"after", 86_400) if b"after" in said else None
    why = said.get(b"why", b"").decode("latin-1")[:200]
    return Refusal(code.decode("ascii"), said.get(b"sent") == b"0", after, why)
