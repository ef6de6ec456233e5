"""Which names this node has certificates for, where each comes from, and that workers can show them.

A name is an app's by the configuration, was added by an operator (`certs add`), or came on demand. Names that no public
CA can know, and all where the issuer is "internal", get theirs from the node's own CA; the others are kept by
certs.keeper. A worker that meets a name first asks, and is told once the record is in the certificate file.

`load` reads what was added, before workers are told of apps; `open` does the rest, and may be tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from certs import (
    Certificate,
    CertificateError,
    CertificateManager,
    InternalCA,
    PackInUseError,
    PackWriter,
    Seal,
    SealedFolder,
    load_or_make_secret,
)
from certs.budget import Budget, limits_of
from certs.challenges import Challenge, ChallengeType
from certs.custom import CustomRefusedError, Fault, judge_custom
from certs.domain import Domain, Origin, Source, sources_of
from certs.errors import AcmeError
from certs.issuer import AcmeClient, ExternalAccount
from certs.keeper import Keeper, Policy
from certs.names import is_private, is_public_suffix, normalise, registered_domain
from certs.order import KeyType
from certs.store import SealedStore
from proxy.clock import Clock, spawn
from proxy.config import CertsSection
from proxy.control.certificates_api import DomainRefused, Rows
from proxy.control.domain_json import check_json, detail_json, forecast_json, internal_json, iso, summary_json
from proxy.control.on_demand import OnDemand
from proxy.control.plan import AppPlan, NodePlan
from proxy.control.presenter import CertificateFile, Presenter
from proxy.metrics import CertificateFacts
from proxy.model import AppName

log = logging.getLogger(__name__)

Json = dict[str, Any]  # Any: JSON

_RENEWAL_LOOK_S = 3600.0
_BEGIN_AGAIN_S = 10.0
_OPEN_PATIENCE_S = 8.0  # what a question that comes before `open` is done waits for it
_ISSUE_PATIENCE_S = 9.0  # a handshake waits for its certificate, with the worker's own time-out behind
_PACK_PATIENCE_S = 5.0  # the control before may be in its last moments
_SLICE = 64
_STRANGERS_AT_ONCE = 256  # names whose admission is being found out
_WARN_BEFORE_S = 7 * 86_400.0
_WARNINGS_MOST = 20


class Domains:
    """The names and their certificates."""

    def __init__(self, data_dir: str, run_dir: str, clock: Clock, rng: random.Random) -> None:
        self._data_dir = Path(data_dir)
        self._pack_path = Path(run_dir) / "certificates"
        self._clock = clock
        self._rng = rng
        self._node = ""
        self._certs = CertsSection()
        self._domain = ""
        self._ports: tuple[int, ...] = ()
        self._configured: dict[str, AppPlan] = {}
        self.is_elsewhere: Callable[[str], bool] = lambda host: False  # a name of an app that only other nodes have
        self._apps: dict[AppName, AppPlan] = {}
        self._self_signed: set[AppName] = set()  # apps that would rather show something than nothing
        self._changed = asyncio.Event()
        self._opened = asyncio.Event()
        self._secret = b""
        self._store: SealedStore | None = None
        self._file: CertificateFile | None = None
        self._authority: InternalCA | None = None
        self._manager: CertificateManager | None = None
        self._client: AcmeClient | None = None
        self._keeper: Keeper | None = None
        self._presenter: Presenter | None = None
        self._on_demand = OnDemand(clock)
        self._around = _Around(self)
        self._asking: dict[str, asyncio.Task[str | None]] = {}
        self._showing = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self._built_for: tuple[object, ...] = ()
        self.faults: dict[str, str] = {}  # name -> why it has no certificate; "" -> of the store
        self.keeping_fault = ""  # why renewals stood still for a while
        self.on_renewed: Callable[[str], None] = lambda name: None
        self.on_hostnames: Callable[[AppName], Awaitable[None]] = _nobody  # names were added or removed

    @property
    def ca_path(self) -> Path:
        return self._data_dir / "certs" / "ca.pem"

    # --- the beginning

    async def load(self, plan: NodePlan) -> None:
        """Read what was added, so that the apps' records have those names. Raises CertificateError or OSError."""
        self._take(plan)
        if self._store is None:
            self._secret, store = await asyncio.to_thread(self._open_store)
            self._store = store
            for fault in store.faults:
                log.error("%s", fault)
                self.faults[""] = fault
        if self._keeper is None:
            self._keeper = await self._loaded_keeper()

    def _open_store(self) -> tuple[bytes, SealedStore]:
        secret = load_or_make_secret(self._data_dir / "secret.key")
        return secret, SealedStore(self._data_dir / "certs" / "store.db", secret, self._clock.unix)

    async def _loaded_keeper(self) -> Keeper:
        assert self._store is not None
        certs = self._certs
        external = ExternalAccount(certs.acme_eab_kid, certs.acme_eab_hmac_key) if certs.acme_eab_kid else None
        self._client = AcmeClient(
            certs.acme_directory, self._store, self._clock.unix,
            ca_file=certs.acme_ca_file, email=certs.acme_email, external_account=external,
        )  # fmt: skip
        budget = Budget(self._store, self._clock.unix, limits_of(certs.acme_directory))
        policy = Policy(tuple(KeyType(one) for one in certs.key_types), certs.acme_profile, self._is_acme)
        keeper = Keeper(
            self._client, self._store, budget, self._around, self._clock.unix, self._node,
            policy=policy, rng=self._rng,
        )  # fmt: skip
        for fault in await keeper.load():
            log.error("a domain's record cannot be read: %s", fault)
        return keeper

    async def open(self) -> None:
        """Open the authority and the certificate file, and begin. Raises CertificateError or OSError."""
        deadline = self._clock.monotonic() + _PACK_PATIENCE_S
        while True:
            try:
                await asyncio.to_thread(self._open)
                break
            except PackInUseError:
                if self._clock.monotonic() >= deadline:
                    raise
                await self._clock.sleep(0.1)
        self._make_presenter()
        await self._reconcile()
        self._opened.set()
        self._built_for = self._built_from()
        self._begin()

    def _built_from(self) -> tuple[object, ...]:
        """What keeper and presenter are made of."""
        return self._certs, self._ports, self._domain

    def _begin(self) -> None:
        self._tasks = [
            spawn(self._keep_internal(), "internal certificates"),
            spawn(self._keep_acme(), "certificates"),
            spawn(self._show_all(), "show certificates"),  # an order that was cut off may have stored one
        ]

    def _open(self) -> None:
        if self._secret == b"":
            self._secret = load_or_make_secret(self._data_dir / "secret.key")
        if self._file is None:
            self._file = CertificateFile(PackWriter(self._pack_path, self._secret))
        if self._manager is None:
            storage = SealedFolder(self._data_dir / "certs", Seal(self._secret))
            self._authority = InternalCA(storage, self.ca_path, self._clock.unix)
            self._authority.open()
            self._manager = CertificateManager(self._authority, storage, self._clock.unix)

    def _make_presenter(self) -> None:
        assert self._file is not None and self._client is not None
        before = self._presenter
        self._presenter = Presenter(
            self._certs, self._ports, self._file, self._clock, self._client.caa_identities,
            lambda app: f"{app}.{self._domain}" if app else self._domain, self._domain, self._account_url,
            self._ownership,
        )  # fmt: skip
        if before is not None:
            before.close()

    def _ownership(self, app: str) -> str:
        """What proves in DNS that a name is the app's: nobody can guess it, or use that of another node's app."""
        return f"app-{hmac.digest(self._secret, b'ownership of ' + app.encode(), 'sha256').hex()[:16]}"

    def _account_url(self) -> str:
        account = self._client.account if self._client is not None else None
        return account.url if account is not None else ""

    async def _show_all(self) -> None:
        """What the store has and the certificate file does not: after a kill in between, or a file that was lost.

        Names that workers ask for meanwhile are not kept waiting for their turn.
        """
        assert self._keeper is not None and self._file is not None
        for place, domain in enumerate(self._keeper.all()):
            try:
                if not self._is_shown(domain):
                    await self._show(domain)
            except (CertificateError, OSError) as error:
                self.faults[domain.name] = str(error)
                log.error("the certificate of %s cannot be shown: %s", domain.name, error)
            if place % _SLICE == 0:
                await asyncio.sleep(0)

    def _is_shown(self, domain: Domain) -> bool:
        """Whether the certificate file has what the store has, without a look at either's content."""
        assert self._file is not None
        shown = domain.shown(self._clock.unix())
        rsa = domain.held.get(Source.RSA)
        return (
            bool(shown)
            and self._file.has(domain.name, domain.held[shown[0]].digest)
            and (rsa is None or self._file.has(f"rsa/{domain.name}", rsa.digest) == (Source.RSA in shown[1:]))
        )

    async def _keep_acme(self) -> None:
        """The keeper is not to end; if it does, renewals go on after a pause, and status says so until a restart."""
        while True:
            assert self._keeper is not None
            try:
                await self._keeper.run()
            except Exception as error:
                log.exception("looking after certificates failed, it is begun again in %g s", _BEGIN_AGAIN_S)
                self.keeping_fault = (
                    f"looking after certificates failed at {iso(self._clock.unix())} ({error!r:.200}); it is begun "
                    f"again after {_BEGIN_AGAIN_S:g} s each time, see the log of control"
                )
            await self._clock.sleep(_BEGIN_AGAIN_S)

    # --- from one plan to the next

    def _take(self, plan: NodePlan) -> None:
        self._node = plan.identity or plan.name
        self._certs, self._domain, self._ports = plan.certs, plan.domain, plan.public_ports
        self._apps = {app.name: app for app in plan.apps}
        self._configured = {name: app for app in plan.apps for name in app.hostnames}
        self._self_signed = {
            app.name for app in plan.apps if any(port.default_self_signed for one in app.services for port in one.ports)
        }
        rules = [(app.name, app.on_demand) for app in plan.apps if app.on_demand is not None]
        self._on_demand.set_rules(rules)

    async def apply(self, plan: NodePlan) -> None:
        """A new plan counts from now on."""
        self._take(plan)
        if self._built_for != self._built_from() and self._opened.is_set():
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            assert self._keeper is not None
            self._opened.clear()  # who comes meanwhile waits for the keeper that counts
            try:
                await self._keeper.close()
                self._keeper = await self._loaded_keeper()
                self._make_presenter()
                self._built_for = self._built_from()
            finally:  # the keeper before goes on where there is no other
                self._opened.set()
                self._begin()
        if self._opened.is_set():
            await self._reconcile()

    async def _reconcile(self) -> None:
        """Configured names are kept, those that are no longer configured are not renewed; internal ones are made."""
        assert self._keeper is not None
        wanted = {name: app.name for name, app in self._configured.items() if self._is_acme(name)}
        if self._certs.issuer == "acme" and self._certs.dns is not None and not is_private(self._domain):
            below = f"*.{self._domain}"
            wanted = {name: app for name, app in wanted.items() if name.partition(".")[2] != self._domain}
            if any(name.partition(".")[2] == self._domain for name in self._configured):
                wanted[below] = AppName("")
        now = self._clock.unix()
        for name, app in wanted.items():
            domain = self._keeper.get(name)
            if domain is None:
                await self._keeper.add(Domain(name, app, Origin.CONFIGURED, now, now))
            elif domain.origin is Origin.CONFIGURED and (not domain.is_acme_wanted or domain.app != app):
                domain.is_acme_wanted, domain.app = True, app
                await self._keeper.add(domain)
        for domain in self._keeper.all():
            if domain.origin is Origin.CONFIGURED and domain.name not in wanted and domain.is_acme_wanted:
                domain.is_acme_wanted = False  # the certificate stays: a name that comes back has it
                await self._keeper.add(domain)
        self._changed.set()

    def _is_acme(self, name: str) -> bool:
        return self._certs.issuer == "acme" and not is_private(name)

    def added_to(self, app: AppName) -> tuple[str, ...]:
        """Names that an app answers to beside the configured ones."""
        if self._keeper is None:
            return ()
        return tuple(
            one.name for one in self._keeper.all()
            if one.app == app and one.origin is not Origin.CONFIGURED and one.name not in self._configured
        )  # fmt: skip

    def _app_of(self, name: str) -> AppName | None:
        if (app := self._configured.get(name)) is not None:
            return app.name
        domain = self._keeper.get(name) if self._keeper is not None else None
        if domain is not None and domain.app in self._apps:
            return AppName(domain.app)
        return None

    # --- what workers ask

    async def provide(self, name: str) -> str | None:
        """See that the certificate file has a record that serves this name; None, or why it cannot."""
        is_known = name in self._configured or self._internal_of(name) is not None or self._record_of(name) is not None
        if not is_known and not self._on_demand.is_on:
            return f"no app here answers to {name}"
        try:
            async with asyncio.timeout(_OPEN_PATIENCE_S):
                await self._opened.wait()
        except TimeoutError:
            return "certificates cannot be made now"
        if not is_known and (refusal := await self._admit(name)) is not None:
            return refusal
        if self._record_of(name) is None and (own := self._internal_of(name)) is not None:
            return await self._provide_internal(own)
        return await self._provide_kept(name)

    def _record_of(self, name: str) -> Domain | None:
        """The kept record that a host name is served by: its own, or the wildcard's one label up."""
        if self._keeper is None:
            return None
        own = self._keeper.get(name)
        if own is not None and (own.is_acme_wanted or own.held) and not self._is_internal(own):
            return own
        wildcard = self._keeper.get("*." + name.partition(".")[2])
        return None if wildcard is None or self._is_internal(wildcard) else wildcard

    def _internal_of(self, name: str) -> str | None:
        """The name that the internal CA makes a certificate of, to serve a host name: its own, or its wildcard's."""
        for one in (name, "*." + name.partition(".")[2]):
            domain = self._keeper.get(one) if self._keeper is not None else None
            is_configured = (one in self._configured or self.is_elsewhere(one)) and not self._is_acme(one)
            if is_configured or (domain is not None and self._is_internal(domain)):
                return one
        return None

    def _is_internal(self, domain: Domain) -> bool:
        """Whether the internal CA's certificate is what a kept name has: no other is asked, and none is there."""
        is_wanted = domain.is_acme_wanted or domain.name in self._configured
        return is_wanted and not self._is_acme(domain.name) and domain.served(self._clock.unix()) is None

    async def _provide_internal(self, name: str) -> str | None:
        assert self._manager is not None and self._file is not None
        try:
            certificate = await self._manager.get(name)
            if await self._file.put(name, certificate.chain_pem, certificate.key_pem):
                self.on_renewed(name)
        except (CertificateError, OSError) as error:
            self.faults[name] = str(error)
            log.error("no certificate for %s: %s", name, error)
            return str(error)
        self.faults.pop(name, None)
        return None

    async def _provide_kept(self, name: str) -> str | None:
        """Of a name that is kept: what there is, or what comes while the handshake waits."""
        assert self._keeper is not None
        deadline = self._clock.monotonic() + _ISSUE_PATIENCE_S
        while True:
            domain = self._record_of(name)
            if domain is None:
                return self._on_demand.refusal(name) or f"no app here answers to {name}"
            if domain.served(self._clock.unix()) is not None:
                try:
                    await self._show(domain)
                except (CertificateError, OSError) as error:
                    return str(error)
                return None
            if domain.app in self._self_signed and domain.name == name:  # not of all below a wildcard
                return await self._provide_self_signed(name)
            left = deadline - self._clock.monotonic()
            if domain.trouble is not None and not self._keeper.is_under_way(domain.name):
                return f"{domain.name} has no certificate yet: {domain.trouble.detail}"
            if left <= 0:
                return f"the certificate of {domain.name} is still being made"
            await self._keeper.wait(domain.name, left)

    async def _provide_self_signed(self, name: str) -> str | None:
        """Where an app asks for it (`default_self_signed`), until there is a certificate that is trusted."""
        assert self._authority is not None and self._file is not None
        try:
            made = await asyncio.to_thread(self._authority.issue, name)
            await self._file.put(f"self-signed/{name}", made.chain_pem, made.key_pem)
        except (CertificateError, OSError) as error:
            return str(error)
        return None

    async def _admit(self, name: str) -> str | None:
        """A name that nobody added: whether it becomes one on demand. One question however many ask.

        A handshake waits so long and no longer; what is found out later counts for the next.
        """
        task = self._asking.get(name)
        if task is None:
            if len(self._asking) >= _STRANGERS_AT_ONCE:
                return "too many unknown names at once"
            task = self._asking[name] = spawn(self._admit_once(name), f"on demand {name}")
            task.add_done_callback(lambda done: self._asking.pop(name, None))
        try:
            async with asyncio.timeout(self._on_demand.patience_s):
                return await asyncio.shield(task)
        except TimeoutError:
            return f"whether {name} may have a certificate is still being found out"

    async def _admit_once(self, name: str) -> str | None:
        assert self._keeper is not None
        if (refused := self._on_demand.refusal(name)) is not None:
            return refused
        try:
            normal = normalise(name)
        except CertificateError as error:
            return str(error)
        if normal != name or is_private(name) or is_public_suffix(name) or self._certs.issuer != "acme":
            return f"no public certificate can be had for {name}"
        if self._keeper.on_demand_is_busy:
            return "too many certificates are being made on demand"
        app, why = await self._on_demand.app_of(name, registered_domain(name))
        if app is None:
            return why
        now = self._clock.unix()
        domain = Domain(name, app, Origin.ON_DEMAND, now, now)
        # A name that leads elsewhere cannot be had: it is not kept, or anybody could fill the store with such.
        try:
            missing = await self._around.is_pointed(domain)
        except AcmeError as error:
            return error.detail
        if missing:
            self._on_demand.refuse(name, app, missing)
            return missing
        if self._keeper.on_demand_is_busy:
            return "too many certificates are being made on demand"
        why = self._keeper.why_not_on_demand(name) or self._on_demand.take(app, name, registered_domain(name))
        if why:
            return why
        self._around.seen_pointed.add(name)
        try:
            await self._keeper.add(domain)
        except (CertificateError, OSError) as error:
            self._around.seen_pointed.discard(name)
            return str(error)
        await self.on_hostnames(app)
        return None

    async def _dropped(self, domain: Domain, why: str) -> None:
        assert self._file is not None
        self._on_demand.refuse(domain.name, AppName(domain.app), why)
        try:
            await self._file.remove(domain.name)
            await self._file.remove(f"rsa/{domain.name}")
        except (CertificateError, OSError) as error:
            log.error("the certificate of %s is still shown: %s", domain.name, error)
        self.on_renewed(domain.name)
        await self.on_hostnames(AppName(domain.app))

    async def _show(self, domain: Domain) -> None:
        """Put what the domain serves into the certificate file, or take out what it no longer has.

        One at a time: of two that read before and after a renewal, the older must not be written last.
        """
        async with self._showing:
            await self._show_now(domain)

    async def _show_now(self, domain: Domain) -> None:
        assert self._keeper is not None and self._file is not None
        changed = False
        if self._is_internal(domain):
            await self._provide_internal(domain.name)
            return
        shown = domain.shown(self._clock.unix())
        if not shown:
            # One that has ended, by this host's clock, stays: that may be the one that is wrong.
            if all(kind is Source.CUSTOM and domain.needs_proof for kind in domain.held):
                changed = await self._file.remove(domain.name)
                changed = await self._file.remove(f"rsa/{domain.name}") or changed
        elif (certificate := await self._keeper.certificate(domain.name, shown[0])) is not None:
            changed = await self._file.put(domain.name, certificate.chain_pem, certificate.key_pem)
            beside = None
            if Source.RSA in shown[1:]:
                beside = await self._keeper.certificate(domain.name, Source.RSA)
            if beside is not None:
                changed = await self._file.put(f"rsa/{domain.name}", beside.chain_pem, beside.key_pem) or changed
            else:
                changed = await self._file.remove(f"rsa/{domain.name}") or changed
        if changed:
            self.on_renewed(domain.name)

    async def _keep_internal(self) -> None:
        """Internal names come first when they change, and are looked over for renewals every hour."""
        while True:
            self._changed.clear()
            added = {one.name async for one in self._in_slices() if self._is_internal(one)}
            for name in sorted({*self._configured, *added}):
                if self._internal_of(name) == name and self._record_of(name) is None:
                    await self._provide_internal(name)
                await asyncio.sleep(0)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_RENEWAL_LOOK_S):
                    await self._changed.wait()

    # --- what operators ask (certificates_api.Certificates)

    async def list(self, app: str | None) -> Rows:
        now = self._clock.unix()
        found = [self._summary(one, now) async for one in self._in_slices() if app is None or one.app == app]
        named = {one["hostname"] for one in found}
        for place, (name, plan) in enumerate(list(self._configured.items())):
            if name not in named and (app is None or plan.name == app):
                found.append(self._summary(self._internal(name, plan.name), now))
            if place % _SLICE == 0:
                await asyncio.sleep(0)
        return found

    async def _in_slices(self) -> AsyncIterator[Domain]:
        """All kept names, with a turn of the loop between two slices: 10,000 take 100 ms, and wakes do not wait."""
        for place, domain in enumerate(self._keeper.all() if self._keeper is not None else ()):
            if place % _SLICE == 0:
                await asyncio.sleep(0)
            yield domain

    def _summary(self, domain: Domain, now: float) -> Json:
        under_way = self._keeper is not None and self._keeper.progress(domain.name) is not None
        summary = summary_json(domain, now, under_way)
        if self._is_internal(domain) and not domain.held:
            has_one = domain.name not in self.faults
            status = "active" if has_one else "pending_validation"
            summary.update(configured=has_one, has_fly_certificate=has_one, status=status)
        return summary

    def get(self, app: str, hostname: str) -> Json:
        domain = self._found(app, hostname)
        return self._detail(domain)

    def _detail(self, domain: Domain) -> Json:
        assert self._keeper is not None
        progress = self._keeper.progress(domain.name)
        detail = detail_json(domain, self._clock.unix(), self._requirements(domain), progress is not None)
        detail["order"] = {"step": progress[0], "since": iso(progress[1])} if progress is not None else None
        if not self._is_kept(domain.name) or (self._is_internal(domain) and not domain.held):
            detail.update(internal_json(self.faults.get(domain.name)))
        return detail

    def _is_kept(self, name: str) -> bool:
        return self._keeper is not None and self._keeper.get(name) is not None

    def _internal(self, name: str, app: str) -> Domain:
        """A stand-in for a name of the internal CA."""
        return Domain(name, app, Origin.CONFIGURED, 0.0, 0.0, is_acme_wanted=False)

    def _found(self, app: str, hostname: str) -> Domain:
        if self._keeper is None:
            raise DomainRefused("unavailable", "certificates cannot be managed now: see `wakefront status`")
        domain = self._keeper.get(hostname)
        if domain is None and (plan := self._configured.get(hostname)) is not None:
            domain = self._internal(hostname, plan.name)
        if domain is None or domain.app != app:
            raise DomainRefused("not_found", f"{app} has no certificate for {hostname}")
        return domain

    def _requirements(self, domain: Domain) -> Json:
        target = self._certs.cname_target or f"{domain.app}.{self._domain}"
        return {
            "a": [one for one in self._certs.addresses if ":" not in one],
            "aaaa": [one for one in self._certs.addresses if ":" in one],
            "cname": target,
            "acme_challenge": {
                "name": f"_acme-challenge.{domain.name.removeprefix('*.')}",
                "target": self._presenter.delegation_of(domain.name) if self._presenter is not None else None,
            },
            "ownership": {
                "name": f"_fly-ownership.{domain.name.removeprefix('*.')}",
                "app_value": self._ownership(domain.app),
                "org_value": None,
            },
        }

    async def add(self, app: str, hostname: str, challenge: str | None) -> Json:
        domain = await self._added(app, hostname)
        if challenge is not None and challenge != domain.challenge:
            if challenge not in set(ChallengeType):
                raise DomainRefused("invalid", f"{challenge!r} is no challenge: {', '.join(ChallengeType)}")
            domain.challenge = challenge
        if not domain.is_acme_wanted:
            domain.is_acme_wanted = True
        assert self._keeper is not None
        try:
            await self._keeper.add(domain)
        except (CertificateError, OSError) as error:
            raise DomainRefused("unavailable", f"{hostname} cannot be kept: {error}") from error
        await self.on_hostnames(AppName(app))
        if self._is_internal(domain):
            await self._provide_internal(hostname)  # what fails is in the detail, and tried again
        return self._detail(domain)

    async def _await_opened(self) -> None:
        """A node that has just started takes certificates up a moment after it answers here."""
        try:
            async with asyncio.timeout(_OPEN_PATIENCE_S):
                await self._opened.wait()
        except TimeoutError:
            raise DomainRefused("unavailable", "certificates cannot be managed now: see `wakefront status`") from None

    async def _added(self, app: str, hostname: str) -> Domain:
        """The record of a name that is the app's, new if there is none."""
        await self._await_opened()
        assert self._keeper is not None
        if app not in self._apps:
            raise DomainRefused("not_found", f"there is no app {app} here")
        owner = self._app_of(hostname)
        if owner is not None and owner != app:
            raise DomainRefused("conflict", f"{hostname} is a name of the app {owner} already")
        domain = self._keeper.get(hostname)
        if domain is not None and domain.app == app:
            if domain.origin is Origin.ON_DEMAND:
                domain.origin = Origin.ADDED
            return domain
        now = self._clock.unix()
        return Domain(hostname, app, Origin.ADDED, now, now, is_acme_wanted=False)

    async def import_custom(self, app: str, hostname: str, fullchain: bytes, key: bytes) -> Json:
        domain = await self._added(app, hostname)
        try:
            judged = await asyncio.to_thread(judge_custom, hostname, fullchain, key, self._clock.unix())
        except CustomRefusedError as error:
            faults = [_fault_json(one) for one in error.faults]
            raise DomainRefused("invalid", f"the certificate for {hostname} is refused", faults) from error
        assert self._keeper is not None
        if hostname in self._configured:
            domain.proven_at = domain.proven_at or self._clock.unix()
        try:
            await self._keeper.set_custom(domain, judged.certificate, _key_kind(judged.certificate))
            if domain.proven_at:
                await self._show(domain)
        except (CertificateError, OSError) as error:
            raise DomainRefused("unavailable", f"the certificate cannot be kept: {error}") from error
        await self.on_hostnames(AppName(app))
        if not domain.proven_at:
            await self._keeper.wait(hostname, _ISSUE_PATIENCE_S)
        detail = self._detail(domain)
        detail["warnings"] = [
            {"code": one.code, "message": one.message, "remedy": one.remedy} for one in judged.warnings
        ]
        return detail

    async def check(self, app: str, hostname: str) -> Json:
        await self._await_opened()
        domain = self._found(app, hostname)
        assert self._keeper is not None and self._presenter is not None
        if not self._is_kept(hostname) or (self._is_internal(domain) and not domain.held):
            return self._detail(domain) | {"dns_records": None, "findings": []}
        checked = await self._presenter.check(domain)
        if checked.diagnosis.is_ready or checked.diagnosis.ownership_proven_by is not None:
            self._keeper.look(hostname)
        return self._detail(domain) | check_json(checked.look, checked.diagnosis)

    async def renew(self, app: str, hostname: str) -> Json:
        await self._await_opened()
        domain = self._found(app, hostname)
        assert self._keeper is not None
        if not domain.is_acme_wanted:
            raise DomainRefused("conflict", f"{hostname} has no managed certificate to renew")
        self._keeper.renew(hostname)
        return self._detail(domain)

    async def remove(self, app: str, hostname: str, kind: str | None) -> Json | None:
        await self._await_opened()
        domain = self._found(app, hostname)
        assert self._keeper is not None and self._file is not None
        if not self._is_kept(hostname):
            raise DomainRefused(
                "conflict", f"{hostname} has a certificate of the node's own CA: there is none to remove"
            )
        if kind is None and domain.origin is Origin.CONFIGURED and hostname in self._configured:
            raise DomainRefused("conflict", f"{hostname} is named in config.toml: remove it there, then reload")
        if kind is None:
            await self._keeper.remove(hostname)
            for record in (hostname, f"rsa/{hostname}", f"self-signed/{hostname}"):
                await self._file.remove(record)
            self.on_renewed(hostname)
            await self.on_hostnames(AppName(app))
            return None
        if kind == "custom":
            await self._keeper.remove(hostname, (Source.CUSTOM,), forget=False)
        else:
            domain.is_acme_wanted = False
            await self._keeper.remove(hostname, (Source.ACME, Source.RSA), forget=False)
        await self._show(domain)
        return self._detail(domain)

    async def forecast(self) -> Rows:
        now = self._clock.unix()
        ordered = sources_of(self._certs.key_types)
        found = [forecast_json(one, now, ordered) async for one in self._in_slices() if not self._is_internal(one)]
        return await asyncio.to_thread(sorted, found, key=lambda one: str(one["next_at"] or "~"))

    async def roll_account_key(self) -> Json:
        await self._await_opened()
        assert self._client is not None
        try:
            await self._client.roll_key()
        except (AcmeError, OSError) as error:
            raise DomainRefused("unavailable", f"the account's key was not changed: {error}") from error
        return self.account()

    def account(self) -> Json:
        client = self._client
        account = client.account if client is not None else None
        return {
            "id": account.url if account is not None else None,
            "directory": self._certs.acme_directory,
            "email": self._certs.acme_email or None,
            "issuer": self._certs.issuer,
            "created_at": account.created_at if account is not None else None,
            "clock_skew_s": round(client.clock_skew_s, 1) if client is not None else None,
        }

    # --- what is told

    async def status(self) -> Json:
        """Counts, and what somebody should look at."""
        now = self._clock.unix()
        names = with_certificate = failing = 0
        soonest: float | None = None
        warnings = [self.keeping_fault] if self.keeping_fault else []
        skew = self._client.clock_skew_s if self._client is not None else 0.0
        if abs(skew) > 300:
            warnings.append(f"this host's clock is {abs(skew):.0f} s {'behind' if skew > 0 else 'ahead of'} the CA's")
        async for one in self._in_slices():
            names += 1
            failing += one.trouble is not None
            source = one.served(now)
            if source is None:
                with_certificate += self._is_internal(one) and one.name not in self.faults
                continue
            with_certificate += 1
            expires_at = one.held[source].expires_at
            soonest = expires_at if soonest is None else min(soonest, expires_at)
            if one.trouble is not None and expires_at - now < _WARN_BEFORE_S and len(warnings) < _WARNINGS_MOST:
                warnings.append(
                    f"{one.name} expires in {max(0, int((expires_at - now) / 3600))} h and could not be renewed: "
                    f"{one.trouble.detail}"
                )
        return {
            "names": names,
            "with_certificate": with_certificate,
            "failing": failing,
            "soonest_expiry": soonest,
            "warnings": warnings,
        }

    def facts(self) -> CertificateFacts:
        """For the metrics. Called in the scraper's thread: what it looks at may change under it."""
        now = self._clock.unix()
        domains = self._keeper.all() if self._keeper is not None else []
        ends = [
            held.expires_at for one in domains
            if (source := one.served(now)) is not None and (held := one.held.get(source)) is not None
        ]  # fmt: skip
        failing = Counter(trouble.failure.value for one in domains if (trouble := one.trouble) is not None)
        keeper = self._keeper
        return CertificateFacts(
            served=len(ends),
            waiting=sum(
                one.is_acme_wanted and one.served(now) is None and not self._is_internal(one) for one in domains
            ),
            failing=dict(failing),
            soonest_expiry=min(ends, default=0.0),
            obtained=keeper.obtained if keeper is not None else 0,
            renewed=keeper.renewed if keeper is not None else 0,
            failures={kind.value: count for kind, count in dict(keeper.failures).items()} if keeper is not None else {},
            asked=self._on_demand.questions,
            clock_skew_s=self._client.clock_skew_s if self._client is not None else 0.0,
        )

    async def close(self) -> None:
        for task in (*self._tasks, *self._asking.values()):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._asking.values(), return_exceptions=True)
        if self._keeper is not None:
            await self._keeper.close()
        await self._on_demand.close()
        if self._presenter is not None:
            self._presenter.close()
        if self._manager is not None:
            await self._manager.close()
        if self._file is not None:
            self._file.close()
        if self._store is not None:
            self._store.close()


