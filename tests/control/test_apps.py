"""From a plan to records, and from one plan to the next."""

from __future__ import annotations

import asyncio
import dataclasses
import random

import pytest

from proxy import ipc
from proxy.clock import spawn
from proxy.control.machines import Owned
from proxy.control.plan import GroupPlan, MountPlan, StaticMachine, keep_plan, kept_plan
from proxy.control.specs import digest_of, machine_id, make_spec, with_version
from proxy.errors import Code
from proxy.machines.driver import Exit
from proxy.machines.ports import choose_port
from proxy.model import AppName, Autostop, Endpoint, MachineId, MachineState
from tests.control.rig import Rig, a_plan, a_service, an_app
from tests.support.clock import settle


def environment(machine: Owned) -> dict[str, str]:
    return dict(machine.spec.env)


# --- specs


def test_machine_ids_are_14_hex_digits_and_stable() -> None:
    one = machine_id("node", AppName("web"), "app", 0)
    assert len(one) == 14 and int(one, 16) >= 0
    assert one == machine_id("node", AppName("web"), "app", 0)
    others = {
        machine_id("other", AppName("web"), "app", 0),
        machine_id("node", AppName("api"), "app", 0),
        machine_id("node", AppName("web"), "app", 1),
        machine_id("node", AppName("web"), "worker", 0),
    }
    assert len(others | {one}) == 5


async def test_a_machine_has_flys_environment_and_little_of_ours(rig: Rig) -> None:
    group = GroupPlan("web", ("serve",), memory_mb=512)
    services = (
        dataclasses.replace(a_service(8080), processes=("web",)),
        dataclasses.replace(a_service(9090), processes=("web",)),
    )
    app = an_app(groups=(group,), services=services, env=(("A", "b"), ("PORT", "1"), ("FLY_X", "y")))
    inherited = {"PATH": "/bin", "HOME": "/home/me", "SECRET": "x"}
    spec = make_spec(a_plan(data_dir="/data"), app, group, MachineId("0a"), {8080: 20001, 9090: 20002}, inherited)
    env = dict(with_version(spec, "01ABC").env)
    assert env == {
        "PATH": "/bin", "HOME": "/home/me", "A": "b", "FLY_X": "y",
        "FLY_APP_NAME": "web", "FLY_MACHINE_ID": "0a", "FLY_ALLOC_ID": "0a", "FLY_REGION": "ams",
        "FLY_PUBLIC_IP": "127.0.0.1", "FLY_PRIVATE_IP": "127.0.0.1", "FLY_IMAGE_REF": "local/web",
        "FLY_PROCESS_GROUP": "web", "FLY_VM_MEMORY_MB": "512", "FLY_MACHINE_VERSION": "01ABC",
        "WAKEFRONT_NODE_DIR": "/data", "PORT": "20001", "PORT_8080": "20001", "PORT_9090": "20002",
    }  # fmt: skip


def test_ports_in_the_command_are_filled_in() -> None:
    group = GroupPlan("app", ("serve", "--listen=:{port}", "{port:9090}", "{port:1}", "{other}"))
    app = an_app(groups=(group,), services=(a_service(8080), a_service(9090)))
    spec = make_spec(a_plan(), app, group, MachineId("0a"), {8080: 20001, 9090: 20002})
    assert spec.command == ("serve", "--listen=:20001", "20002", "{port:1}", "{other}")
    assert spec.endpoints == (Endpoint(8080, "127.0.0.1", 20001), Endpoint(9090, "127.0.0.1", 20002))


def test_with_a_network_of_its_own_a_machine_has_the_internal_ports() -> None:
    group = GroupPlan("app", ("serve", "{port}"))
    app = an_app(groups=(group,), own_network=True, env=(("PORT", "3000"),))
    spec = make_spec(a_plan(), app, group, MachineId("0a"), {})
    assert spec.endpoints == (Endpoint(8080, "127.0.0.1", 8080),) and spec.own_network
    assert dict(spec.env)["PORT"] == "3000" and spec.command[1] == "8080"


def test_volumes_are_folders_of_the_machine_under_data_dir() -> None:
    group = GroupPlan("app", ("serve",), mounts=(MountPlan("data", "/data"),))
    spec = make_spec(a_plan(data_dir="/node"), an_app(groups=(group,)), group, MachineId("0a"), {8080: 20001})
    (mount,) = spec.mounts
    assert (mount.source, mount.destination) == ("/node/volumes/web/data/0a", "/data")


