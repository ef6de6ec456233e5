"""One error type, its stable codes, and the one table from code to HTTP status.

A code appears in the access log, in metrics and in the response header `Wakefront-Error`. Codes named like Fly's
(spec routing §7) mean what Fly's mean; ours that Fly has no name for begin with `W`.
"""

from __future__ import annotations

import enum
from typing import assert_never


class Code(enum.StrEnum):
    # ours: the client's request was not one we can pass on
    BAD_REQUEST = "WD01"
    HEAD_TOO_LARGE = "WD02"
    TARGET_TOO_LONG = "WD03"
    METHOD_UNKNOWN = "WD04"
    VERSION_UNSUPPORTED = "WD05"
    HEAD_TIMEOUT = "WD06"
    BODY_TIMEOUT = "WD07"
    MISDIRECTED = "WD08"  # Host names an app other than the one whose certificate was shown
    UNKNOWN_HOST = "WD09"
    EXPECTATION_FAILED = "WD10"
    CLIENT_GONE = "WD11"
    BODY_TOO_LARGE = "WD12"
    IDLE_TIMEOUT = "WD13"
    NO_CHALLENGE = "WD14"  # an ACME challenge that is not under way here, of an app that sleeps
    # Fly's: refused, reset and timed-out connections to machines
    CONNECT_REFUSED = "PC01"
    CONNECT_RESET = "PC03"
    CONNECT_TIMEOUT = "PC05"
    CONNECT_IO = "PC06"
    REQUEST_UNFINISHED = "PU02"  # the machine closed before it answered
    RESPONSE_INVALID = "WU01"  # the machine answered with something that is not HTTP
    FIRST_BYTE_TIMEOUT = "WU02"
    RESPONSE_STALLED = "WU04"  # the machine went silent in the middle of its answer
    BODY_UNFINISHED = "PU05"  # the machine closed in the middle of its answer
    UPGRADE_REFUSED = "WU03"
    # Fly's: waking
    WAKE_INTERNAL = "PM02"
    WAKE_TIMEOUT = "PM03"  # started, but nothing listened in time
    START_FAILED = "PM07"
    NOT_STARTABLE = "PM08"
    START_CANCELLED = "PM10"
    WAKE_HELD = "WM01"  # the breaker is open: recent starts failed, the next try comes later
    TOO_MANY_WAITERS = "WM02"
    CONTROL_UNAVAILABLE = "WM03"  # nothing runs, and the process that starts machines is not there
    WAKE_IGNORED = "WM04"  # the app sleeps, and its rules say that this request does not wake it
    WAKE_BUDGET = "WM05"  # the app sleeps, and this source (or all together) has caused enough starts for now
    WAKE_PAGE = "WM06"  # a browser was shown the waiting page
    # access rules and limits of an app
    ACCESS_DENIED = "WA01"
    SOURCE_CONNECTIONS = "PL01"
    SOURCE_REQUESTS = "PL02"
    QUEUE_FULL = "WQ01"
    QUEUE_TIMEOUT = "WQ02"
    # Fly's: replay
    REPLAY_BODY_GONE = "PA01"  # the body was more than is kept
    REPLAY_LOOP = "PA02"
    REPLAY_INVALID = "PA03"
    REPLAY_APP_UNKNOWN = "PA04"
    REPLAY_APP_FORBIDDEN = "PA05"
    REPLAY_UNREACHED = "WR01"  # nothing that the replay names could be reached
    FORCED_UNREACHED = "WR02"  # the machine that the client forces is not there, or takes nothing
    # Fly's: TLS
    TLS_RATE_SOURCE = "PT01"
    TLS_CANCELLED = "PT03"
    TLS_FAILED = "PT04"
    TLS_NO_CERTIFICATE = "PT05"
    TLS_IO = "PT07"
    TLS_TIMEOUT = "PT08"
    TLS_INTERNAL = "PT09"
    TLS_OVERLOADED = "WO02"
    # between edges: what one answers the other, and what a client sees once all have
    PEER_UNREACHED = "PU03"  # Fly's: the node could not be reached
    RECENTLY_STOPPED = "PM11"  # Fly's: no machine of the app runs there any more
    AT_HARD_LIMIT = "WB01"  # all machines there are
    HOP_INVALID = "WB02"  # the other edge asks for what this one does not know, or in a circle
    # Fly's: no machine to send to
    NO_HEALTHY = "PR01"
    MACHINE_GONE = "PR02"
    NO_CANDIDATE_AFTER_RETRIES = "PR03"
    NO_CANDIDATE = "PR04"
    OVERLOADED = "WO01"  # this worker has more to do than it can: what is new has to wait
    INTERNAL = "WE01"