class _Around:
    """What the keeper asks (certs.keeper.Surroundings): passed on, since what answers is made later."""

    def __init__(self, domains: Domains) -> None:
        self._domains = domains
        self.seen_pointed: set[str] = set()  # new names on demand that were looked at a moment ago

    @property
    def _presenter(self) -> Presenter:
        assert self._domains._presenter is not None
        return self._domains._presenter

    def types(self, name: str, is_wildcard: bool) -> tuple[ChallengeType, ...]:
        return self._presenter.types(name, is_wildcard)

    async def present(self, challenge: Challenge) -> None:
        await self._presenter.present(challenge)

    async def clean_up(self, challenge: Challenge) -> None:
        await self._presenter.clean_up(challenge)

    async def is_pointed(self, domain: Domain) -> str:
        if domain.name in self.seen_pointed:
            self.seen_pointed.remove(domain.name)
            return ""
        return await self._presenter.is_pointed(domain)

    async def is_owned(self, domain: Domain) -> str:
        return await self._presenter.is_owned(domain)

    async def on_certificate(self, domain: Domain) -> None:
        await self._domains._show(domain)

    async def on_dropped(self, domain: Domain, why: str) -> None:
        await self._domains._dropped(domain, why)


async def _nobody(app: AppName) -> None:
    """Nobody has to be told."""


def _fault_json(fault: Fault) -> Json:
    return {"code": fault.code, "message": fault.message, "remedy": fault.remedy}


def _key_kind(certificate: Certificate) -> str:
    return "rsa" if "RSA" in type(certificate.leaf.public_key()).__name__ else "ecdsa"
