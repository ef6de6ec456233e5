"""Who is of this node's fleet: its own certificate, the nodes that it knows, invites, and newcomers who bring one.

    invite      a secret leaves in one line; what stays is its hash, when it expires, and whether it was used
    serve_join  a newcomer asks for the root, then with the secret for a certificate; what it gets makes it a full
                member: the authority's key and the fleet's secret too, so that the node that invited may be lost
    keep        renews the node's own certificate

An invite is used once: that is on disk before the answer leaves, so that a crash in between costs the invite and lets
nobody in twice. Who comes with a wrong one learns nothing but that, late, whatever is wrong with it. All that is kept
is one sealed value, `cluster/membership`; connections come decrypted from a worker (ALPN `wakefront-join/1`).

A node's key tells it from another that only has its name. What others say of further nodes comes in by `learn`.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import re
import secrets
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from certs import CertificateError, Storage
from certs.cluster import Bundle, ClusterCa, NodeIdentity, dns_name
from certs.errors import NameRefusedError, PeerRefusedError
from certs.node_tls import judge_peer
from proxy.clock import Clock, spawn
from proxy.config import is_region_code, parse_remote
from proxy.decide.access import source_key
from proxy.process import ListenAddress
from proxy.wire.joining import (
    LENGTH,
    PROTOCOL,
    SECRET_BYTES,
    Invite,
    JoinAnswer,
    JoinRequest,
    NodeRow,
    body_length,
    decode_request,
    encode_frame,
)

log = logging.getLogger(__name__)

DEFAULT_VALID_S: Final = 900.0
LONGEST_VALID_S: Final = 7 * 86_400.0
MAX_OPEN_INVITES: Final = 64
STEP_S: Final = 10.0  # for a question to come, and for its answer to leave
_KEPT_S: Final = 86_400.0  # invites that were used or have expired are shown for so long
_AT_ONCE: Final = 16  # newcomers
_AT_ONCE_OF_SOURCE: Final = 4
_BUSY_AT_ONCE: Final = 64  # that are told to come again; more are closed
_BUSY_S: Final = 2.0
_WRONG_S: Final = 1.0  # until a wrong invite is answered
_WRONG_OF_SOURCE: Final = 10  # then a source waits for the rest of the window
_WRONG_WINDOW_S: Final = 60.0
_SOURCES: Final = 1024
_NODES_BYTES: Final = 48 * 1024  # of an answer
_RENEWAL_LOOK_S: Final = 600.0
_RENEWAL_RETRY_S: Final = 30.0
_STORED_VERSION: Final = 1
_MEMBERSHIP: Final = "cluster/membership"
_WRONG_INVITE: Final = "the invite is not known here, or was used, or has expired: have a new one made"

Json = dict[str, Any]  # Any: JSON

_key_is_valid = re.compile(r"[0-9a-f]{64}").fullmatch


class MembershipRefused(Exception):
    """Why an invite cannot be made or taken back: `code` is not_found, invalid or unavailable."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class InviteRow(msgspec.Struct, frozen=True, omit_defaults=True):
    """An invite, without its secret."""

    id: str
    hash: bytes  # SHA-256 of the secret
    created_at: float  # unix seconds
    expires_at: float
    replace: str = ""  # the name that a newcomer may take from a node that has it
    used_at: float = 0.0
    used_by: str = ""

    def state(self, now: float) -> str:
        return "used" if self.used_at else "expired" if now >= self.expires_at else "open"


class _Kept(msgspec.Struct, frozen=True, omit_defaults=True):
    """All that is stored."""

    version: int = _STORED_VERSION
    nodes: tuple[NodeRow, ...] = ()
    invites: tuple[InviteRow, ...] = ()


@dataclass(frozen=True, slots=True)
class Issued:
    """A new invite; the token is shown once."""

    row: InviteRow
    address: str
    token: str = field(repr=False)


