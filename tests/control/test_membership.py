"""Nodes that join over real TLS on loopback, and all who should not."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import errno
import fcntl
import logging
import os
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from certs import CertificateError, storage
from certs.cluster import Bundle
from certs.errors import PeerRefusedError
from certs.keys import new_key
from certs.node_tls import client_context, joining_context, server_context
from proxy.control.joining import Joined, JoinFailed, Newcomer, join
from proxy.control.membership import (
    LONGEST_VALID_S,
    MAX_OPEN_INVITES,
    Membership,
    MembershipRefused,
    key_of,
)
from proxy.wire.joining import (
    ALPN,
    LENGTH,
    PROTOCOL,
    Invite,
    JoinAnswer,
    JoinRequest,
    NodeRow,
    decode_request,
    encode_frame,
)
from tests.support.fleet import (
    FleetNode,
    Hasty,
    answer_in,
    ask_raw,
    authority,
    cluster_of,
    der_of,
    newcomer,
    shake,
    signed,
    storage_in,
)


@pytest_asyncio.fixture
async def a(tmp_path: Path) -> AsyncIterator[FleetNode]:
    async with FleetNode(tmp_path / "a") as node:
        yield node


async def enter(token: str, who: Newcomer, clock: Hasty | None = None, **more: float) -> Joined:
    return await join(token, who, clock or Hasty(), **more)


def is_untouched(folder: Path) -> bool:
    """Whether it belongs to no fleet, and no half of a file is left."""
    left = [path for path in folder.rglob("*") if path.name.endswith(".new") or path.name == "room.sealed"]
    return cluster_of(folder).load() is None and not left


# --- joining


async def test_a_node_joins_by_one_line_and_both_know_each_other(a: FleetNode, tmp_path: Path) -> None:
    token = await a.token()
    assert "\n" not in token and len(token) < 300
    joined = await enter(token, newcomer(tmp_path / "b"))
    assert (joined.inviter, joined.left_own_ca, joined.is_running) == ("a", False, False)
    assert {one.name for one in joined.nodes} == {one.name for one in a.membership.nodes} == {"a", "b"}
    b = next(one for one in a.membership.nodes if one.name == "b")
    assert (b.region, b.backhaul) == ("fra", "127.0.0.1:1001")
    async with FleetNode(tmp_path / "b", "b") as other:
        assert other.membership.bundle.fingerprint == a.membership.bundle.fingerprint
        assert other.membership.bundle.secret == a.membership.bundle.secret
        assert not other.membership.was_made
        shaken = shake(
            server_context(a.membership.identity, ("wakefront/1",)),
            client_context(other.membership.identity, ("wakefront/1",)),
        )
        assert a.membership.judge(shaken.server.getpeercert(binary_form=True)) == "b"
        assert other.membership.judge(shaken.client.getpeercert(binary_form=True)) == "a"


async def test_a_third_node_joins_by_way_of_the_second_when_the_first_is_lost(tmp_path: Path) -> None:
    async with FleetNode(tmp_path / "a") as a:
        await enter(await a.token(), newcomer(tmp_path / "b"))
    shutil.rmtree(tmp_path / "a")
    async with FleetNode(tmp_path / "b", "b") as b:
        joined = await enter(await b.token(), newcomer(tmp_path / "c", "c"))
        assert {one.name for one in joined.nodes} == {"a", "b", "c"}
    async with FleetNode(tmp_path / "c", "c") as c:
        assert c.membership.bundle.fingerprint.hex() == joined.fingerprint


async def test_what_is_stored_after_joining_is_sealed_and_its_owners_alone(a: FleetNode, tmp_path: Path) -> None:
    await enter(await a.token(), newcomer(tmp_path / "b"))
    files = [path for path in (tmp_path / "b").rglob("*") if path.is_file()]
    assert len(files) >= 5
    for path in files:
        assert path.stat().st_mode & 0o077 == 0, path
        assert path.name == "secret.key" or b"PRIVATE KEY" not in path.read_bytes()


async def test_nodes_and_invites_outlive_a_restart(a: FleetNode, tmp_path: Path) -> None:
    used, unused = await a.token(), await a.token()
    await enter(used, newcomer(tmp_path / "b"))
    before = a.membership.nodes, a.membership.invites()
    async with FleetNode(tmp_path / "a") as again:
        assert {one.name for one in again.membership.nodes} == {one.name for one in before[0]}
        assert again.membership.invites() == before[1]
        token = Invite.from_token(unused)
        moved = Invite(token.node, f"127.0.0.1:{again.port}", token.fingerprint, token.id, token.secret).to_token()
        await enter(moved, newcomer(tmp_path / "c", "c"))


async def test_an_invite_may_say_another_address_than_the_configuration(a: FleetNode, tmp_path: Path) -> None:
    token = (await a.membership.invite(address=f"localhost:{a.port}")).token
    assert Invite.from_token(token).address == f"localhost:{a.port}"
    await enter(token, newcomer(tmp_path / "b"))


# --- invites that are none


async def test_an_invite_that_was_cut_or_altered_is_told_from_one_that_is_refused(a: FleetNode, tmp_path: Path) -> None:
    token = await a.token()
    for cut in range(0, len(token), 7):
        with pytest.raises(JoinFailed, match=r"not whole|not base64url"):
            await enter(token[:cut], newcomer(tmp_path / "b"))
    for at in range(0, len(token), 7):
        other = "A" if token[at] != "A" else "B"
        with pytest.raises(JoinFailed, match="not whole"):
            await enter(token[:at] + other + token[at + 1 :], newcomer(tmp_path / "b"))
    for junk in ("x" * 2000, "ä", "token!", " "):
        with pytest.raises(JoinFailed, match="The invite cannot be used"):
            await enter(junk, newcomer(tmp_path / "b"))
    assert a.asked == []
    await enter(f"  {token[:40]}\n {token[40:]}\n", newcomer(tmp_path / "b"))


def test_an_invite_of_another_version_or_kind_is_refused() -> None:
    invite = Invite("a", "127.0.0.1:1", bytes(32), "0" * 12, bytes(32))
    assert Invite.from_token(invite.to_token()) == invite
    assert "secret" not in repr(invite)
    for wrong in (
        Invite("a", "127.0.0.1:1", bytes(31), "0" * 12, bytes(32)),
        Invite("a", "127.0.0.1:1", bytes(32), "0" * 12, bytes(16)),
        Invite("a", "127.0.0.1:1", bytes(32), "../../x", bytes(32)),
    ):
        with pytest.raises(ValueError, match="none of"):
            Invite.from_token(wrong.to_token())


async def refusal(a: FleetNode, request: JoinRequest, source: str = "127.0.0.1") -> JoinAnswer:
    return answer_in(await ask_raw(a.port, encode_frame(request), source=source))


def question(token: str, who: Path, name: str = "b", **more: object) -> JoinRequest:
    invite = Invite.from_token(token)
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .sign(cluster_of(who).node_key(), hashes.SHA256())
        .public_bytes(serialization.Encoding.DER)
    )
    request = JoinRequest(PROTOCOL, "join", invite.id, invite.secret, name, "fra", "127.0.0.1:1001", csr)
    return msgspec.structs.replace(request, **more)


async def test_expired_forged_used_revoked_and_unknown_invites_are_refused_late_and_all_alike(
    a: FleetNode, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    used, expired, revoked, forged = [await a.token(), await a.token(valid_s=100), await a.token(), await a.token()]
    await enter(used, newcomer(tmp_path / "b"))
    await a.membership.revoke(Invite.from_token(revoked).id)
    a.clock.shift_s = 101
    questions = [
        question(used, tmp_path / "b"),
        question(expired, tmp_path / "c"),
        question(revoked, tmp_path / "c"),
        question(forged, tmp_path / "c", secret=bytes(32)),
        question(forged, tmp_path / "c", secret=b""),
        question(forged, tmp_path / "c", id="0" * 12),
    ]
    a.clock.slept.clear()
    answers = [await refusal(a, one) for one in questions]
    assert len(set(answers)) == 1
    assert (answers[0].op, answers[0].code) == ("refused", "invite")
    assert answers[0].bundle == answers[0].root == answers[0].chain == b"" and answers[0].nodes == ()
    assert a.clock.slept == [1.0] * len(questions)
    assert a.membership.refused == a.membership.status()["invites_refused"] == len(questions)
    assert caplog.text.count("127.0.0.1:") == len(questions)
    for one in questions:
        assert not one.secret or one.secret.hex() not in caplog.text
    with pytest.raises(JoinFailed, match="was used, or has expired"):
        await enter(expired, newcomer(tmp_path / "c", "c"))
    assert is_untouched(tmp_path / "c")


async def test_of_two_who_come_with_one_invite_at_once_exactly_one_gets_in(a: FleetNode, tmp_path: Path) -> None:
    token = await a.token()
    results = await asyncio.gather(
        *(enter(token, newcomer(tmp_path / f"n{one}", f"n{one}")) for one in range(4)), return_exceptions=True
    )
    assert sum(isinstance(one, Joined) for one in results) == 1
    assert all("was used" in str(one) for one in results if not isinstance(one, Joined))
    assert len(a.membership.nodes) == 2
    assert sum(cluster_of(tmp_path / f"n{one}").load() is not None for one in range(4)) == 1


async def test_a_crowd_with_wrong_invites_keeps_nobody_else_out(a: FleetNode, tmp_path: Path) -> None:
    token = await a.token()
    wrong = question(token, tmp_path / "x", secret=bytes(32))
    crowd = [asyncio.create_task(refusal(a, wrong, "127.0.0.9")) for _ in range(50)]
    await enter(token, newcomer(tmp_path / "b"))
    codes = [(await one).code for one in crowd]
    assert set(codes) == {"invite", "busy"} and codes.count("invite") <= 10
    assert a.membership.refused == codes.count("invite")
    while a.membership.refused < 10:
        await refusal(a, wrong, "127.0.0.9")
    assert (await refusal(a, wrong, "127.0.0.9")).code == "busy"  # it has guessed enough for a minute
    assert (await refusal(a, wrong, "127.0.0.10")).code == "invite"


async def test_who_finds_too_many_others_asks_again(a: FleetNode, tmp_path: Path) -> None:
    token = await a.token()
    stuck = [await asyncio.open_connection("127.0.0.1", a.port, ssl=_bare(), server_hostname="a") for _ in range(4)]
    clock = Hasty()
    task = asyncio.create_task(enter(token, newcomer(tmp_path / "b"), clock))
    while not clock.slept:
        await asyncio.sleep(0.005)
    for _, writer in stuck:
        writer.transport.abort()
    await task
    assert clock.slept[0] == 1.0


def _bare() -> ssl.SSLContext:
    return joining_context(None, (ALPN,))


# --- what is wrong with the question leaves the invite as it is


def _request(key: object, alter: bool = False) -> bytes:
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    der = request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)  # type: ignore[arg-type]
    return der[:-1] + bytes([der[-1] ^ 1]) if alter else der


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"node": "B"}, "no name of a node"),
        ({"node": ""}, "no name of a node"),
        ({"node": "b\n"}, "no name of a node"),
        ({"node": "x" * 60_000}, "no name of a node"),
        ({"region": "Fra"}, "no region's code"),
        ({"backhaul": "0.0.0.0:1"}, "not HOST:PORT"),
        ({"backhaul": "x"}, "not HOST:PORT"),
        ({"csr": b""}, "cannot be read"),
        ({"csr": b"\x30\x03abc"}, "cannot be read"),
        ({"csr": _request(new_key(), alter=True)}, "not signed|cannot be read"),
        ({"csr": _request(ec.generate_private_key(ec.SECP384R1()))}, "another kind of key"),
        ({"csr": _request(rsa.generate_private_key(65_537, 2048))}, "another kind of key"),
    ],
)
async def test_a_question_that_makes_no_sense_costs_nothing(
    a: FleetNode, tmp_path: Path, change: dict[str, object], says: str
) -> None:
    token = await a.token()
    answer = await refusal(a, question(token, tmp_path / "b", **change))
    assert answer.code == "request"
    assert any(one in answer.detail for one in says.split("|")), answer.detail
    assert answer.detail.isprintable()
    await enter(token, newcomer(tmp_path / "b"))


@pytest.mark.parametrize(
    "body",
    [b"\xc1", b"\x80", b"junk", msgspec.msgpack.encode({"version": "1", "op": "join"}),
     b"\x93" * 60_000, b"\x00" * 65_536],
)  # fmt: skip
async def test_what_is_no_question_is_refused(a: FleetNode, body: bytes) -> None:
    answer = answer_in(await ask_raw(a.port, LENGTH.pack(len(body)) + body))
    assert (answer.op, answer.code) == ("refused", "request")


@pytest.mark.parametrize("length", [0, 65_537, 2**32 - 1])
async def test_a_frame_that_is_too_long_is_not_read(a: FleetNode, length: int) -> None:
    assert await ask_raw(a.port, LENGTH.pack(length) + b"x" * 100) == b""


async def test_another_version_is_told_so(a: FleetNode) -> None:
    answer = await refusal(a, JoinRequest(PROTOCOL + 1, "root"))
    assert answer.code == "version" and str(PROTOCOL) in answer.detail
    assert (await refusal(a, JoinRequest(PROTOCOL, "leave"))).code == "request"


async def test_fields_of_a_newer_version_are_ignored(a: FleetNode) -> None:
    body = msgspec.msgpack.encode({"version": PROTOCOL, "op": "root", "color": "blue"})
    answer = answer_in(await ask_raw(a.port, LENGTH.pack(len(body)) + body))
    assert answer.root == a.membership.bundle.root_der


async def test_a_question_sent_twice_is_answered_once(a: FleetNode, tmp_path: Path) -> None:
    frame = encode_frame(question(await a.token(), tmp_path / "b"))
    answer = answer_in(await ask_raw(a.port, frame + frame))
    assert answer.op == "joined"
    assert answer_in(await ask_raw(a.port, frame)).code == "invite"  # replayed


async def test_who_drips_is_cut_off_and_others_are_served_meanwhile(tmp_path: Path) -> None:
    async with FleetNode(tmp_path / "a", step_s=0.4) as a:
        frame = encode_frame(question(await a.token(), tmp_path / "x"))
        reader, writer = await asyncio.open_connection("127.0.0.1", a.port, ssl=_bare(), server_hostname="a")

        async def drip() -> None:
            for one in frame:
                writer.write(bytes([one]))
                await writer.drain()
                await asyncio.sleep(0.02)

        began = time.monotonic()
        dripping = asyncio.create_task(drip())
        await enter(await a.token(), newcomer(tmp_path / "b"))
        assert await reader.read() == b""
        assert 0.3 < time.monotonic() - began < 2
        dripping.cancel()
        await asyncio.gather(dripping, return_exceptions=True)
        writer.transport.abort()


async def test_who_leaves_in_the_middle_leaves_nothing_behind(a: FleetNode, tmp_path: Path) -> None:
    frame = encode_frame(question(await a.token(), tmp_path / "b"))
    for cut in (0, 2, 4, len(frame) // 2):
        await ask_raw(a.port, frame[:cut], end=True)
    assert a.membership.invites()[0].state(time.time()) == "open"
    assert answer_in(await ask_raw(a.port, frame)).op == "joined"
    assert a.membership._sources.total() == 0


# --- names


async def test_a_name_that_another_key_has_is_refused_unless_the_invite_replaces_it(
    a: FleetNode, tmp_path: Path
) -> None:
    await enter(await a.token(), newcomer(tmp_path / "b"))
    old = authority_identity(a, tmp_path / "b")
    token = await a.token()
    with pytest.raises(JoinFailed, match=r"two nodes with one name.*--replace b"):
        await enter(token, newcomer(tmp_path / "b2"))
    assert is_untouched(tmp_path / "b2")
    with pytest.raises(JoinFailed, match="two nodes with one name"):
        await enter(token, newcomer(tmp_path / "b2", "a"))
    await enter(token, newcomer(tmp_path / "b2", "b2"))  # the invite is as good as before

    replacing = await a.token(replace="b")
    with pytest.raises(JoinFailed, match="two nodes with one name"):
        await enter(replacing, newcomer(tmp_path / "b3", "b2"))  # only b
    await enter(replacing, newcomer(tmp_path / "b3"))
    assert [one.name for one in a.membership.nodes].count("b") == 1
    with pytest.raises(PeerRefusedError, match="two nodes with one name"):
        a.membership.judge(old)
    assert a.membership.judge(authority_identity(a, tmp_path / "b3")) == "b"


def authority_identity(a: FleetNode, folder: Path) -> bytes:
    """The certificate that the node of a folder shows."""
    ca = cluster_of(folder)
    ca.load()
    return der_of(ca.identity("b"))


async def test_the_same_node_may_join_again(a: FleetNode, tmp_path: Path) -> None:
    """Its answer was lost, or its disk was full: its name is its own, by its key."""
    await refusal(a, question(await a.token(), tmp_path / "b"))
    assert is_untouched(tmp_path / "b")
    await enter(await a.token(), newcomer(tmp_path / "b"))


async def test_a_node_that_joins_again_under_another_name_has_that_name_alone(a: FleetNode, tmp_path: Path) -> None:
    await enter(await a.token(), newcomer(tmp_path / "b"))
    (tmp_path / "b" / "certs" / "cluster" / "bundle.sealed").unlink()
    await enter(await a.token(), newcomer(tmp_path / "b", "bb"))
    assert sorted(one.name for one in a.membership.nodes) == ["a", "bb"]


async def test_a_copy_of_a_nodes_folder_is_no_other_node(a: FleetNode, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    (tmp_path / "copy" / "certs" / "cluster" / "bundle.sealed").unlink()
    with pytest.raises(JoinFailed, match="copy of this one's"):
        await enter(await a.token(), newcomer(tmp_path / "copy"))


async def test_a_node_whose_name_another_has_taken_does_not_open(a: FleetNode, tmp_path: Path) -> None:
    await enter(await a.token(), newcomer(tmp_path / "b"))
    await enter(await a.token(replace="b"), newcomer(tmp_path / "b2"))
    renamed = Membership(storage_of(tmp_path / "b2"), Hasty(), "a", "ams", "")
    with pytest.raises(CertificateError, match="two nodes with one name"):
        await renamed.open()


def storage_of(folder: Path) -> storage.SealedFolder:
    return storage_in(folder, (folder / "secret.key").read_bytes())


KEY, OTHER = "1" * 64, "2" * 64


async def test_a_node_learns_of_others_and_of_contradictions(a: FleetNode) -> None:
    c = NodeRow("c", "fra", "127.0.0.1:5", KEY)
    learn = a.membership.learn
    assert await learn([c]) == []
    assert await learn([msgspec.structs.replace(c, backhaul="127.0.0.1:6", revision=1)]) == []
    assert await learn([c]) == []  # old news
    assert a.membership.nodes[-1].backhaul == "127.0.0.1:6"
    (fault,) = await learn([NodeRow("c", "fra", "127.0.0.1:7", OTHER)])
    assert "two nodes with one name" in fault
    assert await learn([NodeRow("c", "fra", "127.0.0.1:7", OTHER, replaces=KEY)]) == []
    assert await learn([c]) == []  # old news
    assert a.membership.nodes[-1].key == OTHER
    (fault,) = await learn([NodeRow("a", "fra", "", OTHER)])
    assert "two nodes with one name" in fault
    for bad in (NodeRow("C", "fra", "", KEY), NodeRow("d", "F", "", KEY), NodeRow("d", "fra", "x", KEY)):
        assert len(await learn([bad])) == 1
    assert len(await learn([NodeRow("d", "fra", "", "x")])) == 1
    assert sorted(one.name for one in a.membership.nodes) == ["a", "c"]


async def test_a_node_that_has_another_name_now_is_not_known_by_both(a: FleetNode) -> None:
    before, after = NodeRow("c", "fra", "", KEY, revision=3), NodeRow("d", "fra", "", KEY, revision=4)
    for row in (before, after, before, after):
        assert await a.membership.learn([row]) == []
    assert [one.name for one in a.membership.nodes] == ["a", "d"]


async def test_what_a_node_says_of_itself_beats_what_others_remember(a: FleetNode) -> None:
    mine = a.membership.nodes[0]
    await a.membership.learn([msgspec.structs.replace(mine, backhaul="127.0.0.1:9", revision=mine.revision + 5)])
    assert a.membership.nodes[0] == msgspec.structs.replace(mine, revision=mine.revision + 6)
    assert await a.membership.learn([a.membership.nodes[0]]) == []
    assert a.membership.nodes[0].revision == mine.revision + 6


async def test_a_change_of_the_configuration_is_a_new_revision_of_the_node(tmp_path: Path) -> None:
    async def opened(name: str, region: str, address: str) -> NodeRow:
        membership = Membership(storage_in(tmp_path), Hasty(), name, region, address)
        await membership.open()
        return membership.nodes[0]

    first = await opened("a", "ams", "127.0.0.1:1")
    assert await opened("a", "ams", "127.0.0.1:1") == first
    assert (await opened("a", "fra", "127.0.0.1:1")).revision == first.revision + 1
    renamed = await opened("b", "fra", "127.0.0.1:1")
    assert (renamed.name, renamed.key, renamed.revision) == ("b", first.key, first.revision + 2)
    # A wildcard does not say: what was told with --address stays.
    assert await opened("b", "fra", "") == renamed


async def test_an_address_told_with_an_invite_is_told_to_other_nodes_where_the_configuration_has_none(
    tmp_path: Path,
) -> None:
    membership = Membership(storage_in(tmp_path), Hasty(), "a", "ams", "")
    await membership.open()
    await membership.invite(address="127.0.0.1:5")
    assert membership.nodes[0].backhaul == "127.0.0.1:5"
    await membership.invite(address="127.0.0.1:6")
    assert membership.nodes[0].backhaul == "127.0.0.1:5"
    again = Invite.from_token((await membership.invite()).token)
    assert again.address == "127.0.0.1:5"


async def test_a_certificate_whose_key_is_not_the_known_one_is_refused(a: FleetNode) -> None:
    ca = a.membership._ca
    with pytest.raises(PeerRefusedError, match="two nodes with one name"):
        a.membership.judge(der_of(signed(ca, "a")))
    assert a.membership.judge(der_of(signed(ca, "z"))) == "z"  # of whom nothing is known yet
    with pytest.raises(PeerRefusedError, match="no certificate"):
        a.membership.judge(None)


# --- whom a newcomer meets


async def test_a_man_in_the_middle_with_another_ca_learns_nothing(a: FleetNode, tmp_path: Path) -> None:
    token = Invite.from_token(await a.token())
    async with FleetNode(tmp_path / "evil") as evil:
        led_astray = Invite("a", f"127.0.0.1:{evil.port}", token.fingerprint, token.id, token.secret)
        with pytest.raises(JoinFailed, match="somebody is in between"):
            await enter(led_astray.to_token(), newcomer(tmp_path / "b"))
        assert token.secret not in b"".join(evil.asked)
    assert is_untouched(tmp_path / "b")


async def test_a_man_in_the_middle_who_passes_on_the_true_root_learns_nothing(a: FleetNode, tmp_path: Path) -> None:
    token = Invite.from_token(await a.token())
    evil_ca = authority(tmp_path / "evil")
    await a.serve(server_context(signed(evil_ca, "a"), (ALPN,), mutual=False))
    a.asked.clear()
    led_astray = Invite("a", f"127.0.0.1:{a.port}", token.fingerprint, token.id, token.secret)
    with pytest.raises(JoinFailed, match="not of this fleet's CA"):
        await enter(led_astray.to_token(), newcomer(tmp_path / "b"))
    assert a.asked and token.secret not in b"".join(a.asked)
    assert is_untouched(tmp_path / "b")


async def test_another_node_of_the_fleet_is_not_the_one_that_invites(a: FleetNode, tmp_path: Path) -> None:
    token = await a.token()
    for names in (("z.node.wakefront",), ("*.node.wakefront",), ("a.node.wakefront", "z.node.wakefront")):
        await a.serve(server_context(signed(a.membership._ca, "z", names=names), (ALPN,), mutual=False))
        invite = Invite.from_token(token)
        moved = Invite("a", f"127.0.0.1:{a.port}", invite.fingerprint, invite.id, invite.secret)
        a.asked.clear()
        with pytest.raises(JoinFailed, match=r"another node|no node's name|names 2 things"):
            await enter(moved.to_token(), newcomer(tmp_path / "b"))
        assert invite.secret not in b"".join(a.asked)


async def test_what_answers_without_our_protocol_is_not_asked(a: FleetNode, tmp_path: Path) -> None:
    await a.serve(server_context(a.membership.identity, ("h2",), mutual=False))
    with pytest.raises(JoinFailed, match="does not speak wakefront-join/1"):
        await enter(await a.token(), newcomer(tmp_path / "b"))
    assert a.asked == []


async def test_nobody_there_is_told_as_that(a: FleetNode, tmp_path: Path) -> None:
    token = await a.token()
    await a.stop()
    with pytest.raises(JoinFailed, match=rf"127.0.0.1:{a.port} cannot be reached"):
        await enter(token, newcomer(tmp_path / "b"))


async def test_what_speaks_no_tls_or_nothing_at_all_ends_the_wait(tmp_path: Path) -> None:
    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP\r\n")
        await silent(reader, writer)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()

    for handler, says in ((plain, "does not speak TLS"), (silent, "took longer than 0.3 s")):
        server = await asyncio.start_server(handler, "127.0.0.1", 0)
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(JoinFailed, match=says):
            await enter(
                Invite("a", address, bytes(32), "0" * 12, bytes(32)).to_token(), newcomer(tmp_path / "b"), step_s=0.3
            )
        server.close()
        await server.wait_closed()


@pytest.mark.parametrize("shift_s", [-300.0, 300.0])
@pytest.mark.parametrize("who", ["inviter", "newcomer"])
async def test_clocks_five_minutes_apart_keep_nobody_out(tmp_path: Path, who: str, shift_s: float) -> None:
    clocks = {"inviter": Hasty(), "newcomer": Hasty()}
    clocks[who].shift_s = shift_s
    async with FleetNode(tmp_path / "a", clock=clocks["inviter"]) as a:
        await enter(await a.token(), newcomer(tmp_path / "b"), clocks["newcomer"])


async def test_clocks_hours_apart_are_named_as_the_reason(tmp_path: Path) -> None:
    async with FleetNode(tmp_path / "a", clock=Hasty(7200)) as a:
        with pytest.raises(JoinFailed, match="clocks of the nodes differ"):
            await enter(await a.token(), newcomer(tmp_path / "b"))
    assert is_untouched(tmp_path / "b")


LIES: list[tuple[str, Callable[[FleetNode, Path, JoinRequest, JoinAnswer], dict[str, object]]]] = [
    ("another fleet's bundle", lambda a, at, q, true: {"bundle": authority(at / "evil").bundle.to_bytes()}),
    ("half a bundle", lambda a, at, q, true: {"bundle": true.bundle[:500]}),
    ("no bundle", lambda a, at, q, true: {"bundle": b""}),
    ("another node's certificate", lambda a, at, q, true: {"chain": a.membership.identity.certificate.chain_pem}),
    (
        "a certificate of another CA",
        lambda a, at, q, true: {"chain": signed(authority(at / "evil"), "b").certificate.chain_pem},
    ),
    (
        "a certificate for another key",
        lambda a, at, q, true: {"chain": a.membership._ca.sign("b", new_key().public_key())},
    ),
    ("no certificate", lambda a, at, q, true: {"chain": b""}),
    ("another version", lambda a, at, q, true: {"version": 9}),
    ("another answer", lambda a, at, q, true: {"op": "root"}),
]  # fmt: skip


@pytest.mark.parametrize("lie", [one[1] for one in LIES], ids=[one[0] for one in LIES])
async def test_an_inviter_that_lies_changes_nothing_here(
    a: FleetNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    lie: Callable[[FleetNode, Path, JoinRequest, JoinAnswer], dict[str, object]],
) -> None:  # fmt: skip
    answer = Membership._answer

    async def lying(self: Membership, body: bytes, source: str | int, from_: str) -> JoinAnswer:
        true = await answer(self, body, source, from_)
        if true.op != "joined":
            return true
        return msgspec.structs.replace(true, **lie(a, tmp_path, decode_request(body), true))

    monkeypatch.setattr(Membership, "_answer", lying)
    with pytest.raises(JoinFailed, match=r"cannot be used|does not understand") as failed:
        await enter(await a.token(), newcomer(tmp_path / "b"))
    assert str(failed.value).isprintable()
    assert is_untouched(tmp_path / "b")


@pytest.mark.parametrize("reply", [b"", b"\x05", LENGTH.pack(2**31) + b"x", LENGTH.pack(5) + b"12345", b"x" * 70_000])
async def test_an_answer_that_is_none_changes_nothing_here(
    a: FleetNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reply: bytes
) -> None:
    async def serve_join(
        self: Membership, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, from_: str
    ) -> None:
        await reader.read(10)
        writer.write(reply)
        writer.close()

    token = await a.token()
    monkeypatch.setattr(Membership, "serve_join", serve_join)
    with pytest.raises(JoinFailed, match=r"without an answer|cannot be read"):
        await enter(token, newcomer(tmp_path / "b"))
    assert is_untouched(tmp_path / "b")


async def test_what_a_stranger_says_is_made_fit_for_a_terminal(
    a: FleetNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answer(self: Membership, body: bytes, source: str | int, from_: str) -> JoinAnswer:
        return JoinAnswer(PROTOCOL, "refused", code="name", detail="\x1b[31mred\n" + "x" * 5000)

    token = await a.token()
    monkeypatch.setattr(Membership, "_answer", answer)
    with pytest.raises(JoinFailed) as failed:
        await enter(token, newcomer(tmp_path / "b"))
    assert str(failed.value).isprintable() and len(str(failed.value)) < 600


# --- disks


class FullDisk:
    """Lets so many files be written, then none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, writes: int, folder: Path) -> None:
        self.left = writes
        self._folder = folder
        self._write = storage.write_atomically
        monkeypatch.setattr(storage, "write_atomically", self)

    def __call__(self, path: Path, content: bytes, mode: int) -> None:
        if self._folder in path.parents:
            if self.left == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.left -= 1
        self._write(path, content, mode)


