"""Machines as plain processes of this host: each the leader of a session, found again by its environment.

    start ──> watched ──(pidfd readable)──> ended ──> reported through on_exit ──forget──> reaped, stragglers killed
                │  ^                                        ^
        suspend v  │ resume                                 │ exited_elsewhere (adopted machines: their parent is the
              frozen                                        │ supervisor), or "unknown" if it says nothing for a second

A machine is its leader: when that ends, what is left of its session, its group and anything carrying its mark in the
environment is killed. Spawning is spawner.py's, reading /proc is proc.py's, when to start or stop is control's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import signal as signals
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from proxy import clock
from proxy.machines import logs, proc
from proxy.machines.driver import DriverError, Exit, ExitCallback, MachineSpec, Running, Stats
from proxy.machines.spawner import Doorstep, Spawned, Spawner
from proxy.model import MachineId

_log = logging.getLogger(__name__)

_ELSEWHERE_S = 1.0  # how long the supervisor may take to tell an orphan's status
_UNTOLD_S = 0.1  # and where it is not the orphan's parent, and hardly can
_FREEZE_S = 5.0  # a process in an uninterruptible wait does not stop before it is over
_KILL_S = 10.0
_TEND_S = 1.0
_STATS_KEPT_S = 60.0  # the table of processes is renewed this long after somebody asked
_SWEEP_PASSES = 5


@dataclass(slots=True)
class _Watch:
    """One start of one machine, from its first process to `forget`."""

    machine: MachineId
    running: Running
    pidfd: int
    is_child: bool  # ours to reap; else the supervisor's
    log_path: str
    is_told: bool = True  # of one that is not ours: its parent is the supervisor, which tells how it ended
    ended: bool = False  # its leader is a zombie or gone
    reported: asyncio.Event = field(default_factory=asyncio.Event)
    timer: asyncio.TimerHandle | None = None
    frozen: bool = False
    # pidfds of frozen processes outside the leader's group; None: not known (adopted frozen)
    frozen_apart: list[int] | None = field(default_factory=list)

    def close(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        for fd in (self.pidfd, *(self.frozen_apart or ())):
            os.close(fd)
        self.frozen_apart = []


class ProcessDriver:
    """Keeps the contract of proxy.machines.driver.Driver. One per node; `node_dir` is the node's data_dir."""

    name = "process"
    can_suspend = True

    def __init__(self, node_dir: str, log_limit_bytes: int = logs.LIMIT_BYTES, supervisor: int | None = None) -> None:
        """`supervisor`: the pid of who, as parent of orphans, tells how they ended; None: it is not known."""
        self._node_dir = node_dir
        self._supervisor = supervisor
        self._log_limit_bytes = log_limit_bytes
        self._on_exit: ExitCallback | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watches: dict[MachineId, _Watch] = {}
        self._starting: dict[MachineId, asyncio.Future[Running]] = {}
        self._spawner: Spawner | None = None
        self._doorstep: Doorstep | None = None
        self._stood_still = False  # a start at once was made in this turn of the loop
        self._to_sweep: dict[MachineId, int] = {}  # machine -> its late leader
        self._sweeper: asyncio.Task[None] | None = None
        self._sweeping: set[MachineId] = set()
        self._tender: asyncio.Task[None] | None = None
        self._sessions: dict[int, list[proc.ProcessStat]] = {}
        self._sessions_at = self._stats_asked_at = float("-inf")

    def set_on_exit(self, callback: ExitCallback) -> None:
        self._on_exit = callback
        with contextlib.suppress(RuntimeError):
            self._loop = asyncio.get_running_loop()

    # starting

    def prepare(self, spec: MachineSpec) -> None:
        """Makes log folder, volume folders and namespaces, on the spawner's thread. A failure shows at the start."""
        spawner = self._live_spawner()

        def job() -> None:
            try:
                if spec.log_path:
                    os.makedirs(os.path.dirname(spec.log_path), mode=0o700, exist_ok=True)
                spawner.prepare(spec)
            except (DriverError, OSError) as error:
                _log.warning("machine %s cannot be prepared: %s", spec.id, error)

        spawner.submit(job)

    async def start(self, spec: MachineSpec, on_forked: Callable[[Running], None]) -> Running:
        if (watch := self._watches.get(spec.id)) is not None and not watch.ended:
            on_forked(watch.running)
            return watch.running
        if (under_way := self._starting.get(spec.id)) is not None:
            running = await asyncio.shield(under_way)
            on_forked(running)
            return running
        future: asyncio.Future[Running] = asyncio.get_running_loop().create_future()
        self._starting[spec.id] = future
        future.add_done_callback(lambda done: self._started(spec.id, done))
        try:
            if watch is not None:
                self._report(watch, Exit())  # unless that was done
                self.forget(spec.id)
            while spec.id in self._to_sweep or spec.id in self._sweeping:
                await asyncio.shield(self._sweep_task())  # its old processes may hold the port
            self._submit_start(spec, on_forked, future)
        except BaseException as error:
            if not future.done():
                future.set_exception(DriverError(f"machine {spec.id}: the start was given up: {error!r}"))
            raise
        return await asyncio.shield(future)

    def start_at_once(self, spec: MachineSpec) -> Running | None:
        """Once per turn of the loop: a crowd of different machines must not hold it for the sum of their forks."""
        if (
            self._stood_still
            or not Doorstep.takes(spec)
            or spec.id in self._watches
            or spec.id in self._starting
            or spec.id in self._to_sweep
            or spec.id in self._sweeping
        ):
            return None
        self._stood_still = True
        asyncio.get_running_loop().call_soon(self._go_on)
        if self._doorstep is None:
            self._doorstep = Doorstep(self._node_dir)
        made = _spawn(self._doorstep, spec)
        self._watch(_Watch(spec.id, made.running, made.pidfd, is_child=True, log_path=spec.log_path))
        return made.running

    def _go_on(self) -> None:
        self._stood_still = False

    def _started(self, machine: MachineId, future: asyncio.Future[Running]) -> None:
        self._starting.pop(machine, None)
        if not future.cancelled():
            future.exception()  # whoever asked may have left; the journal has the rest

    def _submit_start(
        self, spec: MachineSpec, on_forked: Callable[[Running], None], future: asyncio.Future[Running]
    ) -> None:
        loop = asyncio.get_running_loop()
        spawner = self._live_spawner()

        def job() -> None:
            outcome: Spawned | DriverError
            try:
                outcome = _spawn(spawner, spec)
            except DriverError as error:
                outcome = error
            except Exception as error:  # the thread must go on, and whoever waits must hear of it
                _log.exception("machine %s: start failed", spec.id)
                outcome = DriverError(f"machine {spec.id}: {error}")
            loop.call_soon_threadsafe(self._spawned, spec, on_forked, future, outcome)

        spawner.submit(job)

    def _spawned(
        self,
        spec: MachineSpec,
        on_forked: Callable[[Running], None],
        future: asyncio.Future[Running],
        outcome: Spawned | DriverError,
    ) -> None:
        """Back on the loop. Happens also when the one who asked has left: the machine exists."""
        if isinstance(outcome, DriverError):
            future.set_exception(outcome)
            return
        self._watch(_Watch(spec.id, outcome.running, outcome.pidfd, is_child=True, log_path=spec.log_path))
        try:
            on_forked(outcome.running)
        except Exception as error:  # handed to the one who waits
            future.set_exception(error)
        else:
            future.set_result(outcome.running)

    def _live_spawner(self) -> Spawner:
        if self._spawner is not None and self._spawner.is_lost:
            self._spawner.leave()
            self._spawner = None
        if self._spawner is None:
            self._spawner = Spawner(self._node_dir)
        return self._spawner

    def release(self, machine: MachineId) -> None:
        if self._spawner is not None:
            spawner = self._spawner
            spawner.submit(lambda: spawner.release(machine))

    # finding

    def adopt(self, spec: MachineSpec, running: Running | None) -> Running | None:
        watch = self._watches.get(spec.id)
        if watch is not None and not watch.ended and running in (None, watch.running):
            return watch.running
        found = self._verified(spec, running) if running is not None else self.find_machines().get(spec.id)
        if found is None or not self._watch_stranger(spec.id, found, spec.log_path):
            self._sweep(spec.id, running.pid if running is not None else 0)
            return None
        return found

    def _verified(self, spec: MachineSpec, running: Running) -> Running | None:
        """The journal's process, if it is still that one: alive and carrying our mark, or ended but not yet reaped."""
        stat = proc.read_stat(running.pid)
        if stat is None or stat.start_ticks != running.start_ticks:
            return None
        if stat.state in "ZX":  # its environment is gone; nobody but its parent can free the pid
            return running
        environ = proc.environment(running.pid)
        if (
            proc.variable(environ, proc.MACHINE_VARIABLE) == spec.id
            and proc.variable(environ, proc.NODE_VARIABLE) == self._node_dir
        ):
            return running
        # a program may have written its title over its environment; its output still goes to the machine's file
        return running if spec.log_path and proc.writes_to(running.pid, spec.log_path) else None

    def _watch_stranger(self, machine: MachineId, running: Running, log_path: str) -> bool:
        try:
            pidfd = os.pidfd_open(running.pid)
        except ProcessLookupError:
            return False
        stat = proc.read_stat(running.pid)  # again: only now is the pid held
        if stat is None or stat.start_ticks != running.start_ticks:
            os.close(pidfd)
            return False
        watch = _Watch(machine, running, pidfd, is_child=stat.parent == os.getpid(), log_path=log_path)
        watch.is_told = self._supervisor in (None, stat.parent)
        if stat.state in "Tt":
            watch.frozen, watch.frozen_apart = True, None
        self._watch(watch)
        return True

    def find_machines(self) -> dict[MachineId, Running]:
        leaders: dict[str, proc.ProcessStat] = {}
        marked: set[str] = set()
        for pid, machine in proc.of_node(self._node_dir):
            marked.add(machine)
            stat = proc.read_stat(pid)
            leader = proc.read_stat(stat.session) if stat is not None else None
            if leader is None or leader.has_ended:
                continue
            if machine not in leaders or leader.start_ticks < leaders[machine].start_ticks:
                leaders[machine] = leader  # one that made a session of its own later is a child of it
        for machine in marked - leaders.keys():
            self._to_sweep.setdefault(MachineId(machine), 0)
        if self._to_sweep and self._loop is not None:  # this may run on any thread
            self._loop.call_soon_threadsafe(self._sweep_task)
        return {
            MachineId(machine): Running(leader.pid, leader.start_ticks, _own_network(leader.pid))
            for machine, leader in leaders.items()
        }

    async def stop_stray(self, machine: MachineId, running: Running, timeout_s: float) -> None:
        try:
            pidfd = os.pidfd_open(running.pid)
        except ProcessLookupError:
            return
        stat = proc.read_stat(running.pid)
        if stat is None or stat.start_ticks != running.start_ticks:
            os.close(pidfd)
            return
        watch = _Watch(machine, running, pidfd, is_child=False, log_path="")
        try:
            self._signal_group(watch, signals.SIGTERM)
            self._signal_group(watch, signals.SIGCONT)
            with contextlib.suppress(TimeoutError):
                await _ended_within(pidfd, timeout_s)
            self._signal_group(watch, signals.SIGKILL)
            await _ended_within(pidfd, _KILL_S)
        except TimeoutError:
            raise DriverError(f"machine {machine}: process {running.pid} did not end after SIGKILL") from None
        finally:
            watch.close()
        self._sweep(machine, running.pid)
        await asyncio.shield(self._sweep_task())

    # watching

    def _watch(self, watch: _Watch) -> None:
        self._to_sweep.pop(watch.machine, None)
        if (old := self._watches.get(watch.machine)) is not None:
            asyncio.get_running_loop().remove_reader(old.pidfd)
            old.close()
        self._watches[watch.machine] = watch
        asyncio.get_running_loop().add_reader(watch.pidfd, self._saw_end, watch)
        if self._tender is None:
            self._tender = clock.spawn(self._tend(), "machine logs")

    def _saw_end(self, watch: _Watch) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(watch.pidfd)
        watch.ended = True
        if watch.is_child:
            self._report(watch, _peek(watch.pidfd))
        elif not watch.reported.is_set():
            wait_s = _ELSEWHERE_S if watch.is_told else _UNTOLD_S  # not told: it outlived the supervisor before this
            watch.timer = loop.call_later(wait_s, self._report, watch, Exit())

    def has_ended(self, machine: MachineId) -> bool:
        watch = self._watches.get(machine)
        return watch is not None and not watch.reported.is_set() and (watch.ended or _is_over(watch.pidfd))

    def exited_elsewhere(self, pid: int, end: Exit) -> bool:
        for watch in self._watches.values():
            if watch.running.pid == pid:
                if not watch.ended:
                    asyncio.get_running_loop().remove_reader(watch.pidfd)
                    watch.ended = True
                self._report(watch, end)
                return True
        return False

    def _report(self, watch: _Watch, end: Exit) -> None:
        if watch.reported.is_set():
            return
        if watch.timer is not None:
            watch.timer.cancel()
        watch.reported.set()
        _write_mark(watch.log_path, watch.machine, describe(end))
        if self._on_exit is not None:
            self._on_exit(watch.machine, watch.running, end)

    def forget(self, machine: MachineId) -> None:
        watch = self._watches.get(machine)
        if watch is None or not watch.ended:
            return
        del self._watches[machine]
        self._signal_group(watch, signals.SIGKILL)
        if watch.is_child:
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PIDFD, watch.pidfd, os.WEXITED | os.WNOHANG)
        watch.close()
        self._sweep(machine, watch.running.pid)

    def stats(self, machine: MachineId) -> Stats | None:
        watch = self._watches.get(machine)
        if watch is None or watch.ended:
            return None
        now = clock.monotonic()
        self._stats_asked_at = now
        if now - self._sessions_at > 2 * _TEND_S:  # first question in a while; from now on it is kept fresh
            self._sessions, self._sessions_at = proc.sessions(), now
        rss, cpu, files = proc.usage(self._sessions.get(watch.running.pid, []))
        return Stats(rss_bytes=rss, cpu_s=cpu, open_files=files)

    async def close(self) -> None:
        loop = asyncio.get_running_loop()
        for task in (self._tender, self._sweeper):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        self._tender = self._sweeper = None
        for watch in self._watches.values():
            if not watch.ended:
                loop.remove_reader(watch.pidfd)
            watch.close()
        self._watches.clear()
        if self._doorstep is not None:
            self._doorstep.close()
            self._doorstep = None
        if self._spawner is not None:
            spawner, self._spawner = self._spawner, None
            await asyncio.to_thread(spawner.close)

    # stopping and freezing

    async def stop(self, machine: MachineId, signal: int, timeout_s: float) -> None:
        if (under_way := self._starting.get(machine)) is not None:
            with contextlib.suppress(DriverError):
                await asyncio.shield(under_way)
        watch = self._watches.get(machine)
        if watch is None or watch.reported.is_set():
            return
        self._signal_group(watch, signal)
        await self._thaw(watch)
        try:
            async with asyncio.timeout(timeout_s):
                await watch.reported.wait()
            return
        except TimeoutError:
            self._signal_group(watch, signals.SIGKILL)
        try:
            async with asyncio.timeout(_KILL_S):
                await watch.reported.wait()
        except TimeoutError:
            raise DriverError(f"machine {machine}: process {watch.running.pid} did not end after SIGKILL") from None

    async def suspend(self, machine: MachineId) -> None:
        watch = self._alive(machine)
        if watch.frozen:
            return
        self._signal_group(watch, signals.SIGSTOP)
        watch.frozen = True
        watch.frozen_apart = None
        await asyncio.shield(clock.spawn(self._await_still(watch), f"suspend {machine}"))

    async def _await_still(self, watch: _Watch) -> None:
        """A task of its own: whoever asked may be cancelled, but half a machine must not stay frozen."""
        apart: dict[int, int] = {}  # pid -> pidfd
        deadline = clock.monotonic() + _FREEZE_S
        while not await asyncio.to_thread(self._all_still, watch, apart):
            if not watch.frozen or watch.ended or clock.monotonic() > deadline:
                break
            await asyncio.sleep(0.001)
        else:
            if watch.frozen and not watch.ended:
                watch.frozen_apart = list(apart.values())
                return
        why = (
            "was resumed" if not watch.frozen else "ended" if watch.ended else f"did not stand still in {_FREEZE_S:g} s"
        )
        watch.frozen, watch.frozen_apart = True, list(apart.values())
        await self._thaw(watch)
        raise DriverError(f"machine {watch.machine} {why} while it was being suspended")

    def _all_still(self, watch: _Watch, apart: dict[int, int]) -> bool:
        """One whole pass over /proc in which every process of the machine was found stopped. Whoever left the group
        is stopped by it, and held in `apart`."""
        all_still = True
        for stat in proc.members(watch.running.pid, self._node_dir, watch.machine):
            all_still = all_still and stat.stands_still
            if stat.group == watch.running.pid or stat.pid in apart:
                continue
            with contextlib.suppress(ProcessLookupError):
                apart[stat.pid] = pidfd = os.pidfd_open(stat.pid)
                signals.pidfd_send_signal(pidfd, signals.SIGSTOP)
        return all_still

    async def resume(self, machine: MachineId) -> None:
        await self._thaw(self._alive(machine))

    def resume_at_once(self, machine: MachineId) -> bool:
        watch = self._watches.get(machine)
        if watch is None or watch.ended or watch.frozen_apart is None:
            return False
        if not watch.frozen:
            return True
        try:
            self._signal_group(watch, signals.SIGCONT)
        except DriverError:
            return False
        self._let_go(watch)
        return True

    def is_frozen(self, machine: MachineId) -> bool:
        watch = self._watches.get(machine)
        return watch is not None and watch.frozen

    async def _thaw(self, watch: _Watch) -> None:
        if not watch.frozen:
            return
        self._signal_group(watch, signals.SIGCONT)
        if watch.frozen_apart is None:
            watch.frozen = False
            found = await asyncio.to_thread(proc.members, watch.running.pid, self._node_dir, watch.machine)
            for stat in found:
                if stat.stands_still:
                    _signal_marked(stat.pid, stat.start_ticks, signals.SIGCONT)
        self._let_go(watch)

    def _let_go(self, watch: _Watch) -> None:
        """Those outside the leader's group go on too."""
        watch.frozen = False
        apart, watch.frozen_apart = watch.frozen_apart, []
        for pidfd in apart or ():
            with contextlib.suppress(ProcessLookupError):
                signals.pidfd_send_signal(pidfd, signals.SIGCONT)
            os.close(pidfd)

    def _alive(self, machine: MachineId) -> _Watch:
        watch = self._watches.get(machine)
        if watch is None or watch.ended:
            raise DriverError(f"machine {machine} is not running")
        return watch

    def _signal_group(self, watch: _Watch, signal: int) -> None:
        """To the leader's group, unless the leader was reaped: then the number may be another's by now. A child of ours
        is reaped by `forget` alone."""
        if not (watch.is_child and self._watches.get(watch.machine) is watch):
            stat = proc.read_stat(watch.running.pid)
            if stat is None or stat.start_ticks != watch.running.start_ticks:
                return
        try:
            os.killpg(watch.running.pid, signal)
        except ProcessLookupError:
            return
        except PermissionError as error:
            raise DriverError(
                f"machine {watch.machine}: not permitted to signal process group {watch.running.pid}"
            ) from error

    # stragglers

    def _sweep(self, machine: MachineId, leader: int) -> None:
        self._to_sweep[machine] = leader
        self._sweep_task()

    def _sweep_task(self) -> asyncio.Task[None]:
        if self._sweeper is None or self._sweeper.done():
            self._sweeper = clock.spawn(self._run_sweeps(), "machine stragglers")
        return self._sweeper

    async def _run_sweeps(self) -> None:
        """One pass over /proc serves every machine that ended meanwhile; passes repeat while they find somebody."""
        while self._to_sweep:
            batch, self._to_sweep = self._to_sweep, {}
            self._sweeping = set(batch)
            try:
                for _ in range(_SWEEP_PASSES):
                    if not await asyncio.to_thread(_kill_stragglers, self._node_dir, batch):
                        break
            finally:
                self._sweeping = set()

    # once a second

    async def _tend(self) -> None:
        while True:
            await asyncio.sleep(_TEND_S)
            paths = [watch.log_path for watch in self._watches.values() if watch.log_path]
            await asyncio.to_thread(self._trim, paths)
            if clock.monotonic() - self._stats_asked_at < _STATS_KEPT_S:
                self._sessions = await asyncio.to_thread(proc.sessions)
                self._sessions_at = clock.monotonic()

    def _trim(self, paths: Iterable[str]) -> None:
        for path in paths:
            try:
                logs.trim(path, self._log_limit_bytes)
            except OSError as error:
                _log.warning("the log of a machine cannot be kept within its bound: %s", error)


