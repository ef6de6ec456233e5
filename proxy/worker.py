"""Composition root of a worker: shared memory, table, certificates, listeners and the link to control, on one uvloop.

A worker serves from what it knows. It starts from the snapshot that control left and from the certificate file, so it
serves what runs even while control is not there; the link brings the rest, and every change after.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hmac
import json
import logging
import os
import resource
import signal
import socket
import sys
from array import array
from collections.abc import Callable
from pathlib import Path

import uvloop

from certs import CertificateError, PackReader, Seal, SealedFolder, load_or_make_secret
from certs.cluster import NodeIdentity
from certs.errors import PeerRefusedError
from certs.node_tls import client_context, judge_peer, server_context
from proxy.clock import monotonic, monotonic_ns, spawn, unix
from proxy.descriptors import adopt
from proxy.edge.backhaul import BackhaulIdentity, BackhaulListener
from proxy.edge.certificates import Certificates
from proxy.edge.context import EdgeContext
from proxy.edge.listener import Gate, Listener
from proxy.edge.peer_tls import ALPN, ALPN_CONTROL, ALPN_JOIN, PeerEvents, PeerTls
from proxy.edge.pressure import PressureGauge
from proxy.edge.tls import TlsEnds
from proxy.edge.turnstile import Turnstile
from proxy.edge.upstream import offered
from proxy.errors import ProxyError
from proxy.ipc import (
    PROTOCOL,
    AppGone,
    AppSet,
    CertificateReady,
    CordonAck,
    CordonAsk,
    CordonLift,
    EndTunnels,
    FrameReader,
    Handed,
    IdentityReady,
    LoadsSet,
    MachineSet,
    Message,
    NeedCertificate,
    PeerGone,
    PeerSet,
    RegionsSet,
    Settings,
    SiteSet,
    TableEnd,
    TableStart,
    ToWorker,
    WakeDone,
    WorkerHello,
    decode_handed,
    decode_to_worker,
    encode,
    write,
)
from proxy.model import AppName, Machine, MachineState
from proxy.process import BACKHAUL, ChildContext, raise_open_files, unix_address
from proxy.state import W_LOOP_LAG_US, SharedMemory

BEAT_S = 0.5
LINK_BUFFER_MAX = 4 * 1024 * 1024
FD_RESERVE = 512
HANDED_MAX_S = 1.0  # from the moment a machine accepted a connection to its first use: longer, and it may be dropped
_HANDED_ROOM = socket.CMSG_SPACE(4 * array("i").itemsize)  # what does not fit is closed by the kernel
GOODBYE_WAIT_S = 2.5  # for tunnels told that the worker stops
DRAIN_LINGER_S = 0.25  # a request may be on its way on a kept connection: its answer is to end it, not a reset
RETIRED_LINGER_S = 5.0  # where nobody waits for the end

log = logging.getLogger("worker")


def run(ctx: ChildContext) -> int:
    """Serve until drained. Returns the exit status."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format=f"%(asctime)s %(levelname)s worker {ctx.slot}: %(message)s"
    )
    raise_open_files()
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    worker = Worker(loop, ctx)
    try:
        loop.run_until_complete(worker.serve())
    finally:
        worker.close()
        loop.close()
    return 0


