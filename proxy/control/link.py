"""Control's end of the links to workers: tables out, wakes in, and the soft-cordon handshake.

A worker connects, says who it is, and gets settings and the whole table in slices; changes that come meanwhile are
sent between the slices, which is right since each record is sent as it is at its turn. A worker that does not read is
dropped: it connects afresh and gets the table anew. What messages mean is left to the ones plugged in as `Requests`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol, cast

import msgspec

from proxy import ipc
from proxy.clock import Clock, spawn
from proxy.control.machines import Owned
from proxy.model import App, AppName, Machine, MachineId, MachineState
from proxy.state import SharedMemory

log = logging.getLogger(__name__)

MAX_UNREAD_BYTES = 16 * 1024 * 1024
CORDON_TIMEOUT_S = 2.0
_SLICE = 64  # apps sent between two turns of the loop
_SLICE_UNREAD_BYTES = 1024 * 1024
_DEAD_AFTER_S = 10.0  # the supervisor has replaced, and cleared the cells of, a worker whose beat is older


class Table(Protocol):
    """Where the records are (apps.py)."""

    def table_names(self) -> list[AppName]: ...

    @property
    def elsewhere(self) -> Callable[[], list[bytes]]:
        """Frames about the fleet's other nodes, and what apps have there."""

    def frame(self, name: AppName) -> bytes | None:
        """The AppSet frame of an app as it is now; None if it has gone."""


class Requests(Protocol):
    """Whoever answers workers (server.py)."""

    def wake(self, link: Link, message: ipc.Wake) -> None: ...

    def need_certificate(self, link: Link, name: str) -> None: ...

    def passive_failure(self, message: ipc.PassiveFailure) -> None: ...


@dataclass(slots=True)
class _Cordon:
    """One handshake: who has acknowledged, and the question for workers that connect meanwhile."""

    sequence: int
    frame: bytes
    done: asyncio.Future[None]
    acknowledged: set[int] = field(default_factory=set)


