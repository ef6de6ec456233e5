"""A24: processes that are killed, frozen or busy for ever, a disk without room, a clock that jumps.

Who is dead is replaced within a second and who is frozen or blocked within five; a connect is never refused; workers
serve by the last table they know. tests/system/test_faults.py, test_survival.py and test_supervisor.py hold more of it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from tests.attacks.conftest import Begin
from tests.support.apps import make_app, starts
from tests.support.disk import fill
from tests.support.faults import kill_worker
from tests.support.load import Load, client_ports_of
from tests.support.processes import descendants, runs, wait_for
from tests.support.serve import ServedNode
from tests.support.supervised import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(150)]
ROLES = [("control", 0), ("worker", 0), ("worker", 1)]
ROUNDS_PAUSE_S = 0.3
DAY_S = 86_400
JUMPS = [("+1d", DAY_S), ("+0", 0), ("-1d", -DAY_S), ("+1d", DAY_S), ("-1d", -DAY_S), ("+0", 0)]
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)


class Knocker:
    """Connects again and again, to see that nobody is ever refused."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.connects = 0
        self.refused = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="knocker")

    def __enter__(self) -> Knocker:
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._over.set()
        self._thread.join(10)

    def _run(self) -> None:
        while not self._over.wait(0.01):
            try:
                socket.create_connection(("127.0.0.1", self._port), timeout=5).close()
                self.connects += 1
            except OSError:
                self.refused += 1


def unexplained(load: Load, ports: set[int]) -> list[str]:
    return [str(one) for one in load.failures if one.port not in ports]


def test_children_killed_in_every_order_are_back_within_a_second_and_no_connect_is_refused(
    tmp_path: Path, attack: Begin
) -> None:
    longest = 0.0
    with (
        ServedNode(tmp_path, make_app(tmp_path, "web")) as node,
        attack("A24", "children killed in every order") as run,
    ):
        node.get("web")
        with Knocker(node.http_port) as knocker:
            for order in itertools.permutations(ROLES):
                run.case(order)
                old = {place: node.pid_of(*place) for place in order}
                for place in order:
                    os.kill(old[place], signal.SIGKILL)
                began = time.monotonic()
                wait_for(lambda: all_replaced(node, old), 5, "all are back")  # noqa: B023  # asked at once
                longest = max(longest, time.monotonic() - began)
                for place in order:
                    node.wait_replaced(*place, old[place])
                assert node.get("web")[0] == 200
                time.sleep(ROUNDS_PAUSE_S)  # who keeps dying at once is made to wait: that is not tested here
        run.note(f"replaced after {longest:.2f} s at the most, {knocker.connects} connects, {knocker.refused} refused")
        assert knocker.refused == 0 and knocker.connects > 50
        assert longest < 1.0
        assert len(starts(tmp_path, "web")) == 1, "the machine was left alone"


def all_replaced(node: ServedNode, old: dict[tuple[str, int], int]) -> bool:
    children = {(one["role"], one["slot"]): one["pid"] for one in node.status()["children"]}
    return all(place in children and children[place] != pid for place, pid in old.items())


def test_a_worker_whose_loop_is_blocked_is_replaced_within_five_seconds(tmp_path: Path, attack: Begin) -> None:
    roles = {"WAKEFRONT_ROLES": "tests.support.blocking", "PYTHONPATH": str(ROOT)}
    with (
        ServedNode(tmp_path, make_app(tmp_path, "web"), env=roles) as node,
        attack("A24", "worker loop blocked") as run,
        Load(node, "web") as load,
        Knocker(node.http_port) as knocker,
    ):
        for slot in (0, 1):
            run.case(slot)
            load.run_for(0.3)
            old = node.pid_of("worker", slot)
            os.kill(old, signal.SIGUSR1)
            began = time.monotonic()
            ports = set[int]()
            while runs(old):  # its connections are those that it holds until its end
                with contextlib.suppress(OSError):
                    ports |= client_ports_of(old, {node.http_port, node.https_port})
                time.sleep(0.02)
            node.wait_replaced("worker", slot, old)
            took = time.monotonic() - began
            run.note(f"replaced after {took:.1f} s")
            assert took < 5.0
            load.run_for(0.5)
            others = unexplained(load, ports)
            assert others == [], load.told()
            load.failures.clear()
        assert knocker.refused == 0


