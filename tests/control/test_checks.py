"""Checks of a fleet: when they run, what they keep from whom, and what becomes of machines that fail them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from proxy.control.checks import APP_AT_ONCE, Checks
from proxy.control.machines import Owned, WakeResult
from proxy.control.plan import AppPlan, GroupPlan, StaticMachine
from proxy.control.prober import plain_socket
from proxy.errors import Code
from proxy.machines.driver import Exit
from proxy.metrics import AppCells, MachineFacts, Metrics, NodeFacts
from proxy.model import Autostop, Check, Endpoint, MachineState, Service
from proxy.wire.fly_toml import NamedCheck
from tests.control.rig import Rig, a_plan, a_service, an_app
from tests.support.clock import settle

SOON_S = 10.0  # of real time, for what comes over a socket
HTTP = Check("http", 10.0, 5.0, 2.0, path="/up")
TCP = Check("tcp", 10.0, 5.0, 2.0)


def checked(*checks: Check, port: int = 8080, autostop: Autostop = Autostop.STOP) -> Service:
    return dataclasses.replace(a_service(port, autostop), checks=checks or (HTTP,))


def a_checked_app(name: str = "web", *services: Service, **more: object) -> AppPlan:
    return an_app(name, services=services or (checked(),), **more)  # type: ignore[arg-type]  # keys of AppPlan


class Peer:
    """What listens where a machine should; the test says how it is."""

    def __init__(self) -> None:
        self.status = 200
        self.hangs = False
        self.asked = 0
        self.open = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def listen(self, machine: Owned, place: int = 0) -> Peer:
        endpoint = machine.spec.endpoints[place]
        self._server = await asyncio.start_server(self._serve, endpoint.host, endpoint.port)
        return self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with contextlib.suppress(ConnectionError):
            if await reader.read(10_000):
                self.asked += 1
                self.open += 1
                if self.hangs:
                    await reader.read()
                else:
                    writer.write(b"HTTP/1.1 %d Told\r\nContent-Length: 0\r\n\r\n" % self.status)
                    await writer.drain()
                self.open -= 1
        writer.close()
        self._writers.discard(writer)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            for writer in list(self._writers):
                writer.transport.abort()
            await self._server.wait_closed()


class Health:
    """A rig whose machines are checked."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.checks = Checks(rig.fleet, rig.clock, random.Random(1), plain_socket)
        rig.fleet.health = self.checks
        self.peers: list[Peer] = []

    async def peer(self, machine: Owned, place: int = 0, status: int = 200) -> Peer:
        peer = Peer()
        peer.status = status
        self.peers.append(peer)
        return await peer.listen(machine, place)

    async def started(self, app: str = "web", index: int = 0) -> tuple[Owned, Peer]:
        machine = self.rig.machine(app, index)
        peer = await self.peer(machine)
        assert (await self.woken(machine)).code is None
        assert machine.state is MachineState.STARTED
        return machine, peer

    async def woken(self, machine: Owned) -> WakeResult:
        return await asyncio.wait_for(asyncio.shield(self.rig.fleet.wake(machine.id)), SOON_S)

    async def pass_time(self, seconds: float, step_s: float = 0.5) -> None:
        """Let checks come due one by one, each with the time it needs."""
        while seconds > 0:
            await self.rig.clock.advance(min(step_s, seconds))  # type: ignore[attr-defined]  # a FakeClock
            await asyncio.wait_for(self.checks.settle(), SOON_S)
            seconds -= step_s

    def shown(self, machine: Owned) -> dict[str, str]:
        return {one["name"]: one["status"] for one in self.checks.checks_of(machine)}

    async def close(self) -> None:
        await self.checks.close()
        for peer in self.peers:
            await peer.close()


@pytest_asyncio.fixture
async def health(rig: Rig) -> AsyncIterator[Health]:
    one = Health(rig)
    yield one
    await one.close()


# --- the first pass


