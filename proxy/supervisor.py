"""The root process: binds, shares memory, starts control and workers, replaces them when they die or freeze.

    python -m proxy.supervisor --plan-fd N        (or: --plan '{"config_path": ...}')

One thread, no event loop, standard library only, no business: so that nothing here has a reason to fail or to wait.
It reads no configuration (the plan comes from `wakefront serve`), touches no connection and knows no app. Everything
else may die at any time; what must outlive it is held here: listening sockets, load counters, the TLS ticket keys,
control's Unix listener, and the ends of machines whose control has died (see orphans.py).

    SERVING --SIGTERM, SIGINT--> DRAINING (workers finish) --all ended--> STOPPING (control stops machines) --> ENDED

A place is control or a worker's; a child is the process in it. A place whose child has ended is filled again at
once, later if it keeps failing. A child says `ready` once over its channel and beats shared memory from its loop; one
whose beat stands still for `STALE_S` is killed. It waits in `Supervisor._turn` alone.

While it serves, the workers may be replaced by others on the same sockets (turnover.py): when a reload changes what is
listened on or how many workers there are, and in an upgrade, in which the supervisor becomes another program first
(upgrade.py).

Exit status: 0 drained, 1 the drain was cut short, 2 an address can't be bound or another supervisor holds data_dir.
"""

from __future__ import annotations

import enum
import gc
import importlib
import json
import os
import select
import selectors
import signal
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, NoReturn, TypeVar

from proxy.binding import BindError, Bindings, bind_all
from proxy.children import ENDED_WELL, Child, Place, become_subreaper, fork, set_process_name
from proxy.orphans import Orphans
from proxy.process import ChildContext, ServePlan
from proxy.rundir import RunDir, RunDirError
from proxy.state import SharedMemory
from proxy.succession import RESULT_FILE, Request, become, descriptors_of, take_over, trial_facts
from proxy.tickets import new_base_context
from proxy.turnover import START_S, Done, Turnover, free_rows
from proxy.upgrade import Upgrade

STALE_S = 3.0  # a beat this old means frozen or blocked
FIRST_BEAT_S = 20.0  # a child may take this long to start
WATCH_S = 0.25  # how often beats are looked at
LATE_S = 1.5  # woken this late, we ourselves stood still, and everybody's beat looks old
DRAIN_MARGIN_S = 2.0  # workers cut their own last requests at drain_timeout_s; then they need to end
STOP_S = 330.0  # kill_timeout may be 300 s
HURRIED_STOP_S = 10.0  # after a second SIGTERM or SIGINT
STOP_ATTEMPTS = 4  # controls that may fail at stopping machines
UNCLEAN_PATIENCE_S = 1.0  # children of a killed supervisor end within this
ORPHAN_SCAN_S = 5.0  # without any SIGCHLD
LEAST_ROWS = 32  # of shared memory, so many workers may live at a time: those that serve, start and retire
EXIT_CANNOT_START = 2
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGUSR2)

T = TypeVar("T")


def exec_supervisor(plan: ServePlan) -> NoReturn:
    """Become the supervisor: the caller's process goes on as it, with the same pid, stdio and environment."""
    fd = os.memfd_create("wakefront-plan")
    os.write(fd, plan.to_json().encode())
    os.lseek(fd, 0, os.SEEK_SET)
    os.set_inheritable(fd, True)
    sys.stdout.flush()
    sys.stderr.flush()
    # -P: a folder called `proxy` in the current directory must not be taken for this package.
    os.execv(sys.executable, [sys.executable, "-P", "-m", "proxy.supervisor", "--plan-fd", str(fd)])


def main(argv: list[str]) -> int:
    if argv[:1] == ["--trial"]:
        return _try(argv[1:])
    if argv[:1] == ["--resume-fd"]:
        return _resume(int(argv[1]))
    plan = _read_plan(argv)
    try:
        supervisor = Supervisor(plan)
    except (RunDirError, BindError) as error:
        for line in str(error).splitlines():
            print(f"wakefront: {line}", file=sys.stderr)
        return EXIT_CANNOT_START
    return supervisor.run()


def _read_plan(argv: list[str]) -> ServePlan:
    match argv:
        case ["--plan-fd", fd]:
            with open(int(fd), "rb") as file:
                return ServePlan.from_json(file.read().decode())
        case ["--plan", text]:
            return ServePlan.from_json(text)
    raise SystemExit("usage: python -m proxy.supervisor --plan-fd N | --plan JSON   (use `wakefront serve`)")


