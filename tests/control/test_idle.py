from __future__ import annotations

import asyncio
import contextlib
import datetime
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proxy.control.busy import says_it_is_busy
from proxy.control.idle import IdleWatch
from proxy.control.machines import Owned
from proxy.control.plan import keep_plan, kept_plan
from proxy.control.prober import plain_socket
from proxy.decide.autostop import parse_warm_hours
from proxy.model import Autostop, MachineState
from tests.control.rig import Rig, a_plan, a_service, an_app
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


async def test_the_last_machine_that_runs_stays_for_its_idle_timeout_whatever_the_passes(rig: Rig) -> None:
    await rig.load(an_app(count=2, idle_timeout_s=100.0))
    machines = [await rig.started("web", place) for place in range(2)]
    idle = watch(rig, 1.0)
    await look(rig, idle, 5.0)
    assert sum(one.state is MachineState.STARTED for one in machines) == 1, "one was more than needed"
    await look(rig, idle, 90.0)
    assert sum(one.state is MachineState.STARTED for one in machines) == 1
    await look(rig, idle, 10.0)
    assert all(one.state is MachineState.STOPPED for one in machines)


async def test_a_machine_whose_workers_do_not_answer_is_not_stopped_and_tried_again(rig: Rig) -> None:
    await rig.load(an_app(idle_timeout_s=1.0))
    machine, idle = await rig.started(), watch(rig)
    rig.cordons.acknowledge = False
    await look(rig, idle, 3.0)
    assert machine.state is MachineState.STARTED and len(rig.cordons.asked) > 1
    rig.cordons.acknowledge = True
    await look(rig, idle, 1.0)
    assert machine.state is MachineState.STOPPED


# --- several at once, intervals of apps


async def test_an_app_may_have_an_interval_of_its_own_and_end_several_in_a_pass(rig: Rig) -> None:
    own = {"autostop_interval_s": 30.0, "autostop_at_once": 2}
    await rig.load(an_app("quick", 4, idle_timeout_s=0.0, **own), an_app("slow", 2, idle_timeout_s=0.0))
    quick = [await rig.started("quick", place) for place in range(4)]
    slow = [await rig.started("slow", place) for place in range(2)]
    idle = watch(rig, 120.0)
    await look(rig, idle, 31.0)
    assert count_started(quick) == 2 and count_started(slow) == 2
    await look(rig, idle, 90.0)
    assert count_started(quick) == 0 and count_started(slow) == 1


async def test_a_new_interval_counts_from_the_last_pass(rig: Rig) -> None:
    await rig.load(an_app(count=2, idle_timeout_s=0.0))
    machines = [await rig.started("web", place) for place in range(2)]
    interval = [1000.0]
    idle = IdleWatch(rig.fleet, rig.memory, rig.clock, rig.apps.pools, "ams", lambda: interval[0])
    await look(rig, idle, 50.0)
    assert count_started(machines) == 2
    interval[0] = 60.0
    await look(rig, idle, 12.0)
    assert count_started(machines) == 1


def count_started(machines: list[Owned]) -> int:
    return sum(one.state is MachineState.STARTED for one in machines)


# --- cordoned, in use


async def test_a_cordoned_machine_is_neither_stopped_nor_counted(rig: Rig) -> None:
    await rig.load(an_app(count=2, services=(a_service(least=1),), idle_timeout_s=1.0))
    machines = [await rig.started("web", place) for place in range(2)]
    assert await rig.fleet.cordon(machines[0])
    await look(rig, watch(rig), 30.0)
    assert count_started(machines) == 2
    rig.fleet.uncordon(machines[0])
    await look(rig, watch(rig), 5.0)
    assert count_started(machines) == 1


async def test_an_excess_machine_in_use_has_its_tunnels_ended_after_the_cordon_and_before_the_signal(rig: Rig) -> None:
    await rig.load(an_app(count=2, idle_timeout_s=0.0))
    machines = [await rig.started("web", place) for place in range(2)]
    for one in machines:
        rig.begin_request(one)
    idle = watch(rig, 60.0)
    await look(rig, idle, 60.5)
    ((first, state),) = rig.cordons.ended_tunnels
    leaving = next(one for one in machines if one.id == first)
    assert rig.cordons.asked == [first] and state == "started" and ("stop", first) not in rig.driver.calls
    rig.end_request(leaving)
    await rig.clock.advance(0.1)
    assert leaving.state is MachineState.STOPPED


