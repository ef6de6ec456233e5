"""Where a worker's time goes under one load: py-spy or perf beside `bench load`'s own set-up. A tool, not a result.

`python -m bench profile [--case get] [--with py-spy|perf|none] [--seconds 8]`. Needs py-spy (pip) or perf (Debian).
"""

from __future__ import annotations

import argparse
import collections
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.load import CASES, Loader, Subject, measure, start, verify
from bench.origin import Origin
from bench.processes import BenchError, cores, stop


def run(arguments: argparse.Namespace) -> int:
    case = next((case for case in CASES if case.name == arguments.case), None)
    if case is None:
        raise BenchError(f"no case {arguments.case}: {', '.join(case.name for case in CASES)}")
    proxy_core, load_core = cores()
    with tempfile.TemporaryDirectory(prefix="wakefront-bench-") as temporary:
        folder = Path(temporary)
        origin = Origin(folder / "origin", load_core)
        subjects: list[Subject] = []
        try:
            loader = Loader(folder, load_core, folder / "raw.txt")
            subjects, missing = start(["wakefront"], folder, origin, proxy_core)
            if missing:
                raise BenchError(str(missing))
            subject = subjects[0]
            verify(subject, origin)
            sample = measure(loader, origin, subject, case, 0, 2)
            print(f"unprofiled: {sample.cpu_us:.1f} µs {sample.cpu_us_by_role}, {sample.per_s:.0f}/s {sample.errors}")
            worker = subject.roles()["workers"][0]
            profiler = _profiler(arguments.with_, worker, arguments.seconds, folder)
            sample = measure(loader, origin, subject, case, 1, arguments.seconds + 1)
            if profiler is not None:
                profiler.wait(60)
                _print(arguments.with_, folder, sample.cpu_us)
        finally:
            for subject in subjects:
                if subject.running is not None:
                    stop(subject.running.process)
            stop(origin.process)
    return 0


def _profiler(kind: str, pid: int, seconds: int, folder: Path) -> subprocess.Popen[bytes] | None:
    if kind == "none":
        return None
    if kind == "py-spy":
        program = Path(sys.executable).parent / "py-spy"
        options = [
            "record",
            "--pid",
            str(pid),
            "--duration",
            str(seconds),
            "--rate",
            "500",
            "--native",
            "--format",
            "raw",
        ]
        command = [str(program), *options, "--output", str(folder / "stacks")]
    else:
        program = Path(shutil.which("perf") or "perf")
        options = ["record", "-F", "1999", "-g", "-p", str(pid), "-o", str(folder / "perf.data"), "--"]
        command = [str(program), *options, "sleep", str(seconds)]
    if not program.exists():
        raise BenchError(f"{program} is not installed")
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _print(kind: str, folder: Path, cpu_us: float) -> None:
    if kind == "perf":
        report = [
            "perf",
            "report",
            "-i",
            str(folder / "perf.data"),
            "--no-children",
            "-g",
            "none",
            "--percent-limit",
            "0.6",
        ]
        done = subprocess.run([*report, "--stdio"], capture_output=True, text=True, check=False)
        print("\n".join(line for line in done.stdout.splitlines() if line and not line.startswith("#")))
        return
    own: collections.Counter[str] = collections.Counter()
    within: collections.Counter[str] = collections.Counter()
    total = 0
    for line in (folder / "stacks").read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")
        total += int(count)
        own[frames[-1]] += int(count)
        for frame in set(frames):
            within[frame] += int(count)
    for title, counter in (("own time", own), ("with what it calls", within)):
        print(f"\n{title}, µs a request (of {cpu_us:.1f}, the profiler's cost included)")
        for frame, samples in counter.most_common(45):
            print(f"{samples / total * cpu_us:7.2f}  {100 * samples / total:5.1f}%  {frame}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", default="get")
    parser.add_argument("--with", dest="with_", choices=("py-spy", "perf", "none"), default="py-spy")
    parser.add_argument("--seconds", type=int, default=8)
