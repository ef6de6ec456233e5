"""fly-replay between real machines of a real node: large bodies, upgrades, sessions that are remembered."""

from __future__ import annotations

import hashlib
import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.serve import ServedNode

PROGRAM = Path(__file__).parent.parent / "support" / "replaying.py"
MIB = 1024 * 1024


def replaying_app(folder: Path, ports: str = "", keys: str = "") -> str:
    path = folder / "fly.toml"
    path.write_text(
        'app = "handed"\n[http_service]\ninternal_port = 8080\nauto_stop_machines = "off"\n'
        f'[http_service.concurrency]\ntype = "requests"\nsoft_limit = 100\n{ports}'
    )
    command = json.dumps([sys.executable, "-I", str(PROGRAM)])
    return f'[[apps]]\nfly_toml = "{path}"\ncommand = {command}\ncount = 2\n{keys}\n'


def _ids(node: ServedNode) -> tuple[str, str]:
    one, two = sorted(machine["id"] for machine in node.machines("handed"))
    return one, two


def _ask(node: ServedNode, headers: dict[str, str], method: str = "GET", body: bytes | None = None) -> dict[str, Any]:
    status, _, text = node.request(method, "handed", headers=headers, body=body)
    assert status == 200, (status, text[:500])
    told: dict[str, Any] = json.loads(text)
    return told


def _rss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no Private_Dirty")


@pytest.mark.slow
def test_an_upload_of_100_mb_is_replayed_byte_for_byte_in_little_memory(tmp_path: Path) -> None:
    size, piece = 100 * MIB, bytes(range(256)) * 4096
    expected = hashlib.sha256(piece * (size // len(piece))).hexdigest()
    with ServedNode(tmp_path / "node", replaying_app(tmp_path, keys="keep_bodies = true"), workers=1) as node:
        one, two = _ids(node)
        headers = {"fly-force-instance-id": one, "x-go": two}
        assert _ask(node, headers, "POST", piece)["bytes"] == len(piece)  # code and pools are loaded
        (worker,) = node.worker_pids
        before = _rss(worker)
        with node.connect("handed", timeout=120) as client:
            client.sendall(
                f"POST /upload HTTP/1.1\r\nHost: {node.host('handed')}\r\nContent-Length: {size}\r\n"
                f"fly-force-instance-id: {one}\r\nx-go: {two}\r\n\r\n".encode()
            )
            most = before
            for _ in range(size // len(piece)):
                client.sendall(piece)
                most = max(most, _rss(worker))
            answer = _whole(client)
            most = max(most, _rss(worker))
    told = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert (told["machine"], told["bytes"], told["sha256"]) == (two, size, expected)
    assert most - before <= 8 * MIB, f"{(most - before) / MIB:.1f} MiB"


def _whole(client: socket.socket) -> bytes:
    data = b""
    while True:
        head, blank, body = data.partition(b"\r\n\r\n")
        if blank:
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            if len(body) >= length:
                return data
        more = client.recv(65536)
        assert more, data
        data += more


def test_an_upgrade_is_replayed_and_its_target_does_it(tmp_path: Path) -> None:
    with ServedNode(tmp_path / "node", replaying_app(tmp_path), workers=2) as node:
        one, two = _ids(node)
        with node.connect("handed", tls=True) as client:
            client.sendall(
                f"GET /ws HTTP/1.1\r\nHost: {node.host('handed')}\r\nConnection: Upgrade\r\nUpgrade: echo\r\n"
                f"fly-force-instance-id: {one}\r\nx-go: {two}\r\n\r\n".encode()
            )
            with client.makefile("rb") as stream:
                assert stream.readline().startswith(b"HTTP/1.1 101 ")
                while stream.readline().strip():
                    pass
                assert stream.readline().strip().decode() == two
                client.sendall(b"hello\n")
                assert stream.readline() == b"hello\n"


def test_a_sessions_replay_is_remembered_and_the_target_is_told(tmp_path: Path) -> None:
    rule = (
        '[[http_service.http_options.replay_cache]]\npath_prefix = "/"\nttl_seconds = 60\ntype = "cookie"\n'
        'name = "session"\n'
    )
    with ServedNode(tmp_path / "node", replaying_app(tmp_path, rule), workers=1) as node:
        one, two = _ids(node)
        first = _ask(node, {"fly-force-instance-id": one, "x-go": two, "Cookie": "session=abc", "x-state": "s1"})
        assert first["machine"] == two and first["headers"]["fly-replay-src"].endswith(";state=s1")
        assert first["headers"]["fly-replay-cache-status"] == "miss"
        seen = _ask(node, {"fly-force-instance-id": one, "x-go": two, "Cookie": "session=abc"})
        assert seen["headers"]["fly-replay-cache-status"] == "miss", "one with state is not remembered"
        for _ in range(5):
            again = _ask(node, {"Cookie": "session=abc"})
            assert again["machine"] == two and again["headers"]["fly-replay-cache-status"] == "hit"
            assert "fly-replay-src" not in again["headers"]
        assert "fly-replay-cache-status" not in _ask(node, {"Cookie": "session=another"})["headers"]


def test_machines_of_another_organization_are_not_reached(tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text('app = "other"\n[http_service]\ninternal_port = 8080\nauto_stop_machines = "off"\n')
    command = json.dumps([sys.executable, "-I", str(PROGRAM)])
    apps = replaying_app(tmp_path) + f'[[apps]]\nfly_toml = "{other}"\ncommand = {command}\norganization = "else"\n'
    with ServedNode(tmp_path / "node", apps, workers=1) as node:
        one, _ = _ids(node)
        fields = {"fly-force-instance-id": one, "x-go": "x;app=other"}
        status, headers, _ = node.request("GET", "handed", headers=fields)
        assert (status, headers["wakefront-error"]) == (502, "PA05")
        node.write_config(apps + 'replay_sources = ["personal"]\n')
        node.cli("reload")
        status, headers, _ = node.request("GET", "handed", headers=fields)
        assert (status, headers["wakefront-error"]) == (502, "WR01"), "let in, but there is no machine x"
