from __future__ import annotations

from proxy.control.idle import IdleWatch
from proxy.model import Autostop, MachineState
from tests.control.rig import Rig, a_service, an_app
from tests.support.clock import settle


def watch(rig: Rig, interval_s: float = 300.0) -> IdleWatch:
    return IdleWatch(rig.fleet, rig.memory, rig.clock, rig.apps.pools, "ams", lambda: interval_s)


async def look(rig: Rig, idle: IdleWatch, seconds: float) -> None:
    """Let time pass as the watch would see it."""
    end = rig.clock.monotonic() + seconds
    while rig.clock.monotonic() < end:
        await rig.clock.advance(min(idle.pause_s(), end - rig.clock.monotonic()))
        await idle.look()
        await settle()


async def test_a_machine_unused_for_its_idle_timeout_is_stopped(rig: Rig) -> None:
    await rig.load(an_app(idle_timeout_s=10.0))
    machine, idle = await rig.started(), watch(rig)
    await look(rig, idle, 9.0)
    assert machine.state is MachineState.STARTED
    await look(rig, idle, 4.0)
    assert machine.state is MachineState.STOPPED


async def test_a_request_however_short_begins_the_timeout_anew(rig: Rig) -> None:
    await rig.load(an_app(idle_timeout_s=10.0))
    machine, idle = await rig.started(), watch(rig)
    await look(rig, idle, 8.0)
    rig.begin_request(machine)
    rig.end_request(machine)
    await look(rig, idle, 9.0)
    assert machine.state is MachineState.STARTED
    await look(rig, idle, 5.0)
    assert machine.state is MachineState.STOPPED


async def test_an_open_tunnel_keeps_a_machine_for_ever(rig: Rig) -> None:
    await rig.load(an_app(idle_timeout_s=10.0))
    machine, idle = await rig.started(), watch(rig, 20.0)
    rig.begin_request(machine, worker=1)
    await look(rig, idle, 200.0)
    assert machine.state is MachineState.STARTED
    rig.end_request(machine, worker=1)
    await look(rig, idle, 13.0)
    assert machine.state is MachineState.STOPPED


async def test_autostop_suspend_suspends(rig: Rig) -> None:
    await rig.load(an_app(services=(a_service(autostop=Autostop.SUSPEND),), idle_timeout_s=1.0))
    machine = await rig.started()
    await look(rig, watch(rig), 2.0)
    assert machine.state is MachineState.SUSPENDED


async def test_autostop_off_leaves_machines_alone(rig: Rig) -> None:
    await rig.load(an_app(services=(a_service(autostop=Autostop.OFF),), idle_timeout_s=1.0))
    machine = await rig.started()
    await look(rig, watch(rig, 5.0), 30.0)
    assert machine.state is MachineState.STARTED


async def test_the_minimum_stays_running_in_the_primary_region_only(rig: Rig) -> None:
    for name, region in (("here", "ams"), ("there", "fra")):
        await rig.close()
        rig.__init__(rig.folder)  # type: ignore[misc]  # a fresh fleet in the same folder
        services = (a_service(least=1),)
        await rig.load(an_app(name, 2, services, idle_timeout_s=1.0, primary_region=region))
        machines = [await rig.started(name, 0), await rig.started(name, 1)]
        await look(rig, watch(rig), 5.0)
        running = sum(machine.state is MachineState.STARTED for machine in machines)
        assert running == (1 if name == "here" else 0), name


async def test_each_pass_stops_one_excess_machine_even_without_idle_timeout(rig: Rig) -> None:
    await rig.load(an_app(count=3, idle_timeout_s=0.0))
    machines = [await rig.started("web", place) for place in range(3)]
    rig.begin_request(machines[0])
    idle = watch(rig, 60.0)
    for passes, running in ((1, 2), (2, 1), (3, 1)):
        await look(rig, idle, 60.5)
        assert sum(one.state is MachineState.STARTED for one in machines) == running, passes
    assert machines[0].state is MachineState.STARTED


async def test_a_machine_whose_workers_do_not_answer_is_not_stopped_and_tried_again(rig: Rig) -> None:
    await rig.load(an_app(idle_timeout_s=1.0))
    machine, idle = await rig.started(), watch(rig)
    rig.cordons.acknowledge = False
    await look(rig, idle, 3.0)
    assert machine.state is MachineState.STARTED and len(rig.cordons.asked) > 1
    rig.cordons.acknowledge = True
    await look(rig, idle, 1.0)
    assert machine.state is MachineState.STOPPED
