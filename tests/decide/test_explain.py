from __future__ import annotations

import dataclasses
from typing import Any

from proxy.decide.explain import Asked, Explanation, explain
from proxy.model import (
    AccessRules,
    App,
    AppName,
    Balance,
    Endpoint,
    Machine,
    MachineId,
    MachineState,
    Port,
    RegionCode,
    Service,
    WakeRules,
)

STARTED, STOPPED = MachineState.STARTED, MachineState.STOPPED


def machine(name: str, slot: int, state: MachineState = STARTED, **more: Any) -> Machine:
    return Machine(
        MachineId(name), RegionCode("ams"), "app", state, 1, slot, (Endpoint(8080, "127.0.0.1", 9000 + slot),), **more
    )


def app(*machines: Machine, balance: Balance = Balance.FLY, **service: Any) -> App:
    ports = (Port(80, 80, ("http",), force_https=False), Port(443, 443, ("http", "tls")))
    one = Service("tcp", 8080, ports, **service)
    return App(AppName("web"), ("web.test", "www.example.org"), (one,), machines, balance=balance)


def ask(*apps: App, loads: dict[int, int] | None = None, now: float = 100.0, **asked: Any) -> Explanation:
    request = Asked(**{"scheme": "http", "host": "web.test", "port": 80, **asked})
    return explain(apps, request, lambda slot: (loads or {}).get(slot, 0), now)


def test_a_name_that_nobody_has_is_said_so() -> None:
    found = ask(app(), host="other.test")
    assert (found.action, found.code, found.app) == ("refuse", "WD09", None)
    assert "other.test" in found.steps[0][1]


def test_a_port_without_http_and_the_wrong_scheme_are_refused() -> None:
    assert ask(app(), port=81).code == "WD09"
    assert ask(app(), scheme="http", port=443).code == "WD01"


def test_force_https_redirects() -> None:
    web = app()
    port = dataclasses.replace(web.services[0].ports[0], force_https=True)
    web = dataclasses.replace(web, services=(dataclasses.replace(web.services[0], ports=(port,)),))
    assert ask(web).action == "redirect"


def test_those_below_the_soft_limit_may_get_it_and_the_others_are_named_with_their_load() -> None:
    found = ask(app(machine("a", 1), machine("b", 2), machine("c", 3), soft_limit=2), loads={2: 2})
    assert (found.action, found.machines) == ("send", ["a", "c"])
    assert ("candidate", "b runs, load 2, at or above its soft limit of 2") in found.steps


def test_who_is_passed_over_is_told_with_the_reason() -> None:
    found = ask(
        app(
            machine("a", 1), machine("b", 2, STOPPED), machine("c", 3, cordoned=True),
            machine("d", 4, failing_ports=(8080,)),
        )
    )  # fmt: skip
    assert found.machines == ["a"]
    assert [text for step, text in found.steps if step == "passed over"] == [
        "b is stopped", "c is cordoned", "d runs, but its checks do not pass",
    ]  # fmt: skip


def test_all_at_their_hard_limit_means_waiting_in_line() -> None:
    found = ask(app(machine("a", 1), soft_limit=1, hard_limit=2), loads={1: 2})
    assert (found.action, found.machines) == ("queue", ["a"])


def test_nothing_running_means_a_wake_a_hold_or_a_refusal() -> None:
    assert ask(app(machine("a", 1, STOPPED))).action == "wake"
    held = ask(app(machine("a", 1, STOPPED, hold_reason="it crashed", hold_until=107.0)))
    assert held.code == "WM01" and "7 s: it crashed" in held.steps[-1][1]
    assert ask(app(machine("a", 1, STOPPED), autostart=False)).code == "PR04"
    assert ask(app()).code == "PR04"


def test_running_but_unhealthy_means_waiting_for_health() -> None:
    assert ask(app(machine("a", 1, failing_ports=(8080,)))).action == "wait"


def test_a_forced_machine_is_the_only_one_and_a_preferred_one_the_first() -> None:
    web = app(machine("a", 1), machine("b", 2, failing_ports=(8080,)), machine("c", 3, STOPPED))

    def forced(name: str) -> Explanation:
        return ask(web, headers=(("fly-force-instance-id", name),))

    assert (forced("b").action, forced("b").machines) == ("send", ["b"])
    assert (forced("c").action, forced("c").machines) == ("wake", ["c"])
    assert forced("z").code == "WR02"
    assert ask(web, headers=(("fly-prefer-instance-id", "a"),)).machines == ["a"]
    assert ask(web, headers=(("fly-prefer-instance-id", "c"),)).machines == ["a"]


def test_access_and_wake_rules_are_told() -> None:
    web = app(machine("a", 1, STOPPED))
    shut = dataclasses.replace(web, access=AccessRules(allow=("10.0.0.0/8",)))
    assert ask(shut).code == "WA01" and "allow list" in ask(shut).steps[-1][1]
    assert ask(shut, source="10.1.2.3").action == "wake"
    assert ask(dataclasses.replace(web, access=AccessRules(deny=("127.0.0.1",)))).code == "WA01"
    ignoring = dataclasses.replace(web, wake_rules=WakeRules(ignore_paths=("/healthz",)))
    assert ask(ignoring, path="/healthz").code == "WM04"
    assert ask(ignoring).action == "wake"


def test_the_rule_is_told_where_several_may_be_drawn() -> None:
    found = ask(app(machine("a", 1), machine("b", 2), balance=Balance.PEAK_EWMA))
    assert any(step == "balance" and text.startswith("peak-ewma") for step, text in found.steps)


def test_a_method_that_is_not_served_is_refused_whatever_runs() -> None:
    for method in ("CONNECT", "FOO", "get", "A B"):
        assert (ask(app(machine("m1", 1)), method=method).action, ask(method=method).code) == ("refuse", "WD04"), method
    for method in ("GET", "POST", "PROPFIND", "M-SEARCH"):
        assert ask(app(machine("m1", 1)), method=method).action == "send", method


BROWSER = (("accept", "text/html,*/*;q=0.8"), ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "document"))


def test_a_browser_is_shown_the_waiting_page_and_a_program_waits() -> None:
    web = dataclasses.replace(app(machine("m1", 1, STOPPED)), wake_rules=WakeRules(waiting_page=True))
    found = ask(web, headers=BROWSER)
    assert (found.action, found.code, found.machines) == ("page", "WM06", ["m1"])
    assert ask(web, headers=(("accept", "*/*"),)).action == "wake"
    assert ask(web, headers=BROWSER, method="POST").action == "wake"
    forced = (("fly-force-instance-id", "m1"), *BROWSER)
    assert ask(web, headers=forced).action == "page"


def test_naming_a_machine_does_not_get_round_the_rules_of_who_wakes() -> None:
    web = dataclasses.replace(app(machine("m1", 1, STOPPED)), wake_rules=WakeRules(ignore_agents=("bot",)))
    found = ask(web, headers=(("fly-force-instance-id", "m1"), ("user-agent", "a-bot/1")))
    assert (found.action, found.code) == ("refuse", "WM04")
