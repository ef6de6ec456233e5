"""An admin API with the contract of the real one and a script instead of machines; it runs in a thread of its own."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

TOKEN = "a-token-for-tests"
PEM = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
_VERBS = {"start": "started", "stop": "stopped", "suspend": "suspended", "restart": "started"}


def machine(identity: str, state: str = "stopped", **more: Any) -> dict[str, Any]:
    facts = {"region": "ams", "group": "app", "updated_at": "2026-01-01T00:00:00Z", "note": "", "in_flight": 0}
    return {"id": identity, "name": identity, "state": state, **facts, **more}


class ScriptedAdmin:
    """Answers as told. `asked` holds every request as (method, path with query)."""

    def __init__(self) -> None:
        self.port = 0
        self.asked: list[tuple[str, str]] = []
        self.apps: dict[str, list[dict[str, Any]]] = {}
        self.hostnames: dict[str, list[str]] = {}
        self.events: dict[str, list[dict[str, Any]]] = {}
        self.wakes: dict[str, dict[str, Any]] = {}
        self.log_lines: dict[str, list[str]] = {}
        self.warnings: list[str] = []
        self.reload_answer: tuple[int, Any] = (200, {"added": [], "changed": [], "removed": [], "warnings": []})
        self.explained: list[dict[str, Any]] = []  # what was asked
        self.explain_answer: tuple[int, Any] = (200, {"action": "send", "code": None, "machines": ["a"], "steps": []})
        self.refuses: dict[str, tuple[int, Any]] = {}  # verb -> answer
        self.ca_asked, self.ca_made_after = 0, 0  # how many questions come before the CA is made
        self.stuck = False  # no machine ever comes to the state waited for
        self.follow_released: asyncio.Event

    def application(self) -> web.Application:
        app = web.Application(middlewares=[self._guard])
        prefix = "/v1/apps/{app}/machines"
        app.router.add_get("/v1/status", self._status)
        app.router.add_get("/v1/apps", self._apps)
        app.router.add_get("/v1/apps/{app}", self._app)
        app.router.add_get(prefix, self._machines)
        app.router.add_get(prefix + "/{id}", self._machine)
        app.router.add_post(prefix + "/{id}/{verb}", self._act)
        app.router.add_get(prefix + "/{id}/wait", self._wait)
        app.router.add_get(prefix + "/{id}/events", self._events)
        app.router.add_get(prefix + "/{id}/wakes", self._wakes)
        app.router.add_post("/v1/reload", self._reload)
        app.router.add_post("/v1/explain", self._explain)
        app.router.add_get("/v1/apps/{app}/logs", self._logs)
        app.router.add_get("/v1/certs/ca", self._ca)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.asked.append((request.method, request.path_qs))
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return web.json_response({"error": "unauthorized"}, status=401)
        response: web.StreamResponse = await handler(request)
        return response

    async def _status(self, _: web.Request) -> web.Response:
        apps = [{**self._facts(name), "machines": machines} for name, machines in self.apps.items()]
        workers = [
            {"id": 0, "slot": 0, "pid": 12, "linked": True, "connections": 3, "retiring": False},
            {"id": 1, "slot": 1, "pid": None, "linked": False, "connections": 0, "retiring": False},
            {"id": 2, "slot": 2, "pid": 13, "linked": True, "connections": 1, "retiring": True},
        ]
        facts = {"name": "node-1", "region": "ams", "version": "0.1.0", "ready": True, "uptime_s": 7500.0}
        control = {"pid": 11, "incarnation": 1}
        more = {"control": control, "workers": workers, "apps": apps, "warnings": self.warnings}
        return web.json_response({**facts, **more})

    def _facts(self, name: str) -> dict[str, Any]:
        hostnames = self.hostnames.get(name, [f"{name}.apps.localhost"])
        states: dict[str, int] = {}
        for one in self.apps[name]:
            states[one["state"]] = states.get(one["state"], 0) + 1
        return {"id": name, "name": name, "states": states, "driver": "process", "hostnames": hostnames}

    async def _apps(self, _: web.Request) -> web.Response:
        return web.json_response({"total_apps": len(self.apps), "apps": [self._facts(name) for name in self.apps]})

    def _find_app(self, request: web.Request) -> str:
        name = request.match_info["app"]
        if name not in self.apps:
            raise web.HTTPNotFound(text='{"error": "app not found"}', content_type="application/json")
        return name

    def _find(self, request: web.Request) -> dict[str, Any]:
        for one in self.apps[self._find_app(request)]:
            if one["id"] == request.match_info["id"]:
                return one
        raise web.HTTPNotFound(text='{"error": "machine not found"}', content_type="application/json")

    async def _app(self, request: web.Request) -> web.Response:
        return web.json_response(self._facts(self._find_app(request)))

    async def _machines(self, request: web.Request) -> web.Response:
        return web.json_response(self.apps[self._find_app(request)])

    async def _machine(self, request: web.Request) -> web.Response:
        return web.json_response(self._find(request))

    async def _act(self, request: web.Request) -> web.Response:
        one, verb = self._find(request), request.match_info["verb"]
        if verb in self.refuses:
            status, body = self.refuses[verb]
            return web.json_response(body, status=status)
        if not self.stuck:
            one["state"] = _VERBS[verb]
        return web.json_response({"ok": True})

    async def _wait(self, request: web.Request) -> web.Response:
        one = self._find(request)
        if one["state"] not in request.query["state"].split(","):
            return web.json_response({"error": "deadline exceeded"}, status=408)
        return web.json_response({"ok": True, "state": one["state"]})

    async def _events(self, request: web.Request) -> web.Response:
        return web.json_response(self.events.get(self._find(request)["id"], []))

    async def _wakes(self, request: web.Request) -> web.Response:
        found = self.wakes.get(self._find(request)["id"])
        if found is None:
            return web.json_response({"error": "never woken"}, status=404)
        return web.json_response(found)

    async def _reload(self, _: web.Request) -> web.Response:
        status, body = self.reload_answer
        return web.json_response(body, status=status)

    async def _explain(self, request: web.Request) -> web.Response:
        self.explained.append(await request.json())
        status, body = self.explain_answer
        return web.json_response(body, status=status)

    async def _logs(self, request: web.Request) -> web.StreamResponse:
        name = self._find_app(request)
        response = web.StreamResponse()
        await response.prepare(request)
        count = int(request.query["lines"])
        for line in self.log_lines.get(name, [])[-count:] if count else []:
            await response.write(line.encode() + b"\n")
        if request.query["follow"] == "1":
            await self.follow_released.wait()
            await response.write(b"a line that came later\n")
        return response

    async def _ca(self, _: web.Request) -> web.Response:
        self.ca_asked += 1
        if self.ca_asked <= self.ca_made_after:
            return web.json_response({"error": "this node has no internal CA yet"}, status=404)
        return web.Response(text=PEM, content_type="application/x-pem-file")


@contextmanager
def serving(admin: ScriptedAdmin) -> Iterator[asyncio.AbstractEventLoop]:
    """Serve on a free port of loopback until the block ends; yields the loop of the server's thread."""
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def run() -> None:
        admin.follow_released = asyncio.Event()
        runner = web.AppRunner(admin.application(), shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        admin.port = runner.addresses[0][1]
        ready.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()), name="scripted admin")
    thread.start()
    try:
        assert ready.wait(10)
        yield loop
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


def write_listen(folder: Path, *listen: tuple[int, str, int]) -> None:
    """The supervisor's record of its public ports: (public port, host, port)."""
    bound = [{"public_port": public, "host": host, "port": port} for public, host, port in listen]
    (folder / "data" / "run" / "children.json").write_text(json.dumps({"listen": bound}))


def write_config(folder: Path, port: int, token: str | None = TOKEN) -> Path:
    """A config.toml that names this admin API, and its token file."""
    (folder / "data" / "run").mkdir(parents=True, exist_ok=True)
    if token is not None:
        (folder / "data" / "admin.token").write_text(token + "\n")
    config = folder / "config.toml"
    config.write_text(f'[node]\ndata_dir = "data"\n[listen]\nadmin = "127.0.0.1:{port}"\n')
    return config