class Hub:
    """All links."""

    def __init__(self, listener: socket.socket, memory: SharedMemory, clock: Clock, settings: ipc.Settings) -> None:
        self._listener = listener
        self._memory = memory
        self._clock = clock
        self.settings = settings
        self._server: asyncio.Server | None = None
        self._links: dict[int, Link] = {}
        self._greeting: set[Link] = set()
        self._cordons: dict[MachineId, _Cordon] = {}
        self._sequence = 0
        self.on_linked: Callable[[int], None] = lambda slot: None

    async def start(self, table: Table, requests: Requests) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: Link(self, table, requests), sock=self._listener)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for link in [*self._links.values(), *self._greeting]:
            link.drop("control ends")
        if self._server is not None:
            await self._server.wait_closed()

    @property
    def linked(self) -> dict[int, int]:
        """Worker slot -> pid, of those that have a link."""
        return {slot: link.pid for slot, link in sorted(self._links.items())}

    # --- to all workers

    def set_app(self, frame: bytes) -> None:
        self._broadcast(frame)

    def remove_app(self, name: AppName) -> None:
        self._broadcast(ipc.encode(ipc.AppGone(name)))

    def set_machine(self, app: AppName, machine: Machine) -> None:
        if self._links:
            self._broadcast(ipc.encode(ipc.MachineSet(app, machine)))
        if machine.state is not MachineState.STARTING:
            for link in self._links.values():
                link.waiting.discard(machine.id)

    def set_settings(self, settings: ipc.Settings) -> None:
        self.settings = settings
        self._broadcast(ipc.encode(settings))

    def tell_all(self, message: ipc.Message) -> None:
        self._broadcast(ipc.encode(message))

    def _broadcast(self, frame: bytes) -> None:
        for link in list(self._links.values()):
            link.send_frame(frame)

    # --- soft cordon

    async def cordon(self, machine: Owned) -> bool:
        self._sequence += 1
        frame = ipc.encode(ipc.CordonAsk(machine.app.name, machine.id, self._sequence))
        cordon = _Cordon(self._sequence, frame, asyncio.get_running_loop().create_future())
        self._cordons[machine.id] = cordon
        for link in list(self._links.values()):
            if link.is_loaded:  # the others are asked when they are: what a table says of a machine lifts its cordon
                link.send_frame(frame)
        self._judge(cordon)
        try:
            async with asyncio.timeout(CORDON_TIMEOUT_S):
                await cordon.done
        except TimeoutError:
            missing = [row for row in range(self._memory.rows_in_use) if not self._agrees(cordon, row)]
            log.warning("no acknowledgement of the cordon of %s from workers %s", machine.id, missing)
            return False
        return True

    # --- first connections

    def hand_on(self, machine: Owned, internal_port: int, sock: socket.socket) -> None:
        """To one worker that has a request waiting. One that cannot take it at once makes a connection of its own."""
        handed = ipc.Handed(machine.id, machine.row.version, internal_port, self._clock.monotonic())
        message = ipc.encode_handed(handed)
        for link in self._links.values():
            if machine.id in link.waiting and link.hand_on(message, sock):
                return

    def lift(self, machine: Owned) -> None:
        """Workers may send to it again; who still waits for acknowledgements waits no longer."""
        if (cordon := self._cordons.pop(machine.id, None)) is not None:
            if not cordon.done.done():
                cordon.done.set_result(None)
            self._broadcast(ipc.encode(ipc.CordonLift(machine.app.name, machine.id)))

    def end_tunnels(self, machine: Owned) -> None:
        self._broadcast(ipc.encode(ipc.EndTunnels(machine.app.name, machine.id)))

    def _judge(self, cordon: _Cordon) -> None:
        """Done when every worker has acknowledged over its present link, or has no process for certain."""
        if not cordon.done.done() and all(self._agrees(cordon, row) for row in range(self._memory.rows_in_use)):
            cordon.done.set_result(None)

    def _agrees(self, cordon: _Cordon, slot: int) -> bool:
        return slot in cordon.acknowledged or self._is_dead(slot)

    def _is_dead(self, slot: int) -> bool:
        """No beat: nobody has that row, or who has it has only been forked, and serves nobody yet."""
        beat = self._memory.last_beat(1 + slot)
        return slot not in self._links and (not beat or self._clock.monotonic() - beat / 1e9 > _DEAD_AFTER_S)

    # --- called by links

    def greeting(self, link: Link) -> None:
        self._greeting.add(link)

    def hello(self, link: Link) -> None:
        self._greeting.discard(link)
        if (old := self._links.get(link.slot)) is not None:
            old.drop("the worker has connected afresh")
        self._links[link.slot] = link

    def loaded(self, link: Link) -> None:
        """It has the table: from here its acknowledgements count."""
        for cordon in self._cordons.values():
            link.send_frame(cordon.frame)
        self.on_linked(link.slot)

    def lost(self, link: Link) -> None:
        self._greeting.discard(link)
        if self._links.get(link.slot) is link:
            del self._links[link.slot]
            for cordon in self._cordons.values():
                cordon.acknowledged.discard(link.slot)

    def acknowledged(self, link: Link, message: ipc.CordonAck) -> None:
        cordon = self._cordons.get(message.machine)
        if cordon is not None and cordon.sequence == message.sequence and self._links.get(link.slot) is link:
            cordon.acknowledged.add(link.slot)
            self._judge(cordon)

    @property
    def rows(self) -> int:
        """A worker's slot is below this."""
        return self._memory.rows