async def test_a_wake_ends_once_the_checks_have_passed(health: Health) -> None:
    rig = health.rig
    await rig.load(a_checked_app())
    machine = rig.machine()
    peer = await health.peer(machine, status=503)
    wake = rig.fleet.wake(machine.id)
    await health.pass_time(1.0, 0.1)
    assert peer.asked >= 5 and not wake.done() and machine.state is MachineState.STARTING
    assert health.shown(machine) == {"servicecheck-00-http-8080": "warning"}
    peer.status = 200
    await health.pass_time(0.1)
    assert (await asyncio.wait_for(asyncio.shield(wake), SOON_S)).code is None
    assert [(one.state, one.failing_ports) for one in rig.published][-1] == ("started", ())
    assert rig.published[-1].started_at == rig.clock.unix()
    assert machine.last_wake is not None and machine.last_wake.listening < machine.last_wake.answered


async def test_a_machine_that_is_well_is_asked_once_for_its_wake(health: Health) -> None:
    await health.rig.load(a_checked_app())
    machine, peer = await health.started()  # no time has passed on the clock: the first check is made at once
    assert peer.asked == 1
    assert health.shown(machine) == {"servicecheck-00-http-8080": "passing"}


async def test_checks_that_do_not_pass_hold_a_wake_for_the_grace_period_and_two_intervals(health: Health) -> None:
    rig = health.rig
    await rig.load(a_checked_app(wake_timeout_s=60.0))
    machine = rig.machine()
    await health.peer(machine, status=500)
    wake = rig.fleet.wake(machine.id)
    await health.pass_time(21.5)
    assert not wake.done()
    await health.pass_time(1.0)
    assert wake.result().code is None
    assert machine.state is MachineState.STARTED and rig.published[-1].failing_ports == (8080,)
    assert machine.row.failures == 0  # it runs: no start is held for that
    assert health.shown(machine) == {"servicecheck-00-http-8080": "critical"}


async def test_checks_hold_a_wake_no_longer_than_its_timeout(health: Health) -> None:
    rig = health.rig
    await rig.load(a_checked_app(wake_timeout_s=4.0))
    machine = rig.machine()
    await health.peer(machine, status=500)
    wake = rig.fleet.wake(machine.id)
    await health.pass_time(4.5)
    assert wake.result().code is None and rig.published[-1].failing_ports == (8080,)


async def test_a_machine_that_ends_before_its_checks_passed_fails_its_wake(health: Health) -> None:
    rig = health.rig
    await rig.load(a_checked_app())
    machine = rig.machine()
    peer = await health.peer(machine, status=500)
    wake = rig.fleet.wake(machine.id)
    await health.pass_time(0.5)
    rig.host.end(machine.id, Exit(code=3))
    await settle()
    assert wake.result().code is Code.START_FAILED and "before its checks passed: exit code 3" in wake.result().detail
    asked = peer.asked
    await health.pass_time(30.0)
    assert peer.asked == asked


async def test_a_stop_cancels_a_wake_that_waits_for_checks(health: Health) -> None:
    rig = health.rig
    await rig.load(a_checked_app())
    machine = rig.machine()
    (await health.peer(machine)).hangs = True
    wake = rig.fleet.wake(machine.id)
    await settle()
    stop = rig.fleet.stop(machine, "user")
    assert stop is not None
    await asyncio.wait_for(stop, SOON_S)
    assert wake.result().code is Code.START_CANCELLED and machine.state is MachineState.STOPPED


async def test_machines_without_checks_are_not_asked_anything(health: Health) -> None:
    await health.rig.load(an_app())
    machine, peer = await health.started()
    await health.pass_time(60.0, 10.0)
    assert peer.asked == 0 and health.checks.checks_of(machine) == []


# --- one result flips


async def test_a_machine_that_fails_is_told_to_workers_until_it_passes_again(health: Health) -> None:
    rig = health.rig
    await rig.load(a_checked_app())
    machine, peer = await health.started()
    version = machine.row.version
    peer.status = 500
    await health.pass_time(10.5)
    failing = rig.published[-1]
    assert (failing.state, failing.failing_ports) == ("started", (8080,)) and failing.version > version
    assert machine.state is MachineState.STARTED and rig.starts(machine) == 1  # it is neither stopped nor restarted
    peer.status = 204
    await health.pass_time(10.5)
    assert rig.published[-1].failing_ports == () and rig.published[-1].version > failing.version
    told = len(rig.published)
    await health.pass_time(60.0)
    assert len(rig.published) == told  # no news, no word


