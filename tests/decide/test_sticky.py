"""decide/sticky.py: a cookie says nothing, can't be changed, and is gone from what the app sees."""

from __future__ import annotations

import base64
import hmac
import re
from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from proxy.decide.sticky import find_cookie, open_sealed, seal, set_cookie, strip_cookie

KEY, OLD_KEY = bytes(range(32)), bytes(range(32, 64))
NAME = b"wakefront-sticky"
MACHINE = "91850adf1c9183"
END = 2_000_000_000

IDS = st.text("abcdefghijklmnopqrstuvwxyz0123456789-", min_size=1, max_size=63)
KEYS = st.binary(min_size=1, max_size=100)
COOKIE_SAFE = re.compile(rb"[A-Za-z0-9_-]+")


@given(KEYS, st.text(max_size=30), IDS, st.integers(1, (1 << 40) - 1))
def test_what_is_sealed_is_opened_and_fits_a_cookie(key: bytes, app: str, machine: str, expires: int) -> None:
    value = seal(key, app, machine, expires)
    assert open_sealed(key, app, value, expires - 1) == machine
    assert open_sealed((OLD_KEY, key), app, value, 0.0) == machine
    assert COOKIE_SAFE.fullmatch(value) and len(value) <= (80 if len(machine) <= 39 else 112)


@given(st.binary(max_size=130))
def test_garbage_is_no_cookie(value: bytes) -> None:
    assert open_sealed((KEY, OLD_KEY), "web", value, 0.0) is None


@given(IDS, st.data())
def test_no_changed_value_is_accepted(machine: str, data: st.DataObject) -> None:
    value = seal(KEY, "web", machine, END)
    at = data.draw(st.integers(0, len(value) - 1))
    change = data.draw(st.sampled_from(["set", "insert", "delete", "cut", "append", "swap"]))
    byte = bytes([data.draw(st.integers(0, 255))])
    other = seal(KEY, "web", data.draw(IDS), END)
    changed = {
        "set": value[:at] + byte + value[at + 1 :],
        "insert": value[:at] + byte + value[at:],
        "delete": value[:at] + value[at + 1 :],
        "cut": value[:at],
        "append": value + byte * 4,
        "swap": value[:at] + other[at:],
    }[change]
    assume(changed not in (value, other))
    assert open_sealed(KEY, "web", changed, 0.0) is None


def test_no_flipped_bit_and_no_second_spelling_is_accepted() -> None:
    value = seal(KEY, "web", MACHINE, END)
    for at in range(len(value)):
        for bit in range(8):
            changed = value[:at] + bytes([value[at] ^ 1 << bit]) + value[at + 1 :]
            assert open_sealed(KEY, "web", changed, 0.0) is None
    # `+` and `/` mean the same six bits in other alphabets of base64
    values = [seal(KEY, "web", MACHINE, END + number) for number in range(50)]
    respelled = [value.replace(b"-", b"+").replace(b"_", b"/") for value in values]
    assert sum(one != other for one, other in zip(values, respelled, strict=True)) > 10
    assert all(
        open_sealed(KEY, "web", one, 0.0) is None for one, other in zip(respelled, values, strict=True) if one != other
    )
    assert open_sealed(KEY, "web", value + b"====", 0.0) is None and open_sealed(KEY, "web", b"", 0.0) is None


def test_a_cookie_is_another_apps_another_keys_or_expired() -> None:
    value = seal(KEY, "web", MACHINE, END)
    assert open_sealed(KEY, "web", value, END - 0.5) == MACHINE
    assert open_sealed(KEY, "web", value, END) is None
    assert open_sealed(KEY, "shop", value, 0.0) is None
    assert open_sealed(KEY, "we", value, 0.0) is None
    assert open_sealed(OLD_KEY, "web", value, 0.0) is None
    assert open_sealed((), "web", value, 0.0) is None


def test_a_cookie_outlives_its_keys_rotation_as_long_as_the_old_key_is_known() -> None:
    value = seal(OLD_KEY, "web", MACHINE, END)
    assert open_sealed((KEY, OLD_KEY), "web", value, 0.0) == MACHINE
    assert open_sealed((KEY,), "web", value, 0.0) is None


def test_values_show_neither_machine_nor_expiry_nor_how_long_an_id_is() -> None:
    values = {seal(KEY, "web", f"m{number}" * (1 + number % 4), END) for number in range(200)}
    assert len(values) == 200 and {len(value) for value in values} == {64}
    raws = [base64.urlsafe_b64decode(value) for value in values]
    assert not any(b"m1" in raw or END.to_bytes(5, "big") in raw for raw in raws)
    for at in range(48):  # no byte is the same in all, though expiry and most of the padding are
        assert Counter(raw[at] for raw in raws).most_common(1)[0][1] < 12


