"""The supervisor with real processes in small roles: who is replaced when, and what outlives whom."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from proxy.binding import BindError, bind_all
from proxy.children import Place
from proxy.orphans import STRAYS_KEPT
from proxy.process import BACKHAUL, ListenAddress
from proxy.supervisor import exec_supervisor
from tests.support.processes import cpu_s, descendants, state_of, wait_for
from tests.support.supervised import ROOT, Supervised, ask

pytestmark = pytest.mark.slow
SLACK_S = 1.0  # on top of what is promised, for a busy test machine


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Supervised]:
    with Supervised(tmp_path / "data") as supervised:
        supervised.wait_ready()
        yield supervised


# --- replacement


def test_killed_children_are_replaced_within_a_second_in_any_order(node: Supervised) -> None:
    for role, slot in (("worker", 1), ("control", 0), ("control", 0), ("worker", 0), ("worker", 1), ("control", 0)):
        old = node.pid_of(role, slot)
        killed_at = time.monotonic()
        os.kill(old, signal.SIGKILL)
        new = node.wait_replaced(role, slot, old)
        (started,) = node.events("started", pid=new)
        assert started["at"] - killed_at < 1.0 + SLACK_S
    assert node.child("control") is not None and node.child("control")["incarnation"] == 4  # type: ignore[index]


def test_all_children_killed_at_once_are_all_replaced(node: Supervised) -> None:
    old = {(one["role"], one["slot"]): one["pid"] for one in node.status()["children"]}
    for pid in old.values():
        os.kill(pid, signal.SIGKILL)
    for (role, slot), pid in old.items():
        node.wait_replaced(role, slot, pid, 1.0 + SLACK_S)
    assert node.ask_worker()["incarnation"] == 2


@pytest.mark.parametrize(("role", "slot"), [("control", 0), ("worker", 1)])
def test_a_frozen_child_is_replaced_within_five_seconds(node: Supervised, role: str, slot: int) -> None:
    old = node.pid_of(role, slot)
    os.kill(old, signal.SIGSTOP)
    node.wait_replaced(role, slot, old, 5.0 + SLACK_S)
    assert state_of(old) is None
    assert "no heartbeat" in node.log()


def test_a_dead_workers_load_is_zeroed_and_its_totals_stay(node: Supervised) -> None:
    answer = node.ask_worker("load 7 3")
    assert (answer["in_flight"], answer["admitted"]) == (3, 3)
    os.kill(answer["pid"], signal.SIGKILL)
    node.wait_replaced("worker", answer["slot"], answer["pid"])
    after = node.ask_worker()
    assert (after["in_flight"], after["admitted"]) == (0, 3)


def test_a_dead_workers_load_is_zeroed_when_it_dies_however_late_its_successor_comes(node: Supervised) -> None:
    node.tell("worker-1-crashes")
    os.kill(node.pid_of("worker", 1), signal.SIGKILL)
    wait_for(lambda: "starting again in 1.6 s" in node.log(), 10, lambda: f"back-off\n{node.log()}")
    before = node.log().count("worker 1 started")
    answer = node.ask_worker()
    assert node.log().count("worker 1 started") == before, "asked too late to tell"
    assert (answer["slot"], answer["in_flight"], answer["queued"]) == (0, 0, 0)


def test_what_a_successor_counts_stays_when_others_die(node: Supervised) -> None:
    first = node.pid_of("worker", 1)
    os.kill(first, signal.SIGKILL)
    node.wait_replaced("worker", 1, first)
    counted = 0
    while (answer := node.ask_worker("load 7 1"))["slot"] != 1:  # the kernel chooses: a few tries
        counted += 1
    assert answer["in_flight"] == counted + 1
    other = node.pid_of("worker", 0)
    os.kill(other, signal.SIGKILL)
    node.wait_replaced("worker", 0, other)
    assert node.ask_worker()["in_flight"] == 1


def test_the_backhaul_has_a_socket_in_every_worker_as_a_public_port_has(tmp_path: Path) -> None:
    listen = (ListenAddress(80, "127.0.0.1", 0), ListenAddress(BACKHAUL, "127.0.0.1", 0))
    with Supervised(tmp_path / "data", listen=listen) as node:
        node.wait_ready()
        (port,) = (one["port"] for one in node.status()["listen"] if one["public_port"] == BACKHAUL)
        slots = set()
        while len(slots) < 2:  # the kernel chooses
            with socket.create_connection(("127.0.0.1", port), timeout=10) as peer:
                slots.add(ask(peer)["slot"])
        assert f"127.0.0.1:{port} (backhaul)" in node.log()


def test_a_backhaul_that_is_taken_is_told_as_that() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = ListenAddress(BACKHAUL, "127.0.0.1", taken.getsockname()[1])
        with pytest.raises(BindError, match=r"\(backhaul\): something else listens there"):
            bind_all([address], 1)


def test_connections_queued_at_a_killed_worker_are_answered_by_its_successor(node: Supervised) -> None:
    workers = [node.pid_of("worker", slot) for slot in (0, 1)]
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    queued = [node.connect() for _ in range(40)]
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    answers = [ask(connection) for connection in queued]
    for connection in queued:
        connection.close()
    assert {answer["incarnation"] for answer in answers} == {2}
    assert {answer["slot"] for answer in answers} == {0, 1}


def test_a_worker_that_cannot_start_is_tried_ever_more_rarely_and_others_serve(node: Supervised) -> None:
    node.tell("worker-crashes")
    old = node.pid_of("worker", 1)
    os.kill(old, signal.SIGKILL)
    wait_for(lambda: "starting again in 0.4 s" in node.log(), 10, f"back-off\n{node.log()}")
    assert "RuntimeError: told to crash" in node.log()
    assert "worker 1 exited with status 70" in node.log()
    assert node.status()["stage"] == "serving"
    node.tell("worker-crashes", False)
    node.wait_replaced("worker", 1, old)


def test_while_a_worker_cannot_start_another_answers_those_who_wait_at_its_sockets(tmp_path: Path) -> None:
    with Supervised(tmp_path, workers=3) as node:
        node.wait_ready()
        node.tell("worker-2-crashes")
        os.kill(node.pid_of("worker", 2), signal.SIGKILL)
        (cover,) = wait_for(lambda: node.messages("worker", "cover"), 10, lambda: f"covered\n{node.log()}")
        assert cover["message"] == {"op": "cover", "slot": 2, "public_ports": [80]}
        assert {node.ask_worker()["slot"] for _ in range(40)} == {0, 1}
        # The one that covers dies: another takes over.
        os.kill(cover["pid"], signal.SIGKILL)
        second = wait_for(lambda: node.messages("worker", "cover")[1:], 10, lambda: f"covered again\n{node.log()}")[0]
        assert second["pid"] != cover["pid"]
        assert {node.ask_worker()["slot"] for _ in range(40)} == {0, 1}
        node.tell("worker-2-crashes", False)
        wait_for(lambda: node.messages("worker", "uncover"), 10, lambda: f"uncovered\n{node.log()}")
        wait_for(lambda: node.ask_worker()["slot"] == 2, 10, "it serves again")


def test_back_off_grows_with_quick_deaths_and_a_long_life_forgives() -> None:
    place = Place("worker", 0, 1)
    assert [place.after_death(0.1, False) for _ in range(9)] == [0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert place.after_death(2.0, True) == 0.4  # it had served: never long
    assert place.after_death(31.0, True) == 0


def test_a_child_that_hangs_at_every_start_counts_as_one_that_cannot_start() -> None:
    """It is killed only after `FIRST_BEAT_S`: no quick death, yet clients wait at its sockets."""
    place = Place("worker", 0, 1)
    assert [place.after_death(seconds, False) for seconds in (20.2, 20.2, 40.0)] == [0, 0.1, 0.2]
    assert place.cannot_start


def test_children_are_not_blamed_when_everything_stood_still(node: Supervised) -> None:
    """A paused virtual machine: on waking, everybody's beat is old."""
    before = node.status()["children"]
    everyone = [node.pid, *(one["pid"] for one in before)]
    for pid in everyone:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(6)  # what is tested is this very time
    os.kill(node.pid, signal.SIGCONT)
    wait_for(lambda: "itself stood still" in node.log(), 5, "the supervisor notices")
    time.sleep(0.6)  # it now looks at beats that have not moved for over 6 s
    for pid in everyone:
        os.kill(pid, signal.SIGCONT)
    assert node.ask_worker()["incarnation"] == 1
    time.sleep(0.6)
    assert node.status()["children"] == before


