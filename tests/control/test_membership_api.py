"""The endpoints of the fleet over real TCP; the node is a real one of a fleet of its own."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from proxy.control.api import Api
from proxy.control.membership import Membership
from proxy.control.membership_api import MembershipApi
from proxy.metrics import Metrics
from proxy.wire.joining import Invite
from tests.control.rig import Rig
from tests.control.test_api import Client, Node
from tests.support.fleet import Hasty, storage_in

INVITES = "/v1/node/invites"


@pytest_asyncio.fixture
async def client(rig: Rig) -> AsyncIterator[Client]:
    await rig.load()
    membership = Membership(storage_in(rig.folder), Hasty(), "a", "ams", "127.0.0.1:7443")
    await membership.open()
    node = Node(rig)
    api = Api(node, rig.apps, rig.fleet, rig.store, Metrics(rig.memory, node), rig.clock, str(rig.folder))
    api.membership = MembershipApi(lambda: membership, lambda: "alone", Hasty().unix)
    await api.start("127.0.0.1", 0)
    async with aiohttp.ClientSession() as session:
        yield Client(rig, node, api, session)
    await api.close()


async def test_all_need_the_token(client: Client) -> None:
    for method, path in (("POST", INVITES), ("GET", INVITES), ("DELETE", f"{INVITES}/x"), ("GET", "/v1/node/members")):
        assert (await client.ask(method, path, token=None))[0] == 401


async def test_an_invite_is_made_listed_without_its_token_and_taken_back(client: Client) -> None:
    status, made = await client.ask("POST", INVITES)
    assert status == 201
    invite = Invite.from_token(made["token"])
    assert (invite.node, invite.address, invite.id) == ("a", "127.0.0.1:7443", made["id"])
    assert made["expires_at"] - made["created_at"] == pytest.approx(900)
    status, listed = await client.ask("GET", INVITES)
    assert status == 200
    assert listed["invites"] == [{key: made[key] for key in made if key not in ("token", "address")}]
    assert await client.ask("DELETE", f"{INVITES}/{made['id']}") == (204, "")
    assert await client.ask("GET", INVITES) == (200, {"invites": []})
    assert (await client.ask("DELETE", f"{INVITES}/{made['id']}"))[0] == 404


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"valid": "x"}, 400), ({"valid": []}, 400), ({"valid": True}, 400), ({"valid": -5}, 400),
        ({"valid": 1e300}, 400),
        ({"address": 5}, 400), ({"address": "0.0.0.0:1"}, 400), ({"replace": {}}, 400), ({"replace": "a"}, 400),
        ({"replace": "z"}, 404), ([], 400), ("junk", 400),
    ],
)  # fmt: skip
async def test_an_invite_that_makes_no_sense_is_refused(client: Client, body: Any, status: int) -> None:
    found, answer = await client.ask("POST", INVITES, data=json.dumps(body))
    assert found == status and answer["error"]
    assert await client.ask("GET", INVITES) == (200, {"invites": []})


async def test_the_members_are_those_that_are_known_and_hold_no_secret(client: Client) -> None:
    status, answer = await client.ask("GET", "/v1/node/members")
    assert status == 200 and [one["name"] for one in answer["members"]] == ["a"]
    assert set(answer) == {
        "root", "origin", "address", "certificate_expires_at", "nodes", "invites_refused", "members"
    }  # fmt: skip
