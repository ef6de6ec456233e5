"""The admin API: Fly's Machines endpoints for what this node has, and a few of our own. See docs/admin-api.md.

Guarded in this order: the Host header must be ours (a page in a browser that rebinds a name has another), a foreign
Origin is refused, and all but `/healthz` and, on loopback, `/metrics` need the bearer token. No cookies, no CORS.
Handlers only ask and tell; what is done is Fleet's, Apps' and the node's.
"""

from __future__ import annotations

import asyncio
import functools
import hmac
import ipaddress
import logging
import os
import re
import secrets
import signal as signals
import socket
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from proxy.clock import Clock
from proxy.control.answers import (
    MAX_BODY_BYTES,
    ApiError,
    Json,
    body_too_long,
    json_answer,
    large_json_answer,
    query_flag,
    query_number,
    read_body,
)
from proxy.control.apps import Apps, Entry
from proxy.control.certificates_api import IMPORT_PATH_END, MAX_IMPORT_BYTES, CertificatesApi, DomainRefused
from proxy.control.leases import (
    DEFAULT_TTL_S,
    HEADER,
    LONGEST_DESCRIPTION,
    LONGEST_TTL_S,
    LeaseConflict,
    Leases,
)
from proxy.control.machines import Fleet, Owned, Refused, WakeResult
from proxy.control.membership_api import MembershipApi
from proxy.control.metadata import changed_metadata, metadata_of
from proxy.control.store import Event, Lease, Store
from proxy.decide.explain import Asked, explain
from proxy.errors import Code
from proxy.machines.logs import Follower, LogLine, log_files, tail
from proxy.metrics import Metrics
from proxy.wire.fly_toml import MAX_KILL_TIMEOUT_S

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 256  # at once; whoever comes then is closed, so that control keeps descriptors for machines
FIRST_HEAD_S = 10.0  # a connection that has sent no whole head by then is closed
_LONGEST_WAIT_S = 60.0
_FOLLOW_PAUSE_S = 0.1
_MOST_LINES = 10_000
_SLICE = 64  # apps or machines told between two turns of the loop
_SIGNALS = (
    "SIGABRT", "SIGALRM", "SIGFPE", "SIGHUP", "SIGILL", "SIGINT", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGSEGV",
    "SIGTERM", "SIGTRAP", "SIGUSR1", "SIGUSR2",
)  # fmt: skip
_WAIT_STATES = frozenset({"started", "stopped", "suspended", "destroyed", "failed", "settled", "created"})
_ULID = re.compile(r"[0-9A-HJKMNP-TV-Z]{26}")
_SETTLED = ("created", "started", "stopped", "suspended", "failed")

_http_log = logging.getLogger(f"{__name__}.http")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Node(Protocol):
    """What of the node is told, and what it can be told (server.py)."""

    is_ready: bool

    async def status(self) -> Json: ...

    async def reload(self) -> tuple[bool, Json]:
        """Whether it was done, and what changed or which faults there are."""

    def ca_pem(self) -> bytes | None: ...

    def in_flight(self, slot: int) -> int:
        """Requests and tunnels under way on a machine, over all workers."""


