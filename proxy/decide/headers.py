"""Which fields pass, which are removed, which we write: both directions (spec routing §6).

Heads are re-emitted from parsed fields as one joined byte string. Hop-by-hop fields end here (RFC 9110 §7.6.1), and
what a client may not say about itself is removed before we say it: `fly-*`, `x-forwarded-*`, `forwarded` and kin.
The reader drops what REQUEST_RULES and RESPONSE_RULES say while it reads, so that a field is looked at once.
"""

from __future__ import annotations

from typing import Final

from proxy.wire.backhaul import FIELD, REFUSED, SERVED_BY
from proxy.wire.http1 import CHUNKED, UNTIL_CLOSE, FieldRules, Headers, RequestHead, ResponseHead

_HOP_BY_HOP: Final = frozenset(
    {
        b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade",
        b"content-length", b"http2-settings", b"proxy-authenticate", b"proxy-authorization",
    }
)  # fmt: skip

# What only an edge may say. A client's value would be believed by the app.
_TRUST: Final = frozenset(
    {
        b"forwarded", b"x-real-ip", b"x-client-ip", b"x-cluster-client-ip", b"x-original-forwarded-for",
        b"x-request-start", b"x-original-host", b"x-original-url", b"x-original-proto", b"x-original-port",
        b"x-rewrite-url", b"client-ip", b"forwarded-for", b"x-forwarded", b"x-remote-ip", b"x-remote-addr",
        b"proxy-client-ip", b"wl-proxy-client-ip", b"x-proxyuser-ip", b"front-end-https", b"x-url-scheme", b"x-scheme",
        b"proxy",  # HTTP_PROXY to a CGI program
    }
)  # fmt: skip
# A CDN's own (CF-Connecting-IP, True-Client-IP, Fastly-Client-IP) pass: an app behind that CDN reads them, and its
# access rules can say that only the CDN comes.
_TRUST_PREFIXES: Final = (b"fly-", b"x-forwarded-", b"wakefront-")

# The fly-* fields that are a client's to send (spec routing §3).
_CLIENTS_OWN: Final = frozenset(
    {
        b"fly-prefer-region", b"fly-force-region", b"fly-prefer-instance-id", b"fly-force-instance-id",
        b"fly-replay-cache-control",
    }
)  # fmt: skip

# What a machine says to us, not to the client: replay and its cache (spec routing §2, §4), its own load (ours).
_TO_US: Final = frozenset(
    {
        b"fly-replay", b"fly-replay-cache", b"fly-replay-cache-ttl-secs", b"fly-replay-cache-allow-bypass",
        b"wakefront-machine-load",
    }
)  # fmt: skip

# Trailers that would change framing, routing or trust if merged (RFC 9110 §6.5.1): never passed.
_NOT_IN_TRAILERS: Final = frozenset(
    {b"host", b"authorization", b"cookie", b"set-cookie", b"content-type", b"content-encoding", b"content-range",
     b"expect", b"cache-control", b"max-forwards", b"range", b"location"}
)  # fmt: skip


def _is_dropped_from_request(lower: bytes) -> bool:
    if lower in _CLIENTS_OWN:
        return False
    dashed = lower.replace(b"_", b"-")  # an origin that maps `_` to `-` would take it for the real one
    return dashed in _HOP_BY_HOP or dashed in _TRUST or dashed.startswith(_TRUST_PREFIXES)


def _is_dropped_from_response(lower: bytes) -> bool:
    return lower in _HOP_BY_HOP or lower.startswith(b"wakefront-")


def is_reserved(lower: bytes) -> bool:
    """Whether a request field's name (lower case) is one that only we write: framing, hop-by-hop, identity, `fly-*`."""
    return lower in _CLIENTS_OWN or lower == b"host" or _is_dropped_from_request(lower)


REQUEST_RULES: Final = FieldRules(_is_dropped_from_request, noted=_CLIENTS_OWN)
RESPONSE_RULES: Final = FieldRules(_is_dropped_from_response, of_response=True, taken=_TO_US)
# Of a request that another edge sends on: what clients may not say it has removed, and said itself.
SENT_ON_RULES: Final = FieldRules(lambda lower: lower in _HOP_BY_HOP, taken=frozenset({FIELD}))
# Of an answer that comes through another edge.
PEER_RESPONSE_RULES: Final = FieldRules(
    _is_dropped_from_response, of_response=True, taken=_TO_US | {REFUSED, SERVED_BY}
)