async def test_a_cordon_that_comes_in_the_middle_of_an_idle_stop_keeps_the_machine(rig: Rig) -> None:
    await rig.load(an_app(idle_timeout_s=1.0))
    machine, idle = await rig.started(), watch(rig)
    rig.cordons.gate = asyncio.Event()
    await rig.clock.advance(1.0)
    await idle.look()
    await settle()
    assert machine.handshake is not None
    assert await rig.fleet.cordon(machine)
    rig.cordons.gate.set()
    await idle.settle()
    assert machine.state is MachineState.STARTED and machine.record().cordoned


# --- busy


@contextlib.asynccontextmanager
async def answering(machine: Owned, *answers: bytes | None) -> AsyncIterator[list[bytes]]:
    """A program at the machine's port: one answer a connection, the last one for ever. None: it says nothing."""
    asked: list[bytes] = []
    left = list(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = await reader.readuntil(b"\r\n\r\n")
            asked.append(head)
            answer = left.pop(0) if len(left) > 1 else left[0]
            if answer is None:
                await reader.read()
            else:
                writer.write(answer)
                await writer.drain()
        writer.close()

    endpoint = machine.spec.endpoints[0]
    server = await asyncio.start_server(serve, endpoint.host, endpoint.port)
    try:
        yield asked
    finally:
        server.close()
        await server.wait_closed()


def status(code: int, *lines: str) -> bytes:
    return "\r\n".join((f"HTTP/1.1 {code} X", *lines, "Content-Length: 0", "", "")).encode()


async def run_up(rig: Rig, machine: Owned) -> None:
    result = await asyncio.shield(rig.fleet.wake(machine.id))
    assert result.code is None


@pytest.mark.parametrize(
    ("answer", "busy"),
    [
        (status(200), False),
        (status(204), False),
        (status(409), True),
        (status(423), True),
        (status(500), False),
        (status(404), False),
        (status(302, "Location: /locked"), False),  # never followed
        (b"HTTP/1.1 423 Locked\r\nContent-Length: 1000000000000\r\n\r\n", True),  # nor its body waited for
        (b"what is this", False),
        (b"HTTP/1.1 423 L\r\nX: " + b"x" * 1_000_000, False),
        (b"", False),
    ],
)
async def test_only_409_and_423_say_busy(rig: Rig, answer: bytes, busy: bool) -> None:
    await rig.load(an_app())
    machine = rig.machine()
    async with answering(machine, answer) as asked:
        assert await says_it_is_busy(machine, "/busy?all=1", plain_socket) is busy
    assert asked and all(one.startswith(b"GET /busy?all=1 HTTP/1.1\r\n") for one in asked)


async def test_a_machine_that_does_not_answer_or_listen_is_not_busy(rig: Rig) -> None:
    await rig.load(an_app())
    machine = rig.machine()
    assert await says_it_is_busy(machine, "/", plain_socket) is False
    async with answering(machine, None) as asked:
        assert await says_it_is_busy(machine, "/", plain_socket, timeout_s=0.05) is False
        assert len(asked) == 1


async def test_a_flood_of_informational_answers_neither_says_busy_nor_is_heard_to_its_end(rig: Rig) -> None:
    await rig.load(an_app())
    machine = rig.machine()
    flood = b"HTTP/1.1 102 Processing\r\n\r\n" * 1000
    async with answering(machine, flood + status(423)):
        assert await says_it_is_busy(machine, "/", plain_socket, timeout_s=30.0) is False


async def test_a_machine_that_says_it_is_busy_is_asked_again_later_and_stopped_when_it_is_done(rig: Rig) -> None:
    await rig.load(an_app(idle_timeout_s=10.0, busy="/busy"))
    machine, idle = rig.machine(), watch(rig)
    async with answering(machine, status(423), status(423), status(200)) as asked:
        await run_up(rig, machine)
        await look_and_wait(rig, idle, 12.0)
        assert len(asked) == 1 and machine.state is MachineState.STARTED
        await look_and_wait(rig, idle, 12.0)
        assert len(asked) == 1  # 15 s have to pass
        await look_and_wait(rig, idle, 3.0)
        assert len(asked) == 2 and machine.state is MachineState.STARTED
        await look_and_wait(rig, idle, 18.0)
        assert len(asked) == 3 and machine.state is MachineState.STOPPED


async def test_where_the_excess_machine_is_busy_another_one_is_stopped_in_its_place(rig: Rig) -> None:
    await rig.load(an_app(count=2, idle_timeout_s=0.0, busy="/busy"))
    first, second = sorted((rig.machine("web", 0), rig.machine("web", 1)), key=lambda one: one.id)
    async with answering(first, status(409)), answering(second, status(200)):
        await run_up(rig, first)
        await run_up(rig, second)
        await look_and_wait(rig, watch(rig, 60.0), 61.0)
        assert first.state is MachineState.STARTED and second.state is MachineState.STOPPED


async def look_and_wait(rig: Rig, idle: IdleWatch, seconds: float) -> None:
    """As `look`, with what it began awaited: machines are asked over real sockets."""
    end = rig.clock.monotonic() + seconds
    while rig.clock.monotonic() < end:
        await rig.clock.advance(min(idle.pause_s(), end - rig.clock.monotonic()))
        await idle.look()
        await idle.settle()
        await settle()


async def test_metadata_keeps_a_machine_up_until_the_time_it_names(rig: Rig) -> None:
    await rig.load(an_app(idle_timeout_s=5.0))
    machine, idle = await rig.started(), watch(rig)
    machine.row.metadata["wakefront_busy"] = str(rig.clock.unix() + 60)
    await look(rig, idle, 58.0)
    assert machine.state is MachineState.STARTED
    await look(rig, idle, 4.0)
    assert machine.state is MachineState.STOPPED


# --- all of it at once


@pytest.mark.parametrize("seed", range(12))
async def test_whatever_happens_autostop_spares_what_is_in_use_busy_or_cordoned_and_the_minimum(
    rig: Rig, seed: int
) -> None:
    rng = random.Random(seed)
    least, at_once = rng.randrange(3), rng.randrange(1, 4)
    services = (a_service(least=least, autostop=rng.choice([Autostop.STOP, Autostop.SUSPEND])),)
    await rig.load(an_app(count=4, services=services, idle_timeout_s=rng.choice([0.0, 8.0]), autostop_at_once=at_once))
    machines, idle, loads = [rig.machine("web", place) for place in range(4)], watch(rig, 20.0), [0, 0, 0, 0]
    for one in machines:
        rig.listen(one)
    while any(one.flight is not None for one in machines):  # the minimum
        await rig.clock.advance(0.1)
    for _ in range(150):
        place = rng.randrange(4)
        one = machines[place]
        match rng.randrange(9):
            case 0 if one.row.cordoned:
                rig.fleet.uncordon(one)
            case 0:
                await rig.fleet.cordon(one)
            case 1 | 2 if one.state is MachineState.STARTED:
                rig.begin_request(one)
                loads[place] += 1
            case 3 | 4 if loads[place]:
                rig.end_request(one)
                loads[place] -= 1
            case 5:
                one.row.metadata["wakefront_busy"] = str(rig.clock.unix() + 15)
            case 6 if loads[place] == 0:
                if (end := rig.fleet.stop(one, "user")) is not None:
                    await end
            case _:
                assert (await asyncio.shield(rig.fleet.wake(one.id, "user"))).code is None
        before = [one.state for one in machines]
        spared = [one.row.cordoned or is_busy(rig, one) for one in machines]
        counted = sum(
            s is MachineState.STARTED and not one.row.cordoned for s, one in zip(before, machines, strict=True)
        )
        await look(rig, idle, rng.uniform(0.1, 6.0))
        await rig.clock.advance(0.0)
        for place, one in enumerate(machines):
            if one.state is not before[place]:
                assert before[place] is MachineState.STARTED and not spared[place] and not loads[place], seed
        left = sum(one.state is MachineState.STARTED and not one.row.cordoned for one in machines)
        assert left >= min(least, counted), seed
    for place, one in enumerate(machines):
        for _ in range(loads[place]):
            rig.end_request(one)
    await rig.clock.advance(20.0)
    await idle.settle()
    assert all(one.handshake is None for one in machines)
    versions: dict[str, int] = {}
    for record in rig.published:
        assert record.version >= versions.get(record.id, 0)
        versions[record.id] = record.version


def is_busy(rig: Rig, machine: Owned) -> bool:
    """Until the look that follows is over."""
    return float(machine.row.metadata.get("wakefront_busy", "0")) > rig.clock.unix() + 6.5


# --- warm hours: the rig's clock begins on Friday 2027-01-15 at 08:00 UTC, 09:00 in Amsterdam


def warm(*texts: str) -> dict[str, object]:
    return {"warm_hours": tuple(parse_warm_hours(text) for text in texts)}


async def test_warm_hours_start_a_machine_keep_it_and_let_it_go_at_their_end(rig: Rig) -> None:
    await rig.load(an_app(count=2, idle_timeout_s=10.0, **warm("fri 09:10-09:30 Europe/Amsterdam")))
    first, second = sorted((rig.machine("web", 0), rig.machine("web", 1)), key=lambda one: one.id)
    rig.listen(first)
    rig.listen(second)
    idle = watch(rig)
    await look(rig, idle, 9 * 60.0)
    assert count_started([first, second]) == 0
    await look(rig, idle, 66.0)
    assert first.state is MachineState.STARTED and first.last_wake is not None and first.last_wake.source == "flyd"
    await look(rig, idle, 19 * 60.0)
    assert count_started([first, second]) == 1 and rig.starts(first) == 1
    await look(rig, idle, 60.0)
    assert count_started([first, second]) == 0


async def test_warm_hours_bring_up_the_minimum_one_at_a_time(rig: Rig) -> None:
    services = (a_service(least=2),)
    await rig.load(an_app(count=3, services=services, idle_timeout_s=10.0, **warm("daily 00:00-24:00")), is_first=False)
    machines = sorted((rig.machine("web", place) for place in range(3)), key=lambda one: one.id)
    for one in machines:  # as they are hours later
        if (end := rig.fleet.stop(one, "proxy")) is not None:
            await end
        rig.driver.hold_start[one.id] = asyncio.Event()
        rig.listen(one)
    idle = watch(rig)
    await look(rig, idle, 8.0)
    assert [one.state for one in machines].count(MachineState.STARTING) == 1
    for one in machines[:2]:
        rig.driver.hold_start.pop(one.id).set()
        await look(rig, idle, 6.0)
    assert count_started(machines) == 2


async def test_nothing_is_warmed_once_the_node_is_stopping(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    await rig.load(an_app(**warm("daily 00:00-24:00")))
    machine = rig.machine()
    await rig.fleet.stop_all()
    with caplog.at_level("INFO"):
        await look(rig, watch(rig), 30.0)
    assert machine.state is not MachineState.STARTED and "warm hours" not in caplog.text


async def test_what_a_user_stopped_or_cordoned_and_what_is_held_after_failures_is_not_warmed(rig: Rig) -> None:
    await rig.load(an_app(count=3, idle_timeout_s=10.0, **warm("daily 00:00-24:00")))
    by_user, cordoned, failing = (rig.machine("web", place) for place in range(3))
    rig.fleet.stop(by_user, "user")
    await rig.fleet.cordon(cordoned)
    rig.driver.fail_start[failing.id] = "no such program"
    idle = watch(rig)
    await look(rig, idle, 0.3)
    begun = rig.starts(failing)
    assert begun == 1 and failing.row.hold_until > rig.clock.unix()
    await look(rig, idle, 30.0)
    assert begun < rig.starts(failing) < 8  # after each hold, not at each look
    assert rig.starts(by_user) == rig.starts(cordoned) == 0


async def test_at_most_a_few_groups_are_warmed_at_the_same_time(rig: Rig) -> None:
    apps = [an_app(f"app-{number}", **warm("daily 00:00-24:00")) for number in range(9)]
    await rig.load(*apps)
    for app in apps:
        rig.driver.hold_start[rig.machine(app.name).id] = asyncio.Event()
    await look(rig, watch(rig), 8.0)
    states = [rig.machine(app.name).state for app in apps]
    assert states.count(MachineState.STARTING) == 4 and states.count(MachineState.CREATED) == 5


async def test_warm_hours_keep_to_the_clock_on_the_wall_when_that_is_changed(rig: Rig) -> None:
    await rig.load(an_app(**warm("daily 08:00-09:00 Europe/Amsterdam")))
    idle = watch(rig)
    plan = rig.machine().app
    for month, utc_hour in ((1, 7), (7, 6)):  # winter, summer
        moment = datetime.datetime(2027, month, 20, utc_hour, 30, tzinfo=datetime.UTC).timestamp()
        await rig.clock.advance(moment - rig.clock.unix())
        assert idle.is_warm(plan), month
        await rig.clock.advance(3600.0)
        assert not idle.is_warm(plan), month


def test_a_kept_plan_has_its_warm_hours(tmp_path: Path) -> None:
    plan = a_plan(
        an_app(busy="/b", autostop_interval_s=9.0, **warm("mon-fri 08:00-18:00 Europe/Amsterdam", "sun 1:00-2:00"))
    )
    keep_plan(str(tmp_path / "plan"), plan)
    assert kept_plan(str(tmp_path / "plan")) == plan


async def test_a_time_zone_that_this_host_does_not_have_counts_as_utc(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    await rig.load(an_app(**warm("fri 08:00-08:10 Europe/Nowhere")))
    idle, plan = watch(rig), rig.machine().app
    assert idle.is_warm(plan) and idle.is_warm(plan)
    assert sum("Europe/Nowhere" in record.getMessage() for record in caplog.records) == 1