class Api:
    """The server. `start` it, `close` it."""

    def __init__(
        self, node: Node, apps: Apps, fleet: Fleet, store: Store, metrics: Metrics, clock: Clock, data_dir: str
    ) -> None:
        self._node = node
        self._apps = apps
        self._fleet = fleet
        self._store = store
        self._leases = Leases(store, clock)
        self._metrics = metrics
        self._clock = clock
        self._data_dir = data_dir
        self._token = load_or_make_token(os.path.join(data_dir, "admin.token"))
        self.certificates: CertificatesApi | None = None  # set before `start`, where there are certificates
        self.membership: MembershipApi | None = None  # likewise, where there may be other nodes
        self.checks_of: Callable[[Owned], list[Json]] = lambda machine: []  # checks.py's, where checks are run
        self._runner: web.AppRunner | None = None
        self._server: asyncio.Server | None = None
        self._silent: set[object] = set()  # connections that have not sent a whole head yet
        self._hosts: frozenset[str] = frozenset()
        self.address: tuple[str, int] | None = None

    async def start(self, host: str, port: int) -> None:
        """Listen. Raises OSError if the address cannot be bound."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.setblocking(False)
            self.address = (host, listener.getsockname()[1])
            self._hosts = _allowed_hosts(*self.address)
            self._runner = web.AppRunner(
                self._application(),
                access_log=None,
                handle_signals=False,
                shutdown_timeout=1.0,
                logger=_http_log,
                auto_decompress=False,
            )
            await self._runner.setup()
            loop = asyncio.get_running_loop()
            self._server = await loop.create_server(self._connection, sock=listener, backlog=64)
        except BaseException:
            listener.close()
            raise

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        if self._runner is not None:
            await self._runner.cleanup()

    def _connection(self) -> asyncio.BaseProtocol:
        """Somebody has connected: aiohttp's handler, or one that closes where there are too many."""
        assert self._runner is not None and self._runner.server is not None
        server = self._runner.server
        if len(server.connections) >= MAX_CONNECTIONS:
            return _Refusal()
        handler = server()
        self._silent.add(handler)
        asyncio.get_running_loop().call_later(FIRST_HEAD_S, self._end_silent, handler)
        return handler

    def _end_silent(self, handler: web.RequestHandler) -> None:
        if handler in self._silent:
            self._silent.discard(handler)
            handler.force_close()

    def _application(self) -> web.Application:
        app = web.Application(middlewares=[self._guard], client_max_size=MAX_IMPORT_BYTES)
        machines = "/v1/apps/{app}/machines"
        one = machines + "/{id}"
        app.add_routes(
            [
                web.get("/healthz", self._healthz),
                web.get("/metrics", self._get_metrics),
                web.get("/v1/status", self._status),
                web.post("/v1/reload", self._reload),
                web.post("/v1/explain", self._explain),
                web.get("/v1/certs/ca", self._ca),
                web.get("/v1/apps", self._list_apps),
                web.get("/v1/apps/{app}", self._get_app),
                web.get("/v1/apps/{app}/logs", self._logs),
                web.get(machines, self._list_machines),
                web.get(one, self._get_machine),
                web.post(one + "/start", self._start),
                web.post(one + "/stop", self._stop),
                web.post(one + "/suspend", self._suspend),
                web.post(one + "/restart", self._restart),
                web.post(one + "/signal", self._signal),
                web.post(one + "/cordon", self._cordon),
                web.post(one + "/uncordon", self._uncordon),
                web.get(one + "/lease", self._get_lease),
                web.post(one + "/lease", self._take_lease),
                web.delete(one + "/lease", self._release_lease),
                web.get(one + "/metadata", self._get_metadata),
                web.put(one + "/metadata", self._set_metadata),
                web.post(one + "/metadata", self._set_metadata),
                web.get(one + "/metadata/{key}", self._get_metadata_key),
                web.post(one + "/metadata/{key}", self._set_metadata_key),
                web.delete(one + "/metadata/{key}", self._delete_metadata_key),
                web.get(one + "/wait", self._wait),
                web.get(one + "/events", self._events),
                web.get(one + "/wakes", self._wakes),
            ]
        )
        if self.certificates is not None:
            app.add_routes(self.certificates.routes())
        if self.membership is not None:
            app.add_routes(self.membership.routes())
        return app

    # --- who may ask

    @functools.cached_property
    def _guard(self) -> Any:  # Any: aiohttp's middleware type is private
        @web.middleware
        async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
            try:
                self._check(request)
                return await handler(request)
            except ApiError as error:
                return json_answer(error.body, error.status)
            except Refused as error:
                return json_answer({"error": str(error), "status": "failed_precondition"}, 412)
            except LeaseConflict as error:
                return json_answer({"error": str(error), "status": "lease_held"}, 409)
            except DomainRefused as error:
                return json_answer(error.body, error.status)
            except web.HTTPRequestEntityTooLarge:
                return json_answer(body_too_long(_body_limit(request)).body, 413)
            except web.HTTPException as error:
                code = "not_found" if error.status == 404 else "unknown"
                return json_answer({"error": error.reason.lower(), "status": code}, error.status)
            except (ConnectionError, asyncio.CancelledError):
                raise
            except Exception:
                log.exception("%s %s failed", request.method, request.path)
                return json_answer({"error": "internal error: see the log of control", "status": "internal"}, 500)

        return guard

    def _check(self, request: web.Request) -> None:
        self._silent.discard(request.protocol)
        if request.headers.get("Host", "").lower() not in self._hosts:
            raise ApiError(403, "unauthorized", "the Host header is not this node's admin address")
        origin = request.headers.get("Origin")
        if origin is not None and origin.partition("://")[2].lower() not in self._hosts:
            raise ApiError(403, "unauthorized", "requests from other origins are not taken")
        if request.path == "/healthz" or (request.path == "/metrics" and _is_loopback(request.remote)):
            return
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        given = token.strip().encode("utf-8", "surrogateescape") if scheme.lower() == "bearer" else b""
        if not hmac.compare_digest(given, self._token.encode()):
            raise ApiError(
                401, "unauthenticated", "a bearer token is needed: it is in admin.token of the node's data_dir"
            )
        if (request.content_length or 0) > (limit := _body_limit(request)):
            raise body_too_long(limit)

    # --- the node

    async def _healthz(self, request: web.Request) -> web.Response:
        if self._node.is_ready:
            return web.Response(text="ok\n")
        return web.Response(status=503, text="not ready\n")

    async def _get_metrics(self, request: web.Request) -> web.Response:
        text = await asyncio.to_thread(self._metrics.render)
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _status(self, request: web.Request) -> web.Response:
        return await large_json_answer(await self._node.status())

    async def _reload(self, request: web.Request) -> web.Response:
        done, answer = await self._node.reload()
        return json_answer(answer, 200 if done else 422)

    async def _explain(self, request: web.Request) -> web.Response:
        """Which machine a request would get, and why; nothing is sent."""
        asked = _asked(await read_body(request, required=True))
        apps = [entry.record() for entry in self._apps.all()]
        found = explain(apps, asked, self._node.in_flight, self._clock.unix())
        steps = [{"step": step, "text": text} for step, text in found.steps]
        return json_answer(
            {"action": found.action, "code": found.code, "app": found.app, "machines": found.machines, "steps": steps}
        )

    async def _ca(self, request: web.Request) -> web.Response:
        pem = self._node.ca_pem()
        if pem is None:
            raise ApiError(404, "not_found", "this node has no internal CA yet")
        return web.Response(body=pem, content_type="application/x-pem-file")

    # --- apps

    async def _list_apps(self, request: web.Request) -> web.Response:
        apps = []
        for entry in self._apps.all():
            apps.append(_app_json(entry))
            if len(apps) % _SLICE == 0:
                await asyncio.sleep(0)
        return await large_json_answer({"total_apps": len(apps), "apps": apps})

    async def _get_app(self, request: web.Request) -> web.Response:
        return json_answer(_app_json(self._entry(request)))

    async def _logs(self, request: web.Request) -> web.StreamResponse:
        """The last lines of all the app's machines, then, if asked, what is added: one line of text each."""
        entry = self._entry(request)
        name = entry.plan.name
        lines = query_number(request, "lines", 100, 0, _MOST_LINES)
        follow = request.query.get("follow", "0").lower() in ("1", "true", "yes")
        files = await asyncio.to_thread(log_files, self._data_dir, name)
        follower = Follower(files) if follow else None
        response = web.StreamResponse(headers={"Content-Type": "text/plain; charset=utf-8"})
        await response.prepare(request)
        await response.write(_text(await asyncio.to_thread(tail, files, int(lines))))
        while follower is not None:
            await self._clock.sleep(_FOLLOW_PAUSE_S)
            files = await asyncio.to_thread(log_files, self._data_dir, name)
            news = await asyncio.to_thread(follower.read, files)
            if request.transport is None or request.transport.is_closing():
                break
            if news:
                await response.write(_text(news))
        await response.write_eof()
        return response

    # --- machines

    async def _list_machines(self, request: web.Request) -> web.Response:
        entry = self._entry(request)
        states = {state for text in request.query.getall("state", []) for state in text.split(",") if state}
        region = request.query.get("region")
        metadata = [(name[9:], value) for name, value in request.query.items() if name.startswith("metadata.")]
        wanted = [
            machine
            for machine in entry.machines
            if (not states or machine.row.state in states)
            and region in (None, machine.region)
            and (not metadata or all(metadata_of(machine).get(key) == value for key, value in metadata))
        ]
        with_lease = query_flag(request, "include_leases")
        shown = []
        for machine in wanted:
            shown.append(self._machine_json(machine, with_lease=with_lease))
            if len(shown) % _SLICE == 0:
                await asyncio.sleep(0)
        return await large_json_answer(shown)

    async def _get_machine(self, request: web.Request) -> web.Response:
        machine = self._machine(request)
        with_lease = query_flag(request, "include_leases")
        return json_answer(self._machine_json(machine, self._store.events(machine.id), with_lease))

    async def _start(self, request: web.Request) -> web.Response:
        machine = self._changeable(request)
        previous = machine.row.state
        if machine.is_static:
            return json_answer({"previous_state": previous, "migrated": False, "new_host": ""})
        _raise_if_failed(await asyncio.shield(self._fleet.wake(machine.id, "user")))
        return json_answer({"previous_state": previous, "migrated": False, "new_host": ""})

    async def _stop(self, request: web.Request) -> web.Response:
        body = await read_body(request)
        machine = self._changeable(request)
        signal = _signal_number(body["signal"]) if body.get("signal") else None
        self._fleet.stop(machine, "user", signal, _duration_s(body.get("timeout")))
        return json_answer({"ok": True})

    async def _suspend(self, request: web.Request) -> web.Response:
        self._fleet.suspend(self._changeable(request), "user")
        return json_answer({"ok": True})

    async def _restart(self, request: web.Request) -> web.Response:
        machine = self._changeable(request)
        query = request.query
        signal = _signal_number(query["signal"]) if query.get("signal") else None
        if query.get("force_stop", "").lower() in ("1", "true"):
            signal = int(signals.SIGKILL)
        if (end := self._fleet.stop(machine, "user", signal, _duration_s(query.get("timeout")))) is not None:
            await asyncio.wait({end})
        _raise_if_failed(await asyncio.shield(self._fleet.wake(machine.id, "user")))
        return json_answer({"ok": True})

    async def _signal(self, request: web.Request) -> web.Response:
        number = _signal_number((await read_body(request, required=True)).get("signal"))
        self._fleet.send_signal(self._changeable(request), number)
        return json_answer({"ok": True})

    async def _cordon(self, request: web.Request) -> web.Response:
        """Answered once workers send it nothing new. `acknowledged` is false where one did not say so in time."""
        return json_answer({"ok": True, "acknowledged": await self._fleet.cordon(self._changeable(request))})

    async def _uncordon(self, request: web.Request) -> web.Response:
        self._fleet.uncordon(self._changeable(request))
        return json_answer({"ok": True})

    # --- leases

    async def _get_lease(self, request: web.Request) -> web.Response:
        machine = self._machine(request)
        lease = self._leases.held(machine)
        if lease is None:
            raise ApiError(404, "not_found", f"nobody holds a lease of machine {machine.id}")
        return json_answer(_lease_answer(lease))

    async def _take_lease(self, request: web.Request) -> web.Response:
        body = await read_body(request)
        machine = self._machine(request)
        ttl_s = _ttl_s(request.query.get("ttl", body.get("ttl")))
        description = body.get("description") or ""
        # half of a surrogate pair could not be kept; control characters would write into the terminal of who is refused
        if not isinstance(description, str) or len(description) > LONGEST_DESCRIPTION or not description.isprintable():
            raise ApiError(
                400, "invalid_argument", f"description: expected one line of up to {LONGEST_DESCRIPTION} characters"
            )
        return json_answer(
            _lease_answer(self._leases.take(machine, ttl_s, description, request.headers.get(HEADER))), 201
        )

    async def _release_lease(self, request: web.Request) -> web.Response:
        machine, nonce = self._machine(request), request.headers.get(HEADER)
        if not nonce:
            raise ApiError(400, "invalid_argument", f"the header {HEADER} must name the lease to give back")
        self._leases.release(machine, nonce)
        return json_answer({"status": "success", "data": {"ok": True}})

    # --- metadata

    async def _get_metadata(self, request: web.Request) -> web.Response:
        return json_answer(metadata_of(self._machine(request)))

    async def _set_metadata(self, request: web.Request) -> web.Response:
        """PUT replaces all, POST merges. The map may stand alone, or as `metadata` beside a `machine_version`."""
        body = await read_body(request, required=True)
        version = request.query.get("version")
        if isinstance(body.get("metadata"), dict):
            version, body = version or body.get("machine_version"), body["metadata"]
        return self._keep_metadata(request, version, body, replace=request.method == "PUT")

    async def _get_metadata_key(self, request: web.Request) -> web.Response:
        machine, key = self._machine(request), request.match_info["key"]
        value = metadata_of(machine).get(key)
        if value is None:
            raise ApiError(404, "not_found", f"machine {machine.id} has no metadata {key}")
        return json_answer({"value": value})

    async def _set_metadata_key(self, request: web.Request) -> web.Response:
        value = (await read_body(request, required=True)).get("value")
        if not isinstance(value, str):
            raise ApiError(400, "invalid_argument", "value: expected a text")
        return self._keep_metadata(request, request.query.get("version"), {request.match_info["key"]: value})

    async def _delete_metadata_key(self, request: web.Request) -> web.Response:
        key = request.match_info["key"]
        if key not in metadata_of(self._machine(request)):
            raise ApiError(404, "not_found", f"there is no metadata {key}")
        return self._keep_metadata(request, request.query.get("version"), {key: None})

    def _keep_metadata(
        self, request: web.Request, version: object, changes: Json, replace: bool = False
    ) -> web.Response:
        machine = self._changeable(request)
        row = machine.row
        if version and version != row.instance_id:
            raise ApiError(412, "failed_precondition", f"the machine's version is {row.instance_id}, not {version}")
        try:
            row.metadata = changed_metadata(machine, changes, replace)
        except ValueError as error:
            raise ApiError(400, "invalid_argument", str(error)) from error
        row.updated_at = self._clock.unix()
        self._store.save(row)
        return web.Response(status=204)

    # --- waiting and looking back

    async def _wait(self, request: web.Request) -> web.Response:
        machine = self._machine(request)
        states = [state for text in request.query.getall("state", ["started"]) for state in text.split(",") if state]
        if unknown := [state for state in states if state not in _WAIT_STATES]:
            raise ApiError(400, "invalid_argument", f"state {unknown[0]!r} is none that can be waited for")
        wanted = [one for state in states for one in (_SETTLED if state == "settled" else (state,))]
        version = request.query.get("version") or request.query.get("instance_id")
        if version and version != machine.row.instance_id:
            raise ApiError(400, "invalid_argument", f"the machine's version is {machine.row.instance_id}")
        timeout_s = query_number(request, "timeout", _LONGEST_WAIT_S, 0, _LONGEST_WAIT_S)
        after = request.query.get("from_event_id")
        if after and not _ULID.fullmatch(after):
            raise ApiError(400, "invalid_argument", f"from_event_id {after!r} is the id of no event")

        def happened_after() -> bool:  # an event that is not kept any more lies before all that are
            return not after or [event.id for event in self._store.events(machine.id, 1)] not in ([], [after])

        if not await self._fleet.wait_for(machine, wanted, timeout_s, happened_after):
            since = f" since event {after}" if after else ""
            text = f"the machine is {machine.row.state}, and came not to {' or '.join(states)}{since}"
            raise ApiError(408, "deadline_exceeded", text)
        newest = self._store.events(machine.id, 1)
        return json_answer(
            {
                "ok": True, "state": machine.row.state, "version": machine.row.instance_id,
                "event_id": newest[0].id if newest else "",
            }
        )  # fmt: skip

    async def _events(self, request: web.Request) -> web.Response:
        limit = int(query_number(request, "limit", 20, 1, 50))
        return json_answer([_event_json(event) for event in self._store.events(self._machine(request).id, limit)])

    async def _wakes(self, request: web.Request) -> web.Response:
        machine = self._machine(request)
        if machine.last_wake is None:
            raise ApiError(404, "not_found", f"machine {machine.id} was not woken since control began")
        return json_answer(machine.last_wake.as_ms())

    # --- finding and showing

    def _entry(self, request: web.Request) -> Entry:
        name = request.match_info["app"]
        entry = self._apps.get(name)
        if entry is None:
            raise ApiError(404, "not_found", f"app {name} not found")
        return entry

    def _machine(self, request: web.Request) -> Owned:
        wanted = request.match_info["id"]
        for machine in self._entry(request).machines:
            if machine.id == wanted:
                return machine
        raise ApiError(404, "not_found", f"machine {wanted} not found")

    def _changeable(self, request: web.Request) -> Owned:
        """The machine that a request is to change, if no lease is in the way."""
        machine = self._machine(request)
        self._leases.check(machine, request.headers.get(HEADER))
        return machine

    def _machine_json(self, machine: Owned, events: Iterable[Event] = (), with_lease: bool = False) -> Json:
        row, app = machine.row, machine.app
        services = [
            {
                "protocol": service.protocol, "internal_port": service.internal_port,
                "autostop": service.autostop.value, "autostart": service.autostart,
                "min_machines_running": service.min_machines_running,
                "ports": [{"start_port": port.start, "end_port": port.end} for port in service.ports],
                "concurrency": {
                    "type": service.concurrency_type.value, "soft_limit": service.soft_limit,
                    "hard_limit": service.hard_limit,
                },
            }
            for service in app.services_of(row.group)
        ]  # fmt: skip
        stats = machine.driver.stats(machine.id) if machine.running is not None else None
        lease = self._leases.held(machine) if with_lease else None
        return {
            "id": machine.id, "name": f"{app.name}-{row.group}-{row.index}", "state": row.state,
            "region": machine.region, "instance_id": row.instance_id, "private_ip": "127.0.0.1",
            "created_at": _iso(row.created_at), "updated_at": _iso(row.updated_at),
            "image_ref": {"registry": "local", "repository": app.name, "tag": "", "digest": row.digest},
            "config": {
                "init": {"cmd": list(machine.spec.command)},
                "services": services, "metadata": metadata_of(machine),
                "restart": {"policy": machine.group.restart.value, "max_retries": machine.group.restart_retries},
                "mounts": [{"name": one.name, "path": one.destination} for one in machine.group.mounts],
                "guest": {"memory_mb": machine.group.memory_mb},
                "stop_config": {"signal": app.kill_signal, "timeout": f"{app.kill_timeout_s:g}s"},
            },
            "events": [_event_json(event) for event in events], "host_status": "ok",
            "checks": self.checks_of(machine), "cordoned": row.cordoned,
            # ours
            "group": row.group, "driver": app.driver, "version": row.version, "pid": row.pid,
            "endpoints": [
                {"internal_port": one.internal_port, "host": one.host, "port": one.port}
                for one in machine.spec.endpoints
            ],
            "hold_reason": row.hold_reason,
            "hold_until": row.hold_until or None,
            "failures": row.failures, "restart_count": row.restart_count, "note": machine.note,
            "exit_code": row.exit_code, "exit_signal": row.exit_signal,
            "rss_bytes": stats.rss_bytes if stats else None, "cpu_s": stats.cpu_s if stats else None,
        } | ({} if lease is None else {"lease": _lease_json(lease)})  # fmt: skip


