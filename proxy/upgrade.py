"""An upgrade under way: the steps by which a supervisor becomes another program, takes over as it, or goes back.

    TRIAL    the new program is tried in a process of its own; nothing has changed yet
    --exec-- from here the new program runs this
    CONTROL  the former control makes room, ours starts
    WORKERS  ours start beside the former ones, and take over (turnover.py)
    done, or put back: --exec-- to the former program, whose workers have served all the time

What is tried and handed on is in succession.py. What the supervisor holds and does for this is `Holder`: it knows no
step of an upgrade. Standard library only.
"""

from __future__ import annotations

import os
import selectors
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, Protocol

from proxy.children import Place
from proxy.process import ServePlan
from proxy.succession import REQUEST_FILE, Request, SuccessionError, Trial, become, descriptors_of, read_request
from proxy.turnover import Done

LEAVE_S = 5.0  # for a control that is to make room for another
CONTROL_START_S = 30.0  # for that other one to become ready


class Holder(Protocol):
    """The supervisor, as far as an upgrade needs it."""

    @property
    def control(self) -> Place: ...

    @property
    def selector(self) -> selectors.BaseSelector: ...

    @property
    def is_serving(self) -> bool: ...

    def path_of(self, name: str) -> str: ...

    def handed(self) -> dict[str, Any]:
        """All that the next program needs of this one, but for the upgrade's own part."""

    def replace_workers(self, plan: ServePlan, done: Done) -> list[str]: ...

    def end_control(self) -> None:
        """Kill it and wait for that. Raises OSError if it does not end."""

    def tell_upgrade(self, request: Request, stage: str, detail: str = "") -> None: ...


