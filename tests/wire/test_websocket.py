"""wire/websocket.py against frames encoded here, cut into pieces of every kind."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.wire.websocket import FrameTracker, close_frame


@dataclass(frozen=True)
class Frame:
    opcode: int
    payload: bytes
    is_last: bool = True
    mask: bytes | None = None
    width: int = 0  # of the extended length; 0 = the shortest that holds it

    def encode(self) -> bytes:
        size = len(self.payload)
        width = self.width or (7 if size < 126 else 16 if size < 1 << 16 else 64)
        first = self.opcode | (0x80 if self.is_last else 0)
        masked = 0x80 if self.mask is not None else 0
        if width == 7:
            head = struct.pack("!BB", first, masked | size)
        elif width == 16:
            head = struct.pack("!BBH", first, masked | 126, size)
        else:
            head = struct.pack("!BBQ", first, masked | 127, size)
        if self.mask is None:
            return head + self.payload
        return head + self.mask + bytes(byte ^ self.mask[place % 4] for place, byte in enumerate(self.payload))


SIZES = st.one_of(st.integers(0, 130), st.sampled_from([125, 126, 127, 65_535, 65_536, 70_000]))


@st.composite
def frames(draw: st.DrawFn) -> Frame:
    size = draw(SIZES)
    fits = [width for width, limit in ((7, 126), (16, 1 << 16), (64, 1 << 63)) if size < limit]
    payload = draw(st.binary(min_size=4, max_size=4)) * (size // 4 + 1)
    mask = draw(st.none() | st.binary(min_size=4, max_size=4))
    opcode = draw(st.sampled_from([0x0, 0x1, 0x2, 0x9, 0xA]))
    return Frame(opcode, payload[:size], draw(st.booleans()), mask, draw(st.sampled_from(fits)))


def cut(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[start:end] for start, end in pairwise(ends)]


@given(st.lists(frames(), max_size=6), st.lists(st.integers(0, 1 << 20), max_size=12))
def test_however_it_is_cut_the_tracker_knows_whether_it_stands_between_two_frames(
    sent: list[Frame], places: list[int]
) -> None:
    encoded = [one.encode() for one in sent]
    boundaries = {0, *accumulate(len(one) for one in encoded)}
    tracker, at = FrameTracker(), 0
    assert tracker.at_boundary
    for piece in cut(b"".join(encoded), places):
        tracker.feed(piece)
        at += len(piece)
        assert tracker.at_boundary == (at in boundaries), at
    assert tracker.at_boundary and not tracker.saw_close and not tracker.is_lost


@given(st.lists(frames(), min_size=1, max_size=6), st.integers(0, 1 << 20), st.integers(0, 1 << 20))
def test_asked_for_a_place_in_what_comes_it_takes_no_more_than_up_to_the_next_one(
    sent: list[Frame], start: int, more: int
) -> None:
    data = b"".join(one.encode() for one in sent)
    ends = list(accumulate(len(one.encode()) for one in sent))
    start %= len(data)
    tracker = FrameTracker()
    tracker.feed(data[:start])
    piece = data[start : start + 1 + more % len(data)]
    taken = tracker.feed(piece, to_boundary=True)
    following = next(one for one in ends if one > start)
    assert taken == min(len(piece), following - start)
    assert tracker.at_boundary == (start + taken == following)


@given(st.lists(frames(), min_size=1, max_size=3))
def test_byte_by_byte_is_the_same_as_at_once(sent: list[Frame]) -> None:
    data = b"".join(one.encode()[:400] for one in sent)  # may end within a frame
    whole, slow = FrameTracker(), FrameTracker()
    whole.feed(data)
    for place in range(len(data)):
        slow.feed(data[place : place + 1])
    assert slow.at_boundary == whole.at_boundary


@given(frames(), st.binary(max_size=3))
def test_after_a_close_frame_there_is_no_place_for_another(before: Frame, mask: bytes) -> None:
    tracker = FrameTracker()
    tracker.feed(before.encode() + Frame(0x8, struct.pack("!H", 1000)).encode())
    assert tracker.saw_close and not tracker.at_boundary
    tracker.feed(before.encode())
    assert not tracker.at_boundary


@given(st.lists(st.binary(max_size=200), max_size=20))
def test_no_bytes_make_it_raise_or_keep_more_than_a_frames_head(pieces: list[bytes]) -> None:
    tracker = FrameTracker()
    for piece in pieces:
        tracker.feed(piece)
        assert len(tracker._head) < 14


def test_a_length_with_its_highest_bit_set_is_no_websocket_and_has_no_boundary_any_more() -> None:
    tracker = FrameTracker()
    tracker.feed(b"\x82\x7f" + struct.pack("!Q", 1 << 63))
    assert tracker.is_lost and not tracker.at_boundary
    tracker.feed(b"\x81\x00")
    assert not tracker.at_boundary


def test_a_long_payload_costs_no_memory() -> None:
    tracker = FrameTracker()
    tracker.feed(b"\x82\x7f" + struct.pack("!Q", 1 << 40))
    for _ in range(1000):
        tracker.feed(bytes(65_536))
    assert not tracker.at_boundary and tracker._head == b""


def test_going_away_is_a_close_frame_with_code_and_reason() -> None:
    assert close_frame(1001, b"bye") == b"\x88\x05\x03\xe9bye"
    tracker = FrameTracker()
    tracker.feed(close_frame(1001))
    assert tracker.saw_close


@pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1015, 5000])
def test_codes_that_may_not_be_sent_are_refused(code: int) -> None:
    with pytest.raises(ValueError, match="close code"):
        close_frame(code)


def test_a_reason_that_does_not_fit_a_control_frame_is_refused() -> None:
    assert len(close_frame(1001, b"x" * 123)) == 127
    with pytest.raises(ValueError, match="123"):
        close_frame(1001, b"x" * 124)
