"""decide/retry.py: a request is sent twice only where that is provably safe, over the whole product of cases."""

from __future__ import annotations

import itertools

from proxy.decide.retry import MAX_ATTEMPTS, SAFE_METHODS, Step, next_step
from proxy.errors import Code, Retry

METHODS = [
    b"GET",
    b"HEAD",
    b"OPTIONS",
    b"TRACE",
    b"POST",
    b"PUT",
    b"DELETE",
    b"PATCH",
    b"QUERY",
    b"PROPFIND",
    b"get",
    b"",
]
CASES = list(
    itertools.product(METHODS, [False, True], Code, Retry, range(0, MAX_ATTEMPTS + 3), [False, True])
)  # fmt: skip


def test_what_may_have_been_seen_by_a_machine_is_sent_again_only_if_safe_without_body_on_a_kept_connection() -> None:
    for method, has_body, code, retry, attempts, others in CASES:
        if next_step(method, has_body, code, retry, attempts, others) is Step.GIVE_UP or retry is Retry.NOTHING_SENT:
            continue
        assert retry is Retry.REUSED_CONNECTION and method in SAFE_METHODS and not has_body


def test_never_means_never() -> None:
    for method, has_body, code, retry, attempts, others in CASES:
        if retry is Retry.NEVER:
            assert next_step(method, has_body, code, retry, attempts, others) is Step.GIVE_UP


def test_attempts_have_an_end_in_every_case() -> None:
    for method, has_body, code, retry, attempts, others in CASES:
        if attempts >= MAX_ATTEMPTS:
            assert next_step(method, has_body, code, retry, attempts, others) is Step.GIVE_UP


def test_the_step_is_the_one_that_fits_what_happened() -> None:
    for method, has_body, code, retry, attempts, others in CASES:
        step = next_step(method, has_body, code, retry, attempts, others)
        if attempts >= MAX_ATTEMPTS:
            continue
        if retry is Retry.NOTHING_SENT:  # any method, any body: nothing of it left us
            assert step is (Step.ANOTHER if others else Step.GIVE_UP)
        elif retry is Retry.REUSED_CONNECTION and method in SAFE_METHODS and not has_body:
            assert step is Step.FRESH_CONNECTION


def test_methods_that_change_things_are_not_among_the_safe() -> None:
    assert {b"POST", b"PUT", b"DELETE", b"PATCH", b"CONNECT", b"QUERY"}.isdisjoint(SAFE_METHODS)
