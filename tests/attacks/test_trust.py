"""A16 and A19: early data, and fields and answers that would be believed.

No 0-RTT is offered, so nothing of it can be replayed. What only the edge may say is dropped from clients in every
spelling; what an app says with fly-replay is followed as documented, a bounded number of times, to one answer.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
from pathlib import Path

import pytest

from tests.attacks.conftest import Begin
from tests.support.attacks import AttackedNode
from tests.support.recording import Seen

pytestmark = pytest.mark.slow
FORGED = "6.6.6.6"
OURS = [  # RFC 7239, and what a machine takes for the edge's word
    "Fly-Client-IP", "Fly-Forwarded-Port", "Fly-Forwarded-Proto", "Fly-Forwarded-SSL", "Fly-Region", "Fly-Request-Id",
    "Fly-Replay-Src", "Fly-Replay-Failed", "Fly-Traceparent", "Fly-Preferred-Instance-Unavailable", "Fly-Anything",
    "X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Port", "X-Forwarded-Ssl", "X-Forwarded-Host", "Forwarded",
    "X-Real-IP", "X-Request-Start",
]  # fmt: skip
LISTS = {"x-forwarded-for"}  # what a client says stands before what we add
HOSTILE = [
    "app=quiet", "app=nobody", "instance=nobody", "region=nowhere", "elsewhere=true", "app=web;state=" + "x" * 60_000,
    "app=web;app=quiet", "app=web;state=a\tb", ";", "=", "app=", "app=..%2f..", "app=web;instance=" + "a" * 10_000,
    "app=web;timeout=1h", "app=web;fallback=force_self", "\x7f", "region=any;prefer_instance=x", "app=WEB",
]  # fmt: skip


def spellings(name: str) -> list[str]:
    return [name, name.lower(), name.upper(), name.replace("-", "_"), name.replace("-", "_", 1)]


def test_no_early_data_is_offered_or_read(node: AttackedNode, attack: Begin, tmp_path: Path) -> None:
    session, early = tmp_path / "session", tmp_path / "early"
    early.write_bytes(node.head("/early"))
    base = [
        "openssl",
        "s_client",
        "-connect",
        f"127.0.0.1:{node.https_port}",
        "-servername",
        node.host("web"),
        "-tls1_3",
    ]

    def client(*more: str) -> str:
        done = subprocess.run(
            [*base, *more], input=node.head("/late", "Connection: close"), capture_output=True, timeout=20, check=False
        )
        return (done.stdout + done.stderr).decode("latin-1")

    with attack("A16", "early data", node) as run:
        run.case("a ticket says how much")
        assert "Max Early Data: 0" in client("-sess_out", str(session), "-ign_eof")
        run.case("a client that sends it all the same")
        told = client("-sess_in", str(session), "-early_data", str(early), "-ign_eof")
        assert "Early data was accepted" not in told
    assert "/early" not in [one.target for one in node.origin.take()]


def test_a_client_cannot_say_what_only_the_edge_may(node: AttackedNode, attack: Begin) -> None:
    with attack("A19", "trust fields of clients", node) as run:
        for tls in (False, True):
            for name in OURS:
                for spelling in spellings(name):
                    for fields in ([f"{spelling}: {FORGED}"], [f"{spelling}: {FORGED}", f"Connection: close, {name}"]):
                        run.case(fields)
                        more = [] if len(fields) > 1 else ["Connection: close"]
                        got = node.attempt(node.head("/", *fields, *more), tls=tls, take_its_word=True)
                        assert got.statuses == [200], got
                        (seen,) = node.origin.take()
                        for one, value in seen.fields:
                            if one not in LISTS:
                                assert FORGED not in value, (spelling, one, value)
                        assert seen.all("fly-client-ip") == ["127.0.0.1"]
                        (chain,) = seen.all("x-forwarded-for")
                        assert chain.split(", ")[-2:] != [FORGED, FORGED]
                        assert re.search(r"(^|, )127\.0\.0\.1(, |$)", chain), "who it came from is there all the same"


def test_what_a_hostile_app_asks_for_by_replay_ends_in_one_answer(node: AttackedNode, attack: Begin) -> None:
    wish = ""

    async def replay(seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 200 OK\r\nfly-replay: {wish}\r\nContent-Length: 0\r\n\r\n".encode("latin-1"))

    node.origin.respond = replay
    with attack("A19", "hostile replays", node, growth_mib=32) as run:
        for wish in ["app=web", "app=web;state=again", *HOSTILE]:
            for method, body in (("GET", b""), ("POST", b"x" * 5000)):
                run.case((wish[:60], method))
                length = [f"Content-Length: {len(body)}"] if body else []
                got = node.attempt(node.head("/", *length, method=method, body=body))
                assert len(got.answers) == 1 and got.closed and not got.rest, got
                assert "fly-replay" not in got.answers[0] and len(node.origin.take()) <= 11
    node.origin.reset()