async def test_only_the_port_of_the_failing_service_is_passed_by(health: Health) -> None:
    rig = health.rig
    await rig.load(a_checked_app("web", checked(HTTP, TCP), checked(HTTP, port=9090)))
    machine = rig.machine()
    first, second = await health.peer(machine, 0), await health.peer(machine, 1)
    assert (await health.woken(machine)).code is None
    second.status = 500
    await health.pass_time(10.5)
    assert rig.published[-1].failing_ports == (9090,)
    assert health.shown(machine) == {
        "servicecheck-00-http-8080": "passing",
        "servicecheck-01-tcp-8080": "passing",
        "servicecheck-02-http-9090": "critical",
    }
    assert first.asked < 5


async def test_a_hanging_machine_fails_when_the_time_for_an_answer_is_over(health: Health) -> None:
    rig = health.rig
    await rig.load(a_checked_app("web", checked(dataclasses.replace(HTTP, timeout_s=0.1))))
    machine, peer = await health.started()
    peer.hangs = True
    await health.pass_time(10.5)
    assert rig.published[-1].failing_ports == (8080,)
    (check,) = health.checks.checks_of(machine)
    assert check["output"] == "no answer within 0.1 s" and check["updated_at"].endswith("Z")


async def test_top_level_checks_inform_and_keep_nobody_away(health: Health) -> None:
    rig = health.rig
    alive = NamedCheck("alive", HTTP, None, ())
    other = NamedCheck("other-group", HTTP, 8080, ("worker",))
    await rig.load(a_checked_app("web", a_service(), checks=(alive, other)))
    machine = rig.machine()
    peer = await health.peer(machine, status=500)
    assert (await health.woken(machine)).code is None
    await asyncio.wait_for(health.checks.settle(), SOON_S)
    await health.pass_time(5.0)
    assert health.shown(machine) == {"alive": "critical"}
    assert peer.asked > 1 and all(one.failing_ports == () for one in rig.published)


async def test_a_top_level_check_of_a_port_of_no_service_goes_to_that_port(health: Health) -> None:
    rig = health.rig
    async with await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0) as extra:
        port = extra.sockets[0].getsockname()[1]
        await rig.load(a_checked_app("web", a_service(), checks=(NamedCheck("extra", TCP, port, ("app",)),)))
        machine, _ = await health.started()
        await asyncio.wait_for(health.checks.settle(), SOON_S)
    assert health.shown(machine) == {"extra": "passing"}


# --- machines that rest


async def test_a_stopped_machine_is_not_checked_and_keeps_its_last_result(health: Health) -> None:
    rig = health.rig
    await rig.load(a_checked_app())
    machine, peer = await health.started()
    stop = rig.fleet.stop(machine, "user")
    assert stop is not None
    await stop
    await health.pass_time(60.0, 5.0)
    assert peer.asked == 1 and health.shown(machine) == {"servicecheck-00-http-8080": "passing"}
    peer.status = 500
    wake = rig.fleet.wake(machine.id)
    await health.pass_time(1.0)
    assert not wake.done()  # what it was before the stop counts no more
    peer.status = 200
    await health.pass_time(1.0)
    assert wake.result().code is None


async def suspended(health: Health, machine: Owned) -> None:
    task = health.rig.fleet.suspend(machine, "user")
    assert task is not None
    await task
    assert machine.state is MachineState.SUSPENDED


async def test_a_resumed_machine_takes_requests_at_once_and_is_checked_right_after(health: Health) -> None:
    rig = health.rig
    await rig.load(a_checked_app())
    machine, peer = await health.started()
    await suspended(health, machine)
    await health.pass_time(60.0, 5.0)
    assert peer.asked == 1
    peer.status = 500
    assert rig.fleet.wake(machine.id).done()
    assert machine.state is MachineState.STARTED and rig.published[-1].failing_ports == ()
    await health.pass_time(0.05)
    assert peer.asked == 2 and rig.published[-1].failing_ports == (8080,)