def advertised(backhaul: ListenAddress | None) -> str:
    """Where others reach what listens there; "" where that does not say: a wildcard, a port that is chosen later."""
    if backhaul is None or not backhaul.port or ipaddress.ip_address(backhaul.host).is_unspecified:
        return ""
    return f"[{backhaul.host}]:{backhaul.port}" if ":" in backhaul.host else f"{backhaul.host}:{backhaul.port}"


def key_of(public_key: Any) -> str:  # Any: a public key of whatever kind
    """By what a node's key is known: SHA-256 of its SubjectPublicKeyInfo, in hex."""
    der = public_key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def load_nodes(storage: Storage) -> tuple[NodeRow, ...]:
    """The nodes that are known, where no Membership runs. Raises CertificateError or OSError."""
    return _load(storage).nodes


def first_nodes(storage: Storage, rows: Iterable[NodeRow]) -> None:
    """What a node knows that has just joined."""
    _save(storage, _Kept(nodes=tuple(rows)))


def _load(storage: Storage) -> _Kept:
    data = storage.load(_MEMBERSHIP)
    if data is None:
        return _Kept()
    try:
        kept = msgspec.msgpack.decode(data, type=_Kept)
    except msgspec.MsgspecError as error:
        raise CertificateError(f"what is known of the fleet cannot be read: {error}") from error
    if kept.version > _STORED_VERSION:
        raise CertificateError(f"a newer version wrote what is known of the fleet: {kept.version}")
    return kept


def _save(storage: Storage, kept: _Kept) -> None:
    storage.save(_MEMBERSHIP, msgspec.msgpack.encode(kept))


