"""A fleet's authority, certificates of it that should be refused, and two ends of TLS without a network between."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from certs import Certificate, Seal, SealedFolder, Storage, load_or_make_secret
from certs.cluster import ClusterCa, NodeIdentity
from certs.keys import key_from_pem, key_to_pem, key_usage, new_key
from certs.node_tls import joining_context, server_context
from proxy.control.joining import Newcomer
from proxy.control.membership import Membership
from proxy.wire.joining import ALPN, LENGTH, JoinAnswer, decode_answer

SECRET = bytes(range(32))
BOTH_ENDS = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)


def storage_in(folder: Path, secret: bytes = SECRET) -> SealedFolder:
    return SealedFolder(folder / "certs", Seal(secret))


def authority(folder: Path, now: Callable[[], float] = time.time) -> ClusterCa:
    """That of the fleet whose first node keeps its files in `folder`."""
    made = ClusterCa(storage_in(folder), now)
    made.make()
    return made


def signed(
    ca: ClusterCa,
    node: str = "b",
    *,
    names: tuple[str, ...] | None = None,
    from_s: float = -3600.0,
    until_s: float = 86_400.0,
    usage: tuple[x509.ObjectIdentifier, ...] = BOTH_ENDS,
    is_ca: bool = False,
    key: ec.EllipticCurvePrivateKey | None = None,
) -> NodeIdentity:
    """A node's certificate that is as our own are, but for what is said."""
    root, key, now = ca.bundle.root, key or new_key(), datetime.datetime.now(datetime.UTC)
    issuer = key_from_pem(root.key_pem)
    leaf = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(root.leaf.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(seconds=from_s))
        .not_valid_after(now + datetime.timedelta(seconds=until_s))
        .add_extension(
            x509.SubjectAlternativeName([general_name(one) for one in names or (f"{node}.node.wakefront",)]),
            critical=True,
        )
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        .add_extension(key_usage(digital_signature=True, key_cert_sign=is_ca), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usage), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key()), critical=False)
        .sign(issuer, hashes.SHA256())
    )
    pem = leaf.public_bytes(serialization.Encoding.PEM)
    return NodeIdentity(node, Certificate(node, pem, key_to_pem(key)), root.chain_pem)


def general_name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def der_of(identity: NodeIdentity) -> bytes:
    return identity.certificate.leaf.public_bytes(serialization.Encoding.DER)


@dataclass(slots=True)
class Shaken:
    """What came of a handshake, at both ends."""

    server: ssl.SSLObject
    client: ssl.SSLObject
    server_error: ssl.SSLError | None = None
    client_error: ssl.SSLError | None = None


def shake(server: ssl.SSLContext, client: ssl.SSLContext, meant: str | None = "a.node.wakefront") -> Shaken:
    """Shake hands over memory BIOs, as the edge's TLS does, and let each end read what the other has said last."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    shaken = Shaken(
        server.wrap_bio(to_server, to_client, server_side=True),
        client.wrap_bio(to_client, to_server, server_hostname=meant),
    )
    for _ in range(4):
        shaken.client_error = shaken.client_error or _step(shaken.client)
        shaken.server_error = shaken.server_error or _step(shaken.server)
    return shaken


def _step(end: ssl.SSLObject) -> ssl.SSLError | None:
    try:
        with contextlib.suppress(ssl.SSLWantReadError):
            end.do_handshake()
            end.read(1)
    except ssl.SSLError as error:
        return error
    return None


class Hasty:
    """The host's clock, whose sleeps are short and whose hands may be set."""

    def __init__(self, shift_s: float = 0.0) -> None:
        self.shift_s = shift_s
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return time.monotonic()

    def unix(self) -> float:
        return time.time() + self.shift_s

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await asyncio.sleep(min(seconds, 600.0) / 50)


class FleetNode:
    """A node that lets others join: its Membership, and TLS before it as a worker's is."""

    def __init__(
        self, folder: Path, name: str = "a", clock: Hasty | None = None, storage: Storage | None = None, **more: float
    ) -> None:
        self.folder = folder
        self.name = name
        self.clock = clock or Hasty()
        self.asked: list[bytes] = []  # all that newcomers have sent
        self._storage = storage or storage_in(folder, load_or_make_secret(folder / "secret.key"))
        self._more = more
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> FleetNode:
        self.membership = Membership(
            self._storage, self.clock, self.name, "ams", "127.0.0.1:1", **self._more
        )  # the port is known later
        await self.membership.open()
        await self.serve(server_context(self.membership.identity, (ALPN,), mutual=False))
        return self

    async def serve(self, context: ssl.SSLContext) -> None:
        """Accept with this context from now on."""
        await self.stop()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=context)
        self.port = self._server.sockets[0].getsockname()[1]
        await self.membership.move(f"127.0.0.1:{self.port}")

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._server = None

    async def __aexit__(self, *failure: object) -> None:
        await self.stop()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = writer.get_extra_info("peername")[:2]
        feed = reader.feed_data

        def overhear(data: bytes) -> None:
            self.asked.append(bytes(data))
            feed(data)

        reader.feed_data = overhear  # type: ignore[method-assign]  # of this one reader
        task = asyncio.get_running_loop().create_task(self.membership.serve_join(reader, writer, f"{host}:{port}"))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def token(self, **more: Any) -> str:
        return (await self.membership.invite(**more)).token


def newcomer(folder: Path, name: str = "b", region: str = "fra") -> Newcomer:
    return Newcomer(name, region, f"127.0.0.1:{1000 + len(name)}", folder)


def cluster_of(folder: Path) -> ClusterCa:
    """What a node's folder holds, as its next start would find it."""
    return ClusterCa(storage_in(folder, load_or_make_secret(folder / "secret.key")), time.time)


async def ask_raw(port: int, data: bytes, *, source: str = "127.0.0.1", end: bool = False) -> bytes:
    """Send bytes as a newcomer would, and give all that comes back."""
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", port, ssl=joining_context(None, (ALPN,)), local_addr=(source, 0)
    )
    try:
        writer.write(data)
        if end:
            writer.transport.abort()
            return b""
        return await asyncio.wait_for(reader.read(), 10)
    except ConnectionError:
        return b""
    finally:
        writer.transport.abort()


def answer_in(data: bytes) -> JoinAnswer:
    (length,) = LENGTH.unpack(data[:4])
    assert len(data) == 4 + length
    return decode_answer(data[4:])
