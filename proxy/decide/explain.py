"""Which machine a request would get, and why: the steps of its path told in words, without sending anything.

It uses the records and rules that workers use, and loads as they are now. What only a worker knows is left out: its
replay cache, its waits, machines it avoids after failures, response times; where a draw decides, all that may be drawn
are named. Source: the order of steps in edge/exchange.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from proxy.decide.access import Networks, WakeFilter
from proxy.decide.navigation import wants_page
from proxy.decide.restart import hold_left_s
from proxy.decide.wake import Held, choose_to_wake
from proxy.model import AccessRules, App, Balance, Machine, MachineId, MachineState, Port, Service
from proxy.wire.http1 import is_served


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as far as routing looks at it. `host` is lower case without port; `path` without query."""

    scheme: str  # http | https
    host: str
    port: int  # public port
    path: str = "/"
    method: str = "GET"
    headers: tuple[tuple[str, str], ...] = ()  # lower-case names
    source: str = "127.0.0.1"

    def header(self, name: str) -> str | None:
        return next((value for one, value in self.headers if one == name), None)


@dataclass(slots=True)
class Explanation:
    """What would happen. `action`: send, wake, page, queue, wait, redirect or refuse."""

    action: str = "refuse"
    code: str | None = None  # of the error the client would see
    app: str | None = None
    machines: list[str] = field(default_factory=list)  # those that may get it
    steps: list[tuple[str, str]] = field(default_factory=list)  # (step, what it came to)

    def say(self, step: str, text: str) -> None:
        self.steps.append((step, text))

    def end(self, action: str, code: str | None = None) -> Explanation:
        self.action, self.code = action, code
        return self


def explain(apps: Iterable[App], asked: Asked, in_flight: Callable[[int], int], now: float) -> Explanation:
    """Go through the phases of a request. `now` is unix seconds."""
    found = Explanation()
    if not is_served(asked.method.encode("latin-1", "replace")):
        found.say("method", f"{asked.method} is not served")
        return found.end("refuse", "WD04")
    wildcard = "*." + asked.host.partition(".")[2]
    app = next((one for name in (asked.host, wildcard) for one in apps if name in one.hostnames), None)
    if app is None:
        found.say("route", f"no app here answers to {asked.host}")
        return found.end("refuse", "WD09")
    found.app = app.name
    place = _port_of(app, asked)
    if place is None:
        found.say("route", f"{app.name} serves no HTTP on port {asked.port}")
        return found.end("refuse", "WD09")
    service, port = place
    found.say("route", f"{asked.host} is {app.name}; port {asked.port} leads to internal port {service.internal_port}")
    if ("tls" in port.handlers) is not (asked.scheme == "https"):
        found.say("tls", f"port {asked.port} {'speaks' if 'tls' in port.handlers else 'does not speak'} TLS")
        return found.end("refuse", "WD01")
    if not app.access.is_open and (why := _excluded(app.access, asked.source)) is not None:
        found.say("access", why)
        return found.end("refuse", "WA01")
    if port.force_https and asked.scheme == "http":
        found.say("redirect", "force_https: 301 to https")
        return found.end("redirect")
    return _choose(found, app, service, asked, in_flight, now)


def _port_of(app: App, asked: Asked) -> tuple[Service, Port] | None:
    for service in app.services:
        for port in service.ports:
            if port.start <= asked.port <= port.end and "http" in port.handlers:
                return service, port
    return None


def _excluded(rules: AccessRules, source: str) -> str | None:
    """Why the lists keep a source out; rates are not counted here."""
    if Networks(rules.deny).contains(source):
        return f"{source} is on the app's deny list"
    if rules.allow and not Networks(rules.allow).contains(source):
        return f"{source} is not on the app's allow list"
    return None


def _choose(
    found: Explanation, app: App, service: Service, asked: Asked, in_flight: Callable[[int], int], now: float
) -> Explanation:
    machines = [one for one in app.machines if one.group in service.processes]
    forced = asked.header("fly-force-instance-id")
    if forced is not None:
        return _forced(found, app, forced, machines, service, asked, in_flight, now)
    ready = []
    for one in machines:
        why = _why_not(one, service)
        load = in_flight(one.slot)
        if why is None and service.hard_limit is not None and load >= service.hard_limit:
            why = f"at its hard limit ({load} of {service.hard_limit})"
        if why is None:
            ready.append(one)
            band = "below" if load < service.soft_limit else "at or above"
            found.say("candidate", f"{one.id} runs, load {load}, {band} its soft limit of {service.soft_limit}")
        else:
            found.say("passed over", f"{one.id} {why}")
    preferred = asked.header("fly-prefer-instance-id")
    if preferred is not None:
        if any(one.id == preferred for one in ready):
            found.say("prefer", f"the client prefers {preferred}, which can take it")
            found.machines = [preferred]
            return found.end("send")
        found.say("prefer", f"the client prefers {preferred}, which can't take it: the rest is looked at")
    if ready:
        return _among(found, app, service, ready, in_flight)
    return _without(found, app, service, machines, asked, now)


