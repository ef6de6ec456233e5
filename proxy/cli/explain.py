"""`wakefront explain URL`: which machine a request would get, and why."""

from __future__ import annotations

from typing import Any

from proxy.cli.node import Api
from proxy.cli.output import print_json, say


def explain(api: Api, url: str, method: str, headers: list[str], source: str, as_json: bool) -> None:
    """Ask the node, and tell the steps."""
    asked = {"url": url, "method": method, "headers": headers, "source": source}
    found: dict[str, Any] = api.post("/v1/explain", asked)  # Any: JSON
    if as_json:
        print_json(found)
        return
    width = max((len(step["step"]) for step in found["steps"]), default=0)
    for step in found["steps"]:
        say(f"{step['step']:<{width}}  {step['text']}")
    say(_verdict(found))


def _verdict(found: dict[str, Any]) -> str:  # Any: JSON
    names = " or ".join(found["machines"]) or "none"
    return {
        "send": f"=> sent to {names}",
        "wake": f"=> {names} is started, and gets it",
        "queue": f"=> waits for room at {names}",
        "wait": "=> waits for a machine whose checks pass",
        "redirect": "=> redirected to https",
    }.get(found["action"], f"=> refused with {found['code']}")
