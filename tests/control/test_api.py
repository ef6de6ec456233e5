"""The admin API over real TCP, with fake machines."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from proxy.control.answers import MAX_BODY_BYTES
from proxy.control.api import Api, load_or_make_token
from proxy.machines.driver import Exit
from proxy.machines.logs import log_path
from proxy.metrics import AppCells, MachineFacts, Metrics, NodeFacts
from proxy.model import MachineState
from proxy.state import A_BYTES_IN, A_LATENCY, A_LATENCY_SUM_US, STATUS_CELL, W_CONNECTIONS
from tests.control.rig import Rig, an_app
from tests.support.clock import settle


class Node:
    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.is_ready = True
        self.reloads = True

    async def status(self) -> dict[str, Any]:
        return {"name": "node"}

    async def reload(self) -> tuple[bool, dict[str, Any]]:
        return self.reloads, {"added": [], "faults": []}

    def ca_pem(self) -> bytes | None:
        return b"-----BEGIN CERTIFICATE-----\n"

    def in_flight(self, slot: int) -> int:
        return 0

    def facts(self) -> NodeFacts:
        machines = [
            MachineFacts(
                one.app.name, one.id, one.row.slot, one.state is MachineState.STARTED, one.row.state, 3, False, 1, False
            )
            for one in self.rig.fleet.all()
        ]  # fmt: skip
        apps = [AppCells(entry.plan.name, entry.slot) for entry in self.rig.apps.all()]
        return NodeFacts("ams", "node", apps, machines, 2)


class Client:
    def __init__(self, rig: Rig, node: Node, api: Api, session: aiohttp.ClientSession) -> None:
        self.rig = rig
        self.node = node
        self._session = session
        assert api.address is not None
        self.base = f"http://{api.address[0]}:{api.address[1]}"
        self.port = api.address[1]
        self.token = load_or_make_token(str(rig.folder / "admin.token"))

    async def ask(
        self, method: str, path: str, token: str | None = "", headers: dict[str, str] | None = None, data: Any = None
    ) -> tuple[int, Any]:
        """Status and JSON (or text). `token`: "" is the right one, None is none."""
        sent = dict(headers or {})
        if token is not None:
            sent["Authorization"] = f"Bearer {token or self.token}"
        async with self._session.request(method, self.base + path, headers=sent, data=data) as answer:
            text = await answer.text()
            assert "Set-Cookie" not in answer.headers and "Access-Control-Allow-Origin" not in answer.headers
            return answer.status, json.loads(text) if answer.content_type == "application/json" else text


@pytest_asyncio.fixture
async def client(rig: Rig) -> AsyncIterator[Client]:
    await rig.load(an_app(count=2))
    node = Node(rig)
    api = Api(node, rig.apps, rig.fleet, rig.store, Metrics(rig.memory, node), rig.clock, str(rig.folder))
    await api.start("127.0.0.1", 0)
    async with aiohttp.ClientSession() as session:
        yield Client(rig, node, api, session)
    await api.close()


def path_of(client: Client, index: int = 0) -> str:
    return f"/v1/apps/web/machines/{client.rig.machine('web', index).id}"


# --- who may ask


async def test_without_the_token_nothing_but_health_and_metrics_is_told(client: Client) -> None:
    for path in ("/v1/status", "/v1/apps", "/v1/nothing", path_of(client)):
        for token in (None, "wrong"):
            status, body = await client.ask("GET", path, token)
            assert (status, body["status"]) == (401, "unauthenticated"), path
    assert (await client.ask("POST", path_of(client) + "/start", None))[0] == 401
    assert client.rig.driver.calls.count(("start", client.rig.machine().id)) == 0
    assert await client.ask("GET", "/healthz", None) == (200, "ok\n")
    assert (await client.ask("GET", "/metrics", None))[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", ""])
async def test_a_foreign_host_header_is_refused(client: Client, host: str) -> None:
    for path in ("/v1/status", "/healthz", "/metrics"):
        assert (await client.ask("GET", path, headers={"Host": host}))[0] in (400, 403)


async def test_localhost_names_the_node_too(client: Client) -> None:
    assert (await client.ask("GET", "/v1/status", headers={"Host": f"LocalHost:{client.port}"}))[0] == 200


@pytest.mark.parametrize(
    ("origin", "status"), [("http://evil.example", 403), ("null", 403), ("http://127.0.0.1:{}", 200)]
)
async def test_a_foreign_origin_is_refused_even_with_the_token(client: Client, origin: str, status: int) -> None:
    assert (await client.ask("GET", "/v1/status", headers={"Origin": origin.format(client.port)}))[0] == status


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/stop", '{"timeout": ' + "9" * 400 + ', "signal": 9}'),
        ("/stop", '{"timeout": 1e999}'),
        ("/lease", '{"ttl": NaN}'),
        ("/lease", '{"ttl": ' + "9" * 5000 + "}"),
        ("/lease", "[" * 60_000),
        ("/lease", '{"description": "\\ud800"}'),
        ("/metadata", '{"metadata": {"a": 1}}'),
        ("/metadata", '{"a": "\\udc00"}'),
    ],
)
async def test_a_body_that_makes_no_sense_is_refused(client: Client, path: str, body: str) -> None:
    status, answer = await client.ask("POST", path_of(client) + path, data=body)
    assert status == 400 and answer["status"] == "invalid_argument"


async def test_a_timeout_of_any_size_is_cut_to_the_longest(client: Client) -> None:
    assert (await client.ask("POST", path_of(client) + "/stop", data='{"timeout": ' + "9" * 400 + "}"))[0] == 200


async def test_a_token_and_a_nonce_of_any_bytes_are_just_wrong(client: Client) -> None:
    path = path_of(client)
    assert (await client.ask("POST", path + "/lease"))[0] == 201
    bearer = b"Authorization: Bearer "
    for fields, status in (
        (bearer + b"\xff\xfe", b"401"),
        (bearer + client.token.encode() + b"\r\nfly-machine-lease-nonce: \xff\xfe", b"409"),
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
        host = f"Host: 127.0.0.1:{client.port}\r\n".encode()
        writer.write(
            b"POST " + path.encode() + b"/start HTTP/1.1\r\nConnection: close\r\n" + host + fields + b"\r\n\r\n"
        )
        assert (await reader.read()).split()[1] == status
        writer.close()
        await writer.wait_closed()


async def test_a_body_over_the_limit_is_refused(client: Client) -> None:
    status, body = await client.ask("POST", path_of(client) + "/stop", data=b"x" * (MAX_BODY_BYTES + 1))
    assert status == 413 and "error" in body


def test_the_token_is_made_once_and_for_its_owner_only(tmp_path: Any) -> None:
    path = str(tmp_path / "admin.token")
    token = load_or_make_token(path)
    assert len(token) >= 43 and load_or_make_token(path) == token
    assert os.stat(path).st_mode & 0o077 == 0


async def test_health_is_503_until_the_node_is_ready(client: Client) -> None:
    client.node.is_ready = False
    assert (await client.ask("GET", "/healthz", None))[0] == 503


# --- apps and machines


async def test_apps_are_listed_and_shown(client: Client) -> None:
    _, listed = await client.ask("GET", "/v1/apps")
    assert listed["total_apps"] == 1 and listed["apps"][0]["name"] == "web"
    _, shown = await client.ask("GET", "/v1/apps/web")
    assert shown["machine_count"] == 2 and shown["hostnames"] == ["web.apps.localhost"]
    status, body = await client.ask("GET", "/v1/apps/nope")
    assert status == 404 and body == {"error": "app nope not found", "status": "not_found"}


async def test_machines_are_listed_by_state(client: Client) -> None:
    await client.rig.started()
    for query, count in (("", 2), ("?state=started", 1), ("?state=started,created", 2), ("?state=stopped", 0)):
        _, listed = await client.ask("GET", "/v1/apps/web/machines" + query)
        assert len(listed) == count, query
    assert (await client.ask("GET", "/v1/apps/web/machines/ffff"))[0] == 404


async def test_start_suspend_stop_and_what_is_told_of_it(client: Client) -> None:
    rig, path = client.rig, path_of(client)
    machine = rig.machine()
    rig.listen(machine)
    assert await client.ask("POST", path + "/start") == (
        200,
        {"previous_state": "created", "migrated": False, "new_host": ""},
    )
    _, wakes = await client.ask("GET", path + "/wakes")
    assert wakes["source"] == "user" and wakes["code"] is None
    assert 0 <= wakes["journalled"] <= wakes["forked"] <= wakes["listening"] <= wakes["answered"]
    for verb, state in (("suspend", "suspended"), ("start", "started"), ("stop", "stopped")):
        assert (await client.ask("POST", f"{path}/{verb}"))[0] == 200
        status, waited = await client.ask("GET", f"{path}/wait?state={state}&timeout=5")
        assert status == 200 and waited["state"] == state and waited["event_id"]
        assert (await client.ask("GET", path))[1]["state"] == state
    _, events = await client.ask("GET", path + "/events?limit=2")
    assert [(one["type"], one["source"]) for one in events] == [("exit", "flyd"), ("stop", "user")]


async def test_a_start_that_fails_says_why(client: Client) -> None:
    machine = client.rig.machine()
    client.rig.driver.fail_start[machine.id] = "no such program"
    status, body = await client.ask("POST", path_of(client) + "/start")
    assert status == 503 and "no such program" in body["error"] and body["wakefront_error"] == "PM07"
    _, shown = await client.ask("GET", path_of(client))
    assert shown["hold_reason"] == "no such program" and shown["hold_until"] > client.rig.clock.unix()


async def test_what_is_not_possible_in_a_state_is_412(client: Client) -> None:
    assert (await client.ask("POST", path_of(client) + "/suspend"))[0] == 412
    assert (await client.ask("POST", path_of(client) + "/signal", data='{"signal":"SIGTERM"}'))[0] == 412


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/stop", "junk"), ("/stop", "[]"), ("/stop", '{"signal":"SIGNOPE"}'), ("/stop", '{"timeout":"soon"}'),
        ("/signal", ""), ("/signal", "{}"), ("/signal", '{"signal":9}'),
    ],
)  # fmt: skip
async def test_a_body_that_makes_no_sense_is_400(client: Client, path: str, body: str) -> None:
    status, answer = await client.ask("POST", path_of(client) + path, data=body)
    assert status == 400 and answer["status"] == "invalid_argument"


async def test_a_stop_with_timeout_kills_after_it(client: Client) -> None:
    rig = client.rig
    machine = await rig.started()
    rig.driver.ignores_signals.add(machine.id)
    await client.ask("POST", path_of(client) + "/stop", data='{"signal":"SIGTERM","timeout":"2s"}')
    await rig.clock.advance(1.9)
    assert machine.state is MachineState.STOPPING
    await rig.clock.advance(0.2)
    assert machine.state is MachineState.STOPPED


async def test_waiting_ends_with_408_and_bad_questions_with_400(client: Client) -> None:
    assert (await client.ask("GET", path_of(client) + "/wait?state=stopped&timeout=0"))[0] == 408
    assert (await client.ask("GET", path_of(client) + "/wait?state=melted"))[0] == 400
    assert (await client.ask("GET", path_of(client) + "/wait?state=created&timeout=x"))[0] == 400
    assert (await client.ask("GET", path_of(client) + "/wait?state=settled&timeout=0"))[0] == 200
    assert (await client.ask("GET", path_of(client) + "/wait?state=created&version=other"))[0] == 400


async def test_restart_is_a_stop_and_a_start(client: Client) -> None:
    machine = await client.rig.started()
    pid = machine.row.pid
    assert (await client.ask("POST", path_of(client) + "/restart"))[0] == 200
    assert machine.state is MachineState.STARTED and machine.row.pid != pid


async def test_a_machine_that_was_not_woken_has_no_wakes(client: Client) -> None:
    assert (await client.ask("GET", path_of(client) + "/wakes"))[0] == 404


async def test_a_reload_with_faults_is_422(client: Client) -> None:
    assert (await client.ask("POST", "/v1/reload"))[0] == 200
    client.node.reloads = False
    assert (await client.ask("POST", "/v1/reload"))[0] == 422


async def test_the_root_certificate_is_pem(client: Client) -> None:
    status, text = await client.ask("GET", "/v1/certs/ca")
    assert status == 200 and "BEGIN CERTIFICATE" in text


# --- logs


async def test_the_last_lines_of_an_app_and_then_what_comes(client: Client) -> None:
    rig = client.rig
    path = log_path(str(rig.folder), "web", rig.machine().id)
    os.makedirs(os.path.dirname(path))
    with open(path, "w") as file:  # noqa: ASYNC230
        file.write("one\ntwo\nthree\n")
    one = rig.machine().id
    assert await client.ask("GET", "/v1/apps/web/logs?lines=2") == (200, f"{one} two\n{one} three\n")
    headers = {"Authorization": f"Bearer {client.token}"}
    async with client._session.get(client.base + "/v1/apps/web/logs?lines=1&follow=1", headers=headers) as answer:
        assert await answer.content.readline() == f"{one} three\n".encode()
        with open(path, "a") as file:  # noqa: ASYNC230
            file.write("four\n")
        reading = asyncio.get_running_loop().create_task(answer.content.readline(), name="read")
        async with asyncio.timeout(5):
            while not reading.done():
                await rig.clock.advance(0.1)
                await asyncio.sleep(0.001)  # the follower reads in a thread
        assert reading.result() == f"{one} four\n".encode()
    await settle()


# --- metrics


async def test_metrics_sum_the_cells_of_all_workers(client: Client) -> None:
    rig, cells = client.rig, client.rig.memory.cells
    machine = await rig.started()
    entry = rig.apps.get("web")
    assert entry is not None
    for worker in (0, 1):
        base = rig.memory.app_base(worker, entry.slot)
        cells[base + STATUS_CELL[200]] = 3 + worker
        cells[base + A_BYTES_IN] = 100
        cells[base + A_LATENCY] = 2
        cells[base + A_LATENCY + 3] = 1
        cells[base + A_LATENCY_SUM_US] = 500_000
        cells[rig.memory.worker_base(worker) + W_CONNECTIONS] = 10 + worker
    rig.begin_request(machine)
    _, text = await client.ask("GET", "/metrics", None)
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    labels = 'app="web",host="node",region="ams"'
    assert float(lines[f'fly_edge_http_responses_count{{{labels},status="200"}}']) == 7
    assert float(lines[f"fly_edge_data_in{{{labels}}}"]) == 200
    series = "fly_edge_http_response_time_seconds"
    assert float(lines[f'{series}_bucket{{app="web",host="node",le="0.001",region="ams"}}']) == 4
    assert float(lines[f'{series}_bucket{{app="web",host="node",le="0.01",region="ams"}}']) == 6
    assert float(lines[f"{series}_count{{{labels}}}"]) == 6
    assert float(lines[f"{series}_sum{{{labels}}}"]) == 1.0
    instance = f'app="web",host="node",instance="{machine.id}",region="ams"'
    assert float(lines[f"fly_app_concurrency{{{instance}}}"]) == 1
    assert float(lines[f"fly_instance_up{{{instance}}}"]) == 1
    assert float(lines[f"fly_instance_exit_code{{{instance}}}"]) == 3
    assert float(lines['wakefront_connections{host="node",region="ams",worker="1"}']) == 11


async def test_a_machine_that_does_not_run_has_no_concurrency(client: Client) -> None:
    machine = await client.rig.started()
    client.rig.host.end(machine.id, Exit(code=0))
    await settle()
    _, text = await client.ask("GET", "/metrics", None)
    assert "fly_instance_up{" not in text and "fly_app_concurrency{" not in text


# --- why a request goes where it goes


async def test_what_a_request_would_get_is_explained_and_nothing_is_started(client: Client) -> None:
    machine = client.rig.machine()
    asked = json.dumps({"url": "http://web.apps.localhost/", "headers": [f"fly-force-instance-id: {machine.id}"]})
    status, found = await client.ask("POST", "/v1/explain", data=asked)
    assert status == 200
    assert (found["action"], found["app"], found["machines"]) == ("wake", "web", [machine.id])
    assert [step["step"] for step in found["steps"]] == ["route", "force"]
    assert machine.state is not MachineState.STARTED and client.rig.driver.calls.count(("start", machine.id)) == 0


@pytest.mark.parametrize(
    "body",
    [
        {}, {"url": 5}, {"url": "ftp://x/"}, {"url": "http://"}, {"url": "http://a:99999/"},
        {"url": "a", "headers": "x: y"}, {"url": "a", "headers": ["no colon"]},
        {"url": "a", "source": "not an address"},
    ],
)  # fmt: skip
async def test_what_is_no_request_is_not_explained(client: Client, body: dict[str, Any]) -> None:
    status, found = await client.ask("POST", "/v1/explain", data=json.dumps(body))
    assert status == 400 and "error" in found