async def test_a_machine_that_was_failing_when_it_was_suspended_still_is_when_it_is_resumed(health: Health) -> None:
    rig = health.rig
    await rig.load(a_checked_app())
    machine, peer = await health.started()
    peer.status = 500
    await health.pass_time(10.5)
    await suspended(health, machine)
    assert rig.fleet.wake(machine.id).done()
    assert rig.published[-1].failing_ports == (8080,)
    peer.status = 200
    await health.pass_time(0.1)
    assert rig.published[-1].failing_ports == ()


async def test_a_new_control_goes_on_with_what_the_last_one_found(health: Health) -> None:
    rig = health.rig
    await rig.load(a_checked_app())
    _, peer = await health.started()
    peer.status = 500
    await health.pass_time(10.5)
    rig.store.flush()
    await health.checks.close()
    await rig.die()
    rig = rig.again()
    after = Health(rig)
    try:
        await rig.load(a_checked_app(), is_first=False)
        adopted = rig.machine()
        assert adopted.record().failing_ports == (8080,) and adopted.record().started_at > 0
        await after.pass_time(1.0)
        assert (
            adopted.record().failing_ports == (8080,)
            and after.shown(adopted)["servicecheck-00-http-8080"] == "critical"
        )
        peer.status = 200
        await after.pass_time(2.0)
        assert adopted.record().failing_ports == ()
    finally:
        await after.close()
        await rig.close()


