"""Which machine a request goes to now, or what it waits for: a place in line, a check that passes, a machine's start.

Functions over an Exchange, which keeps what has been tried and what is waited for. The decisions are decide/'s
(balance.py, wake.py); what they are asked with, and what is done about their answers, is here. An Exchange with one
running machine and nothing to heed does not come here at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from proxy.clock import monotonic_ns, unix
from proxy.decide.balance import Asked, Preference, choose_machine, pick_named, wants_another
from proxy.decide.wake import Held, choose_to_wake
from proxy.edge.table import MachineView, ServiceView
from proxy.edge.wake_rules import may_wake
from proxy.errors import Code, ProxyError, Source
from proxy.model import MachineId, MachineState

if TYPE_CHECKING:
    from proxy.edge.exchange import Exchange

_RACES: Final = 3  # lost against other workers for a place, before it stands in line
_WAKES: Final = 3  # of one request


def pick(exchange: Exchange) -> None:
    """Send the request to one of the machines that run, or have it wait."""
    port, app, edge, want = exchange.port, exchange.app, exchange.edge, exchange.want
    assert port is not None and app is not None
    service = port.service
    if want is not None and _went_by_name(exchange, service, want):
        return
    running: Sequence[MachineView] = service.running
    if exchange.tried or (want is not None and want.exclude):
        gone = (exchange.tried or set()) | (want.exclude if want is not None else frozenset())
        running = [one for one in running if one.record.id not in gone]
    elif edge.wheel.now < app.avoided_until:
        running = app.without_failing(running, edge.wheel.now)
    record = service.record
    if not running:
        _wake_some(exchange, service)
        return
    if may_go(exchange, service):
        for _ in range(_RACES):
            machine = choose_machine(
                running, edge.in_flight, record.soft_limit, record.hard_limit, edge.rng, app.record.balance,
                edge.scores, edge.wheel.now,
            )  # fmt: skip
            if machine is None:
                break
            if exchange.attempt(machine):
                if len(service.machines) > len(service.running):
                    _start_another(exchange, service, machine)
                return
    _start_another(exchange, service, None)
    _wait_for_room(exchange, tuple(one.slot for one in running))


def may_go(exchange: Exchange, service: ServiceView) -> bool:
    """Whether it would pass by nobody who waits for a place at a hard limit."""
    if service.record.hard_limit is None or exchange.queued_since:
        return True
    assert exchange.app is not None
    return not exchange.edge.queue.is_contended(exchange.app.record.slot)


def _went_by_name(exchange: Exchange, service: ServiceView, want: Preference) -> bool:
    """The machine that is asked for gets it, or is waited for, or the request ends. False: choose by load."""
    name = want.force or want.prefer
    app = exchange.app
    if name is None:
        return False
    assert app is not None
    view = app.machines.get(name)
    if view is not None and (view not in service.machines or name in want.exclude or name in (exchange.tried or ())):
        view = None
    can_be_reached = view is not None and view.takes_requests and view.record.endpoint(service.internal_port)
    named = pick_named(
        want, {name: view} if view is not None and can_be_reached else {}, service.running.__contains__,
        exchange.edge.in_flight, service.record.hard_limit,
    )  # fmt: skip
    if named.outcome is Asked.CHOSEN and named.machine is not None and exchange.attempt(named.machine):
        return True
    if want.force is not None and named.machine is not None:
        _wait_for_room(exchange, (named.machine.slot,))
        return True
    can_be_woken = (
        view is not None
        and not view.takes_requests
        and not view.record.cordoned
        and (exchange.may_wake or want.force is None)
    )
    if can_be_woken and service.record.autostart and (want.force is not None or not service.running):
        if may_wake(exchange, name):
            wake(exchange, name)
        return True
    if want.force is not None:
        exchange.fail(ProxyError(Code.FORCED_UNREACHED, Source.MACHINE, detail=f"machine {name} takes no requests"))
        return True
    if exchange.cookie != name:
        exchange.extra += b"fly-preferred-instance-unavailable: %b\r\n" % name.encode("ascii")
    exchange.want = Preference(None, None, want.exclude)
    return False


def _wait_for_room(exchange: Exchange, slots: tuple[int, ...]) -> None:
    """All are at their hard limit: stand in line, behind who came before, in whichever worker."""
    app, port = exchange.app, exchange.port
    assert app is not None and port is not None
    limit, limits = port.service.record.hard_limit, app.record.limits
    assert limit is not None
    if not exchange.may_wait:
        exchange.fail(
            ProxyError(Code.AT_HARD_LIMIT, Source.MACHINE, detail="all machines here are at their hard limit")
        )
        return
    try:
        ticket = exchange.edge.queue.wait(
            app.record.slot, slots, limit, limits.queue_timeout_s, limits.max_queued, exchange.on_waited,
            exchange.queued_since,
        )  # fmt: skip
    except ProxyError as error:
        exchange.fail(error)
        return
    exchange.wait = ticket
    if not exchange.queued_since:
        exchange.queued_since = ticket.since_ns
        exchange.stream.probe()


def _start_another(exchange: Exchange, service: ServiceView, chosen: MachineView | None) -> None:
    """Have one more machine started where all that run are at their soft limit; nobody waits for it."""
    edge, record, app = exchange.edge, service.record, exchange.app
    if not record.autostart or app is None or not edge.waker.may_start_another(app):
        return
    if chosen is not None and edge.in_flight(chosen.slot) < record.soft_limit:
        return
    if wants_another((edge.in_flight(one.slot) for one in service.running), record.soft_limit):
        edge.waker.start_another(app, service)


def _wake_some(exchange: Exchange, service: ServiceView) -> None:
    """None that runs may get it: wait for one that is unwell, or for one that sleeps."""
    app, want = exchange.app, exchange.want
    assert app is not None
    if service.is_failing:
        if exchange.may_wait:
            _wait_for_health(exchange, service)
        else:
            exchange.fail(ProxyError(Code.NO_HEALTHY, Source.MACHINE, detail="no machine's checks pass here"))
        return
    if not exchange.may_wake:
        exchange.fail(ProxyError(Code.RECENTLY_STOPPED, Source.MACHINE, detail="no machine of the app runs here now"))
        return
    if not service.record.autostart:
        exchange.fail(ProxyError(Code.NO_CANDIDATE, detail="no machine runs and autostart is off"))
        return
    now = unix()
    gone = want.exclude if want is not None else frozenset()
    machines = (one.record for one in app.machines.values() if one.record.id not in gone)
    choice = choose_to_wake(machines, service.record.processes, now)
    if isinstance(choice, Held):
        after = max(1, round(choice.until - now))
        exchange.fail(ProxyError(Code.WAKE_HELD, Source.MACHINE, detail=choice.reason, retry_after_s=after))
    elif choice is None:
        exchange.fail(ProxyError(Code.NO_CANDIDATE, detail="the app has no machine for this port"))
    elif may_wake(exchange, choice):
        wake(exchange, choice)


def _wait_for_health(exchange: Exchange, service: ServiceView) -> None:
    """Machines run, and the checks of none pass: wait for one that does (spec routing §5.4)."""
    app, waker = exchange.app, exchange.edge.waker
    assert app is not None
    if service.record.autostart:
        waker.start_another(app, service)
    try:
        exchange.wait = waker.wait_for_health(service, app, app.record.limits.queue_timeout_s, exchange.on_waited)
    except ProxyError as error:
        exchange.fail(error)


def wake(exchange: Exchange, machine: MachineId) -> None:
    """Have a machine started, or looked after, and choose again once it runs."""
    app = exchange.app
    assert app is not None
    exchange.wakes += 1
    if exchange.wakes > _WAKES:
        exchange.fail(ProxyError(Code.NO_CANDIDATE_AFTER_RETRIES, detail="woken three times, reached never"))
        return
    exchange.tried = None
    exchange.wake_machine = machine
    exchange.wake_ns -= monotonic_ns()
    try:
        exchange.ticket = exchange.edge.waker.wait(app, machine, exchange.on_waited)
    except ProxyError as error:
        exchange.end_wake()
        exchange.fail(error)
        return
    view = app.machines.get(machine)
    if view is not None and view.record.state is MachineState.SUSPENDED and exchange.wakes == 1:
        _send_ahead(exchange, view)


def _send_ahead(exchange: Exchange, machine: MachineView) -> None:
    """Have the request lie in a frozen machine's socket before it is resumed: it is answered that much earlier.

    Only what may be sent twice: nobody knows yet how the machine has the connection, or whether it will be resumed.
    """
    port = exchange.port
    assert port is not None
    service = port.service
    is_plain = exchange.may_be_sent_twice and exchange.head.upgrade is None and exchange.handover is None
    if not is_plain or not may_go(exchange, service):
        return
    pool = machine.pools.get(service.internal_port)
    connection = pool.take_warm() if pool is not None else None
    if connection is not None:
        exchange.send_ahead(machine, connection)
