"""One order, from a name to a certificate that is stored, in steps that survive an end at any point.

    begun -> ordering -> ordered -> proving -> finalizing -> issued -> (stored; the record is deleted)

What a step decided is stored before the step acts: the key before the order is asked for, a challenge before it is
shown, and it is shown before the CA is told to look. After a kill the record says what may have happened, and the CA's
own word (the order's status) what did: an order is taken up again where the CA has it, and no second one is asked for
while the first lives. Where it cannot be known whether the CA heard the question, its list of our orders is read, if it
has one; CAs without (Let's Encrypt) answer a repeated question with the order that there is.

The record is also the right to act: it names its owner and until when, and is written by compare-and-set.
"""

from __future__ import annotations

import asyncio
import enum
import itertools
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from certs.certificate import Certificate
from certs.challenges import Challenge, ChallengeType, Presenter
from certs.errors import AcmeError, CertificateError, ConflictError, Failure, OrderHeldError
from certs.issuer import AcmeClient, Authorization, ChallengeBody, Order, Problem, csr_der
from certs.keys import key_to_pem, new_key, new_rsa_key
from certs.store import Store

_log = logging.getLogger("wakefront.certs")

LEASE_S = 120.0  # longer than any single wait of a step; written anew with every step
PROVE_PATIENCE_S = 180.0
FINALIZE_PATIENCE_S = 180.0
_OLDEST_S = 7 * 86_400.0  # CAs keep an order a week at the most
_LISTED_ORDERS = 30  # of the CA's list, the newest that are looked at
_PAUSES_S = (0.1, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0)
_LONGEST_PAUSE_S = 30.0
_CHAIN_MOST = 10


class KeyType(enum.StrEnum):
    ECDSA = "ecdsa"
    RSA = "rsa"


class Step(enum.StrEnum):
    BEGUN = "begun"  # the key is stored
    ORDERING = "ordering"  # the CA may have been asked
    ORDERED = "ordered"  # the order's URL is stored
    PROVING = "proving"  # challenges are stored, and shown
    FINALIZING = "finalizing"  # the CA may have our request for the certificate
    ISSUED = "issued"  # the CA has made it


@dataclass(frozen=True, slots=True)
class Want:
    """What is ordered. `avoid`: challenge types that have failed before, tried last."""

    names: tuple[str, ...]  # the first one names the order
    key_type: KeyType = KeyType.ECDSA
    profile: str = ""
    replaces: str = ""
    avoid: tuple[ChallengeType, ...] = ()


class Shown(msgspec.Struct, frozen=True):
    """A challenge that is shown, or may be."""

    type: str
    name: str
    token: str
    is_wildcard: bool
    key_authorization: str

    def challenge(self) -> Challenge:
        return Challenge(ChallengeType(self.type), self.name, self.token, self.key_authorization, self.is_wildcard)


class OrderRecord(msgspec.Struct):
    """The journal of one order."""

    directory: str
    names: tuple[str, ...]
    key_type: KeyType
    key_pem: str
    owner: str
    lease_until: float
    began_at: float
    step: Step = Step.BEGUN
    step_at: float = 0.0
    profile: str = ""
    replaces: str = ""
    url: str = ""
    expires_at: float = 0.0
    shown: tuple[Shown, ...] = ()

    def __repr__(self) -> str:  # without the key
        return f"OrderRecord({self.names!r}, {self.key_type}, {self.step}, url={self.url!r})"


def order_key(name: str, key_type: KeyType) -> str:
    """Where the record of an order lies in the store."""
    return f"order/{name}/{key_type}"


Keep = Callable[[Certificate], Awaitable[None]]


