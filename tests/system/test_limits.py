"""Hard limits, measured by the origin: with four workers it never has more at once, and nobody in line is lost."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.support.serve import ServedNode

PROGRAM = Path(__file__).parent.parent / "support" / "counting.py"
REQUESTS = 10_000 if os.environ.get("WAKEFRONT_SOAK") else 2_000


def limited_app(folder: Path, limit: int, kind: str, keys: str = "") -> str:
    path = folder / "fly.toml"
    path.write_text(
        f'app = "counted"\n[http_service]\ninternal_port = 8080\nauto_stop_machines = "off"\n'
        f'[http_service.concurrency]\ntype = "{kind}"\nsoft_limit = {limit}\nhard_limit = {limit}\n'
    )
    command = json.dumps([sys.executable, "-I", str(PROGRAM)])
    return f'[[apps]]\nfly_toml = "{path}"\ncommand = {command}\n{keys}\n'


async def ask(port: int, host: str, target: str, method: str = "GET") -> tuple[int, bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"{method} {target} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\n\r\n".encode())
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        return int(head[9:12]), await reader.readexactly(length)
    finally:
        writer.close()


async def crowd(port: int, host: str, target: str, clients: int, requests: int) -> Counter[int]:
    left, statuses = requests, Counter[int]()

    async def client() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            statuses[(await ask(port, host, target))[0]] += 1

    await asyncio.gather(*(client() for _ in range(clients)))
    return statuses


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "kind"), [(1, "requests"), (5, "requests"), (5, "connections")])
def test_the_origin_never_sees_more_than_the_hard_limit_over_four_workers(
    tmp_path: Path, limit: int, kind: str
) -> None:
    apps = limited_app(tmp_path, limit, kind, 'queue_timeout = "60s"')
    with ServedNode(tmp_path / "node", apps, workers=4) as node:
        host = node.host("counted")
        statuses = asyncio.run(crowd(node.http_port, host, "/work?ms=1", 100, REQUESTS))
        told = json.loads(asyncio.run(ask(node.http_port, host, "/told"))[1])
    assert statuses == {200: REQUESTS}, "none is lost below the bound of the queue"
    assert told["most"] <= limit
    assert told["served"] == REQUESTS and told["twice"] == []


@pytest.mark.slow
def test_over_the_bound_of_the_queue_and_after_its_time_requests_are_told_to_come_back(tmp_path: Path) -> None:
    apps = limited_app(tmp_path, 1, "requests", 'queue_timeout = "500ms"\nmax_queued = 3')
    with ServedNode(tmp_path / "node", apps, workers=2) as node:
        host = node.host("counted")
        assert asyncio.run(ask(node.http_port, host, "/work?ms=0"))[0] == 200
        statuses = asyncio.run(crowd(node.http_port, host, "/work?ms=2000", 12, 12))
        told = json.loads(asyncio.run(ask(node.http_port, host, "/told"))[1])
    assert statuses[200] >= 1 and statuses[503] >= 8 and statuses.total() == 12
    assert told["most"] == 1 and told["served"] == 1 + statuses[200]
