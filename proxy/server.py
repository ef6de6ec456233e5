"""Composition root of the control process: what is made in which order, and how it ends.

    start   heartbeat · config (or the last good plan) · store · drivers · table and adoption · links · certificates ·
            admin API · "ready" to the supervisor
    drain   no more starts · machines are stopped (or kept) · API, links, certificates, store

A control may be killed at any of these points: machines outlive it, and the next one finds them. The supervisor's end
is seen on the channel; then control leaves at once and machines run on.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import itertools
import json
import logging
import os
import secrets
import select
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from certs import CertificateError, Seal, SealedFolder, load_or_make_secret
from certs.names import custom_domain
from proxy import clock, config, ipc, namespace
from proxy.control.api import Api
from proxy.control.apps import Apps, Changes
from proxy.control.certificates_api import CertificatesApi
from proxy.control.checks import Checks
from proxy.control.domains import Domains
from proxy.control.fine_timer import FineClock
from proxy.control.idle import IdleWatch
from proxy.control.link import Hub, Link
from proxy.control.machines import Fleet, Owned, WakeResult
from proxy.control.membership import Membership, advertised
from proxy.control.membership_api import MembershipApi
from proxy.control.peers import Peers
from proxy.control.plan import NodePlan, keep_plan, kept_plan, plan_of
from proxy.control.prober import plain_socket
from proxy.control.store import Store
from proxy.decide.overload import Stage
from proxy.decide.restart import hold_left_s
from proxy.errors import Code
from proxy.machines import proc
from proxy.machines.driver import Driver, Exit
from proxy.machines.process import ProcessDriver
from proxy.machines.static import StaticDriver
from proxy.metrics import AppCells, MachineFacts, Metrics, NodeFacts
from proxy.model import AppName, MachineId, MachineState
from proxy.process import ChildContext, ServePlan, raise_open_files
from proxy.state import W_OVERLOAD_STAGE, SharedMemory

log = logging.getLogger(__name__)

BEAT_S = 0.5
_FLUSH_S = 0.1
_REST_S = 0.002
_CHECKPOINT_S = 30.0
_RETRY_S = 1.0
_SLICE = 64  # apps told between two turns of the loop
_SWITCH_S = 0.0005  # a thread that reads or writes must not keep the loop, and with it a wake, waiting for 5 ms
_BIND_S = 10.0  # for the supervisor to bind
_TURN_S = 60.0  # and for new workers to serve; it gives up before
EXIT_NO_CONFIG = 1


def run(ctx: ChildContext) -> int:
    """The control process, from fork to exit status."""
    begin_logging("control")
    sys.setswitchinterval(_SWITCH_S)
    try:
        namespace.drop_ambient_capabilities()  # low ports are the supervisor's to bind, and no machine's
    except OSError as error:
        log.warning("machines inherit what capabilities the service manager gave: %s", error)
    raise_open_files()  # a machine costs one to three, and one more for each probe or check
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(ctx))


async def _serve(ctx: ChildContext) -> int:
    memory = SharedMemory(ctx.shared_fd)
    beat = clock.spawn(_beat(memory, ctx.index), "heartbeat")
    try:
        plan, faults = await _first_plan(ctx)
        if plan is None:
            return EXIT_NO_CONFIG
        server = Server(ctx, memory, plan, faults)
        try:
            await server.start()
            await server.ended.wait()
        finally:
            await server.close()
        return 0
    finally:
        beat.cancel()


async def _beat(memory: SharedMemory, index: int) -> None:
    while True:
        memory.beat(index, clock.monotonic_ns())
        await asyncio.sleep(BEAT_S)


async def _first_plan(ctx: ChildContext) -> tuple[NodePlan | None, list[str]]:
    """The plan of config.toml; while that has faults, the last good one."""
    result = await asyncio.to_thread(config.load, ctx.plan.config_path)
    kept_path = _kept_path(ctx)
    if result.config is not None:
        plan = _identified(plan_of(result.config), ctx)
        await asyncio.to_thread(keep_plan, kept_path, plan)
        return plan, []
    faults = [str(fault) for fault in result.errors]
    for fault in faults:
        log.error("%s", fault)
    kept = await asyncio.to_thread(kept_plan, kept_path)
    if kept is None:
        log.error("%s has faults and there is no earlier plan to go by", ctx.plan.config_path)
    else:
        log.warning("%s has faults: going on with the last good one", ctx.plan.config_path)
    return kept, faults


def _kept_path(ctx: ChildContext) -> str:
    return os.path.join(ctx.plan.run_dir, "plan.msgpack")


def _identified(plan: NodePlan, ctx: ChildContext) -> NodePlan:
    """With the identity that machine ids are derived from: made once per data_dir, whatever the node is called."""
    path = os.path.join(ctx.plan.data_dir, "node.id")
    try:
        with open(path, encoding="ascii") as file:
            identity = file.read().strip()
    except FileNotFoundError:
        identity = secrets.token_hex(8)
        descriptor = os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(identity + "\n")
        os.replace(path + ".new", path)
    return dataclasses.replace(plan, identity=identity, data_dir=ctx.plan.data_dir)


class Server:
    """Everything that control is made of."""

    def __init__(self, ctx: ChildContext, memory: SharedMemory, plan: NodePlan, faults: list[str]) -> None:
        assert ctx.control_listener is not None
        self._ctx = ctx
        self._memory = memory
        self._plan = plan
        self._clock = FineClock()
        self._config_faults = faults
        self._reload_warnings: list[str] = []
        self._began = self._clock.unix()
        self._node_began = _began(os.getppid())  # the supervisor, whatever controls it has had
        self._worker_starts = 0
        self._reloading = asyncio.Lock()
        self._ending: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[Any]] = []  # Any: each ends with nothing
        self._api_fault = ""
        self._certificate_fault = ""
        self._fleet_fault = ""
        self._is_in_fleet = False
        self.membership: Membership | None = None  # set once it is open: this node is one of a fleet
        self.peers: Peers | None = None  # of a fleet, from its first moment on
        self.is_ready = False
        self.ended = asyncio.Event()
        self.store = Store(os.path.join(ctx.plan.data_dir, "wakefront.db"))
        for fault in self.store.faults:
            log.error("%s", fault)
        self._drivers: dict[str, Driver] = {
            "process": ProcessDriver(ctx.plan.data_dir, supervisor=os.getppid()),
            "static": StaticDriver(),
        }
        self.hub = Hub(ctx.control_listener, memory, self._clock, plan.settings)
        epoch = self.store.next_epoch(self._clock.unix())
        self.fleet = Fleet(self._drivers, self.store, memory, self._clock, self.hub, _make_socket, epoch)
        self.checks = Checks(self.fleet, self._clock, clock.new_random(), _make_socket)
        self.fleet.health = self.checks
        snapshot = os.path.join(ctx.plan.run_dir, "table.msgpack")
        self.apps = Apps(self.store, self.fleet, self.hub, memory, self._clock, clock.new_random(), snapshot)
        self.domains = Domains(ctx.plan.data_dir, ctx.plan.run_dir, self._clock, clock.new_random())
        self.apps.added_to = self.domains.added_to
        self.domains.is_elsewhere = self.apps.is_elsewhere
        self.metrics = Metrics(memory, self)
        self.api = Api(self, self.apps, self.fleet, self.store, self.metrics, self._clock, ctx.plan.data_dir)
        self.api.checks_of = self.checks.checks_of
        self.api.certificates = CertificatesApi(self.domains, custom_domain, lambda app: self.apps.get(app) is not None)
        self.api.membership = MembershipApi(self._membership_or_why, self._peers_or_why, self._clock.unix)
        self.idle = IdleWatch(
            self.fleet, memory, self._clock, self.apps.pools, plan.region, self._autostop_interval_s, _make_socket
        )
        self.fleet.on_wake = self._woke
        self.hub.on_linked = self._linked
        self.domains.on_renewed = self._renewed
        self.domains.on_hostnames = self.apps.names_changed
        self._channel = Channel(ctx, self._hear, self._supervisor_gone)
        self._node_plan = ctx.plan  # the supervisor's: what is listened on, how many workers
        self._serving: list[int] = list(range(ctx.plan.workers))  # rows of workers, as the supervisor tells
        self._retiring: list[int] = []
        self._turn: Turn | None = None
        self._turns = itertools.count(1)

    async def start(self) -> None:
        await self._load_domains()
        await self.apps.load(self._plan, self._ctx.incarnation == 1)
        if self._plan.backhaul is not None:
            await self._recall_peers()
        await self.hub.start(self.apps, self)
        self._spawn(self._keep_store(), "store")
        self._spawn(self.apps.keep_snapshot(), "table snapshot")
        self._spawn(self.idle.run(), "idle")
        self._spawn(self._open_domains(), "open certificates")
        self._begin_membership()
        await self._open_api()
        self._channel.open()
        self.is_ready = True
        self._channel.send({"op": "ready"})
        names = len(self.apps.names())
        log.info("ready: %d apps, %d machines", names, len(self.fleet.all()))

    def _spawn(self, coro: Any, name: str) -> None:  # Any: a coroutine of whatever result
        self._tasks.append(clock.spawn(coro, name))

    async def close(self) -> None:
        self.is_ready = False
        self._channel.close()
        self.fleet.halt()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.checks.close()
        await self.api.close()
        await self.hub.close()
        await self.domains.close()
        for driver in self._drivers.values():
            await driver.close()
        self.store.close()

    # --- the supervisor

    def _hear(self, message: dict[str, Any]) -> None:
        match message.get("op"):
            case "reload":
                clock.spawn(self._reload_by_signal(), "reload")
            case "drain":
                if self._ending is None:
                    self._ending = clock.spawn(self._drain(), "drain")
            case "leave":
                log.info("another control takes over: leaving, machines run on")
                self.fleet.halt()
                self.ended.set()
            case "bound" | "turned":
                if self._turn is not None and self._turn.id == message.get("id"):
                    self._turn.hear(message)
            case "workers":
                self._serving, self._retiring = message["rows"], message["retiring"]
            case "exited":
                pid = int(message["pid"])
                self.fleet.exited_elsewhere(pid, Exit(message.get("code"), message.get("signal")))
                self._channel.send({"op": "reap", "pid": pid})
            case _:
                pass  # of a newer supervisor

    def _supervisor_gone(self) -> None:
        log.error("the supervisor is gone: leaving, machines run on")
        self.ended.set()

    async def _drain(self) -> None:
        self.is_ready = False
        if self._plan.stop_machines_on_exit:
            log.info("stopping machines")
            await self.fleet.stop_all()
        else:
            self.fleet.halt()
        self.ended.set()

    # --- configuration

    def _autostop_interval_s(self) -> float:
        return self._plan.autostop_interval_s

    async def _reload_by_signal(self) -> None:
        done, answer = await self.reload()
        if done:
            log.info("reloaded: %s", json.dumps(answer))

    async def reload(self) -> tuple[bool, dict[str, Any]]:
        """Read config.toml again. A file with faults changes nothing."""
        async with self._reloading:
            result = await asyncio.to_thread(config.load, self._ctx.plan.config_path)
            if result.config is None:
                self._config_faults = [str(fault) for fault in result.errors]
                for fault in self._config_faults:
                    log.error("not reloaded: %s", fault)
                faults = [
                    {
                        "file": one.file, "line": one.line, "key": one.key, "value": one.value,
                        "expectation": one.expectation, "did_you_mean": one.did_you_mean, "text": str(one),
                    }
                    for one in result.errors
                ]  # fmt: skip
                return False, {"error": "the configuration has faults; nothing was changed", "faults": faults}
            new = plan_of(result.config)
            node_plan = config.plan(result.config, self._ctx.plan.config_path)
            self._reload_warnings = self._fixed_differences(new, node_plan)
            if unbound := await self._bind(node_plan):
                error = "nothing was changed, what is to be listened on cannot be had"
                return False, {"error": error, "faults": _plain_faults(unbound)}
            old = self._plan
            self._plan = dataclasses.replace(
                new, identity=old.identity, name=old.name, region=old.region, data_dir=old.data_dir,
                admin_host=old.admin_host, admin_port=old.admin_port,
                settings=_with_identity(new.settings, old.settings),
            )  # fmt: skip
            self._begin_membership()
            if self.membership is not None and self._plan.backhaul != old.backhaul:
                await self._move()
            if self.peers is not None and self.membership is not None:
                self.peers.apply(self._plan)
            try:
                await self.domains.apply(self._plan)
            except (CertificateError, OSError) as failure:
                log.error("certificates are as before: %s", failure)
                self._reload_warnings.append(f"[certs] is as before: {failure}")
            changes = await self.apps.apply(self._plan)
            self._config_faults = []
            await asyncio.to_thread(keep_plan, _kept_path(self._ctx), self._plan)
            if failed := await self._turned(node_plan):
                error = "apps were reloaded, but listeners and workers are as before"
                return False, {"error": error, "faults": _plain_faults(failed)}
            warnings = self._reload_warnings + [str(one) for one in result.warnings]
            return True, _changes_json(changes, warnings)

    async def _bind(self, plan: ServePlan) -> list[str]:
        """Have the supervisor listen on what is new in a plan, if anything is, and start workers for it. Or why not."""
        old, self._turn = self._node_plan, None
        if (old.listen, old.workers) == (plan.listen, plan.workers):
            return []
        self._turn = Turn(next(self._turns))
        asked = dataclasses.asdict(dataclasses.replace(plan, data_dir=self._ctx.plan.data_dir))
        self._channel.send({"op": "turn", "id": self._turn.id, "plan": asked})
        return await self._turn.faults(self._turn.bound, _BIND_S)

    async def _turned(self, plan: ServePlan) -> list[str]:
        """Wait until the workers of a plan serve; a plan that needs no new ones is just told. Or why they do not."""
        turn, plan = self._turn, dataclasses.replace(plan, data_dir=self._ctx.plan.data_dir)
        if turn is None:
            if plan != self._node_plan:
                self._channel.send({"op": "plan", "plan": dataclasses.asdict(plan)})
                self._node_plan = plan
            return []
        faults = await turn.faults(turn.turned, _TURN_S)
        self._turn = None
        if not faults:
            self._node_plan = plan
        return faults

    def _fixed_differences(self, new: NodePlan, plan: ServePlan) -> list[str]:
        """What a reload does not change."""
        old = self._plan
        differs = {
            "[node] name": old.name != new.name,
            "[node] region": old.region != new.region,
            "[listen] admin": (old.admin_host, old.admin_port) != (new.admin_host, new.admin_port),
        }
        texts = [f"{key} changes with `wakefront upgrade` or a restart" for key, is_new in differs.items() if is_new]
        if self._ctx.plan.data_dir != plan.data_dir:
            texts.append("[node] data_dir changes only when the service is restarted")
        return texts

    # --- workers (link.Requests)

    def wake(self, link: Link, message: ipc.Wake) -> None:
        """Every link that asked is told once; a second question of the same worker waits for the same end."""
        machine = self.fleet.get(message.machine)
        if machine is None and message.hint and self.peers and self.peers.start(message.app, message.machine):
            return  # it is another node's, and nobody waits here to hear how it ended
        if machine is None or machine.app.name != message.app:
            detail = f"there is no machine {message.machine} of {message.app} here"
            link.send(ipc.WakeDone(message.app, message.machine, 0, Code.MACHINE_GONE.value, detail))
            return
        version = machine.row.version
        result = self.fleet.wake(machine.id)
        if result.done() and machine.row.version != version:
            # It was resumed within this call, and the record that says so has left: the worker has what it waits for,
            # and on a busy processor it gets on only when this process rests.
            asyncio.get_running_loop().call_later(_REST_S, self._tell, link, machine, result)
        elif result.done():
            self._tell(link, machine, result)
        elif machine.id not in link.awaited:
            link.awaited.add(machine.id)
            result.add_done_callback(functools.partial(self._tell, link, machine))

    def _tell(self, link: Link, machine: Owned, future: asyncio.Future[WakeResult]) -> None:
        link.awaited.discard(machine.id)
        result = future.result()
        app = machine.app.name
        code = result.code.value if result.code else None
        link.send_frame(
            ipc.encode(ipc.MachineSet(app, machine.record()))
            + ipc.encode(ipc.WakeDone(app, machine.id, result.version, code, result.detail, result.retry_after_s))
        )

    def need_certificate(self, link: Link, name: str) -> None:
        clock.spawn(self._provide(link, name), f"certificate {name}")

    async def _provide(self, link: Link, name: str) -> None:
        link.send(ipc.CertificateReady(name, await self.domains.provide(name)))

    def _renewed(self, name: str) -> None:
        self.hub.tell_all(ipc.CertificateReady(name))

    def passive_failure(self, message: ipc.PassiveFailure) -> None:
        self.fleet.heard_failure(MachineId(message.machine), message.version, message.code)

    def _linked(self, slot: int) -> None:
        self._worker_starts += 1

    # --- kept up in the background

    async def _keep_store(self) -> None:
        """Write what is queued, often; move the log into the database, seldom, in a thread."""
        last = self._clock.monotonic()
        told = len(self.store.faults)
        while True:
            await asyncio.sleep(_FLUSH_S)
            self.store.flush()
            for fault in self.store.faults[told:]:
                log.error("%s", fault)
            told = len(self.store.faults)
            if self._clock.monotonic() - last >= _CHECKPOINT_S:
                last = self._clock.monotonic()
                await asyncio.to_thread(self.store.checkpoint)

    async def _load_domains(self) -> None:
        """The names that were added, before workers are told of apps."""
        try:
            await self.domains.load(self._plan)
        except (CertificateError, OSError) as error:
            self._certificate_fault = str(error)
            log.error("names that were added are not known: %s", error)

    async def _open_domains(self) -> None:
        """Certificates may fail to open (a full disk): plain HTTP and wakes go on, and it is tried again."""
        while True:
            try:
                await self.domains.load(self._plan)
                await self.domains.open()
                for app in self.apps.names():
                    await self.apps.names_changed(app)
                break
            except (CertificateError, OSError) as error:
                if self._certificate_fault != str(error):
                    self._certificate_fault = str(error)
                    log.error("no certificates: %s", error)
                await asyncio.sleep(_RETRY_S)
        self._certificate_fault = ""

    def _begin_membership(self) -> None:
        if self._plan.backhaul is not None and not self._is_in_fleet:
            self._is_in_fleet = True
            self._spawn(self._keep_membership(), "membership")

    async def _move(self) -> None:
        assert self.membership is not None
        try:
            await self.membership.move(advertised(self._plan.backhaul))
        except OSError as error:
            log.error("the new address of the backhaul cannot be stored: %s", error)
            self._reload_warnings.append(f"[listen] backhaul: the new address is not told to others: {error}")

    async def _keep_membership(self) -> None:
        """What makes this node one of a fleet may fail to open (a full disk): it serves alone, and tries again."""
        while self.membership is None:
            try:
                membership = await self._new_membership()
                await membership.open()
                self.membership = membership
            except (CertificateError, OSError) as error:
                if self._fleet_fault != str(error):
                    self._fleet_fault = str(error)
                    log.error("this node does not meet the others of its fleet: %s", error)
                await asyncio.sleep(_RETRY_S)
        self._fleet_fault = ""
        self.membership.on_identity = lambda identity: self.hub.tell_all(ipc.IdentityReady())
        self._spawn(self._keep_peers(self.membership), "peers")
        await self.membership.keep()

    async def _recall_peers(self) -> None:
        self.peers = Peers(
            self._plan, self.apps, self.hub, self._memory, self._clock, clock.new_random(), self._ctx.plan.run_dir
        )
        self.peers.on_wake = self._wake_for_peer
        await self.peers.recall()

    def _wake_for_peer(self, app: AppName, machine_id: MachineId) -> None:
        """As a request that came here would: rules that hold starts back hold for these too."""
        machine = self.fleet.get(machine_id)
        if machine is not None and machine.app.name == app:
            self.fleet.wake(machine_id)

    async def _keep_peers(self, membership: Membership) -> None:
        """Whatever goes wrong with what others say, this node goes on to listen to them."""
        if self.peers is None:
            await self._recall_peers()
        assert self.peers is not None
        while True:
            try:
                await self.peers.run(membership)
            except Exception:
                log.exception("the word from other nodes broke off")
            await asyncio.sleep(_RETRY_S)

    async def _new_membership(self) -> Membership:
        def storage() -> SealedFolder:
            secret = load_or_make_secret(Path(self._ctx.plan.data_dir) / "secret.key")
            return SealedFolder(Path(self._ctx.plan.data_dir) / "certs", Seal(secret))

        plan = self._plan
        return Membership(
            await asyncio.to_thread(storage), self._clock, plan.name, plan.region, advertised(plan.backhaul)
        )

    def _membership_or_why(self) -> Membership | str:
        if self.membership is not None:
            return self.membership
        if self._plan.backhaul is None:
            return 'this node is by itself: add backhaul = "IP:PORT" to [listen] in its config.toml'
        return self._fleet_fault or "this node is not ready yet to meet others: try again in a moment"

    def _peers_or_why(self) -> Peers | str:
        membership = self._membership_or_why()
        if isinstance(membership, str):
            return membership
        return self.peers or "this node is not ready yet to meet others: try again in a moment"

    async def _open_api(self) -> None:
        """The admin address may still be held by a control that is ending."""
        if not await self._try_open_api():
            self._spawn(self._retry_api(), "open admin API")

    async def _try_open_api(self) -> bool:
        host, port = self._plan.admin_host, self._plan.admin_port
        try:
            await self.api.start(host, port)
        except OSError as error:
            fault = f"the admin API cannot listen on {host}:{port}: {error.strerror or error}"
            if self._api_fault != fault:
                self._api_fault = fault
                log.error("%s", fault)
            return False
        self._api_fault = ""
        assert self.api.address is not None
        path = os.path.join(self._ctx.plan.run_dir, "admin")
        text = "{}:{}\n".format(f"[{host}]" if ":" in host else host, self.api.address[1])
        await asyncio.to_thread(_write_text, path, text)
        return True

    async def _retry_api(self) -> None:
        while True:
            await asyncio.sleep(_RETRY_S)
            if await self._try_open_api():
                return

    # --- what is told

    def _woke(self, machine: Owned, result: WakeResult) -> None:
        phases = machine.last_wake
        if phases is not None:
            code = result.code.value if result.code else ""
            self.metrics.saw_wake(machine.app.name, phases.from_state, code, phases.answered - phases.asked)
        if result.code is not None and result.code is not Code.START_CANCELLED:
            log.error("machine %s of %s did not start: %s", machine.id, machine.app.name, result.detail)

    def facts(self) -> NodeFacts:
        """Called in the scraper's thread: reads only what is replaced whole."""
        now = self._clock.unix()
        machines = []
        for machine in self.fleet.all():
            row = machine.row
            machines.append(
                MachineFacts(
                    machine.app.name,
                    row.id,
                    row.slot,
                    row.state == MachineState.STARTED,
                    row.state,
                    row.exit_code,
                    row.oom_killed,
                    row.restart_count,
                    hold_left_s(row.hold_until, now) > 0,
                    self.checks.statuses(machine.id),
                )
            )
        apps = [AppCells(entry.plan.name, entry.slot) for entry in self.apps.all()]
        certificates = self.domains.facts()
        return NodeFacts(self._plan.region, self._plan.name, apps, machines, self._worker_starts, certificates)

    def in_flight(self, slot: int) -> int:
        return self._memory.in_flight(slot)

    async def status(self) -> dict[str, Any]:
        now = self._clock.unix()
        linked = self.hub.linked
        apps = []
        for entry in self.apps.all():
            machines = [
                {
                    "id": one.id, "state": one.row.state, "group": one.row.group, "note": one.note,
                    "cordoned": one.row.cordoned,
                    "hold_reason": one.row.hold_reason,
                    "hold_until": one.row.hold_until or None,
                    "in_flight": self._memory.in_flight(one.row.slot),
                }
                for one in entry.machines
            ]  # fmt: skip
            apps.append(
                {"id": entry.plan.name, "name": entry.plan.name, "hostnames": list(entry.plan.hostnames),
                 "added_names": len(entry.added), "driver": entry.plan.driver, "machines": machines}
            )  # fmt: skip
            if len(apps) % _SLICE == 0:
                await asyncio.sleep(0)
        certificates = await self.domains.status()
        return {
            "name": self._plan.name,
            "region": self._plan.region,
            "version": _version(),
            "ready": self.is_ready,
            "uptime_s": round(time.clock_gettime(time.CLOCK_BOOTTIME) - self._node_began, 3),
            "control": {
                "pid": os.getpid(), "incarnation": self._ctx.incarnation, "uptime_s": round(now - self._began, 3)
            },
            "workers": [
                {"id": slot, "slot": slot, "pid": linked.get(slot), "linked": slot in linked,
                 "connections": self._memory.cells[self._memory.worker_base(slot)],
                 "retiring": slot in self._retiring}
                for slot in (*self._serving, *self._retiring)
            ],
            "apps": apps,
            "certificates": certificates,
            "fleet": self.membership.status() if self.membership is not None else None,
            "warnings": self._warnings(certificates["warnings"]),
        }  # fmt: skip

    def _warnings(self, of_certificates: list[str]) -> list[str]:
        texts = [f"config.toml has faults, the last good one is in use: {one}" for one in self._config_faults]
        texts += self._reload_warnings
        texts += [fault for fault in (self._api_fault, self._certificate_fault) if fault]
        if self._fleet_fault:
            texts.append(f"this node does not meet the others of its fleet: {self._fleet_fault}")
        if self.membership is not None and self.membership.fault:
            texts.append(f"the certificate that other nodes know this one by is not renewed: {self.membership.fault}")
        for slot in self._serving:
            stage = self._memory.cells[self._memory.worker_base(slot) + W_OVERLOAD_STAGE]
            if stage:
                texts.append(f"worker {slot} is overloaded: {Stage(stage).name.lower().replace('_', ' ')}")
        texts += [f"no certificate for {name}: {why}" if name else why for name, why in self.domains.faults.items()]
        texts += of_certificates
        texts += [f"{name}: {why}" for name, why in self.apps.warnings.items()]
        return texts + self.store.faults

    def ca_pem(self) -> bytes | None:
        try:
            return self.domains.ca_path.read_bytes()
        except FileNotFoundError:
            return None