def identity_fields(
    client_ip: str, local_ip: str, public_port: int, is_tls: bool, region: str, minor: int, keep: bool
) -> bytes:
    """The part of a request's identity fields that holds for a whole connection, as header lines.

    X-Forwarded-For is `client, address the client reached`, as Fly's rightmost two entries; what the client sent in
    that field is not passed on (docs/compatibility.md, row HD-3).
    """
    proto = "https" if is_tls else "http"
    ssl = "on" if is_tls else "off"
    return (
        f"fly-client-ip: {client_ip}\r\nx-forwarded-for: {client_ip}, {local_ip}\r\n"
        f"fly-forwarded-proto: {proto}\r\nx-forwarded-proto: {proto}\r\n"
        f"fly-forwarded-ssl: {ssl}\r\nx-forwarded-ssl: {ssl}\r\n"
        f"fly-forwarded-port: {public_port}\r\nx-forwarded-port: {public_port}\r\n"
        f"fly-region: {region}\r\nvia: 1.{minor} wakefront\r\n" + ("" if keep else "connection: close\r\n")
    ).encode("latin-1")


def request_head(head: RequestHead, identity: bytes, request_id: bytes, start_us: int, trace: bytes) -> bytes:
    """The head a machine gets: the client's own fields, then ours. `identity` comes from `identity_fields`."""
    without = head.listed_hops - {b"host"} if head.listed_hops else head.listed_hops
    parts: list[bytes] = [head.method, b" ", head.target, b" HTTP/1.1\r\n", *_kept(head, without)]
    add = parts.extend
    if head.length == CHUNKED:
        parts.append(b"transfer-encoding: chunked\r\n")
    elif head.length or head.method in _BODY_METHODS:
        parts.append(b"content-length: %d\r\n" % head.length)
    if head.upgrade is not None:
        add((b"connection: upgrade\r\nupgrade: ", head.upgrade, b"\r\n"))
    add(
        (identity, b"fly-request-id: ", request_id, b"\r\nx-request-start: t=%d\r\nfly-traceparent: " % start_us, trace,
         b"\r\n\r\n")
    )  # fmt: skip
    return b"".join(parts)


def sent_on_head(head: RequestHead, keep: bool, hop: bytes) -> bytes:
    """The head of a request that another edge sent on, which has written all of it but the framing. `hop`: the line
    for the edge that it goes to next, empty for a machine."""
    framing = b""
    if head.length == CHUNKED:
        framing = b"transfer-encoding: chunked\r\n"
    elif head.length or head.method in _BODY_METHODS:
        framing = b"content-length: %d\r\n" % head.length
    if head.upgrade is not None:
        framing += b"connection: upgrade\r\nupgrade: %b\r\n" % head.upgrade
    elif not keep:
        framing += b"connection: close\r\n"
    return b"".join((head.method, b" ", head.target, b" HTTP/1.1\r\n", *_kept(head, _NONE), framing, hop, b"\r\n"))


_NONE: Final[frozenset[bytes]] = frozenset()
_BODY_METHODS: Final = frozenset({b"POST", b"PUT", b"PATCH"})


def _kept(head: RequestHead | ResponseHead, without: frozenset[bytes]) -> list[bytes]:
    """The fields that go on but those of some (lower-case) names, in pieces to be joined."""
    if not without:
        return [head.lines] if head.lines else head.passed
    passed = head.passed
    kept: list[bytes] = []
    for at in range(0, len(passed), 4):
        if passed[at].lower() not in without:
            kept += passed[at : at + 4]
    return kept


class ResponseRules:
    """What a port's `http_options.response` makes of responses. `pristine` adds and alters nothing of ours."""

    __slots__ = ("added", "pristine", "removed")

    def __init__(self, pristine: bool, rules: tuple[tuple[str, tuple[str, ...] | None], ...]) -> None:
        self.pristine = pristine
        self.removed = frozenset(name.lower().encode("latin-1") for name, _ in rules)
        self.added = b"".join(
            f"{name}: {value}\r\n".encode("latin-1") for name, values in rules if values is not None for value in values
        )


