"""What every result holds: commit, machine, versions, command; where it is kept; tables and medians."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import ssl
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.processes import HERE, ROOT
from proxy import compiled


def git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def facts(command: Sequence[str]) -> dict[str, Any]:
    """What a reader needs in order to compare like with like (Any: it is written out as JSON)."""
    processor = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    return {
        "commit": git("rev-parse", "HEAD") or "unknown",
        "uncommitted_changes": bool(git("status", "--porcelain", "--", "proxy", "certs", "bench", "pyproject.toml")),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(command),
        "processor": processor[0] if processor else "unknown",
        "cores": os.cpu_count(),
        "memory_kib": int(memory[0]) if memory else 0,
        "kernel": platform.release(),
        "python": sys.version.split()[0],
        "hot_path": compiled.describe(),
        "openssl": ssl.OPENSSL_VERSION,
        "load_average_at_start": os.getloadavg(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text(errors="replace").splitlines()


def result_folder(kind: str, quick: bool) -> Path:
    """bench/results/DATE-COMMIT; tries (--quick) go to a folder that git ignores."""
    name = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}-{git('rev-parse', '--short=10', 'HEAD') or 'unknown'}"
    folder = HERE / "results" / (f"quick-{name}" if quick else name) / kind
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median with the lowest and highest value."""
    if not values:
        return "–"
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(["---"] + ["--:"] * (len(head) - 1)) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def facts_text(known: dict[str, Any]) -> str:
    changed = " with uncommitted changes" if known["uncommitted_changes"] else ""
    return (
        f"Commit {known['commit']}{changed}, {known['date']}. {known['cores']} cores of {known['processor']}, "
        f"{known['memory_kib'] // 1048576} GiB, Linux {known['kernel']}, Python {known['python']} "
        f"({known['hot_path']}), {known['openssl']}.\n\n"
        f"Command: `{known['command']}`\n"
    )
