"""How `wakefront serve` becomes a node of a fleet: real processes, and the command line."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest

from proxy.cli.node import bound_ports
from proxy.wire.joining import Invite
from tests.support.fleet import FleetNode
from tests.support.processes import wait_for
from tests.support.serve import ServedNode, free_ports, wakefront

pytestmark = pytest.mark.slow


def _fleet(node: ServedNode) -> dict[str, object] | None:
    wait_for(lambda: node.api("GET", "/v1/status")[1]["fleet"] is not None, 10, "a fleet")
    found: dict[str, object] = node.api("GET", "/v1/status")[1]["fleet"]
    return found


def test_the_first_node_makes_a_fleet_says_so_and_keeps_it_over_a_restart(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with ServedNode(tmp_path, workers=1, listen=f'backhaul = "127.0.0.1:{port}"') as node:
        fleet = _fleet(node)
        assert fleet is not None
        assert (fleet["origin"], fleet["nodes"], fleet["address"]) == ("made", 1, f"127.0.0.1:{port}")
        assert "this is the first node of a new fleet" in node.log() and str(fleet["root"])[:16] in node.log()
        assert f"fleet {str(fleet['root'])[:16]} (made here), 1 node known" in node.cli("status")
        token = node.cli("node", "invite")
        invite = Invite.from_token(token)
        assert (invite.node, invite.address) == ("test-node", f"127.0.0.1:{port}")
        assert invite.fingerprint.hex() == fleet["root"]
        node.stop()
        assert token.strip() not in node.log()
        node.start()
        node.wait_ready()
        again = _fleet(node)
        assert again is not None and again["root"] == fleet["root"]
        assert node.log().count("this is the first node") == 1
        assert invite.id in node.cli("node", "invites")


def test_a_node_by_itself_becomes_the_first_of_a_fleet_by_a_reload(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with ServedNode(tmp_path, workers=1) as node:
        assert node.api("GET", "/v1/status")[1]["fleet"] is None
        status, answer = node.api("GET", "/v1/node/members")
        assert status == 409 and "add backhaul" in answer["error"]
        node.config.write_text(
            node.config.read_text().replace("[listen]\n", f'[listen]\nbackhaul = "127.0.0.1:{port}"\n')
        )
        node.cli("reload")
        fleet = _fleet(node)
        assert fleet is not None and fleet["address"] == f"127.0.0.1:{port}"
        assert {one["public_port"] for one in node.status()["listen"]} == {0, 80, 443}
        assert {one["public_port"] for one in bound_ports(node.data_dir)} == {80, 443}


async def test_a_node_that_serves_by_itself_joins_and_is_of_the_fleet_after_a_reload(tmp_path: Path) -> None:
    (port,) = free_ports(1)

    def joins(token: str) -> dict[str, object] | None:
        with ServedNode(tmp_path / "b", workers=1) as node:
            text = node.config.read_text()
            node.config.write_text(text.replace("[listen]\n", f'[listen]\nbackhaul = "127.0.0.1:{port}"\n'))
            said = node.cli("node", "join", token)
            assert "test-node has joined the fleet of a (ams)." in said and "Next: wakefront reload" in said
            node.cli("reload")
            return _fleet(node)

    async with FleetNode(tmp_path / "a") as a:
        fleet = await asyncio.to_thread(joins, await a.token())
        assert fleet is not None
        assert (fleet["origin"], fleet["nodes"]) == ("joined", 2)
        assert fleet["root"] == a.membership.bundle.fingerprint.hex()
        assert a.membership.nodes[1].backhaul == f"127.0.0.1:{port}"


async def test_a_node_that_runs_as_the_first_of_a_fleet_is_stopped_joins_and_is_of_the_other(tmp_path: Path) -> None:
    (port,) = free_ports(1)

    def joins(token: str) -> tuple[object, object]:
        with ServedNode(tmp_path / "b", workers=1, listen=f'backhaul = "127.0.0.1:{port}"') as node:
            before = _fleet(node)
            node.cli("node", "join", token, status=1)
            node.stop()
            assert "kept aside" in node.cli("node", "join", token)
            node.start()
            node.wait_ready()
            after = _fleet(node)
            assert before is not None and after is not None
            return before["root"], after["root"]

    async with FleetNode(tmp_path / "a") as a:
        before, after = await asyncio.to_thread(joins, await a.token())
        assert before != after == a.membership.bundle.fingerprint.hex()


async def test_a_disk_that_takes_no_more_is_found_before_the_invite_is_used(tmp_path: Path) -> None:
    """A real limit of the system's on what is written, in place of a full disk."""
    config = tmp_path / "b" / "config.toml"
    config.parent.mkdir()
    config.write_text('[node]\nname = "b"\ndata_dir = "data"\n[listen]\nbackhaul = "127.0.0.1:7443"\n')
    async with FleetNode(tmp_path / "a") as a:
        command = [wakefront(), "node", "join", await a.token(), "--config", str(config)]
        limited = await asyncio.to_thread(
            subprocess.run, ["prlimit", "--fsize=2000", *command], capture_output=True, text=True, check=False
        )
        assert limited.returncode == 1 and "File too large" in limited.stderr
        assert limited.stderr.count("\n") == 1
        assert [path.name for path in (config.parent / "data").rglob("*.sealed")] == []
        assert not [path for path in (config.parent / "data").rglob("*.new")]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_a_fleet_that_cannot_be_opened_is_a_warning_and_the_node_serves(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with ServedNode(tmp_path, workers=1, listen=f'backhaul = "127.0.0.1:{port}"') as node:
        _fleet(node)
        node.stop()
        bundle = node.data_dir / "certs" / "cluster" / "bundle.sealed"
        whole = bundle.read_bytes()
        bundle.write_bytes(whole[:-1])
        node.start()
        node.wait_ready()
        wait_for(lambda: "cluster/bundle" in node.cli("status"), 10, "a warning")
        assert "cluster/bundle" in node.api("POST", "/v1/node/invites")[1]["error"]
        bundle.write_bytes(whole)
        assert _fleet(node) is not None
        wait_for(lambda: "cluster/bundle" not in node.cli("status"), 10, "no warning")