def _why_not(machine: Machine, service: Service) -> str | None:
    if machine.cordoned:
        return "is cordoned"
    if machine.state is not MachineState.STARTED:
        return f"is {machine.state.value}"
    if machine.endpoint(service.internal_port) is None:
        return f"has no port {service.internal_port}"
    if service.internal_port in machine.failing_ports:
        return "runs, but its checks do not pass"
    return None


def _forced(
    found: Explanation, app: App, wanted: str, machines: Sequence[Machine], service: Service, asked: Asked,
    in_flight: Callable[[int], int], now: float,
) -> Explanation:  # fmt: skip
    machine = next((one for one in machines if one.id == wanted), None)
    if machine is None or machine.cordoned:
        found.say("force", f"the client forces {wanted}, which {'is cordoned' if machine else 'is not here'}")
        return found.end("refuse", "WR02")
    found.machines = [wanted]
    if machine.state is MachineState.STARTED:
        found.say("force", f"the client forces {wanted}: its checks and others' loads do not matter")
        full = service.hard_limit is not None and in_flight(machine.slot) >= service.hard_limit
        return found.end("queue" if full else "send")
    if not service.autostart:
        found.say("force", f"the client forces {wanted}, which is {machine.state.value}, and autostart is off")
        return found.end("refuse", "WR02")
    found.say("force", f"the client forces {wanted}, which is {machine.state.value} and would be started")
    return _ignored(found, app, asked) or _held(found, machine, now) or _started(found, app, asked)


def _held(found: Explanation, machine: Machine, now: float) -> Explanation | None:
    left_s = hold_left_s(machine.hold_until, now)
    if machine.hold_reason is None or not left_s:
        return None
    found.say("held", f"{machine.id} is not started for another {left_s:.0f} s: {machine.hold_reason}")
    return found.end("refuse", "WM01")


_RULES = {
    Balance.FLY: "one below its soft limit, by draw; above it only where all are",
    Balance.LEAST_LOADED: "the less loaded of two drawn",
    Balance.PEAK_EWMA: "of two drawn, the lower product of load and recent response time",
    Balance.APP_LOAD: "of two drawn, the one that reported the lower load",
}


def _among(
    found: Explanation, app: App, service: Service, ready: Sequence[Machine], in_flight: Callable[[int], int]
) -> Explanation:
    below = [one for one in ready if in_flight(one.slot) < service.soft_limit]
    chosen = below or ready if app.balance is Balance.FLY else ready
    found.machines = [one.id for one in chosen]
    if len(chosen) > 1:
        found.say("balance", f"{app.balance.value}: {_RULES[app.balance]}")
    if not below and service.autostart and any(one.state.is_startable for one in app.machines):
        found.say("start", "all that run are at their soft limit: one more is started beside them")
    return found.end("send")


def _without(
    found: Explanation, app: App, service: Service, machines: Sequence[Machine], asked: Asked, now: float
) -> Explanation:
    """No machine can take it now."""
    running = [one for one in machines if _why_not(one, service) is None]
    if running:
        found.machines = [one.id for one in running]
        seconds = app.limits.queue_timeout_s
        found.say("queue", f"all are at their hard limit: it waits in line for up to {seconds:g} s, then 503")
        return found.end("queue", None)
    if any(one.state is MachineState.STARTED and not one.cordoned for one in machines):
        found.say(
            "health", f"it waits up to {app.limits.queue_timeout_s:g} s for a machine whose checks pass, then 503"
        )
        return found.end("wait", None)
    if not service.autostart:
        found.say("wake", "auto_start_machines is off: nothing is started for it")
        return found.end("refuse", "PR04")
    if (ignored := _ignored(found, app, asked)) is not None:
        return ignored
    choice = choose_to_wake(machines, service.processes, now)
    if isinstance(choice, Held):
        found.say("wake", f"held for another {choice.until - now:.0f} s: {choice.reason}")
        return found.end("refuse", "WM01")
    if choice is None:
        found.say("wake", "the app has no machine that could be started")
        return found.end("refuse", "PR04")
    found.machines = [MachineId(choice)]
    state = next(one.state.value for one in machines if one.id == choice)
    found.say("wake", f"{choice} is {state}: it is started, within {app.wake_timeout_s:g} s or the request fails")
    return _started(found, app, asked)


def _ignored(found: Explanation, app: App, asked: Asked) -> Explanation | None:
    """The end of one that the app's wake rules leave out."""
    agent = (asked.header("user-agent") or "").encode("latin-1", "replace")
    path = asked.path.encode("latin-1", "replace")
    ignored = WakeFilter(app.wake_rules).ignores(asked.method.encode("latin-1", "replace"), path, agent, asked.source)
    if ignored is None:
        return None
    found.say("wake", f"nothing is started for it: {ignored}")
    return found.end("refuse", "WM04")


def _started(found: Explanation, app: App, asked: Asked) -> Explanation:
    """A machine is started for it: it waits for that, or is shown the waiting page."""
    fields = ("accept", "sec-fetch-mode", "sec-fetch-dest", "x-requested-with")
    accept, *others = ((asked.header(name) or "").encode("latin-1", "replace") for name in fields)
    if app.wake_rules.waiting_page and wants_page(asked.method.encode("latin-1", "replace"), accept, *others):
        found.say("page", "a browser does not wait: it is shown the waiting page (503), which asks again")
        return found.end("page", "WM06")
    return found.end("wake")
