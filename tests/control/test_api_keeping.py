"""Cordons, leases, metadata and waits over the admin API, with fake machines."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from proxy.control.api import Api
from proxy.control.leases import HEADER
from proxy.metrics import Metrics
from proxy.model import MachineState
from tests.control.rig import Rig, an_app
from tests.control.test_api import Client, Node, path_of
from tests.support.clock import settle


@pytest_asyncio.fixture
async def client(rig: Rig) -> AsyncIterator[Client]:
    await rig.load(an_app(count=2))
    async for one in serving(rig):
        yield one


async def serving(rig: Rig) -> AsyncIterator[Client]:
    node = Node(rig)
    api = Api(node, rig.apps, rig.fleet, rig.store, Metrics(rig.memory, node), rig.clock, str(rig.folder))
    await api.start("127.0.0.1", 0)
    async with aiohttp.ClientSession() as session:
        yield Client(rig, node, api, session)
    await api.close()


async def ask(client: Client, method: str, path: str, body: Any = None, nonce: str | None = None) -> tuple[int, Any]:
    headers = {} if nonce is None else {HEADER: nonce}
    data = body if body is None or isinstance(body, str) else json.dumps(body)
    return await client.ask(method, path, headers=headers, data=data)


async def take(client: Client, nonce: str | None = None, **body: Any) -> tuple[int, Any]:
    return await ask(client, "POST", path_of(client) + "/lease", body, nonce)


# --- cordon


async def test_a_cordoned_machine_is_published_as_such_after_every_worker_keeps_to_it(client: Client) -> None:
    machine = await client.rig.started()
    before = machine.row.version
    client.rig.cordons.gate = asyncio.Event()
    asking = asyncio.create_task(ask(client, "POST", path_of(client) + "/cordon"))
    while not client.rig.cordons.asked:
        await asyncio.sleep(0)
    assert client.rig.published[-1].cordoned and client.rig.published[-1].version > before and not asking.done()
    client.rig.cordons.gate.set()
    assert await asking == (200, {"ok": True, "acknowledged": True})
    assert (await ask(client, "GET", path_of(client)))[1]["cordoned"] is True
    assert machine.state is MachineState.STARTED
    assert await ask(client, "POST", path_of(client) + "/uncordon") == (200, {"ok": True})
    assert not client.rig.published[-1].cordoned
    types = [one["type"] for one in (await ask(client, "GET", path_of(client) + "/events"))[1]]
    assert types[:2] == ["uncordon", "cordon"]


async def test_a_worker_that_does_not_answer_leaves_the_cordon_in_place_and_is_told_of(client: Client) -> None:
    machine = await client.rig.started()
    client.rig.cordons.acknowledge = False
    assert await ask(client, "POST", path_of(client) + "/cordon") == (200, {"ok": True, "acknowledged": False})
    assert machine.record().cordoned and machine.handshake is None


async def test_cordoning_twice_and_a_machine_that_does_not_run_are_fine(client: Client) -> None:
    for _ in range(2):
        assert (await ask(client, "POST", path_of(client) + "/cordon"))[0] == 200
    assert client.rig.machine().record().cordoned and client.rig.cordons.asked == []


async def test_a_cordon_outlives_control(rig: Rig) -> None:
    await rig.load(an_app())
    await rig.fleet.cordon(rig.machine())
    await rig.die()
    after = rig.again()
    await after.load(an_app(), is_first=False)
    assert after.machine().record().cordoned
    await after.close()


# --- what a stop tells those who are connected


async def test_a_stop_of_a_machine_in_use_ends_its_tunnels_and_waits_a_moment_for_them(client: Client) -> None:
    machine = await client.rig.started()
    client.rig.begin_request(machine)
    assert (await ask(client, "POST", path_of(client) + "/stop"))[0] == 200
    await settle()
    assert client.rig.cordons.ended_tunnels == [(machine.id, "stopping")]
    assert ("stop", machine.id) not in client.rig.driver.calls
    client.rig.end_request(machine)
    await client.rig.clock.advance(0.1)
    assert machine.state is MachineState.STOPPED


@pytest.mark.parametrize(("verb", "state"), [("stop", "stopped"), ("suspend", "suspended")])
async def test_what_does_not_end_in_a_second_is_not_waited_for(client: Client, verb: str, state: str) -> None:
    machine = await client.rig.started()
    client.rig.begin_request(machine)
    assert (await ask(client, "POST", f"{path_of(client)}/{verb}"))[0] == 200
    await client.rig.clock.advance(0.9)
    assert machine.row.state != state and len(client.rig.cordons.ended_tunnels) == 1
    await client.rig.clock.advance(0.2)
    assert machine.row.state == state


@pytest.mark.parametrize(("verb", "state"), [("stop", "stopped"), ("suspend", "suspended")])
async def test_a_machine_that_nothing_uses_is_ended_at_once(client: Client, verb: str, state: str) -> None:
    machine = await client.rig.started()
    assert (await ask(client, "POST", f"{path_of(client)}/{verb}"))[0] == 200
    await settle()
    assert machine.row.state == state and client.rig.cordons.ended_tunnels == []


async def test_a_kill_waits_for_nobody(client: Client) -> None:
    machine = await client.rig.started()
    client.rig.begin_request(machine)
    await ask(client, "POST", path_of(client) + "/stop", {"signal": "SIGKILL"})
    await settle()
    assert machine.state is MachineState.STOPPED


# --- leases


async def test_a_lease_is_taken_shown_extended_and_given_back(client: Client) -> None:
    path, clock = path_of(client) + "/lease", client.rig.clock
    assert (await ask(client, "GET", path))[0] == 404
    status, body = await take(client, ttl=30, description="deploying")
    lease = body["data"]
    assert (status, body["status"]) == (201, "success") and lease["expires_at"] == clock.unix() + 30
    assert lease["version"] == client.rig.machine().row.instance_id and lease["description"] == "deploying"
    assert (await ask(client, "GET", path))[1] == body
    await clock.advance(20)
    status, again = await take(client, lease["nonce"], ttl=30)
    assert status == 201 and again["data"] == {**lease, "expires_at": clock.unix() + 30}
    assert (await ask(client, "DELETE", path))[0] == 400
    assert (await ask(client, "DELETE", path, nonce="wrong"))[0] == 409
    assert await ask(client, "DELETE", path, nonce=lease["nonce"]) == (200, {"status": "success", "data": {"ok": True}})
    assert (await ask(client, "GET", path))[0] == 404


async def test_while_a_lease_is_held_every_change_without_its_nonce_is_refused(client: Client) -> None:
    machine = await client.rig.started()
    nonce = (await take(client, ttl=60, description="mine"))[1]["data"]["nonce"]
    calls, before = list(client.rig.driver.calls), machine.row.version
    changes: list[tuple[str, str, Any]] = [
        ("POST", "/start", None), ("POST", "/stop", None), ("POST", "/suspend", None), ("POST", "/restart", None),
        ("POST", "/signal", {"signal": "SIGHUP"}), ("POST", "/cordon", None), ("POST", "/uncordon", None),
        ("POST", "/lease", {}), ("DELETE", "/lease", None), ("PUT", "/metadata", {"a": "b"}),
        ("POST", "/metadata", {"a": "b"}), ("POST", "/metadata/a", {"value": "b"}),
    ]  # fmt: skip
    for method, path, body in changes:
        for wrong in (None, "0123456789ab"):
            if (method, path, wrong) == ("DELETE", "/lease", None):
                continue
            status, answer = await ask(client, method, path_of(client) + path, body, wrong)
            assert (status, answer["status"]) == (409, "lease_held"), (method, path, wrong)
            assert re.search(r" until \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", answer["error"])
            assert "until" in answer["error"] and "mine" in answer["error"] and nonce not in answer["error"]
    assert client.rig.driver.calls == calls and machine.row.version == before and machine.row.metadata == {}
    assert (await ask(client, "POST", path_of(client) + "/stop", nonce=nonce))[0] == 200
    await settle()
    assert machine.state is MachineState.STOPPED


async def test_a_lease_guards_its_own_machine_and_no_reading(client: Client) -> None:
    await take(client, ttl=60)
    for path in ("", "/events", "/metadata", "/lease", "/wait?state=created"):
        assert (await ask(client, "GET", path_of(client) + path))[0] == 200
    assert (await ask(client, "POST", path_of(client, 1) + "/cordon"))[0] == 200


async def test_an_expired_lease_frees_the_machine_and_its_nonce_opens_nothing_any_more(client: Client) -> None:
    nonce = (await take(client, ttl=5))[1]["data"]["nonce"]
    await client.rig.clock.advance(6)
    assert (await ask(client, "GET", path_of(client) + "/lease"))[0] == 404
    for method, path in (("POST", "/lease"), ("POST", "/cordon"), ("DELETE", "/lease")):
        status, answer = await ask(client, method, path_of(client) + path, nonce=nonce)
        assert status == 409 and "expired" in answer["error"], path
    status, answer = await take(client, ttl=5)
    assert status == 201 and answer["data"]["nonce"] != nonce


async def test_requests_wake_a_leased_machine_all_the_same(client: Client) -> None:
    await take(client, ttl=60)
    machine = await client.rig.started()
    assert machine.state is MachineState.STARTED


async def test_a_lease_outlives_control(rig: Rig) -> None:
    await rig.load(an_app())
    async for client in serving(rig):
        nonce = (await take(client, ttl=60))[1]["data"]["nonce"]
    await rig.die()
    after = rig.again()
    await after.load(an_app(), is_first=False)
    async for client in serving(after):
        assert (await ask(client, "POST", path_of(client) + "/cordon"))[0] == 409
        assert (await ask(client, "POST", path_of(client) + "/cordon", nonce=nonce))[0] == 200
    await after.close()


@pytest.mark.parametrize("ttl", [0, -1, 0.5, "x", "", "nan", "inf", 86_401, True, [], {}])
async def test_a_ttl_that_makes_no_sense_is_refused(client: Client, ttl: Any) -> None:
    status, answer = await take(client, ttl=ttl)
    assert (status, answer["status"]) == (400, "invalid_argument")


async def test_a_description_that_could_not_be_kept_takes_no_lease_and_harms_no_record(client: Client) -> None:
    for description in ("half \ud800", "two\nlines", "\x1b[2J"):
        assert (await take(client, ttl=60, description=description))[0] == 400
    machine = await client.rig.started()
    client.rig.store.flush()
    assert machine.row.lease is None
    assert {row.id: row.state for row in client.rig.store.machines()}[machine.id] == MachineState.STARTED


async def test_the_ttl_may_stand_in_the_query_and_is_flyctls_without_one(client: Client) -> None:
    path, now = path_of(client) + "/lease", client.rig.clock.unix()
    status, answer = await ask(client, "POST", path + "?ttl=120")
    assert (status, answer["data"]["expires_at"]) == (201, now + 120)
    status, answer = await ask(client, "POST", path_of(client, 1) + "/lease")
    assert (status, answer["data"]["expires_at"]) == (201, now + 13)
    assert (await take(client, ttl=9, description="x" * 201))[0] == 400


async def test_leases_are_shown_to_others_without_their_nonce(client: Client) -> None:
    nonce = (await take(client, ttl=60, description="d"))[1]["data"]["nonce"]
    listed = (await ask(client, "GET", "/v1/apps/web/machines?include_leases=true"))[1]
    assert [one.get("lease") for one in listed if one["id"] == client.rig.machine().id] == [
        {"owner": "admin", "expires_at": client.rig.clock.unix() + 60, "description": "d"}
    ]
    one = (await ask(client, "GET", path_of(client) + "?include_leases=1"))[1]
    assert one["lease"]["owner"] == "admin" and nonce not in json.dumps([*listed, one])
    assert "lease" not in (await ask(client, "GET", path_of(client)))[1]


# --- metadata


async def test_metadata_is_set_merged_replaced_and_taken_away(client: Client) -> None:
    path = path_of(client) + "/metadata"
    assert await ask(client, "GET", path) == (200, {"fly_process_group": "app"})
    assert (await ask(client, "POST", path + "/colour", {"value": "blue"}))[0] == 204
    assert await ask(client, "GET", path + "/colour") == (200, {"value": "blue"})
    assert (await ask(client, "POST", path, {"size": "7", "colour": "red"}))[0] == 204
    assert (await ask(client, "POST", path, {"size": None, "shape": "round"}))[0] == 204
    assert (await ask(client, "GET", path))[1] == {"fly_process_group": "app", "colour": "red", "shape": "round"}
    assert (await ask(client, "PUT", path, {"metadata": {"only": ""}}))[0] == 204
    assert (await ask(client, "GET", path))[1] == {"fly_process_group": "app", "only": ""}
    assert (await ask(client, "GET", path_of(client)))[1]["config"]["metadata"]["only"] == ""
    assert (await ask(client, "DELETE", path + "/only"))[0] == 204
    assert (await ask(client, "DELETE", path + "/only"))[0] == 404
    assert (await ask(client, "GET", path + "/only"))[0] == 404


async def test_metadata_makes_no_new_version_and_outlives_control(rig: Rig) -> None:
    await rig.load(an_app())
    machine = await rig.started()
    before = machine.row.instance_id, machine.row.version
    async for client in serving(rig):
        assert (await ask(client, "PUT", path_of(client) + "/metadata", {"a": "b"}))[0] == 204
    assert (machine.row.instance_id, machine.row.version) == before
    await rig.die()
    after = rig.again()
    await after.load(an_app(), is_first=False)
    assert after.machine().row.metadata == {"a": "b"}
    await after.close()


async def test_a_change_meant_for_another_version_is_refused(client: Client) -> None:
    path, version = path_of(client) + "/metadata", client.rig.machine().row.instance_id
    for method, target, body in (
        ("PUT", path, {"metadata": {"a": "1"}, "machine_version": "01ARZ3NDEKTSV4RRFFQ69G5FAV"}),
        ("POST", path + "?version=other", {"a": "1"}),
        ("POST", path + "/a?version=other", {"value": "1"}),
    ):
        status, answer = await ask(client, method, target, body)
        assert (status, answer["status"]) == (412, "failed_precondition") and version in answer["error"]
    assert (await ask(client, "PUT", path, {"metadata": {"a": "1"}, "machine_version": version}))[0] == 204


@pytest.mark.parametrize(
    "body",
    ["", "[]", "{", {"a": 1}, {"a": ["b"]}, {"": "x"}, {"a b": "x"}, {"a/b": "x"}, {"k" * 129: "x"}, {"a": "x" * 1025},
     {"fly_process_group": "other"}, {"fly_process_group": None}, {"wakefront_busy": "soon"}, {"a\nb": "x"},
     {f"k{number}": "v" for number in range(65)}, '{"a": "\\ud800"}'],
)  # fmt: skip
async def test_metadata_that_cannot_be_kept_changes_nothing(client: Client, body: Any) -> None:
    path = path_of(client) + "/metadata"
    await ask(client, "PUT", path, {"old": "1"})
    for method in ("PUT", "POST"):
        status, answer = await ask(client, method, path, body)
        assert (status, answer["status"]) == (400, "invalid_argument"), answer
    assert client.rig.machine().row.metadata == {"old": "1"}


async def test_a_key_is_set_with_a_text_as_its_value(client: Client) -> None:
    path = path_of(client) + "/metadata"
    for body in ("", {}, {"value": 1}, {"value": None}, {"value": "x" * 2000}):
        assert (await ask(client, "POST", path + "/a", body))[0] == 400, body
    assert (await ask(client, "POST", path + "/fly_process_group", {"value": "app"}))[0] == 204  # as it is
    assert (await ask(client, "DELETE", path + "/fly_process_group"))[0] == 400
    assert client.rig.machine().row.metadata == {}


async def test_the_list_is_narrowed_by_metadata_region_and_state(client: Client) -> None:
    first, second = (client.rig.machine("web", place) for place in (0, 1))
    await client.rig.started("web", 1)
    await ask(client, "PUT", path_of(client, 0) + "/metadata", {"a": "1", "b": "2"})
    await ask(client, "PUT", path_of(client, 1) + "/metadata", {"a": "1", "b": "3"})

    async def ids(query: str) -> set[str]:
        status, found = await ask(client, "GET", f"/v1/apps/web/machines?{query}")
        assert status == 200
        return {one["id"] for one in found}

    assert await ids("metadata.a=1") == {first.id, second.id}
    assert await ids("metadata.a=1&metadata.b=3") == {second.id}
    assert await ids("metadata.b=2&metadata.b=3") == set()
    assert await ids("metadata.fly_process_group=app&state=created") == {first.id}
    assert await ids("metadata.c=") == set()
    assert await ids("region=ams&state=started,stopped") == {second.id}
    assert await ids("region=fra") == set()


# --- checks


async def test_the_last_results_of_its_checks_are_part_of_a_machine(rig: Rig) -> None:
    check = {
        "name": "servicecheck-00-tcp-8080",
        "status": "passing",
        "output": "",
        "updated_at": "2027-01-15T08:00:00Z",
    }
    await rig.load(an_app(count=2))
    node = Node(rig)
    api = Api(node, rig.apps, rig.fleet, rig.store, Metrics(rig.memory, node), rig.clock, str(rig.folder))
    api.checks_of = lambda machine: [check] if machine is rig.machine() else []
    await api.start("127.0.0.1", 0)
    async with aiohttp.ClientSession() as session:
        client = Client(rig, node, api, session)
        listed = (await ask(client, "GET", "/v1/apps/web/machines"))[1]
        assert {one["id"]: one["checks"] for one in listed} == {
            rig.machine("web", 0).id: [check], rig.machine("web", 1).id: []
        }  # fmt: skip
        assert (await ask(client, "GET", path_of(client)))[1]["checks"] == [check]
    await api.close()


# --- wait


async def test_a_wait_ends_with_any_of_several_states_however_they_are_written(client: Client) -> None:
    machine = await client.rig.started()
    for query in ("state=suspended&state=stopped", "state=suspended,stopped", "state=failed,suspended&state=stopped"):
        waiting = asyncio.create_task(ask(client, "GET", f"{path_of(client)}/wait?{query}"))
        while not machine.watchers:
            await asyncio.sleep(0)
        client.rig.fleet.stop(machine, "user")
        status, answer = await waiting
        assert (status, answer["ok"], answer["state"]) == (200, True, "stopped")
        assert answer["version"] == machine.row.instance_id and len(answer["event_id"]) == 26
        await asyncio.shield(client.rig.fleet.wake(machine.id, "user"))


async def test_settled_is_any_state_that_lasts(client: Client) -> None:
    machine = client.rig.machine()
    assert (await ask(client, "GET", path_of(client) + "/wait?state=settled"))[1]["state"] == "created"
    client.rig.driver.hold_start[machine.id] = gate = asyncio.Event()
    client.rig.listen(machine)
    client.rig.fleet.wake(machine.id, "user")
    assert (await ask(client, "GET", path_of(client) + "/wait?state=settled&timeout=0"))[0] == 408
    gate.set()
    assert (await ask(client, "GET", path_of(client) + "/wait?state=settled"))[1]["state"] == "started"


async def test_a_wait_from_an_event_is_not_content_with_what_was_before_it(client: Client) -> None:
    machine = await client.rig.started()
    await settle()
    last = client.rig.store.events(machine.id, 1)[0].id
    path = f"{path_of(client)}/wait?state=started&from_event_id={last}"
    assert (await ask(client, "GET", path + "&timeout=0"))[0] == 408
    waiting = asyncio.create_task(ask(client, "GET", path))
    while not machine.watchers:
        await asyncio.sleep(0)
    if (end := client.rig.fleet.stop(machine, "user")) is not None:
        await end
    await asyncio.shield(client.rig.fleet.wake(machine.id, "user"))
    status, answer = await waiting
    assert (status, answer["state"]) == (200, "started") and answer["event_id"] != last
    older = "01ARZ3NDEKTSV4RRFFQ69G5FAV"  # not kept any more
    assert (await ask(client, "GET", f"{path_of(client)}/wait?from_event_id={older}&timeout=0"))[0] == 200


@pytest.mark.parametrize(
    "query", ["state=running", "state=started,flying", "timeout=x", "timeout=nan", "version=other", "from_event_id=7"]
)
async def test_a_wait_that_makes_no_sense_is_refused_at_once(client: Client, query: str) -> None:
    status, answer = await ask(client, "GET", f"{path_of(client)}/wait?{query}")
    assert (status, answer["status"]) == (400, "invalid_argument")


async def test_a_wait_that_runs_out_says_what_the_machine_is_instead(client: Client) -> None:
    status, answer = await ask(client, "GET", path_of(client) + "/wait?state=stopped,failed&timeout=0")
    assert (status, answer["status"]) == (408, "deadline_exceeded")
    assert "created" in answer["error"] and "stopped or failed" in answer["error"]
