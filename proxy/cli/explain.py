"""`wakefront explain URL`: which machine a request would get, and why."""

from __future__ import annotations

import ipaddress
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from proxy.cli.failure import USAGE, CliError
from proxy.cli.node import Api, ApiError, bound_ports
from proxy.cli.output import print_json, say


def explain(api: Api, url: str, method: str, headers: list[str], source: str, as_json: bool) -> None:
    """Ask the node, and tell the steps."""
    asked = {"url": _with_public_port(api, url), "method": method, "headers": headers, "source": source}
    try:
        ipaddress.ip_address(source)
    except ValueError:
        raise CliError(f"--from {source!r} is no IP address.", USAGE) from None
    try:
        found: dict[str, Any] = api.post("/v1/explain", asked)  # Any: JSON
    except ApiError as error:
        if error.status != 400:
            raise
        raise CliError(f"Cannot explain that: {error.body['error']}.", USAGE) from None
    if as_json:
        print_json(found)
        return
    width = max((len(step["step"]) for step in found["steps"]), default=0)
    for step in found["steps"]:
        say(f"{step['step']:<{width}}  {step['text']}")
    say(_verdict(found))


def _with_public_port(api: Api, url: str) -> str:
    """The URL with the public port in the place of the one that is bound for it here: the node knows only the former.

    A URL that makes no sense is left as it is; the node says what is wrong with it.
    """
    try:
        parts = urlsplit(url if "://" in url else f"https://{url}")
        port = parts.port
    except ValueError:
        return url
    if port is None or api.node.data_dir is None:
        return url
    public = {one["port"]: one["public_port"] for one in bound_ports(api.node.data_dir)}.get(port, port)
    return urlunsplit(parts._replace(netloc=f"{parts.netloc.rpartition(':')[0]}:{public}"))


def _verdict(found: dict[str, Any]) -> str:  # Any: JSON
    names = " or ".join(found["machines"]) or "none"
    return {
        "send": f"=> sent to {names}",
        "wake": f"=> {names} is started, and gets it",
        "page": f"=> {names} is started, and the browser shown a page until then ({found['code']})",
        "queue": f"=> waits for room at {names}",
        "wait": "=> waits for a machine whose checks pass",
        "redirect": "=> redirected to https",
    }.get(found["action"], f"=> refused with {found['code']}")
