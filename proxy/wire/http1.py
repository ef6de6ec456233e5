"""HTTP/1.1 framing, both sides: bytes in, heads, bodies and ends out.

llhttp (through httptools) judges and frames; the rules that it leaves open are the guard here: exactly one valid Host,
no Transfer-Encoding but `chunked`, no framing fields on upgrades, bounds on everything that is held before a head is
whole. What passes is handed to a sink as parsed fields and never as client bytes, so that the next hop sees framing
that we wrote (RFC 9112 §11.2, request smuggling).

A body of known length goes round the parser once its head has been judged: its bytes are counted, not copied. So does
a head whose fields are, byte for byte, those of one before on its connection: what the parser found in them then it
would find again. Such a head is learned only where it came in one read, from its first byte to its last, and where none
of its fields frames, steers or ends the connection; of an answer, where a Content-Length frames it and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import httptools

from proxy.errors import Code, ProxyError, Retry, Source

CHUNKED: Final = -1
UNTIL_CLOSE: Final = -2

_DRY_MAX: Final = 65_536  # bytes of a chunked body that bring no body: extensions, trailers
_EXTENSIONS_MAX: Final = (
    10_240  # bytes of chunk extensions and trailers of one request, but those in two slices: 16 KiB in all
)
_CHUNK_FRAME: Final = 6  # bytes that frame one chunk and count for nothing, and as many more as it has data ...
_CHUNK_PADDING: Final = 14  # ... up to these: 16 digits and two line ends
_HEAD_SLICE: Final = 2_048  # bytes given to the parser at once, where heads may be: some 80 of the shortest
_BODY_SLICE: Final = 4_096  # and within a chunked body
_INTERIMS_MAX: Final = 200  # 1xx before one answer
_LEARNINGS: Final = 4  # heads learned one after the other and never met again, after which a connection learns no more
_KNOWN_MAX: Final = 4_096  # bytes of an answer's head that is learned: a connection keeps it; of a request's, a slice
_LENGTH_MAX: Final = (1 << 63) - 1  # above it a machine that counts in signed 64 bits would see another length

# llhttp reads RTSP and tunnels too; neither is a request to pass on.
_NOT_SERVED: Final = frozenset(
    {b"CONNECT", b"DESCRIBE", b"ANNOUNCE", b"SETUP", b"PLAY", b"PAUSE", b"TEARDOWN", b"GET_PARAMETER",
     b"SET_PARAMETER", b"REDIRECT", b"RECORD", b"FLUSH"}
)  # fmt: skip

Headers = list[tuple[bytes, bytes]]
_NO_HOPS: Final[frozenset[bytes]] = frozenset()
_NOTHING: Final[tuple[tuple[bytes, bytes], ...]] = ()


class Limits:
    """Bounds on one head, in bytes and fields."""

    __slots__ = ("max_head_bytes", "max_headers", "max_target_bytes")

    def __init__(self, max_head_bytes: int = 65_536, max_headers: int = 100, max_target_bytes: int = 16_384) -> None:
        self.max_head_bytes = max_head_bytes
        self.max_headers = max_headers
        self.max_target_bytes = max_target_bytes


class _Head:
    """What heads of both directions have.

    `passed` holds the fields that go on, flat and ready to be joined: name, `: `, value, CRLF, name, ... `lines`, if it
    is not empty, is the same joined.
    """

    __slots__ = ("_passed", "keep_alive", "length", "lines", "listed_hops", "noted")

    def __init__(self, passed: list[bytes] | None = None, lines: bytes = b"") -> None:
        self._passed = passed
        self.lines = lines
        self.keep_alive = True
        self.length = 0
        self.listed_hops: frozenset[bytes] = _NO_HOPS  # names that the Connection field makes hop-by-hop, lower case
        # fields that steer, as the rules name them: lower-case name and value; of a machine, also a content type
        self.noted: Sequence[tuple[bytes, bytes]] = _NOTHING

    @property
    def passed(self) -> list[bytes]:
        if self._passed is None:
            self._passed = _flat(self.lines)
        return self._passed

    @passed.setter
    def passed(self, passed: list[bytes]) -> None:
        self._passed = passed
        self.lines = b""

    @property
    def fields(self) -> Headers:
        """The fields that go on, as pairs."""
        return list(zip(self.passed[0::4], self.passed[2::4], strict=True))


class RequestHead(_Head):
    """One request's head. `host` is the normalised authority without port; `length` a byte count or CHUNKED."""

    __slots__ = ("authority", "expects_continue", "host", "method", "minor", "target", "upgrade")

    method: bytes
    target: bytes  # origin-form or `*`; an absolute-form target was reduced to it
    minor: int  # 1 for HTTP/1.1, 0 for HTTP/1.0
    authority: bytes  # the Host field as received
    host: str

    def __init__(self, passed: list[bytes] | None = None, lines: bytes = b"") -> None:
        super().__init__(passed, lines)
        self.upgrade: bytes | None = None  # protocol asked for, when it is one that we pass on
        self.expects_continue = False  # until a 100 has come, or the body after all


