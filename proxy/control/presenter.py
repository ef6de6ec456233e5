"""What a CA is shown, and what DNS says before it is asked: the node's side of proving names.

Challenges over HTTP and TLS are records in the certificate file, where every worker finds them; those in DNS are set by
the operator's hook. Nothing here decides when: that is the keeper's.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from certs import CertificateError, PackWriter
from certs.challenges import Challenge, ChallengeType, dns_value, tls_alpn_certificate
from certs.diagnosis import Diagnosis, Finding, Problem, Wanted, diagnose
from certs.dns_hooks import DnsHook, ExecHook, Rfc2136Hook, challenge_name, wait_visible
from certs.domain import Domain, Origin
from certs.errors import AcmeError, DnsHookError, Failure
from certs.look import Look
from certs.resolver import Resolver
from proxy.clock import Clock
from proxy.config import CertsSection, DnsHookSection
from proxy.decide.on_demand import NameBuckets

log = logging.getLogger(__name__)

_THREADS = 4
_STRANGERS_THREADS = 2
_STRANGERS_LOOKS = 8  # at once, those that wait for a thread too
_STRANGERS_BURST, _STRANGERS_HOUR = 20, 36_000.0  # ten a second: more than is ordered, with four orders at once

T = TypeVar("T")


class CertificateFile:
    """The file that workers read, written by one at a time, in a thread."""

    def __init__(self, pack: PackWriter) -> None:
        self._pack = pack
        self._lock = asyncio.Lock()

    async def put(self, name: str, chain_pem: bytes, key_pem: bytes) -> bool:
        """Whether it was another before. Raises CertificateError, OSError."""
        return await self._write(self._pack.append, name, chain_pem, key_pem)

    def has(self, name: str, digest_hex: str) -> bool:
        return self._pack.has(name, digest_hex)

    async def remove(self, name: str) -> bool:
        return await self._write(self._pack.remove, name)

    async def _write(self, call: Callable[..., bool], *arguments: object) -> bool:
        """A thread cannot be cancelled: whoever is, waits for its write, or the next would be in the midst of it."""
        async with self._lock:
            done = asyncio.get_running_loop().run_in_executor(None, call, *arguments)
            is_cancelled = False
            while not done.done():
                try:
                    await asyncio.wait({done})
                except asyncio.CancelledError:
                    is_cancelled = True
            if is_cancelled:
                done.exception()  # nobody is left to be told
                raise asyncio.CancelledError
            return done.result()

    def close(self) -> None:
        self._pack.close()


@dataclass(frozen=True, slots=True)
class Checked:
    """A look at DNS, and what it comes to."""

    look: Look
    diagnosis: Diagnosis


class Presenter:
    """Shows challenges (certs.challenges.Presenter) and looks at DNS. `close` it."""

    def __init__(
        self,
        certs: CertsSection,
        public_ports: Sequence[int],
        file: CertificateFile,
        clock: Clock,
        caa_identities: Callable[[], Awaitable[Sequence[str]]],
        default_target: Callable[[str], str],
        own_domain: str,
        account_url: Callable[[], str],
        ownership: Callable[[str], str],
    ) -> None:
        """`caa_identities` asks the CA; `default_target` leads from an app to the name that CNAMEs may point to.

        `own_domain` is the node's, below which names are no customers'. `account_url` is that of the account with the
        CA, "" while there is none. `ownership` gives what the TXT record at `_fly-ownership` says for an app.

        Raises CertificateError if the DNS hook's settings cannot be used.
        """
        self._certs = certs
        self._ports = frozenset(public_ports)
        self._file = file
        self._clock = clock
        self._caa_identities = caa_identities
        self._default_target = default_target
        self._own_domain = own_domain
        self._account_url = account_url
        self._ownership = ownership
        self._txt_names: dict[tuple[str, str], str] = {}  # host and value -> where the record was set
        self._resolver = Resolver(certs.dns_servers, is_public_only=not certs.dns_servers)
        self._hook = _hook(certs.dns)
        # Looks and hooks wait for others: they must not take the threads that the store needs.
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="dns")
        # Names that strangers ask for may be served by DNS that never answers: they wait for each other alone.
        self._strangers = ThreadPoolExecutor(_STRANGERS_THREADS, thread_name_prefix="strangers-dns")
        self._strangers_looks = 0
        self._strangers_rate = NameBuckets()
        self._pause = threading.Event()

    def close(self) -> None:
        self._pause.set()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._strangers.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, call: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)

    # --- certs.challenges.Presenter

    def types(self, name: str, is_wildcard: bool) -> tuple[ChallengeType, ...]:
        able = {ChallengeType.HTTP_01} if 80 in self._ports else set()
        if 443 in self._ports:
            able.add(ChallengeType.TLS_ALPN_01)
        if is_wildcard:
            able = set()  # RFC 8555 §7.1.3, RFC 8737 §1: a wildcard is proven in DNS alone
        if self._hook is not None:
            able.add(ChallengeType.DNS_01)
        order = [ChallengeType(one) for one in self._certs.challenges]
        order += [one for one in (ChallengeType.DNS_01,) if one not in order]
        return tuple(one for one in order if one in able)

    async def present(self, challenge: Challenge) -> None:
        match challenge.type:
            case ChallengeType.HTTP_01:
                await self._file.put(f"http-01/{challenge.token}", challenge.key_authorization.encode(), b"")
            case ChallengeType.TLS_ALPN_01:
                now = self._clock.unix()
                chain, key = await asyncio.to_thread(
                    tls_alpn_certificate, challenge.name, challenge.key_authorization, now
                )
                await self._file.put(f"tls-alpn-01/{challenge.name}", chain, key)
            case ChallengeType.DNS_01:
                await self._in_thread(self._set_txt, challenge)

    async def clean_up(self, challenge: Challenge) -> None:
        match challenge.type:
            case ChallengeType.HTTP_01:
                await self._file.remove(f"http-01/{challenge.token}")
            case ChallengeType.TLS_ALPN_01:
                await self._file.remove(f"tls-alpn-01/{challenge.name}")
            case ChallengeType.DNS_01:
                await self._in_thread(self._remove_txt, challenge)

    def _set_txt(self, challenge: Challenge) -> None:
        assert self._hook is not None and self._certs.dns is not None
        name, value = challenge_name(challenge.name, self._resolver), dns_value(challenge.key_authorization)
        self._txt_names[challenge.name, value] = name
        self._hook.present(name, value)
        if (patience := self._certs.dns.propagation_timeout_s) > 0:
            deadline = self._clock.monotonic() + patience
            wait_visible(self._resolver, name, value, deadline, self._sleep, self._clock.monotonic)

    def _sleep(self, seconds: float) -> None:
        if self._pause.wait(seconds):
            raise DnsHookError("the node is stopping")

    def _remove_txt(self, challenge: Challenge) -> None:
        if self._hook is None:
            raise DnsHookError(f"there is no [certs.dns] any more to remove the TXT record of {challenge.name}")
        value = dns_value(challenge.key_authorization)
        # where it was set: the CNAME that led there may have been changed since
        name = self._txt_names.pop((challenge.name, value), "") or challenge_name(challenge.name, self._resolver)
        self._hook.clean_up(name, value)

    # --- DNS

    async def check(self, domain: Domain) -> Checked:
        """What DNS shows of a name now, and what is wrong with that."""
        return await self._in_thread(self._check, domain, tuple(await self._identities()))

    async def _check_strangers(self, domain: Domain) -> Checked:
        now = self._clock.monotonic()
        is_crowd = self._strangers_looks >= _STRANGERS_LOOKS
        if is_crowd or not self._strangers_rate.take("", _STRANGERS_BURST, _STRANGERS_HOUR, now):
            raise AcmeError(Failure.NOT_POINTED, "too many new names are looked at in DNS at once")
        self._strangers_looks += 1
        try:
            loop, identities = asyncio.get_running_loop(), tuple(await self._identities())
            return await loop.run_in_executor(self._strangers, self._check, domain, identities)
        finally:
            self._strangers_looks -= 1

    def _check(self, domain: Domain, identities: tuple[str, ...]) -> Checked:
        look = self._resolver.look(domain.name)
        return Checked(look, diagnose(look, self._wanted(domain, identities), self._clock.unix()))

    def _wanted(self, domain: Domain, identities: tuple[str, ...]) -> Wanted:
        certs, trouble = self._certs, domain.trouble
        target = certs.cname_target or self._default_target(domain.app)
        try:
            resolved = self._resolver.addresses(target) if not certs.addresses else ()
        except CertificateError:
            resolved = ()
        is_limited = trouble is not None and trouble.failure is Failure.RATE_LIMITED
        is_asked = trouble is not None and trouble.failure is not Failure.NOT_POINTED
        return Wanted(
            hostname=domain.name,
            addresses_v4=tuple(one for one in certs.addresses if ":" not in one),
            addresses_v6=tuple(one for one in certs.addresses if ":" in one),
            cname_target=target,
            target_addresses=resolved,
            challenge_types=certs.challenges,
            has_dns_01=self._hook is not None,
            challenge_target=self.delegation_of(domain.name),
            challenge_values=tuple(
                value for host, value in tuple(self._txt_names) if host == domain.name.removeprefix("*.")
            ),
            ownership_value=self._ownership(domain.app),
            caa_identities=identities,
            account_uri=self._account_url(),
            rate_limited_until=trouble.next_try_at if trouble is not None and is_limited else 0.0,
            last_problem=(
                Problem(trouble.problem or trouble.failure.value, trouble.detail)
                if trouble is not None and is_asked and not is_limited
                else None
            ),
            listens_http=80 in self._ports,
            listens_https=443 in self._ports,
        )

    def delegation_of(self, hostname: str) -> str | None:
        """Where a customer's `_acme-challenge` CNAME is to point, if it can be somewhere of ours."""
        base = hostname.removeprefix("*.")
        if not self._certs.dns_delegation or base == self._own_domain or base.endswith("." + self._own_domain):
            return None
        label = hashlib.sha256(base.encode()).hexdigest()[:20]
        return f"{label}.{self._certs.dns_delegation}"

    async def _identities(self) -> Sequence[str]:
        if self._certs.issuer != "acme":
            return ()
        try:
            return await self._caa_identities()
        except AcmeError:
            return ()  # the CA cannot be asked now: its own judgement comes later

    async def is_pointed(self, domain: Domain) -> str:
        """ "" if it is worth asking the CA. Raises AcmeError where too many of strangers are looked at already."""
        if not self._certs.check_dns:
            return ""
        try:
            is_strangers = domain.origin is Origin.ON_DEMAND
            checked = await (self._check_strangers(domain) if is_strangers else self.check(domain))
        except AcmeError:
            raise
        except (CertificateError, OSError) as error:
            log.warning("DNS of %s could not be looked at, the CA is asked all the same: %s", domain.name, error)
            return ""
        return "" if checked.diagnosis.is_ready else said(checked.diagnosis.findings)

    async def is_owned(self, domain: Domain) -> str:
        """ "" if DNS shows whose name it is."""
        if not self._certs.check_dns:
            return ""
        diagnosis = (await self.check(domain)).diagnosis
        if diagnosis.ownership_proven_by is not None:
            return ""
        base = domain.name.removeprefix("*.")
        return (
            f"nothing in DNS shows that {domain.name} is of {domain.app}: point it here, or add the TXT record "
            f"_fly-ownership.{base} with {self._ownership(domain.app)}"
        )


def said(findings: Sequence[Finding]) -> str:
    """The first cause and what to do about it, in one line."""
    return f"{findings[0].message} {findings[0].remedy}" if findings else "DNS does not lead here"


def _hook(section: DnsHookSection | None) -> DnsHook | None:
    if section is None:
        return None
    if section.hook == "exec":
        return ExecHook(section.command, section.timeout_s)
    return Rfc2136Hook(
        section.server, section.zone or None, section.key_name, section.key_secret, section.key_algorithm, section.ttl,
        timeout_s=min(section.timeout_s, 30.0),
    )  # fmt: skip
