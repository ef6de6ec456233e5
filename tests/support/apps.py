"""Apps for the system tests: a fly.toml in the node's folder and its section of config.toml."""

from __future__ import annotations

import json
import sys
from pathlib import Path

PROGRAM = Path(__file__).with_name("program.py")
FLY_TOML = """app = "{name}"

[http_service]
  internal_port = 8080
  auto_stop_machines = "{autostop}"
  auto_start_machines = true
  min_machines_running = 0

[[restart]]
  policy = "{restart}"
"""


def make_app(
    folder: Path,
    name: str,
    *,
    autostop: str = "stop",
    restart: str = "never",
    keys: str = "",
    env: dict[str, str] | None = None,
) -> str:
    """Write the fly.toml of an app that runs program.py; returns its [[apps]] section with `keys` in it.

    Every start leaves a line in the file that `starts` reads.
    """
    path = folder / "apps" / name / "fly.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(FLY_TOML.format(name=name, autostop=autostop, restart=restart))
    environment = {"STARTS": str(_starts(folder, name))} | (env or {})
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in environment.items())
    return f"""
[[apps]]
fly_toml = "{path}"
command = {json.dumps([sys.executable, "-I", "-S", str(PROGRAM)])}
{keys}
[apps.env]
{lines}"""


def starts(folder: Path, name: str) -> list[tuple[int, int]]:
    """Pid and monotonic nanoseconds of every start of the app's program."""
    try:
        lines = _starts(folder, name).read_text().splitlines()
    except FileNotFoundError:
        return []
    return [(int(pid), int(at)) for pid, at in map(str.split, lines)]


def _starts(folder: Path, name: str) -> Path:
    return folder / f"{name}.starts"
