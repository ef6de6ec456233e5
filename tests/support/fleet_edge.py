"""Several edges on loopback in the test's own loop, each a node of one fleet: real TLS between them, no control.

What controls would tell each other the test says: `know` puts another node and what an app has there into a table.
"""

from __future__ import annotations

import asyncio
import functools
import socket
import ssl
import tempfile
from pathlib import Path
from typing import Any

import trustme
from cryptography import x509

from proxy.edge.backhaul import BackhaulIdentity, BackhaulListener
from proxy.edge.peer_tls import ALPN, ALPN_CONTROL, ALPN_JOIN, PeerEvents, PeerTls, tls_name
from proxy.edge.tls import TlsEnds
from proxy.model import App, AppName, MachineState, NodeName, Peer, RegionCode, RemoteLoad, RemoteMachine
from tests.support.edge import EdgeHarness


@functools.cache
def fleet_ca() -> trustme.CA:
    return trustme.CA(key_type=trustme.KeyType.ECDSA)


def client_context(ca: trustme.CA, leaf: trustme.LeafCert | None, alpn: tuple[str, ...] = (ALPN,)) -> ssl.SSLContext:
    """What a peer connects with; `leaf` None: it shows no certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(list(alpn))
    ca.configure_trust(context)
    if leaf is not None:
        leaf.configure_cert(context)
    return context


def identity(ca: trustme.CA, leaf: trustme.LeafCert) -> BackhaulIdentity:
    def made(mode: ssl.VerifyMode) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.set_alpn_protocols([ALPN, ALPN_CONTROL, ALPN_JOIN])
        context.verify_mode = mode
        ca.configure_trust(context)
        leaf.configure_cert(context)
        return context

    return BackhaulIdentity(made(ssl.CERT_REQUIRED), made(ssl.CERT_NONE), node_of)


def node_of(der: bytes) -> str:
    """As certs.node_tls.judge_peer, for certificates that are trustme's."""
    names = x509.load_der_x509_certificate(der).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    if len(names) != 1 or not names[0].value.endswith(".node.wakefront"):
        raise ValueError("its certificate names no node")
    return str(names[0].value).removesuffix(".node.wakefront")


class NodeHarness(EdgeHarness):
    """One node: an edge for clients, and its backhaul."""

    def __init__(self, node: str, region: str, **settings: Any) -> None:
        super().__init__(node, region, **settings)
        self.run_dir = tempfile.TemporaryDirectory(prefix="wakefront-run-")
        self._backhaul_socket = socket.create_server(("127.0.0.1", 0))
        self.backhaul_port: int = self._backhaul_socket.getsockname()[1]
        leaf = fleet_ca().issue_cert(tls_name(node))
        self._identity = identity(fleet_ca(), leaf)
        self.backhaul = BackhaulListener(self.edge, self._backhaul_socket, self.run_dir.name)
        context = client_context(fleet_ca(), leaf)
        ends = TlsEnds(self.edge.wheel, PeerEvents(), 1.0)
        self.edge.peer_tls = lambda name: PeerTls(ends, context, name)

    async def start(self) -> None:
        await super().start()
        await self.backhaul.set_identity(self._identity)

    @property
    def peer(self) -> Peer:
        return Peer(NodeName(self.node), RegionCode(self.region), "127.0.0.1", self.backhaul_port)

    def know(
        self, other: NodeHarness, app: App, *loads: RemoteLoad, port: int = 0, machines: tuple[RemoteMachine, ...] = ()
    ) -> None:
        """Hear of another node and of the machines that `app` has there, as that node's table has them now."""
        record = other.peer if not port else Peer(NodeName(other.node), RegionCode(other.region), "127.0.0.1", port)
        self.edge.table.set_peer(record)
        view = other.edge.table.apps.get(app.name)
        records = [one.record for one in view.machines.values()] if view is not None else []
        known = machines or tuple(RemoteMachine(one.id, one.group, one.state, one.failing_ports) for one in records)
        self.edge.table.set_site(app.name, NodeName(other.node), known)
        running = sum(one.state is MachineState.STARTED for one in known)
        self.edge.table.set_loads(NodeName(other.node), loads or (RemoteLoad(AppName(app.name), 8080, running, 0, 0),))

    async def stop(self) -> None:
        for name in list(self.edge.table.peers):
            self.edge.table.remove_peer(name)
        self.backhaul.stop()
        self.backhaul.drain()
        self.backhaul.end_tunnels()
        async with asyncio.timeout(5):
            while self.backhaul.connections:
                await asyncio.sleep(0.005)
        await super().stop()
        self._backhaul_socket.close()
        self.run_dir.cleanup()

    @property
    def run_path(self) -> Path:
        return Path(self.run_dir.name)