class ResponseHead(_Head):
    """One response's head. `length` is a byte count, CHUNKED or UNTIL_CLOSE (also: none declared, for HEAD and 304)."""

    __slots__ = ("reason", "server", "status", "upgrade")

    status: int
    reason: bytes
    server: tuple[bytes, bytes] | None  # the Server field, kept apart since ours may replace it
    upgrade: bytes  # the protocol a 101 switches to


def _flat(lines: bytes) -> list[bytes]:
    """What was joined from a flat list: no name has `: ` in it, and no value a line's end."""
    passed: list[bytes] = []
    for line in lines.split(b"\r\n")[:-1]:
        name, separator, value = line.partition(b": ")
        passed += (name, separator, value, b"\r\n")
    return passed


class RequestSink(Protocol):
    def on_head(self, head: RequestHead) -> None: ...
    def on_body(self, data: bytes) -> None: ...
    def on_end(self, trailers: Headers) -> None: ...
    def on_upgrade_bytes(self, data: bytes) -> None: ...


class ResponseSink(Protocol):
    def on_response_head(self, head: ResponseHead) -> None: ...
    def on_response_body(self, data: bytes) -> None: ...
    def on_response_end(self, trailers: Headers) -> None: ...
    def on_upgrade_bytes(self, data: bytes) -> None: ...


# --- what a field name means, remembered by the spelling received

(
    _PASSED, _DROPPED, _HOST, _LENGTH, _ENCODING, _CONNECTION, _UPGRADE, _EXPECT, _SERVER, _REFUSED, _NOTED, _TAKEN,
    _TYPE,
) = range(13)  # fmt: skip
_FRAMING: Final = {
    b"host": _HOST,
    b"content-length": _LENGTH,
    b"transfer-encoding": _ENCODING,
    b"connection": _CONNECTION,
    b"upgrade": _UPGRADE,
    b"expect": _EXPECT,
}
_SPELLINGS_MAX: Final = 4096


class FieldRules:
    """What becomes of a field, by its name: framing is this module's to know, what else is dropped the caller's.

    A spelling is judged once and remembered, up to a bound, so that a usual field costs one look-up.
    """

    __slots__ = ("_drops", "_noted", "_of_response", "_taken", "kinds")

    def __init__(
        self,
        drops: Callable[[bytes], bool],
        of_response: bool = False,
        noted: frozenset[bytes] = frozenset(),
        taken: frozenset[bytes] = frozenset(),
    ) -> None:
        """`drops(name)`, given a lower-case name, says whether the field ends here.

        Fields named in `noted` are passed and put beside in `head.noted`; those in `taken` only put there.
        """
        self._drops = drops
        self._of_response = of_response
        self._noted = noted
        self._taken = taken
        self.kinds: dict[bytes, int] = {}

    def judge(self, name: bytes) -> int:
        """The kind of a spelling not met before."""
        if not name or len(name) > 255:
            return _REFUSED  # nor remembered: a bounded count of names is a bound only if names are short
        lower = name.lower()
        kind = _FRAMING.get(lower, _PASSED)
        if self._of_response and kind in (_HOST, _EXPECT):
            kind = _PASSED
        if b"_" in lower and not self._of_response and lower.replace(b"_", b"-") in _FRAMING:
            kind = _REFUSED  # an origin that maps `_` to `-`, as CGI does, would read a second framing field
        elif lower in self._taken:
            kind = _TAKEN
        elif kind == _PASSED and self._drops(lower):
            kind = _DROPPED
        elif lower in self._noted:
            kind = _NOTED
        elif self._of_response and lower == b"server":
            kind = _SERVER
        elif self._of_response and self._taken and lower == b"content-type":
            kind = _TYPE
        if len(self.kinds) < _SPELLINGS_MAX:
            self.kinds[name] = kind
        return kind


PASS_ALL: Final = FieldRules(lambda name: False)
PASS_ALL_BACK: Final = FieldRules(lambda name: False, of_response=True)


_AUTHORITY: Final = re.compile(rb"(?:[A-Za-z0-9](?:[A-Za-z0-9._-]*)|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?\Z")
_HOSTS_MAX: Final = 8192
_hosts: dict[bytes, str] = {}


def is_served(method: bytes) -> bool:
    """Whether requests with this method are taken at all; the others are answered METHOD_UNKNOWN."""
    if method in _NOT_SERVED or not method.replace(b"-", b"").replace(b"_", b"").isalpha():
        return False
    try:
        httptools.HttpRequestParser(object()).feed_data(method + b" / HTTP/1.1\r\n")
    except httptools.HttpParserError:
        return False
    return True