def test_run_files_that_cannot_be_written_keep_nobody_from_being_replaced(node: Supervised) -> None:
    """As on a full disk."""
    (node.data_dir / "run" / "children.json.new").mkdir()
    old = node.pid_of("worker", 0)
    os.kill(old, signal.SIGKILL)
    wait_for(lambda: node.events("started", role="worker", slot=0, incarnation=2), 1.0 + SLACK_S, "replaced")
    assert "children.json can't be written" in node.log()
    node.signal(signal.SIGTERM)
    assert node.wait_ended() == 0


def test_a_supervisor_out_of_descriptors_goes_on_trying_and_the_other_children_serve(node: Supervised) -> None:
    limits = resource.prlimit(node.pid, resource.RLIMIT_NOFILE)
    old = node.pid_of("worker", 1)
    resource.prlimit(node.pid, resource.RLIMIT_NOFILE, (1, limits[1]))
    os.kill(old, signal.SIGKILL)
    wait_for(lambda: node.log().count("worker 1 can't be started") >= 2, 10, lambda: f"tried twice\n{node.log()}")
    control = node.pid_of("control")
    os.kill(control, signal.SIGKILL)
    wait_for(lambda: "control can't be started" in node.log(), 10, lambda: f"control tried\n{node.log()}")
    resource.prlimit(node.pid, resource.RLIMIT_NOFILE, limits)
    node.wait_replaced("control", 0, control)
    node.wait_replaced("worker", 1, old)