def load_or_make_token(path: str) -> str:
    """The admin token, made on first use. Raises OSError."""
    try:
        with open(path, encoding="ascii") as file:
            if token := file.read().strip():
                return token
    except FileNotFoundError:
        pass
    token = secrets.token_urlsafe(32)
    descriptor = os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(token + "\n")
    os.replace(path + ".new", path)
    return token


def _app_json(entry: Entry) -> Json:
    plan = entry.plan
    states: dict[str, int] = {}
    for machine in entry.machines:
        states[machine.row.state] = states.get(machine.row.state, 0) + 1
    return {
        "id": plan.name, "name": plan.name, "machine_count": len(entry.machines),
        "volume_count": sum(len(machine.group.mounts) for machine in entry.machines), "network": "default",
        "status": "deployed" if entry.machines else "pending",
        "organization": {"name": "local", "slug": "local"},
        "hostnames": list(plan.hostnames), "driver": plan.driver, "states": states,
        "primary_region": plan.primary_region, "wake_on": plan.wake_on.value,
    }  # fmt: skip


def _lease_json(lease: Lease) -> Json:
    """As others see it: without the nonce."""
    return {"owner": lease.owner, "expires_at": lease.expires_at, "description": lease.description}


def _lease_answer(lease: Lease) -> Json:
    return {"status": "success", "data": {"nonce": lease.nonce, **_lease_json(lease), "version": lease.version}}