def normalize_host(authority: bytes) -> str:
    """Lower-case name without port and trailing dot.

    Raises ProxyError(BAD_REQUEST) if it is not a host with an optional port (RFC 9110 §7.2).
    """
    known = _hosts.get(authority)
    if known is not None:
        return known
    if len(authority) > 261 or not _AUTHORITY.match(authority):
        raise _bad("Host is not a valid authority")
    name, colon, port = authority.rpartition(b":")
    host = (name if colon and port.isdigit() else authority).lower().decode("ascii").rstrip(".")
    if not host:
        raise _bad("Host is empty")
    if len(_hosts) >= _HOSTS_MAX:
        _hosts.clear()  # bounded; a flood of names costs a refill, not memory
    _hosts[authority] = host
    return host


_plain_line = re.compile(rb"(GET|HEAD|OPTIONS|DELETE) (/[!\"$-~]*) HTTP/1\.1").fullmatch


class _KnownRequest:
    """A head whose fields say nothing that frames, steers or ends the connection. Made before the sink has the head."""

    __slots__ = ("authority", "host", "line", "lines", "tail")

    def __init__(self, head: RequestHead) -> None:
        self.line = b"%b %b HTTP/1.1" % (head.method, head.target)
        self.tail = b""  # all behind that, from its CRLF to the empty line
        self.lines = b"".join(head.passed)
        self.authority = head.authority
        self.host = head.host


def _ends_at(data: bytes, start: int) -> int:
    """Where the head ends in which `start` is, if CRLF is the only line end in the rest of it; else -1."""
    end = data.find(b"\r\n\r\n", start) + 4
    return end if end > 3 and data.count(b"\n", start, end) == data.count(b"\r\n", start, end) else -1


def _bad(detail: str) -> ProxyError:
    return ProxyError(Code.BAD_REQUEST, Source.DOWNSTREAM, detail=detail)


_USUAL_REASONS: Final = frozenset({b"OK", b"Not Found", b"No Content", b"Found", b"Created", b"Not Modified", b""})
_is_text = re.compile(rb"[\t -~\x80-\xff]*").fullmatch  # RFC 9112 §4: reason-phrase
REPLAY_TYPE: Final = b"application/vnd.fly.replay+json"
_USUAL_CONNECTION: Final = frozenset(
    {b"keep-alive", b"Keep-Alive", b"close", b"Close", b"upgrade", b"Upgrade", b"keep-alive, Upgrade"}
)
_CLOSE: Final = frozenset({b"close", b"Close"})


def _names_close(value: bytes) -> bool:
    return any(token.strip().lower() == b"close" for token in value.split(b","))


def _tokens(value: bytes) -> frozenset[bytes]:
    tokens = {token.strip().lower() for token in value.split(b",")}
    return frozenset(tokens - {b"", b"close", b"keep-alive", b"upgrade"})


def _length_of(value: bytes) -> int:
    """A Content-Length that llhttp found to be digits; -1 if no machine need understand it."""
    length = int(value)
    return length if length <= _LENGTH_MAX else -1


def _served_upgrade(value: bytes) -> bytes | None:
    """What of an Upgrade field is passed on: all but h2c, a second protocol that would carry requests past us."""
    if value.lower().find(b"h2c") < 0:
        return value or None
    kept = [token for part in value.split(b",") if (token := part.strip()) and token.lower() != b"h2c"]
    return b", ".join(kept) or None


