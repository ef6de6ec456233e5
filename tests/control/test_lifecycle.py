from __future__ import annotations

import pytest

from proxy.control.lifecycle import LIVE, TRANSITIONS, Change, ImpossibleChange, next_state
from proxy.model import MachineState as S


@pytest.mark.parametrize("state", S)
@pytest.mark.parametrize("change", Change)
def test_every_pair_has_a_row_or_raises(state: S, change: Change) -> None:
    if (state, change) in TRANSITIONS:
        assert next_state(state, change) is TRANSITIONS[state, change]
    else:
        with pytest.raises(ImpossibleChange, match=change.value):
            next_state(state, change)


def test_every_live_state_can_see_the_machine_end() -> None:
    assert all((state, Change.EXITED) in TRANSITIONS for state in LIVE)


def test_every_state_at_rest_can_start_and_be_destroyed_but_a_suspended_one_is_stopped_first() -> None:
    for state in (S.CREATED, S.STOPPED, S.FAILED):
        assert next_state(state, Change.START) is S.STARTING
        assert next_state(state, Change.DESTROY) is S.DESTROYED
    assert (S.SUSPENDED, Change.DESTROY) not in TRANSITIONS


def test_nothing_leaves_destroyed() -> None:
    assert not any(state is S.DESTROYED for state, _ in TRANSITIONS)