def connection_limit(configured: int) -> int:
    """Client connections a worker may have: each may need a second descriptor for its machine."""
    derived = max(64, (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - FD_RESERVE) // 2)
    return min(configured, derived) if configured else derived


class Worker:
    """One worker process."""

    def __init__(self, loop: asyncio.AbstractEventLoop, ctx: ChildContext) -> None:
        self._loop = loop
        self._ctx = ctx
        self._memory = SharedMemory(ctx.shared_fd)
        self._link = Link(self, ctx.plan.run_dir)
        self._mailbox = Mailbox(ctx.plan.run_dir, ctx.slot)
        self._handed: tuple[int, socket.socket] | None = None  # internal port and connection, for the record under way
        self._bells = Bells(ctx.plan.run_dir, ctx.slot)
        public = [one for one in ctx.listeners if one.public_port != BACKHAUL]
        public_ports = {one.public_port: one.socket.getsockname()[1] for one in public}
        self.edge = EdgeContext(
            loop, self._memory, ctx.slot, Settings(PROTOCOL, "", "local", ""), public_ports, self._link,
            Path(ctx.plan.data_dir) / "spool", self._bells.ring, ctx.plan.workers,
        )  # fmt: skip
        self._tell_edge = self.edge.table.on_machine
        self.edge.table.on_machine = self._on_known
        self._gate = Gate(connection_limit(0))
        data_dir, run_dir = Path(ctx.plan.data_dir), Path(ctx.plan.run_dir)
        secret = load_or_make_secret(data_dir / "secret.key")
        self.edge.sticky_keys = (hmac.digest(secret, b"sticky cookies", "sha256"),)
        records = PackReader(run_dir / "certificates", secret)
        self._certificates = Certificates(records, self._ask_certificate, monotonic)
        self.edge.http_challenge = self._certificates.http_challenge
        self._turnstile = Turnstile(loop, self._certificates)
        self._pressure = PressureGauge(self.edge, self._gate, ctx.plan.workers, self._let_idle_go)
        self._storage = SealedFolder(data_dir / "certs", Seal(secret))
        self._identity: BackhaulIdentity | None = None
        self._listeners: list[Listener | BackhaulListener] = []
        # spare slots that we accept for: their worker can't start
        self._covered: dict[int, list[Listener | BackhaulListener]] = {}
        self._retired: list[Listener | BackhaulListener] = []
        self._stop = asyncio.Event()
        self._let_go_at: float | None = None  # monotonic seconds, once this worker drains
        self._hurried = asyncio.Event()  # that time has come nearer
        self._linger_s = DRAIN_LINGER_S  # for connections that rest
        self._loaded = asyncio.Event()
        self._next_beat = 0.0

    async def serve(self) -> None:
        """Load, listen, and serve until told to drain."""
        self._beat()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop.set)
        if self._ctx.channel is not None:
            self._ctx.channel.setblocking(False)
            self._loop.add_reader(self._ctx.channel.fileno(), self._on_channel)
        self._load_snapshot()
        self._bells.listen(self._loop, self.edge.queue.on_bell)
        self._mailbox.open()
        self._link.start()
        self._pressure.start()
        await self._loaded.wait()
        if any(one.public_port == BACKHAUL for one in self._ctx.listeners):
            self._identify()
        await self._listen()
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 50, 50)
        self._tell_supervisor("ready")
        await self._stop.wait()
        await self._drain()

    async def _listen(self) -> None:
        for one in self._ctx.listeners:
            self._listeners.append(await self._listener(one.public_port, one.socket))

    async def _listener(self, public_port: int, sock: socket.socket) -> Listener | BackhaulListener:
        listener: Listener | BackhaulListener
        if public_port == BACKHAUL:
            listener = BackhaulListener(self.edge, sock, self._ctx.plan.run_dir)
            if self._identity is not None:
                await listener.set_identity(self._identity)
            return listener  # without one it accepts nobody yet: who comes waits in the kernel's queue
        listener = Listener(self.edge, self._gate, public_port, sock, self._ctx.tls_context, self._turnstile)
        await listener.start()
        return listener

    def _identify(self) -> None:
        """Take what this node shows to others of its fleet, if it belongs to one, for both directions."""
        try:
            found = NodeIdentity.load(self._storage)
            if found is None:
                return
            served = [ALPN, ALPN_CONTROL, ALPN_JOIN]
            self._identity = BackhaulIdentity(
                server_context(found, served), server_context(found, served, mutual=False),
                lambda der: _judge(der, found),
            )  # fmt: skip
            context, ends = client_context(found, [ALPN]), TlsEnds(self.edge.wheel, PeerEvents(), 1.0)
        except (CertificateError, OSError) as error:
            log.error("what this node shows to others cannot be read: %s", error)
            return
        self.edge.peer_tls = lambda node: PeerTls(ends, context, node)
        self.edge.table.forget_pools()
        for listener in self._listeners + [one for covered in self._covered.values() for one in covered]:
            if isinstance(listener, BackhaulListener):
                spawn(listener.set_identity(self._identity), "backhaul")

    async def _cover(self, slot: int, public_ports: list[int], sockets: list[socket.socket]) -> None:
        """Accept for a slot whose worker can't start: its queue would otherwise keep its share of clients waiting."""
        log.info("accepting for slot %d too, until its worker starts", slot)
        self._uncover(slot)  # a supervisor that has become another program does not know that it has asked already
        self._covered[slot] = []
        for port, sock in zip(public_ports, sockets, strict=True):
            self._covered[slot].append(await self._listener(port, sock))

    def _uncover(self, slot: int) -> None:
        for listener in self._covered.pop(slot, []):
            listener.stop()
            self._retired.append(listener)  # its connections stay until they end

    def _let_go_in(self, timeout_s: float) -> None:
        """Drain; connections have this long, or what they were promised before if that is less."""
        at = monotonic() + timeout_s
        if self._let_go_at is None or at < self._let_go_at:
            self._let_go_at = at
            self._hurried.set()
        self._stop.set()

    async def _drain(self) -> None:
        """Finish what was begun; then end tunnels; then let go."""
        if self._let_go_at is None:
            self._let_go_at = monotonic() + self._ctx.plan.drain_timeout_s
        self.edge.draining = True
        for slot in list(self._covered):
            self._uncover(slot)
        listeners = self._listeners + self._retired
        for listener in listeners:
            listener.stop()
            listener.drain(self._linger_s)
        begun = monotonic()
        if not await self._emptied():
            for listener in listeners:
                listener.end_tunnels()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._gate.wait_empty(), GOODBYE_WAIT_S)
            if self._gate.open:
                log.warning(
                    "%d connections were cut %.1f s after the drain began", self._gate.open, monotonic() - begun
                )

    async def _emptied(self) -> bool:
        """Whether the last client connection has ended before its time was over."""
        while (left := self._let_go_at - monotonic() if self._let_go_at is not None else 0.0) > 0:
            self._hurried.clear()
            empty, hurried = spawn(self._gate.wait_empty(), "drained"), spawn(self._hurried.wait(), "hurried")
            await asyncio.wait((empty, hurried), timeout=left, return_when=asyncio.FIRST_COMPLETED)
            done = empty.done()
            empty.cancel()
            hurried.cancel()
            if done:
                return True
        return not self._gate.open

    def _let_idle_go(self, linger_s: float) -> None:
        """Connections run short: those that rest end soon."""
        for listener in self._listeners + [one for covered in self._covered.values() for one in covered]:
            listener.drain(linger_s)

    def close(self) -> None:
        self._pressure.close()
        self._bells.close(self._loop)
        self._mailbox.close()
        self.edge.close()

    # --- supervisor

    def _beat(self) -> None:
        now = monotonic()
        if self._next_beat:
            self.edge.cells[self.edge.worker_base + W_LOOP_LAG_US] = max(0, int((now - self._next_beat) * 1_000_000))
        self._next_beat = now + BEAT_S
        self._memory.beat(self._ctx.index, monotonic_ns())
        self._loop.call_later(BEAT_S, self._beat)

    def _tell_supervisor(self, op: str) -> None:
        if self._ctx.channel is not None:
            try:
                self._ctx.channel.send(json.dumps({"op": op}).encode())
            except OSError as error:
                log.warning("could not tell the supervisor %r: %s", op, error)

    def _on_channel(self) -> None:
        assert self._ctx.channel is not None
        try:
            data, descriptors, _, _ = socket.recv_fds(self._ctx.channel, 65_536, 256)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", []
        if not data:
            self._loop.remove_reader(self._ctx.channel.fileno())
            self._stop.set()
            return
        message = json.loads(data)
        match message.get("op"):
            case "drain":
                for listener in self._listeners + self._retired if self.edge.draining else ():
                    listener.drain(DRAIN_LINGER_S)
                self._let_go_in(message.get("timeout_s", self._ctx.plan.drain_timeout_s))
            case "retire":
                log.info("others accept now: keeping %d connections until they end", self._gate.open)
                self._linger_s = RETIRED_LINGER_S
                self._let_go_in(message["timeout_s"])
            case "cover":
                sockets = [socket.socket(fileno=descriptor) for descriptor in descriptors]
                spawn(self._cover(message["slot"], message["public_ports"], sockets), "cover-slot")
            case "uncover":
                self._uncover(message["slot"])

    # --- the table

    def _load_snapshot(self) -> None:
        """Take the table that control wrote last, if it is there and whole."""
        path = os.path.join(self._ctx.plan.run_dir, "table.msgpack")
        try:
            with open(path, "rb") as file:
                data = file.read()
            messages = [decode_to_worker(body) for body in FrameReader().feed(data)]
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            log.warning("the table snapshot %s cannot be used, waiting for control: %s", path, error)
            return
        if messages and isinstance(messages[-1], TableEnd):
            for message in messages:
                self.on_message(message)

    def on_message(self, message: ToWorker) -> None:
        """Take one message of control's."""
        handler = self._HANDLERS[type(message)]
        handler(self, message)

    def _on_settings(self, message: Settings) -> None:
        self.edge.apply(message)
        self._gate.limit = connection_limit(message.max_connections)
        self.edge.sources.apply(message, self._gate.limit)

    def _on_start(self, message: TableStart) -> None:
        self.edge.table.start_load()

    def _on_end(self, message: TableEnd) -> None:
        self.edge.table.end_load()
        self._loaded.set()

    def _on_app(self, message: AppSet) -> None:
        self.edge.table.set_app(message.app)
        self.edge.replays.forget_app(message.app.name)  # rules and targets may be others now

    def _on_app_gone(self, message: AppGone) -> None:
        self.edge.table.remove_app(message.name)
        self.edge.replays.forget_app(message.name)

    def _on_machine(self, message: MachineSet) -> None:
        """The connection that control made to see whether it listens is the first request's, if one waits here."""
        machine = message.machine
        if machine.state is MachineState.STARTED:
            self._handed = self._mailbox.take(machine)
        try:
            self.edge.table.set_machine(message.app, machine)
        finally:
            handed, self._handed = self._handed, None
            if handed is not None:
                handed[1].close()

    def _on_known(self, app: AppName, machine: Machine) -> None:
        """A record has taken effect: whoever waits for that connects within this call."""
        assert self._tell_edge is not None
        handed, self._handed = self._handed, None
        if handed is None:
            self._tell_edge(app, machine)
            return
        port, sock = handed
        with offered(self.edge, app, machine.id, port, sock):
            self._tell_edge(app, machine)

    def _on_cordon(self, message: CordonAsk) -> None:
        self.edge.table.soft_cordon(message.app, message.machine, True)
        self._link.send(CordonAck(message.machine, message.sequence))

    def _on_peer(self, message: PeerSet) -> None:
        if message.peer.name == self.edge.settings.node:
            self.edge.is_drained = not message.peer.is_up
        else:
            self.edge.table.set_peer(message.peer)

    def _on_regions(self, message: RegionsSet) -> None:
        self.edge.region_ranks = {region: rank for rank, region in enumerate(message.order)}

    def _on_certificate(self, message: CertificateReady) -> None:
        self._certificates.ready(message.name, message.error)

    def _ask_certificate(self, name: str) -> None:
        self._link.send(NeedCertificate(name))

    def on_connecting(self) -> None:
        """The link is made anew: what was handed over before it is of nobody's interest."""
        self._mailbox.empty()

    def on_linked(self) -> None:
        """The link is up (again): ask for what is still waited for."""
        self.edge.waker.on_connected()
        self._refresh_certificates()  # what was announced while the link was down
        self._certificates.ask_again()

    def _refresh_certificates(self) -> None:
        try:
            self._certificates.refresh()
        except ProxyError as error:
            log.error("certificates known before stay in use: %s", error)

    _HANDLERS: dict[type, Callable[..., None]] = {
        Settings: _on_settings,
        TableStart: _on_start,
        TableEnd: _on_end,
        AppSet: _on_app,
        AppGone: _on_app_gone,
        MachineSet: _on_machine,
        WakeDone: lambda self, message: self.edge.waker.on_wake_done(message),
        CordonAsk: _on_cordon,
        CordonLift: lambda self, message: self.edge.table.soft_cordon(message.app, message.machine, False),
        EndTunnels: lambda self, message: self.edge.table.end_tunnels(message.app, message.machine),
        CertificateReady: _on_certificate,
        IdentityReady: lambda self, message: self._identify(),
        PeerSet: _on_peer,
        PeerGone: lambda self, message: self.edge.table.remove_peer(message.name),
        RegionsSet: _on_regions,
        SiteSet: lambda self, message: self.edge.table.set_site(message.app, message.node, message.machines),
        LoadsSet: lambda self, message: self.edge.table.set_loads(message.node, message.loads),
    }

    def hello(self) -> WorkerHello:
        return WorkerHello(PROTOCOL, self._ctx.slot, os.getpid(), self._mailbox.path)


