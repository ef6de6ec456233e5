"""Whether a request may have a machine started for it, by the app's wake rules; what it is told if not.

A request that the rules ignore, or that is over its budget, is refused; a browser may be shown a page instead of being
held. What the rules say is decide/access.py's and waiting_page.py's; ClientHellos have budgets of their own (waker.py).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from proxy.edge.waiting_page import STATUS, page_language, waiting_fields, waiting_page
from proxy.errors import Code, ProxyError, Source
from proxy.model import MachineId, MachineState

if TYPE_CHECKING:
    from proxy.edge.exchange import Exchange

_PAGE_S = 2  # between two looks of a browser at the waiting page


def may_wake(exchange: Exchange, machine: MachineId) -> bool:
    """True where the request may wait for the start of `machine`. Else it has been answered."""
    app, head, edge = exchange.app, exchange.head, exchange.edge
    assert app is not None
    source = exchange.stream.client_ip
    if not app.wake_filter.is_empty:
        agent = next((value for name, value in head.fields if name.lower() == b"user-agent"), b"")
        reason = app.wake_filter.ignores(head.method, head.target, agent, source)
        if reason is not None:
            exchange.fail(ProxyError(Code.WAKE_IGNORED, Source.DOWNSTREAM, detail=reason))
            return False
    view = app.machines.get(machine)
    is_asleep = view is not None and view.record.state.is_startable and not edge.waker.awaits(machine)
    if is_asleep and app.start_budget is not None:
        seconds = app.start_budget.take(source, edge.wheel.now)
        if seconds is not None:
            detail = f"{source} has caused enough starts for now"
            after = max(1, math.ceil(seconds))
            exchange.fail(ProxyError(Code.WAKE_BUDGET, Source.DOWNSTREAM, detail=detail, retry_after_s=after))
            return False
    if app.record.wake_rules.waiting_page:
        language = page_language(head)
        if language is not None:
            if view is not None and view.record.state is not MachineState.STARTING:
                edge.waker.start(app, machine)
            page = waiting_page(app.record.name, _PAGE_S, language)
            exchange.answer(Code.WAKE_PAGE, STATUS, waiting_fields(_PAGE_S, language), page)
            return False
    return True
