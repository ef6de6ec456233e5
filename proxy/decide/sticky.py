"""The sticky cookie: a client's machine, sealed so that only this app's edge can read or make it.

Neither client nor app learns a machine's id or can choose one. When a cookie is read and when a new one is set (none
came, its machine is gone or full) is the exchange's to decide; keys are made and kept elsewhere.

    value = base64url( tag (16) | body xor stream )        body = expiry (5, unix seconds) | id, padded with NUL
    tag = HMAC(key, "tag" app NUL body)[:16]               stream = HMAC(key, "stream" block tag), block by block

The tag is computed over the plain text and is also the nonce of the stream (a synthetic nonce, as in RFC 5297): no
random source is needed, and two cookies are alike only if app, machine and second of expiry are. Lengths are padded
to three sizes, all a multiple of three bytes: base64 has then one spelling for each value, and nothing can be changed
in it unnoticed. HMAC-SHA256, cut to 128 bits.
"""

from __future__ import annotations

import binascii
import hashlib
from collections.abc import Sequence
from functools import lru_cache
from hmac import compare_digest
from typing import TYPE_CHECKING

from proxy.model import MachineId

if TYPE_CHECKING:
    from hashlib import _Hash

_TAG = 16
_EXPIRY = 5
_BLOCK = 32  # of SHA-256's output
# Room for an id and, of that, a whole value's length: 64, 80 or 112 characters. Ids have at most 63 (config).
_ID_SIZES = (27, 39, 63)
_VALUE_SIZES = frozenset((_TAG + _EXPIRY + size) // 3 * 4 for size in _ID_SIZES)
_EXPIRES_MAX = (1 << 8 * _EXPIRY) - 1
_TO_URL = bytes.maketrans(b"+/", b"-_")
_FROM_URL = bytes.maketrans(b"-_+/", b"+/!!")  # `+` and `/` are not ours: they must not pass for `-` and `_`


def seal(key: bytes, app: str, machine: str, expires: int) -> bytes:
    """The cookie value that keeps a client at `machine` of `app` until `expires` (unix seconds).

    Raises ValueError for an id that is empty, has a NUL or more than 63 bytes, or a time that is none.
    """
    name = machine.encode()
    size = next((size for size in _ID_SIZES if len(name) <= size), None)
    if size is None or not name or b"\0" in name:
        raise ValueError(f"expected a machine id of 1 to {_ID_SIZES[-1]} bytes: {machine!r}")
    if not 0 <= expires <= _EXPIRES_MAX:
        raise ValueError(f"expected a time in unix seconds: {expires}")
    body = expires.to_bytes(_EXPIRY, "big") + name.ljust(size, b"\0")
    tag = _tag(key, app, body)
    return binascii.b2a_base64(tag + _crypt(key, tag, body), newline=False).translate(_TO_URL)


def open_sealed(keys: bytes | Sequence[bytes], app: str, value: bytes, now: float) -> MachineId | None:
    """The machine that a cookie of this app names; None for one that is forged, another app's, expired or garbage.

    `keys`: the one in use and, after a rotation, those before it. Measured: 4 us with one key.
    """
    if len(value) not in _VALUE_SIZES:
        return None
    try:
        raw = binascii.a2b_base64(value.translate(_FROM_URL), strict_mode=True)
    except binascii.Error:
        return None
    tag, sealed = raw[:_TAG], raw[_TAG:]
    for key in (keys,) if isinstance(keys, bytes) else keys:
        body = _crypt(key, tag, sealed)
        if compare_digest(tag, _tag(key, app, body)):
            if int.from_bytes(body[:_EXPIRY], "big") <= now:
                return None
            return MachineId(body[_EXPIRY:].rstrip(b"\0").decode())
    return None


@lru_cache(64)
def _pads(key: bytes) -> tuple[_Hash, _Hash]:
    """HMAC's two hashes with the key already in them (RFC 2104): a third of the time of hmac.digest."""
    padded = (hashlib.sha256(key).digest() if len(key) > 64 else key).ljust(64, b"\0")
    inner, outer = (hashlib.sha256(bytes(byte ^ pad for byte in padded)) for pad in (0x36, 0x5C))
    return inner, outer


def _hmac(key: bytes, message: bytes) -> bytes:
    pads = _pads(key)
    inner, outer = pads[0].copy(), pads[1].copy()
    inner.update(message)
    outer.update(inner.digest())
    return outer.digest()


def _tag(key: bytes, app: str, body: bytes) -> bytes:
    return _hmac(key, b"tag%b\0%b" % (app.encode("utf-8", "surrogatepass"), body))[:_TAG]


def _crypt(key: bytes, tag: bytes, data: bytes) -> bytes:
    """Encrypt or decrypt: the same."""
    size = len(data)
    stream = _hmac(key, b"stream0" + tag)
    if size > _BLOCK:
        stream += b"".join(_hmac(key, b"stream%d" % block + tag) for block in range(1, -(-size // _BLOCK)))
    return (int.from_bytes(data, "big") ^ int.from_bytes(stream[:size], "big")).to_bytes(size, "big")


# --- the Cookie and Set-Cookie fields


def find_cookie(cookie_values: Sequence[bytes], name: bytes) -> bytes | None:
    """The value of the first cookie of this name in a request's Cookie fields, unquoted; None without one."""
    for field in cookie_values:
        if name not in field:
            continue
        for pair in field.split(b";"):
            found, equals, value = pair.partition(b"=")
            if equals and found.strip(b" \t") == name:
                value = value.strip(b" \t")
                return value[1:-1] if len(value) > 1 and value[:1] == value[-1:] == b'"' else value
    return None


def strip_cookie(value: bytes, name: bytes) -> bytes:
    """A Cookie field without the cookies of this name, all others as they were; empty when none is left."""
    if name not in value:
        return value
    pairs = value.split(b";")
    kept = [pair for pair in pairs if not _is_named(pair, name)]
    return value if len(kept) == len(pairs) else b";".join(kept).strip(b" \t")


def _is_named(pair: bytes, name: bytes) -> bool:
    found, equals, _ = pair.partition(b"=")
    return bool(equals) and found.strip(b" \t") == name


def set_cookie(name: bytes, sealed: bytes, ttl_s: float, secure: bool) -> bytes:
    """The Set-Cookie value for a sealed cookie: for the whole host, not for scripts, on TLS only over TLS."""
    return b"%b=%b; Max-Age=%d; Path=/; HttpOnly; SameSite=Lax%b" % (
        name, sealed, max(0, int(ttl_s)), b"; Secure" if secure else b""
    )  # fmt: skip