def _judge(der: bytes, identity: NodeIdentity) -> str:
    try:
        return judge_peer(der, identity.root, unix())
    except PeerRefusedError as error:
        raise ValueError(str(error)) from error


class Mailbox:
    """Where control leaves connections that machines have accepted: a datagram socket in run_dir.

    Nothing watches it. What is in it was sent before the record that it goes with (ipc.Handed), so it is looked into
    when one comes. Whatever is found there and does not go with that record is closed.
    """

    def __init__(self, run_dir: str, slot: int) -> None:
        self._run_dir = run_dir
        self._name = f"handed-{slot}.sock"
        self.path = os.path.join(run_dir, self._name)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)

    def open(self) -> None:
        os.fchmod(self._sock.fileno(), 0o600)  # for the name that comes next
        _bind(self._sock, self._run_dir, self._name)

    def take(self, machine: Machine) -> tuple[int, socket.socket] | None:
        """The connection that goes with this record, and the internal port that it leads to."""
        while (received := self._receive()) is not None:
            handed, sock = received
            if (
                handed.machine == machine.id
                and handed.version == machine.version
                and monotonic() - handed.at < HANDED_MAX_S
            ):
                return handed.internal_port, sock
            sock.close()
        return None

    def empty(self) -> None:
        while (received := self._receive()) is not None:
            received[1].close()

    def _receive(self) -> tuple[Handed, socket.socket] | None:
        """The next that is whole. None: there is nothing more."""
        while True:
            try:
                data, ancillary, _, _ = self._sock.recvmsg(1024, _HANDED_ROOM, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return None
            except OSError as error:
                log.warning("no connection can be taken from control: %s", error)
                return None
            sockets = _sockets(ancillary)
            try:
                (sock,) = sockets  # none: we are out of descriptors
                return decode_handed(data), sock
            except ValueError as error:
                log.warning("control handed over what is no connection: %s", error)
                for one in sockets:
                    one.close()

    def close(self) -> None:
        self.empty()
        self._sock.close()


def _bind(sock: socket.socket, run_dir: str, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(run_dir, name))  # of the worker before in this slot
    sock.bind(unix_address(run_dir, name))


def _sockets(ancillary: list[tuple[int, int, bytes]]) -> list[socket.socket]:
    """The sockets among the descriptors that came; anything else is closed."""
    descriptors, found = array("i"), []
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data[: len(data) // descriptors.itemsize * descriptors.itemsize])
    for one in descriptors:
        try:
            found.append(socket.socket(fileno=one))
        except OSError:
            os.close(one)
    return found


class Bells:
    """How workers tell each other that a place in line is free: a datagram to a socket in run_dir, without content.

    One that reaches nobody is no fault: queues look again by themselves (edge/queue.py).
    """

    def __init__(self, run_dir: str, slot: int) -> None:
        self._run_dir = run_dir
        self._name = f"bell-{slot}.sock"
        self._own = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self._out = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self._addresses: dict[int, str] = {}
        self._on_bell: Callable[[], None] = lambda: None

    def listen(self, loop: asyncio.AbstractEventLoop, on_bell: Callable[[], None]) -> None:
        self._on_bell = on_bell
        _bind(self._own, self._run_dir, self._name)
        loop.add_reader(self._own.fileno(), self._rung)

    def ring(self, slot: int) -> None:
        address = self._addresses.get(slot)
        if address is None:
            address = self._addresses[slot] = unix_address(self._run_dir, f"bell-{slot}.sock")
        with contextlib.suppress(OSError):
            self._out.sendto(b"!", address)

    def _rung(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for _ in range(256):
                self._own.recv(1)
        self._on_bell()

    def close(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.remove_reader(self._own.fileno())
        self._own.close()
        self._out.close()


class Link(asyncio.Protocol):
    """The connection to control, made again whenever it is lost."""

    def __init__(self, worker: Worker, run_dir: str) -> None:
        self._worker = worker
        self._run_dir = run_dir
        self._transport: asyncio.Transport | None = None
        self._reader = FrameReader()
        self._heard = False  # control has spoken: until then the connection may only wait in the listener's queue
        self._lost = asyncio.Event()

    def start(self) -> None:
        spawn(self._keep(), "control-link")

    def send(self, message: Message) -> bool:
        """Whether it left; what did not is asked again when the link is back."""
        transport = self._transport
        if (
            transport is None
            or not self._heard
            or transport.is_closing()
            or transport.get_write_buffer_size() > LINK_BUFFER_MAX
        ):
            return False
        write(transport, encode(message))
        return True

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        wait_s = 0.02
        address = ""  # made once: that of a long path holds a descriptor
        while True:
            self._lost.clear()
            try:
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
                try:
                    address = address or unix_address(self._run_dir, "control.sock")
                    await loop.sock_connect(sock, address)
                except BaseException:
                    sock.close()
                    raise
                await adopt(loop, lambda: self, sock)
            except OSError as error:
                log.debug("control is not there: %s", error)
            else:
                began = monotonic()
                await self._lost.wait()
                if monotonic() - began > 1.0:
                    wait_s = 0.02
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 1.5, 0.5)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's is no asyncio.Transport, but has its methods
        self._reader = FrameReader()
        self._heard = False
        self._worker.on_connecting()
        transport.write(encode(self._worker.hello()))  # type: ignore[attr-defined]  # as above

    def data_received(self, data: bytes) -> None:
        if not self._heard:
            self._heard = True
            self._worker.on_linked()
        try:
            for body in self._reader.feed(data):
                self._worker.on_message(decode_to_worker(body))
        except ValueError as error:
            log.error("control sent what cannot be read, connecting again: %s", error)
            if self._transport is not None:
                self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._lost.set()