@pytest.mark.parametrize("fault", ["OSError(errno.ENOSPC, 'no watches left')", "MemoryError()"])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_child_that_cannot_be_watched_is_ended_and_another_one_started(tmp_path: Path, fault: str, nth: int) -> None:
    """As at the kernel's limit of epoll watches, which counts all of a user's processes."""
    (tmp_path / "sitecustomize.py").write_text(
        "import errno, os, selectors\n"
        "register, armed, calls = selectors.DefaultSelector.register, os.environ['FAULT'], []\n"
        "def faulty(self, *arguments):\n"
        "    if os.path.exists(armed):\n"
        "        calls.append(1)\n"
        f"        if len(calls) == {nth}:\n"
        "            os.unlink(armed)\n"
        f"            raise {fault}\n"
        "    return register(self, *arguments)\n"
        "selectors.DefaultSelector.register = faulty\n"
    )
    armed = tmp_path / "armed"
    env = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "FAULT": str(armed)}
    with Supervised(tmp_path / "data", env=env) as node:
        node.wait_ready()
        old = node.pid_of("worker", 1)
        others = descendants(node.pid) - {old}
        armed.touch()
        os.kill(old, signal.SIGKILL)
        new = node.wait_replaced("worker", 1, old)
        assert "worker 1 can't be started" in node.log()
        assert descendants(node.pid) == others | {new}, "the one that nobody watched is gone"


# --- what is shared and what is not