def describe(end: Exit) -> str:
    """One line for the log."""
    if end.signal is not None:
        with contextlib.suppress(ValueError):
            return f"ended by {signals.Signals(end.signal).name}"
        return f"ended by signal {end.signal}"
    return "ended, exit code unknown" if end.code is None else f"ended, exit code {end.code}"


def _spawn(spawner: Spawner | Doorstep, spec: MachineSpec) -> Spawned:
    if not spec.log_path:
        return spawner.spawn(spec, -1)
    try:
        fd = logs.open_log(spec.log_path)
    except OSError as error:
        raise DriverError(f"machine {spec.id}: cannot open its log {spec.log_path}: {error.strerror}") from error
    try:
        _mark(fd, spec.id, "starting")
        return spawner.spawn(spec, fd)
    except DriverError as error:
        _mark(fd, spec.id, f"not started: {error}")
        raise
    finally:
        os.close(fd)


def _is_over(pidfd: int) -> bool:
    """Whether the process has ended, also where the loop has yet to hear of it."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _peek(pidfd: int) -> Exit:
    """How our child ended; it stays a zombie."""
    try:
        info = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    except ChildProcessError:
        return Exit()
    if info is None:
        return Exit()
    return Exit(code=info.si_status) if info.si_code == os.CLD_EXITED else Exit(signal=info.si_status)


def _kill_stragglers(node_dir: str, batch: dict[MachineId, int]) -> int:
    """Kill what carries the mark of one of these machines or is of a late leader's session. Returns how many."""
    killed = 0
    leaders = {leader for leader in batch.values() if leader > 0}
    for pid in proc.pids():
        stat = proc.read_stat(pid)
        if stat is None or stat.has_ended or pid == os.getpid():
            continue
        environ = proc.environment(pid)
        node = proc.variable(environ, proc.NODE_VARIABLE)
        marked = node == node_dir and proc.variable(environ, proc.MACHINE_VARIABLE) in batch
        if marked or (stat.session in leaders and node in (None, node_dir)):
            killed += _signal_marked(pid, stat.start_ticks, signals.SIGKILL)
    return killed


