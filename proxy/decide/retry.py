"""What follows a failed attempt: try again, wake, or give up. A request is sent twice only where that is safe.

Safe means: no byte of it left us; or a safe method without a body met a kept connection that closed before any byte
of an answer (RFC 9110 §9.2.2, RFC 9112 §9.3.1).
"""

from __future__ import annotations

import enum

from proxy.errors import Code, Retry

MAX_ATTEMPTS = 5

SAFE_METHODS = frozenset({b"GET", b"HEAD", b"OPTIONS", b"TRACE"})


class Step(enum.Enum):
    FRESH_CONNECTION = "fresh-connection"  # the same machine, on a new connection
    ANOTHER = "another"  # choose again, without the machine that failed
    GIVE_UP = "give-up"


def next_step(method: bytes, has_body: bool, code: Code, retry: Retry, attempts: int, others: bool) -> Step:
    """The step after an attempt ended in `code`.

    `attempts` counts those made; `others` says whether another running machine, or one to wake, may be tried.
    """
    if attempts >= MAX_ATTEMPTS:
        return Step.GIVE_UP
    if retry is Retry.REUSED_CONNECTION:
        if method in SAFE_METHODS and not has_body:
            return Step.FRESH_CONNECTION
        return Step.GIVE_UP
    if retry is Retry.NOTHING_SENT and others:
        return Step.ANOTHER
    return Step.GIVE_UP