def _ttl_s(value: object) -> float:
    """Seconds, as a number or as text."""
    if value is None:
        return DEFAULT_TTL_S
    try:
        seconds = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else 0.0
    except (ValueError, OverflowError):
        seconds = 0.0
    if not 1 <= seconds <= LONGEST_TTL_S:
        raise ApiError(400, "invalid_argument", f"ttl {value!r}: expected 1 to {LONGEST_TTL_S:g} seconds")
    return seconds


def _event_json(event: Event) -> Json:
    shown: Json = {
        "id": event.id, "type": event.type, "status": event.status, "source": event.source,
        "timestamp": event.timestamp,
    }  # fmt: skip
    if event.request is not None:
        shown["request"] = event.request
    return shown


def _raise_if_failed(result: WakeResult) -> None:
    if result.code is None:
        return
    status = {Code.WAKE_TIMEOUT: 408, Code.START_CANCELLED: 409, Code.NOT_STARTABLE: 412}.get(result.code, 503)
    text = f"the machine did not start: {result.detail}"
    raise ApiError(status, result.code.name.lower(), text, wakefront_error=result.code.value)


def _asked(body: Json) -> Asked:
    """The request that an explanation is asked for: `{url, method, headers: ["name: value"], source}`."""
    url = body.get("url")
    headers = body.get("headers", [])
    if not isinstance(url, str) or not isinstance(headers, list) or not all(isinstance(one, str) for one in headers):
        raise ApiError(400, "invalid_argument", "expected url, a text, and headers, a list of texts")
    try:
        parts = urlsplit(url if "://" in url else f"https://{url}")
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError as error:
        raise ApiError(400, "invalid_argument", f"{url!r} is no URL: {error}") from error
    if port is None or not parts.hostname:
        raise ApiError(400, "invalid_argument", f"{url!r} is no http or https URL")
    pairs = []
    for one in headers:
        name, colon, value = one.partition(":")
        if not colon:
            raise ApiError(400, "invalid_argument", f"{one!r}: expected a header as 'name: value'")
        pairs.append((name.strip().lower(), value.strip()))
    method = str(body.get("method", "GET")).upper()
    host = parts.hostname.rstrip(".")
    source = str(body.get("source", "127.0.0.1"))
    try:
        ipaddress.ip_address(source)
    except ValueError as error:
        raise ApiError(400, "invalid_argument", f"source: expected an IP address: {source!r}") from error
    return Asked(parts.scheme, host, port, parts.path or "/", method, tuple(pairs), source)