def test_children_hold_nothing_of_each_other(node: Supervised) -> None:
    """A dead child's successor has exactly as many descriptors as the first had: nothing leaks through the fork."""
    for role, slot in (("worker", 0), ("control", 0), ("worker", 1), ("worker", 0)):
        old = node.pid_of(role, slot)
        os.kill(old, signal.SIGKILL)
        node.wait_replaced(role, slot, old)
    counts = {(one["role"], one["fds"]) for one in node.events("started")}
    assert len(counts) == 2, counts


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_sessions_resume_at_every_worker_and_after_one_was_killed(tmp_path: Path, version: ssl.TLSVersion) -> None:
    authority = trustme.CA()
    (tmp_path / "leaf.pem").write_bytes(authority.issue_cert("demo.test").private_key_and_cert_chain_pem.bytes())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    context.minimum_version = context.maximum_version = version
    with Supervised(tmp_path, workers=3) as node:
        node.wait_ready()

        def visit(session: ssl.SSLSession | None) -> tuple[dict[str, int], ssl.SSLSession | None]:
            with context.wrap_socket(node.connect(), server_hostname="demo.test", session=session) as client:
                return ask(client), client.session

        first, session = visit(None)
        assert not first["resumed"]
        seen: set[int] = set()
        for _ in range(100):
            answer, _ = visit(session)
            assert answer["resumed"]
            seen.add(answer["slot"])
        assert seen == {0, 1, 2}
        os.kill(first["pid"], signal.SIGKILL)
        node.wait_replaced("worker", first["slot"], first["pid"])
        wait_for(
            lambda: (one := visit(session)[0])["resumed"] and one["incarnation"] == 2, 10, "resumed at the successor"
        )


# --- orphans


def test_an_exit_that_no_control_saw_is_told_to_the_next_one_and_then_reaped(node: Supervised) -> None:
    node.tell("control-crashes")
    program = node.spawn("sh", "-c", "sleep 0.5; exit 7")
    old = node.pid_of("control")
    os.kill(old, signal.SIGKILL)
    wait_for(lambda: state_of(program) == "Z", 5, "the program ends while no control lives")
    time.sleep(0.3)
    assert state_of(program) == "Z", "it may not be reaped before its end is on record"
    node.tell("control-crashes", False)
    new = node.wait_replaced("control", 0, old)
    wait_for(lambda: state_of(program) is None, 5, "reaped")
    (told,) = node.messages("control", "exited")
    assert told["pid"] == new
    assert told["message"] == {"op": "exited", "pid": program, "code": 7, "signal": None}


def test_an_end_that_a_control_did_not_record_is_told_again_to_its_successor(node: Supervised) -> None:
    node.tell("control-does-not-reap")
    programs = [node.spawn("sleep", "300") for _ in range(3)]
    first = node.pid_of("control")
    os.kill(first, signal.SIGKILL)
    second = node.wait_replaced("control", 0, first)
    for program in programs:
        os.kill(program, signal.SIGKILL)
    wait_for(lambda: len(node.messages("control", "exited")) == 3, 5, "told once each")
    node.tell("control-does-not-reap", False)
    os.kill(second, signal.SIGKILL)
    third = node.wait_replaced("control", 0, second)
    wait_for(lambda: all(state_of(program) is None for program in programs), 5, "reaped")
    again = [one["message"] for one in node.messages("control", "exited") if one["pid"] == third]
    expected = [{"op": "exited", "pid": program, "code": None, "signal": signal.SIGKILL} for program in programs]
    assert sorted(again, key=lambda one: one["pid"]) == sorted(expected, key=lambda one: one["pid"])


def test_the_supervisor_reaps_nothing_that_still_runs_or_is_its_own(node: Supervised) -> None:
    program = node.spawn("sleep", "300")
    old = node.pid_of("control")
    os.kill(old, signal.SIGKILL)
    node.wait_replaced("control", 0, old)
    for pid in (program, node.pid_of("worker", 0), 1):
        node.ask_control(do="say", datagram=json.dumps({"op": "reap", "pid": pid}))
        wait_for(lambda pid=pid: f"asked to reap pid {pid}" in node.log(), 5, "refused")
    for nonsense in ("{", "[]", "7", '{"op": "unheard-of"}', '{"op": "reap", "pid": "7"}'):
        node.ask_control(do="say", datagram=nonsense)
    assert state_of(program) == "S"
    assert node.ask_worker()["incarnation"] == 1


