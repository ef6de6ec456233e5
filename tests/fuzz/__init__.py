"""Fuzzing of every parser: `targets.py` says what must hold for any bytes, `corpus/` holds inputs worth starting from.

    ./run test                                   the corpus, and a short search from it by hypothesis
    ./run soak                                   coverage-guided, by atheris (extra `fuzz`), as long as asked
    python -m tests.fuzz TARGET -max_total_time=60      one target by hand; more arguments are libFuzzer's
    python -m tests.fuzz grow TARGET SECONDS     and keep the smallest of what reached new code

A failing input is printed as a bytes literal: put it into `corpus/TARGET/` and mend what it shows.
"""