def _signal_number(name: object) -> int:
    if isinstance(name, str) and name.upper() in _SIGNALS:
        return int(getattr(signals, name.upper()))
    raise ApiError(400, "invalid_argument", f"signal {name!r} is none of {', '.join(_SIGNALS)}")


_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m)?")


def _duration_s(value: object) -> float | None:
    """`"10s"`, `"500ms"`, seconds as text, or an integer in nanoseconds, as Fly's API has it."""
    if value is None or value == "":
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return min(max(0, value), int(MAX_KILL_TIMEOUT_S * 1e9)) / 1e9
    if isinstance(value, str) and (match := _DURATION.fullmatch(value)):
        factor = {"ms": 1e-3, "m": 60.0}.get(match[2], 1.0)
        return min(float(match[1]) * factor, MAX_KILL_TIMEOUT_S)
    raise ApiError(400, "invalid_argument", f"timeout {value!r} is no duration such as 10s")


def _text(lines: Iterable[LogLine]) -> bytes:
    return b"".join(line.machine.encode() + b" " + line.text + b"\n" for line in lines)


def _iso(unix_s: float) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _body_limit(request: web.Request) -> int:
    return MAX_IMPORT_BYTES if request.path.endswith(IMPORT_PATH_END) else MAX_BODY_BYTES


class _Refusal(asyncio.Protocol):
    """Closes at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


class _NoBlame(logging.Filter):
    """What a client sends that is no HTTP is answered 400, and no error of ours to be logged with its trace."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


_http_log.addFilter(_NoBlame())


def _allowed_hosts(host: str, port: int) -> frozenset[str]:
    """What the Host header may be: the address as configured and, on loopback, its usual names."""
    names = {f"[{host}]" if ":" in host else host}
    if _is_loopback(host) or host in ("0.0.0.0", "::"):
        names |= {"localhost", "127.0.0.1", "[::1]"}
    return frozenset({f"{name}:{port}" for name in names} | ({*names} if port == 80 else set()))


def _is_loopback(host: str | None) -> bool:
    try:
        return host is not None and ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