def test_a_flood_of_strays_is_bounded_while_no_control_lives_and_gone_afterwards(node: Supervised) -> None:
    strays = STRAYS_KEPT + 400
    node.tell("control-crashes")
    script = f"i=0; while [ $i -lt {strays} ]; do (true &); i=$((i+1)); done; exit 9"
    machine = node.spawn("sh", "-c", "sleep 0.2; " + script)
    old = node.pid_of("control")
    os.kill(old, signal.SIGKILL)
    wait_for(lambda: state_of(machine) == "Z", 40, "the flood ends")

    def zombies() -> int:
        return sum(state_of(pid) == "Z" for pid in descendants(node.pid))

    wait_for(lambda: "stray processes in all were reaped" in node.log(), 10, "the bound holds")
    wait_for(lambda: zombies() <= STRAYS_KEPT + 2, 10, "no more are kept")
    assert state_of(machine) == "Z", "a machine's end is kept, however many strays there are"
    node.tell("control-crashes", False)
    node.wait_replaced("control", 0, old)
    wait_for(lambda: zombies() == 0, 20, "all are recorded and reaped")
    (told,) = [one for one in node.messages("control", "exited") if one["message"]["pid"] == machine]
    assert told["message"]["code"] == 9
    assert cpu_s(node.pid) < 10


# --- the supervisor's own end


def test_when_the_supervisor_is_killed_its_children_end_machines_go_on_and_a_new_start_works(tmp_path: Path) -> None:
    port = _free_port()
    listen = (ListenAddress(80, "127.0.0.1", port),)
    with Supervised(tmp_path, listen=listen) as node:
        node.wait_ready()
        machine = node.spawn("sleep", "300")
        children = [one["pid"] for one in node.status()["children"]]
        node.signal(signal.SIGKILL)
        node.wait_ended()
        with Supervised(tmp_path, listen=listen) as successor:
            successor.wait_ready()
            wait_for(lambda: all(state_of(pid) in (None, "Z") for pid in children), 2, "children have ended")
            assert state_of(machine) == "S"
            assert successor.ask_worker()["pid"] not in children


def test_draining_ends_workers_first_and_then_control(node: Supervised) -> None:
    node.signal(signal.SIGTERM)
    assert node.wait_ended() == 0
    drained = [one["at"] for one in node.events("drained", role="worker")]
    (asked,) = node.messages("control", "drain")
    assert len(drained) == 2
    assert max(drained) < asked["at"]
    assert {one["slot"] for one in node.messages("worker", "drain")} == {0, 1}
    assert not (node.data_dir / "run" / "ready").exists()
    assert not (node.data_dir / "run" / "control.sock").exists()


def test_new_connections_are_refused_once_the_workers_have_ended_though_control_still_works(node: Supervised) -> None:
    node.tell("control-does-not-end")
    port = node.port
    node.signal(signal.SIGTERM)
    wait_for(lambda: node.messages("control", "drain"), 5, "control is asked")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    node.tell("control-does-not-end", False)


def test_a_worker_that_does_not_finish_is_killed_at_the_drain_timeout_and_the_status_says_so(tmp_path: Path) -> None:
    with Supervised(tmp_path, drain_timeout_s=0.5) as node:
        node.wait_ready()
        node.tell("worker-does-not-end")
        node.signal(signal.SIGINT)
        assert node.wait_ended() == 1
        assert "did not finish in time" in node.log()
        assert node.messages("control", "drain"), "control still stops the machines"


def test_a_second_signal_hurries_the_workers_but_control_still_gets_its_turn(tmp_path: Path) -> None:
    with Supervised(tmp_path, drain_timeout_s=60) as node:
        node.wait_ready()
        node.tell("worker-does-not-end")
        node.signal(signal.SIGTERM)
        wait_for(lambda: node.messages("worker", "drain"), 5, "draining")
        node.signal(signal.SIGTERM)
        assert node.wait_ended(10) == 1
        assert node.messages("control", "drain")


def test_a_control_that_dies_while_stopping_machines_is_followed_by_one_that_goes_on(node: Supervised) -> None:
    node.tell("control-does-not-end")
    first = node.pid_of("control")
    node.signal(signal.SIGTERM)
    wait_for(lambda: node.messages("control", "drain"), 5, "control is asked")
    node.tell("control-does-not-end", False)
    os.kill(first, signal.SIGKILL)
    assert node.wait_ended() == 0
    assert len({one["pid"] for one in node.messages("control", "drain")}) == 2


