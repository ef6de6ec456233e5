"""`wakefront node …` against the real admin API of a node that lets others join over TLS."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from proxy.control.api import Api
from proxy.control.membership import Membership
from proxy.control.membership_api import MembershipApi
from proxy.metrics import Metrics
from proxy.wire.joining import Invite
from tests.cli.conftest import Outcome, Run
from tests.cli.scripted_admin import write_config
from tests.control.rig import Rig
from tests.control.test_api import Node
from tests.support.fleet import FleetNode, cluster_of


class Served:
    """A node of a fleet, whose admin API ./config.toml names."""

    def __init__(self, fleet: FleetNode, run: Run) -> None:
        self.fleet = fleet
        self._run = run
        self.opened: Membership | str = fleet.membership

    async def __call__(self, *words: str) -> Outcome:
        return await asyncio.to_thread(self._run, "node", *words)

    async def ask(self, *words: str) -> Any:
        done = await self(*words, "--json")
        assert done.code == 0, done.err
        return done.json


@pytest_asyncio.fixture
async def node(tmp_path: Path, run: Run) -> AsyncIterator[Served]:
    folder = tmp_path / "data"
    folder.mkdir()
    rig = Rig(folder)
    await rig.load()
    api = Api(Node(rig), rig.apps, rig.fleet, rig.store, Metrics(rig.memory, Node(rig)), rig.clock, str(folder))
    async with FleetNode(folder) as fleet:
        served = Served(fleet, run)
        api.membership = MembershipApi(lambda: served.opened, lambda: "alone", fleet.clock.unix)
        await api.start("127.0.0.1", 0)
        assert api.address is not None
        write_config(tmp_path, api.address[1], None)
        yield served
        await api.close()
    await rig.close()


def a_config(folder: Path, name: str = "fra-1", backhaul: str = 'backhaul = "127.0.0.1:7443"') -> str:
    folder.mkdir(exist_ok=True)
    config = folder / "config.toml"
    config.write_text(f'[node]\nname = "{name}"\nregion = "fra"\ndata_dir = "data"\n[listen]\n{backhaul}\n')
    return str(config)


async def test_an_invite_is_one_line_by_which_a_node_joins(node: Served, tmp_path: Path) -> None:
    made = await node("invite")
    assert made.code == 0 and made.out.count("\n") == 1
    assert Invite.from_token(made.out).address == f"127.0.0.1:{node.fleet.port}"
    assert "15 min" in made.err and "password" in made.err
    config = a_config(tmp_path / "new")
    joined = await node("join", made.out.strip(), "--config", config)
    assert joined.code == 0, joined.err
    assert joined.out.splitlines() == [
        "fra-1 has joined the fleet of a (ams).", f"Next: wakefront serve --config {config}"
    ]  # fmt: skip
    bundle = cluster_of(tmp_path / "new" / "data").load()
    assert bundle is not None and bundle.fingerprint == node.fleet.membership.bundle.fingerprint
    (row,) = await node.ask("invites")
    assert (row["state"], row["used_by"]) == ("used", "fra-1")


async def test_all_of_it_can_be_had_as_json(node: Served, tmp_path: Path) -> None:
    made = await node.ask("invite", "--valid", "2m", "--address", f"localhost:{node.fleet.port}")
    assert made["state"] == "open" and made["address"] == f"localhost:{node.fleet.port}"
    assert 115 < made["expires_at"] - time.time() < 121
    listed = await node.ask("invites")
    assert [one["id"] for one in listed] == [made["id"]] and "token" not in listed[0]
    joined = await node.ask("join", made["token"], "--config", a_config(tmp_path / "new"), "--address", "[::1]:7")
    assert (joined["node"], joined["inviter"], joined["left_own_ca"], joined["running"]) == ("fra-1", "a", False, False)
    assert {one["name"]: one["backhaul"] for one in joined["nodes"]}["fra-1"] == "[::1]:7"


async def test_the_line_may_come_from_standard_input(
    node: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await node("invite")
    monkeypatch.setattr("sys.stdin", io.StringIO(made.out))
    assert (await node("join", "-", "--config", a_config(tmp_path / "new"))).code == 0


async def test_an_invite_that_was_taken_back_lets_nobody_in(node: Served, tmp_path: Path) -> None:
    assert "no invites" in (await node("invites")).out
    made = await node.ask("invite")
    shown = await node("invites")
    assert made["id"] in shown.out and "open" in shown.out and made["token"] not in shown.out
    assert made["id"] in (await node("revoke", made["id"])).out
    refused = await node("join", made["token"], "--config", a_config(tmp_path / "new"))
    assert refused.code == 1 and "have a new one made" in refused.err
    again = await node("revoke", made["id"])
    assert again.code == 1 and "no invite" in again.err


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--valid", "soon"), 2, "expected a duration"),
        (("--valid", "0"), 2, "valid for 1 s"),
        (("--valid", "30d"), 2, "expected a duration"),
        (("--valid", "1000h"), 2, "7 days"),
        (("--address", "here"), 2, "not HOST:PORT"),
        (("--replace", "nobody"), 1, "no node is called 'nobody'"),
    ],
)
async def test_an_invite_that_makes_no_sense_is_refused_in_a_sentence(
    node: Served, words: tuple[str, ...], code: int, says: str
) -> None:
    done = await node("invite", *words)
    assert (done.code, done.out) == (code, "")
    assert says.lower() in done.err.lower() and done.err.count("\n") == 1


async def test_a_node_by_itself_says_how_to_become_one_of_several(node: Served) -> None:
    node.opened = 'this node is by itself: add backhaul = "IP:PORT" to [listen] in its config.toml'
    for words in (("invite",), ("invites",), ("revoke", "x")):
        done = await node(*words)
        assert done.code == 1 and "add backhaul" in done.err


@pytest.mark.parametrize(
    ("backhaul", "says"),
    [
        ("", 'add backhaul = "IP:PORT" to [listen]'),
        ('backhaul = "0.0.0.0:7443"', "--address"),
        ('backhaul = "127.0.0.1:0"', "--address"),
        ('backhaul = "nowhere"', "has faults"),
    ],
)
async def test_a_node_that_others_could_not_reach_does_not_join(
    node: Served, tmp_path: Path, backhaul: str, says: str
) -> None:
    token = (await node.ask("invite"))["token"]
    done = await node("join", token, "--config", a_config(tmp_path / "new", backhaul=backhaul))
    assert done.code == 2 and says in done.err
    assert not (tmp_path / "new" / "data").exists()
    assert (await node.ask("invites"))[0]["state"] == "open"


async def test_what_the_inviter_refuses_is_told_in_a_sentence(node: Served, tmp_path: Path) -> None:
    token = (await node.ask("invite"))["token"]
    done = await node("join", token, "--config", a_config(tmp_path / "new", "a"))
    assert done.code == 1 and "two nodes with one name" in done.err and "--replace a" in done.err
    done = await node("join", token[:-9], "--config", a_config(tmp_path / "new"))
    assert done.code == 1 and "copy the whole line" in done.err
    assert (await node("join", token, "--config", a_config(tmp_path / "new"))).code == 0


async def test_the_nodes_that_are_known_can_be_asked_for(node: Served, tmp_path: Path) -> None:
    from proxy.cli.node import Api as Asked
    from proxy.cli.node import find_node

    token = (await node.ask("invite"))["token"]
    await node.ask("join", token, "--config", a_config(tmp_path / "new"))
    answer = await asyncio.to_thread(lambda: Asked(find_node(None, None)).get("/v1/node/members"))
    assert [(one["name"], one["region"], one["backhaul"]) for one in answer["members"]] == [
        ("a", "ams", f"127.0.0.1:{node.fleet.port}"), ("fra-1", "fra", "127.0.0.1:7443")
    ]  # fmt: skip
    assert (answer["origin"], answer["nodes"], answer["root"]) == (
        "made", 2, node.fleet.membership.bundle.fingerprint.hex()
    )  # fmt: skip
