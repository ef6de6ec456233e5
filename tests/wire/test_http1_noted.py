"""Fields that steer a request, or that a machine says to us, are put beside the head as they are read."""

from __future__ import annotations

from proxy.decide.headers import REQUEST_RULES, RESPONSE_RULES, is_reserved
from proxy.wire.http1 import Headers, Limits, RequestHead, RequestReader, ResponseHead, ResponseReader


class Sink:
    def __init__(self) -> None:
        self.heads: list[RequestHead] = []
        self.answers: list[ResponseHead] = []

    def on_head(self, head: RequestHead) -> None:
        self.heads.append(head)

    def on_response_head(self, head: ResponseHead) -> None:
        self.answers.append(head)

    def on_body(self, data: bytes) -> None: ...
    def on_response_body(self, data: bytes) -> None: ...
    def on_end(self, trailers: Headers) -> None: ...
    def on_response_end(self, trailers: Headers) -> None: ...
    def on_upgrade_bytes(self, data: bytes) -> None: ...


def _answers(data: bytes) -> list[ResponseHead]:
    sink = Sink()
    reader = ResponseReader(sink, Limits(), RESPONSE_RULES)
    reader.feed(data)
    return sink.answers


def test_a_clients_steering_fields_pass_and_are_noted_for_their_request_alone() -> None:
    sink = Sink()
    reader = RequestReader(sink, Limits(), REQUEST_RULES)
    reader.feed(
        b"GET / HTTP/1.1\r\nHost: a\r\nFly-Force-Instance-Id: m1\r\nfly-client-ip: 1.2.3.4\r\n\r\n"
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    )
    first, second = sink.heads
    assert first.noted == [(b"fly-force-instance-id", b"m1")]
    assert (b"Fly-Force-Instance-Id", b"m1") in first.fields
    assert all(name.lower() != b"fly-client-ip" for name, _ in first.fields)
    assert second.noted == ()


def test_what_a_machine_says_to_us_is_taken_from_its_answer() -> None:
    (answer,) = _answers(
        b"HTTP/1.1 307 x\r\nFly-Replay: instance=a\r\nfly-replay: instance=b\r\nX: y\r\ncontent-length: 0\r\n\r\n"
    )
    assert answer.noted == [(b"fly-replay", b"instance=a"), (b"fly-replay", b"instance=b")]
    assert answer.fields == [(b"X", b"y")]


def test_a_replay_in_json_is_noted_by_its_content_type_only() -> None:
    for value, noted in (
        (b"application/vnd.fly.replay+json", True),
        (b"Application/vnd.fly.Replay+JSON; charset=utf-8", True),
        (b"application/vnd.fly.replay+jsonx", False),
        (b"application/json", False),
    ):
        (answer,) = _answers(b"HTTP/1.1 200 x\r\nContent-Type: %b\r\nContent-Length: 0\r\n\r\n" % value)
        assert bool(answer.noted) is noted
        assert answer.fields == [(b"Content-Type", value)]


def test_names_that_only_we_write_are_reserved() -> None:
    for name in (b"fly-client-ip", b"x-forwarded-for", b"content-length", b"host", b"connection", b"fly-prefer-region"):
        assert is_reserved(name)
    assert not is_reserved(b"x-tenant")