def test_without_room_on_the_disk_requests_are_served_and_all_is_well_once_there_is(
    small_disk: Path, attack: Begin
) -> None:
    apps = f'[log]\naccess = "{small_disk}/access.log"\n' + "".join(make_app(small_disk, n) for n in ("web", "asleep"))
    with (
        ServedNode(small_disk, apps) as node,
        attack("A24", "no room on the disk") as run,
        Knocker(node.http_port) as knocker,
    ):
        node.get("web")
        ballast = fill(small_disk)
        with Load(node, "web") as load:
            load.run_for(1.0)
            run.case("requests to what runs")
            assert load.failures == [], load.told()
            run.case("a wake is answered, one way or another")
            status, headers, _ = node.get("asleep", timeout=20)
            assert status == 200 or "wakefront-error" in headers
            run.note(f"a wake: {status}")
            run.case("a reload is answered")
            told = node.api("POST", "/v1/reload")
            assert told[0] in (200, 422, 500), told
            run.case("a killed worker has a successor that serves")
            known = descendants(node.pid)  # children.json cannot be written, so it is no witness
            _, ports = kill_worker(node, 0)
            wait_for(lambda: serving(node, known), 10, "its successor serves")
            run.case("control is killed, too")
            os.kill(node.pid_of("control"), signal.SIGKILL)
            load.run_for(2.0)
            assert unexplained(load, ports) == [], load.told()
        ballast.unlink()
        run.case("there is room again")
        wait_for(lambda: (one := node.child("control")) and one["ready"], 90, "control is back")
        wait_for(lambda: node.get("asleep", timeout=20)[0] == 200, 90, "wakes are done again")
        assert node.api("POST", "/v1/reload")[0] == 200
        assert knocker.refused == 0
        assert len(starts(small_disk, "web")) == 1


def serving(node: ServedNode, known: set[int]) -> bool:
    """Whether a process that was not there before has connections of clients. One more is made: those there are may all
    have met the other worker."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", node.http_port), 5):
        time.sleep(0.02)  # to be accepted
        for pid in descendants(node.pid) - known:
            with contextlib.suppress(OSError):
                if client_ports_of(pid, {node.http_port, node.https_port}):
                    return True
    return False


@pytest.mark.skipif(FAKETIME is None, reason="libfaketime is not installed")
def test_a_clock_that_jumps_a_day_either_way_is_nobodys_fault(tmp_path: Path, attack: Begin) -> None:
    clock = tmp_path / "clock"
    clock.write_text("+0\n")
    env = {
        "LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1",
    }  # fmt: skip
    needed = tmp_path / "needed"
    keys = 'idle_timeout = "1h"\n'
    apps = make_app(tmp_path, "web", keys=keys) + make_app(tmp_path, "asleep", keys=keys)
    apps += make_app(tmp_path, "broken", env={"NEEDS": str(needed)})
    with ServedNode(tmp_path, apps, env=env) as node, attack("A24", "clock jumps by a day") as run:
        node.get("web", tls=True)
        children = [node.pid_of(*place) for place in ROLES]
        with Load(node, "web") as load:
            for jump, shift_s in (
                ("+1d", DAY_S),
                ("+0", 0),
                ("-1d", -DAY_S),
                ("+1d", DAY_S),
                ("-1d", -DAY_S),
                ("+0", 0),
            ):
                run.case(jump)
                if shift_s < 0:
                    needed.unlink(missing_ok=True)
                    node.cli("machine", "stop", "broken")
                    assert node.get("broken")[0] == 503, "it fails to start, and starts are held for a moment"
                clock.write_text(f"{jump}\n")
                assert abs(node_time(node) - time.time() - shift_s) < 60, "the node's clock has jumped"
                load.run_for(0.5)
                if shift_s < 0:
                    needed.touch()
                    wait_for(lambda: node.get("broken")[0] == 200, 10, "a hold is not a day longer")
                node.cli("machine", "stop", "asleep")
                assert node.get("asleep", tls=True)[0] == 200
        assert load.failures == [], load.told()
        assert [node.pid_of(*place) for place in ROLES] == children, "nobody was taken for frozen"
        assert len(starts(tmp_path, "web")) == 1
        run.note(f"{load.answers} requests meanwhile, none failed")


def node_time(node: ServedNode) -> float:
    """What a worker takes for now: a request's id begins with it (ULID)."""
    _, headers, _ = node.get("web")
    now_ms = 0
    for digit in headers["fly-request-id"][:10]:
        now_ms = now_ms * 32 + "0123456789ABCDEFGHJKMNPQRSTVWXYZ".index(digit)
    return now_ms / 1000
