"""decide/peer_health.py: leases by our own clock, failures at once, a slow return."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.decide.peer_health import (
    EPOCHS_KEPT,
    Lease,
    PeerState,
    Suspicion,
    share_since,
    takes,
)

T0 = 5_000.0
EPOCH = 1_790_000_000_000  # unix ms, by the node's own clock
HEALTHY, _, SILENT, DRAINING = PeerState
LEASE_S = 0.8


def a_lease(at: float = T0) -> Lease:
    lease = Lease(LEASE_S)
    assert lease.heard(EPOCH, 10, at)
    return lease


# --- leases


def test_a_node_is_silent_until_it_is_heard_of_and_then_whole() -> None:
    lease = Lease(LEASE_S)
    assert lease.state(T0) is SILENT and lease.share(T0) == 0
    assert lease.heard(EPOCH, 0, T0)
    assert lease.state(T0) is HEALTHY and lease.share(T0) == 1.0
    assert lease.epoch == EPOCH


def test_the_lease_ends_by_our_clock_and_replays_do_not_lengthen_it() -> None:
    lease = a_lease()
    for sequence in (10, 9, 0):
        assert not lease.heard(EPOCH, sequence, T0 + 0.7)
    assert lease.state(T0 + 0.79) is HEALTHY
    assert lease.state(T0 + LEASE_S) is SILENT and lease.share(T0 + LEASE_S) == 0
    assert not lease.heard(EPOCH, 10, T0 + 5) and lease.state(T0 + 5) is SILENT


@given(st.lists(st.integers(0, 30), max_size=60))
def test_whatever_the_order_only_growing_sequences_count(sequences: list[int]) -> None:
    lease, highest, now, last = Lease(LEASE_S), -1, T0, T0
    for sequence in sequences:
        now += 0.1
        assert lease.heard(EPOCH, sequence, now) is (sequence > highest)
        if sequence > highest:
            highest, last = sequence, now
        assert (lease.state(now) is HEALTHY) is (now < last + LEASE_S)


def test_a_silent_node_comes_back_with_a_tenth_that_doubles() -> None:
    lease = a_lease()
    back = T0 + 30
    assert lease.heard(EPOCH, 11, back) and lease.state(back) is HEALTHY
    shares = []
    for step in range(40):
        assert lease.heard(EPOCH, 12 + step, back + step / 4)
        shares.append(lease.share(back + step / 4))
    assert shares[0] == pytest.approx(0.1) and shares[8] == pytest.approx(0.2) and shares[16] == pytest.approx(0.4)
    assert shares == sorted(shares) and shares[28:] == [1.0] * 12


def test_a_new_start_returns_slowly_and_the_old_one_never_counts_again() -> None:
    lease = a_lease()
    assert lease.heard(EPOCH + 9, 0, T0 + 0.3)
    assert lease.share(T0 + 0.3) == pytest.approx(0.1)
    assert not lease.heard(EPOCH, 99, T0 + 0.4)
    assert not lease.heard(EPOCH, 100, T0 + 60) and lease.state(T0 + 60) is SILENT


@pytest.mark.parametrize("skew_ms", [300_000, -300_000])
def test_a_node_that_starts_again_with_its_clock_five_minutes_off_is_back_within_a_lease(skew_ms: int) -> None:
    """Killed and started again at once: its publications go on, numbered from 0, with an epoch of another clock."""
    lease, now = a_lease(), T0
    for sequence in range(8):
        now += 0.25
        lease.heard(EPOCH + 1_000 + skew_ms, sequence, now)
        if lease.epoch != EPOCH:
            break
    assert lease.epoch == EPOCH + 1_000 + skew_ms and lease.state(now) is HEALTHY and now - T0 <= LEASE_S + 0.25


def test_late_messages_of_an_unknown_earlier_start_are_refused_while_the_node_is_heard_of() -> None:
    lease, now = a_lease(), T0
    for sequence in range(11, 40):
        now += 0.25
        assert lease.heard(EPOCH, sequence, now)
        assert not lease.heard(EPOCH - 50_000, sequence, now)
    assert lease.epoch == EPOCH


def test_starts_that_are_remembered_are_bounded() -> None:
    lease = Lease(LEASE_S)
    for at in range(100):
        assert lease.heard(EPOCH + at, 0, T0 + at / 10)
    for at in range(99 - EPOCHS_KEPT, 99):
        assert not lease.heard(EPOCH + at, 1, T0 + 60)


def test_a_draining_node_gets_nothing_and_is_whole_when_undrained() -> None:
    lease = a_lease()
    assert lease.heard(EPOCH, 11, T0 + 0.2, is_draining=True)
    assert lease.state(T0 + 0.2) is DRAINING and lease.share(T0 + 0.2) == 0
    assert lease.state(T0 + 2) is SILENT
    assert lease.heard(EPOCH, 12, T0 + 0.4)
    assert lease.state(T0 + 0.4) is HEALTHY and lease.share(T0 + 0.4) == 1.0


@pytest.mark.parametrize("bad", [-1, 2**63, True, 1.5, "7", None])
def test_numbers_that_no_node_sends_are_refused_with_their_name(bad: int) -> None:
    lease = a_lease()
    with pytest.raises(ValueError, match="epoch: expected"):
        lease.heard(bad, 11, T0)
    with pytest.raises(ValueError, match="sequence: expected"):
        lease.heard(EPOCH, bad, T0)
    assert lease.heard(EPOCH, 11, T0)


def test_a_node_whose_connection_ended_is_silent_at_once_and_returns_slowly() -> None:
    lease = a_lease()
    lease.lost()
    assert lease.state(T0) is SILENT and lease.share(T0) == 0
    assert not lease.heard(EPOCH, 10, T0 + 0.1) and lease.state(T0 + 0.1) is SILENT
    assert lease.heard(EPOCH - 300_000, 0, T0 + 0.2)  # started again, its clock set back
    assert lease.state(T0 + 0.2) is HEALTHY and lease.share(T0 + 0.2) == pytest.approx(0.1)


# --- failures


def test_one_failure_makes_a_node_suspect_at_once_for_a_second() -> None:
    suspicion = Suspicion()
    suspicion.failed(T0 + 0.1)
    assert suspicion.is_suspect(T0 + 0.1) and suspicion.share(T0 + 0.1) == 0
    assert suspicion.is_suspect(T0 + 0.5)
    assert not suspicion.is_suspect(T0 + 1.2) and 0.1 <= suspicion.share(T0 + 1.2) < 0.12


def test_each_further_failure_doubles_the_time_up_to_half_a_minute_and_a_crowd_counts_once() -> None:
    suspicion, now, spans = Suspicion(), T0, []
    for _ in range(9):
        for late in range(50):
            suspicion.failed(now + late / 1000)
        spans.append(suspicion.until - now)
        now = suspicion.until + 0.01
    assert spans[:4] == pytest.approx([1, 2, 4, 8], rel=0.01)
    assert max(spans) == 30.0


def test_failures_fade_and_successes_halve_them() -> None:
    faded, forgiven = Suspicion(), Suspicion()
    for one in (faded, forgiven):
        one.failed(T0)
    faded.failed(T0 + 60)
    assert faded.until - (T0 + 60) == pytest.approx(1.0, rel=0.05)
    for step in range(6):
        forgiven.succeeded(T0 + 1.1 + step / 10)
    forgiven.failed(T0 + 2)
    assert forgiven.until - (T0 + 2) == pytest.approx(1.0, rel=0.05)


def test_a_success_ends_suspicion_and_the_return_is_slow_all_the_same() -> None:
    suspicion = Suspicion()
    assert suspicion.share(T0) == 1.0
    suspicion.failed(T0)
    suspicion.succeeded(T0 + 0.3)
    assert not suspicion.is_suspect(T0 + 0.3) and suspicion.share(T0 + 0.3) == pytest.approx(0.1)
    assert suspicion.share(T0 + 20) == 1.0


@given(st.lists(st.tuples(st.floats(0, 20), st.sampled_from(["failed", "succeeded"])), max_size=40))
def test_no_history_keeps_a_node_out_for_longer_than_half_a_minute(events: list[tuple[float, str]]) -> None:
    suspicion, now = Suspicion(), T0
    for pause, event in events:
        now += pause
        (suspicion.failed if event == "failed" else suspicion.succeeded)(now)
        assert suspicion.until <= now + 30.0
        assert 0.0 <= suspicion.share(now) <= 1.0
    assert suspicion.share(now + 41) == 1.0


def test_a_share_is_a_draw() -> None:
    rng = random.Random(3)
    taken = sum(takes(0.2, rng) for _ in range(10_000))
    assert 1_850 < taken < 2_150
    assert not any(takes(0.0, rng) for _ in range(100)) and all(takes(1.0, rng) for _ in range(100))
    assert share_since(-5) == pytest.approx(0.1) and share_since(1e9) == 1.0


# --- a node among others, simulated

Fate = Callable[[float, random.Random], float | None]  # (sent, rng) -> when it arrives, None = lost


def wan(sent: float, rng: random.Random) -> float | None:
    """100 ms and up to 60 ms of jitter, so that some overtake others; one in a hundred is lost."""
    return None if rng.random() < 0.01 else sent + 0.1 + rng.random() * 0.06


def choices(lives: list[tuple[float, float, int]], until: float, fate: Fate, seed: int) -> list[tuple[float, bool]]:
    """500 requests a second that would all go to one node: (time, whether it got it). `lives`: (from, to, epoch)."""
    rng, lease = random.Random(seed), Lease(LEASE_S)
    arrivals: list[tuple[float, int, int]] = []
    for begin, end, epoch in lives:
        for sequence in range(int((end - begin) / 0.25)):
            sent = begin + sequence * 0.25
            arrived = fate(sent, rng)
            if arrived is not None:
                heapq.heappush(arrivals, (arrived, epoch, sequence))
                if rng.random() < 0.05:
                    heapq.heappush(arrivals, (arrived + rng.random() * 3, epoch, sequence))  # and again, later
    made = []
    for step in range(int(until * 500)):
        now = step / 500
        while arrivals and arrivals[0][0] <= now:
            at, epoch, sequence = heapq.heappop(arrivals)
            lease.heard(epoch, sequence, at)
        made.append((now, lease.state(now) is HEALTHY and takes(lease.share(now), rng)))
    return made


@pytest.mark.parametrize("seed", range(6))
def test_a_killed_node_gets_nothing_a_second_after_its_last_word_and_returns_slowly(seed: int) -> None:
    """Killed at 10 s, started again at 20 s, its clock five minutes behind."""
    made = choices([(0, 10, EPOCH), (20, 40, EPOCH - 300_000)], 40, wan, seed)
    assert not any(went for now, went in made if 10 + 0.16 + LEASE_S <= now < 20)
    assert 0.16 + LEASE_S < 1.0
    steady = [went for now, went in made if 1 <= now < 10]
    assert sum(steady) > 0.97 * len(steady)
    first = [went for now, went in made if 20.5 <= now < 21.5]
    later = [went for now, went in made if 30 <= now < 40]
    assert 0 < sum(first) < 0.3 * len(first) and sum(later) > 0.9 * len(later)
