"""Challenges as TXT records in the CA's test DNS: nothing has to listen, and nothing is left of a process that died."""

from __future__ import annotations

import asyncio
import json
import urllib.request

from certs.challenges import Challenge, ChallengeType, dns_value


class TxtRecords:
    """A Presenter. `management` is where the test DNS is told: proxy.cli.pebble.Pebble.dns_management."""

    def __init__(self, management: str) -> None:
        self._management = management
        self.shown: set[str] = set()

    def types(self, name: str, is_wildcard: bool) -> tuple[ChallengeType, ...]:
        return (ChallengeType.DNS_01,)

    async def present(self, challenge: Challenge) -> None:
        value = dns_value(challenge.key_authorization)
        await asyncio.to_thread(self._tell, "set-txt", {"host": f"_acme-challenge.{challenge.name}.", "value": value})
        self.shown.add(challenge.name)

    async def clean_up(self, challenge: Challenge) -> None:
        await asyncio.to_thread(self._tell, "clear-txt", {"host": f"_acme-challenge.{challenge.name}."})
        self.shown.discard(challenge.name)

    def _tell(self, what: str, body: dict[str, str]) -> None:
        request = urllib.request.Request(f"{self._management}/{what}", json.dumps(body).encode(), method="POST")
        with urllib.request.urlopen(request, timeout=10) as answer:
            answer.read()