def test_a_plan_comes_back_as_it_was_kept(tmp_path: object) -> None:
    path = f"{tmp_path}/plan"
    plan = a_plan(an_app(env=(("SECRET", "x"),), statics=(StaticMachine("s", (Endpoint(80, "10.0.0.1", 80),)),)))
    assert kept_plan(path) is None
    keep_plan(path, plan)
    assert kept_plan(path) == plan
    with open(path, "wb") as file:
        file.write(b"junk")
    assert kept_plan(path) is None


# --- records


async def test_names_that_no_frame_has_room_for_are_told_and_keep_nobody_waiting(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    await rig.load(an_app("a"), an_app("b"))
    before = rig.apps.frame(AppName("a"))
    monkeypatch.setattr(ipc, "MAX_FRAME_BYTES", 10_000)
    many = tuple(f"{number}.example.com" for number in range(1000))
    added = {"a": many, "b": ("b.example.com",)}
    rig.apps.added_to = lambda name: added[name]
    async with asyncio.timeout(2):
        await asyncio.gather(*(rig.apps.names_changed(AppName(name)) for name in ("a", "b")))
    assert rig.apps.frame(AppName("a")) == before, "workers, new ones too, go on with the names they know"
    assert b"b.example.com" in (rig.apps.frame(AppName("b")) or b"")
    assert list(rig.apps.warnings) == ["names of a"] and "10000" in rig.apps.warnings["names of a"]
    added["a"] = many[:5]
    async with asyncio.timeout(2):
        await rig.apps.names_changed(AppName("a"))
    assert b"4.example.com" in (rig.apps.frame(AppName("a")) or b"") and not rig.apps.warnings


async def test_a_change_of_names_that_fails_keeps_nobody_waiting(rig: Rig) -> None:
    await rig.load(an_app("a"))
    told: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context))

    def fails(name: AppName) -> tuple[str, ...]:
        raise RuntimeError("the names cannot be had")

    rig.apps.added_to = fails
    async with asyncio.timeout(2):
        await rig.apps.names_changed(AppName("a"))
    assert [str(one["exception"]) for one in told] == ["the names cannot be had"]


async def test_apps_and_machines_keep_their_slots_and_ports_over_restarts(rig: Rig) -> None:
    await rig.load(an_app("a", 2), an_app("b"))

    def places(one: Rig) -> list[object]:
        return [
            (entry.plan.name, entry.slot, [(m.id, m.row.slot, m.row.ports) for m in entry.machines])
            for entry in one.apps.all()
        ]

    before = places(rig)
    await rig.die()
    after = rig.again()
    try:
        await after.load(an_app("b"), an_app("a", 2))
        assert sorted(map(str, places(after))) == sorted(map(str, before))
    finally:
        await after.close()


async def test_every_machine_has_a_slot_and_a_port_of_its_own(rig: Rig) -> None:
    await rig.load(*(an_app(f"app{number}", 3) for number in range(5)))
    machines = rig.fleet.all()
    assert len({one.row.slot for one in machines}) == 15
    assert len({one.row.ports[8080] for one in machines}) == 15


async def test_a_static_machine_is_started_without_anybody_starting_it(rig: Rig) -> None:
    endpoint = Endpoint(8080, "10.1.2.3", 80)
    await rig.load(an_app(driver="static", statics=(StaticMachine("db", (endpoint,)),)))
    record = rig.machine().record()
    assert (record.id, record.state, record.endpoints) == ("db", MachineState.STARTED, (endpoint,))


async def test_machines_that_nothing_can_wake_or_stop_run_from_the_start(rig: Rig) -> None:
    await rig.load(
        an_app("asleep"), an_app("worker", services=()), an_app("always", services=(a_service(autostop=Autostop.OFF),)),
        an_app("least", 3, services=(a_service(least=2),)),
    )  # fmt: skip
    await settle()
    states = {name: [one.row.state for one in rig.apps.get(name).machines] for name in rig.apps.names()}  # type: ignore[union-attr]
    assert states == {
        "asleep": ["created"], "worker": ["started"], "always": ["starting"],
        "least": ["starting", "starting", "created"],
    }  # fmt: skip