@pytest.mark.parametrize("key", [KEY, b"k", b"k" * 64, b"k" * 65, b"k" * 200])
def test_tags_are_hmac_sha256_of_app_expiry_and_id(key: bytes) -> None:
    raw = base64.urlsafe_b64decode(seal(key, "web", MACHINE, END))
    body = END.to_bytes(5, "big") + MACHINE.encode().ljust(27, b"\0")
    assert raw[:16] == hmac.digest(key, b"tagweb\0" + body, "sha256")[:16]
    stream = hmac.digest(key, b"stream0" + raw[:16], "sha256")
    assert raw[16:] == bytes(one ^ other for one, other in zip(body, stream, strict=True))


@pytest.mark.parametrize("machine", ["", "a" * 64, "a\0", "\udcff"])
def test_an_id_that_does_not_fit_is_refused_when_sealed(machine: str) -> None:
    with pytest.raises(ValueError):
        seal(KEY, "web", machine, END)


@pytest.mark.parametrize("expires", [-1, 1 << 40])
def test_a_time_that_does_not_fit_is_refused_when_sealed(expires: int) -> None:
    with pytest.raises(ValueError, match="unix seconds"):
        seal(KEY, "web", MACHINE, expires)


# --- fields

FIELDS = [
    # Cookie fields, value found, what is left of each
    ([b"a=1; wakefront-sticky=V; b=2"], b"V", [b"a=1; b=2"]),
    ([b"wakefront-sticky=V"], b"V", [b""]),
    ([b"wakefront-sticky=V; a=1"], b"V", [b"a=1"]),
    ([b"a=1; wakefront-sticky=V"], b"V", [b"a=1"]),
    ([b"a=1;wakefront-sticky=V;b=2"], b"V", [b"a=1;b=2"]),
    ([b"a=1 ;\twakefront-sticky = V\t; b=2"], b"V", [b"a=1 ; b=2"]),
    ([b'wakefront-sticky="V"; a="x y"'], b"V", [b'a="x y"']),
    ([b"a=1", b"wakefront-sticky=V"], b"V", [b"a=1", b""]),
    ([b"wakefront-sticky=V; wakefront-sticky=W; a=1"], b"V", [b"a=1"]),
    ([b"wakefront-sticky="], b"", [b""]),
    ([b'wakefront-sticky="'], b'"', [b""]),
    ([b"wakefront-sticky=V=="], b"V==", [b""]),
    ([b"Wakefront-Sticky=V"], None, [b"Wakefront-Sticky=V"]),
    ([b"wakefront-sticky2=V; xwakefront-sticky=V"], None, [b"wakefront-sticky2=V; xwakefront-sticky=V"]),
    ([b"a=wakefront-sticky; b"], None, [b"a=wakefront-sticky; b"]),
    ([b"a=wakefront-sticky=V"], None, [b"a=wakefront-sticky=V"]),
    ([b"wakefront-sticky"], None, [b"wakefront-sticky"]),
    ([b";; ;=;a"], None, [b";; ;=;a"]),
    ([b""], None, [b""]),
    ([], None, []),
]


@pytest.mark.parametrize(("fields", "value", "left"), FIELDS)
def test_our_cookie_is_found_and_removed(fields: list[bytes], value: bytes | None, left: list[bytes]) -> None:
    assert find_cookie(fields, NAME) == value
    assert [strip_cookie(field, NAME) for field in fields] == left


PIECES = st.sampled_from([b"a=1", b"n=x", b'n="y"', b" n = z ", b"n", b"", b"m=n=1", b" ", b"=n", b"\tb", b"\xff=n"])


@given(st.lists(st.one_of(PIECES, st.binary(max_size=6)), max_size=8).map(b";".join))
def test_no_app_sees_our_cookie_and_none_loses_another(field: bytes) -> None:
    left = strip_cookie(field, b"n")
    assert find_cookie([left], b"n") is None
    assert (left == field) or find_cookie([field], b"n") is not None

    def others(text: bytes) -> list[bytes]:
        pairs = [pair.strip(b" \t") for pair in text.split(b";")]
        return [pair for pair in pairs if pair and not re.match(rb"n[ \t]*=", pair)]

    assert others(left) == others(field)


def test_the_cookie_is_set_for_the_whole_host_and_not_for_scripts() -> None:
    value = seal(KEY, "web", MACHINE, END)
    plain = set_cookie(NAME, value, 86_400.0, secure=False)
    assert plain == b"wakefront-sticky=" + value + b"; Max-Age=86400; Path=/; HttpOnly; SameSite=Lax"
    assert set_cookie(NAME, value, 0.5, secure=True) == (
        b"wakefront-sticky=" + value + b"; Max-Age=0; Path=/; HttpOnly; SameSite=Lax; Secure"
    )
    assert find_cookie([plain.partition(b";")[0]], NAME) == value
