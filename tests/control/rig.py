"""A fleet with fake machines, a clock that the test moves, and real sockets where machines are to listen."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from proxy.clock import Clock
from proxy.control.apps import Apps
from proxy.control.link import Hub
from proxy.control.machines import Fleet, Owned
from proxy.control.plan import AppPlan, GroupPlan, NodePlan
from proxy.control.prober import plain_socket
from proxy.control.store import Store
from proxy.ipc import PROTOCOL, Settings
from proxy.machines.static import StaticDriver
from proxy.model import AppName, Autostop, Machine, MachineState, Port, RegionCode, Service
from proxy.state import SharedMemory
from tests.support.clock import FakeClock
from tests.support.fake_driver import FakeDriver, FakeHost


def a_service(
    port: int = 8080, autostop: Autostop = Autostop.STOP, least: int = 0, soft: int = 2, autostart: bool = True
) -> Service:
    ports = (Port(80, 80, ("http",)),)
    return Service(
        "tcp", port, ports, autostop=autostop, min_machines_running=least, soft_limit=soft, autostart=autostart
    )


def an_app(name: str = "web", count: int = 1, services: tuple[Service, ...] | None = None, **more: object) -> AppPlan:
    group = GroupPlan("app", ("serve", "{port}"), count)
    values: dict[str, object] = {
        "name": AppName(name),
        "hostnames": (f"{name}.apps.localhost",),
        "services": (a_service(),) if services is None else services,
        "groups": (group,),
        "wake_timeout_s": 10.0,
        "kill_timeout_s": 5.0,
    }
    return AppPlan(**(values | more))  # type: ignore[arg-type]  # the keys are those of AppPlan


def a_plan(*apps: AppPlan, data_dir: str = "/nonexistent") -> NodePlan:
    settings = Settings(PROTOCOL, "node", "ams", "apps.localhost")
    return NodePlan(
        "node",
        RegionCode("ams"),
        "apps.localhost",
        data_dir,
        "127.0.0.1",
        0,
        settings,
        apps,
        identity="0123456789abcdef",
    )


@dataclass(slots=True)
class FakeCordons:
    """Workers that acknowledge at once, or when the test says so."""

    acknowledge: bool = True
    gate: asyncio.Event | None = None
    asked: list[str] = field(default_factory=list)
    lifted: list[tuple[str, str]] = field(default_factory=list)  # machine and the state it was in then
    ended_tunnels: list[tuple[str, str]] = field(default_factory=list)  # the same
    handed_on: list[tuple[str, str, int]] = field(default_factory=list)  # the same, and the internal port
    on_cordon: Callable[[Owned], None] = lambda machine: None

    async def cordon(self, machine: Owned) -> bool:
        self.asked.append(machine.id)
        if self.gate is not None:
            await self.gate.wait()
        self.on_cordon(machine)
        return self.acknowledge

    def lift(self, machine: Owned) -> None:
        self.lifted.append((machine.id, machine.row.state))

    def end_tunnels(self, machine: Owned) -> None:
        self.ended_tunnels.append((machine.id, machine.row.state))

    def hand_on(self, machine: Owned, internal_port: int, sock: socket.socket) -> None:
        assert sock.getpeername()[1] == machine.record().endpoint(internal_port).port
        self.handed_on.append((machine.id, machine.row.state, internal_port))


class Rig:
    """One life of control. `again` gives the next one, over the same store, host and memory."""

    def __init__(
        self, folder: Path, host: FakeHost | None = None, memory: SharedMemory | None = None, clock: Clock | None = None
    ) -> None:
        self.folder = folder
        self.clock = clock or FakeClock()
        self.host = host or FakeHost()
        self.driver = FakeDriver(self.host, self.clock)
        self.memory = memory or _memory()
        self.store = Store(str(folder / "wakefront.db"))
        self.cordons = FakeCordons()
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self.epoch = self.store.next_epoch(self.clock.unix())
        self.fleet = Fleet(
            {"process": self.driver, "static": StaticDriver()}, self.store, self.memory, self.clock, self.cordons,
            plain_socket, self.epoch,
        )  # fmt: skip
        self.hub = Hub(self.listener, self.memory, self.clock, a_plan().settings)
        rng = random.Random(os.getpid())  # ports of its own for each of several runs at the same time
        snapshot = str(folder / "table.msgpack")
        self.apps = Apps(self.store, self.fleet, self.hub, self.memory, self.clock, rng, snapshot)
        self.published: list[Machine] = []
        forward = self.fleet.on_change

        def on_change(machine: Owned) -> None:
            self.published.append(machine.record())
            forward(machine)

        self.fleet.on_change = on_change
        self.servers: list[socket.socket] = []

    async def load(self, *apps: AppPlan, is_first: bool = True) -> None:
        await self.apps.load(a_plan(*apps), is_first)

    def machine(self, app: str = "web", index: int = 0) -> Owned:
        entry = self.apps.get(app)
        assert entry is not None
        return entry.machines[index]

    def listen(self, machine: Owned, place: int = 0) -> None:
        """Have something listen where the machine should."""
        endpoint = (machine.next_spec or machine.spec).endpoints[place]
        server = socket.create_server((endpoint.host, endpoint.port))
        self.servers.append(server)

    def starts(self, machine: Owned) -> int:
        return self.driver.calls.count(("start", machine.id))

    def begin_request(self, machine: Owned, worker: int = 0) -> None:
        base = self.memory.load_base(worker) + 2 * machine.row.slot
        self.memory.cells[base] += 1
        self.memory.cells[base + 1] += 1

    def end_request(self, machine: Owned, worker: int = 0) -> None:
        self.memory.cells[self.memory.load_base(worker) + 2 * machine.row.slot] -= 1

    async def started(self, app: str = "web", index: int = 0) -> Owned:
        """A machine that listens and was woken."""
        machine = self.machine(app, index)
        self.listen(machine)
        result = await asyncio.shield(self.fleet.wake(machine.id))
        assert result.code is None, result
        assert machine.state is MachineState.STARTED
        return machine

    async def die(self) -> None:
        """End as if killed: nothing is told to anybody."""
        self.fleet.halt()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task() and _is_ours(task)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.driver.close()
        self.store.close()
        self.close_sockets()

    def again(self) -> Rig:
        return Rig(self.folder, self.host, self.memory, self.clock)

    def close_sockets(self) -> None:
        self.listener.close()
        while self.servers:
            self.servers.pop().close()

    async def close(self) -> None:
        for machine in self.fleet.all():
            if machine.flight is not None:
                machine.flight.cut_short("stop")
        await self.die()


_OURS = ("wake", "stop", "suspend", "restart", "recheck", "probe", "retire", "roll", "idle", "table", "snapshot")


def _is_ours(task: asyncio.Task[object]) -> bool:
    return task.get_name().startswith(_OURS)


def _memory(workers: int = 2) -> SharedMemory:
    fd, memory = SharedMemory.create(workers)
    os.close(fd)  # the map stays
    return memory
