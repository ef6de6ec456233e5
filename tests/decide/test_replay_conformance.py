"""What libraries in use send and read, against decide/replay.py (spec routing §9).

Each convention is written here as its library has it, in our words: the expressions by which consumers take
fly-replay-src apart, the headers that fly-ruby and the LiteFS proxy answer with, the JSON of Navigator.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.decide.headers import RESPONSE_RULES
from proxy.decide.replay import Directive, parse_header, parse_headers, parse_json, replay_src
from proxy.decide.steering import STEERING_FIELDS
from proxy.wire.http1 import REPLAY_TYPE
from tests.wire.http1_support import read_responses


def answered(raw: bytes) -> Directive | None:
    """What an answer, as it comes over the wire, asks for."""
    seen = read_responses(raw)
    assert seen.error is None
    head = seen.responses[0]
    if any(name == b"content-type" for name, _ in head.noted):
        return parse_json(raw.partition(b"\r\n\r\n")[2])
    return parse_headers(head.noted)


# --- fly-ruby: the primary's region and one of three states, on a 409


@pytest.mark.parametrize("state", ["captured_write", "http_method", "threshold"])
def test_fly_ruby_asks_for_the_primary_region_with_its_state(state: str) -> None:
    body = b"<html>Replaying request in ams</html>"
    raw = b"HTTP/1.1 409 Conflict\r\nFly-Replay: region=ams;state=%b\r\nContent-Length: %d\r\n\r\n%b"
    assert answered(raw % (state.encode(), len(body), body)) == Directive(regions=("ams",), state=state.encode())


# Ruby's `scan` of two generations, and a consumer in JavaScript: all split at `;`, all take the first `state`.
def scanned(value: str) -> str | None:
    return next((found[1] for found in re.findall(r"(.*?)=(.*?)($|;)", value) if found[0] == "state"), None)


def searched(value: str) -> str | None:
    found = re.search(r"(?:^|;)state=([^;]*)", value)
    return found[1] if found else None


@pytest.mark.parametrize("read", [scanned, searched])
@pytest.mark.parametrize(
    "state", [b"captured_write", b"http_method", b"threshold", b"api:token", b"port:3000", b"%7B%22a%22%7D"]
)
def test_consumers_of_fly_replay_src_find_the_state_that_the_source_gave(read: Any, state: bytes) -> None:
    directive = parse_header(b"region=ams;state=" + state)
    value = replay_src("00bb33ff", "fra", 1_700_000_000_123_456, directive.state)
    assert read(value.decode()) == state.decode()


@pytest.mark.parametrize("read", [scanned, searched])
def test_consumers_of_fly_replay_src_find_no_state_where_none_was_given(read: Any) -> None:
    assert read(replay_src("00bb33ff", "fra", 17, None).decode()) is None


@given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters=';"'), max_size=20))
def test_no_state_makes_a_consumer_see_another_source(state: str) -> None:
    directive = parse_header(b"app=a;state=" + state.encode())
    value = replay_src("m1", "fra", 17, directive.state)
    found = re.findall(r"(?:^|;)(instance|region|t)=([^;]*)", value.decode())
    assert found == [("instance", "m1"), ("region", "fra"), ("t", "17")]


# --- LiteFS: an empty 200 that names the primary by its host name, which is the machine's id


def test_the_litefs_proxy_asks_for_the_primary_instance() -> None:
    raw = b"HTTP/1.1 200 OK\r\nfly-replay: instance=3d8d9aef1e2389\r\nDate: x\r\nContent-Length: 0\r\n\r\n"
    assert answered(raw) == parse_header(b"instance=3d8d9aef1e2389")
    assert answered(raw).instance == "3d8d9aef1e2389"


def test_the_cookie_of_litefs_passes_beside_a_replay() -> None:
    raw = b"HTTP/1.1 200 OK\r\nSet-Cookie: __txid=0000000000000027; Path=/; HttpOnly\r\nContent-Length: 0\r\n\r\n"
    assert (b"Set-Cookie", b"__txid=0000000000000027; Path=/; HttpOnly") in read_responses(raw).responses[0].fields


# --- Navigator: JSON on a 307, with a mark for the second round


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({"app": "smooth-pdf"}, {"app": "smooth-pdf"}),
        ({"app": "other", "prefer_instance": "m123"}, {"app": "other", "prefer_instance": "m123"}),
        ({"region": "sjc,any"}, {"regions": ("sjc", "any")}),
    ],
)
@pytest.mark.parametrize("is_marked", [False, True])
def test_navigators_json_is_followed_with_its_mark(
    given: dict[str, Any], where: dict[str, Any], is_marked: bool
) -> None:
    if is_marked:
        given = {**given, "transform": {"set_headers": [{"name": "X-Navigator-Retry", "value": "true"}]}}
    body = json.dumps(given).encode()
    raw = b"HTTP/1.1 307 Temporary Redirect\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n%b"
    found = answered(raw % (REPLAY_TYPE, len(body), body))
    assert found is not None
    assert {name: getattr(found, name) for name in where} == where
    assert (found.transform is not None) is is_marked
    if found.transform is not None:
        assert found.transform.set_headers == ((b"X-Navigator-Retry", b"true"),)


# --- others seen in public


def test_a_relay_hides_a_clients_steering_from_the_machine_that_it_names() -> None:
    names = ["fly-force-instance-id", "fly-prefer-instance-id"]
    found = parse_json(json.dumps({"instance": "m2", "transform": {"delete_headers": names}}).encode())
    assert found.transform is not None
    assert set(found.transform.delete_headers) < STEERING_FIELDS


@pytest.mark.parametrize(
    "status", [b"200 OK", b"202 Accepted", b"204 No Content", b"307 Temporary Redirect", b"409 Conflict"]
)
def test_the_status_of_the_answer_says_nothing(status: bytes) -> None:
    assert answered(b"HTTP/1.1 " + status + b"\r\nfly-replay: region=ams\r\n\r\n") == parse_header(b"region=ams")


def test_what_is_said_to_us_is_not_passed_to_the_client() -> None:
    fields = (b"fly-replay", b"fly-replay-cache", b"fly-replay-cache-ttl-secs", b"fly-replay-cache-allow-bypass")
    for name in fields:
        RESPONSE_RULES.judge(name)
    raw = b"HTTP/1.1 200 OK\r\n" + b"".join(name.title() + b": x\r\n" for name in fields) + b"content-length: 0\r\n\r\n"
    head = read_responses(raw).responses[0]
    assert head.fields == []
    assert tuple(name for name, _ in head.noted) == fields