class Membership:
    """This node in its fleet. `open` it first; `keep` runs until it is cancelled."""

    def __init__(
        self, storage: Storage, clock: Clock, node: str, region: str, address: str, *, step_s: float = STEP_S
    ) -> None:
        """`address`: "HOST:PORT" at which other nodes reach this one, "" where the configuration does not say."""
        self._storage = storage
        self._clock = clock
        self._node = node
        self._region = region
        self._address = address
        self._step_s = step_s
        self._ca = ClusterCa(storage, clock.unix)
        self._identity: NodeIdentity | None = None
        self._kept = _Kept()
        self._changing = asyncio.Lock()  # of what is kept: from the look at it until it is on disk
        self._busy = 0
        self._sources: Counter[str | int] = Counter()
        self._wrong: OrderedDict[str | int, tuple[int, float]] = OrderedDict()  # source -> how many, since when
        self.refused = 0  # invites that were wrong
        self.was_made = False  # the authority, by this very `open`
        self.fault = ""  # why the certificate is not renewed
        self.on_identity: Callable[[NodeIdentity], None] = lambda identity: None  # it was renewed

    # --- this node

    async def open(self) -> None:
        """Load what makes this node one of a fleet, or make it: then it is the first.

        Raises CertificateError or OSError.
        """
        await asyncio.to_thread(self._open)
        if self.was_made:
            log.info(
                "this is the first node of a new fleet, whose CA was made now (%s): others join it by an invite "
                "(`wakefront node invite`); to join another fleet instead, stop and use `wakefront node join`",
                self.bundle.fingerprint.hex()[:16],
            )

    def _open(self) -> None:
        self.was_made = self._ca.load() is None
        self._ca.make()
        identity = self._ca.identity(self._node)
        kept = _load(self._storage)
        key = key_of(identity.certificate.leaf.public_key())
        if any(one.name == self._node and one.key != key for one in kept.nodes):
            raise CertificateError(
                f"two nodes with one name: another node of the fleet is {self._node!r} already. Give this one another "
                "[node] name"
            )
        mine = NodeRow(self._node, self._region, self._address, key, self._clock.unix())
        own = next((one for one in kept.nodes if one.key == key), None)  # it may have had another name
        if own is not None:
            mine = msgspec.structs.replace(
                own, name=self._node, region=self._region, backhaul=self._address or own.backhaul
            )
            if mine != own:
                mine = msgspec.structs.replace(mine, revision=own.revision + 1)
        others = tuple(one for one in kept.nodes if one.key != key)
        if (new := msgspec.structs.replace(kept, nodes=(mine, *others))) != kept:
            _save(self._storage, new)
        self._kept, self._identity = new, identity

    @property
    def identity(self) -> NodeIdentity:
        assert self._identity is not None, "not opened"
        return self._identity

    @property
    def bundle(self) -> Bundle:
        return self._ca.bundle

    async def keep(self) -> None:
        """Renew the certificate in time; what fails is told once and tried again."""
        while True:
            wait_s = _RENEWAL_LOOK_S
            try:
                identity = await asyncio.to_thread(self._ca.identity, self._node)
            except (CertificateError, OSError) as error:
                wait_s = _RENEWAL_RETRY_S
                if self.fault != str(error):
                    self.fault = str(error)
                    log.error("the certificate of this node is not renewed: %s", error)
            else:
                self.fault = ""
                if identity != self._identity:
                    log.info("the certificate of this node was renewed")
                    self._identity = identity
                    self.on_identity(identity)
            await self._clock.sleep(wait_s)

    async def move(self, address: str) -> None:
        """Others reach this node elsewhere from now on; "" is no news. Raises OSError if that cannot be stored."""
        if not address:
            return
        async with self._changing:
            await self._change(msgspec.structs.replace(self._kept, nodes=self._nodes_with(address)))

    def _nodes_with(self, address: str) -> tuple[NodeRow, ...]:
        mine, *others = self._kept.nodes
        if mine.backhaul != address:
            mine = msgspec.structs.replace(mine, backhaul=address, revision=mine.revision + 1)
        return (mine, *others)

    def status(self) -> Json:
        return {
            "root": self.bundle.fingerprint.hex(),
            "origin": self.bundle.origin,
            "address": self._kept.nodes[0].backhaul,
            "certificate_expires_at": self.identity.expires_at,
            "nodes": len(self._kept.nodes),
            "invites_refused": self.refused,
        }

    # --- the other nodes

    @property
    def nodes(self) -> tuple[NodeRow, ...]:
        """All that are known, this one first."""
        return self._kept.nodes

    def judge(self, der: bytes | None) -> str:
        """The node that a certificate is of. Raises PeerRefusedError: for another key than its name has, too."""
        name = judge_peer(der, self.identity.root, self._clock.unix())
        assert der is not None
        known = next((one for one in self._kept.nodes if one.name == name), None)
        if known is not None and known.key != key_of(x509.load_der_x509_certificate(der).public_key()):
            raise PeerRefusedError(
                f"two nodes with one name: it is {name!r} with another key than the {name!r} that is known here; give "
                f"one of them another name, or let it join again with an invite made with --replace {name}"
            )
        return name

    async def learn(self, rows: Iterable[NodeRow]) -> list[str]:
        """Take over what another node knows; what contradicts what is known here is returned, as sentences.

        Raises OSError if it cannot be stored.
        """
        async with self._changing:
            known = _Known(self._kept.nodes)
            for row in rows:
                known.learn(row)
            await self._change(msgspec.structs.replace(self._kept, nodes=known.rows))
        return known.faults

    # --- invites

    async def invite(self, valid_s: float = DEFAULT_VALID_S, address: str = "", replace: str = "") -> Issued:
        """Make an invite. Raises MembershipRefused."""
        if not 1 <= valid_s <= LONGEST_VALID_S:
            raise MembershipRefused("invalid", f"an invite is valid for 1 s to {LONGEST_VALID_S / 86_400:g} days")
        if not (address := address or self._kept.nodes[0].backhaul):
            raise MembershipRefused(
                "invalid",
                "[listen] backhaul says where this node listens, not where others reach it: name that with --address",
            )
        if parse_remote(address) is None:
            raise MembershipRefused("invalid", f"{address[:80]!r} is not HOST:PORT of this node's backhaul")
        if replace:
            if replace == self._node:
                raise MembershipRefused("invalid", "this node itself cannot be replaced")
            if all(one.name != replace for one in self._kept.nodes):
                raise MembershipRefused("not_found", f"no node is called {replace[:80]!r}")
        now, secret = self._clock.unix(), secrets.token_bytes(SECRET_BYTES)
        row = InviteRow(secrets.token_hex(6), hashlib.sha256(secret).digest(), now, now + valid_s, replace)
        async with self._changing:
            invites = self._fresh_invites(now)
            if sum(one.state(now) == "open" for one in invites) >= MAX_OPEN_INVITES:
                raise MembershipRefused("unavailable", f"{MAX_OPEN_INVITES} invites are open: take some back first")
            nodes = self._kept.nodes if self._kept.nodes[0].backhaul else self._nodes_with(address)
            try:
                await self._change(msgspec.structs.replace(self._kept, nodes=nodes, invites=(*invites, row)))
            except OSError as error:
                raise MembershipRefused("unavailable", f"the invite cannot be stored: {error}") from error
        log.info("invite %s was made, valid for %g s", row.id, valid_s)
        token = Invite(self._node, address, self.bundle.fingerprint, row.id, secret).to_token()
        return Issued(row, address, token)

    def invites(self) -> list[InviteRow]:
        """Open ones, and those of the last day."""
        return list(self._fresh_invites(self._clock.unix()))

    async def revoke(self, id: str) -> None:
        """Take an invite back. Raises MembershipRefused."""
        async with self._changing:
            invites = tuple(one for one in self._kept.invites if one.id != id)
            if len(invites) == len(self._kept.invites):
                raise MembershipRefused("not_found", f"there is no invite {id[:40]!r}")
            try:
                await self._change(msgspec.structs.replace(self._kept, invites=invites))
            except OSError as error:
                raise MembershipRefused("unavailable", f"the invite cannot be taken back: {error}") from error
        log.info("invite %s was taken back", id)

    def _fresh_invites(self, now: float) -> tuple[InviteRow, ...]:
        return tuple(one for one in self._kept.invites if now < max(one.expires_at, one.used_at) + _KEPT_S)

    async def _change(self, new: _Kept) -> None:
        """Have it on disk, then count on it. Not to be cut off in between: disk and memory would differ."""
        if new == self._kept:
            return
        storing = spawn(self._store(new), "membership")
        try:
            fault = await asyncio.shield(storing)
        except asyncio.CancelledError:
            await asyncio.wait({storing})
            raise
        if fault is not None:
            raise fault

    async def _store(self, new: _Kept) -> OSError | None:
        try:
            await asyncio.to_thread(_save, self._storage, new)
        except OSError as error:
            return error
        self._kept = new
        return None

    # --- newcomers

    async def serve_join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, from_: str) -> None:
        """Answer one question of a newcomer, whose address is "IP:PORT", and close."""
        source = _source_of(from_)
        try:
            if not self._has_room(source):
                await self._put_off(reader, writer)
                return
            self._sources[source] += 1
            try:
                async with asyncio.timeout(self._step_s):
                    body = await _read_frame(reader)
                answer = await self._answer(body, source, from_)
                async with asyncio.timeout(self._step_s):
                    writer.write(_fitting(answer))
                    await writer.drain()
            finally:
                self._sources[source] -= 1
                if not self._sources[source]:
                    del self._sources[source]
        except TimeoutError:
            log.warning("%s, who would join, took longer than %g s", from_, self._step_s)
        except (asyncio.IncompleteReadError, OSError) as error:
            log.info("%s, who would join, has gone: %s", from_, error)
        except ValueError as error:
            log.warning("%s, who would join, sent what is no message: %s", from_, error)
        finally:
            writer.close()

    def _has_room(self, source: str | int) -> bool:
        if self._sources.total() >= _AT_ONCE or self._sources[source] >= _AT_ONCE_OF_SOURCE:
            return False
        count, since = self._wrong.get(source, (0, 0.0))
        return count < _WRONG_OF_SOURCE or self._clock.monotonic() - since >= _WRONG_WINDOW_S

    async def _put_off(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Say to come again. The question is read first: closing before would cost the newcomer the answer."""
        if self._busy >= _BUSY_AT_ONCE:
            return
        self._busy += 1
        try:
            async with asyncio.timeout(min(_BUSY_S, self._step_s)):
                await _read_frame(reader)
                writer.write(encode_frame(_refusal("busy", "too many would join at once: try again in a minute")))
                await writer.drain()
        finally:
            self._busy -= 1

    async def _answer(self, body: bytes, source: str | int, from_: str) -> JoinAnswer:
        try:
            request = decode_request(body)
        except ValueError as error:
            log.warning("%s, who would join, sent what cannot be read: %s", from_, error)
            return _refusal("request", "the question cannot be read")
        if request.version != PROTOCOL:
            return _refusal("version", f"version {request.version} of the protocol, this node speaks {PROTOCOL}")
        match request.op:
            case "root":
                return JoinAnswer(PROTOCOL, "root", root=self.bundle.root_der, node=self._node)
            case "join":
                return await self._join(request, source, from_)
        return _refusal("request", "the question is of another version")

    async def _join(self, request: JoinRequest, source: str | int, from_: str) -> JoinAnswer:
        async with self._changing:
            now = self._clock.unix()
            invite = self._find_invite(request, now)
            if invite is not None:
                return await self._let_in(request, invite, now, from_)
        self.refused += 1
        self._count_wrong(source)
        log.warning("%s would join with an invite that is not known here, was used or has expired", from_)
        await self._clock.sleep(_WRONG_S)
        return _refusal("invite", _WRONG_INVITE)

    def _find_invite(self, request: JoinRequest, now: float) -> InviteRow | None:
        """The open invite that the secret belongs to; the same work whatever is wrong."""
        given = hashlib.sha256(request.secret).digest()
        found = next((one for one in self._kept.invites if one.id == request.id), None)
        is_right = hmac.compare_digest(given, found.hash if found is not None else bytes(len(given)))
        return found if found is not None and is_right and found.state(now) == "open" else None

    def _count_wrong(self, source: str | int) -> None:
        now = self._clock.monotonic()
        count, since = self._wrong.pop(source, (0, now))
        self._wrong[source] = (count + 1, since) if now - since < _WRONG_WINDOW_S else (1, now)
        while len(self._wrong) > _SOURCES:
            self._wrong.popitem(last=False)

    async def _let_in(self, request: JoinRequest, invite: InviteRow, now: float, from_: str) -> JoinAnswer:
        """What is wrong with the question leaves the invite as it is: it may be asked again."""
        try:
            public_key = _key_of_csr(request.csr)
        except ValueError as error:
            return _refusal("request", str(error))
        row = NodeRow(request.node, request.region, request.backhaul, key_of(public_key), now)
        if (fault := row_fault(row)) is not None:
            return _refusal("request", fault)
        if row.key == self._kept.nodes[0].key:
            return _refusal(
                "name", "its key is this node's own: its data_dir is a copy of this one's. Give it a new one"
            )
        known = next((one for one in self._kept.nodes if one.name == row.name), None)
        if known is not None and known.key != row.key:
            if invite.replace != row.name:
                return _refusal(
                    "name",
                    f"two nodes with one name: {row.name!r} is a node of the fleet already. Give this one another "
                    f"[node] name, or, if it takes that one's place, have an invite made with --replace {row.name}",
                )
            row = msgspec.structs.replace(row, replaces=known.key)
        if (own := next((one for one in self._kept.nodes if one.key == row.key), None)) is not None:
            row = msgspec.structs.replace(row, replaces=own.replaces, revision=own.revision + 1)
        try:
            chain = await asyncio.to_thread(self._ca.sign, row.name, public_key)
            used = msgspec.structs.replace(invite, used_at=now, used_by=row.name)
            kept = _Kept(
                nodes=(*(one for one in self._kept.nodes if row.name != one.name and row.key != one.key), row),
                invites=tuple(used if one.id == invite.id else one for one in self._fresh_invites(now)),
            )
            await self._change(kept)
        except OSError as error:
            log.error("%s may join as %r, but that cannot be stored: %s", from_, row.name, error)
            return _refusal("unavailable", "the node that invites cannot store it now: is its disk full?")
        log.info("%s has joined as %r, region %r, by invite %s", from_, row.name, row.region, invite.id)
        return JoinAnswer(
            PROTOCOL, "joined", node=self._node, chain=chain, bundle=self.bundle.to_bytes(), nodes=kept.nodes
        )


class _Known:
    """The nodes that this one knows, while it hears of others; its own row is the first."""

    def __init__(self, rows: tuple[NodeRow, ...]) -> None:
        self._mine, *others = rows
        self._others = {one.name: one for one in others}
        self.faults: list[str] = []

    @property
    def rows(self) -> tuple[NodeRow, ...]:
        return (self._mine, *self._others.values())

    def learn(self, row: NodeRow) -> None:
        if (fault := row_fault(row)) is not None:
            self.faults.append(fault)
        elif row.key == self._mine.key:
            self._learn_of_myself(row)
        elif row.name == self._mine.name:
            self.faults.append(f"two nodes with one name: another node is {row.name!r} too")
        elif (before := self._others.get(row.name)) is not None and before.key != row.key:
            if row.replaces == before.key:
                self._others[row.name] = row
            elif before.replaces != row.key:  # else it is old news
                self.faults.append(f"two nodes with one name: {row.name!r} is known with different keys")
        else:
            own = next((one for one in self._others.values() if one.key == row.key), None)
            if own is None or row.revision > own.revision:
                if own is not None:  # it may have had another name
                    del self._others[own.name]
                self._others[row.name] = row

    def _learn_of_myself(self, row: NodeRow) -> None:
        """What I say goes: others that know a later revision, from before my disk was lost, are to take this one."""
        if row != self._mine and row.revision >= self._mine.revision:
            self._mine = msgspec.structs.replace(self._mine, revision=row.revision + 1)


def _refusal(code: str, detail: str) -> JoinAnswer:
    return JoinAnswer(PROTOCOL, "refused", code=code, detail=detail)


def _fitting(answer: JoinAnswer) -> bytes:
    """The frame; of many nodes as many as fit, the others come with the tables that nodes exchange."""
    size, nodes = 0, []
    for row in answer.nodes:
        size += len(msgspec.msgpack.encode(row))
        if size <= _NODES_BYTES:
            nodes.append(row)
    return encode_frame(msgspec.structs.replace(answer, nodes=tuple(nodes)))


async def _read_frame(reader: asyncio.StreamReader) -> bytes:
    return await reader.readexactly(body_length(await reader.readexactly(LENGTH.size)))


def _source_of(from_: str) -> str | int:
    host = from_.rpartition(":")[0].strip("[]")
    try:
        return source_key(str(ipaddress.ip_address(host)))
    except ValueError:
        return ""  # all whose address is not known count as one


def _key_of_csr(csr: bytes) -> ec.EllipticCurvePublicKey:
    """The key that a newcomer has proven to hold. Raises ValueError."""
    try:
        request = x509.load_der_x509_csr(csr)
        public_key = request.public_key()
        is_signed = request.is_signature_valid
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm) as error:
        raise ValueError("its certificate request cannot be read") from error
    if not is_signed:
        raise ValueError("its certificate request is not signed with its key")
    if not isinstance(public_key, ec.EllipticCurvePublicKey) or not isinstance(public_key.curve, ec.SECP256R1):
        raise ValueError("its certificate request is for another kind of key than P-256")
    return public_key


def row_fault(row: NodeRow) -> str | None:
    """What is wrong with what is said of a node, if anything is."""
    try:
        dns_name(row.name)
    except NameRefusedError as error:
        return str(error)
    if not is_region_code(row.region):
        return f"{row.region[:80]!r} is no region's code: expected lower case letters, digits and dashes"
    if row.backhaul and parse_remote(row.backhaul) is None:
        return f"{row.backhaul[:80]!r} is not HOST:PORT of a backhaul"
    if not _key_is_valid(row.key) or not (row.replaces == "" or _key_is_valid(row.replaces)):
        return f"{row.name!r} has no key by which it could be known"
    return None