class OrderRun:
    """Carries one order through. Use it once."""

    def __init__(
        self,
        client: AcmeClient,
        store: Store,
        presenter: Presenter,
        now: Callable[[], float],
        owner: str,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        on_point: Callable[[str], None] = lambda point: None,
        prove_patience_s: float = PROVE_PATIENCE_S,
        finalize_patience_s: float = FINALIZE_PATIENCE_S,
    ) -> None:
        """`on_point(name)` is called at each point where an end would leave another state behind: for tests."""
        self._client = client
        self._store = store
        self._presenter = presenter
        self._now = now
        self._owner = owner
        self._sleep = sleep
        self._point = on_point
        self._prove_patience_s = prove_patience_s
        self._finalize_patience_s = finalize_patience_s
        self._revision = 0
        self._record: OrderRecord | None = None
        self._want: Want | None = None
        self.asked = False  # whether a new order was asked for: that is what CAs count

    async def run(self, want: Want, keep: Keep) -> Certificate:
        """The certificate, after `keep` has stored it.

        An order that is under way is gone on with. Raises AcmeError: the order has ended where the failure says so, and
        is otherwise gone on with by the next run; OrderHeldError while another node has it; OSError where the store
        cannot be written.
        """
        self._want = want
        await self._take(want)
        try:
            certificate = await self._steps(want)
            await keep(certificate)
            self._point("stored")
            await self._end()
            return certificate
        except AcmeError as error:
            if error.problem == "accountDoesNotExist":
                await self._client.forget_account()
            if error.failure in _ENDING or error.problem == "accountDoesNotExist" or self._is_gone(error):
                await self._end()
            raise

    # --- the record

    async def _take(self, want: Want) -> None:
        """The right to act: the record of the order under way, or a new one with its key."""
        key = order_key(want.names[0], want.key_type)
        entry = await asyncio.to_thread(self._store.get, key)
        now = self._now()
        if entry is not None:
            self._revision = entry.revision
            try:
                record = msgspec.json.decode(entry.value, type=OrderRecord)
            except msgspec.MsgspecError as error:
                _log.error("the journal of the order for %s cannot be read, it begins anew: %s", want.names[0], error)
            else:
                if record.owner != self._owner and now < record.lease_until < now + 2 * LEASE_S:
                    raise OrderHeldError(f"{want.names[0]}: {record.owner} has this order under way")
                self._record = record
                if self._is_wanted(record, want, now):
                    await self._save()
                    return
                await self._clean_up()
        key_pem = await asyncio.to_thread(_new_key_pem, want.key_type)
        self._record = OrderRecord(
            self._client.directory_url, want.names, want.key_type, key_pem.decode(), self._owner, 0.0, now,
            profile=want.profile, replaces=want.replaces,
        )  # fmt: skip
        await self._save(Step.BEGUN)

    def _is_wanted(self, record: OrderRecord, want: Want, now: float) -> bool:
        """Whether the order under way is one to go on with."""
        return (
            (record.directory, record.names, record.profile) == (self._client.directory_url, want.names, want.profile)
            and now < record.began_at + _OLDEST_S
            and not 0 < record.expires_at < now
        )

    async def _save(self, step: Step | None = None) -> None:
        record = self._known
        now = self._now()
        if step is not None and step is not record.step:
            record.step, record.step_at = step, now
        record.step_at = record.step_at or now
        record.owner, record.lease_until = self._owner, now + LEASE_S
        key = order_key(record.names[0], record.key_type)
        self._revision = await asyncio.to_thread(self._store.put, key, msgspec.json.encode(record), self._revision)
        self._point(f"{record.step}: stored")

    async def _end(self) -> None:
        """The order is over: what was shown is taken away, then the record."""
        await self._clean_up()
        record = self._known
        try:
            await asyncio.to_thread(self._store.delete, order_key(record.names[0], record.key_type), self._revision)
        except ConflictError as error:
            _log.warning("the record of an order was changed by another: %s", error)

    @property
    def record(self) -> OrderRecord | None:
        """The journal, once there is one."""
        return self._record

    @property
    def _known(self) -> OrderRecord:
        assert self._record is not None
        return self._record

    @staticmethod
    def _is_gone(error: AcmeError) -> bool:
        return error.status == 404

    # --- the steps

    async def _steps(self, want: Want) -> Certificate:
        record = self._known
        order = await (self._client.order(record.url) if record.url else self._obtain(want))
        loop = asyncio.get_running_loop()
        begun, pause = loop.time(), 0
        is_finalized = False
        while True:
            match order.status:
                case "pending":
                    await self._prove(order, want)
                    order = await self._client.order(order.url)
                    if order.status == "pending":  # its authorizations are valid: it follows in a moment
                        pause = await self._wait(pause, order.retry_after_s, begun, self._prove_patience_s, "pending")
                    continue
                case "ready":
                    await self._save(Step.FINALIZING)
                    order = await self._finalize(order)
                    if not is_finalized:  # once: a CA that never gets further has the patience for one finalization
                        begun, pause, is_finalized = loop.time(), 0, True
                    if order.status in ("ready", "pending"):
                        said = order.status
                        pause = await self._wait(pause, order.retry_after_s, begun, self._finalize_patience_s, said)
                    continue
                case "processing":
                    pause = await self._wait(pause, order.retry_after_s, begun, self._finalize_patience_s, "processing")
                    order = await self._client.order(order.url)
                case "valid" if order.certificate_url:
                    await self._save(Step.ISSUED)
                    chain = await self._client.certificate(order.certificate_url)
                    self._point("issued: downloaded")
                    now = self._now() + self._client.clock_skew_s
                    return judge_issued(record.names, chain, record.key_pem.encode(), now)
                case "invalid":
                    raise await self._why_invalid(order)
                case other:
                    raise AcmeError(Failure.SERVER, f"the CA's order has the status {other[:40]!r}")

    async def _obtain(self, want: Want) -> Order:
        record = self._known
        order = await self._lost_order() if record.step is Step.ORDERING else None
        if order is None:
            await self._save(Step.ORDERING)
            order = await self._client.new_order(want.names, want.profile, want.replaces)
            self.asked = True
            self._point("ordering: answered")
        if set(order.names) != set(want.names):
            raise AcmeError(
                Failure.SERVER, f"the CA's order is for {', '.join(order.names)[:200]}, not {', '.join(want.names)}"
            )
        record.url, record.expires_at = order.url, order.expires_at
        await self._save(Step.ORDERED)
        return order

    async def _lost_order(self) -> Order | None:
        """An order that a process asked for which was killed before it could store the answer."""
        wanted = set(self._known.names)
        for url in reversed((await self._client.open_orders())[-_LISTED_ORDERS:]):
            order = await self._client.order(url)
            if set(order.names) == wanted and order.status in ("pending", "ready"):
                return order
        return None

    async def _finalize(self, order: Order) -> Order:
        record = self._known
        csr = await asyncio.to_thread(csr_der, record.names, record.key_pem.encode())
        try:
            done = await self._client.finalize(order, csr)
        except AcmeError as error:
            if error.problem != "orderNotReady":
                raise
            done = await self._client.order(order.url)
        self._point("finalizing: answered")
        return done

    async def _wait(self, pause: int, retry_after_s: float, begun: float, patience_s: float, status: str) -> int:
        """A pause between two looks, as long as the CA asks; the number of the next one."""
        if asyncio.get_running_loop().time() - begun > patience_s:
            raise AcmeError(Failure.STUCK, f"the CA's order has been {status} for {patience_s:g} s")
        own = _PAUSES_S[min(pause, len(_PAUSES_S) - 1)]
        await self._sleep(min(max(own, retry_after_s), _LONGEST_PAUSE_S))
        if pause % 8 == 7:
            await self._save()  # the lease goes on
        return pause + 1

    # --- proofs

    async def _prove(self, order: Order, want: Want) -> None:
        """See that every authorization of the order is valid."""
        found = [await self._client.authorization(url) for url in order.authorizations]
        open_ones = [one for one in found if one.status == "pending"]
        for one in found:
            if one.status not in ("pending", "valid"):
                raise self._failed(one)
        chosen = [(one, self._choose(one, want)) for one in open_ones]
        if chosen:
            await self._show(chosen)
        try:
            for _, body in chosen:
                if body.status == "pending":
                    await self._client.answer(body.url)
                    self._point("proving: answered")
            for one, body in chosen:
                await self._proved(one, body)
        except BaseException as error:
            if isinstance(error, AcmeError) and error.failure is not Failure.VALIDATION:
                raise  # the challenges may still be looked at: they stay for the next run
            if isinstance(error, AcmeError):
                await self._clean_up()
            raise
        await self._clean_up()

    def _choose(self, authorization: Authorization, want: Want) -> ChallengeBody:
        offered = {one.type: one for one in authorization.challenges if one.type in set(ChallengeType)}
        own = self._presenter.types(authorization.name, authorization.is_wildcard)
        begun = [one for one in offered.values() if one.status == "processing"]
        if begun:
            return begun[0]
        for kind in (*(one for one in own if one not in want.avoid), *want.avoid):
            if kind in own and kind in offered:
                return offered[kind]
        name = ("*." if authorization.is_wildcard else "") + authorization.name
        raise AcmeError(
            Failure.REFUSED,
            f"{name}: the CA offers {', '.join(sorted(offered)) or 'nothing that we know'}, and this node can show "
            f"{', '.join(own) or 'nothing'}"
            + (": a wildcard needs DNS-01, see [certs.dns]" if authorization.is_wildcard and not own else ""),
        )

    async def _show(self, chosen: Sequence[tuple[Authorization, ChallengeBody]]) -> None:
        record = self._known
        shown = tuple(
            Shown(body.type, one.name, body.token, one.is_wildcard, self._client.key_authorization(body.token))
            for one, body in chosen
        )
        record.shown = tuple(dict.fromkeys((*record.shown, *shown)))
        await self._save(Step.PROVING)
        for one in shown:
            try:
                await self._presenter.present(one.challenge())
            except AcmeError:
                raise
            except (CertificateError, OSError) as error:
                failure = Failure.DNS_HOOK if one.type == ChallengeType.DNS_01 else Failure.STORAGE
                raise AcmeError(failure, f"{one.name}: the {one.type} challenge cannot be shown: {error}") from error
        self._point("proving: shown")

    async def _proved(self, one: Authorization, body: ChallengeBody) -> None:
        begun, pause = asyncio.get_running_loop().time(), 0
        while True:
            now = await self._client.authorization(one.url)
            if now.status == "valid":
                return
            if now.status != "pending":
                raise self._failed(now, body.type)
            try:
                pause = await self._wait(pause, now.retry_after_s, begun, self._prove_patience_s, "pending")
            except AcmeError as error:
                raise AcmeError(
                    Failure.STUCK,
                    f"the CA has not looked at {one.name} by {body.type} for {self._prove_patience_s:g} s",
                    challenge=body.type,
                ) from error  # fmt: skip

    def _failed(self, one: Authorization, challenge: str = "") -> AcmeError:
        problem = one.problem
        tried = challenge or next((body.type for body in one.challenges if body.error is not None), "")
        said = str(problem) if problem is not None else f"the authorization is {one.status}"
        by = f" by {tried}" if tried else ""
        return AcmeError(
            Failure.RATE_LIMITED if problem is not None and problem.code == "rateLimited" else Failure.VALIDATION,
            f"the CA could not verify {one.name}{by}: {said}",
            problem=problem.code if problem is not None else "",
            challenge=tried,
        )

    async def _why_invalid(self, order: Order) -> AcmeError:
        for url in order.authorizations:
            one = await self._client.authorization(url)
            if one.status == "invalid":
                return self._failed(one)
        error = order.error or Problem(detail="it does not say why")
        failure = Failure.RATE_LIMITED if error.code == "rateLimited" else Failure.VALIDATION
        return AcmeError(failure, f"the CA ended the order: {error}", problem=error.code)

    async def _clean_up(self) -> None:
        """Take away what was shown; what cannot be is told, and left."""
        record = self._known
        if not record.shown:
            return
        for one in record.shown:
            try:
                await self._presenter.clean_up(one.challenge())
            except (CertificateError, OSError) as error:
                _log.warning("the %s challenge of %s could not be taken away: %s", one.type, one.name, error)
        record.shown = ()


