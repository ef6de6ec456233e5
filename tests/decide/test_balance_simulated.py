"""decide/balance.py and decide/ewma.py together: queues of machines simulated, event by event, no clock and no sockets.

Two workers choose for one app. Each knows all loads, as from shared memory, and only the response times it met itself.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass

from proxy.decide.balance import choose_machine
from proxy.decide.ewma import MachineScores
from proxy.model import Balance

WORKERS = 2
PER_S = 400.0


@dataclass(frozen=True)
class Slot:
    slot: int


@dataclass
class Run:
    """Response times and machines of a run's requests, in the order of their arrival; the highest loads seen."""

    seconds: list[float]
    machines: list[int]
    most: list[int]

    def p99(self) -> float:
        return sorted(self.seconds)[int(len(self.seconds) * 0.99)]


def simulated(
    policy: Balance,
    service_s: Callable[[int, float], float],
    requests: int = 8_000,
    machines: int = 4,
    seed: int = 1,
    broken: int | None = None,
) -> Run:
    """`service_s(machine, now)`: how long it takes from a request to the answer there; `broken` answers 500."""
    rng, loads, slots = random.Random(seed), [0] * machines, [Slot(at) for at in range(machines)]
    scores = [MachineScores() for _ in range(WORKERS)]
    run, now = Run([], [], [0] * machines), 1000.0
    ends: list[tuple[float, int, int, float]] = []
    for number in range(requests):
        now += rng.expovariate(PER_S)
        while ends and ends[0][0] <= now:
            end, worker, at, took = heapq.heappop(ends)
            loads[at] -= 1
            if at == broken:
                scores[worker].observe_error(at, end, took)
            else:
                scores[worker].observe(at, end, took)
            scores[worker].report(at, end, b"%.3f" % (loads[at] / 100))
        worker = number % WORKERS
        one = choose_machine(slots, loads.__getitem__, 1_000, None, rng, policy, scores[worker], now)
        assert one is not None
        took = service_s(one.slot, now) * rng.uniform(0.8, 1.2)
        heapq.heappush(ends, (now + took, worker, one.slot, took))
        loads[one.slot] += 1
        run.most[one.slot] = max(run.most[one.slot], loads[one.slot])
        run.seconds.append(took)
        run.machines.append(one.slot)
    return run


def one_slow(machine: int, now: float) -> float:
    return 0.2 if machine == 3 else 0.005


def test_with_one_of_four_machines_slow_p99_under_peak_ewma_is_a_fifth_of_that_of_a_draw() -> None:
    drawn, weighed = simulated(Balance.FLY, one_slow), simulated(Balance.PEAK_EWMA, one_slow)
    assert drawn.p99() >= 0.2
    assert weighed.p99() <= drawn.p99() / 5


def test_a_machine_that_turns_slow_is_left_within_an_answer_or_two() -> None:
    turned = simulated(Balance.PEAK_EWMA, lambda machine, now: 0.2 if machine == 3 and now > 1005 else 0.005)
    slow = [number for number, took in enumerate(turned.seconds) if took > 0.1]
    assert 0 < len(slow) <= 40  # of some 6,000 that came since, 1,500 of which a draw would have sent there
    assert turned.most[3] <= 20


def test_a_machine_that_recovers_gets_its_share_again() -> None:
    again = simulated(
        Balance.PEAK_EWMA, lambda machine, now: 0.2 if machine == 3 and now < 1005 else 0.005, requests=40_000
    )
    assert again.machines[-4_000:].count(3) > 600  # of a fair share of 1,000


def test_a_machine_that_answers_errors_at_once_does_not_draw_the_requests_of_those_that_work() -> None:
    run = simulated(Balance.PEAK_EWMA, lambda machine, now: 0.0002 if machine == 3 else 0.02, broken=3)
    assert run.machines.count(3) < len(run.machines) * 0.05


def test_equal_machines_share_alike_under_every_policy() -> None:
    for policy in Balance:
        run = simulated(policy, lambda machine, now: 0.01)
        assert all(1_500 < run.machines.count(at) < 2_500 for at in range(4)), policy


def test_least_loaded_keeps_the_highest_load_lower_than_a_draw_does() -> None:
    drawn = simulated(Balance.FLY, lambda machine, now: 0.1)
    least = simulated(Balance.LEAST_LOADED, lambda machine, now: 0.1)
    assert max(least.most) < max(drawn.most)


def test_a_slow_machine_holds_fewer_requests_where_its_load_counts() -> None:
    drawn = simulated(Balance.FLY, one_slow)
    for policy in (Balance.LEAST_LOADED, Balance.PEAK_EWMA, Balance.APP_LOAD):
        run = simulated(policy, one_slow)
        assert run.machines.count(3) < drawn.machines.count(3) / 2, policy