class RequestReader:
    """The client's side of a connection. Feed it what arrives; it calls the sink, in order, at once.

    `feed` raises ProxyError for what may not pass; the reader is then spent and the connection must end.
    """

    __slots__ = (
        "_add",
        "_authority",
        "_body_seen",
        "_carried",
        "_chunks",
        "_closes",
        "_connection",
        "_dry",
        "_expects",
        "_gathered",
        "_head",
        "_head_bytes",
        "_in_head",
        "_kinds",
        "_known",
        "_last",
        "_learnable",
        "_learnings",
        "_length",
        "_limits",
        "_noted",
        "_overhead",
        "_parser",
        "_passed",
        "_remaining",
        "_rules",
        "_sink",
        "_special",
        "_target",
        "_trailers",
        "_upgrade",
        "_upgraded",
        "is_held",
    )

    def __init__(self, sink: RequestSink, limits: Limits, rules: FieldRules = PASS_ALL) -> None:
        self._sink = sink
        self._limits = limits
        self._rules = rules
        self._kinds = rules.kinds
        self._parser = httptools.HttpRequestParser(self)
        self._head: RequestHead | None = None
        self._in_head = True
        self._head_bytes = 0
        self._carried = 0  # at most so many bytes of the head under way came with the message before it
        self._remaining = 0
        self._body_seen = 0
        self._chunks = 0
        self._overhead = 0
        self._dry = 0
        self._gathered: list[bytes] | None = None  # body pieces of a long read, given on as one
        self.is_held = False  # the sink has enough for now
        self._last = False  # the body that went round the parser was that of the last request
        self._known: _KnownRequest | None = None  # the latest head, while all since it has been met: nothing is parsed
        self._learnings = _LEARNINGS
        self._learnable: _KnownRequest | None = None  # the latest head of the read under way, if it may be learned
        self._trailers: Headers = []
        self._upgraded = False
        self._target = b""
        self._passed: list[bytes] = []
        self._add = self._passed.extend
        self._authority: bytes | None = None
        self._special = False  # a field that frames or steers, other than Host, was in this head
        self._length = 0
        self._connection: frozenset[bytes] = _NO_HOPS
        self._closes = False
        self._upgrade: bytes | None = None
        self._expects = False
        self._noted: list[tuple[bytes, bytes]] | None = None

    @property
    def is_between_requests(self) -> bool:
        """Whether nothing of a next request has arrived yet, or too little to have a target."""
        return self._in_head and not self._head_bytes and not self._target and not self._upgraded

    @property
    def awaits_body(self) -> bool:
        """Whether the latest head's body is still to come, in whole or part."""
        return not self._in_head

    def close(self) -> None:
        """Let go of parser and sink, which refer back: no cycle is left for the collector."""
        self._parser = None  # type: ignore[assignment]  # nothing is fed any more
        self._sink = None  # type: ignore[assignment]

    def feed(self, data: bytes) -> bytes:
        """Take what the client sent. If the sink sets `is_held` meanwhile, returns what is left of it, to be fed first.

        Raises ProxyError (source downstream) with the code that says what was wrong.
        """
        is_upgraded = self._upgraded  # a local: the parser changes it below, which a type checker does not see
        if is_upgraded:
            self._sink.on_upgrade_bytes(data)
            return b""
        if self._remaining:
            data = self._take_body(data)
            if not data:
                return b""
        if len(data) > _HEAD_SLICE and self._gathered is None:
            return self._feed_slices(data)
        if self._last and self._in_head and data.strip(b"\r\n"):
            raise _bad("data after `Connection: close`")
        before, seen = None, 0
        known = self._known
        if known is not None:
            if data.endswith(known.tail) and self._meets(known, data):
                return b""
            self._known = None
        is_first = self.is_between_requests
        while True:
            if self._in_head:
                self._head_bytes += len(data)
            else:
                before, seen = self._head, self._body_seen
                self._overhead += len(data)
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as switch:
                data = data[switch.args[0] :]
                if self._upgraded:
                    if data:
                        self._sink.on_upgrade_bytes(data)
                    return b""
                if data:
                    continue  # an upgrade that is not passed on: what follows is the next request
            except httptools.HttpParserCallbackError as error:
                cause = error.__context__
                if isinstance(cause, ProxyError):
                    raise cause from None
                raise
            except httptools.HttpParserInvalidMethodError as error:
                raise ProxyError(Code.METHOD_UNKNOWN, Source.DOWNSTREAM, detail=str(error)) from None
            except httptools.HttpParserError as error:
                raise _bad(str(error)) from None
            break
        self._learn(data, is_first)
        if self._in_head:
            if self._head_bytes > self._limits.max_head_bytes:
                raise ProxyError(Code.HEAD_TOO_LARGE, Source.DOWNSTREAM, detail="the head is larger than allowed")
        elif (head := self._head) is not None:
            if head.length > 0:
                self._remaining = head.length - self._body_seen
                self._parser = httptools.HttpRequestParser(self)
                self._last = not head.keep_alive
            elif head is not before:
                self._body_seen = self._chunks = 0  # what came with the head is no credit for what follows
            else:
                self._dry = self._dry + len(data) if self._body_seen == seen else 0
                chunks, body = self._chunks, self._body_seen
                framing = self._overhead - body - _CHUNK_FRAME * chunks - min(_CHUNK_PADDING * chunks, body)
                if self._dry > _DRY_MAX or framing > _EXTENSIONS_MAX:
                    raise _bad("chunk extensions or trailers without end")
        return b""

    def _learn(self, data: bytes, is_first: bool) -> None:
        """Remember a head that is all that was read. `is_first`: nothing of one came before of which this, though it
        looks like a head, could be the value of a field and what follows."""
        head, self._learnable = self._learnable, None
        if head is None or not is_first:
            return
        if data.startswith(head.line) and _ends_at(data, len(head.line)) == len(data):
            head.tail = data[len(head.line) :]
            self._known = head

    def _meets(self, known: _KnownRequest, data: bytes) -> bool:
        """Whether this is a request with the fields that are known, which is then told as any other."""
        line = _plain_line(data, 0, len(data) - len(known.tail))
        if line is None:
            return False
        method, target = line.groups()
        if len(data) > self._limits.max_head_bytes or len(target) > self._limits.max_target_bytes:
            return False
        head = RequestHead(None, known.lines)
        head.method = method
        head.target = target
        head.minor = 1
        head.authority = known.authority
        head.host = known.host
        self._learnings = _LEARNINGS
        self._head = head
        self._in_head = False
        self._head_bytes = len(data)
        self._sink.on_head(head)
        self.on_message_complete()
        return True

    def _offer(self, head: RequestHead) -> None:
        self._learnings -= 1
        self._learnable = _KnownRequest(head)

    def _feed_slices(self, data: bytes) -> bytes:
        """A long read, a slice at a time: bounds are looked at between two, and the sink may say that it is enough."""
        gathered: list[bytes] = []
        self._gathered = gathered
        at, end = 0, len(data)
        try:
            while at < end and not self.is_held:
                size = self._remaining
                if size:
                    self._give_gathered(gathered)
                    self._take_body(data[at : at + size])
                else:
                    size = end if self._upgraded else _HEAD_SLICE if self._in_head else _BODY_SLICE
                    self.feed(data[at : at + size])
                at += size
        finally:
            self._gathered = None
            self._give_gathered(gathered)
        return data[at:]

    def _give_gathered(self, gathered: list[bytes]) -> None:
        if gathered:
            body = gathered[0] if len(gathered) == 1 else b"".join(gathered)
            gathered.clear()
            self._sink.on_body(body)

    def _take_body(self, data: bytes) -> bytes:
        size = len(data)
        if size < self._remaining:
            self._remaining -= size
            self._sink.on_body(data)
            return b""
        rest = data[self._remaining :]
        body = data[: self._remaining] if rest else data
        self._remaining = 0
        self._sink.on_body(body)
        self.on_message_complete()
        return rest

    # --- called by the parser

    def on_url(self, piece: bytes) -> None:
        self._target += piece
        if len(self._target) > self._limits.max_target_bytes:
            raise ProxyError(Code.TARGET_TOO_LONG, Source.DOWNSTREAM, detail="the request target is too long")

    def on_header(self, name: bytes, value: bytes) -> None:
        # called for every field: a passed one costs a look-up and one extend
        kind = self._kinds.get(name)
        if kind is None:
            kind = self._rules.judge(name)
        if not self._in_head:
            self._on_trailer(kind, name, value)
        elif kind == _PASSED:
            self._add((name, b": ", value, b"\r\n"))
        elif kind != _DROPPED:
            self._on_special(kind, name, value)

    def _on_trailer(self, kind: int, name: bytes, value: bytes) -> None:
        if kind in (_HOST, _LENGTH, _ENCODING, _REFUSED):  # merged, they would frame or route anew
            raise _bad("a trailer that may not be one")
        self._trailers.append((name, value))
        if len(self._trailers) > self._limits.max_headers:
            raise _bad("too many trailer fields")

    def _on_special(self, kind: int, name: bytes, value: bytes) -> None:
        if kind == _HOST:
            if self._authority is not None:
                raise _bad("two Host fields")
            self._authority = value
            self._add((name, b": ", value, b"\r\n"))
            return
        self._special = True
        if kind == _NOTED:
            self._note(name.lower(), value)
            self._add((name, b": ", value, b"\r\n"))
        elif kind == _LENGTH:
            self._length = length = _length_of(value)
            if length < 0:
                raise _bad("a Content-Length of 2^63 or more")
        elif kind == _ENCODING:
            if value.lower() != b"chunked" or self._length == CHUNKED:
                raise _bad("a Transfer-Encoding other than one `chunked`")
            self._length = CHUNKED
        elif kind == _CONNECTION:
            if value not in _USUAL_CONNECTION:
                self._connection |= _tokens(value)
                self._closes = self._closes or _names_close(value)
            elif value in _CLOSE:
                self._closes = True
        elif kind == _UPGRADE:
            self._upgrade = value if self._upgrade is None else self._upgrade + b", " + value
        elif kind == _EXPECT:
            if value.lower() != b"100-continue":
                raise ProxyError(Code.EXPECTATION_FAILED, Source.DOWNSTREAM, detail="an Expect we do not know")
            if self._parser.get_http_version() == "1.1":  # RFC 9110 §10.1.1: ignored in HTTP/1.0
                self._expects = True
                self._add((name, b": ", value, b"\r\n"))
        elif kind == _TAKEN:
            self._note(name.lower(), value)
        else:
            raise _bad("a field name that may not pass")

    def _note(self, lower: bytes, value: bytes) -> None:
        if self._noted is None:
            self._noted = []
        self._noted.append((lower, value))

    def on_headers_complete(self) -> None:
        parser = self._parser
        passed = self._passed
        head = RequestHead(passed)
        head.method = parser.get_method()
        if head.method in _NOT_SERVED:
            raise ProxyError(Code.METHOD_UNKNOWN, Source.DOWNSTREAM, detail="a method that is not served")
        head.keep_alive = keep_alive = parser.should_keep_alive()
        # kept without a Connection field: that is HTTP/1.1 (asking for the version costs 0.2 us)
        head.minor = minor = 1 if keep_alive and not self._special else self._minor_version()
        limits = self._limits
        if len(passed) > 4 * limits.max_headers:
            raise ProxyError(Code.HEAD_TOO_LARGE, Source.DOWNSTREAM, detail="too many header fields")
        # one read may hold several heads: only what is over in sum is summed up
        if (
            self._head_bytes + self._carried > limits.max_head_bytes
            and sum(map(len, passed)) + len(self._target) > limits.max_head_bytes
        ):
            raise ProxyError(Code.HEAD_TOO_LARGE, Source.DOWNSTREAM, detail="the head is larger than allowed")
        authority = self._authority
        if authority is None:
            raise _bad("no Host field")
        head.authority = authority
        head.host = _hosts.get(authority) or normalize_host(authority)
        target = self._target
        head.target = target = target if target[:1] == b"/" else _reduce_target(target, head)
        if b"#" in target:
            raise _bad("a fragment in the request target")
        if self._special:
            self._take_special(head, minor)
        elif self._learnings and keep_alive:
            self._offer(head)
        self._head = head
        self._in_head = False
        self._body_seen = 0
        self._chunks = 0
        self._overhead = 0
        self._dry = 0
        # for the head that comes next
        self._target = b""
        self._passed = []
        self._add = self._passed.extend
        self._authority = None
        self._sink.on_head(head)

    def _minor_version(self) -> int:
        version = self._parser.get_http_version()
        if version == "1.1":
            return 1
        if version == "1.0":
            return 0
        raise ProxyError(Code.VERSION_UNSUPPORTED, Source.DOWNSTREAM, detail=f"HTTP/{version}")

    def _take_special(self, head: RequestHead, minor: int) -> None:
        """What framing and steering fields say, and their reset for the head that comes next."""
        head.length = length = self._length
        if length == CHUNKED and not minor:
            raise _bad("a Transfer-Encoding in HTTP/1.0")
        if self._closes and not minor:
            head.keep_alive = False  # for the parser, a keep-alive beside it wins in HTTP/1.0; RFC 9112 §9.3
        head.listed_hops = self._connection
        head.noted = self._noted or _NOTHING
        head.expects_continue = self._expects
        if self._upgrade is not None and self._parser.should_upgrade():
            if length:
                raise _bad("an upgrade with a body")  # the parser would take the body for what follows
            if minor and (protocol := _served_upgrade(self._upgrade)) is not None:
                head.upgrade = protocol
                self._upgraded = True
        is_plain = not (length or self._upgrade is not None or head.listed_hops or head.noted or head.expects_continue)
        if is_plain and minor and head.keep_alive and self._learnings:
            self._offer(head)
        self._special = False
        self._length = 0
        self._connection = _NO_HOPS
        self._closes = False
        self._upgrade = None
        self._expects = False
        self._noted = None

    def on_body(self, data: bytes) -> None:
        self._body_seen += len(data)
        if self._gathered is None:
            self._sink.on_body(data)
        else:
            self._gathered.append(data)

    def on_chunk_header(self) -> None:
        self._chunks += 1

    def on_message_complete(self) -> None:
        head, self._head = self._head, None
        self._in_head = True
        self._carried = self._head_bytes + self._overhead
        self._head_bytes = 0
        if head is not None and head.length:  # a request without a body was whole with its head
            if self._gathered:
                self._give_gathered(self._gathered)
            trailers = self._trailers
            if trailers:
                self._trailers = []
            self._sink.on_end(trailers)


