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
from proxy.decide.on_demand import Answers, NameBuckets, is_allowed
from proxy.model import AppName

log = logging.getLogger(__name__)

_QUESTIONS_AT_ONCE = 16
_BESIDE_ASKING_S = 0.1  # of a handshake's wait: for DNS, and for those who wait already

Rules = Sequence[tuple[AppName, OnDemandSection]]


class OnDemand:
    """Decides for one node. `close` it at the end."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._rules: Rules = ()
        self._refused = Answers()
        self._permitted = Answers()  # by which app
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
        return self._refused.of(name, self._clock.monotonic())

    @property
    def patience_s(self) -> float:
        """How long a handshake waits for the decision at the most; that goes on, for the next one."""
        return max((section.ask_timeout_s for _, section in self._rules), default=0.0) + _BESIDE_ASKING_S

    def refuse(self, name: str, app: AppName, why: str) -> None:
        """Nothing could be had for a name that was let in: it is not tried again so soon."""
        ttl_s = next((section.negative_ttl_s for one, section in self._rules if one == app), 60.0)
        self._permitted.forget(name)
        self._refused.add(name, why, self._clock.monotonic() + ttl_s)

    async def app_of(self, name: str, registered_domain: str) -> tuple[AppName | None, str]:
        """The app that a new name is of, or None and why it is refused. Not to be called for a name twice at a time.

        The bucket of the domain is looked at before anybody is asked; `take` of it follows when all else is settled.
        """
        now = self._clock.monotonic()
        if (refused := self._refused.of(name, now)) is not None:
            return None, refused
        permitted_by = self._permitted.of(name, now)  # asked before, and there was no room then
        why, ttl_s = f"no app here answers to {name}", 0.0
        for app, section in self._rules:
            is_free = is_allowed(name, section.allow)
            if not is_free and not section.ask:
                continue
            if full := self._why_full(section, registered_domain, now):
                why = full
                continue
            if is_free or permitted_by == app:
                return app, ""
            if self._asking >= _QUESTIONS_AT_ONCE:
                # that is of the crowd, not of the name: nothing is held against it
                return None, "too many names are asked for at once"
            ttl_s = max(ttl_s, section.negative_ttl_s)
            if not (said := await self._ask(name, section)):
                self._permitted.add(name, app, now + section.negative_ttl_s)
                return app, ""
            why = said
        if ttl_s:  # somebody was asked: the rest costs nothing, and would push out what did
            self._refused.add(name, why, now + ttl_s)
        return None, why

    def take(self, app: AppName, name: str, registered_domain: str) -> str:
        """Count the name with its domain and with all, now that it is to be ordered: "", or why there is no room."""
        now = self._clock.monotonic()
        section = next((section for one, section in self._rules if one == app), None)
        if section is None:
            return f"no app here answers to {name}"
        if full := self._why_full(section, registered_domain, now):
            return full
        self._buckets.take("", section.names_burst, section.names_hour, now)
        self._buckets.take(registered_domain, section.domain_burst, section.domain_hour, now)
        self._permitted.forget(name)
        return ""

    def _why_full(self, section: OnDemandSection, registered_domain: str, now: float) -> str:
        if not self._buckets.has_room("", section.names_burst, section.names_hour, now):
            return "too many new names on demand"
        if not self._buckets.has_room(registered_domain, section.domain_burst, section.domain_hour, now):
            return f"too many new names of {registered_domain} on demand"
        return ""

    async def _ask(self, name: str, section: OnDemandSection) -> str:
        """ "" if the app's URL permits the name; else why not."""
        self._asking += 1
        self.questions += 1
        try:
            if self._session is None:
                self._session = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), middlewares=(_once,))
            timeout = aiohttp.ClientTimeout(total=section.ask_timeout_s)
            async with self._session.get(
                section.ask, params={"domain": name}, timeout=timeout, allow_redirects=False
            ) as answer:
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


async def _once(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """aiohttp asks a second time by itself where a server closes the connection: that would be a question too many."""
    try:
        return await handler(request)
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise aiohttp.ClientError(str(error)) from error
