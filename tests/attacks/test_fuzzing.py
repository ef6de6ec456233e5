"""A13, without a socket: every parser fuzzed, guided by coverage where atheris is (extra `fuzz`), else by chance.

What must hold is in tests/fuzz/targets.py. The corpus is what both begin with.
"""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.attacks import cases
from tests.attacks.conftest import Begin
from tests.fuzz.corpus import altered, inputs
from tests.fuzz.targets import TARGETS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
IS_GUIDED = importlib.util.find_spec("atheris") is not None
GUIDED_RUNS = 2000
CHANCE_RUNS = 300
MOST_S = 600


@pytest.mark.parametrize("target", TARGETS)
def test_no_bytes_make_a_parser_break_its_word(attack: Begin, target: str) -> None:
    seed = int(os.environ.get("WAKEFRONT_SEED") or random.randrange(1 << 31))
    with attack("A13", f"fuzzing {target}") as run:
        if IS_GUIDED:
            runs = cases(GUIDED_RUNS) if cases(100) <= 100 else cases(10 * GUIDED_RUNS)
            guided(target, seed, runs)
            run.note("guided by coverage")
        else:
            runs = cases(CHANCE_RUNS)
            by_chance(target, seed, runs)
            run.note("by chance")
        run.figures.cases += runs


def guided(target: str, seed: int, runs: int) -> None:
    options = [f"-runs={runs}", f"-seed={seed}", f"-max_total_time={MOST_S}"]
    command = [sys.executable, "-m", "tests.fuzz", target, *options]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=MOST_S + 60)
    assert done.returncode == 0, f"seed {seed}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


def by_chance(target: str, seed: int, runs: int) -> None:
    rng, kept = random.Random(seed), inputs(target)
    for _ in range(runs):
        data = altered(rng, kept)
        try:
            TARGETS[target](data)
        except BaseException as error:
            error.add_note(f"seed {seed}, failing input of {target}: {data!r}")
            raise