def _signal_marked(pid: int, start_ticks: int, signal: int) -> bool:
    """Signal that very process; its pid may have passed to another since it was looked at."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        stat = proc.read_stat(pid)
        if stat is None or stat.start_ticks != start_ticks:
            return False
        signals.pidfd_send_signal(pidfd, signal)
        return True
    except (ProcessLookupError, PermissionError):
        return False
    finally:
        os.close(pidfd)


def _own_network(pid: int) -> int:
    """The pid, if its network is not ours."""
    try:
        is_ours = os.path.samestat(os.stat(f"/proc/{pid}/ns/net"), os.stat("/proc/self/ns/net"))
    except OSError:
        return 0
    return 0 if is_ours else pid


async def _ended_within(pidfd: int, timeout_s: float) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        async with asyncio.timeout(timeout_s):
            await ended.wait()
    finally:
        loop.remove_reader(pidfd)


def _write_mark(path: str, machine: MachineId, event: str) -> None:
    if not path:
        return
    try:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
    except OSError as error:
        _log.warning("machine %s: cannot open its log: %s", machine, error)
        return
    try:
        _mark(fd, machine, event)
    finally:
        os.close(fd)


def _mark(fd: int, machine: MachineId, event: str) -> None:
    try:
        logs.mark(fd, clock.unix(), machine, event)
    except OSError as error:  # a full disk must keep neither a machine from starting nor its exit from being recorded
        _log.warning("machine %s: cannot write to its log: %s", machine, error)
