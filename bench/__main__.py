"""`python -m bench [load|paced|wake|balance|replay|crossing|memory|domains|certificates|micro|profile|soak] [options]`

Without a name, all but the last two.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from bench.processes import BenchError

MEASURED = ("micro", "load", "paced", "wake", "balance", "replay", "crossing", "memory", "domains", "certificates")


def main(given: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    names = parser.add_subparsers(dest="name")
    modules = {name: importlib.import_module(f"bench.{name}") for name in (*MEASURED, "profile", "soak")}
    for name, module in modules.items():
        module.add_arguments(names.add_parser(name, help=(module.__doc__ or "").splitlines()[0]))
    worst = 0
    for arguments in [given] if given and not given[0].startswith("-") else [[name, *given] for name in MEASURED]:
        parsed = parser.parse_args(arguments)
        parsed.given = arguments[1:]
        try:
            worst = max(worst, modules[parsed.name].run(parsed))
        except BenchError as error:
            print(f"bench {parsed.name}: {error}", file=sys.stderr)
            worst = 2
    return worst


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
