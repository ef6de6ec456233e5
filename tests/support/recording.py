"""An origin that keeps the exact bytes it was sent, per connection, and counts what it has in hand at once.

It runs in a thread of the test's process. It frames by the narrowest reading of RFC 9112 §6: what our own edge is
allowed to write and nothing else. Whatever is outside of that goes to `faults`, which no attack may fill.

    origin.respond = my_coroutine          how requests are answered; the default is 200 with the body "ok"
    origin.hold(); ...; origin.release()   the default answer waits meanwhile
    for request in origin.take(): ...      what has come since the last look
"""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import SupportsIndex

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
_REQUEST_LINE = re.compile(rb"[A-Z-]+ (/[!-~]*|\*) HTTP/1\.1")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+): ?([\t -~\x80-\xff]*)")


@dataclass
class Seen:
    """One request as it came: `raw` is every byte of it, head and framed body."""

    connection: int
    head: bytes
    body: bytes = b""
    trailers: bytes = b""
    raw: bytes = b""

    @property
    def method(self) -> str:
        return self.head.split(b" ", 1)[0].decode()

    @property
    def target(self) -> str:
        return self.head.split(b" ", 2)[1].decode("latin-1")

    @property
    def fields(self) -> list[tuple[str, str]]:
        """Names in lower case."""
        lines = [line.partition(b":") for line in self.head[:-4].split(b"\r\n")[1:]]
        return [(name.lower().decode("latin-1"), value.strip().decode("latin-1")) for name, _, value in lines]

    def all(self, name: str) -> list[str]:
        return [value for one, value in self.fields if one == name]


@dataclass
class Recorded:
    """One connection: all its bytes, and whether it is over."""

    number: int
    data: bytearray
    ended: bool = False


class Fault(Exception):
    """What came is not what our edge may write."""


Respond = Callable[[Seen, asyncio.StreamWriter], Awaitable[None]]


class RecordingOrigin:
    """Listens from its creation until `close`."""

    def __init__(self) -> None:
        self.respond: Respond = self._answer_ok
        self.respond_before_body = False  # answer as soon as the head is there; the body is read afterwards
        self.requests: list[Seen] = []  # whole ones, since the last `take`
        self.connections: list[Recorded] = []
        self.faults: list[str] = []
        self.in_flight = 0
        self.peak_in_flight = 0
        self.count = 0  # of requests whose head has come, ever
        self.port = 0
        self._made = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._lock = threading.Lock()
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="recording-origin", daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    def __enter__(self) -> RecordingOrigin:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    # --- the test's thread

    def take(self) -> list[Seen]:
        """The requests that have come whole since the last call."""
        with self._lock:
            taken, self.requests = self.requests, []
        return taken

    def wait_count(self, count: int, seconds: float = 10.0) -> None:
        """Until so many heads have come in all."""
        deadline = time.monotonic() + seconds
        while self.count < count:
            assert time.monotonic() < deadline, f"{self.count} of {count} requests came within {seconds:g} s"
            time.sleep(0.002)

    def hold(self) -> None:
        """From now on the default answer waits for `release`."""
        self._call(self._open.clear)

    def release(self) -> None:
        self._call(self._open.set)

    def forget(self) -> None:
        """Drop what is on record, and count the peak anew. Connections that are open go on."""
        with self._lock:
            self.requests = []
            self.connections = [one for one in self.connections if not one.ended]
            self.faults.clear()
            self.peak_in_flight = self.in_flight

    def reset(self) -> None:
        """`forget`, and answer by default again."""
        self.respond = self._answer_ok
        self.respond_before_body = False
        self.release()
        self.forget()

    def close(self) -> None:
        self._call(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _call(self, what: Callable[[], None]) -> None:
        done = threading.Event()

        def act() -> None:
            what()
            done.set()

        self._loop.call_soon_threadsafe(act)
        assert done.wait(10), "the origin's loop hangs"

    # --- the origin's thread

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._main())

    async def _main(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._stop = asyncio.Event()
        server = await self._loop.create_server(self._make_protocol, "127.0.0.1", 0, backlog=4096)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _make_protocol(self) -> asyncio.Protocol:
        return asyncio.StreamReaderProtocol(_RecordingReader(self._loop), self._serve, self._loop)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None and isinstance(reader, _RecordingReader)
        self._tasks.add(task)
        record = Recorded(self._made, reader.all)
        self._made += 1
        with self._lock:
            self.connections.append(record)
        tape = _Tape(reader)
        try:
            while await self._serve_one(tape, record, writer):
                pass
        except Fault as fault:
            self.faults.append(f"{fault}: {bytes(tape.since)[:500]!r}")
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # an edge may give a connection up at any byte; what came of it is in the record
        except asyncio.CancelledError:
            pass  # the origin ends: nobody awaits this task
        finally:
            record.ended = True
            self._tasks.discard(task)
            writer.transport.abort()

    async def _serve_one(self, tape: _Tape, record: Recorded, writer: asyncio.StreamWriter) -> bool:
        tape.since.clear()
        head = await tape.until(b"\r\n\r\n")
        if head is None:
            return False
        seen = Seen(record.number, head)
        length = framing_of(head)
        self.count += 1
        self.in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)
        try:
            if self.respond_before_body:
                await self.respond(seen, writer)
            await self._read_body(tape, seen, length)
            seen.raw = bytes(tape.since)
            with self._lock:
                self.requests.append(seen)
            if not self.respond_before_body:
                await self.respond(seen, writer)
            await writer.drain()
        finally:
            self.in_flight -= 1
        return not writer.is_closing()

    async def _read_body(self, tape: _Tape, seen: Seen, length: int | None) -> None:
        if length is not None:
            seen.body = await tape.exactly(length)
            return
        while True:
            line = await tape.line()
            if not re.fullmatch(rb"[0-9a-fA-F]{1,16}", line):
                raise Fault(f"chunk size {line!r}")
            if not int(line, 16):
                break
            chunk = await tape.exactly(int(line, 16) + 2)
            if not chunk.endswith(b"\r\n"):
                raise Fault(f"chunk ends with {chunk[-2:]!r}")
            seen.body += chunk[:-2]
        while line := await tape.line():
            if not _FIELD.fullmatch(line):
                raise Fault(f"trailer {line!r}")
            seen.trailers += line + b"\r\n"

    async def _answer_ok(self, seen: Seen, writer: asyncio.StreamWriter) -> None:
        await self._open.wait()
        if seen.method == "HEAD":
            writer.write(OK[:-2])
        else:
            writer.write(OK)