async def test_machines_that_exist_already_are_checked_too(health: Health) -> None:
    rig = health.rig
    peer = Peer()
    async with await asyncio.start_server(peer._serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        static = StaticMachine("there", (Endpoint(8080, "127.0.0.1", port),))
        await rig.load(a_checked_app("web", driver="static", statics=(static,)))
        await health.pass_time(1.0)
        machine = rig.machine()
        assert health.shown(machine) == {"servicecheck-00-http-8080": "passing"}
        peer.status = 500
        await health.pass_time(10.5)
        assert machine.record().failing_ports == (8080,)


# --- reloads


async def test_a_reload_changes_checks_without_a_restart(health: Health) -> None:
    rig = health.rig
    await rig.load(a_checked_app())
    machine, peer = await health.started()
    peer.status = 500
    await health.pass_time(10.5)
    assert machine.record().failing_ports == (8080,)
    await rig.apps.apply(a_plan(a_checked_app("web", checked(TCP))))
    await health.pass_time(1.0)
    assert health.shown(machine) == {"servicecheck-00-tcp-8080": "passing"}
    assert machine.record().failing_ports == () and rig.starts(machine) == 1
    await rig.apps.apply(a_plan(an_app()))
    asked = peer.asked
    await health.pass_time(30.0, 5.0)
    assert health.checks.checks_of(machine) == [] and peer.asked == asked


async def test_a_check_that_stays_the_same_over_a_reload_keeps_its_result(health: Health) -> None:
    rig = health.rig
    await rig.load(a_checked_app())
    machine, peer = await health.started()
    peer.status = 500
    await health.pass_time(10.5)
    await rig.apps.apply(a_plan(a_checked_app("web", checked(HTTP, TCP))))
    assert machine.record().failing_ports == (8080,)
    assert health.shown(machine)["servicecheck-00-http-8080"] == "critical"


async def test_an_app_that_is_removed_leaves_no_check_behind(health: Health) -> None:
    rig = health.rig
    await rig.load(a_checked_app())
    _, peer = await health.started()
    await rig.apps.apply(a_plan())
    await health.pass_time(1.0)
    asked = peer.asked
    await health.pass_time(60.0, 5.0)
    assert peer.asked == asked and not rig.fleet.all()


# --- many at once


async def test_an_app_whose_machines_all_hang_delays_its_own_checks_alone(health: Health) -> None:
    """A check of this app is never over, and there are more of them than may run at once."""
    rig, count = health.rig, APP_AT_ONCE + 8
    for_ever = dataclasses.replace(HTTP, timeout_s=60.0)
    ill = a_checked_app("ill", checked(for_ever), groups=(GroupPlan("app", ("serve",), count),))
    await rig.load(ill, a_checked_app("well"))
    peers = [(await health.started("ill", index))[1] for index in range(count)]
    machine, peer = await health.started("well")
    for one in peers:
        one.hangs = True
    await rig.clock.advance(30.0)  # type: ignore[attr-defined]  # a FakeClock
    async with asyncio.timeout(SOON_S):
        while sum(one.open for one in peers) < APP_AT_ONCE or peer.asked < 2:
            await asyncio.sleep(0.01)
    assert sum(one.open for one in peers) == APP_AT_ONCE
    assert health.shown(machine) == {"servicecheck-00-http-8080": "passing"}
    for one in peers:
        one.hangs = False
        for writer in list(one._writers):
            writer.transport.abort()
    async with asyncio.timeout(SOON_S):  # those that had to wait have their turn
        while sum(one.asked for one in peers) < 2 * count:
            await asyncio.sleep(0.01)


async def test_moments_of_stopped_machines_do_not_pile_up(health: Health) -> None:
    rig = health.rig
    rare = NamedCheck("rare", dataclasses.replace(TCP, interval_s=86_400.0), None, ())
    await rig.load(a_checked_app("web", a_service(), checks=(rare,)))
    machine, _ = await health.started()
    for _ in range(3000):
        machine.row.state = MachineState.STOPPED
        health.checks.look(machine)
        machine.row.state = MachineState.STARTED
        health.checks.look(machine)
    assert len(health.checks._due) < 2500
    await health.pass_time(1.0)
    assert health.shown(machine) == {"rare": "passing"}


# --- restarts


async def test_a_machine_is_restarted_once_its_checks_have_failed_for_as_long_as_its_app_says(health: Health) -> None:
    rig = health.rig
    await rig.load(a_checked_app(restart_on_checks=30.0))
    machine, peer = await health.started()
    peer.status = 500
    await health.pass_time(38.0)
    assert rig.starts(machine) == 1
    peer.status = 200
    await health.pass_time(10.0)
    assert rig.starts(machine) == 1  # it passed in between
    peer.status = 500
    await health.pass_time(52.0)
    await settle()
    assert rig.starts(machine) == 2 and machine.row.restart_count == 1
    restart = next(event for event in rig.store.events(machine.id, 20) if event.type == "restart")
    assert restart.request is not None and "have failed for 30 s" in restart.request["reason"]
    peer.status = 200
    await health.pass_time(2.0)
    assert machine.state is MachineState.STARTED and machine.record().failing_ports == ()


async def test_nothing_is_restarted_for_its_checks_unless_the_app_says_so(health: Health) -> None:
    rig = health.rig
    await rig.load(a_checked_app())
    machine, peer = await health.started()
    peer.status = 500
    await health.pass_time(1000.0, 10.0)
    assert rig.starts(machine) == 1 and machine.state is MachineState.STARTED


async def test_restarts_for_failing_checks_end_at_the_tries_of_the_restart_policy(health: Health) -> None:
    rig = health.rig
    group = GroupPlan("app", ("serve",), 1, restart_retries=3)
    quick = dataclasses.replace(HTTP, interval_s=1.0, grace_period_s=0.0)
    await rig.load(a_checked_app("web", checked(quick), groups=(group,), restart_on_checks=5.0, wake_timeout_s=3.0))
    machine, peer = await health.started()
    peer.status = 500
    await health.pass_time(120.0, 0.5)
    assert rig.starts(machine) == 4
    assert machine.state is MachineState.STARTED


@pytest.mark.parametrize("who", ["user", "operator's cordon"])
async def test_what_the_user_says_wins_over_a_restart_for_failing_checks(health: Health, who: str) -> None:
    rig = health.rig
    await rig.load(a_checked_app(restart_on_checks=20.0))
    machine, peer = await health.started()
    if who == "user":
        peer.status = 500
        rig.driver.ignores_signals.add(machine.id)  # so that the restart's stop takes its time
        while machine.state is MachineState.STARTED:
            await health.pass_time(0.5)
        stop = rig.fleet.stop(machine, "user")
        assert stop is not None
        await health.pass_time(30.0)
        assert stop.done() and machine.state is MachineState.STOPPED
    else:
        await rig.fleet.cordon(machine)
        peer.status = 500
        await health.pass_time(100.0, 1.0)
        assert machine.state is MachineState.STARTED
    assert rig.starts(machine) == 1


# --- what is told


async def test_checks_never_run_are_shown_as_warnings(health: Health) -> None:
    await health.rig.load(a_checked_app())
    assert health.checks.checks_of(health.rig.machine()) == [
        {
            "name": "servicecheck-00-http-8080", "status": "warning", "output": "not checked yet", "updated_at": None,
        }
    ]  # fmt: skip


async def test_metrics_tell_of_each_check_whether_it_passes(health: Health) -> None:
    rig = health.rig
    await rig.load(a_checked_app("web", checked(HTTP), checks=(NamedCheck("alive", HTTP, None, ()),)))
    machine, _ = await health.started()
    await asyncio.wait_for(health.checks.settle(), SOON_S)
    statuses = [*health.checks.statuses(machine.id), ("bad", "critical"), ("new", "warning")]

    class Source:
        def facts(self) -> NodeFacts:
            facts = MachineFacts("web", machine.id, machine.row.slot, True, "started", None, False, 0, False, statuses)
            return NodeFacts("ams", "node", [AppCells("web", 0)], [facts], 0)

    lines = Metrics(rig.memory, Source()).render().decode().splitlines()
    found = {
        line.partition('check="')[2].partition('"')[0]: line.rpartition(" ")[2]
        for line in lines
        if line.startswith("wakefront_check_passing{")
    }
    assert found == {"servicecheck-00-http-8080": "1.0", "alive": "1.0", "bad": "0.0", "new": "0.0"}


# --- all of it together


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
async def test_whatever_machines_do_what_is_told_of_them_comes_right_in_the_end(health: Health, seed: int) -> None:
    rig, rng, count = health.rig, random.Random(seed), 4
    quick = dataclasses.replace(HTTP, interval_s=1.0, timeout_s=1.0, grace_period_s=1.0)
    group = GroupPlan("app", ("serve",), count)
    await rig.load(a_checked_app("web", checked(quick, TCP), groups=(group,), wake_timeout_s=20.0))
    machines = [rig.machine("web", index) for index in range(count)]
    peers = [await health.peer(machine) for machine in machines]
    for _ in range(80):
        place = rng.randrange(count)
        machine, peer = machines[place], peers[place]
        is_free = machine.flight is None and machine.ending is None
        what = rng.choice(["wake", "wake", "stop", "suspend", "exit", "ill", "well", "hang", "time", "time"])
        if what == "wake":
            rig.fleet.wake(machine.id, "user")
        elif what == "stop":
            rig.fleet.stop(machine, "user")
        elif what == "suspend" and machine.state is MachineState.STARTED and is_free:
            rig.fleet.suspend(machine, "user")
        elif what == "exit" and rig.host.is_running(machine.id):
            rig.host.end(machine.id, Exit(code=0))
        elif what in ("ill", "well"):
            peer.status, peer.hangs = (500 if what == "ill" else 200), False
        elif what == "hang":
            peer.hangs = True
        else:
            await rig.clock.advance(rng.choice([0.0, 0.05, 0.5, 3.0]))  # type: ignore[attr-defined]  # a FakeClock
        if rng.random() < 0.3:
            await asyncio.sleep(0.002)
    for place, peer in enumerate(peers):
        peer.status, peer.hangs = (500 if place % 2 else 200), False
    for _ in range(2):  # a first one may join a start that was cut short
        for machine in machines:
            rig.fleet.wake(machine.id, "user")
        await health.pass_time(25.0)
    assert [machine.state for machine in machines] == [MachineState.STARTED] * count
    assert [machine.record().failing_ports for machine in machines] == [(), (8080,)] * (count // 2)
    last = {one.id: one for one in rig.published}
    assert [last[machine.id] for machine in machines] == [machine.record() for machine in machines]
    await asyncio.wait_for(health.checks.settle(), SOON_S)
    assert health.checks._running == 0 and not health.checks._apps