async def test_a_machine_that_a_user_stopped_stays_stopped_at_the_next_start(rig: Rig) -> None:
    for stopped_by, state in (("user", "stopped"), ("flyd", "started")):
        one = rig.again() if rig.fleet.all() else rig
        await one.load(an_app("worker", services=()))
        await settle()
        machine = one.machine("worker")
        if machine.state is not MachineState.STARTED:
            await asyncio.shield(one.fleet.wake(machine.id, "user"))
        end = one.fleet.stop(machine, stopped_by)
        assert end is not None
        await end
        await one.die()
        after = one.again()
        await after.load(an_app("worker", services=()), is_first=True)
        await settle()
        assert after.machine("worker").row.state == state
        end = after.fleet.stop(after.machine("worker"), "user")
        if end is not None:
            await end
        await after.die()


@pytest.mark.parametrize("ended", ["stopped", "suspended"])
async def test_what_a_user_stopped_stays_theirs_when_the_node_ends(rig: Rig, ended: str) -> None:
    await rig.load(an_app("worker"))
    machine = await rig.started("worker")
    end = rig.fleet.stop(machine, "user") if ended == "stopped" else rig.fleet.suspend(machine, "user")
    assert end is not None
    await end
    await rig.fleet.stop_all()
    assert machine.row.stopped_by == "user"


async def test_what_a_user_suspended_is_theirs_no_more_once_it_was_resumed(rig: Rig) -> None:
    await rig.load(an_app("worker"))
    machine = await rig.started("worker")
    end = rig.fleet.suspend(machine, "user")
    assert end is not None
    await end
    assert rig.fleet.wake(machine.id).done()
    await rig.fleet.stop_all()
    assert machine.row.stopped_by == "flyd"


# --- reload


async def test_only_apps_that_differ_are_touched(rig: Rig) -> None:
    same, old, gone = an_app("same"), an_app("old"), an_app("gone")
    await rig.load(same, old, gone)
    kept = rig.machine("same")
    new = dataclasses.replace(old, hostnames=("old.example",))
    changes = await rig.apps.apply(a_plan(same, new, an_app("added")))
    assert changes == type(changes)((AppName("added"),), (AppName("old"),), (AppName("gone"),))
    assert rig.machine("same") is kept
    assert rig.apps.get("old").record().hostnames == ("old.example",)  # type: ignore[union-attr]
    assert rig.apps.get("gone") is None


async def test_machines_of_a_removed_app_finish_what_they_have_and_are_stopped(rig: Rig) -> None:
    await rig.load(an_app())
    machine = await rig.started()
    rig.begin_request(machine)
    await rig.apps.apply(a_plan())
    await rig.clock.advance(5.0)
    assert rig.host.is_running(machine.id)
    rig.end_request(machine)
    await rig.clock.advance(0.2)
    assert not rig.host.is_running(machine.id)
    assert rig.fleet.all() == [] and rig.store.machines() == []
    assert ("release", machine.id) in rig.driver.calls


async def test_a_wake_that_comes_too_late_does_not_start_a_machine_that_leaves(rig: Rig) -> None:
    await rig.load(an_app())
    machine = await rig.started()
    rig.begin_request(machine)
    await rig.apps.apply(a_plan())
    rig.host.end(machine.id, Exit(code=1))
    await rig.clock.advance(1.0)
    assert rig.fleet.wake(machine.id).result().code is Code.MACHINE_GONE
    rig.end_request(machine)
    await rig.clock.advance(0.2)
    assert rig.starts(machine) == 1 and rig.fleet.all() == []


async def test_a_lower_count_retires_the_machines_over_it(rig: Rig) -> None:
    await rig.load(an_app(count=3))
    last = await rig.started("web", 2)
    await rig.apps.apply(a_plan(an_app(count=1)))
    await rig.clock.advance(0.2)
    assert len(rig.fleet.all()) == 1 and not rig.host.is_running(last.id)


async def test_an_app_that_comes_back_while_it_leaves_gets_new_machines_after_the_old_have_ended(rig: Rig) -> None:
    await rig.load(an_app())
    machine = await rig.started()
    rig.begin_request(machine)
    await rig.apps.apply(a_plan())
    back = asyncio.get_running_loop().create_task(rig.apps.apply(a_plan(an_app())), name="reload")
    await rig.clock.advance(0.3)
    await back
    again = rig.machine()
    assert again is not machine and again.id == machine.id and again.state is MachineState.CREATED


