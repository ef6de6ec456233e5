"""One question to one name server: over UDP, again over TCP if the answer did not fit, bounded in time and size.

Speaks to whoever the zone's owner names, so takes nothing on trust: each question has its own port and random id,
packets that do not fit it are passed over (a few), and an answer is read only up to a size that honest ones stay below.
"""

from __future__ import annotations

import asyncio
import ipaddress
import random
import socket
import struct
from dataclasses import dataclass

import dns.edns
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype

from certs.look import Outcome

UDP_PAYLOAD_BYTES = 1232  # DNS flag day 2020: passes everywhere without fragments
ANSWER_MOST_BYTES = 16_384  # of one over TCP; records that certificates need take a few hundred
_RECORDS_MOST = 256  # in all sections; a referral of the root has 40
_SEND_AGAIN_S = 1.0  # a packet may be lost
_STRAYS_MOST = 16  # packets that do not answer the question, before we stop listening
_BOGUS = frozenset({1, 2, 5, 6, 7, 8, 9, 10, 11, 12})  # extended errors of DNSSEC, RFC 8914 §4


@dataclass(frozen=True, slots=True)
class Server:
    """Where to ask. `name` is for people: the NS record's, or "" for a server that was configured."""

    address: str
    port: int
    name: str = ""

    def __str__(self) -> str:
        where = f"[{self.address}]" if ":" in self.address else self.address
        where = where if self.port == 53 else f"{where}:{self.port}"
        return f"{self.name} ({where})" if self.name else where


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back. `message` is there if the outcome is ANSWERS: it may still be a denial or a referral."""

    outcome: Outcome
    message: dns.message.Message | None = None
    detail: str = ""


def parse_server(text: str) -> Server:
    """ "192.0.2.1:53" or "[2001:db8::1]:53" or a bare address. Raises ValueError that names what is wrong."""
    host, colon, port = text.rpartition(":")
    if not colon or (":" in host and not host.startswith("[")):
        host, port = text, "53"
    try:
        address = str(ipaddress.ip_address(host.strip("[]")))
        number = int(port)
    except ValueError:
        raise ValueError(f"{text[:80]!r} is not the address of a name server: expected IP or IP:PORT") from None
    if not 0 < number < 65_536:
        raise ValueError(f"{text[:80]!r}: {number} is not a port")
    return Server(address, number)


async def ask(
    server: Server, name: dns.name.Name, rdtype: dns.rdatatype.RdataType, timeout_s: float, *, recurse: bool = False,
    is_signed: bool = False, check_dnssec: bool = True,
) -> Reply:  # fmt: skip
    """Ask once. Takes `timeout_s` at the most and raises nothing but CancelledError.

    `recurse`: ask for recursion (RD), as resolvers need; `is_signed`: for signatures as well (DO); `check_dnssec`
    False: ask a resolver for data that it could not validate (CD).
    """
    query = dns.message.make_query(
        name,
        rdtype,
        use_edns=0,
        payload=UDP_PAYLOAD_BYTES,
        want_dnssec=is_signed,
        id=random.SystemRandom().randrange(65_536),
    )
    query.flags = (dns.flags.RD if recurse else 0) | (0 if check_dnssec else dns.flags.CD)
    try:
        async with asyncio.timeout(timeout_s) as limit:
            reply = await _exchange(server, query, limit)
            if reply.message is not None and reply.message.rcode() in (dns.rcode.FORMERR, dns.rcode.NOTIMP):
                query.use_edns(False)  # old servers know no EDNS (RFC 6891 §6.2.2)
                reply = await _exchange(server, query, limit)
            return _judged(reply, server)
    except TimeoutError:
        return Reply(Outcome.TIMEOUT, detail=f"{server} did not answer within {timeout_s:.1f} s")
    except (OSError, UnicodeError) as error:
        return Reply(Outcome.UNREACHABLE, detail=f"{server}: {getattr(error, 'strerror', None) or error}")


def _judged(reply: Reply, server: Server) -> Reply:
    if reply.message is None:
        return reply
    rcode = reply.message.rcode()
    if rcode in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
        return reply
    said = f"{server} answered {dns.rcode.to_text(rcode)}"
    outcome = Outcome.REFUSED if rcode is dns.rcode.REFUSED else Outcome.SERVFAIL
    for option in reply.message.options:
        if isinstance(option, dns.edns.EDEOption):
            code = getattr(option.code, "name", f"extended error {int(option.code)}").replace("_", " ").lower()
            text = printable(option.text or "", 100)
            said += f" ({code}{': ' + text if text else ''})"
            if outcome is Outcome.SERVFAIL and int(option.code) in _BOGUS:
                outcome = Outcome.BOGUS
    return Reply(outcome, detail=said)


async def _exchange(server: Server, query: dns.message.Message, limit: asyncio.Timeout) -> Reply:
    wire = query.to_wire()
    reply = await _over_udp(server, query, wire, limit)
    if reply is not None:
        return reply
    return await _over_tcp(server, query, wire)


class _Listener(asyncio.DatagramProtocol):
    """Waits for the one packet that answers the query."""

    def __init__(self, query: dns.message.Message, server: Server) -> None:
        self._query = query
        self._server = server
        self._strays = 0
        self.last_stray: Reply | None = None
        self.done: asyncio.Future[Reply | None] = asyncio.get_running_loop().create_future()  # None: cut short

    def datagram_received(self, data: bytes, addr: tuple[str | int, ...]) -> None:
        if self.done.done():
            return
        if len(data) >= 12 and data[:2] == self._query.id.to_bytes(2, "big") and data[2] & 0x82 == 0x82:
            self.done.set_result(None)  # QR and TC
            return
        reply = _read(data, self._query, self._server)
        if reply.message is not None:
            self.done.set_result(reply)
            return
        self._strays += 1
        self.last_stray = reply
        if self._strays >= _STRAYS_MOST:
            self.done.set_result(reply)

    def error_received(self, exc: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(exc)


async def _over_udp(server: Server, query: dns.message.Message, wire: bytes, limit: asyncio.Timeout) -> Reply | None:
    """The reply, or None if it was cut short."""
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if ":" in server.address else socket.AF_INET
    transport, listener = await loop.create_datagram_endpoint(
        lambda: _Listener(query, server), remote_addr=(server.address, server.port), family=family
    )
    try:
        # a packet that does not fit may be a stranger's: the true one is waited for, but what came is told
        until = (limit.when() or 0.0) - 0.02
        while (left_s := until - loop.time()) > 0:
            transport.sendto(wire)
            await asyncio.wait((listener.done,), timeout=min(left_s, _SEND_AGAIN_S))
            if listener.done.done():
                return listener.done.result()
        if listener.last_stray is None:
            raise TimeoutError
        return listener.last_stray
    finally:
        transport.abort()
        if listener.done.done() and not listener.done.cancelled():
            listener.done.exception()  # seen, should nobody wait any more


async def _over_tcp(server: Server, query: dns.message.Message, wire: bytes) -> Reply:
    reader, writer = await asyncio.open_connection(server.address, server.port, limit=ANSWER_MOST_BYTES)
    try:
        writer.write(struct.pack("!H", len(wire)) + wire)
        (length,) = struct.unpack("!H", await reader.readexactly(2))
        if length > ANSWER_MOST_BYTES:
            return Reply(Outcome.MALFORMED, detail=f"{server} sent an answer of {length} bytes")
        return _read(await reader.readexactly(length), query, server)
    except asyncio.IncompleteReadError:
        return Reply(Outcome.MALFORMED, detail=f"{server} ended the connection within its answer")
    finally:
        writer.transport.abort()


def _read(data: bytes, query: dns.message.Message, server: Server) -> Reply:
    if len(data) > ANSWER_MOST_BYTES:
        return Reply(Outcome.MALFORMED, detail=f"{server} sent {len(data)} bytes at once")
    # what is dear to read is made of many small records: 16 KiB of them took 180 ms
    if len(data) >= 12 and (records := sum(struct.unpack("!4H", data[4:12]))) > _RECORDS_MOST:
        return Reply(Outcome.MALFORMED, detail=f"{server} sent an answer of {records} records")
    try:
        message = dns.message.from_wire(data, ignore_trailing=True)
    except (dns.exception.DNSException, ValueError, struct.error) as error:
        return Reply(Outcome.MALFORMED, detail=f"{server} sent what is not DNS: {printable(str(error), 100)}")
    if not query.is_response(message):
        return Reply(Outcome.MALFORMED, detail=f"{server} answered another question than was asked")
    return Reply(Outcome.ANSWERS, message)


def printable(text: str, most: int = 255) -> str:
    """The text as one line of printable ASCII, cut."""
    cut = text if len(text) <= most else text[: most - 3] + "..."
    return "".join(c if " " <= c <= "~" else f"\\x{ord(c):02x}" for c in cut)