class Upgrade:
    """At most one at a time."""

    def __init__(self, holder: Holder, signals: Iterable[int]) -> None:
        self._holder = holder
        self._signals = tuple(signals)
        self.request: Request | None = None  # under way
        self.trial: Trial | None = None
        self._former: dict[str, Any] | None = None  # the program to go back to: python, environ
        self._leave_by: float | None = None  # the former control has until then to make room
        self._control_by: float | None = None  # and ours until then to become ready

    @property
    def plan(self) -> ServePlan | None:
        """What the new program's control starts with. While that is only tried, control is the former program's."""
        if self.request is None or self.trial is not None:
            return None
        return ServePlan.from_json(self.request.plan)

    @property
    def control_leaves(self) -> bool:
        return self._leave_by is not None

    @property
    def due_at(self) -> float | None:
        """When to advance, if nothing happens before."""
        trial = self.trial.deadline if self.trial is not None and not self.trial.is_killed else None
        return min((one for one in (trial, self._leave_by, self._control_by) if one is not None), default=None)

    # --- the trial, in the former program

    def begin(self) -> str:
        """What run_dir/upgrade.json asks for is tried. Why there is nothing to try, if there is nothing."""
        try:
            request = read_request(self._holder.path_of(REQUEST_FILE))
        except SuccessionError as error:
            return str(error)
        try:
            if not self._holder.is_serving:
                raise SuccessionError("the node is ending, or its workers are being replaced: try again after that")
            if self.request is not None:
                raise SuccessionError("another upgrade is under way: try again when that is done")
            trial = Trial(request)
        except SuccessionError as error:
            self._holder.tell_upgrade(request, "failed", str(error))
            return ""
        self.trial, self.request = trial, request
        selector = self._holder.selector
        selector.register(trial.pidfd, selectors.EVENT_READ, lambda mask: self._judge(request, trial))
        selector.register(trial.output, selectors.EVENT_READ, lambda mask: self._hear(trial))
        self._holder.tell_upgrade(request, "trial")
        return ""

    def _hear(self, trial: Trial) -> None:
        if trial.read():
            self._holder.selector.unregister(trial.output)

    def _judge(self, request: Request, trial: Trial) -> None:
        selector = self._holder.selector
        selector.unregister(trial.pidfd)
        if trial.output in selector.get_map():
            selector.unregister(trial.output)
        self.trial = None
        try:
            trial.judge()
            if not self._holder.is_serving:
                raise SuccessionError("the node is ending")
            self._holder.tell_upgrade(request, "exec")
            former = {"python": sys.executable, "environ": dict(os.environ)}
            self._become(request.python, dict(os.environ), request, "", former)
        except (SuccessionError, OSError) as error:
            self.request = None
            # A trial is killed where the node ends: that it said nothing is no fault of the new program's.
            why = str(error) if self._holder.is_serving else "the node ends"
            self._holder.tell_upgrade(request, "failed", why)

    def _become(
        self, python: str, environ: dict[str, str], request: Request, failed: str, former: dict[str, Any] | None
    ) -> None:
        handed = self._holder.handed() | {"upgrade": asdict(request), "failed": failed, "former": former}
        become(python, environ, handed, descriptors_of(handed), self._signals)

    # --- taking over, in the new program; or being put back

    def resume(self, handed: dict[str, Any], now: float) -> None:
        """After the exec, before the first turn: the former control makes room, or we are the program put back."""
        if handed["upgrade"] is None:
            return
        request = Request(**handed["upgrade"])
        control = self._holder.control
        if handed["failed"]:
            self._holder.tell_upgrade(request, "rolled back", handed["failed"])
            if control.child is None:
                control.start_at = now
            return
        self.request, self._former = request, handed["former"]
        self._holder.tell_upgrade(request, "control")
        if control.child is None:
            self._start_control(now)
        else:
            control.child.send({"op": "leave"})
            self._leave_by = now + LEAVE_S

    def _start_control(self, now: float) -> None:
        self._leave_by = None
        self._holder.control.start_at = now
        self._holder.control.failures = 0
        self._control_by = now + CONTROL_START_S

    def control_ended(self, now: float, how: str) -> bool:
        """Whether the upgrade goes on from here: the former control has made room, or the new one has failed."""
        if self._leave_by is not None:
            if self.request is None:  # the node ends: one that was told to leave stops no machines, the next one does
                self._leave_by = None
                return False
            self._start_control(now)
            return True
        if self._control_by is not None:
            self._put_back(f"its control {how}")
            return True
        return False

    def advance(self, now: float) -> None:
        """Do what is due by now."""
        if self.trial is not None and now >= self.trial.deadline:
            self.trial.kill()
        child = self._holder.control.child
        if self._leave_by is not None and now >= self._leave_by:
            self._leave_by = now + LEAVE_S
            if child is not None:
                child.kill()  # it loses nothing by that: machines outlive it
        if self._control_by is None or self.request is None:
            return
        if child is not None and child.ready:
            self._control_by = None
            self._holder.tell_upgrade(self.request, "workers")
            if faults := self._holder.replace_workers(ServePlan.from_json(self.request.plan), self._turned):
                self._put_back("; ".join(faults))
        elif now >= self._control_by:
            self._put_back(f"its control did not become ready within {CONTROL_START_S:g} s")

    def _turned(self, faults: list[str]) -> None:
        request = self.request
        if request is None:  # the node ends
            return
        if faults:
            self._put_back("; ".join(faults))
            return
        self.request = self._former = None
        self._holder.tell_upgrade(request, "done")

    def abandon(self) -> None:
        """The node ends. Whatever control there is stops the machines."""
        request = self.request
        if request is None:
            return
        if self.trial is not None:  # the node does not wait for its end
            self.trial.kill()
        else:
            self.request = self._former = self._control_by = None
        self._holder.tell_upgrade(request, "failed", "the node ends")

    def _put_back(self, why: str) -> None:
        """Become the former program again. Where that can't be done, this one goes on, with the former workers."""
        request, former = self.request, self._former
        assert request is not None
        self.request = self._former = self._control_by = self._leave_by = None
        try:
            self._holder.end_control()
        except OSError as error:
            self._holder.tell_upgrade(request, "failed", f"{why}; and the former program can't come back: {error}")
            return
        self._holder.control.start_at = time.monotonic()
        if former is None:
            self._holder.tell_upgrade(request, "failed", why)
            return
        try:
            self._become(former["python"], former["environ"], request, why, None)
        except OSError as error:
            self._holder.tell_upgrade(request, "failed", f"{why}; and the former program can't be run: {error}")