def response_head(
    head: ResponseHead,
    rules: ResponseRules,
    request_id: bytes,
    framing: bytes,
    server: bytes,
    send_connection: bytes,
) -> bytes:
    """The head a client gets. `framing` and `send_connection` are header lines or empty; `server` is ours."""
    removed = rules.removed
    names = head.listed_hops | removed
    if rules.pristine:
        ours: tuple[bytes, ...] = ()
        if head.server is not None and b"server" not in names:
            ours = (head.server[0], b": ", head.server[1], b"\r\n")
    elif removed:
        ours = _ours(removed, server, request_id)
    else:
        ours = (b"server: ", server, b"\r\nvia: 1.1 wakefront\r\nfly-request-id: ", request_id, b"\r\n")
    return b"".join(
        [b"HTTP/1.1 %d " % head.status, head.reason, b"\r\n", *_kept(head, names), *ours, rules.added, framing,
         send_connection, b"\r\n"]
    )  # fmt: skip


def answer_to_peer(head: ResponseHead, machine: str, framing: bytes, send_connection: bytes) -> bytes:
    """The head of a machine's answer as another edge gets it: what is the client's, and what is that edge's to read."""
    ours = [b"wakefront-machine: ", machine.encode("ascii"), b"\r\n"]
    if head.server is not None:
        ours += (head.server[0], b": ", head.server[1], b"\r\n")
    for name, value in head.noted:
        if name in _TO_US:
            ours += (name, b": ", value, b"\r\n")
    return b"".join(
        [b"HTTP/1.1 %d " % head.status, head.reason, b"\r\n", *_kept(head, head.listed_hops), *ours, framing,
         send_connection, b"\r\n"]
    )  # fmt: skip


def _ours(removed: frozenset[bytes], server: bytes, request_id: bytes) -> tuple[bytes, ...]:
    parts: list[bytes] = []
    for name, value in ((b"server", server), (b"via", b"1.1 wakefront"), (b"fly-request-id", request_id)):
        if name not in removed:
            parts += (name, b": ", value, b"\r\n")
    return tuple(parts)


def response_framing(head: ResponseHead, head_only: bool, client_minor: int) -> tuple[bytes, bool, bool]:
    """How the response's body is delimited towards a client of HTTP/1.`client_minor`.

    Returns (header lines, body is sent in chunks, connection must close after it). RFC 9112 §6.
    """
    length = head.length
    if head.status < 200 or head.status == 204:
        return b"", False, False
    if head_only or head.status == 304:
        return (b"content-length: %d\r\n" % length if length >= 0 else b""), False, False
    if length >= 0:
        return b"content-length: %d\r\n" % length, False, False
    assert length in (CHUNKED, UNTIL_CLOSE)
    if client_minor == 0:
        return b"", False, True
    return b"transfer-encoding: chunked\r\n", True, False


def trailer_block(trailers: Headers) -> bytes:
    """The end of a chunked body: the last chunk and the trailer fields that may pass."""
    if not trailers:
        return b"0\r\n\r\n"
    parts: list[bytes] = [b"0\r\n"]
    for name, value in trailers:
        dashed = name.lower().replace(b"_", b"-")  # who merges trailers may also map names as CGI does
        if dashed in _NOT_IN_TRAILERS or dashed in _CLIENTS_OWN or _is_dropped_from_request(dashed):
            continue
        parts += (name, b": ", value, b"\r\n")
    parts.append(b"\r\n")
    return b"".join(parts)


def interim_head(head: ResponseHead) -> bytes:
    """A 1xx response, hop-by-hop fields removed."""
    kept = _kept(head, head.listed_hops)
    return b"".join([b"HTTP/1.1 %d " % head.status, head.reason, b"\r\n", *kept, b"\r\n"])


def switching_head(head: ResponseHead, rules: ResponseRules, request_id: bytes, server: bytes) -> bytes:
    """The 101 that opens a tunnel: as `response_head`, with the Upgrade of the machine."""
    return response_head(
        head, rules, request_id, b"", server, b"connection: upgrade\r\nupgrade: " + head.upgrade + b"\r\n"
    )


def redirect_target(authority: bytes, host: str, target: bytes, bound_http: int, public: int, https_port: int) -> bytes:
    """The https:// form of a request to a plain port.

    Clients that reached us at a bound port other than the public one (a node that runs unprivileged on loopback) are
    sent to the bound HTTPS port likewise; all others to the public one.
    """
    _, colon, port = authority.rpartition(b":")
    plain = host.encode("latin-1")
    if colon and port == str(bound_http).encode() and bound_http != public and https_port != 443:
        return b"https://%b:%d%b" % (plain, https_port, target)
    return b"https://%b%b" % (plain, target)
