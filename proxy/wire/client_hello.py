"""The ClientHello, read before OpenSSL sees it: which name is asked for, which protocols are offered.

The name decides whether an app must be woken and which certificate is shown, so it is read from the first bytes, and
the same bytes then go to OpenSSL, which checks all that is not read here. Where both read, this is at least as strict:
a hello whose name OpenSSL would read differently is refused (tests compare the two).

    HelloReader.feed(data) -> ClientHello, once | None: need more

Raises HelloError, which carries the alert to send. Knows nothing of certificates and answers nothing itself.
"""

from __future__ import annotations

import functools
import re
import struct
from typing import Final, NamedTuple

# One handshake message; RFC 8446 allows 2^24, no client comes near a tenth of this.
MAX_HELLO_BYTES: Final = 65_536
# The same hello in records of any size. More bytes than this means fragments of a few bytes each.
MAX_RAW_BYTES: Final = MAX_HELLO_BYTES + 8_192

TLS_1_2: Final = 0x0303
TLS_1_3: Final = 0x0304

# Alerts, RFC 8446 §6.2.
UNEXPECTED_MESSAGE: Final = 10
ILLEGAL_PARAMETER: Final = 47
ACCESS_DENIED: Final = 49
DECODE_ERROR: Final = 50
PROTOCOL_VERSION: Final = 70
INTERNAL_ERROR: Final = 80
UNRECOGNIZED_NAME: Final = 112
NO_APPLICATION_PROTOCOL: Final = 120  # RFC 7301 §3.2

_HANDSHAKE: Final = 0x16
_CLIENT_HELLO: Final = 0x01
_SERVER_NAME: Final = 0
_ALPN: Final = 16
_SUPPORTED_VERSIONS: Final = 43
_READ_EXTENSIONS: Final = frozenset((_SERVER_NAME, _ALPN, _SUPPORTED_VERSIONS))
_MAX_RECORD_BYTES: Final = 16_384

_two_shorts: Final = struct.Struct(">HH").unpack_from
_short: Final = struct.Struct(">H").unpack_from


class HelloError(Exception):
    """What came is not a ClientHello that can be served. `alert` is what the peer is told."""

    def __init__(self, alert: int, detail: str) -> None:
        super().__init__(detail)
        self.alert = alert


class ClientHello(NamedTuple):
    """What of a hello decides something here. A tuple: made three times faster than a frozen dataclass."""

    server_name: str | None  # lower case, no trailing dot; None when the client named no host
    alpn: tuple[bytes, ...]  # as offered, most wanted first
    versions: tuple[int, ...]  # as offered; the legacy version where the extension is absent


class HelloReader:
    """Puts the first handshake message together from however many records and reads it."""

    __slots__ = ("_at", "_message", "raw")

    def __init__(self) -> None:
        self.raw: bytes | bytearray = b""  # everything fed, for OpenSSL
        self._message: bytes | bytearray = b""  # the handshake message, as far as records of it are complete
        self._at = 0  # where in `raw` the next record begins

    def feed(self, data: bytes) -> ClientHello | None:
        """Take the next bytes; the hello when it is complete, None while more is needed.

        Raises HelloError as soon as no continuation can make it a hello.
        """
        if not self.raw:
            self.raw = data
            # Nearly always the whole hello is one record in one read: nothing is copied then.
            if len(data) > 9 and data[0] == _HANDSHAKE and data[1] == 3 and data[5] == _CLIENT_HELLO:
                length = _short(data, 3)[0]
                message = data[6] << 16 | data[7] << 8 | data[8]
                if message + 4 == length <= min(len(data) - 5, _MAX_RECORD_BYTES):
                    # What follows the record must not be read for what a broken hello lacks.
                    return _read_body(data if len(data) == 5 + length else data[: 5 + length], 9, 5 + length)
            self.raw, self._message = bytearray(data), bytearray()
        else:
            assert isinstance(self.raw, bytearray)
            self.raw += data
        return self._read_records()

    def _read_records(self) -> ClientHello | None:
        raw, message = self.raw, self._message
        while len(raw) > self._at:
            at = self._at
            if raw[at] != _HANDSHAKE:
                raise HelloError(UNEXPECTED_MESSAGE, f"expected a handshake record, got type {raw[at]}")
            if len(raw) - at > 1 and raw[at + 1] != 3:
                raise HelloError(UNEXPECTED_MESSAGE, f"expected record version 3.x, got {raw[at + 1]}")
            if len(raw) - at < 5:
                break
            length = _short(raw, at + 3)[0]
            if not 0 < length <= _MAX_RECORD_BYTES:
                raise HelloError(DECODE_ERROR, f"a record of {length} bytes is not in 1-{_MAX_RECORD_BYTES}")
            if len(raw) - at > 5 and not message and raw[at + 5] != _CLIENT_HELLO:
                raise HelloError(UNEXPECTED_MESSAGE, f"expected a ClientHello, got handshake type {raw[at + 5]}")
            if len(raw) - at - 5 < length:
                break
            message += raw[at + 5 : at + 5 + length]
            self._at = at + 5 + length
            if len(message) >= 4:
                body = message[1] << 16 | message[2] << 8 | message[3]
                if body > MAX_HELLO_BYTES:
                    raise HelloError(DECODE_ERROR, f"a hello of {body} bytes is over the {MAX_HELLO_BYTES} allowed")
                if len(message) - 4 > body:
                    raise HelloError(UNEXPECTED_MESSAGE, "bytes follow the hello in its last record")
                if len(message) - 4 == body:
                    return _read_body(bytes(message), 4, len(message))
        if len(raw) > MAX_RAW_BYTES:
            raise HelloError(DECODE_ERROR, f"no complete hello in {len(raw)} bytes")
        return None


