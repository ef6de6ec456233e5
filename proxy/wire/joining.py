"""What passes when a node joins a fleet: the invite, one line for a person to carry, and a message each way.

A message is a little-endian 32-bit length and a msgpack map of at most 64 KiB; a connection (ALPN `wakefront-join/1`)
carries one question and one answer. `root` asks for the fleet's root certificate, which the invite lets the newcomer
recognise; `join` follows over a connection verified by it. Both sides ignore fields that they do not know.

The invite is base64url of a version byte, a msgpack array and four bytes of checksum, so that one that was cut or typed
wrongly is told from one that is refused.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import struct
from dataclasses import dataclass, field
from typing import Final, TypeVar

import msgspec

ALPN: Final = "wakefront-join/1"
PROTOCOL: Final = 1
MAX_FRAME_BYTES: Final = 65_536
MAX_TOKEN_CHARS: Final = 1024
SECRET_BYTES: Final = 32
LENGTH: Final = struct.Struct("<I")
_TOKEN_VERSION: Final = 1
_CHECK_BYTES: Final = 4
_HASH_BYTES: Final = 32

_M = TypeVar("_M")

_id_is_valid = re.compile(r"[0-9a-f]{12}").fullmatch


@dataclass(frozen=True, slots=True)
class Invite:
    """What a newcomer needs: whom to ask, by what to know it, and what to be let in for."""

    node: str  # that invites
    address: str  # "HOST:PORT" of its backhaul
    fingerprint: bytes  # SHA-256 of the fleet's root in DER
    id: str
    secret: bytes = field(repr=False)

    def to_token(self) -> str:
        body = bytes([_TOKEN_VERSION]) + msgspec.msgpack.encode(
            (self.node, self.address, self.fingerprint, self.id, self.secret)
        )
        return base64.urlsafe_b64encode(body + _check(body)).rstrip(b"=").decode("ascii")

    @classmethod
    def from_token(cls, token: str) -> Invite:
        """Raises ValueError, which says what is wrong with it and does not repeat it."""
        text = "".join(token.split())  # a terminal may have broken the line
        if len(text) > MAX_TOKEN_CHARS:
            raise ValueError(f"it has {len(text)} characters, an invite {MAX_TOKEN_CHARS} at most")
        try:
            whole = base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, UnicodeEncodeError) as error:
            raise ValueError("it is not base64url: copy the whole line that `wakefront node invite` printed") from error
        body, check = whole[:-_CHECK_BYTES], whole[-_CHECK_BYTES:]
        if not body or check != _check(body):
            raise ValueError("it is not whole: copy the whole line that `wakefront node invite` printed")
        if body[0] != _TOKEN_VERSION:
            raise ValueError(f"it is of another version of wakefront: {body[0]}, expected {_TOKEN_VERSION}")
        try:
            invite = cls(*_decode_token(body[1:]))
        except msgspec.MsgspecError as error:
            raise ValueError("it is none of `wakefront node invite`") from error
        if (len(invite.fingerprint), len(invite.secret)) != (_HASH_BYTES, SECRET_BYTES) or not _id_is_valid(invite.id):
            raise ValueError("it is none of `wakefront node invite`")
        return invite


_decode_token = msgspec.msgpack.Decoder(tuple[str, str, bytes, str, bytes]).decode


def _check(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()[:_CHECK_BYTES]


class NodeRow(msgspec.Struct, frozen=True, omit_defaults=True):
    """A node of the fleet, as others know it."""

    name: str
    region: str
    backhaul: str  # "HOST:PORT"; "" where it has not said
    key: str  # SHA-256 of its public key, in hex
    joined_at: float = 0.0  # unix seconds
    replaces: str = ""  # the key of the node that had the name before
    revision: int = 0  # grows with every change that the node itself makes


class JoinRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    version: int
    op: str  # root | join
    id: str = ""  # of the invite
    secret: bytes = b""
    node: str = ""
    region: str = ""
    backhaul: str = ""
    csr: bytes = b""  # DER

    def __repr__(self) -> str:  # without the secret
        return f"JoinRequest({self.version}, {self.op!r}, {self.id!r}, {self.node!r})"


class JoinAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    version: int
    op: str  # root | joined | refused
    root: bytes = b""  # DER
    node: str = ""  # who answers
    chain: bytes = b""  # PEM, of the newcomer
    bundle: bytes = b""  # certs.cluster.Bundle
    nodes: tuple[NodeRow, ...] = ()  # some may be left out where there are many
    code: str = ""  # of a refusal: invite | name | request | version | busy | unavailable
    detail: str = ""

    def __repr__(self) -> str:  # without keys
        return f"JoinAnswer({self.version}, {self.op!r}, {self.code!r}, {self.detail!r})"


def encode_frame(message: JoinRequest | JoinAnswer) -> bytes:
    """Raises ValueError if it is too long."""
    body = msgspec.msgpack.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {len(body)} bytes, {MAX_FRAME_BYTES} are permitted")
    return LENGTH.pack(len(body)) + body


def body_length(head: bytes) -> int:
    """Of the four bytes that a frame begins with. Raises ValueError if no such frame is permitted."""
    length: int = LENGTH.unpack(head)[0]
    if not 0 < length <= MAX_FRAME_BYTES:
        raise ValueError(f"a message of {length} bytes, 1 to {MAX_FRAME_BYTES} are permitted")
    return length


def decode_request(body: bytes) -> JoinRequest:
    """Raises ValueError."""
    return _decode(_request_decoder, body)


def decode_answer(body: bytes) -> JoinAnswer:
    """Raises ValueError."""
    return _decode(_answer_decoder, body)


_request_decoder = msgspec.msgpack.Decoder(JoinRequest)
_answer_decoder = msgspec.msgpack.Decoder(JoinAnswer)


def _decode(decoder: msgspec.msgpack.Decoder[_M], body: bytes) -> _M:
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(f"not a message of {ALPN}: {error}") from error