# Failures that leave no order worth going on with.
_ENDING = frozenset({Failure.VALIDATION, Failure.REFUSED, Failure.WRONG_CERTIFICATE})


def _new_key_pem(key_type: KeyType) -> bytes:
    return key_to_pem(new_rsa_key() if key_type is KeyType.RSA else new_key())


def judge_issued(names: Sequence[str], chain_pem: bytes, key_pem: bytes, now: float) -> Certificate:
    """What the CA gave, if it is what was asked for. `now`: unix seconds, by the CA's clock where ours may be wrong.

    Raises AcmeError(WRONG_CERTIFICATE).
    """
    what = f"what the CA gave for {', '.join(names)}"
    try:
        chain = x509.load_pem_x509_certificates(chain_pem)
    except ValueError as error:
        raise AcmeError(Failure.WRONG_CERTIFICATE, f"{what} is not a chain of certificates: {error}") from error
    if len(chain) > _CHAIN_MOST:
        raise AcmeError(Failure.WRONG_CERTIFICATE, f"{what} is a chain of {len(chain)}, more than {_CHAIN_MOST}")
    leaf = chain[0]
    key = serialization.load_pem_private_key(key_pem, password=None)
    spki = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    if leaf.public_key().public_bytes(*spki) != key.public_key().public_bytes(*spki):
        raise AcmeError(Failure.WRONG_CERTIFICATE, f"{what} is for another key than ours")
    try:
        given = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        there = {one.lower() for one in given.get_values_for_type(x509.DNSName)}
    except (x509.ExtensionNotFound, ValueError):
        there = set()
    if missing := [name for name in names if name not in there]:
        raise AcmeError(Failure.WRONG_CERTIFICATE, f"{what} is not for {', '.join(missing)}")
    if leaf.not_valid_after_utc.timestamp() <= now:
        raise AcmeError(Failure.WRONG_CERTIFICATE, f"{what} has expired already, on {leaf.not_valid_after_utc:%F %T}")
    if leaf.not_valid_before_utc.timestamp() > now + 3600:
        raise AcmeError(Failure.WRONG_CERTIFICATE, f"{what} is not valid before {leaf.not_valid_before_utc:%F %T}")
    for lower, upper in itertools.pairwise(chain):
        try:
            lower.verify_directly_issued_by(upper)
        except Exception as error:  # InvalidSignature, ValueError, TypeError: by how it does not fit
            raise AcmeError(
                Failure.WRONG_CERTIFICATE, f"{what} is no chain: {upper.subject.rfc4514_string()[:80]!r} did not issue "
                f"{lower.subject.rfc4514_string()[:80]!r}",
            ) from error  # fmt: skip
    pem = b"".join(one.public_bytes(serialization.Encoding.PEM) for one in chain)
    return Certificate(names[0], pem, key_pem)