def _read_body(data: bytes, at: int, end: int) -> ClientHello:
    """Read `data[at:end]`, the body of a ClientHello (RFC 8446 §4.1.2)."""
    try:
        legacy = _short(data, at)[0]
        at += 34  # version, random
        at += 1 + data[at]  # session id
        at += 2 + _short(data, at)[0]  # cipher suites
        at += 1 + data[at]  # compression methods
        if at == end:
            return ClientHello(None, (), (legacy,))
        if at + 2 + _short(data, at)[0] != end:
            raise HelloError(DECODE_ERROR, "the extensions do not fill the rest of the hello")
        at += 2
        name = alpn = versions = None
        # A dozen extensions pass here; the end is checked once, behind the loop.
        while at < end:
            kind, length = _two_shorts(data, at)
            at += 4 + length
            if kind in _READ_EXTENSIONS:
                value = data[at - length : at]
                if kind == _SERVER_NAME and name is None:
                    name = value
                elif kind == _ALPN and alpn is None:
                    alpn = value
                elif kind == _SUPPORTED_VERSIONS and versions is None:
                    versions = value
                else:
                    raise HelloError(ILLEGAL_PARAMETER, f"extension {kind} appears twice")
        if at != end:
            raise HelloError(DECODE_ERROR, "an extension passes the end of the hello")
    except (IndexError, struct.error):
        raise HelloError(DECODE_ERROR, "the hello ends in the middle of a field") from None
    return ClientHello(
        None if name is None else _server_name(name) if len(name) > 300 else _cached_server_name(name),
        () if alpn is None else _protocols(alpn) if len(alpn) > 300 else _cached_protocols(alpn),
        (legacy,) if versions is None else _versions(versions) if len(versions) > 300 else _cached_versions(versions),
    )


_LABEL: Final = rb"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_name_is_valid: Final = re.compile(rb"(?:%b\.)*%b" % (_LABEL, _LABEL)).fullmatch


def _server_name(extension: bytes) -> str:
    """RFC 6066 §3: a list with one host name. Other name types do not exist, and OpenSSL refuses them too."""
    length = len(extension)
    if length < 6 or _short(extension, 0)[0] != length - 2 or extension[2] != 0:
        raise HelloError(DECODE_ERROR, "the server name extension is not a list of one host name")
    if _short(extension, 3)[0] != length - 5:
        raise HelloError(DECODE_ERROR, "the server name does not fill its extension")
    name = extension[5:].lower().removesuffix(b".")
    if len(name) > 253 or _name_is_valid(name) is None:
        raise HelloError(UNRECOGNIZED_NAME, f"the server name {name[:80]!r} is not a host name")
    return name.decode("ascii")


def _protocols(extension: bytes) -> tuple[bytes, ...]:
    """RFC 7301 §3.1: non-empty names, at least one."""
    end = len(extension)
    if end < 4 or _short(extension, 0)[0] != end - 2:
        raise HelloError(DECODE_ERROR, "the ALPN list does not fill its extension")
    names = []
    at = 2
    while at < end:
        length = extension[at]
        if length == 0 or at + 1 + length > end:
            raise HelloError(DECODE_ERROR, "an ALPN name is empty or passes the end of its list")
        names.append(extension[at + 1 : at + 1 + length])
        at += 1 + length
    return tuple(names)


def _versions(extension: bytes) -> tuple[int, ...]:
    """RFC 8446 §4.2.1."""
    length = len(extension)
    if length < 3 or extension[0] != length - 1 or length % 2 == 0:
        raise HelloError(DECODE_ERROR, "the list of versions does not fill its extension")
    return struct.unpack(f">{length // 2}H", extension[1:])


# Clients send the same few lists and names again and again: a look-up costs 0.1 us, reading them 2 us.
# Only short keys are kept, so that what strangers send stays below 1 MB.
_cached_server_name: Final = functools.lru_cache(1024)(_server_name)
_cached_protocols: Final = functools.lru_cache(128)(_protocols)
_cached_versions: Final = functools.lru_cache(128)(_versions)