async def test_a_slot_with_load_is_not_given_again(rig: Rig) -> None:
    await rig.load(an_app("one"))
    slot = rig.machine("one").row.slot
    rig.begin_request(rig.machine("one"))
    await rig.apps.apply(a_plan())
    await rig.clock.advance(40.0)
    await rig.apps.apply(a_plan(an_app("two", 3)))
    assert slot not in {one.row.slot for one in rig.fleet.all()}


async def test_a_changed_environment_waits_for_the_next_start_of_a_stopped_machine(rig: Rig) -> None:
    await rig.load(an_app())
    machine = rig.machine()
    before = machine.row.instance_id
    await rig.apps.apply(a_plan(an_app(env=(("NEW", "1"),))))
    assert rig.starts(machine) == 0 and environment(machine)["NEW"] == "1"
    await rig.started()
    assert machine.row.instance_id != before
    assert dict(rig.driver.specs[machine.id].env)["FLY_MACHINE_VERSION"] == machine.row.instance_id


async def test_running_machines_are_replaced_one_by_one_when_they_are_idle(rig: Rig) -> None:
    await rig.load(an_app(count=2))
    machines = [await rig.started("web", 0), await rig.started("web", 1)]
    rig.begin_request(machines[0])
    await rig.apps.apply(a_plan(an_app(count=2, env=(("NEW", "1"),))))
    await rig.clock.advance(5.0)
    assert [rig.starts(one) for one in machines] == [1, 1]
    rig.end_request(machines[0])
    await rig.clock.advance(1.0)
    assert [rig.starts(one) for one in machines] == [2, 2]
    assert all(dict(rig.driver.specs[one.id].env)["NEW"] == "1" for one in machines)
    assert {one.state for one in machines} == {MachineState.STARTED}


async def test_a_machine_that_is_never_idle_is_replaced_after_the_drain_time(rig: Rig) -> None:
    await rig.load(an_app())
    machine = await rig.started()
    rig.begin_request(machine)
    await rig.apps.apply(a_plan(an_app(env=(("NEW", "1"),))))
    await rig.clock.advance(29.0)
    assert rig.starts(machine) == 1
    await rig.clock.advance(2.0)
    assert rig.starts(machine) == 2


async def test_a_control_that_starts_after_a_change_replaces_what_still_runs_the_old_way(rig: Rig) -> None:
    await rig.load(an_app())
    machine = await rig.started()
    await rig.die()
    after = rig.again()
    try:
        await after.load(an_app(env=(("NEW", "1"),)), is_first=False)
        after.listen(after.machine())
        await after.clock.advance(1.0)
        assert after.starts(after.machine()) == 1
        assert after.machine().row.digest == digest_of(after.machine().spec)
        assert after.machine().row.pid != machine.row.pid
    finally:
        await after.close()


async def test_a_machine_of_no_app_is_ended_at_the_start(rig: Rig) -> None:
    await rig.load(an_app())
    machine = await rig.started()
    await rig.die()
    after = rig.again()
    try:
        await after.load(is_first=False)
        await settle()
        assert not after.host.is_running(machine.id)
    finally:
        await after.close()


async def test_the_snapshot_is_what_a_worker_would_get(rig: Rig) -> None:
    await rig.load(an_app("a"), an_app("b"))
    keeper = spawn(rig.apps.keep_snapshot(), "snapshot")
    await rig.clock.advance(0.1)
    await asyncio.to_thread(lambda: None)
    machine = await rig.started("a")
    for _ in range(100):
        await rig.clock.advance(0.1)
        await asyncio.sleep(0.005)  # a thread writes the file
        content = (rig.folder / "table.msgpack").read_bytes()
        messages = [ipc.decode_to_worker(body) for body in ipc.FrameReader().feed(content)]
        apps = {message.app.name: message.app for message in messages if isinstance(message, ipc.AppSet)}
        if apps[AppName("a")].machines[0].version == machine.row.version:
            break
    assert isinstance(messages[0], ipc.Settings) and messages[1] == ipc.TableStart(2)
    assert apps[AppName("a")].machines == (machine.record(),)
    assert messages[-1] == ipc.TableEnd()
    keeper.cancel()


async def test_no_machine_gets_the_port_of_the_admin_api_which_listens_later(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[int]] = []

    def choose(taken: set[int], rng: random.Random) -> int:
        seen.append(set(taken))
        return choose_port(taken, rng)

    monkeypatch.setattr("proxy.control.apps.choose_port", choose)
    await rig.apps.load(dataclasses.replace(a_plan(an_app()), admin_port=23_456), True)
    assert seen and all(23_456 in taken for taken in seen)
