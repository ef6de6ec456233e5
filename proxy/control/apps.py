"""The apps of this node: from the plan to the records workers get, and from one plan to the next.

Each app and machine has a slot in shared memory that it keeps as long as it exists, over restarts of control. Slots
that never were used are given first; one that was is given again only when its row sums to zero, after its machine has
ended and every worker was told.

On a reload, machines of removed apps (and those over the count) leave the table at once, finish what they have, and are
stopped. A changed command or environment takes effect at a machine's next start; running machines are restarted one by
one, through the stop handshake while they are idle, and without it when they are still in use after the drain time.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from proxy import ipc
from proxy.clock import Clock, spawn
from proxy.control.idle import Pool
from proxy.control.link import Hub, app_frame
from proxy.control.machines import Fleet, Owned
from proxy.control.plan import AppPlan, GroupPlan, NodePlan
from proxy.control.specs import digest_of, machine_id, make_spec
from proxy.control.store import MachineRow, Store
from proxy.machines import proc
from proxy.machines.driver import Running
from proxy.machines.ports import choose_port
from proxy.model import App, AppName, MachineId, MachineState
from proxy.state import APP_SLOTS, MACHINE_SLOTS, SharedMemory

log = logging.getLogger(__name__)

_SNAPSHOT_PAUSE_S = 0.05
_NAMES_PAUSE_S = 0.02
_SLICE = 64  # apps told between two turns of the loop
_MADE_AT_ONCE = 8  # a new app costs 0.5 ms: ports are tried, slots written
_RETIRE_POLL_S = 0.1


@dataclass(slots=True)
class Entry:
    """One app."""

    plan: AppPlan
    slot: int
    machines: list[Owned] = field(default_factory=list)
    added: tuple[str, ...] = ()  # host names beside the configured ones
    frame: bytes | None = None  # the AppSet of now, until something changes

    def record(self) -> App:
        plan = self.plan
        return App(
            name=plan.name, hostnames=plan.hostnames + self.added, services=plan.services,
            machines=tuple(machine.record() for machine in self.machines), slot=self.slot, wake_on=plan.wake_on,
            wake_timeout_s=plan.wake_timeout_s, primary_region=plan.primary_region, limits=plan.limits,
            balance=plan.balance, sticky=plan.sticky, access=plan.access, wake_rules=plan.wake_rules,
            organization=plan.organization, replay_sources=plan.replay_sources, keeps_bodies=plan.keeps_bodies,
            wake=plan.wake,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Changes:
    """What a reload came to."""

    added: tuple[AppName, ...] = ()
    changed: tuple[AppName, ...] = ()
    removed: tuple[AppName, ...] = ()


def _names_of(app: AppName) -> str:
    return f"names of {app}"


class Apps:
    """All apps by name."""

    def __init__(
        self, store: Store, fleet: Fleet, hub: Hub, memory: SharedMemory, clock: Clock, rng: random.Random,
        snapshot_path: str,
    ) -> None:  # fmt: skip
        self._store = store
        self._fleet = fleet
        self._hub = hub
        self._memory = memory
        self._clock = clock
        self._rng = rng
        self._snapshot_path = snapshot_path
        self._entries: dict[AppName, Entry] = {}
        self._app_slots = store.app_slots()
        self._machine_slots: set[int] = set()  # in use
        self._spent_slots: dict[int, None] = {}  # were in use since this control began, oldest first
        self._ports: set[int] = set()
        self._retiring: dict[MachineId, tuple[asyncio.Task[None], asyncio.Event]] = {}
        self._roller: asyncio.Task[None] | None = None
        self._to_roll: dict[MachineId, None] = {}
        self._changed = asyncio.Event()
        self.plan: NodePlan | None = None
        self.warnings: dict[str, str] = {}  # app, or its names -> why part of it is not there
        self.added_to: Callable[[AppName], tuple[str, ...]] = lambda name: ()
        self._renamed: set[AppName] = set()  # apps whose added names workers are to be told of
        self._telling: asyncio.Future[None] | None = None
        self._names_told_at = 0.0
        self._elsewhere: dict[AppName, App] = {}  # apps of other nodes that this one serves too, without machines
        self.on_local: Callable[[AppName], None] = lambda name: None  # an app of this node, or a machine, changed
        self.elsewhere: Callable[[], list[bytes]] = list  # frames about other nodes, for a worker's table
        fleet.on_change = self._machine_changed

    # --- what there is

    def get(self, name: str) -> Entry | None:
        return self._entries.get(AppName(name))

    def all(self) -> list[Entry]:
        return list(self._entries.values())

    def names(self) -> list[AppName]:
        return list(self._entries)

    def table_names(self) -> list[AppName]:
        """All that workers know: apps of this node, and those that only others have."""
        return [*self._entries, *(name for name in self._elsewhere if name not in self._entries)]

    def frame(self, name: AppName) -> bytes | None:
        entry = self._entries.get(name)
        if entry is None:
            app = self._elsewhere.get(name)
            return None if app is None else app_frame(app)
        if entry.frame is None:
            entry.frame = app_frame(entry.record())
        return entry.frame

    def set_elsewhere(self, app: App) -> None:
        """Serve an app that other nodes have. Where this node has it too, its own word counts."""
        known = self._elsewhere.get(app.name)
        self._elsewhere[app.name] = app = dataclasses.replace(app, machines=(), slot=self._app_slot(app.name))
        if app != known and app.name not in self._entries:
            self._hub.set_app(app_frame(app))
            self._changed.set()

    def drop_elsewhere(self, name: AppName) -> None:
        if self._elsewhere.pop(name, None) is not None and name not in self._entries:
            self._hub.remove_app(name)
            self._changed.set()

    def is_elsewhere(self, host: str) -> bool:
        """Whether a host name is of an app that only other nodes have."""
        return any(host in app.hostnames for name, app in self._elsewhere.items() if name not in self._entries)

    def pools(self) -> Iterator[Pool]:
        """What idle.py weighs."""
        for entry in self.all():
            groups = {machine.row.group for machine in entry.machines}
            for group in groups:
                machines = tuple(machine for machine in entry.machines if machine.row.group == group)
                yield Pool(entry.plan, group, machines)

    async def names_changed(self, name: AppName) -> None:
        """Names were added to an app, or removed: return when workers are told, of all that come close together."""
        if self._telling is None:
            self._telling = asyncio.get_running_loop().create_future()
            wait = self._names_told_at + _NAMES_PAUSE_S - self._clock.monotonic()
            asyncio.get_running_loop().call_later(max(0.0, wait), self._tell_names, self._telling)
        self._renamed.add(name)
        await asyncio.shield(self._telling)

    def _tell_names(self, telling: asyncio.Future[None]) -> None:
        renamed, self._renamed, self._telling = self._renamed, set(), None
        self._names_told_at = self._clock.monotonic()
        try:
            for name in renamed:
                if (entry := self._entries.get(name)) is not None:
                    self._tell_names_of(entry)
        finally:  # whatever became of one app's names, nobody waits for ever
            telling.set_result(None)

    def _tell_names_of(self, entry: Entry) -> None:
        name, before, added = entry.plan.name, entry.added, self.added_to(entry.plan.name)
        if added == before:
            return
        entry.added = added
        try:
            frame = app_frame(entry.record())
        except ValueError as error:  # more names than a frame has room for: workers go on with those they know
            entry.added = before
            self.warnings[_names_of(name)] = f"workers are not told of a change: {error}"
            log.error("%s: %s", _names_of(name), self.warnings[_names_of(name)])
            return
        self.warnings.pop(_names_of(name), None)
        entry.frame = frame
        self._hub.set_app(frame)
        self.on_local(name)
        self._changed.set()

    # --- the first load

    async def load(self, plan: NodePlan, is_first_control: bool) -> None:
        """Take over: machines of the store and of the host are joined with what is configured."""
        self.plan = plan
        rows = {row.id: row for row in self._store.machines()}
        found = await asyncio.to_thread(self._find)
        self._machine_slots = {row.slot for row in rows.values()}
        self._ports = {port for row in rows.values() for port in row.ports.values()}
        self._ports.add(plan.admin_port)  # not bound yet
        for place, app in enumerate(plan.apps):
            entry = Entry(app, self._app_slot(app.name), added=self.added_to(app.name))
            self._entries[app.name] = entry
            for group, index, one in self._wanted(app):
                row = rows.pop(one, None)
                if row is None and (running := found.get(one)) is not None and app.driver != "static":
                    row = self._recalled(app, group, index, one, running)
                if (machine := self._own(app, group, index, one, row)) is not None:
                    entry.machines.append(machine)
                    self._fleet.adopt(machine, found.pop(one, None))
                    self._fix_digest(machine)
            if place % _MADE_AT_ONCE == 0:
                await asyncio.sleep(0)
        for row in rows.values():
            self._forget_row(row)
        for one, running in found.items():
            log.warning("machine %s (pid %d) is no longer configured: stopping it", one, running.pid)
            spawn(self._fleet.driver("process").stop_stray(one, running, 10.0), f"stop stray {one}")
        self._begin_always_on(is_first_control)
        self._changed.set()

    def _find(self) -> dict[MachineId, Running]:
        return self._fleet.driver("process").find_machines()

    def _recalled(self, app: AppPlan, group: GroupPlan, index: int, one: MachineId, running: Running) -> MachineRow:
        """A machine that runs but of which the store knows nothing: its ports are in its environment."""
        environment = proc.environment(running.pid)
        ports = {}
        for internal in app.internal_ports(group.name):
            text = proc.variable(environment, f"PORT_{internal}")
            if text is not None and text.isdecimal():
                ports[internal] = int(text)
        row = self._new_row(app, group, index, one)
        row.ports, row.state = ports, MachineState.STARTED
        self._ports.update(ports.values())
        return row

    def _fix_digest(self, machine: Owned) -> None:
        """A machine that runs an older version of its spec is due to be replaced."""
        if machine.running is not None and machine.row.digest != digest_of(machine.spec) and not machine.is_static:
            machine.next_spec = machine.spec
            self._roll_later(machine)

    def _forget_row(self, row: MachineRow) -> None:
        self._store.delete_machine(row.id)
        self._machine_slots.discard(row.slot)
        self._spent_slots[row.slot] = None
        self._ports.difference_update(row.ports.values())

    def _begin_always_on(self, is_first_control: bool) -> None:
        """Start what runs from the beginning. A later control starts only what is new."""
        assert self.plan is not None
        for entry in self._entries.values():
            for machine in entry.machines:
                if not entry.plan.is_always_on(machine.row.group, machine.row.index, self.plan.region):
                    continue
                is_new = machine.state is MachineState.CREATED
                is_ours_to_start = is_first_control and machine.row.stopped_by != "user"
                if machine.state.is_startable and (is_new or is_ours_to_start):
                    self._fleet.wake(machine.id, "flyd")

    # --- from one plan to the next

    async def apply(self, plan: NodePlan) -> Changes:
        """Swap in a new plan. Only apps that differ are touched."""
        self.plan = plan
        new = {app.name: app for app in plan.apps}
        removed = [name for name in self._entries if name not in new]
        added = [name for name in new if name not in self._entries]
        changed = [name for name, app in new.items() if name in self._entries and self._entries[name].plan != app]
        for name in removed:
            self._remove(name)
        for place, name in enumerate((*added, *changed)):
            entry = self._entries.get(name)
            if entry is None:
                entry = self._entries[name] = Entry(new[name], self._app_slot(name))
            entry.plan = new[name]
            entry.added = self.added_to(name)
            await self._fill(entry)
            if place % _MADE_AT_ONCE == 0:
                await asyncio.sleep(0)
        if self._hub.settings != plan.settings:
            self._hub.set_settings(plan.settings)
        self._begin_always_on(False)
        self._changed.set()
        return Changes(tuple(added), tuple(changed), tuple(removed))

    def _remove(self, name: AppName) -> None:
        entry = self._entries.pop(name)
        self.warnings.pop(name, None)
        self.warnings.pop(_names_of(name), None)
        if (app := self._elsewhere.get(name)) is not None:
            self._hub.set_app(app_frame(app))
        else:
            self._hub.remove_app(name)
        self.on_local(name)
        for machine in entry.machines:
            self._retire(machine)

    async def _fill(self, entry: Entry) -> None:
        """Make an app's machines be what its plan says, and tell workers."""
        old = {machine.id: machine for machine in entry.machines}
        machines = []
        for group, index, one in self._wanted(entry.plan):
            machine = old.get(one)
            if machine is not None and machine.is_static == (entry.plan.driver == "static"):
                del old[one]
                self._update(machine, entry.plan, group)
            else:
                await self._await_retired(one)
                machine = self._own(entry.plan, group, index, one, None)
            if machine is not None:
                machines.append(machine)
        entry.machines = machines
        for machine in old.values():
            self._retire(machine)
        entry.frame = None
        frame = self.frame(entry.plan.name)
        assert frame is not None
        self._hub.set_app(frame)
        self.on_local(entry.plan.name)

    def _update(self, machine: Owned, app: AppPlan, group: GroupPlan) -> None:
        assert self.plan is not None
        machine.app, machine.group = app, group
        self._fleet.health.look(machine)
        try:
            self._give_ports(machine.row, app, group)
        except OSError as error:
            self.warnings[app.name] = str(error)
            return
        spec = make_spec(self.plan, app, group, machine.id, machine.row.ports)
        if digest_of(spec) == digest_of(machine.next_spec or machine.spec):
            return
        if machine.state.is_startable and machine.state is not MachineState.SUSPENDED and machine.flight is None:
            machine.spec, machine.next_spec = spec, None
        elif machine.is_static:
            machine.spec = spec
        else:
            machine.next_spec = spec
            self._roll_later(machine)
        machine.driver.prepare(spec)

    def _own(self, app: AppPlan, group: GroupPlan, index: int, one: MachineId, row: MachineRow | None) -> Owned | None:
        """A machine with its slot and ports; None, with a warning, if there are none left."""
        assert self.plan is not None
        try:
            row = row or self._new_row(app, group, index, one)
            self._give_ports(row, app, group)
        except (OSError, RuntimeError) as error:
            self.warnings[app.name] = f"machine {index} of group {group.name} is not there: {error}"
            log.error("%s: %s", app.name, self.warnings[app.name])
            return None
        row.group, row.index, row.app = group.name, index, app.name
        driver = self._fleet.driver(app.driver)
        spec = make_spec(self.plan, app, group, one, row.ports)
        machine = Owned(row, app, group, spec, driver, self.plan.region)
        machine.admitted = self._memory.admitted(row.slot)
        self._fleet.add(machine)
        if not machine.is_static:
            driver.prepare(spec)
        return machine

    def _wanted(self, app: AppPlan) -> Iterator[tuple[GroupPlan, int, MachineId]]:
        assert self.plan is not None
        if app.driver == "static":
            group = next((group for group in app.groups if group.count), None)
            for index, static in enumerate(app.statics if group is not None else ()):
                assert group is not None
                yield group, index, MachineId(static.id)
            return
        for group in app.groups:
            for index in range(group.count):
                yield group, index, machine_id(self.plan.identity, app.name, group.name, index)

    # --- slots and ports

    def _app_slot(self, name: AppName) -> int:
        slot = self._app_slots.get(name)
        if slot is not None:
            return slot
        used = set(self._app_slots.values())
        slot = next((slot for slot in range(APP_SLOTS) if slot not in used), None)
        if slot is None:  # all were given once: take that of an app that is gone
            gone = next((name for name in self._app_slots if AppName(name) not in self._entries), None)
            if gone is None:
                raise RuntimeError(f"more than {APP_SLOTS} apps on one node")
            slot = self._app_slots.pop(gone)
            self._store.delete_app(gone)
        self._app_slots[name] = slot
        self._store.save_app_slot(name, slot)
        return slot

    def _new_row(self, app: AppPlan, group: GroupPlan, index: int, one: MachineId) -> MachineRow:
        slot = self._machine_slot()
        self._machine_slots.add(slot)
        self._spent_slots.pop(slot, None)
        now = self._clock.unix()
        return MachineRow(one, app.name, group.name, index, slot, created_at=now, updated_at=now)

    def _machine_slot(self) -> int:
        taken = self._machine_slots
        for slot in range(MACHINE_SLOTS):
            if slot not in taken and slot not in self._spent_slots and self._memory.in_flight(slot) == 0:
                return slot
        for slot in self._spent_slots:
            if self._memory.in_flight(slot) == 0:
                return slot
        raise RuntimeError(f"more than {MACHINE_SLOTS} machines on one node")

    def _give_ports(self, row: MachineRow, app: AppPlan, group: GroupPlan) -> None:
        if app.driver == "static" or app.own_network:
            return
        wanted = app.internal_ports(group.name)
        for internal in [internal for internal in row.ports if internal not in wanted]:
            self._ports.discard(row.ports.pop(internal))
        for internal in wanted:
            if internal not in row.ports:
                row.ports[internal] = choose_port(self._ports, self._rng)
                self._ports.add(row.ports[internal])

    # --- machines that leave

    def _retire(self, machine: Owned) -> None:
        hurry = asyncio.Event()
        machine.is_leaving = True
        task = spawn(self._retire_steps(machine, hurry), f"retire {machine.id}")
        self._retiring[machine.id] = task, hurry

    async def _retire_steps(self, machine: Owned, hurry: asyncio.Event) -> None:
        """No worker sends it anything new; it finishes what it has, then it is stopped and forgotten."""
        assert self.plan is not None
        limit = self._clock.monotonic() + self.plan.drain_timeout_s
        if not machine.is_static:
            self._hub.end_tunnels(machine)
        while self._memory.in_flight(machine.row.slot) > 0 and self._clock.monotonic() < limit and not hurry.is_set():
            await self._clock.sleep(_RETIRE_POLL_S)
        await self._fleet.remove(machine)
        self._machine_slots.discard(machine.row.slot)
        self._spent_slots[machine.row.slot] = None
        self._ports.difference_update(machine.row.ports.values())
        self._retiring.pop(machine.id, None)

    async def _await_retired(self, one: MachineId) -> None:
        """A machine that is on its way out comes back: let the old one end first."""
        if (found := self._retiring.get(one)) is not None:
            task, hurry = found
            hurry.set()
            await asyncio.wait({task})

    # --- machines that are replaced

    def _roll_later(self, machine: Owned) -> None:
        self._to_roll[machine.id] = None
        if self._roller is None or self._roller.done():
            self._roller = spawn(self._roll(), "roll out changes")

    async def _roll(self) -> None:
        while self._to_roll:
            one = next(iter(self._to_roll))
            del self._to_roll[one]
            machine = self._fleet.get(one)
            if machine is not None and machine.next_spec is not None:
                await self._replace(machine)

    async def _replace(self, machine: Owned) -> None:
        assert self.plan is not None
        if machine.flight is not None:
            await asyncio.wait({machine.flight.result})
        was_started = machine.state is MachineState.STARTED
        end = self._fleet.stop(machine, "flyd", drain_s=self.plan.drain_timeout_s)
        if end is not None:
            await asyncio.wait({end})
        if was_started and machine.next_spec is not None:
            await asyncio.wait({self._fleet.wake(machine.id, "flyd")})

    # --- publishing

    def _machine_changed(self, machine: Owned) -> None:
        entry = self._entries.get(machine.app.name)
        if entry is None or machine not in entry.machines:
            return
        entry.frame = None
        self._hub.set_machine(machine.app.name, machine.record())
        self.on_local(machine.app.name)
        self._changed.set()

    async def keep_snapshot(self) -> None:
        """Write the table for workers that start while no control is there, soon after each change."""
        while True:
            await self._changed.wait()
            await self._clock.sleep(_SNAPSHOT_PAUSE_S)
            self._changed.clear()
            frames = await self._frames()
            try:
                await asyncio.to_thread(_write, self._snapshot_path, frames)
            except OSError as error:
                log.error("the table snapshot cannot be written: %s", error)

    async def _frames(self) -> list[bytes]:
        names = self.table_names()
        frames = [ipc.encode(self._hub.settings), ipc.encode(ipc.TableStart(len(names))), *self.elsewhere()]
        for place, name in enumerate(names):
            if (frame := self.frame(name)) is not None:
                frames.append(frame)
            if place % _SLICE == _SLICE - 1:
                await asyncio.sleep(0)
        frames.append(ipc.encode(ipc.TableEnd()))
        return frames


def _write(path: str, frames: Iterable[bytes]) -> None:
    descriptor = os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.writelines(frames)
    os.replace(path + ".new", path)
