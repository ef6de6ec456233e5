"""Stages of overload: when each begins, when it ends, and that neither flaps."""

from __future__ import annotations

import pytest

from proxy.decide.overload import HOLD_S, LAG_SAMPLES, Overload, Pressure, Stage

CALM = Pressure(0.1, 0.1, 0.0)


def after(*pressures: Pressure, step_s: float = 0.1) -> Overload:
    overload = Overload()
    for number, one in enumerate(pressures):
        overload.look(one, number * step_s)
    return overload


@pytest.mark.parametrize(
    ("pressure", "stage"),
    [
        (CALM, Stage.NORMAL),
        (Pressure(0.90, 0, 0), Stage.CROWDED),
        (Pressure(1.0, 0, 0), Stage.CROWDED),
        (Pressure(0, 0.80, 0), Stage.CROWDED),
        (Pressure(0, 0.90, 0), Stage.SHED_CONNECTIONS),
        (Pressure(0, 0.97, 0), Stage.SHED_REQUESTS),
        (Pressure(0, 0, 0.5), Stage.SHED_CONNECTIONS),
        (Pressure(0, 0, 1.5), Stage.SHED_REQUESTS),
        (Pressure(0.95, 0, 1.5), Stage.SHED_REQUESTS),
    ],
)
def test_each_measure_has_its_mark(pressure: Pressure, stage: Stage) -> None:
    assert after(*[pressure] * LAG_SAMPLES).stage is stage


def test_one_long_turn_of_the_loop_is_no_overload() -> None:
    assert after(CALM, CALM, CALM, Pressure(0, 0, 60.0), CALM).stage is Stage.NORMAL
    assert after(Pressure(0, 0, 60.0)).stage is Stage.NORMAL, "nor is a slow start"


def test_a_stage_stays_while_its_measure_is_above_the_lower_mark_and_a_second_at_least() -> None:
    overload = after(Pressure(0.9, 0, 0))
    assert overload.look(Pressure(0.85, 0, 0), 100.0) is Stage.CROWDED
    assert overload.look(Pressure(0.79, 0, 0), 200.0) is Stage.NORMAL
    assert overload.look(Pressure(0.95, 0, 0), 300.0) is Stage.CROWDED
    assert overload.look(Pressure(0.1, 0, 0), 300.0 + HOLD_S / 2) is Stage.CROWDED
    assert overload.look(Pressure(0.1, 0, 0), 300.0 + HOLD_S) is Stage.NORMAL
    assert overload.why == ""


def test_it_comes_down_a_step_where_only_the_higher_measure_has_gone() -> None:
    overload = after(*[Pressure(0.95, 0, 2.0)] * LAG_SAMPLES)
    assert overload.stage is Stage.SHED_REQUESTS
    for number in range(LAG_SAMPLES):
        overload.look(Pressure(0.95, 0, 0.3), 10.0 + number)
    assert overload.stage is Stage.SHED_CONNECTIONS
    for number in range(LAG_SAMPLES):
        overload.look(Pressure(0.95, 0, 0.0), 20.0 + number)
    assert overload.stage is Stage.CROWDED and "connections 0.95 of max_connections" in overload.why


def test_worse_comes_at_once() -> None:
    overload = after(Pressure(0, 0.85, 0))
    assert overload.look(Pressure(0, 0.99, 0), 0.05) is Stage.SHED_REQUESTS
