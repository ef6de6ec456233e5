"""A fleet of real nodes on one machine: each `wakefront serve` has its own folder, ports and region; invites join them.

with FleetOfNodes(tmp_path, {"ams-1": "ams", "iad-1": "iad"}, apps={"iad-1": section}) as fleet:
    fleet["ams-1"].get("demo")
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from proxy.cli.wan import Wan
from tests.support.processes import wait_for
from tests.support.serve import ServedNode, free_ports


class FleetOfNodes:
    """Nodes by name. The first makes the fleet, the others join it before they start."""

    def __init__(
        self,
        folder: Path,
        regions: Mapping[str, str],
        apps: Callable[[str, Path], str] = lambda name, folder: "",
        *,
        workers: int = 1,
        wan: Wan | None = None,
    ) -> None:
        """`apps(node, folder)`: the part of a node's config.toml after [listen]. With a `wan`, nodes reach each other
        by its links, named as they are."""
        self._stack = contextlib.ExitStack()
        self.nodes: dict[str, ServedNode] = {}
        self._ports = dict(zip(regions, free_ports(len(regions)), strict=True))
        for name, region in regions.items():
            place = folder / name
            place.mkdir(parents=True)
            self.nodes[name] = ServedNode(
                place, self._peers(name, regions, wan) + apps(name, place), workers=workers, name=name, region=region,
                listen=f'backhaul = "127.0.0.1:{self._ports[name]}"',
            )  # fmt: skip

    def _peers(self, name: str, regions: Mapping[str, str], wan: Wan | None) -> str:
        text = ""
        for other, region in regions.items() if wan is not None else ():
            if other != name:
                assert wan is not None
                host, port = wan.link(name, other, ("127.0.0.1", self._ports[other]))
                text += f'\n[[peers]]\nname = "{other}"\nregion = "{region}"\nbackhaul = "{host}:{port}"\n'
        return text

    def __getitem__(self, name: str) -> ServedNode:
        return self.nodes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.nodes)

    def __enter__(self) -> FleetOfNodes:
        with contextlib.ExitStack() as stack:
            first, *others = self.nodes.values()
            stack.enter_context(first)
            wait_for(lambda: first.api("GET", "/v1/status")[1]["fleet"], 10, "the first node's fleet")
            for node in others:
                token = first.cli("node", "invite").strip()
                node.cli("node", "join", token)
                stack.enter_context(node)
            for node in self.nodes.values():
                self.wait_met(node, set(self.nodes) - {self.name_of(node)})
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *failure: Any) -> None:  # Any: as every context manager
        self._stack.__exit__(*failure)

    def name_of(self, node: ServedNode) -> str:
        return next(name for name, one in self.nodes.items() if one is node)

    def states(self, node: ServedNode) -> dict[str, str]:
        """How a node sees the others."""
        status, answer = node.api("GET", "/v1/nodes")
        return {one["name"]: one["state"] for one in answer["nodes"] if not one["is_self"]} if status == 200 else {}

    def wait_met(self, node: ServedNode, others: set[str], seconds: float = 15.0) -> None:
        """Until a node has heard of others, and they are up."""
        wait_for(
            lambda: all(self.states(node).get(name) == "up" for name in others), seconds,
            lambda: f"{self.name_of(node)} meets {others}: {self.states(node)}\n{node.log()}",
        )  # fmt: skip
