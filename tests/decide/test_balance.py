"""decide/balance.py: which running machine gets a request."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from proxy.decide.balance import choose_machine


@dataclass(frozen=True)
class Slot:
    slot: int


def chosen(loads: list[int], soft: int, seed: int = 1) -> int | None:
    one = choose_machine([Slot(at) for at in range(len(loads))], loads.__getitem__, soft, random.Random(seed))
    return one.slot if one is not None else None


def test_of_none_there_is_none_to_choose() -> None:
    assert chosen([], 20) is None


def test_a_single_machine_is_chosen_whatever_its_load() -> None:
    assert chosen([1_000], 1) == 0


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(0, 40), st.integers(0, 99))
def test_one_below_its_soft_limit_goes_before_any_at_or_above_it(loads: list[int], soft: int, seed: int) -> None:
    one = chosen(loads, soft, seed)
    assert one is not None
    if min(loads) < soft:
        assert loads[one] < soft


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(0, 40), st.integers(0, 99))
def test_the_choice_depends_on_its_arguments_alone(loads: list[int], soft: int, seed: int) -> None:
    assert chosen(loads, soft, seed) == chosen(loads, soft, seed)


def test_within_a_band_the_draw_is_even_and_load_does_not_matter() -> None:
    rng = random.Random(7)
    loads = [0, 19, 20, 5]
    slots = [Slot(at) for at in range(4)]
    counts: Counter[int] = Counter()
    for _ in range(3_000):
        one = choose_machine(slots, loads.__getitem__, 20, rng)
        assert one is not None
        counts[one.slot] += 1
    assert set(counts) == {0, 1, 3} and min(counts.values()) > 850


def test_all_at_their_soft_limit_share_alike() -> None:
    assert {chosen([20, 90], 20, seed) for seed in range(50)} == {0, 1}