async def test_a_full_disk_of_the_newcomer_is_found_before_the_invite_is_used_or_costs_the_invite_alone(
    a: FleetNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for writes in range(5):
        folder = tmp_path / f"b{writes}"
        token = await a.token()
        with monkeypatch.context() as patch:
            FullDisk(patch, writes, folder)
            with pytest.raises(JoinFailed, match="No space left"):
                await enter(token, newcomer(folder, f"b{writes}"))
        assert is_untouched(folder)
        was_used = a.membership.invites()[-1].state(time.time()) == "used"
        assert was_used is (writes >= 2)  # the room is looked for, and the key kept, before
        await enter(await a.token() if was_used else token, newcomer(folder, f"b{writes}"))


async def test_a_full_disk_of_the_inviter_lets_nobody_in_and_leaves_the_invite(
    a: FleetNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = await a.token()
    with monkeypatch.context() as patch:
        FullDisk(patch, 0, tmp_path / "a")
        with pytest.raises(JoinFailed, match="is its disk full"):
            await enter(token, newcomer(tmp_path / "b"))
        with pytest.raises(MembershipRefused, match="No space"):
            await a.token()
        with pytest.raises(MembershipRefused, match="No space"):
            await a.membership.revoke(Invite.from_token(token).id)
    assert [one.name for one in a.membership.nodes] == ["a"]
    await enter(token, newcomer(tmp_path / "b"))


KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from certs import storage
from tests.support.fleet import FleetNode
from proxy.wire.joining import Invite

async def main():
    folder = Path(sys.argv[1])
    async with FleetNode(folder) as a:
        print(await a.token(), flush=True)
        write = storage.write_atomically
        def write_and_die(path, content, mode):
            write(path, content, mode)
            os.kill(os.getpid(), signal.SIGKILL)
        storage.write_atomically = write_and_die
        await asyncio.sleep(30)

asyncio.run(main())
"""


async def test_an_inviter_killed_before_its_answer_has_used_the_invite_and_the_node_comes_in_with_another(
    tmp_path: Path,
) -> None:
    (tmp_path / "a").mkdir()
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", KILLED, str(tmp_path / "a"), stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert child.stdout is not None
    token = (await asyncio.wait_for(child.stdout.readline(), 20)).decode().strip()
    with pytest.raises(JoinFailed, match=r"ask for a new one|was used"):
        await enter(token, newcomer(tmp_path / "b"))
    assert await asyncio.wait_for(child.wait(), 10) == -9
    assert is_untouched(tmp_path / "b")
    async with FleetNode(tmp_path / "a") as a:
        (row,) = a.membership.invites()
        assert (row.state(time.time()), row.used_by) == ("used", "b")
        assert (await refusal(a, question(token, tmp_path / "thief", "thief"))).code == "invite"
        await enter(await a.token(), newcomer(tmp_path / "b"))


# --- invites, from the side of who makes them


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ({"valid_s": 0}, "invalid"),
        ({"valid_s": -1}, "invalid"),
        ({"valid_s": float("nan")}, "invalid"),
        ({"valid_s": LONGEST_VALID_S + 1}, "invalid"),
        ({"address": "0.0.0.0:1"}, "invalid"),
        ({"address": "x"}, "invalid"),
        ({"replace": "a"}, "invalid"),
        ({"replace": "nobody"}, "not_found"),
    ],
)
async def test_an_invite_that_makes_no_sense_is_not_made(a: FleetNode, asked: dict[str, object], code: str) -> None:
    with pytest.raises(MembershipRefused) as refused:
        await a.membership.invite(**asked)  # type: ignore[arg-type]
    assert refused.value.code == code
    assert a.membership.invites() == []


async def test_a_node_that_does_not_know_how_others_reach_it_asks_for_that(tmp_path: Path) -> None:
    membership = Membership(storage_in(tmp_path), Hasty(), "a", "ams", "")
    await membership.open()
    with pytest.raises(MembershipRefused, match="--address"):
        await membership.invite()


async def test_open_invites_are_bounded_and_old_ones_forgotten(a: FleetNode) -> None:
    for _ in range(MAX_OPEN_INVITES):
        await a.token(valid_s=60)
    with pytest.raises(MembershipRefused, match="take some back"):
        await a.token()
    await a.membership.revoke(a.membership.invites()[0].id)
    await a.token(valid_s=60)
    a.clock.shift_s = 61
    assert {one.state(a.clock.unix()) for one in a.membership.invites()} == {"expired"}
    a.clock.shift_s = 60 + 86_500
    assert a.membership.invites() == []
    await a.token()
    assert len(a.membership._kept.invites) == 1


async def test_the_secret_of_an_invite_is_not_kept(a: FleetNode, tmp_path: Path) -> None:
    secret = Invite.from_token(await a.token()).secret
    kept = storage_of(tmp_path / "a").load("cluster/membership")
    assert kept is not None and secret not in kept


# --- a node that has a fleet already


async def test_a_node_that_made_a_ca_for_itself_alone_may_join_and_keeps_that_aside(
    a: FleetNode, tmp_path: Path
) -> None:
    async with FleetNode(tmp_path / "b", "b") as b:
        assert b.membership.was_made
        own = b.membership.bundle
    joined = await enter(await a.token(), newcomer(tmp_path / "b"))
    assert joined.left_own_ca
    former = storage_of(tmp_path / "b").load("cluster/former")
    assert former is not None and Bundle.from_bytes(former) == own
    async with FleetNode(tmp_path / "b", "b") as b:
        assert {one.name for one in b.membership.nodes} == {"a", "b"}
        assert b.membership.status()["origin"] == "joined"


async def test_a_node_of_this_fleet_or_of_another_with_others_is_not_taken_away(a: FleetNode, tmp_path: Path) -> None:
    await enter(await a.token(), newcomer(tmp_path / "b"))
    with pytest.raises(JoinFailed, match="of that fleet already"):
        await enter(await a.token(), newcomer(tmp_path / "b"))
    async with FleetNode(tmp_path / "x", "x") as x:
        with pytest.raises(JoinFailed, match=r"of another fleet, with a\. To leave it"):
            await enter(await x.token(), newcomer(tmp_path / "b"))


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """As by a supervisor that runs."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


async def test_a_node_that_runs_with_a_ca_of_its_own_is_to_be_stopped_first(a: FleetNode, tmp_path: Path) -> None:
    async with FleetNode(tmp_path / "b", "b"):
        pass
    (tmp_path / "b" / "run").mkdir()
    with held(tmp_path / "b" / "run" / "supervisor.pid"), pytest.raises(JoinFailed, match="stop it, join"):
        await enter(await a.token(), newcomer(tmp_path / "b"))
    await enter(await a.token(), newcomer(tmp_path / "b"))


async def test_a_node_that_runs_by_itself_joins_and_needs_a_reload(a: FleetNode, tmp_path: Path) -> None:
    (tmp_path / "b" / "run").mkdir(parents=True)
    with held(tmp_path / "b" / "run" / "supervisor.pid"):
        assert (await enter(await a.token(), newcomer(tmp_path / "b"))).is_running


async def test_a_folder_of_another_user_is_left_alone(
    a: FleetNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What root would write there the node could not read."""
    folder = tmp_path / "b"
    folder.mkdir()
    token = await a.token()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
        with pytest.raises(JoinFailed, match="belongs to another user"):
            await enter(token, newcomer(folder))
    assert list(folder.iterdir()) == []
    await enter(token, newcomer(folder / "data"))
    assert (folder / "data").stat().st_mode & 0o777 == 0o700


async def test_what_cannot_be_opened_is_told_and_not_overwritten(a: FleetNode, tmp_path: Path) -> None:
    async with FleetNode(tmp_path / "b", "b"):
        pass
    path = tmp_path / "b" / "certs" / "cluster" / "bundle.sealed"
    path.write_bytes(path.read_bytes()[:-1])
    before = path.read_bytes()
    with pytest.raises(JoinFailed, match="cannot be used"):
        await enter(await a.token(), newcomer(tmp_path / "b"))
    with pytest.raises(CertificateError):
        await Membership(storage_of(tmp_path / "b"), Hasty(), "b", "fra", "").open()
    assert path.read_bytes() == before


# --- renewal


async def test_the_certificate_is_renewed_in_time_and_who_shows_it_is_told(tmp_path: Path) -> None:
    clock = Hasty()
    membership = Membership(storage_in(tmp_path), clock, "a", "ams", "")
    await membership.open()
    first, told = membership.identity, asyncio.Event()
    membership.on_identity = lambda identity: told.set()
    clock.shift_s = datetime.timedelta(days=21).total_seconds()
    keeping = asyncio.create_task(membership.keep())
    try:
        await asyncio.wait_for(told.wait(), 5)
        assert membership.identity.expires_at > first.expires_at
        assert key_of(membership.identity.certificate.leaf.public_key()) == membership.nodes[0].key
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)


async def test_a_renewal_that_cannot_be_stored_is_told_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Hasty()
    membership = Membership(storage_in(tmp_path), clock, "a", "ams", "")
    await membership.open()
    clock.shift_s = datetime.timedelta(days=21).total_seconds()
    disk = FullDisk(monkeypatch, 0, tmp_path)
    keeping = asyncio.create_task(membership.keep())
    try:
        while not membership.fault:
            await asyncio.sleep(0.005)
        assert "No space" in membership.fault
        disk.left = 100
        while membership.fault:
            await asyncio.sleep(0.02)
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