def _reduce_target(target: bytes, head: RequestHead) -> bytes:
    """Origin-form of an absolute-form target, whose authority must be the Host's (RFC 9112 §3.2.2)."""
    if target == b"*" and head.method == b"OPTIONS":
        return target
    scheme, separator, rest = target.partition(b"://")
    if not separator or scheme.lower() not in (b"http", b"https"):
        raise _bad("a request target in none of the known forms")
    cut = min((at for at in (rest.find(b"/"), rest.find(b"?")) if at >= 0), default=len(rest))
    if normalize_host(rest[:cut]) != head.host:
        raise _bad("a request target that names another host than Host does")
    path = rest[cut:]
    return path if path[:1] == b"/" else b"/" + path


class _KnownResponse:
    """The head of a final answer of known length that leaves the connection open. Made before the sink has the head."""

    __slots__ = ("data", "length", "lines", "reason", "server", "status", "upgrade")

    def __init__(self, head: ResponseHead) -> None:
        self.data = b""  # all of it, from the status line to the empty line
        self.lines = b"".join(head.passed)
        self.status = head.status
        self.reason = head.reason
        self.server = head.server
        self.upgrade = head.upgrade
        self.length = head.length

    def again(self) -> ResponseHead:
        head = ResponseHead(None, self.lines)
        head.status = self.status
        head.reason = self.reason
        head.server = self.server
        head.upgrade = self.upgrade
        head.length = self.length
        return head


