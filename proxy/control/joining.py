"""How a node joins a fleet, from its own side: `wakefront node join`, where nothing of the node need run.

    1  the fleet's root is fetched from whoever answers at the invite's address; it has to be the one the invite names
    2  over a connection verified by it, with the node that invites and no other, the invite's secret is exchanged for
       a certificate and what makes a node one of the fleet
    3  that is checked, and stored sealed; the bundle last, so that until then nothing has changed

A secret is shown to nobody before step 2 has verified who asks. What comes is from another machine: it is judged before
it is kept, and made fit for a terminal before it is shown.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from certs import CertificateError, Seal, SealedFolder, Storage, load_or_make_secret
from certs.cluster import Bundle, ClusterCa, dns_name
from certs.node_tls import explain, joining_context, judge_peer
from proxy.clock import Clock
from proxy.config import parse_remote
from proxy.control.membership import first_nodes, key_of, load_nodes, row_fault
from proxy.wire.joining import (
    ALPN,
    LENGTH,
    PROTOCOL,
    Invite,
    JoinAnswer,
    JoinRequest,
    NodeRow,
    body_length,
    decode_answer,
    encode_frame,
)

STEP_S: Final = 10.0  # for a question and its answer
_BUSY_PAUSES_S: Final = (1.0, 2.0, 4.0)  # before a question that found too many others is asked again
_ROOM_BYTES: Final = 256 * 1024  # more than all that joining stores


class JoinFailed(Exception):
    """Why this node has not joined, and what to do, as sentences."""


@dataclass(frozen=True, slots=True)
class Newcomer:
    """The node that joins."""

    name: str
    region: str
    address: str  # "HOST:PORT" at which others reach it
    data_dir: Path


@dataclass(frozen=True, slots=True)
class Joined:
    """What came of it."""

    inviter: str
    fingerprint: str  # of the fleet's root, in hex
    nodes: tuple[NodeRow, ...]  # of the fleet, this one too
    left_own_ca: bool  # this node had made a CA of its own before, which is kept aside
    is_running: bool


async def join(token: str, newcomer: Newcomer, clock: Clock, *, step_s: float = STEP_S) -> Joined:
    """Join the fleet that the invite is of. Raises JoinFailed; then this node is what it was."""
    try:
        invite = Invite.from_token(token)
    except ValueError as error:
        raise JoinFailed(f"The invite cannot be used: {error}.") from error
    if (address := parse_remote(invite.address)) is None:
        raise JoinFailed(f"The invite leads to {_printable(invite.address)}, which is no address.")
    try:
        _check_owner(newcomer.data_dir)
        storage = SealedFolder(newcomer.data_dir / "certs", Seal(load_or_make_secret(newcomer.data_dir / "secret.key")))
        ca = ClusterCa(storage, clock.unix)
        before = ca.load()
        is_running = _runs(newcomer.data_dir)
        _check_free(before, invite, newcomer, storage, is_running)
        _check_room(storage)
        csr = _certificate_request(ca, newcomer.name)
    except (CertificateError, OSError) as error:
        raise JoinFailed(f"What this node has in {newcomer.data_dir} cannot be used: {error}.") from error
    inviter = _Inviter(invite, address, clock, step_s)
    root = await inviter.fetch_root()
    question = JoinRequest(
        PROTOCOL, "join", invite.id, invite.secret, newcomer.name, newcomer.region, newcomer.address, csr
    )
    answer = await inviter.ask(question, root)
    bundle = _judge(answer, invite, newcomer, ca, clock.unix())
    nodes = _nodes(answer, newcomer, key_of(ca.node_key().public_key()), clock.unix())
    try:
        first_nodes(storage, nodes)
        ca.adopt(bundle, newcomer.name, answer.chain)
    except (CertificateError, OSError) as error:
        raise JoinFailed(
            f"The fleet has taken this node in, but that cannot be stored in {newcomer.data_dir}: {error}. Mend that, "
            "and join with a new invite; this one is used."
        ) from error
    return Joined(invite.node, bundle.fingerprint.hex(), nodes, before is not None, is_running)


# --- before


def _check_owner(data_dir: Path) -> None:
    """What is written here the node has to read: the folder is made as `serve` makes it, or is ours already.

    Raises JoinFailed or OSError.
    """
    os.makedirs(data_dir, mode=0o700, exist_ok=True)
    if (owner := data_dir.stat().st_uid) != os.geteuid():
        raise JoinFailed(f"{data_dir} belongs to another user (uid {owner}): run this as the user the node runs as.")


def _check_free(before: Bundle | None, invite: Invite, newcomer: Newcomer, storage: Storage, is_running: bool) -> None:
    """Whether there is nothing here that joining would take away. Raises JoinFailed."""
    if before is None:
        return
    if before.fingerprint == invite.fingerprint:
        raise JoinFailed("This node is of that fleet already.")
    others = [one.name for one in load_nodes(storage) if one.name != newcomer.name]
    if others:
        named = ", ".join(others[:5]) + (" and others" if others[5:] else "")
        folder = newcomer.data_dir / "certs" / "cluster"
        raise JoinFailed(
            f"This node is of another fleet, with {named}. To leave it, stop the node and move {folder} away."
        )
    if is_running:
        raise JoinFailed("This node runs, as the first of a fleet of its own: stop it, join, and start it again.")


def _runs(data_dir: Path) -> bool:
    """Whether a supervisor holds the folder (rundir.py)."""
    try:
        with open(data_dir / "run" / "supervisor.pid") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _check_room(storage: Storage) -> None:
    """Find out that the disk is full before the invite is used. Raises OSError."""
    try:
        storage.save("cluster/room", bytes(_ROOM_BYTES))
    finally:
        storage.delete("cluster/room")


def _certificate_request(ca: ClusterCa, name: str) -> bytes:
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    request = request.add_extension(x509.SubjectAlternativeName([x509.DNSName(dns_name(name))]), critical=True)
    return request.sign(ca.node_key(), hashes.SHA256()).public_bytes(serialization.Encoding.DER)


# --- the node that invites


class _Inviter:
    """Asks the node that an invite names; each question is a connection of its own."""

    def __init__(self, invite: Invite, address: tuple[str, int], clock: Clock, step_s: float) -> None:
        self._invite = invite
        self._address = address
        self._clock = clock
        self._step_s = step_s

    async def fetch_root(self) -> bytes:
        """The fleet's root in PEM, which is the one that the invite names. Raises JoinFailed."""
        answer = await self.ask(JoinRequest(PROTOCOL, "root"), None)
        if hashlib.sha256(answer.root).digest() != self._invite.fingerprint:
            raise JoinFailed(
                f"What answers at {self._invite.address} is not of the fleet that the invite is of: either somebody is "
                "in between, or that node has joined another fleet since. Nothing was told to it."
            )
        try:
            root = x509.load_der_x509_certificate(answer.root)
        except ValueError as error:
            raise JoinFailed(f"The root of the fleet cannot be read: {error}.") from error
        return root.public_bytes(serialization.Encoding.PEM)

    async def ask(self, question: JoinRequest, root_pem: bytes | None) -> JoinAnswer:
        """The answer, which is no refusal. Raises JoinFailed."""
        for pause_s in (*_BUSY_PAUSES_S, None):
            answer = await self._exchange(question, root_pem)
            if answer.op != "refused":
                break
            if answer.code != "busy" or pause_s is None:
                raise JoinFailed(f"The node at {self._invite.address} refuses: {_printable(answer.detail)}.")
            await self._clock.sleep(pause_s)
        wanted = "joined" if question.op == "join" else question.op
        if answer.version != PROTOCOL or answer.op != wanted:
            raise JoinFailed(f"The node at {self._invite.address} is of a version that this one does not understand.")
        return answer

    async def _exchange(self, question: JoinRequest, root_pem: bytes | None) -> JoinAnswer:
        where = self._invite.address
        used = " The invite may be used up by now: ask for a new one." if question.op == "join" else ""
        try:
            async with asyncio.timeout(self._step_s), self._connected(root_pem) as (reader, writer):
                writer.write(encode_frame(question))
                await writer.drain()
                length = body_length(await reader.readexactly(LENGTH.size))
                return decode_answer(await reader.readexactly(length))
        except TimeoutError as error:
            raise JoinFailed(f"The node at {where} took longer than {self._step_s:g} s.{used}") from error
        except asyncio.IncompleteReadError as error:
            raise JoinFailed(f"The node at {where} has closed without an answer.{used}") from error
        except ssl.SSLError as error:
            raise JoinFailed(f"The node at {where}: {_printable(explain(error))}.") from error
        except OSError as error:
            raise JoinFailed(f"The node at {where} cannot be reached: {error.strerror or error}.") from error
        except ValueError as error:
            raise JoinFailed(
                f"The node at {where} answers with what cannot be read: {_printable(str(error))}."
            ) from error

    @contextlib.asynccontextmanager
    async def _connected(
        self, root_pem: bytes | None
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection(
            *self._address, ssl=joining_context(root_pem, (ALPN,)), server_hostname=dns_name(self._invite.node)
        )
        try:
            tls: ssl.SSLObject = writer.get_extra_info("ssl_object")
            if tls.selected_alpn_protocol() != ALPN:
                raise ValueError(f"it does not speak {ALPN}: is that a node's backhaul?")
            if root_pem is not None:
                root = x509.load_pem_x509_certificate(root_pem)
                name = judge_peer(tls.getpeercert(binary_form=True), root, self._clock.unix())
                if name != self._invite.node:
                    raise ValueError(f"it is the node {name!r}, not {self._invite.node!r}")
            yield reader, writer
        finally:
            writer.transport.abort()  # all that was to come has come, and nobody waits for a goodbye


# --- what came


def _judge(answer: JoinAnswer, invite: Invite, newcomer: Newcomer, ca: ClusterCa, now: float) -> Bundle:
    """Whether it makes this node one of the fleet. Raises JoinFailed."""
    try:
        bundle = Bundle.from_bytes(answer.bundle)
        if bundle.fingerprint != invite.fingerprint:
            raise CertificateError("the root is not that of the invite")
        leaf = x509.load_pem_x509_certificate(answer.chain)
        name = judge_peer(leaf.public_bytes(serialization.Encoding.DER), bundle.root.leaf, now)
        if name != newcomer.name or leaf.public_key() != ca.node_key().public_key():
            raise CertificateError("the certificate is not this node's")
    except ValueError as error:
        raise JoinFailed(
            f"What the node at {invite.address} gave cannot be used: {_printable(str(error))}. The invite is used."
        ) from error
    return bundle


def _nodes(answer: JoinAnswer, newcomer: Newcomer, key: str, now: float) -> tuple[NodeRow, ...]:
    """This node as the inviter has entered it, and the others; what makes no sense is left out."""
    rows = [one for one in answer.nodes if row_fault(one) is None]
    mine = NodeRow(newcomer.name, newcomer.region, newcomer.address, key, now)
    mine = next((one for one in rows if (one.name, one.key) == (mine.name, mine.key)), mine)
    return (mine, *(one for one in rows if one.key != key and one.name != mine.name))


def _printable(text: str) -> str:
    return "".join(one if one.isprintable() else " " for one in text)[:400].rstrip(". ")
