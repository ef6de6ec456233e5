"""Who may have a certificate without having been added: rules of config.toml, or a URL of the app's that is asked.

One question a name however many handshakes wait, so many at once, each with an end; what is refused is remembered. The
handshake learns of a refusal within the time-out of the question.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import aiohttp

from proxy.clock import Clock
from proxy.config import OnDemandSection
from proxy.decide.on_demand import NameBuckets, Refusals, is_allowed
from proxy.model import AppName

log = logging.getLogger(__name__)

_QUESTIONS_AT_ONCE = 16
_ANSWER_BYTES = 4096

Rules = Sequence[tuple[AppName, OnDemandSection]]


class OnDemand:
    """Decides for one node. `close` it at the end."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._rules: Rules = ()
        self._refused = Refusals()
        self._buckets = NameBuckets()
        self._asking = 0
        self._session: aiohttp.ClientSession | None = None
        self.questions = 0  # asked since the start

    def set_rules(self, rules: Rules) -> None:
        self._rules = rules

    @property
    def is_on(self) -> bool:
        return bool(self._rules)

    def refusal(self, name: str) -> str | None:
        return self._refused.why(name, self._clock.monotonic())

    def refuse(self, name: str, app: AppName, why: str) -> None:
        """Nothing could be had for a name that was let in: it is not tried again so soon."""
        ttl_s = next((section.negative_ttl_s for one, section in self._rules if one == app), 60.0)
        self._refused.add(name, why, self._clock.monotonic() + ttl_s)

    async def app_of(self, name: str, registered_domain: str) -> tuple[AppName | None, str]:
        """The app that a new name is of, or None and why it is refused. Not to be called for a name twice at a time."""
        now = self._clock.monotonic()
        if (refused := self._refused.why(name, now)) is not None:
            return None, refused
        why, ttl_s = f"no app here answers to {name}", 1.0
        for app, section in self._rules:
            ttl_s = max(ttl_s, section.negative_ttl_s)
            if not is_allowed(name, section.allow):
                if not section.ask:
                    continue
                if said := await self._ask(name, section):
                    why = said
                    continue
            if not self._buckets.take("", section.names_burst, section.names_hour, now):
                why = "too many new names on demand"
                continue
            if not self._buckets.take(registered_domain, section.domain_burst, section.domain_hour, now):
                why = f"too many new names of {registered_domain} on demand"
                continue
            self._refused.forget(name)
            return app, ""
        self._refused.add(name, why, now + ttl_s)
        return None, why

    async def _ask(self, name: str, section: OnDemandSection) -> str:
        """ "" if the app's URL permits the name; else why not."""
        if self._asking >= _QUESTIONS_AT_ONCE:
            return "too many names are asked for at once"
        self._asking += 1
        self.questions += 1
        try:
            if self._session is None:
                self._session = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar())
            timeout = aiohttp.ClientTimeout(total=section.ask_timeout_s)
            async with self._session.get(
                section.ask, params={"domain": name}, timeout=timeout, allow_redirects=False
            ) as answer:
                await answer.content.read(_ANSWER_BYTES)
                return "" if 200 <= answer.status < 300 else f"{section.ask} refuses it with {answer.status}"
        except TimeoutError:
            return f"{section.ask} did not answer within {section.ask_timeout_s:g} s"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return f"{section.ask} cannot be asked: {error or type(error).__name__}"
        finally:
            self._asking -= 1

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None