class Turn:
    """A change of workers that the supervisor was asked for, and its two answers."""

    def __init__(self, number: int) -> None:
        self.id = number
        loop = asyncio.get_running_loop()
        self.bound: asyncio.Future[list[str]] = loop.create_future()
        self.turned: asyncio.Future[list[str]] = loop.create_future()

    def hear(self, message: dict[str, Any]) -> None:
        faults = [str(fault) for fault in message.get("faults", ())]
        for future in (self.bound, self.turned) if message["op"] == "turned" else (self.bound,):
            if not future.done():
                future.set_result(faults)

    @staticmethod
    async def faults(answer: asyncio.Future[list[str]], timeout_s: float) -> list[str]:
        try:
            return await asyncio.wait_for(asyncio.shield(answer), timeout_s)
        except TimeoutError:
            return [f"the supervisor has not answered within {timeout_s:g} s"]


class Channel:
    """The supervisor's end is a SEQPACKET socket; one JSON object a datagram."""

    def __init__(self, ctx: ChildContext, hear: Callable[[dict[str, Any]], None], gone: Callable[[], None]) -> None:
        self._socket = ctx.channel
        self._hear = hear
        self._gone = gone
        self._waiting: list[bytes] = []

    def open(self) -> None:
        if self._socket is not None:
            self._socket.setblocking(False)
            asyncio.get_running_loop().add_reader(self._socket, self._read)

    def close(self) -> None:
        if self._socket is not None:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._socket)
            loop.remove_writer(self._socket)

    def send(self, message: dict[str, Any]) -> None:
        self._waiting.append(json.dumps(message).encode())
        self._flush()

    def _flush(self) -> None:
        if self._socket is None:
            self._waiting.clear()
            return
        loop = asyncio.get_running_loop()
        while self._waiting:
            try:
                self._socket.send(self._waiting[0])
            except BlockingIOError:
                loop.add_writer(self._socket, self._flush)
                return
            except OSError:  # it has gone: the reader tells
                self._waiting.clear()
                break
            del self._waiting[0]
        loop.remove_writer(self._socket)

    def _read(self) -> None:
        assert self._socket is not None
        for _ in range(64):
            try:
                datagram = self._socket.recv(65_536)
            except BlockingIOError:
                return
            except OSError:
                datagram = b""
            if not datagram:
                asyncio.get_running_loop().remove_reader(self._socket)
                self._gone()
                return
            try:
                message = json.loads(datagram)
            except ValueError:
                log.error("the supervisor sent what is no message: %r", datagram[:100])
                continue
            self._hear(message)