class _RecordingReader(asyncio.StreamReader):
    """Keeps what comes when it comes, whether it is read or not."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(1 << 20, loop)
        self.all = bytearray()

    def feed_data(self, data: Iterable[SupportsIndex]) -> None:
        self.all += bytes(data)
        super().feed_data(data)


class _Tape:
    """Reads, and keeps what was read since the last request."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self.since = bytearray()

    def _keep(self, data: bytes) -> bytes:
        self.since += data
        return data

    async def until(self, end: bytes) -> bytes | None:
        """Up to and with `end`; None if the connection ends before anything came."""
        try:
            return self._keep(await self._reader.readuntil(end))
        except asyncio.IncompleteReadError as error:
            self._keep(error.partial)
            if not error.partial:
                return None
            raise

    async def exactly(self, size: int) -> bytes:
        try:
            return self._keep(await self._reader.readexactly(size))
        except asyncio.IncompleteReadError as error:
            self._keep(error.partial)
            raise

    async def line(self) -> bytes:
        found = await self.until(b"\r\n")
        if found is None:
            raise asyncio.IncompleteReadError(b"", None)
        return found[:-2]


def framing_of(head: bytes) -> int | None:
    """Bytes of the body, None: chunked. Raises Fault for a head that no edge of ours may write."""
    first, *lines = head[:-4].split(b"\r\n")
    if not _REQUEST_LINE.fullmatch(first):
        raise Fault(f"request line {first!r}")
    lengths, codings, hosts = [], [], 0
    for line in lines:
        found = _FIELD.fullmatch(line)
        if not found:
            raise Fault(f"field {line!r}")
        name, value = found[1].lower(), found[2].strip()
        hosts += name == b"host"
        if name == b"content-length":
            lengths.append(value)
        elif name == b"transfer-encoding":
            codings.append(value)
    if hosts != 1:
        raise Fault(f"{hosts} Host fields")
    if codings:
        if codings != [b"chunked"] or lengths:
            raise Fault(f"Transfer-Encoding {codings} with Content-Length {lengths}")
        return None
    if len(lengths) > 1 or (lengths and not re.fullmatch(rb"[0-9]{1,18}", lengths[0])):
        raise Fault(f"Content-Length {lengths}")
    return int(lengths[0]) if lengths else 0
