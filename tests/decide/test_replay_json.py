"""decide/replay.py: the JSON form of fly-replay, and what a transform may and does change."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.decide.headers import identity_fields, is_reserved, request_head
from proxy.decide.replay import (
    MAX_JSON_BYTES,
    MAX_STATE_BYTES,
    MAX_TRANSFORM_FIELDS,
    CacheOrder,
    Directive,
    Fallback,
    Transform,
    apply_transform,
    parse_header,
    parse_json,
)
from proxy.decide.steering import STEERING_FIELDS
from proxy.errors import Code, ProxyError
from tests.wire.http1_support import read_requests


def directive(**values: Any) -> Directive:
    return Directive(**values)


def parsed(body: bytes) -> Directive | None:
    """None if it is refused as it ought to be; any other error passes."""
    try:
        return parse_json(body)
    except ProxyError as error:
        if error.code is not Code.REPLAY_INVALID:
            raise
        return None


# --- the form (spec routing §2.4)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"app": "target-app"}, directive(app="target-app")),
        ({"region": "iad,us"}, directive(regions=("iad", "us"))),
        ({"instance": "00bb33ff"}, directive(instance="00bb33ff")),
        ({"prefer_instance": "00bb33ff", "app": "a"}, directive(prefer_instance="00bb33ff", app="a")),
        ({"elsewhere": True}, directive(elsewhere=True)),
        ({"app": "a", "elsewhere": False}, directive(app="a")),
        ({"app": "a", "state": "é, x"}, directive(app="a", state="é, x".encode())),
        (
            {"app": "w", "timeout": "10s", "fallback": "force_self"},
            directive(app="w", timeout_s=10.0, fallback=Fallback.FORCE_SELF),
        ),
        ({"app": "a", "timeout": 1500}, directive(app="a", timeout_s=1.5)),
        ({"app": "a", "region": "", "state": None, "instance": "", "timeout": ""}, directive(app="a")),
        ({"app": "a", "priority": {"new": [1]}}, directive(app="a")),
        (
            {"app": "a", "cache": {"prefix": "/some/path/*", "ttl": 60}},
            directive(app="a", cache=CacheOrder(b"/some/path/*", 60)),
        ),
        (
            {"app": "a", "cache": {"prefix": "/", "ttl": 60, "allow_bypass": True}},
            directive(app="a", cache=CacheOrder(b"/", 60, allow_bypass=True)),
        ),
        (
            {"app": "a", "cache": {"prefix": "/", "ttl": 60}, "allow_bypass": True},
            directive(app="a", cache=CacheOrder(b"/", 60, allow_bypass=True)),
        ),
        ({"app": "o", "cache": {"invalidate": True}}, directive(app="o", cache=CacheOrder(invalidate=True))),
        ({"app": "a", "cache": {}}, directive(app="a")),
        ({"app": "a", "transform": {}}, directive(app="a")),
        (
            {
                "app": "target-app",
                "transform": {
                    "path": "/new/path?param=value",
                    "delete_headers": ["X-Unwanted-Header", "cookie"],
                    "set_headers": [
                        {"name": "X-Custom-Header", "value": " new-value "},
                        {"name": "authorization", "value": "Bearer token123"},
                    ],
                },
            },
            directive(
                app="target-app",
                transform=Transform(
                    b"/new/path?param=value",
                    (b"x-unwanted-header", b"cookie"),
                    ((b"X-Custom-Header", b"new-value"), (b"authorization", b"Bearer token123")),
                ),
            ),
        ),
    ],
)  # fmt: skip
def test_a_json_replay_is_read_as(given: dict[str, Any], expected: Directive) -> None:
    assert parse_json(json.dumps(given).encode()) == expected


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "JSON"),
        (b"null", "JSON"),
        (b"[]", "JSON"),
        (b'"app=a"', "JSON"),
        (b'{"app":"a"', "JSON"),
        (b'{"app":"a"}x', "JSON"),
        (b'{"app":1}', "JSON"),
        (b'{"app":"\xff"}', "JSON"),
        (b'{"app":"a","state":"\\ud800"}', "JSON"),
        (b'{"app":"a","elsewhere":"true"}', "JSON"),
        (b'{"app":"a","cache":"/x"}', "JSON"),
        (b'{"app":"a","cache":{"prefix":"/","ttl":"60"}}', "JSON"),
        (b'{"app":"a","transform":{"set_headers":[{"name":"x"}]}}', "JSON"),
        (b'{"app":"a","transform":{"set_headers":{"x":"y"}}}', "JSON"),
        (b"[" * 60_000, "JSON"),
        (b'{"zone":' + b"[" * 30_000 + b"]" * 30_000 + b"}", "JSON"),
        (b'{"app":"a"' + b" " * MAX_JSON_BYTES + b"}", "more than 65536"),
        (b"{}", "names no region"),
        (b'{"state":"x"}', "names no region"),
        (b'{"app":""}', "names no region"),
        (b'{"app":"a b"}', "app's name"),
        (b'{"region":"a;b"}', "expected codes"),
        (b'{"app":"a","state":"x;y"}', "no `;`"),
        (b'{"app":"a","state":"x\\r\\nfly-client-ip: ::1"}', "control"),
        (b'{"app":"a","state":"\\u0000"}', "control"),
        (b'{"app":"a","state":"' + b"x" * (MAX_STATE_BYTES + 1) + b'"}', "more than 4096"),
        (b'{"app":"a","timeout":-1}', "duration"),
        (b'{"app":"a","timeout":1e300}', "JSON"),
        (b'{"app":"a","fallback":"none"}', "force_self"),
        (b'{"app":"a","cache":{"prefix":"/"}}', "ttl"),
        (b'{"app":"a","cache":{"prefix":"/","ttl":9}}', "10 s or more"),
        (b'{"app":"a","cache":{"prefix":"/","ttl":60,"invalidate":true}}', "contradict"),
        (b'{"instance":"a","prefer_instance":"b"}', "contradict"),
    ],
)
def test_a_json_replay_that_is_none_is_refused_with_the_reason(body: bytes, why: str) -> None:
    with pytest.raises(ProxyError) as caught:
        parse_json(body)
    assert caught.value.code is Code.REPLAY_INVALID
    assert why in caught.value.detail
    assert len(caught.value.detail) < 300
    assert caught.value.detail.isprintable()


leaves = st.none() | st.booleans() | st.integers(-5, 2**70) | st.text(max_size=12) | st.sampled_from(
    ["ams", "10s", "force_self", "/a", "/a\r\n", "x-a", "host", "a;b"]
)  # fmt: skip
members = st.sampled_from(
    ["region", "instance", "prefer_instance", "app", "state", "timeout", "fallback", "elsewhere", "transform", "cache",
     "path", "delete_headers", "set_headers", "name", "value", "prefix", "ttl", "invalidate", "allow_bypass", "other"]
)  # fmt: skip
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(members, inner, max_size=4))
NOT_IN_A_HEAD = set(b"\r\n\0")


@given(st.dictionaries(members, values, max_size=6))
def test_no_json_raises_anything_but_the_one_error_and_nothing_read_can_end_a_line(given: dict[str, Any]) -> None:
    found = parsed(json.dumps(given).encode())
    if found is None:
        return
    texts = [found.state or b""]
    if found.transform is not None:
        texts += [found.transform.path or b"", *found.transform.delete_headers]
        texts += [part for pair in found.transform.set_headers for part in pair]
    assert not any(set(text) & NOT_IN_A_HEAD for text in texts)


@given(st.binary(max_size=80))
def test_no_bytes_raise_anything_but_the_one_error(body: bytes) -> None:
    assert parsed(body) is None


names = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=1, max_size=12)


@given(
    st.fixed_dictionaries(
        {"app": names},
        optional={
            "instance": names, "state": st.text("abc=:/, {}", max_size=9),
            "timeout": st.integers(1, 9999).map("{}ms".format), "fallback": st.sampled_from(Fallback).map(str),
        },
    )
)  # fmt: skip
def test_the_two_forms_say_the_same(given: dict[str, str]) -> None:
    header = ";".join(f'{name}="{value}"' for name, value in given.items() if value)
    assert parse_json(json.dumps(given).encode()) == parse_header(header.encode())


# --- transforms


def transform(**given: Any) -> Transform:
    found = parse_json(json.dumps({"app": "a", "transform": given}).encode()).transform
    assert found is not None
    return found


@pytest.mark.parametrize("path", ["/", "/a/b", "/a?b=c&d", "//a", "/a?q=[x]|{y}", "/%7Euser", "/" + "a" * 16_383])
def test_a_path_is_replaced_by_what_may_stand_in_a_request_line(path: str) -> None:
    assert transform(path=path).path == path.encode()


@pytest.mark.parametrize(
    "path",
    [
        "a", "*", "http://other.test/", "/a b", "/a\tb", "/a#b", "/a HTTP/1.1\r\nhost: b", "/\0", "/\x7f", "/é",
        "/" + "a" * 16_384,
    ],
)  # fmt: skip
def test_a_path_that_no_request_line_may_hold_is_refused(path: str) -> None:
    assert parsed(json.dumps({"app": "a", "transform": {"path": path}}).encode()) is None


OURS = [
    "host", "Host", "content-length", "Transfer-Encoding", "transfer_encoding", "connection", "keep-alive", "te",
    "trailer", "upgrade", "proxy-connection", "expect", "via", "Via", "forwarded", "x-forwarded-for", "X_Forwarded_For",
    "x-forwarded-anything", "x-real-ip", "fly-client-ip", "fly_client_ip", "fly-replay-src", "fly-replay", "fly-region",
    "fly-anything", "wakefront-error", "x-request-start",
]  # fmt: skip


@pytest.mark.parametrize("name", [*OURS, "", "a b", "a:b", "a\r\nb", "a\nb", "a\0", "é", "(a)", "a" * 256])
def test_what_frames_routes_or_vouches_may_be_neither_set_nor_deleted(name: str) -> None:
    setting = {"set_headers": [{"name": name, "value": "x"}]}
    for change in (setting, {"delete_headers": [name]}):
        assert parsed(json.dumps({"app": "a", "transform": change}).encode()) is None


@pytest.mark.parametrize("name", sorted(one.decode() for one in STEERING_FIELDS))
def test_a_clients_steering_may_be_hidden_from_the_target_but_not_written(name: str) -> None:
    assert transform(delete_headers=[name.title()]).delete_headers == (name.encode(),)
    setting = {"set_headers": [{"name": name, "value": "x"}]}
    assert parsed(json.dumps({"app": "a", "transform": setting}).encode()) is None


@pytest.mark.parametrize("value", ["a\r\nb: c", "a\nb", "a\rb", "\0", "\x7f", "\x1b[0m"])
def test_a_value_that_would_end_a_line_is_refused_and_not_shown(value: str) -> None:
    body = json.dumps({"app": "a", "transform": {"set_headers": [{"name": "x-a", "value": "hush" + value + "b"}]}})
    with pytest.raises(ProxyError) as caught:
        parse_json(body.encode())
    assert caught.value.code is Code.REPLAY_INVALID
    assert "hush" not in caught.value.detail


def test_there_is_a_bound_on_fields() -> None:
    many = [f"x-{at}" for at in range(MAX_TRANSFORM_FIELDS + 1)]
    assert parsed(json.dumps({"app": "a", "transform": {"delete_headers": many}}).encode()) is None
    assert len(transform(delete_headers=many[1:]).delete_headers) == MAX_TRANSFORM_FIELDS


def flat(*fields: tuple[bytes, bytes]) -> list[bytes]:
    return [part for name, value in fields for part in (name, b": ", value, b"\r\n")]


CLIENTS = flat(
    (b"Host", b"a.test"), (b"Cookie", b"a=1"), (b"X-User", b"eve"), (b"x_user", b"mallory"), (b"Accept", b"*/*")
)


def test_fields_are_deleted_whatever_their_case_and_set_ones_replace_their_namesakes() -> None:
    change = transform(delete_headers=["COOKIE"], set_headers=[{"name": "x-user", "value": "alice"}])
    assert apply_transform(CLIENTS, change) == flat((b"Host", b"a.test"), (b"Accept", b"*/*"), (b"x-user", b"alice"))


def test_deletion_comes_first_so_that_a_field_both_deleted_and_set_is_there() -> None:
    change = transform(delete_headers=["x-user"], set_headers=[{"name": "x-user", "value": "alice"}])
    assert apply_transform(CLIENTS, change)[-4:] == flat((b"x-user", b"alice"))


def test_of_two_settings_of_one_name_the_later_holds() -> None:
    change = transform(set_headers=[{"name": "x-a", "value": "1"}, {"name": "X-A", "value": "2"}])
    assert apply_transform([], change) == flat((b"X-A", b"2"))


def test_a_client_cannot_have_the_apps_fields_dropped_by_naming_them_in_connection() -> None:
    change = transform(set_headers=[{"name": "x-user", "value": "alice"}])
    changed = apply_transform(CLIENTS, change, frozenset({b"x-user", b"accept", b"host"}))
    assert changed == flat((b"Host", b"a.test"), (b"Cookie", b"a=1"), (b"x-user", b"alice"))


def test_the_list_that_was_given_stays_as_it_was() -> None:
    before = list(CLIENTS)
    apply_transform(CLIENTS, transform(delete_headers=["cookie"]))
    assert before == CLIENTS


def dashed(name: str) -> bytes:
    return name.lower().replace("_", "-").encode()


tokens = st.text("abcdefghijklmnop-_XYZ!", min_size=1, max_size=10)
texts = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=12)


@given(
    st.lists(st.fixed_dictionaries({"name": tokens, "value": texts}), max_size=5), st.lists(tokens, max_size=4),
    st.lists(st.tuples(tokens, st.text("abc", min_size=1, max_size=4)), max_size=5),
)  # fmt: skip
def test_a_transformed_head_is_one_request_with_the_fields_that_were_set(
    setting: list[dict[str, str]], deleting: list[str], client: list[tuple[str, str]]
) -> None:
    body = json.dumps({"app": "a", "transform": {"path": "/new", "set_headers": setting, "delete_headers": deleting}})
    found = parsed(body.encode())
    if found is None or found.transform is None:
        named = [*deleting, *(one["name"] for one in setting)]
        assert any(is_reserved(dashed(name)) for name in named)
        return
    raw = "".join(f"{name}: {value}\r\n" for name, value in client).encode()
    before = read_requests(b"GET /old HTTP/1.1\r\nHost: a.test\r\n" + raw + b"\r\n")
    if before.error is not None:
        return
    head = before.heads[0]
    head.passed = apply_transform(head.passed, found.transform, head.listed_hops)
    head.target = found.transform.path or head.target
    identity = identity_fields("192.0.2.7", "198.51.100.1", 443, True, "ams", 1, keep=True)
    after = read_requests(request_head(head, identity, b"01ARZ3NDEKTSV4RRFFQ69G5FAV", 17, b"trace"))
    assert after.error is None
    assert [(one.method, one.target) for one in after.heads] == [(b"GET", b"/new")]
    sent = [(name.lower(), value) for name, value in after.heads[0].fields]
    wanted = {one["name"].lower(): one["value"].strip(" \t").encode() for one in setting}
    for name, value in wanted.items():
        assert [other for mine, other in sent if mine == name.encode()] == [value]
    gone = set(map(dashed, deleting)) - set(map(dashed, wanted))
    assert not any(dashed(name.decode()) in gone for name, _ in sent)
