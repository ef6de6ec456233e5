"""Reloads, upgrades and killed workers under a thousand requests a second: what became of every request, by cause.

A few of each here; with WAKEFRONT_SOAK set, 20 reloads, 5 upgrades and 20 killed workers. The ledger is printed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.apps import make_app, starts
from tests.support.faults import kill_worker
from tests.support.load import Load
from tests.support.processes import wait_for
from tests.support.serve import ServedNode

LONG = bool(os.environ.get("WAKEFRONT_SOAK"))
RELOADS, UPGRADES, KILLS = (20, 5, 20) if LONG else (3, 1, 3)
LEAST_PER_S = 1000.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600 if LONG else 180)]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedNode]:
    folder = tmp_path_factory.mktemp("node")
    with ServedNode(folder, make_app(folder, "web"), node='autostop_interval = "1h"') as one:
        one.get("web")
        yield one


def reload(node: ServedNode, number: int) -> set[int]:
    """Alternately a setting of an app and the number of workers."""
    if number % 2:
        text = re.sub(r"workers = \d+", f"workers = {2 + number % 4 // 2}", node.config.read_text())
        node.config.write_text(text)
    else:
        node.write_config(make_app(node.folder, "web", keys=f'idle_timeout = "{number + 7}m"'))
    node.cli("reload")
    return set()


def upgrade(node: ServedNode, number: int) -> set[int]:
    assert json.loads(node.cli("upgrade", "--json"))["stage"] == "done"
    return set()


def kill(node: ServedNode, number: int) -> set[int]:
    """Our ends of the connections that the killed worker had."""
    rows = [one["slot"] for one in node.status()["children"] if one["role"] == "worker" and not one["retiring"]]
    row = rows[number % len(rows)]
    old, ports = kill_worker(node, row)
    node.wait_replaced("worker", row, old)
    return ports


@pytest.mark.parametrize(
    ("change", "times"), [(reload, RELOADS), (upgrade, UPGRADES), (kill, KILLS)], ids=["reload", "upgrade", "kill"]
)
def test_every_request_is_answered_or_was_on_a_connection_of_a_killed_worker(
    node: ServedNode, change: Callable[[ServedNode, int], set[int]], times: int
) -> None:
    machine = starts(node.folder, "web")
    explained: set[int] = set()
    with Load(node, "web", kept=48, tls=12, kept_per_s=1200, fresh_per_s=60) as load:
        load.run_for(0.3)
        for number in range(times):
            explained |= change(node, number)
            load.run_for(0.2)
        load.run_for(0.5)
    broken = [one for one in load.failures if one.port in explained]
    refused = [one for one in load.failures if "ConnectionRefused" in one.cause]
    print(
        f"{change.__name__} x{times}: {load.per_s:.0f}/s, {load.answers} answered, {len(broken)} on connections of "
        f"killed workers, {len(load.failures) - len(broken)} unexplained, {len(refused)} connects refused"
    )
    assert [str(one) for one in load.failures if one.port not in explained] == []
    assert load.per_s >= LEAST_PER_S, load.told()
    assert starts(node.folder, "web") == machine


def test_wrk_sees_no_error_through_reloads_and_upgrades(node: ServedNode) -> None:
    seconds = 60 if LONG else 8
    url = f"http://127.0.0.1:{node.http_port}/"
    command = ["wrk", "-t1", "-c16", f"-d{seconds}s", "-H", f"Host: {node.host('web')}", url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as wrk:
        began = time.monotonic()
        number = 0
        while time.monotonic() - began < seconds - 4:
            (upgrade if number % 2 else reload)(node, number)
            number += 1
        output, _ = wrk.communicate(timeout=60)
    print(output)
    per_s = float(re.findall(r"Requests/sec: +([\d.]+)", output)[0])
    assert number >= 2 and per_s >= LEAST_PER_S
    assert "Socket errors" not in output and "Non-2xx" not in output, output
    wait_for(lambda: all(not one["retiring"] for one in node.status()["children"]), 20, node.log)


def test_the_folder_of_the_node_holds_nothing_of_workers_that_have_gone(node: ServedNode) -> None:
    """Sockets of rows are taken over by the next worker in the row; there are no more of them than rows were used."""
    names = [path.name for path in Path(node.data_dir / "run").iterdir()]
    assert len(names) < 40, names
