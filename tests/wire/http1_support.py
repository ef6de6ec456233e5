"""What tests of HTTP/1 share: sinks that write down what a reader reports, and independent parsers to compare with."""

from __future__ import annotations

import h11
import httptools

from proxy.decide.headers import REQUEST_RULES, RESPONSE_RULES, identity_fields, request_head, trailer_block
from proxy.errors import ProxyError
from proxy.wire.http1 import CHUNKED, UNTIL_CLOSE, Headers, Limits, RequestHead, RequestReader, ResponseHead
from proxy.wire.http1 import ResponseReader as _ResponseReader

Request = tuple[bytes, bytes, bytes]  # method, target, body
_LENGTHS = {CHUNKED: "chunked", UNTIL_CLOSE: "until-close"}


def _length(value: int) -> str:
    return _LENGTHS.get(value, str(value))


class Seen:
    """A sink. `events` is one line per event, body bytes between two others joined."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.heads: list[RequestHead] = []
        self.responses: list[ResponseHead] = []
        self.bodies: list[bytes] = []
        self.trailers: list[Headers] = []
        self.whole: list[bool] = []
        self.tunnel = b""
        self.error: ProxyError | None = None
        self._bytes = False

    def _say(self, line: str) -> None:
        self.events.append(line)
        self._bytes = False

    def _bytes_of(self, kind: str, data: bytes) -> None:
        text = data.decode("latin-1")
        if self._bytes:
            self.events[-1] += text
        else:
            self.events.append(f"{kind} {text}")
            self._bytes = True

    # requests

    def on_head(self, head: RequestHead) -> None:
        self.heads.append(head)
        self.bodies.append(b"")
        self.trailers.append([])
        self.whole.append(not head.length)
        line = f"{head.method.decode()} {head.target.decode('latin-1')} {head.host} {_length(head.length)}"
        line += " 1.0" if head.minor == 0 else ""
        line += "" if head.keep_alive else " last"
        line += f" upgrade={head.upgrade.decode('latin-1')}" if head.upgrade is not None else ""
        line += " expects" if head.expects_continue else ""
        self._say(line)

    def on_body(self, data: bytes) -> None:
        assert data
        self.bodies[-1] += data
        self._bytes_of("body", data)

    def on_end(self, trailers: Headers) -> None:
        self.trailers[-1] = trailers
        self.whole[-1] = True
        self._say("end" + "".join(f" {n.decode()}={v.decode('latin-1')}" for n, v in trailers))

    def on_upgrade_bytes(self, data: bytes) -> None:
        self.tunnel += data
        self._bytes_of("raw", data)

    # responses

    def on_response_head(self, head: ResponseHead) -> None:
        self.responses.append(head)
        line = f"{head.status} {head.reason.decode('latin-1')} {_length(head.length)}"
        line += "" if head.keep_alive else " last"
        line += f" upgrade={head.upgrade.decode('latin-1')}" if head.upgrade else ""
        self._say(line)

    def on_response_body(self, data: bytes) -> None:
        assert data
        self._bytes_of("body", data)

    def on_response_end(self, trailers: Headers) -> None:
        self._say("end" + "".join(f" {n.decode()}={v.decode('latin-1')}" for n, v in trailers))

    @property
    def requests(self) -> list[Request]:
        """The requests that came whole, to their end."""
        each = zip(self.heads, self.bodies, self.whole, strict=True)
        return [(head.method, head.target, body) for head, body, whole in each if whole]


def read_requests(*pieces: bytes, limits: Limits | None = None) -> Seen:
    """Feed a client's bytes, piece by piece, to a reader with the rules that are served; an error ends it."""
    seen = Seen()
    reader = RequestReader(seen, limits or Limits(), REQUEST_RULES)
    try:
        for piece in pieces:
            reader.feed(piece)
    except ProxyError as error:
        seen.error = error
        seen.events.append(f"refused {error.code.value}")
    return seen


def read_responses(*pieces: bytes, head_only: bool = False, eof: bool = False, limits: Limits | None = None) -> Seen:
    """As `read_requests`, for a machine's bytes. `eof` closes after them."""
    seen = Seen()
    reader = _ResponseReader(seen, limits or Limits(), RESPONSE_RULES)
    reader.expect(head_only)
    try:
        for piece in pieces:
            reader.feed(piece)
        if eof:
            seen.events.append("closed well" if reader.feed_eof() else "closed")
    except ProxyError as error:
        seen.error = error
        seen.events.append(f"refused {error.code.value}")
    return seen


def reframed(seen: Seen) -> bytes:
    """What a machine gets for the requests that came whole, as the exchange writes it."""
    out = b""
    for head, body, trailers, whole in zip(seen.heads, seen.bodies, seen.trailers, seen.whole, strict=True):
        if not whole:
            break
        identity = identity_fields("192.0.2.1", "192.0.2.2", 443, True, "ams", head.minor, keep=True)
        out += request_head(head, identity, b"01ARZ3NDEKTSV4RRFFQ69G5FAV", 1_700_000_000_000_000, b"00-1-2-00")
        if head.length == CHUNKED:
            out += (b"%x\r\n%b\r\n" % (len(body), body) if body else b"") + trailer_block(trailers)
        else:
            out += body
    return out


def h11_requests(data: bytes) -> tuple[list[Request], str | None]:
    """The requests that h11 finds in bytes, and why it refused what came after them, if it did."""
    if not data:
        return [], None  # to h11 no bytes are the end
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=200_000)
    found: list[Request] = []
    connection.receive_data(data)
    head: h11.Request | None = None
    body = b""
    while True:
        try:
            event = connection.next_event()
        except h11.RemoteProtocolError as error:
            return found, str(error)
        if event is h11.NEED_DATA or event is h11.PAUSED:
            return found, None
        if isinstance(event, h11.Request):
            head, body = event, b""
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            assert head is not None
            found.append((head.method, head.target, body))
            if connection.their_state not in (h11.DONE, h11.MUST_CLOSE):  # it may switch protocols
                return found, None
            connection.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
            connection.send(h11.EndOfMessage())
            if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                return found, None
            connection.start_next_cycle()


class _Bare:
    def __init__(self) -> None:
        self.found: list[Request] = []
        self.target = b""
        self.body = b""
        self.parser = httptools.HttpRequestParser(self)

    def on_message_begin(self) -> None:
        self.target = self.body = b""

    def on_url(self, piece: bytes) -> None:
        self.target += piece

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.found.append((self.parser.get_method(), self.target, self.body))


def httptools_requests(data: bytes) -> list[Request]:
    """The requests that bare httptools finds. Raises its own errors."""
    bare = _Bare()
    try:
        bare.parser.feed_data(data)
    except httptools.HttpParserUpgrade:
        pass
    return bare.found
