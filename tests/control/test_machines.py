"""The fleet: wakes, ends, back-off, restarts and what a new control finds."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import tempfile
from pathlib import Path

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.control.machines import Owned, Refused
from proxy.control.prober import ATTEMPT_S
from proxy.errors import Code
from proxy.machines.driver import Exit, MachineSpec, Running
from proxy.model import Autostop, Check, MachineState, RestartPolicy
from tests.control.rig import GroupPlan, Rig, a_service, an_app
from tests.support.clock import FakeClock, settle


def restarting(policy: RestartPolicy) -> tuple[GroupPlan, ...]:
    return (GroupPlan("app", ("serve",), 1, restart=policy),)


# --- wakes


async def test_a_wake_starts_a_stopped_machine_and_ends_once_it_listens(rig: Rig) -> None:
    await rig.load(an_app())
    machine = rig.machine()
    wake = rig.fleet.wake(machine.id)
    await rig.clock.advance(1.0)
    assert machine.state is MachineState.STARTING and not wake.done()
    async with asyncio.timeout(5):
        while not rig.published:  # it takes a while, so it is told
            await asyncio.sleep(0.001)
    rig.listen(machine)
    await rig.clock.advance(0.1)
    assert (await wake).code is None
    assert [one.state for one in rig.published] == ["starting", "started"]


async def test_the_connection_that_showed_that_it_listens_is_handed_on_before_it_is_told_started(rig: Rig) -> None:
    await rig.load(an_app())
    told: list[int] = []
    forward = rig.fleet.on_change

    def on_change(machine: Owned) -> None:
        told.append(len(rig.cordons.handed_on))
        forward(machine)

    rig.fleet.on_change = on_change
    machine = await rig.started()
    assert rig.cordons.handed_on == [(machine.id, "started", 8080)]
    assert told[-1] == 1
    server = rig.servers[0]
    with server.accept()[0] as accepted:
        accepted.settimeout(5)
        assert accepted.recv(1) == b"", "nobody took it: it is closed"
    server.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.accept()


async def test_the_history_of_a_start_is_whole_and_in_order_though_it_is_written_once_the_request_is_served(
    rig: Rig,
) -> None:
    await rig.load(an_app())
    machine = rig.machine()
    wake = rig.fleet.wake(machine.id)
    assert rig.store.events(machine.id, 1) == [] or rig.store.events(machine.id, 1)[0].type != "start"
    rig.listen(machine)
    await asyncio.shield(wake)
    ended, begun = rig.store.events(machine.id, 2)
    assert [(one.type, one.status, one.source) for one in (begun, ended)] == [
        ("start", "starting", "proxy"),
        ("start", "started", "flyd"),
    ]
    assert begun.timestamp <= ended.timestamp
    assert machine.begun is None


async def test_with_checks_or_another_port_to_look_at_no_connection_is_held_open_meanwhile(rig: Rig) -> None:
    checked = dataclasses.replace(a_service(), checks=(Check("tcp", 10.0, 2.0, 1.0),))
    await rig.load(an_app("checked", services=(checked,)), an_app("two", services=(a_service(), a_service(9090))))
    rig.listen(rig.machine("two"), 1)
    for app in ("checked", "two"):
        await rig.started(app)
    assert rig.cordons.handed_on == []


async def test_a_wake_of_a_running_machine_is_done_at_once(rig: Rig) -> None:
    await rig.load(an_app())
    machine = await rig.started()
    wake = rig.fleet.wake(machine.id)
    assert wake.done() and wake.result().version == machine.row.version
    assert rig.starts(machine) == 1


async def test_a_second_wake_joins_the_one_under_way(rig: Rig) -> None:
    await rig.load(an_app())
    machine = rig.machine()
    first, second = rig.fleet.wake(machine.id), rig.fleet.wake(machine.id)
    assert first is second
    rig.listen(machine)
    assert (await asyncio.shield(first)).code is None
    assert rig.starts(machine) == 1


async def test_a_waiter_who_leaves_harms_nobody(rig: Rig) -> None:
    await rig.load(an_app())
    machine = rig.machine()

    async def wait() -> Code | None:
        return (await asyncio.shield(rig.fleet.wake(machine.id))).code

    waiters = [asyncio.get_running_loop().create_task(wait(), name=f"waiter {n}") for n in range(10)]
    await settle()
    for waiter in waiters[:5]:
        waiter.cancel()
    rig.listen(machine)
    await rig.clock.advance(0.1)
    assert await asyncio.gather(*waiters[5:]) == [None] * 5
    assert rig.starts(machine) == 1


async def test_a_machine_that_ends_before_it_listens_fails_its_wake_with_the_exit_code(rig: Rig) -> None:
    await rig.load(an_app())
    machine = rig.machine()
    wake = rig.fleet.wake(machine.id)
    await settle()
    rig.host.end(machine.id, Exit(code=3))
    await settle()
    result = wake.result()
    assert result.code is Code.START_FAILED and "exit code 3" in result.detail and result.retry_after_s == 1
    assert machine.state is MachineState.FAILED
    assert machine.row.exit_code == 3
    assert not rig.host.processes  # recorded, then reaped


async def test_a_program_that_cannot_be_run_fails_its_wake_with_the_reason(rig: Rig) -> None:
    await rig.load(an_app())
    machine = rig.machine()
    rig.driver.fail_start[machine.id] = "no such program"
    result = await asyncio.shield(rig.fleet.wake(machine.id))
    assert result.code is Code.START_FAILED and "no such program" in result.detail
    assert machine.state is MachineState.FAILED


async def test_a_machine_that_never_listens_times_out_and_is_stopped(rig: Rig) -> None:
    await rig.load(an_app(wake_timeout_s=4.0))
    machine = rig.machine()
    rig.driver.ignores_signals.add(machine.id)
    wake = rig.fleet.wake(machine.id)
    await rig.clock.advance(3.9)
    assert not wake.done()
    await rig.clock.advance(0.2)
    result = wake.result()
    assert result.code is Code.WAKE_TIMEOUT and "nothing listened" in result.detail
    assert rig.fleet.wake(machine.id).result().code is Code.WAKE_HELD  # also while it is still being stopped
    assert machine.state is MachineState.STOPPING
    await rig.clock.advance(5.1)
    assert machine.state is MachineState.FAILED
    assert not rig.host.is_running(machine.id)
    assert ("stop", machine.id) in rig.driver.calls


async def test_starts_are_held_back_longer_after_each_failure_and_freely_again_after_a_success(rig: Rig) -> None:
    await rig.load(an_app())
    machine = rig.machine()
    rig.driver.fail_start[machine.id] = "broken"
    for pause in (1, 2, 4, 8, 16, 32, 60, 60):
        assert (await asyncio.shield(rig.fleet.wake(machine.id))).code is Code.START_FAILED
        held = rig.fleet.wake(machine.id).result()
        assert held.code is Code.WAKE_HELD and held.retry_after_s == pause and "broken" in held.detail
        assert rig.published[-1].hold_reason == "broken"
        assert rig.published[-1].hold_until == pytest.approx(rig.clock.unix() + pause)
        await rig.clock.advance(pause + 0.01)
    assert rig.starts(machine) == 8
    del rig.driver.fail_start[machine.id]
    await rig.started()
    assert rig.published[-1].hold_reason is None
    assert machine.row.failures == 0


async def test_a_users_start_is_not_held_back(rig: Rig) -> None:
    await rig.load(an_app())
    machine = rig.machine()
    rig.driver.fail_start[machine.id] = "broken"
    await asyncio.shield(rig.fleet.wake(machine.id))
    del rig.driver.fail_start[machine.id]
    rig.listen(machine)
    assert (await asyncio.shield(rig.fleet.wake(machine.id, "user"))).code is None


async def test_a_request_does_not_start_a_machine_whose_autostart_is_off(rig: Rig) -> None:
    await rig.load(an_app(services=(a_service(autostart=False),)))
    assert rig.fleet.wake(rig.machine().id).result().code is Code.NOT_STARTABLE


async def test_a_wake_of_a_machine_that_is_not_there_says_so(rig: Rig) -> None:
    await rig.load(an_app())
    assert rig.fleet.wake("ffffffffffffff").result().code is Code.MACHINE_GONE  # type: ignore[arg-type]


async def test_a_wake_while_the_machine_stops_waits_for_its_end_and_starts_it_again(rig: Rig) -> None:
    await rig.load(an_app())
    machine = await rig.started()
    rig.driver.ignores_signals.add(machine.id)
    rig.fleet.stop(machine, "user")
    await settle()
    wake = rig.fleet.wake(machine.id)
    await settle()
    assert machine.state is MachineState.STOPPING and rig.starts(machine) == 1
    await rig.clock.advance(5.1)
    assert (await asyncio.shield(wake)).code is None
    assert rig.starts(machine) == 2 and machine.state is MachineState.STARTED


async def test_a_stop_during_a_start_cancels_the_wake_and_ends_the_machine(rig: Rig) -> None:
    await rig.load(an_app())
    machine = rig.machine()
    wake = rig.fleet.wake(machine.id)
    await settle()
    end = rig.fleet.stop(machine, "user")
    assert end is not None
    await end
    assert wake.result().code is Code.START_CANCELLED
    assert machine.state is MachineState.STOPPED and machine.row.failures == 0
    assert not rig.host.is_running(machine.id)


async def test_a_stop_while_the_driver_still_forks_ends_what_it_forked(rig: Rig) -> None:
    await rig.load(an_app())
    machine = rig.machine()
    gate = rig.driver.hold_start[machine.id] = asyncio.Event()
    wake = rig.fleet.wake(machine.id)
    await settle()
    end = rig.fleet.stop(machine, "user")
    gate.set()
    assert end is not None
    await end
    assert (await wake).code is Code.START_CANCELLED
    assert machine.state is MachineState.STOPPED and not rig.host.is_running(machine.id)


async def test_a_suspended_machine_is_resumed_before_it_is_probed(rig: Rig) -> None:
    await rig.load(an_app())
    machine = await rig.started()
    end = rig.fleet.suspend(machine, "user")
    assert end is not None
    await end
    assert machine.state is MachineState.SUSPENDED and rig.host.is_frozen(machine.id)
    pid = machine.row.pid
    result = await asyncio.shield(rig.fleet.wake(machine.id))
    assert result.code is None and machine.row.pid == pid
    assert not rig.host.is_frozen(machine.id) and rig.starts(machine) == 1


async def test_a_start_that_needs_no_waiting_is_journalled_and_made_when_wake_returns(rig: Rig) -> None:
    await rig.load(an_app())
    machine = rig.machine()
    rig.listen(machine)
    seen: list[str] = []
    start = rig.driver.start_at_once

    def start_at_once(spec: MachineSpec) -> Running | None:
        seen.extend(row.state for row in rig.store.machines())
        return start(spec)

    rig.driver.start_at_once = start_at_once  # type: ignore[method-assign]  # to look at the journal before the fork
    wake = rig.fleet.wake(machine.id)
    assert seen == [MachineState.STARTING] and rig.starts(machine) == 1 and not wake.done()
    assert (await asyncio.shield(wake)).code is None
    assert [row.pid for row in rig.store.machines()] == [machine.row.pid] != [None]


@pytest.mark.parametrize("at_once", [True, False])
async def test_a_start_that_fails_is_told_alike_at_once_and_later(rig: Rig, at_once: bool) -> None:
    await rig.load(an_app())
    machine = rig.machine()
    rig.driver.at_once = at_once
    rig.driver.fail_start[machine.id] = "command not found"
    result = await asyncio.shield(rig.fleet.wake(machine.id))
    assert (result.code, result.detail) == (Code.START_FAILED, "command not found")
    assert machine.state is MachineState.FAILED


@pytest.mark.parametrize("at_once", [True, False])
async def test_one_that_ends_before_its_start_is_looked_at_has_failed(rig: Rig, at_once: bool) -> None:
    await rig.load(an_app())
    machine = rig.machine()
    rig.driver.at_once = at_once
    wake = rig.fleet.wake(machine.id)
    while not rig.host.is_running(machine.id):
        await asyncio.sleep(0)
    rig.host.end(machine.id, Exit(code=3))
    assert (await asyncio.shield(wake)).code is Code.START_FAILED
    assert machine.state is MachineState.FAILED and machine.row.exit_code == 3


async def test_a_resume_that_needs_no_waiting_is_over_when_wake_returns(rig: Rig) -> None:
    machine = await _suspended(rig)
    told = len(rig.published)
    result = rig.fleet.wake(machine.id)
    assert result.done() and result.result().code is None
    assert machine.state is MachineState.STARTED and not rig.host.is_frozen(machine.id)
    assert [one.state for one in rig.published[told:]] == [MachineState.STARTED]
    async with asyncio.timeout(5):  # history is written once the request is on its way
        while [(one.type, one.status) for one in rig.store.events(machine.id, 2)] != [
            ("start", "started"), ("start", "starting"),
        ]:  # fmt: skip
            await asyncio.sleep(0.001)
    assert [row.state for row in rig.store.machines()] == [MachineState.STARTED]


async def test_a_resume_that_has_to_wait_is_waited_for(rig: Rig) -> None:
    machine = await _suspended(rig)
    rig.driver.at_once = False
    wake = rig.fleet.wake(machine.id)
    assert not wake.done()
    assert (await asyncio.shield(wake)).code is None
    assert machine.state is MachineState.STARTED and not rig.host.is_frozen(machine.id)


async def test_a_machine_that_control_had_resumed_but_not_recorded_is_found_running(rig: Rig) -> None:
    machine = await _suspended(rig)
    rig.store.flush()
    assert rig.driver.resume_at_once(machine.id)  # and here control was killed
    version = machine.row.version
    await rig.die()
    after = rig.again()
    try:
        await after.load(an_app(), is_first=False)
        again = after.machine()
        after.listen(again)
        await after.clock.advance(0.1)
        assert again.state is MachineState.STARTED and again.row.version > version
        assert after.starts(again) == 0
    finally:
        await after.close()


async def _suspended(rig: Rig) -> Owned:
    await rig.load(an_app())
    machine = await rig.started()
    end = rig.fleet.suspend(machine, "user")
    assert end is not None
    await end
    return machine


async def test_a_user_suspends_a_machine_only_after_workers_have_been_asked(rig: Rig) -> None:
    """A request that was on its way when they heard of it is answered before the machine stands still."""
    await rig.load(an_app())
    machine = await rig.started()
    rig.cordons.on_cordon = rig.begin_request
    end = rig.fleet.suspend(machine, "user")
    await settle()
    assert machine.state is MachineState.SUSPENDING and not rig.host.is_frozen(machine.id)
    assert rig.cordons.lifted == [(machine.id, "suspending")]
    rig.end_request(machine)
    await rig.clock.advance(0.1)
    assert end is not None and end.done() and rig.host.is_frozen(machine.id)


async def test_a_machine_that_ends_while_workers_are_asked_before_its_suspend_is_left_alone(rig: Rig) -> None:
    await rig.load(an_app())
    machine = await rig.started()
    rig.cordons.gate = asyncio.Event()
    end = rig.fleet.suspend(machine, "user")
    await settle()
    rig.host.end(machine.id, Exit(code=0))
    rig.cordons.gate.set()
    assert end is not None
    await end
    assert machine.state is MachineState.STOPPED and ("suspend", machine.id) not in rig.driver.calls


async def test_a_resume_is_told_before_what_follows_it_at_once(rig: Rig) -> None:
    machine = await _suspended(rig)
    told: list[bool] = []
    rig.fleet.on_wake = lambda one, result: told.append(one.last_wake is first)
    assert rig.fleet.wake(machine.id).done()
    first = machine.last_wake
    end = rig.fleet.suspend(machine, "user")
    second = rig.fleet.wake(machine.id)
    assert first is not machine.last_wake and told == [True]
    assert [(one.type, one.status) for one in rig.store.events(machine.id, 3)] == [
        ("suspend", "suspending"), ("start", "started"), ("start", "starting"),
    ]  # fmt: skip
    assert end is not None
    await end
    assert (await asyncio.shield(second)).code is None and told == [True, False]
    await asyncio.sleep(0.01)
    assert told == [True, False]


async def test_only_a_started_machine_can_be_suspended(rig: Rig) -> None:
    await rig.load(an_app())
    with pytest.raises(Refused, match="created"):
        rig.fleet.suspend(rig.machine(), "user")


async def test_a_second_port_that_does_not_listen_delays_but_does_not_fail_a_wake(rig: Rig) -> None:
    await rig.load(an_app(services=(a_service(8080), a_service(9090))))
    machine = rig.machine()
    rig.listen(machine, 0)
    wake = rig.fleet.wake(machine.id)
    await rig.clock.advance(2.2)
    assert wake.result().code is None
    assert "9090" in machine.note


async def test_a_machine_without_services_has_started_once_it_runs(rig: Rig) -> None:
    await rig.load(an_app(services=()))
    await settle()
    assert rig.machine().state is MachineState.STARTED


# --- ends


async def test_a_machine_that_fails_by_itself_is_started_again_at_once_and_then_ever_later(rig: Rig) -> None:
    await rig.load(an_app())
    machine = await rig.started()
    for pause in (0.0, 1.0, 2.0, 4.0):
        before = rig.starts(machine)
        rig.host.end(machine.id, Exit(code=1))
        await settle()
        if pause:
            assert machine.state is MachineState.STOPPED
            await rig.clock.advance(pause - 0.01)
            assert rig.starts(machine) == before
        await rig.clock.advance(0.02)
        assert rig.starts(machine) == before + 1 and machine.state is MachineState.STARTED
    assert machine.row.restart_count == 4


async def test_a_wake_that_comes_before_the_word_of_an_end_waits_for_that_and_starts_the_machine_anew(rig: Rig) -> None:
    await rig.load(an_app())
    machine = await rig.started()
    first = machine.running
    rig.driver.host.end(machine.id, Exit(code=0))  # and the loop has yet to turn
    assert machine.state is MachineState.STARTED
    woken = rig.fleet.wake(machine.id)
    async with asyncio.timeout(5):
        while not woken.done():
            await rig.clock.advance(0.01)
    assert woken.result().code is None and machine.state is MachineState.STARTED and machine.running != first


async def test_a_machine_that_ends_well_stays_stopped_until_a_request_comes(rig: Rig) -> None:
    await rig.load(an_app())
    machine = await rig.started()
    rig.host.end(machine.id, Exit(code=0))
    await rig.clock.advance(60)
    assert machine.state is MachineState.STOPPED and rig.starts(machine) == 1
    assert (await asyncio.shield(rig.fleet.wake(machine.id))).code is None


async def test_policy_always_starts_again_what_ended_well_and_policy_no_nothing(rig: Rig) -> None:
    await rig.load(
        an_app("always", groups=restarting(RestartPolicy.ALWAYS)), an_app("no", groups=restarting(RestartPolicy.NO))
    )
    for name, starts, end in (("always", 2, Exit(code=0)), ("no", 1, Exit(code=1))):
        machine = await rig.started(name)
        rig.host.end(machine.id, end)
        await rig.clock.advance(1)
        assert rig.starts(machine) == starts, name


async def test_a_request_does_not_wait_for_the_pause_before_a_restart(rig: Rig) -> None:
    await rig.load(an_app())
    machine = await rig.started()
    for _ in range(2):
        rig.host.end(machine.id, Exit(code=1))
        await rig.clock.advance(0.5)
    assert machine.state is MachineState.STOPPED
    assert (await asyncio.shield(rig.fleet.wake(machine.id))).code is None
    starts = rig.starts(machine)
    await rig.clock.advance(30)
    assert rig.starts(machine) == starts  # the restart that waited is off


async def test_an_asked_for_stop_is_not_followed_by_a_restart(rig: Rig) -> None:
    await rig.load(an_app())
    machine = await rig.started()
    end = rig.fleet.stop(machine, "user", signal=signal.SIGTERM)
    assert end is not None
    await end
    await rig.clock.advance(60)
    assert machine.state is MachineState.STOPPED and rig.starts(machine) == 1
    assert machine.row.exit_signal == signal.SIGTERM
    assert rig.fleet.stop(machine, "user") is None


async def test_a_stop_of_a_failed_machine_puts_it_to_rest(rig: Rig) -> None:
    await rig.load(an_app())
    machine = rig.machine()
    rig.driver.fail_start[machine.id] = "broken"
    await asyncio.shield(rig.fleet.wake(machine.id))
    assert rig.fleet.stop(machine, "user") is None
    assert machine.state is MachineState.STOPPED


async def test_events_tell_what_happened_newest_first(rig: Rig) -> None:
    await rig.load(an_app())
    machine = await rig.started()
    rig.host.end(machine.id, Exit(signal=9, oom_killed=True))
    await rig.clock.advance(0.1)
    told = [(one.type, one.status, one.source) for one in rig.store.events(machine.id)]
    assert told == [
        ("start", "started", "flyd"),
        ("start", "starting", "flyd"),
        ("restart", "starting", "flyd"),
        ("exit", "stopped", "flyd"),
        ("start", "started", "flyd"),
        ("start", "starting", "proxy"),
    ]
    request = rig.store.events(machine.id)[3].request
    assert request is not None
    assert request["exit_event"]["signal"] == 9 and request["exit_event"]["oom_killed"] is True
    assert request["exit_event"]["requested_stop"] is False


async def test_all_machines_are_stopped_at_the_same_time_and_none_starts_any_more(rig: Rig) -> None:
    await rig.load(an_app("a"), an_app("b"))
    machines = [await rig.started("a"), await rig.started("b")]
    for machine in machines:
        rig.driver.ignores_signals.add(machine.id)
    done = asyncio.get_running_loop().create_task(rig.fleet.stop_all(), name="stop all")
    await settle()
    assert rig.fleet.wake(machines[0].id).result().code is Code.START_CANCELLED
    await rig.clock.advance(5.1)
    await done
    assert {one.state for one in machines} == {MachineState.STOPPED}


# --- the stop handshake


async def test_an_unused_machine_is_stopped_only_after_the_workers_have_acknowledged(rig: Rig) -> None:
    await rig.load(an_app())
    machine = await rig.started()
    gate = rig.cordons.gate = asyncio.Event()
    ending = asyncio.get_running_loop().create_task(rig.fleet.end_if_unused(machine, Autostop.STOP), name="idle")
    await settle()
    assert machine.state is MachineState.STARTED
    gate.set()
    assert await ending
    assert machine.ending is not None
    await machine.ending
    assert machine.state is MachineState.STOPPED
    assert rig.cordons.lifted == [(machine.id, "stopping")]  # never lifted while it could still get a request


async def test_a_request_admitted_before_the_acknowledgement_keeps_the_machine(rig: Rig) -> None:
    await rig.load(an_app())
    machine = await rig.started()
    rig.cordons.on_cordon = rig.begin_request
    assert not await rig.fleet.end_if_unused(machine, Autostop.STOP)
    assert machine.state is MachineState.STARTED
    assert rig.cordons.lifted == [(machine.id, "started")]


async def test_without_all_acknowledgements_the_cordon_is_lifted(rig: Rig) -> None:
    await rig.load(an_app())
    machine = await rig.started()
    rig.cordons.acknowledge = False
    assert not await rig.fleet.end_if_unused(machine, Autostop.STOP)
    assert machine.state is MachineState.STARTED and rig.cordons.lifted


async def test_a_wake_during_the_handshake_wins(rig: Rig) -> None:
    await rig.load(an_app())
    machine = await rig.started()
    gate = rig.cordons.gate = asyncio.Event()
    ending = asyncio.get_running_loop().create_task(rig.fleet.end_if_unused(machine, Autostop.STOP), name="idle")
    await settle()
    assert rig.fleet.wake(machine.id).result().code is None
    assert rig.cordons.lifted == [(machine.id, "started")], "lifted before the answer, on which workers choose again"
    gate.set()
    assert not await ending
    assert machine.state is MachineState.STARTED


async def test_what_its_checks_say_during_the_handshake_lifts_the_cordon_and_keeps_the_machine(rig: Rig) -> None:
    await rig.load(an_app())
    machine = await rig.started()
    rig.cordons.on_cordon = lambda one: rig.fleet.set_failing(one, (8080,))
    assert not await rig.fleet.end_if_unused(machine, Autostop.STOP)
    assert machine.state is MachineState.STARTED
    assert await rig.fleet.end_if_unused(machine, Autostop.STOP)


async def test_a_wake_while_workers_are_asked_to_keep_to_a_cordon_is_no_word_of_theirs(rig: Rig) -> None:
    await rig.load(an_app())
    machine = await rig.started()
    rig.cordons.gate = asyncio.Event()
    asking = asyncio.get_running_loop().create_task(rig.fleet.cordon(machine), name="cordon")
    await settle()
    assert rig.fleet.wake(machine.id, "user").done()  # lifts it, and so ends the wait
    rig.cordons.gate.set()
    assert await asking is False
    assert machine.row.cordoned and machine.handshake is None


async def test_a_stop_with_a_drain_lets_requests_finish_and_later_ones_wait_for_the_next_start(rig: Rig) -> None:
    await rig.load(an_app())
    machine = await rig.started()
    rig.begin_request(machine)
    rig.fleet.stop(machine, "flyd", drain_s=30.0)
    await rig.clock.advance(5.0)
    assert machine.state is MachineState.STOPPING and rig.host.is_running(machine.id)
    later = rig.fleet.wake(machine.id)
    await rig.clock.advance(1.0)
    assert not later.done()
    rig.end_request(machine)
    await rig.clock.advance(1.0)
    assert later.result().code is None
    assert rig.starts(machine) == 2 and machine.state is MachineState.STARTED


async def test_a_driver_that_cannot_suspend_stops_instead(rig: Rig) -> None:
    await rig.load(an_app())
    machine = await rig.started()
    rig.driver.can_suspend = False
    assert await rig.fleet.end_if_unused(machine, Autostop.SUSPEND)
    assert machine.ending is not None
    await machine.ending
    assert machine.state is MachineState.STOPPED


# --- a new control


async def test_a_new_control_finds_a_running_machine_and_wakes_nothing(rig: Rig) -> None:
    await rig.load(an_app())
    machine = await rig.started()
    version, pid = machine.row.version, machine.row.pid
    await rig.die()
    after = rig.again()
    try:
        await after.load(an_app(), is_first=False)
        again = after.machine()
        assert again.state is MachineState.STARTED and again.row.pid == pid and again.row.version > version
        assert after.starts(again) == 0
        assert after.fleet.wake(again.id).result().code is None
    finally:
        await after.close()


async def test_a_left_over_that_ends_while_a_new_control_looks_for_machines_is_no_news(rig: Rig) -> None:
    await rig.load(an_app())
    machine = await rig.started()
    running = machine.running
    end = rig.fleet.stop(machine, "user")
    assert running is not None and end is not None
    await end
    await rig.die()
    after = rig.again()
    after.driver.find_machines = lambda: {machine.id: running}  # type: ignore[method-assign]  # it is gone since
    try:
        await after.load(an_app(), is_first=False)
        assert after.machine().state is MachineState.STOPPED and after.machine().row.exit_signal == signal.SIGINT
    finally:
        await after.close()


async def test_a_new_control_goes_on_with_a_start_that_was_under_way(rig: Rig) -> None:
    await rig.load(an_app())
    machine = rig.machine()
    rig.fleet.wake(machine.id)
    await settle()
    await rig.die()
    after = rig.again()
    try:
        await after.load(an_app(), is_first=False)
        again = after.machine()
        assert again.state is MachineState.STARTING and again.flight is not None
        after.listen(again)
        await after.clock.advance(0.1)
        assert again.state is MachineState.STARTED and after.starts(again) == 0
    finally:
        await after.close()


async def test_a_machine_that_ended_without_control_is_recorded_and_started_again(rig: Rig) -> None:
    await rig.load(an_app())
    machine = await rig.started()
    await rig.die()
    rig.host.end(machine.id, Exit(code=7))
    after = rig.again()
    try:
        await after.load(an_app(), is_first=False)
        again = after.machine()
        await settle()
        assert again.row.exit_code == 7
        after.listen(again)
        await after.clock.advance(
            ATTEMPT_S + 0.1
        )  # a handshake of the kernel's may be lost, and only that be tried again
        assert again.state is MachineState.STARTED and after.starts(again) == 1
    finally:
        await after.close()


async def test_an_end_that_the_supervisor_tells_late_completes_the_record(rig: Rig) -> None:
    await rig.load(an_app(groups=restarting(RestartPolicy.NO)))
    machine = await rig.started()
    pid = machine.row.pid
    assert pid is not None
    await rig.die()
    del rig.host.processes[machine.id]
    after = rig.again()
    try:
        await after.load(an_app(groups=restarting(RestartPolicy.NO)), is_first=False)
        again = after.machine()
        assert again.state is MachineState.STOPPED and again.row.exit_code is None
        after.fleet.exited_elsewhere(pid, Exit(code=5))
        assert again.row.exit_code == 5
    finally:
        await after.close()


async def test_without_its_database_control_finds_machines_by_their_id(rig: Rig) -> None:
    await rig.load(an_app())
    machine = await rig.started()
    version = machine.row.version
    await rig.die()
    for tail in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{rig.folder}/wakefront.db{tail}")
    await asyncio.sleep(0)
    assert isinstance(rig.clock, FakeClock)
    await rig.clock.advance(1.0)
    after = rig.again()
    try:
        await after.load(an_app(), is_first=False)
        again = after.machine()
        assert again.id == machine.id and again.row.version > version
        assert after.starts(again) == 0 and again.running == machine.running
    finally:
        await after.close()


# --- properties


@given(st.integers(1, 40), st.lists(st.integers(0, 39), max_size=20), st.booleans())
@settings(max_examples=25, deadline=None)
def test_any_number_of_wakes_is_one_start_whoever_leaves(count: int, leavers: list[int], fails: bool) -> None:
    async def scenario(folder: Path) -> None:
        rig = Rig(folder)
        await rig.load(an_app())
        machine = rig.machine()
        if fails:
            rig.driver.fail_start[machine.id] = "broken"
        else:
            rig.listen(machine)

        async def wait() -> Code | None:
            return (await asyncio.shield(rig.fleet.wake(machine.id))).code

        waiters = [asyncio.get_running_loop().create_task(wait(), name=f"waiter {n}") for n in range(count)]
        await asyncio.sleep(0)
        for place in leavers:
            waiters[place % count].cancel()
        codes = await asyncio.gather(*waiters, return_exceptions=True)
        stayed = [code for code in codes if not isinstance(code, asyncio.CancelledError)]
        assert set(stayed) <= {Code.START_FAILED if fails else None}
        assert rig.starts(machine) == 1
        await rig.close()

    with tempfile.TemporaryDirectory() as folder:
        uvloop.run(scenario(Path(folder)))


_OPERATIONS = st.sampled_from(("wake", "stop", "suspend", "crash", "exit", "idle", "time", "long", "listen", "deaf"))


@given(st.lists(_OPERATIONS, max_size=25))
@settings(max_examples=60, deadline=None)
def test_versions_only_grow_and_states_follow_the_table_whatever_happens(operations: list[str]) -> None:
    async def scenario(folder: Path) -> None:
        rig = Rig(folder)
        await rig.load(an_app(wake_timeout_s=3.0))
        machine = rig.machine()
        wakes = []
        for operation in operations:
            match operation:
                case "wake":
                    wakes.append(rig.fleet.wake(machine.id))
                case "stop":
                    rig.fleet.stop(machine, "user")
                case "suspend":
                    with contextlib.suppress(Refused):
                        rig.fleet.suspend(machine, "user")
                case "crash" | "exit" if rig.host.is_running(machine.id):
                    rig.host.end(machine.id, Exit(code=int(operation == "crash")))
                case "idle":
                    await rig.fleet.end_if_unused(machine, Autostop.STOP)
                case "time":
                    await settle()
                case "long":
                    await rig.clock.advance(70.0)
                case "listen" if not rig.servers:
                    rig.listen(machine)
                case "deaf" if rig.servers:
                    rig.servers.pop().close()
        await rig.clock.advance(400.0)
        versions = [one.version for one in rig.published]
        assert versions == sorted(set(versions))
        assert all(wake.done() for wake in wakes)
        assert machine.flight is None and machine.ending is None
        alive = machine.state in (MachineState.STARTED, MachineState.SUSPENDED)
        assert rig.host.is_running(machine.id) == alive, machine.state
        assert rig.host.is_frozen(machine.id) == (machine.state is MachineState.SUSPENDED)
        await rig.close()

    with tempfile.TemporaryDirectory() as folder:
        uvloop.run(scenario(Path(folder)))


@pytest.mark.parametrize("recorded", [MachineState.STARTED, MachineState.STARTING])
async def test_a_frozen_machine_on_record_as_running_is_not_taken_for_one_that_answers(
    rig: Rig, recorded: MachineState
) -> None:
    """Control was killed after the freeze, or before the resume, and before either was on record."""
    await rig.load(an_app())
    machine = await rig.started()
    await rig.driver.suspend(machine.id)
    machine.row.state = recorded
    rig.store.save(machine.row)
    await rig.die()
    after = rig.again()
    try:
        await after.load(an_app(), is_first=False)
        await settle()
        found = after.machine()
        if recorded is MachineState.STARTED:
            assert found.state is MachineState.SUSPENDED and after.host.is_frozen(found.id)
        after.listen(found)
        wake = after.fleet.wake(found.id)
        await after.clock.advance(1.0)
        assert wake.result().code is None and found.state is MachineState.STARTED
        assert not after.host.is_frozen(found.id) and after.starts(found) == 0
    finally:
        await after.close()
