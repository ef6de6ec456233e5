"""The read gate: a transport reads again when the last of those who stopped it has let go."""

from __future__ import annotations

import random

import pytest

from proxy.edge.flow import ReadGate


class Transport:
    def __init__(self) -> None:
        self.reads = True
        self.closing = False

    def pause_reading(self) -> None:
        assert self.reads and not self.closing, "paused twice, or after the end"
        self.reads = False

    def resume_reading(self) -> None:
        assert not self.reads and not self.closing, "resumed twice, or after the end"
        self.reads = True

    def is_closing(self) -> bool:
        return self.closing


def test_reading_goes_on_when_the_last_has_let_go() -> None:
    transport = Transport()
    gate = ReadGate(transport)
    gate.pause()
    gate.pause()
    gate.resume()
    assert not transport.reads
    gate.resume()
    assert transport.reads


def test_a_resume_without_a_pause_is_a_fault() -> None:
    with pytest.raises(RuntimeError, match="without a pause"):
        ReadGate(Transport()).resume()


def test_a_closing_transport_is_left_alone() -> None:
    transport = Transport()
    gate = ReadGate(transport)
    gate.pause()
    transport.closing = True
    gate.resume()
    gate.pause()
    gate.resume()
    assert gate.pauses == 0


def test_however_pauses_and_resumes_mix_the_transport_hears_of_changes_only() -> None:
    rng = random.Random(7)
    transport = Transport()
    gate = ReadGate(transport)
    for _ in range(1000):
        if gate.pauses and rng.random() < 0.5:
            gate.resume()
        else:
            gate.pause()
        assert transport.reads is (gate.pauses == 0)
