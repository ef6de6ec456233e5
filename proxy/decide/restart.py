"""After a machine ended by itself, or could not be started: start it again, and when? Values in, decision out.

Restart policy: Fly's (spec machines §1): `on-failure`, 10 tries in 5 minutes. The hold after failed starts is ours: it
keeps a dead program from being started by every request that comes.
"""

from __future__ import annotations

from collections.abc import Sequence

from proxy.model import RestartPolicy

RESTART_WINDOW_S = 300.0
LONGEST_HOLD_S = 60.0
_LONGEST_PAUSE_S = 30.0


def restart_pause_s(
    policy: RestartPolicy, exit_code: int | None, signal: int | None, tries: Sequence[float], now: float, retries: int
) -> float | None:
    """Seconds to wait before the next start, or None: leave it stopped until something asks for it.

    `tries` are the monotonic times of restarts already made. The first restart is at once; then 1, 2, 4 ... 30 s. An
    unknown end (neither code nor signal) counts as a failure.
    """
    if policy is RestartPolicy.NO:
        return None
    if policy is RestartPolicy.ON_FAILURE and exit_code == 0:
        return None
    recent = sum(1 for at in tries if now - at < RESTART_WINDOW_S)
    if policy is RestartPolicy.ON_FAILURE and recent >= retries:
        return None
    if recent == 0:
        return 0.0
    return min(_LONGEST_PAUSE_S, 2.0 ** (recent - 1))


def hold_s(failures: int) -> float:
    """For how long starts are held after that many failed ones in a row: 1, 2, 4 ... 60 s."""
    if failures <= 0:
        return 0.0
    return min(LONGEST_HOLD_S, 2.0 ** (min(failures, 10) - 1))


def hold_left_s(until: float, now: float) -> float:
    """Seconds for which a hold until then goes on; 0 if there is none. Both are unix seconds.

    More than any hold lasts means that the clock was set back since: then it is over, not prolonged by as much.
    """
    left = until - now
    return left if 0.0 < left <= LONGEST_HOLD_S else 0.0
