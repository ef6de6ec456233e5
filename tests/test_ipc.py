"""ipc.py: messages between control and workers survive the way, in pieces too; newer fields are ignored."""

from __future__ import annotations

import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import ipc
from proxy.model import (
    App,
    AppName,
    Endpoint,
    Machine,
    MachineId,
    MachineState,
    NodeName,
    Peer,
    Port,
    RegionCode,
    RemoteLoad,
    RemoteMachine,
    Service,
)

MACHINE = Machine(
    MachineId("1857deadbeef00"), RegionCode("ams"), "app", MachineState.SUSPENDED, 7, 3,
    endpoints=(Endpoint(8080, "127.0.0.1", 20_001),), cordoned=True, hold_reason="it crashed", hold_until=12.5,
)  # fmt: skip
APP = App(
    AppName("hello"), ("hello.apps.test", "xn--bcher-kva.test"),
    (Service("tcp", 8080, (Port(443, 443, ("http", "tls"), response_headers=(("X", None), ("Y", ("1", "2")))),)),),
    (MACHINE,), slot=4,
)  # fmt: skip

TO_CONTROL = [
    ipc.WorkerHello(ipc.PROTOCOL, 1, 4711, "/data/run/handed-1.sock"),
    ipc.Wake(AppName("hello"), MACHINE.id, hint=True),
    ipc.NeedCertificate("hello.apps.test"),
    ipc.CordonAck(MACHINE.id, 9),
    ipc.PassiveFailure(AppName("hello"), MACHINE.id, 7, "PC01"),
]
TO_WORKER = [
    ipc.Settings(ipc.PROTOCOL, "node-1", "ams", "apps.test", max_headers=7),
    ipc.TableStart(2),
    ipc.TableEnd(),
    ipc.AppSet(APP),
    ipc.AppGone(AppName("hello")),
    ipc.MachineSet(AppName("hello"), MACHINE),
    ipc.WakeDone(AppName("hello"), MACHINE.id, 8),
    ipc.WakeDone(AppName("hello"), MACHINE.id, 8, "PM03", "nothing listened", 5),
    ipc.CordonAsk(AppName("hello"), MACHINE.id, 9),
    ipc.CordonLift(AppName("hello"), MACHINE.id),
    ipc.EndTunnels(AppName("hello"), MACHINE.id),
    ipc.CertificateReady("hello.apps.test", "no such app"),
    ipc.IdentityReady(),
    ipc.PeerSet(Peer(NodeName("iad-1"), RegionCode("iad"), "192.0.2.1", 8443, False, True, 0.25, (NodeName("fra-1"),))),
    ipc.PeerGone(NodeName("iad-1")),
    ipc.RegionsSet((RegionCode("ams"), RegionCode("iad"))),
    ipc.SiteSet(
        AppName("hello"), NodeName("iad-1"), (RemoteMachine(MACHINE.id, "app", MachineState.STARTED, (8080,), True),)
    ),
    ipc.LoadsSet(NodeName("iad-1"), (RemoteLoad(AppName("hello"), 8080, 1, 2, 3),)),
]


def bodies(*pieces: bytes) -> list[bytes]:
    reader = ipc.FrameReader()
    return [body for piece in pieces for body in reader.feed(piece)]


@pytest.mark.parametrize("message", TO_CONTROL, ids=lambda message: type(message).__name__)
def test_a_workers_message_arrives_as_it_was_sent(message: ipc.Message) -> None:
    (body,) = bodies(ipc.encode(message))
    assert ipc.decode_to_control(body) == message


@pytest.mark.parametrize("message", TO_WORKER, ids=lambda message: type(message).__name__)
def test_controls_message_arrives_as_it_was_sent(message: ipc.Message) -> None:
    (body,) = bodies(ipc.encode(message))
    assert ipc.decode_to_worker(body) == message


def test_what_goes_with_a_connection_arrives_as_it_was_sent() -> None:
    handed = ipc.Handed(MACHINE.id, 7, 8080, 12.5)
    assert ipc.decode_handed(ipc.encode_handed(handed)) == handed


def test_every_kind_of_message_is_tried_here() -> None:
    assert {type(message) for message in TO_CONTROL + TO_WORKER} == set(ipc.Message.__subclasses__())


STREAM = b"".join(map(ipc.encode, TO_WORKER))


def test_a_stream_gives_the_same_byte_by_byte() -> None:
    assert bodies(*(STREAM[at : at + 1] for at in range(len(STREAM)))) == bodies(STREAM)


@given(st.lists(st.integers(0, len(STREAM)), max_size=10))
def test_a_stream_gives_the_same_however_it_is_cut(places: list[int]) -> None:
    at = sorted(places)
    pieces = [STREAM[one:other] for one, other in zip([0, *at], [*at, len(STREAM)], strict=True)]
    assert [ipc.decode_to_worker(body) for body in bodies(*pieces)] == TO_WORKER


def test_what_a_reader_has_given_it_does_not_keep() -> None:
    reader = ipc.FrameReader()
    for _ in range(1000):
        assert len(list(reader.feed(STREAM))) == len(TO_WORKER)
    assert len(reader._buffer) == 0


def test_a_field_of_a_newer_peer_is_ignored_and_one_of_an_older_peer_has_its_default() -> None:
    newer = {"type": "WorkerHello", "protocol": 2, "slot": 0, "pid": 1, "colour": "blue", "more": {"a": [1]}}
    assert ipc.decode_to_control(msgspec.msgpack.encode(newer)) == ipc.WorkerHello(2, 0, 1)
    older = {"type": "Wake", "app": "hello", "machine": "m"}
    assert ipc.decode_to_control(msgspec.msgpack.encode(older)) == ipc.Wake(AppName("hello"), MachineId("m"))
    app = msgspec.msgpack.decode(msgspec.msgpack.encode(APP)) | {"unheard_of": 1}
    assert ipc.decode_to_worker(msgspec.msgpack.encode({"type": "AppSet", "app": app})) == ipc.AppSet(APP)


@pytest.mark.parametrize(
    "body",
    [b"", b"\xc1", b"\x80", msgspec.msgpack.encode({"type": "Nothing"}), msgspec.msgpack.encode({"type": "Wake"})],
)
def test_a_body_that_is_no_message_is_an_error_of_one_kind(body: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        ipc.decode_to_control(body)


def test_a_frame_over_the_bound_is_neither_sent_nor_awaited() -> None:
    with pytest.raises(ValueError, match="a frame may have"):
        ipc.encode(ipc.NeedCertificate("a" * (ipc.MAX_FRAME_BYTES + 1)))
    reader = ipc.FrameReader()
    with pytest.raises(ValueError, match="is over the"):
        list(reader.feed(ipc.encode(ipc.TableEnd()) + struct.pack("<I", ipc.MAX_FRAME_BYTES + 1)))
