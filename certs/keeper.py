"""Keeps names in certificates: orders them, renews them in time, tries again what failed. One for a node and CA.

Each name has a Domain record, in memory and in the store, that says when it is to be looked at next; a heap of these
times is all there is of a schedule, made anew from the records at the start. A look is one task a name, so many at once
and no more; names that strangers asked for have a smaller bound of their own: those that were added never wait behind
them.

Whether a name may have a certificate, where it is shown, and what DNS says of it are others' matters, plugged in as
`Surroundings`.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import msgspec

from certs.budget import Budget, Event, set_of
from certs.certificate import Certificate
from certs.challenges import ChallengeType, Presenter
from certs.domain import Domain, Origin, Source, Trouble, certificate_key, domain_key, held_of, sources_of
from certs.errors import AcmeError, CertificateError, ConflictError, Failure, OrderHeldError
from certs.issuer import AcmeClient, certificate_id
from certs.names import registered_domain
from certs.order import KeyType, OrderRun, Want, order_key
from certs.renewal import RenewalWindow, due_at, retry_at
from certs.store import Store

_log = logging.getLogger("wakefront.certs")

AT_ONCE = 16  # orders under way for names that were added or configured
ON_DEMAND_AT_ONCE = 4
_LONGEST_SLEEP_S = 60.0  # the clock may be set
_HELD_RETRY_S = 5.0  # another node has the order
_ARI_RETRY_S = 6 * 3600.0
_LEAST_AGE_S = 600.0  # of a certificate that is to be renewed


class Surroundings(Presenter, Protocol):
    """What the keeper asks of whoever it works for."""

    async def is_pointed(self, domain: Domain) -> str:
        """ "" if it is worth asking the CA; else what is missing in DNS, for a person to read."""

    async def is_owned(self, domain: Domain) -> str:
        """ "" if DNS shows that the name is of whoever brought a certificate for it; else what is missing."""

    async def on_dropped(self, domain: Domain, why: str) -> None:
        """A name on demand is kept no more: no certificate can be had for it."""

    async def on_certificate(self, domain: Domain) -> None:
        """A name's certificates changed: show those of `domain.shown`. Raises CertificateError or OSError."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How certificates are ordered."""

    key_types: tuple[KeyType, ...] = (KeyType.ECDSA,)
    profile: str = ""
    is_ordered: Callable[[str], bool] = lambda name: True  # names that the CA is asked for; others are only kept
    prove_patience_s: float = 180.0
    finalize_patience_s: float = 180.0


# Of a name on demand that has no certificate yet: it is forgotten, and may come again.
_NOT_WORTH_KEEPING = frozenset({Failure.NOT_POINTED, Failure.VALIDATION, Failure.REFUSED, Failure.RATE_LIMITED})


