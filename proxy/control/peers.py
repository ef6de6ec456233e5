"""The other nodes of the fleet: what they tell of themselves and their apps, and what they are told of this one.

    Peers      all of it: who there is, whose word workers get, four times a second how this node's machines stand
    _Outgoing  the connection that this control makes to one peer, and makes again whenever it is lost: tells, probes
    _Incoming  one that a peer's control made to us, through a worker: hears

Who there is follows from `[[peers]]` and from the nodes that have joined (membership.py); an address in `[[peers]]`
goes before the one that a node tells. A node is up as long as it is heard: a second of silence, or the end of its
connection, and no new request goes there. What it told stays known, and counts again when it is back.

Everything a peer says is bounded, and believed of itself alone.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import json
import logging
import os
import random
import socket
import ssl
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from certs.cluster import NodeIdentity, dns_name
from certs.errors import PeerRefusedError
from certs.node_tls import client_context, explain
from proxy import ipc
from proxy.clock import Clock, spawn
from proxy.config import PeerSection, parse_remote
from proxy.control.apps import Apps, Entry
from proxy.control.link import Hub
from proxy.control.membership import Membership
from proxy.control.peer_messages import (
    MAX_FRAME_BYTES,
    VERSION,
    AllTold,
    AppLeft,
    AppTold,
    Echo,
    KnownNode,
    MachinesTold,
    PeerHello,
    PeerMessage,
    Probe,
    StateTold,
    WakeAsked,
    decode,
    encode,
)
from proxy.control.plan import NodePlan
from proxy.decide.latency import Basis, LatencyError, LatencyTable
from proxy.decide.peer_health import Lease, PeerState
from proxy.decide.places import Places
from proxy.model import (
    AppName,
    MachineId,
    MachineState,
    NodeName,
    Peer,
    RegionCode,
    RemoteLoad,
    RemoteMachine,
)
from proxy.process import unix_address
from proxy.state import SharedMemory

log = logging.getLogger(__name__)

ALPN: Final = "wakefront-control/1"
JOIN_ALPN: Final = "wakefront-join/1"
SOCKET: Final = "peers.sock"
TELL_S: Final = 0.25
LEASE_S: Final = 1.0  # a node is heard every 250 ms: three of four may be lost
PROBE_S: Final = 1.0
_CONNECT_S: Final = 5.0
_RETRY_S: Final = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_PREFACE_BYTES: Final = 8_192
_PREFACE_S: Final = 5.0
_UNSENT_BYTES: Final = 16 * 1024 * 1024  # to a peer that does not read: it is dropped, and told anew
_SLICE: Final = 64
_MAX_APPS: Final = 20_000  # of one node
_MAX_MACHINES: Final = 4_000  # of one app at one node
_MAX_INCOMING: Final = 1_024
_PATIENCE_S: Final = 5.0  # of a control that has just begun, for nodes to be heard
_LATEST: Final = 1 << 40  # unix seconds
_KEEP_S: Final = 2.0  # between two writes of what is known of others
_VIAS: Final = 3  # ways around that workers are told of

Json = dict[str, Any]  # Any: JSON


@dataclass(slots=True)
class Node:
    """What is known of one other node."""

    name: NodeName
    region: RegionCode
    host: str
    port: int
    apps: dict[AppName, AppTold] = field(default_factory=dict)
    machines: dict[AppName, tuple[RemoteMachine, ...]] = field(default_factory=dict)
    loads: tuple[RemoteLoad, ...] = ()
    epoch: int = 0  # which start of it speaks: unix ms, by its own clock
    lease: Lease = field(default_factory=lambda: Lease(LEASE_S))
    fault: str = ""  # why it is not reached
    told: Peer | None = None  # as workers know it
    fresh: set[AppName] | None = None  # told since the last PeerHello, until AllTold

    def share(self, now: float) -> float:
        return round(self.lease.share(now), 2)


class Peers:
    """All other nodes."""

    def __init__(
        self, plan: NodePlan, apps: Apps, hub: Hub, memory: SharedMemory, clock: Clock, rng: random.Random,
        run_dir: str,
    ) -> None:  # fmt: skip
        self._plan = plan
        self._apps = apps
        self._hub = hub
        self._memory = memory
        self._clock = clock
        self._rng = rng
        self._run_dir = run_dir
        self._membership: Membership
        self._started_at = clock.unix()
        self._begun_at = clock.monotonic()
        self._kept_path = os.path.join(run_dir, "fleet.msgpack")
        self._is_unkept = False
        self.nodes: dict[NodeName, Node] = {}
        self._outgoing: dict[NodeName, _Outgoing] = {}
        self._incoming: dict[NodeName, _Incoming] = {}
        self._open = 0
        self._server: asyncio.Server | None = None
        self._context: ssl.SSLContext | None = None
        self._context_of: NodeIdentity | None = None
        self._changed: set[AppName] = set()
        self._telling = False
        self._sequence = 0
        self._own_loads: tuple[RemoteLoad, ...] = ()
        places = Places({one.code: (one.latitude, one.longitude) for one in plan.regions})
        self.latency = LatencyTable(NodeName(plan.name), plan.region, places)
        self.order: tuple[RegionCode, ...] = (plan.region,)  # nearest first
        self._row: dict[str, float] = {}  # to be told with the next state
        self.is_draining = False
        self.on_wake: Callable[[AppName, MachineId], None] = lambda app, machine: None  # another node asks for a start
        self.faults: dict[str, str] = {}

    async def run(self, membership: Membership) -> None:
        """Until cancelled."""
        self._membership = membership
        await self._listen()
        self._apps.on_local = self._on_local
        self.apply(self._plan)
        self._hub.tell_all(ipc.IdentityReady())
        next_probe = next_keep = 0.0
        try:
            while True:
                now = self._clock.monotonic()
                self._tell_state()
                self._look_at_leases(now)
                if now >= next_probe:
                    next_probe = now + PROBE_S
                    self._look_at_nodes()
                    for one in self._outgoing.values():
                        one.probe(now)
                    self._look_at_regions(now)
                    self._row = self._own_row(now)
                if self._is_unkept and now >= next_keep:
                    next_keep = now + _KEEP_S
                    await self._keep()
                await self._clock.sleep(TELL_S)
        finally:
            self._apps.on_local = lambda name: None
            self.close()

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for one in self._outgoing.values():
            one.end()
        self._outgoing.clear()
        for incoming in list(self._incoming.values()):
            incoming.drop("control ends")

    async def _listen(self) -> None:
        path = os.path.join(self._run_dir, SOCKET)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            os.fchmod(sock.fileno(), 0o600)  # for the name that comes next
            sock.bind(unix_address(self._run_dir, SOCKET))
            self._server = await asyncio.start_unix_server(self._serve, sock=sock, limit=_PREFACE_BYTES)
        except BaseException:
            sock.close()
            raise

    # --- over restarts

    async def _keep(self) -> None:
        """Write what is known of others, for the control after this one: till it hears of them itself."""
        self._is_unkept = False
        frames = []
        for node in self.nodes.values():
            frames.append(encode(KnownNode(node.name, node.region, node.host, node.port)))
            frames += [encode(told) for told in node.apps.values()]
            frames += [encode(MachinesTold(name, machines)) for name, machines in node.machines.items()]
        try:
            await asyncio.to_thread(_write, self._kept_path, b"".join(frames))
        except OSError as error:
            log.error("what is known of other nodes cannot be kept: %s", error)

    async def recall(self) -> None:
        """What the control before this one knew, before workers are told of apps."""
        self._apps.elsewhere = self.frames
        try:
            data = await asyncio.to_thread(_read, self._kept_path)
            messages = [decode(body) for body in ipc.FrameReader(MAX_FRAME_BYTES).feed(data)]
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            log.warning("what was known of other nodes cannot be read: %s", error)
            return
        node: Node | None = None
        for message in messages:
            if isinstance(message, KnownNode):
                name = NodeName(message.name)
                node = self.nodes[name] = Node(name, RegionCode(message.region), message.host, message.port)
            elif node is not None and message is not None:
                with contextlib.suppress(ValueError):
                    self.heard(node, message)

    # --- who there is

    def apply(self, plan: NodePlan) -> None:
        """Take a new configuration."""
        self._plan = plan
        self._look_at_nodes()

    def _look_at_nodes(self) -> None:
        """Those of [[peers]] and those that have joined."""
        wanted: dict[NodeName, tuple[RegionCode, str, int]] = {}
        for row in self._membership.nodes[1:]:
            address = parse_remote(row.backhaul) if row.backhaul else None
            if address is not None:
                wanted[NodeName(row.name)] = (RegionCode(row.region), *address)
        for peer in self._plan.peers:
            wanted[NodeName(peer.name)] = _said(peer)
        for name in [name for name in self.nodes if name not in wanted]:
            self._forget(name)
        for name, (region, host, port) in wanted.items():
            node = self.nodes.get(name)
            if node is None:
                node = self.nodes[name] = Node(name, region, host, port)
                # before what it will tell of its machines, which workers keep for nodes that they know
                self._hub.tell_all(ipc.PeerSet(Peer(name, region, host, port, is_up=False, is_silent=True)))
            elif (node.host, node.port) != (host, port):
                node.host, node.port = host, port
                if name in self._outgoing:
                    self._outgoing.pop(name).end()
            node.region = region
            try:
                self.latency.set_node(name, region)
            except LatencyError as error:
                self.faults[name] = str(error)
            if name not in self._outgoing:
                outgoing = self._outgoing[name] = _Outgoing(self, node)
                outgoing.begin()
            self._tell_peer(node)

    def _forget(self, name: NodeName) -> None:
        node = self.nodes.pop(name)
        self.latency.remove_node(name)
        if name in self._outgoing:
            self._outgoing.pop(name).end()
        if (incoming := self._incoming.get(name)) is not None:
            incoming.drop("the node is not one of the fleet any more")
        self._hub.tell_all(ipc.PeerGone(name))
        for app in list(node.apps):
            self._left(node, app)

    def context(self) -> ssl.SSLContext:
        """What this control shows to peers; made again when the certificate is renewed."""
        identity = self._membership.identity
        if self._context is None or self._context_of is not identity:
            self._context, self._context_of = client_context(identity, [ALPN]), identity
        return self._context

    # --- what workers are told

    def frames(self) -> list[bytes]:
        """For a worker's table: nodes, regions, and what apps have elsewhere."""
        # one that this control has not heard yet may be up, as the control before knew: a request finds out
        messages: list[ipc.Message] = [
            ipc.PeerSet(one.told or Peer(one.name, one.region, one.host, one.port)) for one in self.nodes.values()
        ]
        messages.append(ipc.RegionsSet(self.order))
        for node in self.nodes.values():
            messages += [ipc.SiteSet(app, node.name, machines) for app, machines in node.machines.items()]
            if node.loads:
                messages.append(ipc.LoadsSet(node.name, node.loads))
        if self.is_draining:
            messages.append(ipc.PeerSet(self._self()))
        return [ipc.encode(message) for message in messages] + [ipc.encode(ipc.IdentityReady())]

    def _self(self) -> Peer:
        return Peer(NodeName(self._plan.name), self._plan.region, "", 0, is_up=not self.is_draining)

    def _tell_peer(self, node: Node) -> None:
        now = self._clock.monotonic()
        state = node.lease.state(now)
        is_up = state is PeerState.HEALTHY
        if not is_up and node.lease.epoch is None and node.told is None and now - self._begun_at < _PATIENCE_S:
            return  # this control has just begun: workers go by what the one before knew
        peer = Peer(
            node.name, node.region, node.host, node.port, is_up, state is PeerState.SILENT, node.share(now),
            self._vias(node, now),
        )  # fmt: skip
        if peer != node.told:
            was_up = node.told is not None and node.told.is_up
            node.told = peer
            self._hub.tell_all(ipc.PeerSet(peer))
            if is_up != was_up:
                why = " (it drains)" if state is PeerState.DRAINING else f" ({node.fault})" if node.fault else ""
                log.info("node %s in %s is %s%s", node.name, node.region, "up" if is_up else "down", why)

    def _vias(self, node: Node, now: float) -> tuple[NodeName, ...]:
        """Ways around, to a node that this one does not reach."""
        outgoing = self._outgoing.get(node.name)
        if node.lease.state(now) is not PeerState.SILENT and outgoing is not None and outgoing.is_ready:
            return ()
        well = [via for via in self.latency.detours(node.name, now) if self._is_well(via, now)]
        return tuple(well[:_VIAS])

    def _is_well(self, name: NodeName, now: float) -> bool:
        node = self.nodes.get(name)
        return node is not None and node.lease.state(now) is PeerState.HEALTHY

    def _own_row(self, now: float) -> dict[str, float]:
        """What this node measures, to those that are heard: who cannot reach one of them may come by us."""
        own = self.latency.own_row(now)
        return {name: round(rtt_s, 5) for name, rtt_s in own.items() if self._is_well(name, now)}

    def _look_at_leases(self, now: float) -> None:
        for node in self.nodes.values():
            is_up = node.lease.state(now) is PeerState.HEALTHY
            if node.told is None or (node.told.is_up, node.told.share) != (is_up, node.share(now)):
                self._tell_peer(node)

    def _look_at_regions(self, now: float) -> None:
        order = self.latency.order(self._plan.region, now)
        if order != self.order:
            self.order = order
            log.info("regions by distance from here: %s", ", ".join(order))
            self._hub.tell_all(ipc.RegionsSet(order))

    # --- what peers are told

    def drain(self, on: bool) -> None:
        """Have no new request come to this node's machines, or again."""
        self.is_draining = on
        self._hub.tell_all(ipc.PeerSet(self._self()))
        self._tell_state()

    def _on_local(self, name: AppName) -> None:
        self._changed.add(name)
        if not self._telling:
            self._telling = True
            asyncio.get_running_loop().call_soon(self._tell_changes)

    def _tell_changes(self) -> None:
        """What changed in one turn of the loop, once."""
        changed, self._changed, self._telling = self._changed, set(), False
        for name in changed:
            frames = self.about(name)
            for outgoing in self._outgoing.values():
                outgoing.tell(name, frames)

    def about(self, name: AppName) -> bytes:
        """Frames about an app of this node as it is now."""
        entry = self._apps.get(name)
        if entry is None:
            return encode(AppLeft(name))
        record = entry.record()
        machines = tuple(
            RemoteMachine(one.id, one.group, one.state, one.failing_ports, one.cordoned) for one in record.machines
        )
        app = dataclasses.replace(record, machines=(), slot=0)
        return encode(AppTold(app)) + encode(MachinesTold(name, machines))

    def own_apps(self) -> list[AppName]:
        return self._apps.names()

    def hello(self) -> bytes:
        plan = self._plan
        return encode(PeerHello(VERSION, plan.name, plan.region, self._started_at, self._membership.nodes))

    def _tell_state(self) -> None:
        self._own_loads = tuple(self._loads())
        self._sequence += 1
        row, self._row = self._row, {}
        frame = encode(StateTold(self._sequence, self.is_draining, self._own_loads, row))
        for outgoing in self._outgoing.values():
            outgoing.send(frame)

    def _loads(self) -> Iterable[RemoteLoad]:
        for entry in self._apps.all():
            yield from _loads_of(entry, self._memory.in_flight)

    # --- what peers tell

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A connection that a worker relays."""
        try:
            if self._open >= _MAX_INCOMING:
                return
            self._open += 1
            try:
                await self._hear(reader, writer)
            finally:
                self._open -= 1
        finally:
            writer.close()

    async def _hear(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = address = ""
        try:
            async with asyncio.timeout(_PREFACE_S):
                preface = json.loads(await reader.readuntil(b"\n"))
            alpn, peer, address = preface["alpn"], preface["peer"], preface["from"]
            if alpn == JOIN_ALPN:
                await self._membership.serve_join(reader, writer, address)
                return
            name = self._membership.judge(base64.b64decode(preface["certificate"]))
        except PeerRefusedError as error:
            self.faults[str(peer)[:64]] = str(error)
            log.warning("a control at %s is refused: %s", address, error)
            return
        except (ValueError, KeyError, TypeError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError,
                ConnectionError) as error:  # fmt: skip
            log.warning("a worker relayed what is no word of a peer: %r", error)
            return
        self.faults.pop(name, None)
        node = self.nodes.get(NodeName(name))
        if node is None:
            node = self._met(name)
        incoming = _Incoming(self, node, writer)
        if (old := self._incoming.get(node.name)) is not None:
            old.drop("it has connected anew")
        self._incoming[node.name] = incoming
        try:
            await incoming.hear(reader)
        finally:
            if self._incoming.get(node.name) is incoming:
                del self._incoming[node.name]
                node.lease.lost()  # its control or its host is gone: no new requests until it is heard again
                if node.name in self.nodes:
                    self._tell_peer(node)

    def _met(self, name: str) -> Node:
        """A node of the fleet that is not known yet: it says in its hello where it is."""
        return Node(NodeName(name), RegionCode(""), "", 0)

    async def heard_hello(self, node: Node, hello: PeerHello) -> None:
        """Raises ValueError for a node that says it is another than its certificate does, or one that nobody knows."""
        if hello.node != node.name:
            raise ValueError(f"it says it is {hello.node[:64]!r}")
        faults = await self._membership.learn(hello.nodes)
        for fault in faults:
            log.warning("node %s says: %s", node.name, fault)
        self._look_at_nodes()
        if self.nodes.get(node.name) is not node:
            raise ValueError("it was not known before, and is now: it is heard when it connects again")
        if hello.region != node.region:
            log.warning("node %s says it is in %s, here it is in %s", node.name, hello.region[:32], node.region)
        if not 0 <= hello.started_at < _LATEST:
            raise ValueError(f"it says it started at {hello.started_at}: expected unix seconds")
        node.epoch = int(hello.started_at * 1000)
        node.fresh = set()

    def heard(self, node: Node, message: PeerMessage) -> None:
        """Raises ValueError for more than a node may say."""
        match message:
            case AppTold(app):
                if app.name not in node.apps and len(node.apps) >= _MAX_APPS:
                    raise ValueError(f"more than {_MAX_APPS} apps")
                node.apps[app.name] = message
                self._is_unkept = True
                if node.fresh is not None:
                    node.fresh.add(app.name)
                self._choose_word(app.name)
            case MachinesTold(name, machines):
                if name not in node.apps or len(machines) > _MAX_MACHINES:
                    raise ValueError(f"{len(machines)} machines of an app that it has not told of, or too many")
                if node.machines.get(name) != machines:
                    node.machines[name] = machines
                    self._is_unkept = True
                    self._hub.tell_all(ipc.SiteSet(name, node.name, machines))
            case AppLeft(name):
                self._left(node, name)
            case AllTold():
                fresh, node.fresh = node.fresh, None
                for name in [name for name in node.apps if fresh is not None and name not in fresh]:
                    self._left(node, name)
            case StateTold():
                self._heard_state(node, message)
            case WakeAsked(name, machine):
                self.on_wake(name, machine)
            case _:
                pass

    def start(self, app: AppName, machine: MachineId) -> bool:
        """Have another node start one of its machines. False: none has it, or it is not reached."""
        for name, node in self.nodes.items():
            if any(one.id == machine for one in node.machines.get(app, ())):
                outgoing = self._outgoing.get(name)
                if outgoing is not None and outgoing.is_ready:
                    outgoing.send(encode(WakeAsked(app, machine)))
                    return True
        return False

    def _heard_state(self, node: Node, state: StateTold) -> None:
        now = self._clock.monotonic()
        if not node.lease.heard(node.epoch, state.sequence, now, is_draining=state.is_draining):
            return  # said before
        node.fault = ""
        if node.told is None or node.told.is_up is state.is_draining:
            self._tell_peer(node)
        if state.rtts:
            row = {NodeName(name): rtt_s for name, rtt_s in state.rtts.items()}
            try:
                self.latency.take_row(node.name, node.name, row, now)
                self.faults.pop(node.name, None)
            except LatencyError as error:  # the rest of what it says stands
                self.faults[node.name] = str(error)
        loads = tuple(one for one in state.loads if one.app in node.apps)
        if loads != node.loads:
            node.loads = loads
            self._hub.tell_all(ipc.LoadsSet(node.name, loads))

    def _left(self, node: Node, name: AppName) -> None:
        if node.apps.pop(name, None) is None:
            return
        self._is_unkept = True
        if node.machines.pop(name, None) is not None:
            self._hub.tell_all(ipc.SiteSet(name, node.name, ()))
        self._choose_word(name)

    def _choose_word(self, name: AppName) -> None:
        """An app is as the first of the nodes that have it tells, in the order of their names."""
        telling = [one for one in self.nodes.values() if name in one.apps]
        if telling:
            self._apps.set_elsewhere(min(telling, key=lambda one: one.name).apps[name].app)
        else:
            self._apps.drop_elsewhere(name)

    # --- for operators

    def to_json(self) -> list[Json]:
        now = self._clock.monotonic()
        rows: list[Json] = [
            {"name": self._plan.name, "region": self._plan.region, "is_self": True, "state": self._own_state(),
             "address": self._membership.nodes[0].backhaul, "rtt_ms": 0.0, "jitter_ms": 0.0,
             "apps": len(self._apps.names()), "machines": sum(len(one.machines) for one in self._apps.all()),
             "started": _started(machine.state for one in self._apps.all() for machine in one.machines),
             "fault": ""}
        ]  # fmt: skip
        for node in sorted(self.nodes.values(), key=lambda one: one.name):
            pair = self.latency.pair(node.name)
            rtt_s = (pair.rtt_s(now) or 0.0) if pair is not None else 0.0
            rows.append(
                {"name": node.name, "region": node.region, "is_self": False, "state": _state(node, now),
                 "address": f"{node.host}:{node.port}", "rtt_ms": round(rtt_s * 1000, 2),
                 "jitter_ms": round(pair.jitter_s * 1000, 2) if pair is not None else 0.0, "apps": len(node.apps),
                 "machines": sum(len(one) for one in node.machines.values()),
                 "started": _started(machine.state for one in node.machines.values() for machine in one),
                 "fault": node.fault or self.faults.get(node.name, "")}
            )  # fmt: skip
        return rows

    def _own_state(self) -> str:
        return "draining" if self.is_draining else "up"

    def regions_json(self) -> list[Json]:
        now = self._clock.monotonic()
        rows = []
        for rank, region in enumerate(self.order):
            nodes = [one for one in self.nodes.values() if one.region == region]
            is_own = region == self._plan.region
            time = self.latency.rtt(self._plan.region, region, now)
            is_measured = time.basis in (Basis.MEASURED, Basis.REMEMBERED)
            rows.append(
                {"name": region, "rank": rank, "rtt_ms": round(time.rtt_s * 1000, 2) if is_measured else None,
                 "is_measured": is_measured, "basis": time.basis.value, "nodes": len(nodes) + is_own,
                 "nodes_up": sum(_state(one, now) == "up" for one in nodes) + (is_own and not self.is_draining)}
            )  # fmt: skip
        return rows


def _write(path: str, data: bytes) -> None:
    descriptor = os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    os.replace(path + ".new", path)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _said(peer: PeerSection) -> tuple[RegionCode, str, int]:
    return RegionCode(peer.region), peer.host, peer.port


def _state(node: Node, now: float) -> str:
    state = node.lease.state(now)
    return "up" if state is PeerState.HEALTHY else state.value


def _started(states: Iterable[MachineState]) -> int:
    return sum(one is MachineState.STARTED for one in states)


def _loads_of(entry: Entry, in_flight: Callable[[int], int]) -> Iterable[RemoteLoad]:
    """How the running, healthy machines of each service stand."""
    for service in entry.plan.services:
        below_soft = below_hard = full = 0
        for machine in entry.machines:
            row = machine.row
            if machine.state is not MachineState.STARTED or row.cordoned or row.group not in service.processes:
                continue
            if service.internal_port in row.failing_ports:
                continue
            load = in_flight(row.slot)
            if service.hard_limit is not None and load >= service.hard_limit:
                full += 1
            elif load < service.soft_limit:
                below_soft += 1
            else:
                below_hard += 1
        if below_soft or below_hard or full:
            yield RemoteLoad(entry.plan.name, service.internal_port, below_soft, below_hard, full)


class _Outgoing:
    """What this control says to one peer."""

    def __init__(self, peers: Peers, node: Node) -> None:
        self._peers = peers
        self._node = node
        self._task: asyncio.Task[None] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self.is_ready = False  # the peer has the whole: changes may follow
        self._missed: set[AppName] = set()  # changed while the peer is told of all apps
        self._probes: dict[int, float] = {}
        self._last_probe = 0

    def begin(self) -> None:
        self._task = spawn(self._keep(), f"peer {self._node.name}")

    def end(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._cut()

    async def _keep(self) -> None:
        tries = 0
        while True:
            began = self._peers._clock.monotonic()
            try:
                await self._talk()
                fault = "it ended the connection"
            except (OSError, TimeoutError, ValueError, asyncio.IncompleteReadError) as error:
                fault = explain(error) if isinstance(error, ssl.SSLError) else str(error) or type(error).__name__
            finally:
                self._cut()
            if self._node.fault != fault:
                self._node.fault = fault
                log.warning("node %s at %s:%d: %s", self._node.name, self._node.host, self._node.port, fault)
            tries = 0 if self._peers._clock.monotonic() - began > 10.0 else tries + 1
            wait_s = _RETRY_S[min(tries, len(_RETRY_S) - 1)]
            await self._peers._clock.sleep(wait_s * self._peers._rng.uniform(0.5, 1.0))

    async def _talk(self) -> None:
        node = self._node
        async with asyncio.timeout(_CONNECT_S):
            reader, writer = await asyncio.open_connection(
                node.host, node.port, ssl=self._peers.context(), server_hostname=dns_name(node.name),
                ssl_handshake_timeout=_CONNECT_S, ssl_shutdown_timeout=1.0, limit=1 << 16,
            )  # fmt: skip
        self._writer = writer
        if writer.get_extra_info("ssl_object").selected_alpn_protocol() != ALPN:
            raise ValueError(f"what listens there does not speak {ALPN}")
        writer.write(self._peers.hello())
        names = self._peers.own_apps()
        for start in range(0, len(names), _SLICE):
            writer.write(b"".join(self._peers.about(name) for name in names[start : start + _SLICE]))
            await writer.drain()
        self.is_ready = True
        missed, self._missed = self._missed, set()
        writer.write(b"".join(self._peers.about(name) for name in missed) + encode(AllTold()))
        frames = ipc.FrameReader(1024)
        while data := await reader.read(65_536):
            for body in frames.feed(data):
                message = decode(body)
                if isinstance(message, Echo):
                    self._on_echo(message.id)

    def tell(self, name: AppName, frames: bytes) -> None:
        """An app changed: while the peer is still being told of all, it comes after them."""
        if self.is_ready:
            self.send(frames)
        elif self._writer is not None:
            self._missed.add(name)

    def send(self, frame: bytes) -> None:
        writer = self._writer
        if writer is None or not self.is_ready:
            return
        writer.write(frame)
        if writer.transport.get_write_buffer_size() > _UNSENT_BYTES:
            log.warning("node %s does not read what it is told: it is told anew", self._node.name)
            self._cut()

    def probe(self, now: float) -> None:
        if self._writer is None or not self.is_ready:
            return
        for id in [id for id, sent in self._probes.items() if now - sent > 30.0]:
            del self._probes[id]
        self._last_probe += 1
        self._probes[self._last_probe] = now
        self.send(encode(Probe(self._last_probe)))

    def _on_echo(self, id: int) -> None:
        sent = self._probes.pop(id, None)
        if sent is not None:
            now = self._peers._clock.monotonic()
            with contextlib.suppress(LatencyError):
                self._peers.latency.sample(self._node.name, max(1e-6, now - sent), now)

    def _cut(self) -> None:
        self.is_ready = False
        self._missed.clear()
        self._probes.clear()
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.transport.abort()


class _Incoming:
    """What one peer says to this control."""

    def __init__(self, peers: Peers, node: Node, writer: asyncio.StreamWriter) -> None:
        self._peers = peers
        self._node = node
        self._writer = writer

    async def hear(self, reader: asyncio.StreamReader) -> None:
        frames = ipc.FrameReader(MAX_FRAME_BYTES)
        has_greeted = False
        try:
            while data := await self._read(reader):
                for body in frames.feed(data):
                    message = decode(body)
                    if message is None:
                        continue
                    if not has_greeted:
                        if not isinstance(message, PeerHello):
                            raise ValueError("it did not say who it is")
                        if abs(message.version - VERSION) > 1:
                            raise ValueError(f"it speaks version {message.version}, this node {VERSION}")
                        has_greeted = True
                        await self._peers.heard_hello(self._node, message)
                    elif isinstance(message, Probe):
                        self._writer.write(encode(Echo(message.id)))
                    else:
                        self._peers.heard(self._node, message)
        except ValueError as error:
            self._node.fault = str(error)
            log.warning("node %s is not listened to any longer: %s", self._node.name, error)
        except (ConnectionError, TimeoutError, OSError):
            pass  # it is gone, which its lease tells

    async def _read(self, reader: asyncio.StreamReader) -> bytes:
        """Nothing for so long is an end too: a path may swallow everything."""
        async with asyncio.timeout(10.0):
            return await reader.read(262_144)

    def drop(self, why: str) -> None:
        log.info("the connection from node %s is ended: %s", self._node.name, why)
        self._writer.transport.abort()