def test_a_control_that_always_fails_to_drain_does_not_hold_the_end_up_for_ever(node: Supervised) -> None:
    node.tell("control-fails-to-drain")
    node.signal(signal.SIGTERM)
    assert node.wait_ended() == 1
    assert "giving up on stopping machines in order" in node.log()


def test_ctrl_c_in_a_terminal_which_reaches_every_process_still_drains_in_order(node: Supervised) -> None:
    os.killpg(node.pid, signal.SIGINT)
    assert node.wait_ended() == 0
    assert len(node.events("drained", role="worker")) == 2
    assert node.messages("control", "drain")


def test_sighup_reaches_control_as_reload(node: Supervised) -> None:
    node.signal(signal.SIGHUP)
    wait_for(lambda: node.messages("control", "reload"), 5, "reload arrives")
    assert node.ask_worker()["incarnation"] == 1


def test_reloads_for_a_control_that_does_not_listen_do_not_pile_up(node: Supervised) -> None:
    old = node.pid_of("control")
    os.kill(old, signal.SIGSTOP)
    for _ in range(2000):
        node.signal(signal.SIGHUP)
    node.wait_replaced("control", 0, old, 5.0 + SLACK_S)
    assert "unforeseen" not in node.log()


# --- refusals and readiness


def test_a_second_serve_on_the_same_data_dir_is_refused_and_names_the_first(node: Supervised) -> None:
    with Supervised(node.data_dir) as second:
        assert second.wait_ended() == 2
    assert f"another wakefront (pid {node.pid}) already serves" in node.log()
    assert node.ask_worker()["incarnation"] == 1


def test_a_foreign_listener_is_found_even_if_it_shares_its_port(tmp_path: Path) -> None:
    with socket.socket() as foreign:
        foreign.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        foreign.bind(("127.0.0.1", 0))
        foreign.listen()
        port = foreign.getsockname()[1]
        listen = (
            ListenAddress(443, "127.0.0.1", port),
            ListenAddress(80, "203.0.113.1", 8080),
            ListenAddress(81, "127.0.0.1", 0),
        )
        with Supervised(tmp_path, listen=listen) as node:
            assert node.wait_ended() == 2
            log = node.log()
    assert f"127.0.0.1:{port} (public port 443): something else listens there (" in log
    assert f"pid {os.getpid()}" in log
    assert "203.0.113.1:8080 (public port 80): no network interface of this host has that address" in log
    assert "public port 81" not in log


def test_a_taken_admin_port_is_told_with_the_others_and_left_unbound_where_it_is_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BindError, match=rf"127\.0\.0\.1:{port} \(admin\): something else listens there \("):
            bind_all((), 1, admin=ListenAddress(0, "127.0.0.1", port))
    assert bind_all((), 1, admin=ListenAddress(0, "127.0.0.1", port)).sockets() == []
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_a_privileged_port_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(BindError, match=r"(?s)listen:.*127\.0\.0\.1:80 .*CAP_NET_BIND_SERVICE"):
        bind_all((ListenAddress(80, "127.0.0.1", 80),), 1)


def test_ipv4_and_ipv6_wildcards_bind_side_by_side() -> None:
    port = _free_port()
    listen = (ListenAddress(80, "0.0.0.0", port), ListenAddress(80, "::", port))
    bound = bind_all(listen, 2)
    assert [len(bound.listeners(number, 2)) for number in range(2)] == [2, 2]
    bound.close()


def test_readiness_is_told_to_the_service_manager_once_everyone_is_ready(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(15)
        with Supervised(tmp_path / "data", env={"NOTIFY_SOCKET": str(tmp_path / "notify")}) as node:
            assert manager.recv(100) == b"READY=1"
            assert all(one["ready"] for one in node.status()["children"])
            node.signal(signal.SIGTERM)
            assert manager.recv(100) == b"STOPPING=1"
            assert node.wait_ended() == 0


def test_a_manager_that_does_not_read_its_notifications_does_not_stall_the_supervisor(tmp_path: Path) -> None:
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as flood,
    ):
        manager.bind(str(tmp_path / "notify"))
        flood.setblocking(False)
        with contextlib.suppress(BlockingIOError):  # until it holds as much as it takes
            while True:
                flood.sendto(b"WATCHDOG=1", str(tmp_path / "notify"))
        with Supervised(tmp_path / "data", env={"NOTIFY_SOCKET": str(tmp_path / "notify")}) as node:
            node.wait_ready()
            old = node.pid_of("worker", 1)
            os.kill(old, signal.SIGKILL)
            node.wait_replaced("worker", 1, old, 1.0 + SLACK_S)
            manager.settimeout(5)
            while (said := manager.recv(100)) == b"WATCHDOG=1":
                pass
            assert said == b"READY=1", "and it is told once it reads again"