class Link(asyncio.Protocol):
    """One worker's connection."""

    def __init__(self, hub: Hub, table: Table, requests: Requests) -> None:
        self._hub = hub
        self._table = table
        self._requests = requests
        self._frames = ipc.FrameReader()
        self._transport: asyncio.Transport | None = None
        self._room = asyncio.Event()
        self._room.set()
        self._loader: asyncio.Task[None] | None = None
        self.awaited: set[MachineId] = set()  # wakes whose end this worker is to be told
        self.waiting: set[MachineId] = set()  # those of them that a request waits for
        self._mailbox: socket.socket | None = None  # where the worker takes connections
        self.slot = -1
        self.pid = 0
        self.is_loaded = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        stream = cast(asyncio.Transport, transport)  # uvloop's are no subclass of it
        self._transport = stream
        self._hub.greeting(self)
        peer = stream.get_extra_info("socket")
        _, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid not in (os.geteuid(), 0):
            self.drop(f"it belongs to user {uid}")
            return
        stream.set_write_buffer_limits(high=_SLICE_UNREAD_BYTES)

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._frames.feed(data):
                self._hear(ipc.decode_to_control(body))
        except (ValueError, msgspec.MsgspecError) as error:
            self.drop(f"it sent what is no message: {error}")

    def _hear(self, message: ipc.ToControl) -> None:
        if self._transport is None:
            return
        if self.slot < 0:
            if not isinstance(message, ipc.WorkerHello):
                self.drop("it did not say who it is")
                return
            self._greet(message)
            return
        match message:
            case ipc.Wake():
                self._requests.wake(self, message)
                if not message.hint and message.machine in self.awaited:
                    self.waiting.add(message.machine)
            case ipc.NeedCertificate(name):
                self._requests.need_certificate(self, name)
            case ipc.CordonAck():
                self._hub.acknowledged(self, message)
            case ipc.PassiveFailure():
                self._requests.passive_failure(message)
            case ipc.WorkerHello():
                self.drop("it said twice who it is")

    def _greet(self, hello: ipc.WorkerHello) -> None:
        if abs(hello.protocol - ipc.PROTOCOL) > 1:
            self.drop(f"it speaks protocol {hello.protocol}, we speak {ipc.PROTOCOL}")
            return
        if not 0 <= hello.slot < self._hub.rows:
            self.drop(f"there is no worker slot {hello.slot}")
            return
        self.slot, self.pid = hello.slot, hello.pid
        self._mailbox = _mailbox(hello.handed_at) if hello.handed_at else None
        self._hub.hello(self)
        self._loader = spawn(self._load(), f"table for worker {self.slot}")

    async def _load(self) -> None:
        names = self._table.table_names()
        self.send(self._hub.settings)
        self.send(ipc.TableStart(len(names)))
        self.send_frames(self._table.elsewhere())
        for start in range(0, len(names), _SLICE):
            await self._room.wait()
            if self._transport is None:
                return
            self.send_frames(self._table.frame(name) for name in names[start : start + _SLICE])
            await asyncio.sleep(0)
        self.send(ipc.TableEnd())
        if self._transport is not None:
            self.is_loaded = True
            self._hub.loaded(self)

    def send(self, message: ipc.Message) -> None:
        self.send_frame(ipc.encode(message))

    def send_frames(self, frames: Iterable[bytes | None]) -> None:
        self.send_frame(b"".join(frame for frame in frames if frame is not None))

    def send_frame(self, frame: bytes) -> None:
        if self._transport is None or not frame:
            return
        ipc.write(self._transport, frame)
        if (unread := self._transport.get_write_buffer_size()) > MAX_UNREAD_BYTES:
            self.drop(f"it does not read: {unread} bytes wait")

    def hand_on(self, message: bytes, sock: socket.socket) -> bool:
        """Whether the worker gets this connection, and `message` with it, before what is sent over the link next."""
        if self._mailbox is None or self._transport is None or self._transport.get_write_buffer_size():
            return False
        try:
            socket.send_fds(self._mailbox, [message], [sock.fileno()])
        except OSError as error:  # it is full, as when the worker stands still, or there is no such worker any more
            log.debug("worker %d cannot be handed a connection: %s", self.slot, error)
            return False
        return True

    def pause_writing(self) -> None:
        self._room.clear()

    def resume_writing(self) -> None:
        self._room.set()

    def drop(self, reason: str) -> None:
        """Cut the link; the worker connects afresh."""
        if self._transport is None:
            return
        log.info("link to worker %s (pid %s) is cut: %s", self.slot, self.pid, reason)
        self._transport.abort()
        self._gone()

    def connection_lost(self, error: Exception | None) -> None:
        self._gone()

    def _gone(self) -> None:
        if self._transport is None:
            return
        self._transport = None
        if self._mailbox is not None:
            self._mailbox.close()
            self._mailbox = None
        self._room.set()
        self._hub.lost(self)


def _mailbox(path: str) -> socket.socket | None:
    """A socket connected to a worker's; the path may be longer than an address of a Unix socket."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sock.connect(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
        finally:
            os.close(folder)
    except (OSError, ValueError) as error:  # it goes on without
        log.warning("no connections can be handed to a worker at %s: %s", path, error)
        sock.close()
        return None
    return sock


def app_frame(app: App) -> bytes:
    return ipc.encode(ipc.AppSet(app))
