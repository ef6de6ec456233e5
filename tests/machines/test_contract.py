"""What control may rely on, held by every driver that has machines of its own: the process driver and the fake."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proxy.machines.driver import Driver, DriverError, Exit, MachineSpec, Running
from proxy.machines.process import ProcessDriver
from proxy.machines.static import StaticDriver
from proxy.model import MachineId
from tests.machines.support import Exits, driver_at, spec, started, until
from tests.support.fake_driver import FakeDriver


@pytest.fixture(params=["process", "fake"])
async def driver(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Driver]:
    if request.param == "fake":
        yield FakeDriver()
        return
    async with driver_at(tmp_path) as (real, _):
        yield real


@pytest.fixture
def exits(driver: Driver) -> Exits:
    listener = Exits()
    driver.set_on_exit(listener)
    return listener


@pytest.fixture
def machine(tmp_path: Path) -> MachineSpec:
    return spec(tmp_path, "sleep", "1000")


class TestDriver:
    async def test_start_tells_of_the_process_before_it_returns_the_same(
        self, driver: Driver, machine: MachineSpec
    ) -> None:
        forked: list[Running] = []
        running = await driver.start(machine, forked.append)
        assert forked == [running]
        assert running.pid > 0
        assert running.start_ticks > 0

    async def test_preparing_twice_and_starting_makes_one_machine(self, driver: Driver, machine: MachineSpec) -> None:
        driver.prepare(machine)
        driver.prepare(machine)
        running = await driver.start(machine, started)
        await until(lambda: driver.find_machines() == {machine.id: running}, "it is found")

    async def test_a_second_start_finds_the_first_ones_machine(self, driver: Driver, machine: MachineSpec) -> None:
        forked: list[Running] = []
        first = await driver.start(machine, forked.append)
        assert await driver.start(machine, forked.append) == first
        assert forked == [first, first]

    async def test_stop_returns_after_the_exit_was_reported_with_its_signal(
        self, driver: Driver, machine: MachineSpec, exits: Exits
    ) -> None:
        running = await driver.start(machine, started)
        await driver.stop(machine.id, signal.SIGINT, 5)
        assert exits.all == [(machine.id, running, Exit(signal=signal.SIGINT))]

    async def test_stopping_twice_or_a_stranger_does_nothing(
        self, driver: Driver, machine: MachineSpec, exits: Exits
    ) -> None:
        await driver.stop(MachineId("stranger"), signal.SIGTERM, 5)
        await driver.start(machine, started)
        await driver.stop(machine.id, signal.SIGTERM, 5)
        await driver.stop(machine.id, signal.SIGTERM, 5)
        assert len(exits.all) == 1

    async def test_a_machine_that_was_forgotten_is_gone_and_can_start_anew(
        self, driver: Driver, machine: MachineSpec, exits: Exits
    ) -> None:
        first = await driver.start(machine, started)
        await driver.stop(machine.id, signal.SIGTERM, 5)
        driver.forget(machine.id)
        driver.forget(machine.id)
        assert driver.find_machines() == {}
        assert driver.stats(machine.id) is None
        assert await driver.start(machine, started) != first

    async def test_suspend_and_resume_may_be_repeated(self, driver: Driver, machine: MachineSpec) -> None:
        await driver.start(machine, started)
        for _ in range(2):
            await driver.suspend(machine.id)
            await driver.suspend(machine.id)
            await driver.resume(machine.id)
            await driver.resume(machine.id)
        assert driver.stats(machine.id) is not None

    async def test_it_starts_within_one_call(self, driver: Driver, machine: MachineSpec, exits: Exits) -> None:
        running = driver.start_at_once(machine)
        assert running is not None
        await until(lambda: driver.find_machines() == {machine.id: running}, "it is found")
        await driver.stop(machine.id, signal.SIGTERM, 5)
        assert exits.all == [(machine.id, running, Exit(signal=signal.SIGTERM))]

    async def test_one_that_was_suspended_can_be_resumed_within_one_call(
        self, driver: Driver, machine: MachineSpec
    ) -> None:
        assert not driver.resume_at_once(machine.id)
        await driver.start(machine, started)
        await driver.suspend(machine.id)
        assert driver.is_frozen(machine.id)
        assert driver.resume_at_once(machine.id)
        assert not driver.is_frozen(machine.id)
        assert driver.resume_at_once(machine.id)

    async def test_one_that_has_ended_is_known_to_before_it_is_told_how(
        self, driver: Driver, machine: MachineSpec, exits: Exits
    ) -> None:
        await driver.start(machine, started)
        assert not driver.has_ended(machine.id)
        await driver.stop(machine.id, signal.SIGTERM, 5)
        assert len(exits.all) == 1 and not driver.has_ended(machine.id), "what was told is awaited no more"
        driver.forget(machine.id)
        assert not driver.has_ended(machine.id)

    async def test_a_suspended_machine_can_be_stopped(self, driver: Driver, machine: MachineSpec, exits: Exits) -> None:
        await driver.start(machine, started)
        await driver.suspend(machine.id)
        await driver.stop(machine.id, signal.SIGTERM, 5)
        assert exits.all[0][2] == Exit(signal=signal.SIGTERM)

    async def test_what_does_not_run_can_be_neither_suspended_nor_resumed(
        self, driver: Driver, machine: MachineSpec
    ) -> None:
        with pytest.raises(DriverError, match=f"{machine.id} is not running"):
            await driver.suspend(machine.id)
        with pytest.raises(DriverError, match=f"{machine.id} is not running"):
            await driver.resume(machine.id)

    async def test_nothing_is_adopted_where_nothing_runs(self, driver: Driver, machine: MachineSpec) -> None:
        assert driver.adopt(machine, None) is None
        assert driver.adopt(machine, Running(2**22 - 1, 1)) is None

    async def test_an_exit_of_nobodys_is_not_taken(self, driver: Driver, machine: MachineSpec) -> None:
        await driver.start(machine, started)
        assert not driver.exited_elsewhere(2**22 - 1, Exit(code=0))

    async def test_close_leaves_machines_running_for_the_next_driver(
        self, driver: Driver, machine: MachineSpec, tmp_path: Path
    ) -> None:
        running = await driver.start(machine, started)
        await driver.close()
        successor: Driver = FakeDriver(driver.host) if isinstance(driver, FakeDriver) else ProcessDriver(str(tmp_path))
        exits = Exits()
        successor.set_on_exit(exits)
        assert successor.find_machines() == {machine.id: running}
        assert successor.adopt(machine, running) == running
        await successor.stop(machine.id, signal.SIGTERM, 5)
        assert exits.all == [(machine.id, running, Exit(signal=signal.SIGTERM))]
        successor.forget(machine.id)
        await successor.close()

    async def test_a_stray_is_ended_without_a_report(
        self, driver: Driver, machine: MachineSpec, tmp_path: Path
    ) -> None:
        running = await driver.start(machine, started)
        await driver.close()
        successor: Driver = FakeDriver(driver.host) if isinstance(driver, FakeDriver) else ProcessDriver(str(tmp_path))
        exits = Exits()
        successor.set_on_exit(exits)
        await successor.stop_stray(machine.id, running, 5)
        assert successor.find_machines() == {}
        assert exits.all == []
        await successor.close()


class TestStaticDriver:
    async def test_its_machines_run_whatever_control_does(self, tmp_path: Path) -> None:
        driver: Driver = StaticDriver()
        machine = spec(tmp_path)
        forked: list[Running] = []
        running = await driver.start(machine, forked.append)
        assert forked == [running] == [driver.adopt(machine, None)]
        driver.prepare(machine)
        driver.forget(machine.id)
        driver.release(machine.id)
        await driver.resume(machine.id)
        assert not driver.exited_elsewhere(1, Exit())
        assert driver.find_machines() == {}
        assert driver.stats(machine.id) is None
        await driver.close()

    async def test_what_it_cannot_do_it_refuses_with_a_reason(self, tmp_path: Path) -> None:
        driver = StaticDriver()
        machine = MachineId("db")
        assert not driver.can_suspend
        with pytest.raises(DriverError, match="db is static"):
            await driver.stop(machine, signal.SIGTERM, 5)
        with pytest.raises(DriverError, match="db is static"):
            await driver.suspend(machine)
        with pytest.raises(DriverError, match="db is static"):
            await driver.stop_stray(machine, Running(0, 0), 5)