class ResponseReader:
    """The machine's side of a connection. `expect` before each request says what was asked."""

    __slots__ = (
        "_add",
        "_body_seen",
        "_connection",
        "_dry",
        "_ended",
        "_has_begun",
        "_head",
        "_head_bytes",
        "_head_only",
        "_in_head",
        "_interims",
        "_kinds",
        "_known",
        "_learnable",
        "_learnings",
        "_length",
        "_limits",
        "_noted",
        "_parser",
        "_passed",
        "_reason",
        "_remaining",
        "_rules",
        "_server",
        "_trailers",
        "_upgrade",
        "_upgraded",
        "sink",
    )

    def __init__(self, sink: ResponseSink, limits: Limits, rules: FieldRules = PASS_ALL_BACK) -> None:
        self.sink = sink  # may be replaced between exchanges
        self._limits = limits
        self._rules = rules
        self._kinds = rules.kinds
        self._parser = httptools.HttpResponseParser(self)
        self._head: ResponseHead | None = None
        self._in_head = True
        self._head_bytes = 0
        self._head_only = False
        self._interims = 0
        self._remaining = 0
        self._body_seen = 0
        self._dry = 0
        self._ended = False  # a final answer was whole within the read under way
        self._known: _KnownResponse | None = None  # as the other reader's
        self._learnings = _LEARNINGS
        self._has_begun = False  # the parser has had some byte of an answer, or of a 1xx, and not its end
        self._learnable: _KnownResponse | None = None  # the latest head of the read under way, if it may be learned
        self._trailers: Headers = []
        self._upgraded = False
        self._reason = b""
        self._passed: list[bytes] = []
        self._add = self._passed.extend
        self._length: int | None = None
        self._connection: frozenset[bytes] = _NO_HOPS
        self._upgrade = b""
        self._server: tuple[bytes, bytes] | None = None
        self._noted: list[tuple[bytes, bytes]] | None = None

    def expect(self, head_only: bool) -> None:
        """A request was sent; `head_only` if it was HEAD, whose answer has no body whatever its fields say."""
        self._head_only = head_only
        self._interims = 0

    @property
    def ends_with_connection(self) -> bool:
        """Whether the body under way is delimited by the end of the connection."""
        return self._head is not None and self._head.length == UNTIL_CLOSE

    def close(self) -> None:
        """Let go of parser and sink, which refer back: no cycle is left for the collector."""
        self._parser = None  # type: ignore[assignment]  # nothing is fed any more
        self.sink = None  # type: ignore[assignment]

    def feed(self, data: bytes) -> None:
        """Take what the machine sent.

        Raises ProxyError(RESPONSE_INVALID, upstream) for anything that is not one HTTP/1 response after another.
        """
        is_upgraded = self._upgraded  # a local: the parser changes it below, which a type checker does not see
        if is_upgraded:
            self.sink.on_upgrade_bytes(data)
            return
        if self._remaining:
            size = len(data)
            if size < self._remaining:
                self._remaining -= size
                self.sink.on_response_body(data)
                return
            if size > self._remaining:
                raise _invalid("bytes after the end of the response")
            self._remaining = 0
            self.sink.on_response_body(data)
            self.on_message_complete()
            return
        known = self._known
        if known is not None:
            if not self._head_only and data.startswith(known.data) and self._meets(known, data):
                return
            self._known = None
        seen = self._body_seen
        is_first = not self._has_begun
        if self._in_head:
            self._head_bytes += len(data)
        self._ended = False
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as switch:
            rest = data[switch.args[0] :]
            if not self._upgraded:
                raise _invalid("an upgrade that was not asked for") from None
            if rest:
                self.sink.on_upgrade_bytes(rest)
            return
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            if isinstance(cause, ProxyError):
                raise cause from None
            raise
        except httptools.HttpParserError as error:
            raise _invalid(str(error)) from None
        self._learn(data, is_first)
        head = self._head
        if self._in_head:
            if self._head_bytes > self._limits.max_head_bytes:
                raise _invalid("the response head is larger than allowed")
        elif head is not None:
            if self._head_only:
                self._parser = httptools.HttpResponseParser(self)
                self.on_message_complete()
            elif head.length > 0:
                self._remaining = head.length - self._body_seen
                self._parser = httptools.HttpResponseParser(self)
            elif head.length == CHUNKED:
                self._dry = self._dry + len(data) if self._body_seen == seen else 0
                if self._dry > _DRY_MAX:
                    raise _invalid("chunk framing or trailers without end")

    def _learn(self, data: bytes, is_first: bool) -> None:
        """Remember a head with which the read began. `is_first`: the parser had nothing before of which this, though it
        looks like a head, could be the value of a field and what follows."""
        head, self._learnable = self._learnable, None
        if head is None or not is_first:
            return
        line = b"HTTP/1.1 %d %b\r\n" % (head.status, head.reason)
        end = _ends_at(data, len(line) - 2)
        if data.startswith(line) and 0 < end <= _KNOWN_MAX and len(data) - end <= head.length:
            head.data = data[:end]
            self._known = head

    def _meets(self, known: _KnownResponse, data: bytes) -> bool:
        """Whether this is an answer with the head that is known, which is then told as any other."""
        body = data[len(known.data) :]
        if len(body) > known.length:
            return False
        self._learnings = _LEARNINGS
        self._head = head = known.again()
        self._in_head = False
        self._body_seen = len(body)
        self._ended = False
        self.sink.on_response_head(head)
        if body:
            self.sink.on_response_body(body)
        if len(body) == known.length:
            self.on_message_complete()
        else:
            self._remaining = known.length - len(body)
        return True

    @property
    def has_answer(self) -> bool:
        """Whether the head of a final response has been read and its end has not."""
        return self._head is not None and self._head.status >= 200

    def feed_eof(self) -> bool:
        """The machine closed. True if that is the proper end of the response under way, which is then reported."""
        if self._head is not None and self._head.length == UNTIL_CLOSE and not self._in_head:
            self.on_message_complete()
            return True
        return False

    # --- called by the parser

    def on_message_begin(self) -> None:
        self._has_begun = True
        if self._ended:  # no answer can come in the read that ended the one before: its request had not been sent
            raise _invalid("bytes after the end of the response")

    def on_status(self, piece: bytes) -> None:
        self._reason += piece

    def on_header(self, name: bytes, value: bytes) -> None:
        kind = self._kinds.get(name)
        if kind is None:
            kind = self._rules.judge(name)
        if not self._in_head:
            self._trailers.append((name, value))
            if len(self._trailers) > self._limits.max_headers:
                raise _invalid("too many trailer fields")
        elif kind == _PASSED:
            self._add((name, b": ", value, b"\r\n"))
        elif kind == _LENGTH:
            self._length = length = _length_of(value)
            if length < 0:
                raise _invalid("a Content-Length of 2^63 or more")
        elif kind != _DROPPED:
            self._on_special(kind, name, value)

    def _on_special(self, kind: int, name: bytes, value: bytes) -> None:
        if kind == _TYPE:
            self._add((name, b": ", value, b"\r\n"))
            if value[:31].lower() == REPLAY_TYPE and value[31:32] in (b"", b";", b" "):
                self._note(b"content-type", value)
        elif kind == _SERVER:
            self._server = (name, value)
        elif kind == _TAKEN:
            self._note(name.lower(), value)
        elif kind == _ENCODING:
            if value.lower() != b"chunked" or self._length == CHUNKED or self._parser.get_http_version() != "1.1":
                raise _invalid("a Transfer-Encoding other than one `chunked` in HTTP/1.1")
            self._length = CHUNKED
        elif kind == _CONNECTION:
            if value not in _USUAL_CONNECTION:
                self._connection |= _tokens(value)
        elif kind == _UPGRADE:
            self._upgrade = value
        else:
            raise _invalid("a field name that may not pass")

    def _note(self, lower: bytes, value: bytes) -> None:
        if self._noted is None:
            self._noted = []
        self._noted.append((lower, value))

    def on_headers_complete(self) -> None:
        parser = self._parser
        passed = self._passed
        head = ResponseHead(passed)
        head.status = status = parser.get_status_code()
        head.reason = reason = self._reason
        if reason not in _USUAL_REASONS and not _is_text(reason):
            raise _invalid("control characters in the reason")
        head.server = self._server
        head.upgrade = self._upgrade
        if len(passed) > 4 * self._limits.max_headers:
            raise _invalid("too many header fields")
        length = self._length
        head.listed_hops = self._connection
        head.noted = self._noted or _NOTHING
        if status < 200:
            head.length = 0
            self._interims += 1
            if self._interims > _INTERIMS_MAX:
                raise _invalid("1xx without end")
        elif status == 204:
            head.length = 0
        elif self._head_only or status == 304:
            head.length = length if length is not None and length >= 0 else UNTIL_CLOSE
        else:
            head.length = UNTIL_CLOSE if length is None else length
        head.keep_alive = parser.should_keep_alive()
        if status == 101:
            if not parser.should_upgrade() or length or _served_upgrade(head.upgrade) != head.upgrade:
                raise _invalid("a 101 that names no protocol to switch to, or has a body")
            self._upgraded = True
        elif status < 100 or status > 599:
            raise _invalid(f"status {status}")
        elif self._learnings and length is not None and length >= 0 and status >= 200:
            is_plain = not (self._head_only or head.listed_hops or head.noted or status in (204, 304))
            if is_plain and head.keep_alive:
                self._learnings -= 1
                self._learnable = _KnownResponse(head)
        self._head = head
        self._in_head = False
        self._body_seen = 0
        self._dry = 0
        # for the head that comes next
        self._reason = b""
        self._passed = []
        self._add = self._passed.extend
        self._length = None
        self._connection = _NO_HOPS
        self._upgrade = b""
        self._server = None
        self._noted = None
        self.sink.on_response_head(head)

    def on_body(self, data: bytes) -> None:
        if self._head_only:
            raise _invalid("a body after the answer to HEAD")
        self._body_seen += len(data)
        self.sink.on_response_body(data)

    def on_message_complete(self) -> None:
        if self._in_head:
            return
        trailers = self._trailers
        if trailers:
            self._trailers = []
        head = self._head
        self._in_head = True
        self._has_begun = False
        self._head_bytes = 0
        self._head = None
        if head is not None and head.status >= 200:
            self._ended = True
            self.sink.on_response_end(trailers)


def _invalid(detail: str) -> ProxyError:
    return ProxyError(Code.RESPONSE_INVALID, Source.UPSTREAM, Retry.NEVER, detail)