def _try(argv: list[str]) -> int:
    """Whether this program could take over: all that it is made of can be loaded, and the plan can be read."""
    _read_plan(argv)
    for module in ("server", "worker"):
        importlib.import_module(f"{_roles()}.{module}")
    new_base_context()
    print(trial_facts(), flush=True)
    return 0


def _resume(fd: int) -> int:
    """Go on where another program was. What fails before all is taken over is put back."""
    become_subreaper()
    handed = take_over(fd)
    try:
        supervisor = Supervisor(ServePlan.from_json(json.dumps(handed["plan"])), handed)
    except Exception as error:
        former = handed["former"]
        if former is None:
            raise
        why = f"the new program could not take over: {error!r}"
        handed |= {"failed": why, "former": None}
        become(former["python"], former["environ"], handed, descriptors_of(handed), _SIGNALS)
    return supervisor.run()


def _roles() -> str:
    return os.environ.get("WAKEFRONT_ROLES", "proxy")


class Stage(enum.Enum):
    SERVING = "serving"
    DRAINING = "draining"
    STOPPING = "stopping"
    ENDED = "ended"


class Supervisor:
    """Holds what outlives the children, and keeps every place filled."""

    def __init__(self, plan: ServePlan, handed: dict[str, Any] | None = None) -> None:
        """`handed`: what the program that this process was before has left (succession.py)."""
        self.plan = plan
        self.stage = Stage.SERVING
        self._pid = os.getpid()
        become_subreaper()
        set_process_name("wakefront")
        self._roles = _roles()
        self._unsaid: deque[str] = deque()  # to systemd
        self._retired: list[Place] = []
        self._turnover: Turnover | None = None
        self._upgrade = Upgrade(self, _SIGNALS)
        self._announced_ready = False
        self._incarnations: dict[int, int] = {}  # of workers, by row
        self._tls_context = new_base_context()  # before any fork: sessions resume at every worker
        if handed is None:
            self._begin(plan)
        else:
            self._take_over(handed)
        self._orphans = Orphans()
        self._orphans_due = 0.0
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._watched_at = time.monotonic()
        self._watchdog_due = 0.0
        self._deadline: float | None = None  # of the drain or the stop
        self._hurried = False
        self._stops_failed = 0
        self._cut_short = False
        self._lines_lost = 0
        for place in self._places:
            if place.child is not None:
                self._watch_child(place, place.child)
        if handed is not None:
            self._upgrade.resume(handed, time.monotonic())

    def _begin(self, plan: ServePlan) -> None:
        """A node that did not run: bind, and share memory. Raises BindError and RunDirError."""
        self._notify_socket = os.environ.pop("NOTIFY_SOCKET", None)
        self._watchdog_s = _watchdog_s()
        self._run_dir = RunDir(plan)
        try:
            patience_s = UNCLEAN_PATIENCE_S if self._run_dir.was_left_behind else 0.0
            self._bindings = bind_all(plan.listen, plan.workers, patience_s, plan.admin)
            self._control_listener = self._run_dir.listen()
        except (BindError, RunDirError):
            self._run_dir.clear()
            raise
        self._shared_fd, self._memory = SharedMemory.create(plan.workers, max(LEAST_ROWS, 4 * plan.workers))
        self._control = Place("control", 0, 0)
        self._workers = self._new_places(plan, range(plan.workers))
        for place in self._places:
            place.start_at = time.monotonic()

    @staticmethod
    def _new_places(plan: ServePlan, rows: Iterable[int]) -> list[Place]:
        return [Place("worker", row, 1 + row, number, plan.workers) for number, row in enumerate(rows)]

    @property
    def _places(self) -> list[Place]:
        starting = self._turnover.places if self._turnover is not None else []
        return [self._control, *self._workers, *starting, *self._retired]

    # --- the loop

    def run(self) -> int:
        """Serve until drained; the exit status."""
        self._take_signals()
        bound = [f"{one.host}:{one.port} ({one.public_port or 'backhaul'})" for one in self._bindings.addresses()]
        self._log("info", f"pid {self._pid}, {self.plan.workers} workers, listening on {', '.join(bound) or 'nothing'}")
        while self.stage is not Stage.ENDED:
            self._turn()
        self._end()
        return 1 if self._cut_short else 0

    def _turn(self) -> None:
        """Wait once, then do all that is due."""
        for key, mask in self._selector.select(self._wait_s()):
            self._surely(key.data, mask)
        now = time.monotonic()
        self._surely(self._watch, now)
        self._surely(self._scan_orphans, now)
        self._surely(self._upgrade.advance, now)
        self._surely(self._advance_turnover, now)
        self._surely(self._end_retired, now)
        self._surely(self._advance, now)
        self._surely(self._feed_watchdog, now)
        self._surely(self._notify_on, now)
        for place in self._places:
            if place.start_at is not None and place.start_at <= now:
                self._surely(self._start, place)

    def _surely(self, step: Callable[[T], None], argument: T) -> None:
        """The root must outlive what nobody foresaw, and a step that fails must not keep the others from their turn."""
        try:
            step(argument)
        except Exception:
            self._log("error", "unforeseen: " + traceback.format_exc().replace("\n", " | "))
            select.select([], [], [], 0.1)  # it may come again at once, and then for ever

    def _wait_s(self) -> float:
        deadlines = [self._watched_at + WATCH_S, self._orphans_due]
        deadlines += [place.start_at for place in self._places if place.start_at is not None]
        if self._turnover is not None:
            deadlines.append(self._turnover.due_at)
        deadlines += [one for one in (self._deadline, self._upgrade.due_at) if one is not None]
        return max(0.0, min(deadlines) - time.monotonic())

    def _watch(self, now: float) -> None:
        """Kill children whose beat stands still; forgive all if it is we who stood still."""
        if 0 <= now - self._watched_at < WATCH_S:
            return
        late = not 0 <= now - self._watched_at < LATE_S
        if late:
            self._log("warning", f"the supervisor itself stood still for {now - self._watched_at:.1f} s")
        self._watched_at = now
        for place in self._places:
            child = place.child
            if child is None or child.killed:
                continue
            beat = self._memory.last_beat(place.index)
            if late or beat != child.beat:
                child.beat, child.beat_at = beat, now
            elif now - child.beat_at >= (STALE_S if beat else FIRST_BEAT_S):
                self._log("error", f"{place.name} (pid {child.pid}) is frozen or blocked: no heartbeat; killing it")
                child.kill()

    # --- signals

    def _take_signals(self) -> None:
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        signal.set_wakeup_fd(self._wake_writer.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, _noticed)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        self._selector.register(self._wake_reader, selectors.EVENT_READ, self._on_signal)

    def _on_signal(self, mask: int) -> None:
        came = set(self._wake_reader.recv(4096))
        if signal.SIGCHLD in came:
            # Own children are watched by pidfd; this is for orphans. Blocked until the scan, so that a flood of them
            # costs one wake-up a scan.
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
            self._orphans_due = min(self._orphans_due, time.monotonic() + self._orphans.pause_s)
        if signal.SIGHUP in came:
            self._reload()
        if signal.SIGUSR2 in came and (fault := self._upgrade.begin()):
            self._log("error", f"SIGUSR2: {fault}")
        if signal.SIGTERM in came or signal.SIGINT in came:
            self._drain()

    def _reload(self) -> None:
        child = self._control.child
        if child is None:
            self._log("info", "SIGHUP: control is down; the next one reads the configuration anyway")
            return
        self._log("info", "SIGHUP: asking control to reload")
        self._send(child, {"op": "reload"})

    # --- drain

    def _drain(self) -> None:
        """First SIGTERM or SIGINT: let all end in order. Second: hurry."""
        now = time.monotonic()
        if self.stage is not Stage.SERVING:
            self._hurry(now)
            return
        self.stage = Stage.DRAINING
        self._deadline = now + self.plan.drain_timeout_s + DRAIN_MARGIN_S
        self._log("info", f"draining: workers have {self.plan.drain_timeout_s:g} s to finish their requests")
        self._notify("STOPPING=1")
        self._upgrade.abandon()
        if self._turnover is not None:
            self._give_up_turnover("the node ends")
        for place in [*self._workers, *self._retired]:
            place.start_at = None
            if place.child is not None:
                self._send(place.child, {"op": "drain", "timeout_s": self.plan.drain_timeout_s})
                place.child.signal(signal.SIGTERM)
        # From here the workers alone decide how long an address still accepts.
        self._bindings.close()
        self._bindings = Bindings()
        self._changed()

    def _hurry(self, now: float) -> None:
        if self._hurried:
            return
        self._hurried = True
        self._log("warning", f"second signal: killing workers, control has {HURRIED_STOP_S:g} s to stop machines")
        if self.stage is Stage.DRAINING:
            self._deadline = now
        else:
            self._deadline = min(self._deadline or now, now + HURRIED_STOP_S)

    def _advance(self, now: float) -> None:
        """Go on with the drain when its stage is over."""
        overdue = self._deadline is not None and now >= self._deadline
        if self.stage is Stage.DRAINING:
            left = [place for place in [*self._workers, *self._retired] if place.child is not None]
            if left and not overdue:
                return
            late = [child for place in left if (child := place.child) is not None and not child.killed]
            for child in late:
                self._log("warning", f"worker pid {child.pid} did not finish in time; killing it")
                child.kill()
            if late:
                self._deadline = now + DRAIN_MARGIN_S  # a process that even SIGKILL can't end must not stop the rest
                return
            self._stop_control(now)
        elif self.stage is Stage.STOPPING and overdue:
            self._log("error", "control did not stop the machines in time; the next start adopts or stops them")
            self._cut_short = True
            self.stage = Stage.ENDED

    def _stop_control(self, now: float) -> None:
        self.stage = Stage.STOPPING
        self._deadline = now + (HURRIED_STOP_S if self._hurried else STOP_S)
        self._log("info", "workers have ended; control stops the machines")
        if self._control.child is None:
            self._control.start_at = now
        else:
            self._send(self._control.child, {"op": "drain"})
        self._changed()

    def _end(self) -> None:
        """Nothing to wait for any more. Children that are left would be orphans of nobody: they are killed."""
        for place in self._places:
            if place.child is not None:
                place.child.kill()
        self._run_dir.clear()
        self._log("info", "ended" if not self._cut_short else "ended before all was finished")

    # --- children

    def _start(self, place: Place) -> None:
        """Fork the next child of a place. What can't be started is tried again later."""
        place.start_at = None
        place.incarnation += 1
        if place.role == "worker":  # a row goes from hand to hand
            place.incarnation = self._incarnations[place.slot] = self._incarnations.get(place.slot, 0) + 1
        now = time.monotonic()
        self._memory.beat(place.index, 0)
        try:
            child = self._fork(place)
        except (OSError, MemoryError) as error:
            delay = max(0.1, place.after_death(0.0, False))
            self._log("error", f"{place.name} can't be started: {error!r}; trying again in {delay:g} s")
            place.start_at = now + delay
            return
        child.started_at = child.beat_at = now
        place.child = child
        self._log("info", f"{place.name} started, pid {child.pid}, incarnation {place.incarnation}")
        if place is self._control:
            self._orphans.tell_again()
            self._orphans_due = now
            self._tell_rows()
            if self.stage is Stage.STOPPING:
                self._send(child, {"op": "drain"})
        self._changed()

    def _fork(self, place: Place) -> Child:
        """A new child whose end we shall hear of. Raises OSError or MemoryError; then there is none."""
        child = fork(place, lambda channel: self._become(place, channel))
        try:
            self._watch_child(place, child)
        except BaseException:  # as the kernel's limit of watches: a child that can't be watched must not live
            if child.pidfd in self._selector.get_map():
                self._selector.unregister(child.pidfd)
            child.end()
            raise
        return child

    def _watch_child(self, place: Place, child: Child) -> None:
        self._selector.register(child.pidfd, selectors.EVENT_READ, lambda mask: self._on_end(place, child))
        if not child.gone_quiet:
            self._selector.register(
                child.channel, selectors.EVENT_READ, lambda mask: self._on_channel(place, child, mask)
            )

    def _become(self, place: Place, channel: socket.socket) -> int:
        """In the child: leave the supervisor behind and run the role."""
        context = self._context(place, channel)
        self._drop_all_but(context)
        module = "server" if place.role == "control" else "worker"
        return int(importlib.import_module(f"{self._roles}.{module}").run(context))

    def _context(self, place: Place, channel: socket.socket) -> ChildContext:
        is_control = place.role == "control"
        turnover = self._turnover
        starting = turnover if turnover is not None and place in turnover.places else None
        bindings = self._bindings if starting is None else starting.bindings
        plan = self.plan if starting is None else starting.plan
        if is_control and self._upgrade.plan is not None:
            plan = self._upgrade.plan
        return ChildContext(
            role=place.role,
            slot=place.slot,
            index=place.index,
            incarnation=place.incarnation,
            plan=plan,
            shared_fd=self._shared_fd,
            listeners=[] if is_control else bindings.listeners(place.number, place.workers),
            control_listener=self._control_listener if is_control else None,
            channel=channel,
            tls_context=self._tls_context,
        )

    def _drop_all_but(self, context: ChildContext) -> None:
        """In the child: close what is the supervisor's and the others'."""
        self._run_dir.leave()
        self._selector.close()
        self._wake_reader.close()
        self._wake_writer.close()
        for place in self._places:
            if place.child is not None:
                place.child.close()
                place.child = None
        own = {id(one.socket) for one in context.listeners}
        bound = self._bindings.sockets() + (self._turnover.bindings.sockets() if self._turnover is not None else [])
        for sock in bound:
            if id(sock) not in own:
                sock.close()
        if self._upgrade.trial is not None:
            self._upgrade.trial.close()
        if context.control_listener is None:
            self._control_listener.close()
        gc.freeze()  # what was made before the fork is never garbage here: spare its pages

    def _on_end(self, place: Place, child: Child) -> None:
        how = child.reap()
        if how is None:
            return
        if place.role == "worker":  # surely dead, and its successor not yet forked: what it counted would fill machines
            self._surely(self._memory.clear_worker, place.slot)
        self._surely(self._hear_all, place)  # its last words
        self._selector.unregister(child.pidfd)
        if not child.gone_quiet:
            self._selector.unregister(child.channel)
        child.close()
        place.child = None
        now = time.monotonic()
        lived = now - child.started_at
        stopping = self.stage is not Stage.SERVING
        self._cut_short |= stopping and child.killed and child.ready and place is not self._control
        done = self.stage is Stage.STOPPING and how == ENDED_WELL and not self._upgrade.control_leaves
        if place in self._retired:
            self._forget(place, f"{place.name} (pid {child.pid}), which others had taken over from, {how}")
        elif self._turnover is not None and place in self._turnover.places:
            self._turnover.fault = f"{place.name} {how} after {lived:.1f} s"
            self._log("error", self._turnover.fault)
        elif place is self._control and self._upgrade.control_ended(now, how) and not stopping:
            pass
        elif place is self._control and self._upgrade.request and self._turnover is not None and not stopping:
            self._turnover.fault = f"its control {how} after {lived:.1f} s"  # so the upgrade is put back
        elif not stopping or (place is self._control and not done):
            self._replace(place, now, place.after_death(lived, child.ready), f"{how} after {lived:.1f} s")
        else:
            self._log("info", f"{place.name} (pid {child.pid}) {how}")
            if place is self._control:
                self.stage = Stage.ENDED
        self._cover()
        self._changed()

    def _cover(self) -> None:
        """While a slot can't start, have another worker accept there: the kernel goes on sending clients to it."""
        if self.stage is not Stage.SERVING:
            return
        live = [place.child for place in self._workers if place.child is not None and place.child.ready]
        for place in self._workers:
            covered = place.covered_by is not None and place.covered_by in live
            if place.cannot_start and not covered and live:
                held = self._bindings.listeners(place.number, place.workers)
                message = {"op": "cover", "slot": place.slot, "public_ports": [one.public_port for one in held]}
                if live[0].send_sockets(message, [one.socket for one in held]):
                    place.covered_by = live[0]
                    self._log("warning", f"{place.name} can't start: worker pid {live[0].pid} accepts for it")
            elif not place.cannot_start:
                if covered and place.covered_by is not None:
                    self._send(place.covered_by, {"op": "uncover", "slot": place.slot})
                place.covered_by = None

    def _replace(self, place: Place, now: float, delay: float, how: str) -> None:
        if self.stage is Stage.STOPPING:
            self._stops_failed += 1
            if self._stops_failed >= STOP_ATTEMPTS:
                self._log("error", f"{place.name} {how}; giving up on stopping machines in order")
                self._cut_short = True
                self.stage = Stage.ENDED
                return
        again = f"starting again in {delay:g} s" if delay else "starting it again"
        self._log("error", f"{place.name} {how}; {again}")
        place.start_at = now + delay

    # --- new workers for old

    def replace_workers(self, plan: ServePlan, done: Done) -> list[str]:
        """Have workers of this plan take over; `done` is told how it went. Why that can't begin, if it can't."""
        if self.stage is not Stage.SERVING:
            return ["the node is ending"]
        if self._turnover is not None:
            return ["the workers are being replaced already: try again when that is done"]
        rows = free_rows(
            plan.workers, self._memory.rows, (place.slot for place in self._places if place.role != "control")
        )
        if len(rows) < plan.workers:
            left = len(self._retired)
            beside = f", beside {left} that keep connections after earlier changes" if left else ""
            what = "wait for those ([node] retire_timeout)" if left else "lower [node] workers"
            return [
                f"there is room for {len(rows)} more workers, not for {plan.workers}{beside}: "
                f"{what}, or restart the service"
            ]
        try:
            bindings = bind_all(plan.listen, plan.workers, held=self._bindings)
        except BindError as error:
            return str(error).splitlines()
        now = time.monotonic()
        places = self._new_places(plan, rows)
        for place in places:
            place.start_at = now
        self._memory.use_rows(max(self._memory.rows_in_use, 1 + max(rows)))
        self._turnover = Turnover(plan, bindings, places, now + START_S, done)
        self._log("info", f"{len(places)} new workers start, to take over from {len(self._workers)}")
        return []

    def _advance_turnover(self, now: float) -> None:
        turnover = self._turnover
        if turnover is None or (verdict := turnover.judge(now)) is None:
            return
        if verdict:
            self._finish_turnover(turnover)
        else:
            self._log("error", f"the new workers do not take over: {turnover.fault}")
            self._give_up_turnover(turnover.fault)

    def _finish_turnover(self, turnover: Turnover) -> None:
        old, former = self._workers, self._bindings
        self._turnover = None
        self._workers, self._bindings, self.plan = turnover.places, turnover.bindings, turnover.plan
        for place in old:
            place.covered_by = None
            self._retire(place, self.plan.retire_timeout_s)
        former.close(keep=self._bindings)
        self._log("info", f"{len(self._workers)} new workers have taken over")
        self._told_turned(turnover, [])

    def _give_up_turnover(self, why: str) -> None:
        """The new workers go, and what only they were to listen on. They may have accepted clients, who are served."""
        turnover = self._turnover
        assert turnover is not None
        self._turnover = None
        for place in turnover.places:
            self._retire(place, self.plan.drain_timeout_s)
        turnover.bindings.close(keep=self._bindings)
        self._told_turned(turnover, [why])

    def _told_turned(self, turnover: Turnover, faults: list[str]) -> None:
        self._fit_rows()
        self._tell_rows()
        self._changed()
        turnover.done(faults)

    def _retire(self, place: Place, timeout_s: float) -> None:
        """Let a worker finish with the connections it has. It is not replaced."""
        place.start_at = None
        if place.child is None:
            return
        self._retired.append(place)
        place.retire_by = time.monotonic() + timeout_s + DRAIN_MARGIN_S
        if place.child.ready:
            self._send(place.child, {"op": "retire", "timeout_s": timeout_s})
        else:
            place.child.kill()

    def _end_retired(self, now: float) -> None:
        if self.stage is not Stage.SERVING:
            return
        for place in self._retired:
            child = place.child
            if child is not None and not child.killed and place.retire_by is not None and now >= place.retire_by:
                self._log("warning", f"{place.name} (pid {child.pid}) did not finish in time; killing it")
                child.kill()

    def _forget(self, place: Place, how: str) -> None:
        """A retired worker has ended, and its row is free."""
        self._retired.remove(place)
        self._memory.beat(place.index, 0)
        self._fit_rows()
        self._tell_rows()
        self._log("info", how)

    def _fit_rows(self) -> None:
        """Sums go over the rows in use: no more than there have to be."""
        self._memory.use_rows(1 + max((place.slot for place in self._places if place.role == "worker"), default=0))

    def _tell_rows(self) -> None:
        if self._control.child is None or self._upgrade.control_leaves:
            return
        serving = [place.slot for place in self._workers]
        retiring = [place.slot for place in self._retired]
        self._send(self._control.child, {"op": "workers", "rows": serving, "retiring": retiring})

    def _hear_plan(self, child: Child, message: dict[str, Any]) -> None:
        """Control has read a configuration that changes what is the supervisor's."""
        plan = ServePlan.from_json(json.dumps(message["plan"]))
        if message["op"] == "plan":
            self.plan = plan
            return
        number = message["id"]

        def done(faults: list[str]) -> None:
            if self._control.child is child:
                self._send(child, {"op": "turned", "id": number, "faults": faults})

        if self._upgrade.request is not None:
            done(["an upgrade is under way, which reads the configuration anyway"])
        elif faults := self.replace_workers(plan, done):
            done(faults)
        else:
            self._send(child, {"op": "bound", "id": number})

    # --- what an upgrade needs (upgrade.Holder)

    @property
    def control(self) -> Place:
        return self._control

    @property
    def selector(self) -> selectors.BaseSelector:
        return self._selector

    @property
    def is_serving(self) -> bool:
        """And no change of workers is under way."""
        return self.stage is Stage.SERVING and self._turnover is None

    def path_of(self, name: str) -> str:
        return self._run_dir.path_of(name)

    def handed(self) -> dict[str, Any]:
        """All that the next program needs of this one."""
        return {
            "plan": asdict(self.plan),
            "bindings": self._bindings.to_state(),
            "shared_fd": self._shared_fd,
            "control_listener": self._control_listener.fileno(),
            "lock_fd": self._run_dir.lock_fd,
            "control": self._control.to_state(),
            "workers": [place.to_state() for place in self._workers],
            "retired": [place.to_state() for place in self._retired],
            "incarnations": self._incarnations,
            "announced_ready": self._announced_ready,
            "notify_socket": self._notify_socket,
            "watchdog_s": self._watchdog_s,
        }

    def _take_over(self, handed: dict[str, Any]) -> None:
        """Hold what the program before held. Descriptors become ours alone again."""
        self._memory = SharedMemory(handed["shared_fd"])
        for descriptor in descriptors_of(handed):
            os.set_inheritable(descriptor, False)
        now = time.monotonic()
        self._shared_fd = handed["shared_fd"]
        self._control_listener = socket.socket(fileno=handed["control_listener"])
        self._run_dir = RunDir(self.plan, handed["lock_fd"])
        self._bindings = Bindings.from_state(handed["bindings"])
        self._control = Place.from_state(dict(handed["control"]), now)
        self._workers = [Place.from_state(dict(one), now) for one in handed["workers"]]
        self._retired = [Place.from_state(dict(one), now) for one in handed["retired"]]
        self._incarnations = {int(row): number for row, number in handed["incarnations"].items()}
        self._announced_ready = handed["announced_ready"]
        self._notify_socket, self._watchdog_s = handed["notify_socket"], handed["watchdog_s"]

    def end_control(self) -> None:
        """Kill control and wait for its end, for two must not live at a time. Raises OSError if it does not end."""
        child = self.control.child
        if child is None:
            return
        child.kill()
        ended = select.poll()  # unlike select(2), for any descriptor
        ended.register(child.pidfd, select.POLLIN)
        ended.poll(DRAIN_MARGIN_S * 1000)
        if child.reap() is None:
            raise OSError(f"control, pid {child.pid}, does not end")
        self._selector.unregister(child.pidfd)
        if not child.gone_quiet:
            self._selector.unregister(child.channel)
        child.close()
        self.control.child = None

    def tell_upgrade(self, request: Request, stage: str, detail: str = "") -> None:
        level = "error" if stage in ("failed", "rolled back") else "info"
        self._log(level, f"upgrade to {request.version} ({request.python}): {stage}{': ' if detail else ''}{detail}")
        result = {"id": request.id, "version": request.version, "stage": stage, "detail": detail}
        self._write(RESULT_FILE, json.dumps(result) + "\n")
        self._changed()

    # --- channels

    def _send(self, child: Child, message: dict[str, Any]) -> None:
        child.send(message)
        self._watch_room(child)

    def _watch_room(self, child: Child) -> None:
        """Be woken when a channel takes messages again, and only then."""
        if child.gone_quiet:
            return
        key = self._selector.get_key(child.channel)
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if child.wants_room else 0)
        if key.events != events:
            self._selector.modify(child.channel, events, key.data)

    def _on_channel(self, place: Place, child: Child, mask: int) -> None:
        if place.child is not child:  # it ended earlier in this same turn
            return
        if mask & selectors.EVENT_WRITE:
            child.wants_room = False
            child.flush()
            self._watch_room(child)
            self._tell_orphans()
        if mask & selectors.EVENT_READ:
            self._hear_all(place)

    def _hear_all(self, place: Place) -> None:
        child = place.child
        if child is None or child.gone_quiet:
            return
        for datagram in child.receive():
            self._hear(place, child, datagram)
        if child.gone_quiet:
            self._selector.unregister(child.channel)

    def _hear(self, place: Place, child: Child, datagram: bytes) -> None:
        try:
            message = json.loads(datagram)
            op, pid = message.get("op"), message.get("pid")
        except (ValueError, AttributeError):
            self._log("error", f"{place.name} sent what is no message: {datagram[:100]!r}")
            return
        if op == "ready":
            child.ready = True
            self._cover()
            self._changed()
            self._announce_ready()
        elif op == "reap" and place is self._control and isinstance(pid, int):
            if not self._orphans.reap(pid):
                self._log("warning", f"control asked to reap pid {pid}, which is no ended orphan")
            self._tell_orphans()
        elif op in ("turn", "plan") and place is self._control:
            self._hear_plan(child, message)
        # Other operations are of a newer peer, and ignored.

    # --- orphans

    def _scan_orphans(self, now: float) -> None:
        if now < self._orphans_due:
            return
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])  # before the scan: an end during it counts
        self._orphans_due = now + ORPHAN_SCAN_S
        reaped = self._orphans.reaped_unasked
        own = {place.child.pid for place in self._places if place.child is not None}
        if self._upgrade.trial is not None:
            own.add(self._upgrade.trial.pid)
        self._orphans.scan(own)
        if self._orphans.reaped_unasked > reaped:
            self._log("warning", f"{self._orphans.reaped_unasked} stray processes in all were reaped without a record")
        self._tell_orphans()

    def _tell_orphans(self) -> None:
        child = self._control.child
        if child is None or self._upgrade.control_leaves:
            return
        while (end := self._orphans.next_to_tell()) is not None:
            if not child.send_now({"op": "exited", "pid": end.pid, "code": end.code, "signal": end.signal}):
                break
            self._orphans.told(end)
        self._watch_room(child)

    # --- what others can see

    def _announce_ready(self) -> None:
        if self._announced_ready or not all(
            place.child and place.child.ready for place in (self._control, *self._workers)
        ):
            return
        self._announced_ready = True
        self._write("ready", f"{self._pid}\n")
        self._notify("READY=1")
        self._log("info", f"ready: control and {len(self._workers)} workers serve")

    def _changed(self) -> None:
        """Write run_dir/children.json: who is who, for `wakefront status` and for tests."""
        children = [
            {
                "role": place.role,
                "slot": place.slot,
                "pid": place.child.pid,
                "incarnation": place.incarnation,
                "ready": place.child.ready,
                "retiring": place in self._retired,
            }
            for place in self._places
            if place.child is not None
        ]
        state = {
            "supervisor": self._pid,
            "program": sys.executable,
            "stage": self.stage.value,
            "takes": ["upgrade"],
            "listen": [asdict(one) for one in self._bindings.addresses()],
            "children": children,
        }
        self._write("children.json", json.dumps(state) + "\n")

    def _write(self, name: str, text: str) -> None:
        try:
            self._run_dir.write(name, text)
        except OSError as error:  # a full disk must not stop the supervisor
            self._log("error", f"{name} can't be written: {error}")

    def _feed_watchdog(self, now: float) -> None:
        """WatchdogSec= of systemd: this loop goes on, and it is what watches all others."""
        if self._watchdog_s and now >= self._watchdog_due and "WATCHDOG=1" not in self._unsaid:
            self._watchdog_due = now + self._watchdog_s
            self._notify("WATCHDOG=1")

    def _notify(self, state: str) -> None:
        """Tell systemd, if it asked (sd_notify(3))."""
        if self._notify_socket:
            self._unsaid.append(state)
            self._notify_on(time.monotonic())

    def _notify_on(self, now: float) -> None:
        """Say what is left to say; while its reader has stalled, again with the next turn."""
        if not self._unsaid or not self._notify_socket:
            return
        address = "\0" + self._notify_socket[1:] if self._notify_socket.startswith("@") else self._notify_socket
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.setblocking(False)
                while self._unsaid:
                    sender.sendto(self._unsaid[0].encode(), address)
                    self._unsaid.popleft()
        except BlockingIOError:
            pass
        except OSError as error:
            self._unsaid.clear()
            self._log("warning", f"NOTIFY_SOCKET {self._notify_socket}: {error}")

    def _log(self, level: str, text: str) -> None:
        """One line to stderr, lost rather than waited for when its reader has stalled; losses are told later."""
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now * 1000) % 1000:03}Z"
        if self._lines_lost:
            text += f" ({self._lines_lost} lines before this one were lost)"
        line = f"{stamp} {level} supervisor: {text}\n".encode("utf-8", "replace")[:4000]
        try:
            if not select.select([], [2], [], 0)[1]:
                raise BlockingIOError
            os.write(2, line)
            self._lines_lost = 0
        except (OSError, ValueError):  # nobody can be told now
            self._lines_lost += 1


def _watchdog_s() -> float:
    """How often systemd is told that we live: a third of what it waits; 0 = it did not ask (sd_watchdog_enabled(3))."""
    text, pid = os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", "")
    return int(text) / 3e6 if text.isdigit() and pid in ("", str(os.getpid())) else 0.0


def _noticed(number: int, frame: object) -> None:
    """A handler in Python must exist for the wake-up descriptor to be written; the loop does the rest."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