def test_it_is_not_ready_while_control_cannot_start_and_becomes_so_when_it_can(tmp_path: Path) -> None:
    with Supervised(tmp_path) as node:
        node.tell("control-crashes")
        wait_for(lambda: "starting again in 0.2 s" in node.log(), 10, "control is tried again")
        assert not (tmp_path / "run" / "ready").exists()
        assert node.ask_worker()["incarnation"] == 1, "workers serve without control"
        node.tell("control-crashes", False)
        node.wait_ready()


def test_private_files_are_private_and_a_very_long_path_works(tmp_path: Path) -> None:
    data_dir = tmp_path / ("d" * 120)
    with Supervised(data_dir) as node:
        node.wait_ready()
        assert (data_dir / "run").stat().st_mode & 0o777 == 0o700
        assert (data_dir / "run" / "control.sock").stat().st_mode & 0o777 == 0o600
        assert int(node.ask_control(do="pid")) == node.pid_of("control")
        assert (data_dir / "run" / "supervisor.pid").read_text() == f"{node.pid}\n"


def test_a_stalled_reader_of_the_log_does_not_stall_the_supervisor(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with Supervised(tmp_path) as node:
        node.wait_ready()
        assert node.process is not None
    os.set_blocking(writer, False)
    filled = 0
    try:
        while True:
            filled += os.write(writer, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(writer, True)
    with Supervised(tmp_path / "second", stderr=writer) as node:
        node.wait_ready()
        old = node.pid_of("worker")
        os.kill(old, signal.SIGKILL)
        node.wait_replaced("worker", 0, old, 1.0 + SLACK_S)
        while filled > 0:
            filled -= len(os.read(reader, filled))
        old = node.pid_of("worker")
        os.kill(old, signal.SIGKILL)
        node.wait_replaced("worker", 0, old)
        assert b"lines before this one were lost" in os.read(reader, 65_536)
    os.close(reader)
    os.close(writer)


def test_exec_supervisor_hands_the_plan_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan goes through a descriptor, so its length has no limit; execv itself is replaced by looking at it."""
    seen: list[str] = []

    def look(path: str, argv: list[str]) -> None:
        assert argv[:5] == [path, "-P", "-m", "proxy.supervisor", "--plan-fd"]
        with open(int(argv[5]), "rb") as file:
            seen.append(file.read().decode())
        raise SystemExit

    monkeypatch.setattr(os, "execv", look)
    plan = Supervised(tmp_path).plan
    with pytest.raises(SystemExit):
        exec_supervisor(plan)
    assert plan.from_json(seen[0]) == plan


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_the_watchdog_of_the_service_manager_is_fed_three_times_in_its_time(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(15)
        env = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "1500000"}
        with Supervised(tmp_path / "data", env=env):
            came = []
            while came.count(b"WATCHDOG=1") < 4:
                came.append(manager.recv(100))
                if came[-1] == b"WATCHDOG=1" and came.count(b"WATCHDOG=1") == 1:
                    began = time.monotonic()
            assert 1.0 < time.monotonic() - began < 5.0, "half a second apart"


def test_another_process_asked_for_watchdog_words_is_none_of_ours(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(15)
        env = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "300000", "WATCHDOG_PID": "1"}
        with Supervised(tmp_path / "data", env=env) as node:
            assert manager.recv(100) == b"READY=1"
            node.signal(signal.SIGTERM)
            node.wait_ended()
            assert manager.recv(100) == b"STOPPING=1"
