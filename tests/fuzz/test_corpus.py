"""Every input that is kept passes, and so does what hypothesis makes of them in a moment."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.corpus import altered, inputs
from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("target", TARGETS)
def test_every_input_of_the_corpus_passes(target: str) -> None:
    kept = inputs(target)
    assert len(kept) >= 10, "nothing to begin with"
    for data in kept:
        try:
            TARGETS[target](data)
        except BaseException as error:
            error.add_note(f"input: {data!r}")
            raise


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 1 << 32), noise=st.binary(max_size=40))
def test_what_is_made_of_the_corpus_passes(target: str, seed: int, noise: bytes) -> None:
    kept = inputs(target)
    TARGETS[target](altered(random.Random(seed), [*kept, noise]))
