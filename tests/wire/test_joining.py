from __future__ import annotations

import base64
import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.wire.joining import (
    LENGTH,
    MAX_FRAME_BYTES,
    MAX_TOKEN_CHARS,
    PROTOCOL,
    Invite,
    JoinAnswer,
    JoinRequest,
    NodeRow,
    body_length,
    decode_answer,
    decode_request,
    encode_frame,
)

INVITE = Invite("a" * 63, f"{'x' * 63}.example:65535", bytes(range(32)), "0123456789ab", bytes(range(32, 64)))


def test_the_longest_invite_is_a_line_that_is_read_back() -> None:
    token = INVITE.to_token()
    assert len(token) < MAX_TOKEN_CHARS and token.isascii() and "=" not in token
    assert Invite.from_token(token) == INVITE


@given(st.text(max_size=200) | st.binary(max_size=200).map(lambda one: base64.urlsafe_b64encode(one).decode()))
def test_whatever_stands_for_an_invite_is_one_or_a_clear_fault(text: str) -> None:
    with contextlib.suppress(ValueError):
        Invite.from_token(text)


@given(st.integers(0, len(INVITE.to_token()) - 1), st.sampled_from("Aa0-_"))
def test_no_altered_character_passes(at: int, other: str) -> None:
    token = INVITE.to_token()
    altered = token[:at] + other + token[at + 1 :]
    with contextlib.suppress(ValueError):
        assert Invite.from_token(altered) == INVITE  # the last may hold bits that count for nothing


@pytest.mark.parametrize("message", [JoinRequest(PROTOCOL, "root"), JoinRequest(PROTOCOL, "join", "i", b"s", "b")])
def test_questions_are_read_back(message: JoinRequest) -> None:
    frame = encode_frame(message)
    assert body_length(frame[:4]) == len(frame) - 4
    assert decode_request(frame[4:]) == message


def test_answers_are_read_back_and_show_no_secrets_in_a_log() -> None:
    answer = JoinAnswer(PROTOCOL, "joined", bundle=b"hidden", nodes=(NodeRow("b", "fra", "", "0" * 64),))
    assert decode_answer(encode_frame(answer)[4:]) == answer
    assert "hidden" not in repr(answer) and "hidden" not in repr(JoinRequest(PROTOCOL, "join", "i", b"hidden"))


@given(st.binary(max_size=300))
def test_whatever_comes_as_a_message_is_one_or_a_clear_fault(body: bytes) -> None:
    for decode in (decode_request, decode_answer):
        with contextlib.suppress(ValueError):
            decode(body)


@pytest.mark.parametrize("body", [b"\x91" * 100_000, b"\x81\xa1a" * 30_000, msgspec.msgpack.encode({"op": "root"})])
def test_deep_and_large_values_are_a_clear_fault(body: bytes) -> None:
    with pytest.raises(ValueError, match="wakefront-join"):
        decode_request(body)


@pytest.mark.parametrize("length", [0, MAX_FRAME_BYTES + 1, 2**32 - 1])
def test_lengths_beyond_the_bound_are_refused(length: int) -> None:
    with pytest.raises(ValueError, match=str(length)):
        body_length(LENGTH.pack(length))


def test_a_message_beyond_the_bound_is_not_sent() -> None:
    with pytest.raises(ValueError, match="permitted"):
        encode_frame(JoinAnswer(PROTOCOL, "joined", bundle=bytes(MAX_FRAME_BYTES)))
