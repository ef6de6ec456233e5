"""decide/wake.py: which machine is started, or asked for, by a request that finds none to go to."""

from __future__ import annotations

import pytest

from proxy.decide.wake import Held, choose_to_wake
from proxy.model import Machine, MachineId, MachineState, RegionCode

NOW = 1_000.0


def machine(name: str, state: str, *, group: str = "app", hold: float = 0.0, cordoned: bool = False) -> Machine:
    return Machine(
        MachineId(name), RegionCode("tst"), group, MachineState(state), 1, 0,
        cordoned=cordoned, hold_reason="it crashed" if hold else None, hold_until=hold,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ("stopped created", "a"),
        ("stopped suspended", "b"),
        ("suspended starting", "b"),
        ("suspended suspending", "a"),
        ("stopping stopped", "b"),
        ("failed stopping", "b"),
        ("stopped started", "b"),  # about to be stopped for idleness: being asked for keeps it
        ("destroyed destroyed", None),
        ("", None),
    ],
)
def test_the_machine_nearest_to_answering_is_asked_for(states: str, expected: str | None) -> None:
    machines = [machine(name, state) for name, state in zip("ab", states.split(), strict=False)]
    assert choose_to_wake(machines, ("app",), NOW) == expected


def test_other_groups_and_cordoned_machines_are_left_alone() -> None:
    machines = [machine("a", "stopped", group="jobs"), machine("b", "stopped", cordoned=True), machine("c", "stopped")]
    assert choose_to_wake(machines, ("app",), NOW) == "c"


def test_a_held_machine_gives_way_to_another_and_alone_tells_until_when() -> None:
    held, sooner = machine("a", "stopped", hold=NOW + 9), machine("b", "failed", hold=NOW + 4)
    assert choose_to_wake([held, machine("c", "stopped")], ("app",), NOW) == "c"
    assert choose_to_wake([held, sooner], ("app",), NOW) == Held("it crashed", NOW + 4)
    assert choose_to_wake([held, sooner], ("app",), NOW + 4) == "b"


ORDER = ["started starting", "suspended", "suspending", "stopped created", "stopping", "failed"]


def test_the_order_of_states_is_total_and_the_lowest_id_breaks_a_tie() -> None:
    for rank, group in enumerate(ORDER):
        for state in group.split():
            for same in group.split():
                assert choose_to_wake([machine("b", state), machine("a", same)], ("app",), NOW) == "a"
            for later in " ".join(ORDER[rank + 1 :]).split():
                assert choose_to_wake([machine("a", later), machine("b", state)], ("app",), NOW) == "b"


def test_a_start_under_way_is_waited_for_though_it_is_held() -> None:
    assert choose_to_wake([machine("a", "starting", hold=NOW + 9)], ("app",), NOW) == "a"


def test_cordoned_machines_tell_no_hold_either() -> None:
    assert choose_to_wake([machine("a", "stopped", hold=NOW + 9, cordoned=True)], ("app",), NOW) is None
    assert choose_to_wake([machine("a", "stopped")], (), NOW) is None