class Keeper:
    """Belongs to one event loop. `load`, then `run` as a task; `close` at the end."""

    def __init__(
        self,
        client: AcmeClient,
        store: Store,
        budget: Budget,
        around: Surroundings,
        now: Callable[[], float],
        owner: str,
        *,
        policy: Policy = Policy(),
        rng: random.Random,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        on_point: Callable[[str], None] = lambda point: None,
    ) -> None:
        """`owner` is this node, the same after a restart: its orders are gone on with at once."""
        self.client = client
        self.policy = policy
        self._sources = sources_of(policy.key_types)
        self._store = store
        self._budget = budget
        self._around = around
        self._now = now
        self._owner = owner
        self._rng = rng
        self._sleep = sleep
        self._point = on_point
        self._domains: dict[str, Domain] = {}
        self._revisions: dict[str, int] = {}
        self._heap: list[tuple[float, str]] = []
        self._scheduled: dict[str, float] = {}  # the entry of the heap that counts
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._on_demand_under_way = 0
        self._runs: dict[str, OrderRun] = {}
        self._shown: dict[str, tuple[Source, ...]] = {}  # what each name was last said to show
        self._waiting: dict[str, list[asyncio.Future[None]]] = {}
        self._wake = asyncio.Event()
        self._orders = asyncio.Semaphore(AT_ONCE)
        self.failures: Counter[Failure] = Counter()  # since the start
        self.obtained = 0
        self.renewed = 0

    # --- what there is

    async def load(self) -> list[str]:
        """Read all records; the faults of those that cannot be read."""
        faults: list[str] = []

        def read() -> list[tuple[Domain, int]]:
            self._budget.load()
            found = []
            for key, entry in self._store.items("domain", lambda key, error: faults.append(f"{key}: {error}")):
                try:
                    found.append((msgspec.json.decode(entry.value, type=Domain), entry.revision))
                except msgspec.MsgspecError as error:
                    faults.append(f"{key}: {error}")
            return found

        for domain, revision in await asyncio.to_thread(read):
            self._domains[domain.name] = domain
            self._revisions[domain.name] = revision
            self._shown[domain.name] = domain.shown(self._now())  # the caller shows what there is at the start
            self._schedule(domain)
        return faults

    def get(self, name: str) -> Domain | None:
        return self._domains.get(name)

    def all(self) -> list[Domain]:
        return list(self._domains.values())

    def __len__(self) -> int:
        return len(self._domains)

    @property
    def on_demand_is_busy(self) -> bool:
        return self._on_demand_under_way >= ON_DEMAND_AT_ONCE

    def why_not_on_demand(self, name: str) -> str:
        """Why an order for a stranger's name would have to wait for the budget; "" if it would not."""
        try:
            self._budget.check((name,), is_renewal=False, is_on_demand=True)
        except AcmeError as error:
            return error.detail
        return ""

    def is_under_way(self, name: str) -> bool:
        return name in self._under_way

    async def certificate(self, name: str, source: Source) -> Certificate | None:
        """Chain and key, as stored; None if they cannot be read: then they are ordered anew. Raises OSError."""
        try:
            entry = await asyncio.to_thread(self._store.get, certificate_key(name, source))
            if entry is None:
                raise CertificateError("it is not in the store")
            return Certificate.from_pem(name, entry.value)
        except CertificateError as error:
            self.lost(name, source, error)
            return None

    # --- what is told

    async def add(self, domain: Domain) -> None:
        """A name to be kept from now on, or a record changed by the caller. Raises OSError."""
        await self._save(domain)
        self._domains[domain.name] = domain
        self.look(domain.name)

    def look(self, name: str) -> None:
        """Look at it as soon as there is room, whatever its schedule says."""
        if (domain := self._domains.get(name)) is not None:
            if domain.trouble is not None and domain.trouble.failure is not Failure.RATE_LIMITED:
                domain.trouble = msgspec.structs.replace(domain.trouble, next_try_at=self._now())
            self._schedule(domain)

    async def remove(self, name: str, sources: Iterable[Source] = tuple(Source), *, forget: bool = True) -> None:
        """Drop certificates of a name and, if `forget`, the name itself. An order under way is given up."""
        domain = self._domains.get(name)
        if forget:
            self._domains.pop(name, None)  # first: what ends would begin anew
        if (task := self._under_way.get(name)) is not None:
            task.cancel()
            await asyncio.wait({task})
            await asyncio.sleep(0)  # for what follows its end
        keys = [certificate_key(name, source) for source in sources]
        if Source.ACME in tuple(sources):
            keys += [order_key(name, kind) for kind in KeyType]
        for key in keys:
            await asyncio.to_thread(self._store.delete, key)
        if forget:
            self._revisions.pop(name, None)
            self._shown.pop(name, None)
            self._scheduled.pop(name, None)
            await asyncio.to_thread(self._store.delete, domain_key(name))
        elif domain is not None:
            domain.held = {source: held for source, held in domain.held.items() if source not in tuple(sources)}
            await self._save(domain)
            self._schedule(domain)
        self._tell(name)

    async def set_custom(self, domain: Domain, certificate: Certificate, key: str) -> None:
        """Keep a certificate that was brought. Raises OSError."""
        now = self._now()
        await asyncio.to_thread(self._store.put, certificate_key(domain.name, Source.CUSTOM), certificate.to_pem())
        domain.held = {**domain.held, Source.CUSTOM: held_of(certificate, key, now)}
        await self.add(domain)

    def renew(self, name: str) -> None:
        """Order new certificates at once, whatever the schedule says."""
        domain = self._domains.get(name)
        if domain is not None:
            now = self._now()
            for source, held in domain.held.items():
                if source is not Source.CUSTOM:
                    ask_at = now + _ARI_RETRY_S if held.ask_ari_at else 0.0
                    domain.held[source] = msgspec.structs.replace(held, renew_at=now, ask_ari_at=ask_at)
            self.look(name)

    def progress(self, name: str) -> tuple[str, float] | None:
        """The step that the name's order is at and since when (unix seconds), while one is under way."""
        run = self._runs.get(name)
        record = run.record if run is not None else None
        return (record.step.value, record.step_at) if record is not None else None

    def lost(self, name: str, source: Source, why: CertificateError) -> None:
        """A certificate cannot be read any more: it is ordered anew."""
        domain = self._domains.get(name)
        if domain is not None and source in domain.held:
            _log.error("the %s certificate of %s is lost (%s)", source, name, why)
            domain.held = {one: held for one, held in domain.held.items() if one is not source}
            self._schedule(domain)

    async def wait(self, name: str, timeout_s: float) -> None:
        """Until this name's next look is over, or the time is."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(name, []).append(future)
        try:
            async with asyncio.timeout(timeout_s):
                await future
        except TimeoutError:
            pass
        finally:
            waiting = self._waiting.get(name, [])
            if future in waiting:
                waiting.remove(future)
            if not waiting:
                self._waiting.pop(name, None)

    # --- the schedule

    async def run(self) -> None:
        """Look at each name when it is due, for ever. What raises here is unforeseen: call it again after a pause."""
        before = self._now()
        while True:
            self._wake.clear()
            now = self._now()
            if now < before - _LONGEST_SLEEP_S:  # the clock was set back: what failed before that is not in the future
                for one in self._domains.values():
                    self._schedule(one)
            before = now
            is_held_back = self._begin_due(now)
            wait = _LONGEST_SLEEP_S
            if self._heap and not is_held_back:
                wait = min(wait, max(0.0, self._heap[0][0] - now))
            elif is_held_back:
                wait = 1.0  # and at once when a task ends
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._wake.wait()

    def _begin_due(self, now: float) -> bool:
        """Begin with the names that are due; whether some of them have to wait for room."""
        later: list[tuple[float, str]] = []
        name = ""
        try:
            while self._heap and self._heap[0][0] <= now:
                at, name = heapq.heappop(self._heap)
                if self._scheduled.get(name) == at:
                    del self._scheduled[name]
                domain = self._domains.get(name)
                if domain is None or name in self._under_way or self._next_at(domain, now) > now:
                    continue  # it has gone, or another entry of the heap is the one that counts
                if domain.origin is Origin.ON_DEMAND and self.on_demand_is_busy:
                    later.append((at, name))
                    continue
                if len(self._under_way) >= AT_ONCE * 4:
                    later.append((at, name))
                    break
                self._begin(domain)
        except Exception:
            later.append((now, name))  # where whoever runs this goes on, it comes after those that are due already
            raise
        finally:
            for entry in later:
                self._scheduled[entry[1]] = entry[0]
                heapq.heappush(self._heap, entry)
        return bool(later)

    async def close(self) -> None:
        """End what is under way; orders are gone on with at the next start."""
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.client.close()

    def _next_at(self, domain: Domain, now: float) -> float:
        if self._shown.get(domain.name, ()) != domain.shown(now):
            return domain.trouble.due_at(now) if domain.trouble is not None else now
        return domain.next_at(now, self._sources, self.policy.is_ordered(domain.name))

    def _schedule(self, domain: Domain) -> None:
        at = self._next_at(domain, self._now())
        if at < float("inf") and self._scheduled.get(domain.name) != at:
            self._scheduled[domain.name] = at
            heapq.heappush(self._heap, (at, domain.name))
            self._wake.set()

    def _begin(self, domain: Domain) -> None:
        task = asyncio.get_running_loop().create_task(self._attend(domain), name=f"certificate {domain.name}")
        self._under_way[domain.name] = task
        on_demand = domain.origin is Origin.ON_DEMAND
        self._on_demand_under_way += on_demand

        def ended(done: asyncio.Task[None]) -> None:
            del self._under_way[domain.name]
            self._on_demand_under_way -= on_demand
            if not done.cancelled() and (error := done.exception()) is not None:
                _log.error("looking after %s failed: %r", domain.name, error, exc_info=error)
                self._note(domain, AcmeError(Failure.STORAGE, repr(error)))
            if (current := self._domains.get(domain.name)) is not None:  # the name may have come again meanwhile
                self._schedule(current)
            self._wake.set()
            self._tell(domain.name)

        task.add_done_callback(ended)

    def _tell(self, name: str) -> None:
        for future in self._waiting.pop(name, []):
            if not future.done():
                future.set_result(None)

    # --- one look at one name

    async def _attend(self, domain: Domain) -> None:
        now = self._now()
        try:
            if self._shown.get(domain.name, ()) != domain.shown(now):
                await self._show(domain)  # a certificate has ended, and another takes its place; or it failed before
            if domain.needs_proof:
                if missing := await self._around.is_owned(domain):
                    raise AcmeError(Failure.NOT_POINTED, missing)
                domain.proven_at = now
                await self._show(domain)
            if not domain.is_acme_wanted or not self.policy.is_ordered(domain.name):
                return
            for key_type in self.policy.key_types:
                await self._see_to(domain, key_type)
        except OrderHeldError as error:
            self._note(domain, AcmeError(Failure.STUCK, str(error), retry_after_s=_HELD_RETRY_S))
        except AcmeError as error:
            self._note(domain, error)
            if domain.origin is Origin.ON_DEMAND and not domain.held and error.failure in _NOT_WORTH_KEEPING:
                await self._drop(domain, error.detail)
                return
        except (CertificateError, OSError) as error:
            self._note(domain, AcmeError(Failure.STORAGE, str(error)))
        else:
            domain.trouble = None
            domain.avoid = ()
        if domain.is_given_up(self._now()) and domain.trouble is not None:
            await self._drop(domain, domain.trouble.detail)
        else:
            await self._save_or_tell(domain)

    async def _save_or_tell(self, domain: Domain) -> None:
        try:
            await self._save(domain)
        except (CertificateError, OSError) as error:
            _log.error("what is known of %s cannot be kept: %s", domain.name, error)

    async def _drop(self, domain: Domain, why: str) -> None:
        """A name that a stranger came with and for which nothing can be had: it is not looked at for ever."""
        name = domain.name
        self._domains.pop(name, None)
        self._revisions.pop(name, None)
        self._shown.pop(name, None)
        keys = [domain_key(name), *(order_key(name, kind) for kind in KeyType)]
        keys += [certificate_key(name, source) for source in domain.held]
        try:
            for key in keys:
                await asyncio.to_thread(self._store.delete, key)
        except (CertificateError, OSError) as failure:
            _log.error("what is kept of %s cannot be removed: %s", name, failure)
        if (anew := self._domains.get(name)) is not None:  # somebody added it just now
            self._revisions.pop(name, None)
            await self._save_or_tell(anew)
            return
        await self._around.on_dropped(domain, why)

    async def _see_to(self, domain: Domain, key_type: KeyType) -> None:
        source = Source.RSA if key_type is KeyType.RSA else Source.ACME
        held = domain.held.get(source)
        now = self._now()
        if held is None:
            await self._order(domain, key_type, source, "")
            return
        replaces = ""
        if held.ask_ari_at and held.ask_ari_at <= now < held.expires_at:
            await self._ask_ari(domain, source)
            held = domain.held.get(source)
            if held is None:
                await self._order(domain, key_type, source, "")
                return
        if now < held.renew_at:
            return
        if held.ask_ari_at and (certificate := await self.certificate(domain.name, source)) is not None:
            replaces = certificate_id(certificate.leaf)
        await self._order(domain, key_type, source, replaces)
        self.renewed += 1

    async def _order(self, domain: Domain, key_type: KeyType, source: Source, replaces: str) -> None:
        names = (domain.name,)
        is_renewal = source in domain.held
        resumes = await asyncio.to_thread(self._store.get, order_key(domain.name, key_type)) is not None
        if not is_renewal and not resumes:
            missing = await self._around.is_pointed(domain)
            if missing:
                raise AcmeError(Failure.NOT_POINTED, missing)
        with contextlib.ExitStack() as stack:
            if not resumes:
                on_demand = domain.origin is Origin.ON_DEMAND
                stack.enter_context(self._budget.hold(names, is_renewal=bool(replaces), is_on_demand=on_demand))
            await self._run_order(
                domain, Want(names, key_type, self.policy.profile, replaces, _types(domain.avoid)), source
            )
            await asyncio.to_thread(self._spend_certificate, domain.name)
        self.obtained += 1
        await self._show(domain)

    async def _run_order(self, domain: Domain, want: Want, source: Source) -> None:
        run = OrderRun(
            self.client, self._store, _Preferring(self._around, domain), self._now, self._owner,
            sleep=self._sleep, on_point=self._point,
            prove_patience_s=self.policy.prove_patience_s, finalize_patience_s=self.policy.finalize_patience_s,
        )  # fmt: skip

        async def keep(certificate: Certificate) -> None:
            await self._keep(domain, source, want.key_type, certificate)

        async with self._orders:
            self._runs[domain.name] = run
            try:
                await run.run(want, keep)
            except AcmeError as error:
                if error.failure is Failure.VALIDATION:
                    await asyncio.to_thread(self._budget.spend, Event.FAILED_VALIDATION, domain.name)
                    if error.challenge:
                        domain.avoid = (*(one for one in domain.avoid if one != error.challenge), error.challenge)
                raise
            finally:
                del self._runs[domain.name]
                if run.asked:
                    await asyncio.to_thread(self._budget.spend, Event.ORDER, "")

    def _spend_certificate(self, name: str) -> None:
        self._budget.spend(Event.CERTIFICATE, registered_domain(name))
        self._budget.spend(Event.DUPLICATE, set_of((name,)))

    async def _keep(self, domain: Domain, source: Source, key_type: KeyType, certificate: Certificate) -> None:
        """Store it, then say so in the record: until that is done the order's own record is there."""
        await asyncio.to_thread(self._store.put, certificate_key(domain.name, source), certificate.to_pem())
        self._point("kept: certificate")
        now = self._now()
        held = held_of(certificate, key_type, now)
        asks = now if await self.client.has_renewal_info() else 0.0
        renew_at = due_at(held.valid_from, held.expires_at, None, f"{domain.name} {held.serial}")
        # by a clock that is months ahead a new one is due already: no circle of orders comes of it
        renew_at = max(renew_at, now + min(_LEAST_AGE_S, (held.expires_at - held.valid_from) / 3))
        domain.held = {**domain.held, source: msgspec.structs.replace(held, renew_at=renew_at, ask_ari_at=asks)}
        domain.trouble = None
        await self._save(domain)
        self._point("kept: domain")

    async def _ask_ari(self, domain: Domain, source: Source) -> None:
        """When the CA would have it renewed. A CA that does not answer changes nothing."""
        held = domain.held[source]
        certificate = await self.certificate(domain.name, source)
        if certificate is None:
            return
        try:
            info = await self.client.renewal_info(certificate.leaf)
        except AcmeError as error:
            _log.warning("the CA does not say when %s is to be renewed: %s", domain.name, error)
            wait = max(_ARI_RETRY_S, error.retry_after_s)
            domain.held[source] = msgspec.structs.replace(held, ask_ari_at=self._now() + wait)
            return
        window: RenewalWindow | None = info.window if info is not None else None
        renew_at = due_at(held.valid_from, held.expires_at, window, f"{domain.name} {held.serial}")
        domain.held[source] = msgspec.structs.replace(
            held,
            # a CA that would have everything renewed at once, always, is not asked to in a circle
            renew_at=max(renew_at, held.obtained_at + _LEAST_AGE_S),
            ask_ari_at=info.ask_again_at if info is not None else 0.0,
            ari_explanation=window.explanation if window is not None else "",
        )

    async def _show(self, domain: Domain) -> None:
        try:
            await self._around.on_certificate(domain)
        except (CertificateError, OSError) as error:
            raise AcmeError(Failure.STORAGE, f"the certificate of {domain.name} cannot be shown: {error}") from error
        self._shown[domain.name] = domain.shown(self._now())

    def _note(self, domain: Domain, error: AcmeError) -> None:
        """Remember what went wrong, and when it is tried again."""
        now = self._now()
        before = domain.trouble
        same = before is not None and before.failure is error.failure
        in_a_row = before.in_a_row + 1 if same and before is not None else 1
        at = retry_at(error.failure, in_a_row, error.retry_after_s, now, self._rng)
        domain.trouble = Trouble(
            error.failure, error.detail, error.problem, in_a_row,
            before.since if same and before is not None else now, now, at,
        )  # fmt: skip
        self.failures[error.failure] += 1
        level = logging.INFO if error.failure is Failure.NOT_POINTED else logging.WARNING
        if before is None or before.failure is not error.failure or before.detail != error.detail:
            _log.log(level, "no new certificate for %s yet (next try in %d s): %s", domain.name, at - now, error)

    async def _save(self, domain: Domain) -> None:
        domain.updated_at = self._now()
        value = msgspec.json.encode(domain)
        key = domain_key(domain.name)
        known = self._revisions.get(domain.name, 0)
        try:
            revision = await asyncio.to_thread(self._store.put, key, value, known)
        except ConflictError:
            # written by another look at the same record: the last word counts, here as there
            entry = await asyncio.to_thread(self._store.get, key)
            revision = await asyncio.to_thread(self._store.put, key, value, entry.revision if entry else 0)
        self._revisions[domain.name] = revision


def _types(avoid: Iterable[str]) -> tuple[ChallengeType, ...]:
    return tuple(ChallengeType(one) for one in avoid)


class _Preferring:
    """A presenter that tries first what an operator asked for."""

    def __init__(self, inner: Surroundings, domain: Domain) -> None:
        self._inner = inner
        self._wanted = domain.challenge
        self.present = inner.present
        self.clean_up = inner.clean_up

    def types(self, name: str, is_wildcard: bool) -> tuple[ChallengeType, ...]:
        found = self._inner.types(name, is_wildcard)
        return tuple(sorted(found, key=lambda one: one != self._wanted)) if self._wanted else found