class Source(enum.StrEnum):
    DOWNSTREAM = "downstream"
    UPSTREAM = "upstream"
    MACHINE = "machine"
    EDGE = "edge"


class Retry(enum.StrEnum):
    NEVER = "never"
    NOTHING_SENT = "nothing-sent"  # no byte of the request left us
    REUSED_CONNECTION = "reused-connection"  # a kept connection closed before any answer byte


class ProxyError(Exception):
    """A request, connection or wake that cannot go on. `detail` is for the log, never for the client's page."""

    def __init__(
        self,
        code: Code,
        source: Source = Source.EDGE,
        retry: Retry = Retry.NEVER,
        detail: str = "",
        retry_after_s: int | None = None,
    ) -> None:
        name = f"{code.value} {code.name.lower()}"
        super().__init__(f"{name}: {detail}" if detail else name)
        self.code = code
        self.source = source
        self.retry = retry
        self.detail = detail
        self.retry_after_s = retry_after_s


def http_status(code: Code) -> int:
    """The status a client sees for a code. TLS codes have none on the wire; they map to 500 and are never sent."""
    match code:
        case Code.BAD_REQUEST | Code.CLIENT_GONE:
            return 400
        case Code.HEAD_TIMEOUT | Code.BODY_TIMEOUT | Code.IDLE_TIMEOUT:
            return 408
        case Code.TARGET_TOO_LONG:
            return 414
        case Code.EXPECTATION_FAILED:
            return 417
        case Code.MISDIRECTED:
            return 421
        case Code.ACCESS_DENIED:
            return 403
        case Code.BODY_TOO_LARGE:
            return 413
        case Code.SOURCE_REQUESTS | Code.SOURCE_CONNECTIONS:
            return 429
        case Code.HEAD_TOO_LARGE:
            return 431
        case Code.UNKNOWN_HOST | Code.NO_CHALLENGE:
            return 404
        case Code.METHOD_UNKNOWN:
            return 501
        case Code.VERSION_UNSUPPORTED:
            return 505
        case (
            Code.CONNECT_REFUSED | Code.CONNECT_RESET | Code.CONNECT_IO | Code.REQUEST_UNFINISHED
            | Code.RESPONSE_INVALID | Code.BODY_UNFINISHED | Code.UPGRADE_REFUSED | Code.MACHINE_GONE
            | Code.REPLAY_BODY_GONE | Code.REPLAY_LOOP | Code.REPLAY_INVALID | Code.REPLAY_APP_UNKNOWN
            | Code.REPLAY_APP_FORBIDDEN | Code.REPLAY_UNREACHED | Code.FORCED_UNREACHED | Code.PEER_UNREACHED
            | Code.HOP_INVALID
        ):  # fmt: skip
            return 502
        case (
            Code.WAKE_HELD | Code.TOO_MANY_WAITERS | Code.CONTROL_UNAVAILABLE | Code.NO_CANDIDATE
            | Code.NO_CANDIDATE_AFTER_RETRIES | Code.START_FAILED | Code.NOT_STARTABLE | Code.START_CANCELLED
            | Code.WAKE_INTERNAL | Code.WAKE_IGNORED | Code.WAKE_BUDGET | Code.WAKE_PAGE | Code.QUEUE_FULL
            | Code.QUEUE_TIMEOUT | Code.NO_HEALTHY | Code.OVERLOADED | Code.AT_HARD_LIMIT | Code.RECENTLY_STOPPED
        ):  # fmt: skip
            return 503
        case Code.CONNECT_TIMEOUT | Code.FIRST_BYTE_TIMEOUT | Code.RESPONSE_STALLED | Code.WAKE_TIMEOUT:
            return 504
        case (
            Code.TLS_RATE_SOURCE | Code.TLS_CANCELLED | Code.TLS_FAILED | Code.TLS_NO_CERTIFICATE | Code.TLS_IO
            | Code.TLS_TIMEOUT | Code.TLS_INTERNAL | Code.TLS_OVERLOADED | Code.INTERNAL
        ):  # fmt: skip
            return 500
        case _:
            assert_never(code)
