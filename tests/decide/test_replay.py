"""decide/replay.py: the fly-replay header, who may be replayed to, and what the replayed request says."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.decide.replay import (
    MAX_CACHE_TTL_S,
    MAX_HEADER_BYTES,
    MAX_REPLAYS,
    MAX_STATE_BYTES,
    MAX_TIMEOUT_S,
    CacheOrder,
    Directive,
    FailReason,
    Fallback,
    cache_order,
    judge,
    may_replay,
    parse_header,
    parse_headers,
    replay_failed,
    replay_src,
)
from proxy.errors import Code, ProxyError
from proxy.model import App, AppName, Machine, MachineId, MachineState, RegionCode


def directive(**values: Any) -> Directive:
    return Directive(**values)


# --- the header (spec routing §2.1)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"region=sjc", directive(regions=("sjc",))),
        (b'region="iad,ord,us,na"', directive(regions=("iad", "ord", "us", "na"))),
        (b'region="sjc,any"', directive(regions=("sjc", "any"))),
        (b'region=" sjc , ,any"', directive(regions=("sjc", "any"))),
        (b'region="sjc"', directive(regions=("sjc",))),
        (b"region=SJC", directive(regions=("sjc",))),
        (b"instance=00bb33ff", directive(instance="00bb33ff")),
        (b"prefer_instance=00bb33ff", directive(prefer_instance="00bb33ff")),
        (b"app=target-app", directive(app="target-app")),
        (b'region="sjc,any";app=target-app', directive(regions=("sjc", "any"), app="target-app")),
        (b'app=target-app;region="sjc,any"', directive(regions=("sjc", "any"), app="target-app")),
        (b"app=w;timeout=10s;fallback=force_self", directive(app="w", timeout_s=10.0, fallback=Fallback.FORCE_SELF)),
        (b"app=w;fallback=prefer_self", directive(app="w", fallback=Fallback.PREFER_SELF)),
        (b"elsewhere=true", directive(elsewhere=True)),
        (b"app=a;elsewhere=false", directive(app="a")),
        (b"app=a;state=captured_write", directive(app="a", state=b"captured_write")),
        (b"app=a;state=port:3000", directive(app="a", state=b"port:3000")),
        (b"app=a;state=", directive(app="a", state=b"")),
        (b"app=a;state=YQ==", directive(app="a", state=b"YQ==")),
        (b"app=a;state=one, two", directive(app="a", state=b"one, two")),
        (b'app=a;state={"a":"b, c"}', directive(app="a", state=b'{"a":"b, c"}')),
        (b'app=a;state=" kept "', directive(app="a", state=b" kept ")),
        (b'app=a;state=""', directive(app="a", state=b"")),
        (b"app=a;state=caf\xc3\xa9 \xff", directive(app="a", state=b"caf\xc3\xa9 \xff")),
        (b" region = sjc ; app\t=\ta ", directive(regions=("sjc",), app="a")),
        (b' region = "sjc" ; app = "a" ', directive(regions=("sjc",), app="a")),
        (b"region=sjc;", directive(regions=("sjc",))),
        (b";;region=sjc; ;", directive(regions=("sjc",))),
        (b'region="sjc";;', directive(regions=("sjc",))),
        (b"Region=sjc", directive(regions=("sjc",))),
        (b"region=sjc;zone=b;x-y=1,2", directive(regions=("sjc",))),
        (b'region=sjc;zone="b;c"', directive(regions=("sjc",))),
    ],
)
def test_a_header_is_read_as(value: bytes, expected: Directive) -> None:
    assert parse_header(value) == expected


@pytest.mark.parametrize(
    ("value", "timeout_s"),
    [
        (b"10s", 10.0), (b"800ms", 0.8), (b"1.5s", 1.5), (b"1m30s", 90.0), (b"1500", 1.5), (b'"2s"', 2.0),
        (b"9h", MAX_TIMEOUT_S), (b"999999999", MAX_TIMEOUT_S),
    ],
)  # fmt: skip
def test_a_timeout_is_a_duration_and_a_bare_number_is_milliseconds(value: bytes, timeout_s: float) -> None:
    assert parse_header(b"app=a;timeout=" + value).timeout_s == pytest.approx(timeout_s)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (b"", "names no region"),
        (b" ; ", "names no region"),
        (b"true", "expected name=value"),
        (b"region", "expected name=value"),
        (b'"region=sjc"', "expected"),
        (b"state=x", "names no region"),
        (b"timeout=1s;fallback=force_self", "names no region"),
        (b"elsewhere=false", "names no region"),
        (b"zone=b", "names no region"),
        (b"region=", "names none"),
        (b'region=","', "names none"),
        (b"region=sjc,ord", "quotes"),
        (b"region=sjc, region=ord", "quotes"),
        (b"region=../x", "expected codes"),
        (b"region=\xff", "expected codes"),
        (b'region="' + b"ams," * 65 + b'"', "more than 64"),
        (b"region=a;region=b", "twice"),
        (b"region=a;REGION=b", "twice"),
        (b"app=a;state=x;state=y", "twice"),
        (b"instance=", "machine's id"),
        (b"instance=a b", "machine's id"),
        (b"instance=" + b"a" * 64, "machine's id"),
        (b"instance=a;prefer_instance=b", "contradict"),
        (b"app=", "app's name"),
        (b"app=Target", "app's name"),
        (b"app=a_b", "app's name"),
        (b"app=-a", "app's name"),
        (b"app=" + b"a" * 64, "app's name"),
        (b"elsewhere=yes", "true or false"),
        (b"elsewhere=1", "true or false"),
        (b"app=a;timeout=", "duration"),
        (b"app=a;timeout=-1s", "duration"),
        (b"app=a;timeout=soon", "duration"),
        (b"app=a;timeout=1e9s", "duration"),
        (b"app=a;timeout=1_0s", "duration"),
        (b"app=a;timeout=0s", "more than nothing"),
        (b"app=a;timeout=0", "more than nothing"),
        (b"app=a;fallback=self", "force_self"),
        (b"app=a;fallback=\xff", "force_self"),
        (b'app=a;state="x;y"', "no `;`"),
        (b"app=a;state=x\ry", "control"),
        (b"app=a;state=x\nfly-client-ip: 1.2.3.4", "control"),
        (b"app=a;state=x\0", "control"),
        (b"app=a;state=x\x7f", "control"),
        (b"app=a;state=" + b"x" * (MAX_STATE_BYTES + 1), "more than 4096"),
        (b"app=a;zone=" + b"x" * MAX_HEADER_BYTES, "more than 8192"),
        (b'region="sjc', "quoted"),
        (b'region="sjc"x', "quoted"),
        (b'region="sjc" "ord"', "quoted"),
        (b'app=a;state="a\\"b"', "quoted"),
        (b"app=a;=b", "field's name"),
        (b"app=a;b c=d", "field's name"),
    ],
)
def test_a_header_that_is_none_is_refused_with_the_reason(value: bytes, why: str) -> None:
    with pytest.raises(ProxyError) as caught:
        parse_header(value)
    assert caught.value.code is Code.REPLAY_INVALID
    assert why in caught.value.detail
    assert len(caught.value.detail) < 300
    assert caught.value.detail.isprintable()


def test_a_secret_state_is_in_no_error() -> None:
    for value in (b"app=a;state=hush;state=hush", b'app=a;state="hush;"', b"app=a;state=hush\x01"):
        with pytest.raises(ProxyError) as caught:
            parse_header(value)
        assert "hush" not in caught.value.detail


def test_the_same_header_is_read_the_same_however_often() -> None:
    for at in range(3000):
        assert parse_header(b"instance=m%d" % (at % 1500)).instance == f"m{at % 1500}"


tokens = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=1, max_size=12)
spaces = st.sampled_from(["", " ", "\t", "  "])
directives = st.builds(
    Directive,
    regions=st.lists(tokens, min_size=1, max_size=5).map(tuple),
    instance=st.none() | tokens.map(MachineId),
    app=st.none() | tokens.map(AppName),
    state=st.none() | st.binary(max_size=30).map(lambda raw: bytes(b for b in raw if b > 0x20 and b not in b';"\x7f')),
    elsewhere=st.booleans(),
    timeout_s=st.none() | st.integers(1, 3_600_000).map(lambda ms: ms / 1000),
    fallback=st.none() | st.sampled_from(Fallback),
)


def written(given: Directive, pad: str, is_quoted: bool) -> bytes:
    quote = '"' if is_quoted else ""
    fields: list[tuple[str, str]] = [("region", f'"{",".join(given.regions)}"')]
    for name, value in (("instance", given.instance), ("app", given.app), ("fallback", given.fallback)):
        if value is not None:
            fields.append((name, f"{quote}{value}{quote}"))
    if given.state is not None:
        fields.append(("state", quote + given.state.decode("latin-1") + quote))
    if given.elsewhere:
        fields.append(("elsewhere", "true"))
    if given.timeout_s is not None:
        fields.append(("timeout", f"{round(given.timeout_s * 1000)}ms"))
    return f"{pad};{pad}".join(f"{name}{pad}={pad}{value}" for name, value in fields).encode("latin-1")


@given(directives, spaces, st.booleans())
def test_what_is_written_by_the_grammar_is_read_back(given: Directive, pad: str, is_quoted: bool) -> None:
    assert parse_header(written(given, pad, is_quoted)) == given


pieces = st.sampled_from(
    [b"region", b"app", b"instance", b"state", b"timeout", b"fallback", b"elsewhere", b"=", b";", b'"', b",", b" ",
     b"ams", b"true", b"10s", b"force_self", b"\r\n", b"\0", b"\xff", b"x"]
)  # fmt: skip


def parsed(value: bytes) -> Directive | None:
    """None if it is refused as it ought to be; any other error passes."""
    try:
        return parse_header(value)
    except ProxyError as error:
        if error.code is not Code.REPLAY_INVALID:
            raise
        return None


@given(st.lists(pieces, max_size=24).map(b"".join) | st.binary(max_size=60))
def test_no_header_raises_anything_but_the_one_error(value: bytes) -> None:
    found = parsed(value)
    if found is None:
        return
    assert found.regions or found.instance or found.prefer_instance or found.app or found.elsewhere
    assert found.state is None or not set(found.state) & set(b"\r\n\0;")


@pytest.mark.parametrize(
    "value", [b'a="' * 2_000, b"=" * 8_000, b";" * 8_000, b"state= " * 1_100, b'"' * 8_000, b' ="' * 2_000]
)
def test_a_header_made_to_be_slow_is_not(value: bytes) -> None:
    with pytest.raises(ProxyError):
        parse_header(value)


# --- the fields beside it


def test_of_several_replay_headers_none_is_followed() -> None:
    with pytest.raises(ProxyError, match="more than once"):
        parse_headers([(b"fly-replay", b"app=a"), (b"fly-replay", b"app=a")])


def test_without_the_header_nothing_is_asked_for() -> None:
    assert parse_headers([]) is None
    assert parse_headers([(b"fly-replay-cache", b"nonsense"), (b"wakefront-machine-load", b"1")]) is None


def test_the_order_to_the_cache_comes_with_the_directive() -> None:
    fields = [
        (b"fly-replay-cache-ttl-secs", b"60"), (b"fly-replay", b"app=a"), (b"fly-replay-cache", b"/some/path/*"),
        (b"fly-replay-cache-allow-bypass", b"yes"),
    ]  # fmt: skip
    assert parse_headers(fields) == directive(app="a", cache=CacheOrder(b"/some/path/*", 60, allow_bypass=True))
    assert parse_header(b"app=a").cache is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({b"fly-replay-cache-ttl-secs": b"60"}, None),
        ({b"fly-replay-cache": b"invalidate"}, CacheOrder(invalidate=True)),
        ({b"fly-replay-cache": b"/a", b"fly-replay-cache-ttl-secs": b"10"}, CacheOrder(b"/a", 10)),
        (
            {b"fly-replay-cache": b"/a", b"fly-replay-cache-ttl-secs": b"60", b"fly-replay-cache-allow-bypass": b"no"},
            CacheOrder(b"/a", 60),
        ),
        ({b"fly-replay-cache": b"/a", b"fly-replay-cache-ttl-secs": b"999999999"}, CacheOrder(b"/a", MAX_CACHE_TTL_S)),
    ],
)
def test_the_caches_fields_are_read_as(fields: dict[bytes, bytes], expected: CacheOrder | None) -> None:
    assert cache_order(list(fields.items())) == expected


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ([(b"fly-replay-cache", b"/a")], "number of seconds"),
        ([(b"fly-replay-cache", b"/a"), (b"fly-replay-cache-ttl-secs", b"1m")], "number of seconds"),
        ([(b"fly-replay-cache", b"/a"), (b"fly-replay-cache-ttl-secs", b"9")], "10 s or more"),
        ([(b"fly-replay-cache", b""), (b"fly-replay-cache-ttl-secs", b"60")], "pattern"),
        ([(b"fly-replay-cache", b"/" * 1025), (b"fly-replay-cache-ttl-secs", b"60")], "pattern"),
        ([(b"fly-replay-cache", b"/a"), (b"fly-replay-cache", b"/a")], "more than once"),
        (
            [(b"fly-replay-cache", b"/a"), (b"fly-replay-cache-ttl-secs", b"60"),
             (b"fly-replay-cache-allow-bypass", b"maybe")],
            "yes or no",
        ),
    ],
)  # fmt: skip
def test_an_order_to_the_cache_that_is_none_is_refused(fields: list[tuple[bytes, bytes]], why: str) -> None:
    with pytest.raises(ProxyError, match=why) as caught:
        cache_order(fields)
    assert caught.value.code is Code.REPLAY_INVALID


# --- what the replayed request says (spec routing §2.3)


@given(st.binary(max_size=40).map(lambda raw: bytes(b for b in raw if b >= 0x20 and b not in b";\x7f")))
def test_fly_replay_src_is_pairs_joined_by_semicolons_with_the_state_last(state: bytes) -> None:
    source = replay_src("m1", "ams", 1_700_000_000_123_456, state)
    pairs = [pair.partition(b"=")[::2] for pair in source.split(b";")]
    assert pairs == [(b"instance", b"m1"), (b"region", b"ams"), (b"t", b"1700000000123456"), (b"state", state)]


def test_fly_replay_src_has_no_state_if_none_was_given() -> None:
    assert replay_src("m1", "ams", 17, None) == b"instance=m1;region=ams;t=17"


def test_fly_replay_failed_says_what_was_tried_and_leaves_out_what_was_not_named() -> None:
    full = directive(instance="00bb33ff", app="target-app", regions=("iad",))
    assert replay_failed(full, "target-app", "11aa44ee", FailReason.TIMEOUT, 10_000) == (
        b"instance=00bb33ff;app=target-app;region=iad;replay_source=11aa44ee;reason=timeout;elapsed_ms=10000"
    )
    bare = directive(elsewhere=True)
    assert replay_failed(bare, "mine", "m1", FailReason.NO_CANDIDATE, 0) == (
        b"app=mine;replay_source=m1;reason=no_candidate;elapsed_ms=0"
    )
    several = directive(prefer_instance="m2", regions=("iad", "us"))
    assert replay_failed(several, "mine", "m1", FailReason.RETRIES_EXHAUSTED, 7) == (
        b"instance=m2;app=mine;region=iad,us;replay_source=m1;reason=retries_exhausted;elapsed_ms=7"
    )


# --- may it be followed (spec routing §2.2, 2.5, 2.6)


def app(
    name: str, organization: str = "personal", sources: tuple[str, ...] = (), machines: tuple[str, ...] = ()
) -> App:
    return App(
        AppName(name), (f"{name}.test",), (), organization=organization, replay_sources=sources,
        machines=tuple(
            Machine(MachineId(one), RegionCode("ams"), "app", MachineState.STARTED, 1, 0) for one in machines
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        (app("a"), app("a"), True),
        (app("a"), app("b"), True),
        (app("a", "one"), app("b", "two"), False),
        (app("a", "one"), app("b", "two", ("one",)), True),
        (app("a", "one", ("two",)), app("b", "two"), False),
        (app("a", "one"), app("b", "two", ("three", "on", "onee")), False),
        (app("a", "one"), app("a", "two"), True),
    ],
)
def test_an_app_may_replay_within_its_organization_and_where_its_organization_is_let_in(
    source: App, target: App, expected: bool
) -> None:
    assert may_replay(source, target) is expected


def code_of(error: ProxyError | None) -> Code | None:
    return None if error is None else error.code


def test_a_request_is_replayed_ten_times_and_no_more() -> None:
    mine = app("mine")
    judged = [code_of(judge(directive(elsewhere=True), done, False, mine, mine)) for done in range(MAX_REPLAYS + 2)]
    assert judged == [None] * 10 + [Code.REPLAY_LOOP] * 2


def test_what_a_fallback_gave_back_is_not_replayed_again() -> None:
    mine = app("mine")
    assert code_of(judge(directive(elsewhere=True), 1, True, mine, mine)) is Code.REPLAY_LOOP


def test_an_unknown_app_and_one_that_does_not_let_us_in_are_told_apart() -> None:
    mine, theirs = app("mine", "one"), app("theirs", "two")
    assert code_of(judge(directive(app="none"), 0, False, mine, None)) is Code.REPLAY_APP_UNKNOWN
    assert code_of(judge(directive(app="theirs"), 0, False, mine, theirs)) is Code.REPLAY_APP_FORBIDDEN


def test_an_app_and_a_machine_of_another_contradict_each_other() -> None:
    mine, other = app("mine", machines=("m1",)), app("other", machines=("o1",))
    assert code_of(judge(directive(app="other", instance="m1"), 0, False, mine, other)) is Code.REPLAY_INVALID
    assert judge(directive(app="other", instance="o1"), 0, False, mine, other) is None
    assert judge(directive(app="other", instance="gone"), 0, False, mine, other) is None
    assert judge(directive(app="mine", instance="m1"), 0, False, mine, mine) is None


def test_a_directive_can_be_sent_between_processes() -> None:
    whole = directive(
        app="a", regions=("ams",), state=b"\xff", cache=CacheOrder(b"/a", 60), fallback=Fallback.FORCE_SELF
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(whole), type=Directive) == whole
