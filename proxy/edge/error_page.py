"""What a person is shown with an error of ours: the code and one sentence.

Which error it is, and the fields beside the page, are the Exchange's and the listener's.
"""

from __future__ import annotations

from proxy.errors import Code, ProxyError


def error_page(error: ProxyError) -> bytes:
    """What a person sees: the code, its name, and one sentence; never what the machine or the system said."""
    return f"{error.code.value} {_PHRASES.get(error.code, error.code.name.lower().replace('_', ' '))}\n".encode()


_PHRASES = {
    Code.UNKNOWN_HOST: "No app is served here under this name.",
    Code.NO_CHALLENGE: "No such challenge is under way here.",
    Code.MISDIRECTED: "This connection was made for another app.",
    Code.BAD_REQUEST: "The request could not be understood.",
    Code.WAKE_TIMEOUT: "The app was started but did not answer in time.",
    Code.START_FAILED: "The app could not be started.",
    Code.WAKE_HELD: "The app failed to start; it will be tried again shortly.",
    Code.NO_CANDIDATE: "No machine can take this request.",
    Code.CONTROL_UNAVAILABLE: "The app is asleep and can't be started right now.",
    Code.TOO_MANY_WAITERS: "Too many requests wait for this app to start.",
    Code.WAKE_IGNORED: "The app is asleep, and this request does not wake it.",
    Code.WAKE_BUDGET: "The app is asleep, and enough starts were asked for; try again shortly.",
    Code.NO_HEALTHY: "No machine of the app is well enough to take this request.",
    Code.ACCESS_DENIED: "You have no access to this app from here.",
    Code.SOURCE_CONNECTIONS: "Too many connections from your address.",
    Code.SOURCE_REQUESTS: "Too many requests from your address; try again shortly.",
    Code.BODY_TOO_LARGE: "The request is larger than this app takes.",
    Code.QUEUE_FULL: "The app is busy, and enough requests wait for it.",
    Code.QUEUE_TIMEOUT: "The app was busy for too long.",
    Code.REPLAY_UNREACHED: "The app handed this request on, but what it named could not be reached.",
    Code.REPLAY_LOOP: "The request was handed on too often.",
    Code.REPLAY_INVALID: "The app handed this request on in a way that makes no sense.",
    Code.REPLAY_BODY_GONE: "The app handed this request on, but it is too large to be sent again.",
    Code.REPLAY_APP_UNKNOWN: "The app handed this request on to one that is not here.",
    Code.REPLAY_APP_FORBIDDEN: "The app handed this request on to one that does not take it.",
    Code.FORCED_UNREACHED: "The machine asked for can't take this request.",
    Code.CONNECT_REFUSED: "The app does not accept connections.",
    Code.CONNECT_TIMEOUT: "The app did not accept the connection in time.",
    Code.REQUEST_UNFINISHED: "The app closed the connection without an answer.",
    Code.CONNECT_RESET: "The app closed the connection without an answer.",
    Code.RESPONSE_INVALID: "The app's answer could not be understood.",
    Code.FIRST_BYTE_TIMEOUT: "The app did not answer in time.",
}
