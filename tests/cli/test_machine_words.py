"""`wakefront machine cordon|uncordon|wait|lease|metadata` against the real admin API over fake machines."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from proxy.cli import node
from proxy.control import leases
from proxy.control.api import Api
from proxy.metrics import Metrics
from proxy.model import MachineState
from tests.cli.conftest import Outcome, Run
from tests.cli.scripted_admin import ScriptedAdmin, machine, write_config
from tests.control.rig import Rig, an_app
from tests.control.test_api import Node

Words = Callable[..., Awaitable[Outcome]]


@pytest_asyncio.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    """A node with one machine whose admin API ./config.toml names."""
    folder = tmp_path / "data"
    folder.mkdir()
    rig = Rig(folder)
    await rig.load(an_app())
    api = Api(Node(rig), rig.apps, rig.fleet, rig.store, Metrics(rig.memory, Node(rig)), rig.clock, str(folder))
    await api.start("127.0.0.1", 0)
    assert api.address is not None
    write_config(tmp_path, api.address[1], None)
    yield rig
    await api.close()
    await rig.close()


@pytest.fixture
def words(run: Run) -> Words:
    """A command line, run in a thread: the API has the loop."""

    async def words(*words: str) -> Outcome:
        return await asyncio.to_thread(run, "machine", *words)

    return words


def test_the_name_of_the_nonces_header_is_the_nodes() -> None:
    assert node.lease_header("a1") == {leases.HEADER: "a1"} and node.lease_header(None) == {}


# --- cordon


async def test_cordon_and_uncordon_say_what_they_did_and_the_list_shows_it(rig: Rig, words: Words) -> None:
    one = rig.machine().id
    done = await words("cordon", "web")
    assert done.code == 0 and done.out == f"web/{one}: cordoned, it gets no new requests\n"
    assert rig.machine().record().cordoned
    assert "cordoned" in (await words("list")).out and "cordoned" in (await words("status", "web")).out
    assert (await words("cordon", "web", "--json")).json == {
        "app": "web", "id": one, "cordoned": True, "acknowledged": True
    }  # fmt: skip
    assert (await words("uncordon", one[:6], "--json")).json == {"app": "web", "id": one, "cordoned": False}
    assert not rig.machine().record().cordoned and "cordoned" not in (await words("list")).out


async def test_a_cordon_that_a_worker_did_not_confirm_is_told_of(rig: Rig, words: Words) -> None:
    await rig.started()
    rig.cordons.acknowledge = False
    done = await words("cordon", "web")
    assert done.code == 0 and "has not confirmed" in done.out
    assert (await words("cordon", "web", "--json")).json["acknowledged"] is False


# --- lease


async def test_a_lease_is_taken_shown_extended_and_released(rig: Rig, words: Words) -> None:
    assert "nobody holds a lease" in (await words("lease", "show", "web")).out
    assert (await words("lease", "show", "web", "--json")).json["lease"] is None
    taken = (await words("lease", "take", "web", "--ttl", "90", "-d", "deploying", "--json")).json
    lease = taken["lease"]
    assert lease["expires_at"] == rig.clock.unix() + 90 and taken["id"] == rig.machine().id
    shown = (await words("lease", "show", "web")).out
    assert "deploying" in shown and f"nonce {lease['nonce']}" in shown
    status = (await words("status", "web")).out
    assert "leased by admin" in status and lease["nonce"] not in status
    longer = (await words("lease", "extend", "web", "--nonce", lease["nonce"], "--ttl", "500", "--json")).json
    assert longer["lease"] == {**lease, "expires_at": rig.clock.unix() + 500}
    assert "given back" in (await words("lease", "release", "web", "--nonce", lease["nonce"])).out
    assert rig.machine().row.lease is None


async def test_changes_of_a_leased_machine_are_refused_with_the_reason_and_done_with_the_nonce(
    rig: Rig, words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    await rig.started()
    nonce = (await words("lease", "take", "web", "-d", "deploying", "--json")).json["lease"]["nonce"]
    refused = (
        "cordon web", "uncordon web", "stop web", "suspend web", "restart web", "metadata set web a=b",
        "metadata remove web a", "lease take web",
    )  # fmt: skip
    for command in refused:
        ended = await words(*command.split())
        assert ended.code == 1 and ended.out == "" and "deploying" in ended.err and "is held by admin" in ended.err
    ended = await words("lease", "release", "web", "--nonce", "abc")
    assert ended.code == 1 and "another lease" in ended.err
    assert (await words("cordon", "web", "--nonce", nonce)).code == 0
    monkeypatch.setenv("WAKEFRONT_LEASE_NONCE", nonce)
    assert (await words("stop", "web")).code == 0
    assert rig.machine().state is MachineState.STOPPED


@pytest.mark.parametrize("nonce", ["a b", "a\r\nX: y", "ä"])
async def test_what_can_be_no_nonce_is_not_sent(rig: Rig, words: Words, nonce: str) -> None:
    ended = await words("lease", "release", "web", "--nonce", nonce)
    assert ended.code == 2 and "no nonce" in ended.err


# --- metadata


async def test_metadata_is_set_shown_and_removed(rig: Rig, words: Words) -> None:
    done = await words("metadata", "set", "web", "colour=blue", "note=a=b c")
    assert done.code == 0 and "colour set, note set" in done.out
    assert (await words("metadata", "show", "web", "--json")).json == {
        "app": "web", "id": rig.machine().id,
        "metadata": {"fly_process_group": "app", "colour": "blue", "note": "a=b c"},
    }  # fmt: skip
    shown = (await words("metadata", "show", "web")).out
    assert "colour" in shown and "blue" in shown and "fly_process_group" in shown
    assert (await words("metadata", "remove", "web", "colour", "--json")).json["metadata"] == {
        "fly_process_group": "app", "note": "a=b c"
    }  # fmt: skip


async def test_metadata_that_is_none_is_refused(rig: Rig, words: Words) -> None:
    for pair in ("colour", "=blue"):
        ended = await words("metadata", "set", "web", pair)
        assert ended.code == 2 and "KEY=VALUE" in ended.err
    ended = await words("metadata", "set", "web", "wakefront_busy=perhaps")
    assert ended.code == 1 and "wakefront_busy: expected true, false" in ended.err


# --- wait


async def test_wait_ends_when_the_machine_is_there(rig: Rig, words: Words) -> None:
    one = rig.machine()
    rig.listen(one)
    waiting = asyncio.create_task(words("wait", "web", "--json"))
    while not one.watchers:
        await asyncio.sleep(0)
    await asyncio.shield(rig.fleet.wake(one.id, "user"))
    done = await waiting
    assert done.code == 0 and done.json["state"] == "started" and done.json["version"] == one.row.instance_id
    assert (await words("wait", "web", "-s", "stopped,started")).out == f"web/{one.id}: started\n"
    assert (await words("wait", "web", "-s", "stopped", "-s", "settled")).code == 0


async def test_wait_that_runs_out_or_makes_no_sense_fails_with_the_reason(rig: Rig, words: Words) -> None:
    ended = await words("wait", "web", "--timeout", "0")
    assert ended.code == 1 and "is created, and came not to started" in ended.err
    assert "none that can be waited for" in (await words("wait", "web", "-s", "flying")).err
    assert "version is" in (await words("wait", "web", "--version", "other")).err
    assert "no event" in (await words("wait", "web", "--from-event", "7")).err


async def test_a_machine_that_is_not_there_is_said_so(rig: Rig, words: Words) -> None:
    for command in (("cordon", "x"), ("wait", "x"), ("lease", "show", "x"), ("metadata", "show", "x")):
        ended = await words(*command)
        assert ended.code == 1 and "No machine has the id x" in ended.err


# --- checks


def test_the_last_results_of_checks_are_shown(node: ScriptedAdmin, run: Run) -> None:
    check = {"name": "servicecheck-00-http-8080", "status": "critical", "updated_at": "2027-01-15T08:00:00Z"}
    node.apps["hello"] = [machine("148e1234567890", "started", checks=[{**check, "output": "503\nbusy"}])]
    out = run("machine", "status", "hello").out
    assert "servicecheck-00-http-8080" in out and "critical" in out and "503" in out and "busy" not in out


def test_help_loads_none_of_what_the_node_runs() -> None:
    code = (
        "import sys, proxy.cli.main, proxy.cli.machine\n"
        "print([name for name in ('aiohttp', 'msgspec', 'proxy.control.api') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
