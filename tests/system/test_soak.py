"""Random load while machines start, stop, freeze, crash and are cordoned: nothing hangs, every refusal has its reason.

Half a minute here; WAKEFRONT_SOAK=SECONDS makes it as long as wanted (1800 for the record).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.support.serve import ServedNode

PROGRAM = Path(__file__).parent.parent / "support" / "counting.py"
SECONDS = float(os.environ.get("WAKEFRONT_SOAK") or 20)
CLIENTS = 40
HUNG_S = 90.0


class Ledger:
    """What became of every request."""

    def __init__(self) -> None:
        self.sent = 0
        self.answered = 0
        self.refused: Counter[str] = Counter()
        self.unexplained: list[str] = []
        self.hung = 0

    def take(self, status: int, code: str) -> None:
        if status == 200:
            self.answered += 1
        elif code:
            self.refused[f"{status} {code}"] += 1
        else:
            self.unexplained.append(f"status {status} without a code")


async def _client(node: ServedNode, ledger: Ledger, rng: random.Random, name: int, until: float) -> None:
    loop = asyncio.get_running_loop()
    number = 0
    while loop.time() < until:
        number += 1
        method = rng.choice(["GET", "GET", "POST"])
        path = f"/work?ms={rng.choice([0, 1, 5, 50])}&id={name}-{number}"
        ledger.sent += 1
        try:
            async with asyncio.timeout(HUNG_S):
                ledger.take(*await _ask(node, method, path))
        except TimeoutError:
            ledger.hung += 1
        except (OSError, asyncio.IncompleteReadError, IndexError) as error:
            ledger.unexplained.append(repr(error))
        await asyncio.sleep(rng.random() * 0.05)


async def _ask(node: ServedNode, method: str, path: str) -> tuple[int, str]:
    reader, writer = await asyncio.open_connection("127.0.0.1", node.http_port)
    try:
        host = node.host("counted")
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\n\r\n".encode())
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        code = head.split(b"wakefront-error: ")[1].split(b"\r\n")[0].decode() if b"wakefront-error: " in head else ""
        return int(head[9:12]), code
    finally:
        writer.close()


async def _disturb(node: ServedNode, rng: random.Random, until: float) -> Counter[str]:
    done: Counter[str] = Counter()
    loop = asyncio.get_running_loop()
    while loop.time() < until:
        machine = rng.choice(await asyncio.to_thread(node.machines, "counted"))
        path = f"/v1/apps/counted/machines/{machine['id']}"
        deed = rng.choice(["start", "stop", "suspend", "cordon", "uncordon", "uncordon", "crash"])
        done[deed] += 1
        if deed == "crash":
            await asyncio.to_thread(_crash, node, machine["id"])
        else:
            await asyncio.to_thread(node.api, "POST", f"{path}/{deed}")  # refused where the state does not permit it
        await asyncio.sleep(rng.random() * 0.4)
    for machine in await asyncio.to_thread(node.machines, "counted"):
        await asyncio.to_thread(node.api, "POST", f"/v1/apps/counted/machines/{machine['id']}/uncordon")
    return done


def _crash(node: ServedNode, machine: str) -> None:
    """Kill the machine's process, which the environment tells."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"FLY_MACHINE_ID={machine}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)


async def _soak(node: ServedNode, seed: int) -> tuple[Ledger, Counter[str]]:
    ledger, rng = Ledger(), random.Random(seed)
    until = asyncio.get_running_loop().time() + SECONDS
    clients = [_client(node, ledger, random.Random(rng.random()), name, until) for name in range(CLIENTS)]
    done, *_ = await asyncio.gather(_disturb(node, rng, until), *clients)
    return ledger, done


def _private_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty:"))


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 240)
def test_whatever_happens_to_machines_every_request_is_answered_or_refused_with_a_reason(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    fly_toml, posts = tmp_path / "fly.toml", tmp_path / "posts"
    fly_toml.write_text(
        'app = "counted"\n[http_service]\ninternal_port = 8080\nauto_stop_machines = "suspend"\n'
        '[http_service.concurrency]\ntype = "requests"\nsoft_limit = 5\nhard_limit = 20\n'
    )
    command = json.dumps([sys.executable, "-I", str(PROGRAM)])
    apps = (
        f'[[apps]]\nfly_toml = "{fly_toml}"\ncommand = {command}\ncount = 3\nidle_timeout = "1s"\n'
        f'[apps.env]\nPOSTS = "{posts}"\n'
    )
    with ServedNode(tmp_path / "node", apps, workers=4) as node:
        assert asyncio.run(_ask(node, "GET", "/work"))[0] == 200
        before = {pid: _private_bytes(pid) for pid in node.worker_pids}
        ledger, done = asyncio.run(_soak(node, seed))
        after = {pid: _private_bytes(pid) for pid in node.worker_pids}
        left = {machine["id"]: machine["state"] for machine in node.machines("counted")}
        grown = {pid: (after[pid] - before[pid]) / 2**20 for pid in before}
        print(f"sent {ledger.sent}, answered {ledger.answered}, refused {dict(ledger.refused)}, hung {ledger.hung}")
        print(f"deeds {dict(done)}, {left}, workers grew by {', '.join(f'{one:.1f}' for one in grown.values())} MiB")
        assert ledger.unexplained == [] and ledger.hung == 0
    assert ledger.sent == ledger.answered + ledger.refused.total()
    assert ledger.answered > ledger.sent // 2
    counts = Counter(posts.read_text().split())
    assert [one for one, count in counts.items() if count > 1] == [], "an unsafe request was delivered twice"
    assert all(one < 16 for one in grown.values()), grown