class StderrLines(logging.Handler):
    """One line a record to stderr, lost rather than waited for when nobody reads: control must never stand still."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role
        self._lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        from datetime import UTC, datetime

        stamp = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        text = record.getMessage()
        if record.exc_info:
            text += " | " + logging.Formatter().formatException(record.exc_info).replace("\n", " | ")
        if self._lost:
            text += f" ({self._lost} lines before this one were lost)"
        line = f"{stamp} {record.levelname.lower()} {self._role}: {text}\n".encode("utf-8", "replace")[:4000]
        try:
            if not select.select([], [2], [], 0)[1]:
                raise BlockingIOError
            os.write(2, line)
            self._lost = 0
        except (OSError, ValueError):
            self._lost += 1


def begin_logging(role: str) -> None:
    root = logging.getLogger()
    root.handlers[:] = [StderrLines(role)]
    root.setLevel(logging.INFO)
    logging.getLogger("asyncio").setLevel(logging.WARNING)


def _make_socket(netns_pid: int, family: int) -> socket.socket:
    return namespace.socket_in(netns_pid, family) if netns_pid else plain_socket(0, family)


def _with_identity(new: ipc.Settings, old: ipc.Settings) -> ipc.Settings:
    return msgspec.structs.replace(new, node=old.node, region=old.region)


def _changes_json(changes: Changes, warnings: list[str]) -> dict[str, Any]:
    return {
        "added": list(changes.added), "changed": list(changes.changed), "removed": list(changes.removed),
        "warnings": warnings, "faults": [],
    }  # fmt: skip


def _plain_faults(texts: list[str]) -> list[dict[str, Any]]:
    """Faults that are not of a file's making."""
    return [
        {"file": "", "line": 0, "key": "", "value": "", "expectation": "", "did_you_mean": "", "text": one}
        for one in texts
    ]


def _write_text(path: str, text: str) -> None:
    with open(path + ".new", "w", encoding="ascii") as file:
        file.write(text)
    os.replace(path + ".new", path)


def _began(pid: int) -> float:
    """When a process began, in seconds of CLOCK_BOOTTIME; one that has gone counts as of now."""
    stat = proc.read_stat(pid)
    if stat is None:
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return stat.start_ticks / os.sysconf("SC_CLK_TCK")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("wakefront")
    except PackageNotFoundError:  # run from a source tree that was not installed
        return "0.1.0"
