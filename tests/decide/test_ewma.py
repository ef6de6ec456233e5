"""decide/ewma.py: what is remembered of machines, and how it fades."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.decide.ewma import (
    FADE_S,
    FIRST_GUESS_S,
    LOAD_MAX_BYTES,
    LOAD_TTL_S,
    AppLoad,
    MachineScores,
    PassiveHealth,
    PeakEwma,
    parse_load,
)

seconds = st.floats(0.0001, 60)
gaps = st.floats(0, 30)
answers = st.lists(st.tuples(gaps, seconds), min_size=1, max_size=20)


def watched(samples: list[tuple[float, float]]) -> tuple[PeakEwma, float]:
    """An average that has seen (gap, seconds) samples, and the time of the last."""
    average, now = PeakEwma(), 1000.0
    for gap, took in samples:
        now += gap
        average.observe(now, took)
    return average, now


# --- response times


def test_a_machine_that_has_answered_nothing_is_guessed_to_be_fast() -> None:
    assert PeakEwma().score(0.0) == PeakEwma().score(1e9) == FIRST_GUESS_S


@given(answers)
def test_right_after_an_answer_the_score_is_never_below_it(samples: list[tuple[float, float]]) -> None:
    average, now = watched(samples)
    assert average.score(now) >= samples[-1][1]


@given(answers)
def test_the_score_is_never_above_the_slowest_answer(samples: list[tuple[float, float]]) -> None:
    average, now = watched(samples)
    assert average.score(now) <= max(took for _, took in samples) or average.score(now) <= FIRST_GUESS_S


@given(answers, seconds, gaps)
def test_a_slower_answer_takes_over_at_once(samples: list[tuple[float, float]], more: float, gap: float) -> None:
    average, now = watched(samples)
    slower = average.score(now) + more
    average.observe(now + gap, slower)
    assert average.score(now + gap) >= slower


@given(answers, gaps, gaps)
def test_without_answers_the_score_only_falls(samples: list[tuple[float, float]], first: float, second: float) -> None:
    average, now = watched(samples)
    assert average.score(now) >= average.score(now + first) >= average.score(now + first + second) > 0


def test_the_very_first_answer_replaces_the_guess_even_if_it_is_faster() -> None:
    average, now = watched([(0, FIRST_GUESS_S / 4)])
    assert average.score(now) == FIRST_GUESS_S / 4


def test_a_peak_fades_with_a_time_constant_of_ten_seconds() -> None:
    average, now = watched([(0, 0.2)])
    assert average.score(now + FADE_S) == pytest.approx(0.2 / math.e)
    assert average.score(now + 37) == pytest.approx(0.005, rel=0.02)  # as good as a machine of 5 ms again


def test_faster_answers_lower_a_peak_bit_by_bit_by_the_time_that_passes_not_by_their_number() -> None:
    average, now = watched([(0, 0.2), *[(0.0, 0.005)] * 1_000])
    assert average.score(now) == pytest.approx(0.2)
    often, at = watched([(0, 0.2), *[(0.01, 0.005)] * 1_000])
    assert often.score(at) == pytest.approx(0.005 + 0.195 / math.e, rel=0.01)


def test_a_clock_that_stands_still_or_steps_back_breaks_nothing() -> None:
    average, now = watched([(0, 0.2)])
    average.observe(now - 5, 0.1)
    assert average.score(now - 60) == pytest.approx(0.2)


def test_a_failure_however_quick_makes_a_machine_look_slow_and_one_after_another_slower_yet() -> None:
    average, now = watched([(0, 0.005)])
    scores = []
    for _ in range(10):
        average.observe_failure(now)
        scores.append(average.score(now))
    assert scores[:4] == [1.0, 2.0, 4.0, 8.0] and scores[-1] == 60.0
    assert average.score(now + 120) < 0.005


def test_answers_that_are_errors_double_what_is_expected_up_to_a_second() -> None:
    average, now = watched([(0, 0.3)])
    scores = []
    for _ in range(4):
        average.observe_error(now, 0.0001)
        scores.append(average.score(now))
    assert scores == [0.6, 1.0, 1.0, 1.0]
    average.observe_error(now, 5.0)
    assert average.score(now) == 5.0


# --- the load an app reports


@pytest.mark.parametrize(
    ("value", "load"),
    [
        (b"0", 0.0),
        (b"1", 1.0),
        (b"0.75", 0.75),
        (b".5", 0.5),
        (b"3.", 3.0),
        (b" 12.25\t", 12.25),
        (b"0000000000000001", 1.0),
        (b"9999999999999999", 9999999999999999.0),
    ],
)
def test_a_load_is_a_plain_number(value: bytes, load: float) -> None:
    assert parse_load(value) == load


@pytest.mark.parametrize(
    "value",
    [
        b"", b" ", b".", b"-1", b"+1", b"nan", b"inf", b"1e9", b"0x1", b"1_000", b"1,5", b"0.5;q=1", b"0.5, 0.6",
        b"50%", b"1 2", b"1\n", b"\n1", b"\x00", "٣".encode(), b"\xff", b"00000000000000001",
    ],
)  # fmt: skip
def test_what_is_no_plain_number_is_no_load(value: bytes) -> None:
    assert parse_load(value) is None


@given(st.binary(max_size=40))
def test_any_bytes_are_a_load_of_0_or_more_or_none(value: bytes) -> None:
    load = parse_load(value)
    assert load is None or (0.0 <= load < 1e16 and len(value.strip(b" \t")) <= LOAD_MAX_BYTES)


def test_a_report_counts_until_its_time_is_over() -> None:
    load = AppLoad()
    assert load.value(1000.0) is None
    load.report(1000.0, 0.5)
    assert load.value(1000.0) == load.value(1000.0 + LOAD_TTL_S - 0.01) == 0.5
    assert load.value(1000.0 + LOAD_TTL_S) is None
    load.report(1020.0, 0.0)
    assert load.value(1020.0) == 0.0


# --- all machines of a worker


def test_each_slot_has_scores_of_its_own() -> None:
    scores = MachineScores()
    scores.observe(3, 1000.0, 0.2)
    scores.report(4, 1000.0, b"0.25")
    scores.observe_failure(5, 1000.0)
    scores.observe_error(6, 1000.0, 0.0001)
    assert [scores.response_time(slot, 1000.0) for slot in (3, 4, 5, 6)] == [0.2, FIRST_GUESS_S, 1.0, 2 * FIRST_GUESS_S]
    assert [scores.reported_load(slot, 1000.0) for slot in (3, 4, 5, 6)] == [None, 0.25, None, None]


def test_garbage_leaves_the_load_reported_before() -> None:
    scores = MachineScores()
    scores.report(4, 1000.0, b"0.25")
    scores.report(4, 1001.0, b"much")
    assert scores.reported_load(4, 1001.0) == 0.25
    assert scores.reported_load(4, 1010.5) is None


def test_a_forgotten_slot_starts_anew() -> None:
    scores = MachineScores()
    scores.observe(3, 1000.0, 0.2)
    scores.report(3, 1000.0, b"0.25")
    scores.forget(3)
    scores.forget(99)
    assert scores.response_time(3, 1000.0) == FIRST_GUESS_S and scores.reported_load(3, 1000.0) is None


# --- failures


def failed_at(*times: float) -> PassiveHealth:
    health = PassiveHealth()
    for at in times:
        health.failed(at)
    return health


def test_one_failure_or_two_do_not_keep_requests_away() -> None:
    assert not PassiveHealth().is_avoided(1000.0)
    assert not failed_at(1000.0).is_avoided(1000.0)
    assert not failed_at(1000.0, 1000.0).is_avoided(1000.0)


def test_three_at_short_intervals_do_for_a_second() -> None:
    health = failed_at(1000.0, 1000.5, 1001.0)
    assert health.is_avoided(1001.0) and health.is_avoided(1001.99)
    assert not health.is_avoided(1002.0)


def test_three_in_half_a_minute_do_not() -> None:
    assert not failed_at(1000.0, 1015.0, 1030.0).is_avoided(1030.0)


def test_each_trial_that_fails_doubles_the_time_up_to_half_a_minute() -> None:
    health, now, terms = failed_at(1000.0, 1000.0), 1000.0, []
    for _ in range(8):
        health.failed(now)
        terms.append(health.avoided_until - now)
        now = health.avoided_until
    assert terms == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]


def test_failures_of_requests_begun_before_lengthen_nothing() -> None:
    health = failed_at(*[1000.0] * 50)
    assert health.avoided_until == 1001.0


def test_time_without_failures_makes_up_for_the_past() -> None:
    health = failed_at(1000.0, 1000.0, 1000.0)
    later = health.avoided_until + 30
    for at in (later, later + 0.1):
        health.failed(at)
        assert not health.is_avoided(at)


def test_a_machine_that_fails_every_other_request_is_not_avoided_for_that() -> None:
    health = PassiveHealth()
    for at in range(100):
        health.failed(1000.0 + at / 100)
        assert not health.is_avoided(1000.0 + at / 100)
        health.succeeded(1000.0 + at / 100)


def test_one_that_fails_three_of_four_is() -> None:
    health, avoided = PassiveHealth(), False
    for at in range(8):
        health.failed(1000.0) if at % 4 else health.succeeded(1000.0)
        avoided = avoided or health.is_avoided(1000.0)
    assert avoided


def test_successes_after_a_trial_bring_a_machine_back_into_good_standing() -> None:
    health = failed_at(1000.0, 1000.0, 1000.0)
    after = health.avoided_until
    health.succeeded(after)
    health.succeeded(after)
    health.failed(after)
    assert not health.is_avoided(after)


@given(st.lists(st.tuples(st.floats(0, 20), st.booleans()), max_size=60))
def test_no_machine_is_avoided_for_longer_than_half_a_minute_or_without_a_failure(
    events: list[tuple[float, bool]],
) -> None:
    health, now = PassiveHealth(), 1000.0
    for gap, is_failure in events:
        now += gap
        before = health.is_avoided(now)
        if is_failure:
            health.failed(now)
        else:
            health.succeeded(now)
            assert health.is_avoided(now) == before
        assert health.avoided_until <= now + 30.0
