"""A client of one ACME CA (RFC 8555): each method is one step, each step is bounded in time and size.

Signatures, account keys and external account binding are the `acme` package's; its own network layer is not used, since
a CA that drips its answer byte by byte would hold a thread for ever. What the CA says is read into the small values
below, and whatever does not fit them is an AcmeError, as is every failure on the way.

Which step comes next, and what is remembered between two, is order.py's matter.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime
import hashlib
import json
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urljoin

import aiohttp
import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from certs.errors import AcmeError, CertificateError, ConflictError, Failure
from certs.keys import key_from_pem, key_to_pem, new_key
from certs.renewal import RenewalWindow
from certs.store import Entry, Store

_PREFIX = "urn:ietf:params:acme:error:"
_MAX_BYTES = 512 * 1024  # of an answer; chains have some 5 KB
_AUTHORIZATIONS_MOST = 100  # of an order: CAs take no more names in one
_LIST_PAGES = 50
_NONCES_KEPT = 32
_NONCE_TRIES = 6  # Pebble refuses one in twenty good nonces, on purpose
_DETAIL_CHARS = 600
_CONNECT_S = 10.0
_ARI_ASK_AGAIN_S = 6 * 3600.0  # RFC 9773 §4.3.3, where the CA names no time

# Which failure a problem type is (RFC 8555 §6.7, RFC 9773 §7.4); the rest go by their status.
_FAILURES = {
    "badNonce": Failure.SERVER,
    "rateLimited": Failure.RATE_LIMITED,
    "serverInternal": Failure.SERVER,
    "accountDoesNotExist": Failure.ACCOUNT,
    "externalAccountRequired": Failure.ACCOUNT,
    "unauthorized": Failure.ACCOUNT,
    "userActionRequired": Failure.ACCOUNT,
    "invalidContact": Failure.ACCOUNT,
    "unsupportedContact": Failure.ACCOUNT,
}

T = TypeVar("T")
Json = dict[str, Any]  # Any: JSON


class Problem(msgspec.Struct, frozen=True):
    """What a CA says went wrong (RFC 7807)."""

    type: str = "about:blank"
    detail: str = ""
    title: str = ""
    status: int = 0
    subproblems: tuple[Problem, ...] = ()
    identifier: dict[str, str] | None = None

    @property
    def code(self) -> str:
        return self.type.removeprefix(_PREFIX) if self.type.startswith(_PREFIX) else ""

    def __str__(self) -> str:
        own = self.detail or self.title or self.type
        parts = [own, *(f"{(one.identifier or {}).get('value', '')}: {one}" for one in self.subproblems[:8])]
        return _shown("; ".join(parts))


class _Identifier(msgspec.Struct, frozen=True):
    type: str
    value: str


class _OrderBody(msgspec.Struct, frozen=True):
    status: str
    identifiers: tuple[_Identifier, ...]
    authorizations: tuple[str, ...]
    finalize: str
    certificate: str | None = None
    expires: datetime.datetime | None = None
    error: Problem | None = None


@dataclass(frozen=True, slots=True)
class Order:
    """An order as the CA has it (RFC 8555 §7.1.3): pending, ready, processing, valid or invalid."""

    url: str
    status: str
    names: tuple[str, ...]
    authorizations: tuple[str, ...]
    finalize_url: str
    certificate_url: str
    expires_at: float  # unix seconds; 0 where the CA does not say
    error: Problem | None
    retry_after_s: float


class ChallengeBody(msgspec.Struct, frozen=True):
    """A challenge that an authorization offers."""

    type: str
    url: str = ""
    status: str = "pending"
    token: str = ""
    error: Problem | None = None


class _AuthorizationBody(msgspec.Struct, frozen=True):
    identifier: _Identifier
    status: str
    challenges: tuple[ChallengeBody, ...] = ()
    wildcard: bool = False


@dataclass(frozen=True, slots=True)
class Authorization:
    """The CA's question about one name (RFC 8555 §7.1.4)."""

    url: str
    name: str  # without `*.`
    status: str
    challenges: tuple[ChallengeBody, ...]
    is_wildcard: bool
    retry_after_s: float

    @property
    def problem(self) -> Problem | None:
        return next((one.error for one in self.challenges if one.error is not None), None)


class _Directory(msgspec.Struct, frozen=True):
    newNonce: str  # the names of RFC 8555 §7.1.1
    newAccount: str
    newOrder: str
    keyChange: str = ""
    renewalInfo: str = ""
    meta: _DirectoryMeta | None = None


class _DirectoryMeta(msgspec.Struct, frozen=True):
    externalAccountRequired: bool = False
    caaIdentities: tuple[str, ...] = ()
    profiles: dict[str, str] = {}


class _AccountBody(msgspec.Struct, frozen=True):
    status: str = "valid"
    orders: str = ""


class _OrdersBody(msgspec.Struct, frozen=True):
    orders: tuple[str, ...] = ()


class _Window(msgspec.Struct, frozen=True):
    start: datetime.datetime
    end: datetime.datetime


class _RenewalBody(msgspec.Struct, frozen=True):
    suggestedWindow: _Window
    explanationURL: str = ""


@dataclass(frozen=True, slots=True)
class RenewalInfo:
    window: RenewalWindow
    ask_again_at: float  # unix seconds


class AccountRecord(msgspec.Struct):
    """What is kept of our account with a CA. The keys do not show in a repr."""

    directory: str
    key_pem: str
    url: str = ""  # "": not registered yet
    email: str = ""
    next_key_pem: str = ""  # of a key rollover that may or may not have reached the CA
    created_at: float = 0.0

    def __repr__(self) -> str:
        return f"AccountRecord({self.directory!r}, url={self.url!r})"


@dataclass(frozen=True, slots=True)
class ExternalAccount:
    """External account binding (RFC 8555 §7.3.4), as a CA hands it out: a key id and a base64url MAC key."""

    kid: str
    hmac_key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes
    url: str
    next_url: str = ""  # of the page after this one (RFC 8555 §7.1.2.1)


class AcmeClient:
    """Belongs to one event loop. `close` it at the end.

    The account is registered on first use; its key was stored before. All methods raise AcmeError; OSError where
    the store cannot be written.
    """

    def __init__(
        self,
        directory_url: str,
        store: Store,
        now: Callable[[], float],
        *,
        ca_file: str | None = None,
        email: str = "",
        external_account: ExternalAccount | None = None,
        user_agent: str = "wakefront",
        request_timeout_s: float = 30.0,
    ) -> None:
        """`now`: unix seconds. `ca_file`: PEM of roots to trust for the CA's API, in place of the system's."""
        self.directory_url = directory_url
        self._store = store
        self._now = now
        self._ca_file = ca_file
        self._email = email
        self._external = external_account
        self._user_agent = user_agent
        self._timeout_s = request_timeout_s
        self._session: aiohttp.ClientSession | None = None
        self._directory: _Directory | None = None
        self._nonces: list[str] = []
        self._account: AccountRecord | None = None
        self._jwk: Any = None  # Any: josepy is loaded late, it costs 0.2 s and 30 MB
        self._opening = asyncio.Lock()
        self._connecting = asyncio.Lock()
        self.clock_skew_s = 0.0  # the CA's clock less ours, by its last Date

    # --- what there is at the CA

    @property
    def account(self) -> AccountRecord | None:
        """The account, once something was asked of the CA."""
        return self._account

    @property
    def account_key(self) -> str:
        """The key of the account's record in the store."""
        return account_key(self.directory_url)

    async def open(self) -> AccountRecord:
        """The account, registered if it is not yet."""
        async with self._opening:
            if self._account is None or not self._account.url:
                await self._open_account()
            assert self._account is not None
            return self._account

    async def caa_identities(self) -> tuple[str, ...]:
        """Names that a CAA record may hold to permit this CA."""
        directory = await self._get_directory()
        return directory.meta.caaIdentities if directory.meta else ()

    async def profiles(self) -> Mapping[str, str]:
        """Profiles that orders may name, and what the CA says of each; empty where it has none."""
        directory = await self._get_directory()
        return directory.meta.profiles if directory.meta else {}

    async def has_renewal_info(self) -> bool:
        return bool((await self._get_directory()).renewalInfo)

    # --- orders

    async def new_order(self, names: Sequence[str], profile: str = "", replaces: str = "") -> Order:
        """A new order; the CA may answer with one that there is already.

        `replaces` is the certificate id (`certificate_id`) of the one to be renewed. A CA that says it was replaced
        already, or that knows no such thing, is asked again without.
        """
        directory = await self._get_directory()
        payload: Json = {"identifiers": [{"type": "dns", "value": name} for name in names]}
        if profile:
            offered = await self.profiles()
            if profile not in offered:
                there = f"it has {', '.join(sorted(offered))}" if offered else "it has none"
                raise AcmeError(Failure.REFUSED, f"the CA has no profile {profile!r}: {there}")
            payload["profile"] = profile
        if replaces and directory.renewalInfo:
            payload["replaces"] = replaces
        try:
            answer = await self._post(directory.newOrder, payload)
        except AcmeError as error:
            if "replaces" not in payload or error.problem not in ("alreadyReplaced", "malformed"):
                raise
            del payload["replaces"]
            answer = await self._post(directory.newOrder, payload)
        url = self._location(answer, "a new order")
        return self._order(url, answer)

    async def order(self, url: str) -> Order:
        return self._order(url, await self._fetch(url))

    async def open_orders(self) -> list[str]:
        """URLs of the account's orders, newest last, as far as the CA lists them (RFC 8555 §7.1.2.1); most do not."""
        account = await self.open()
        body = _read(_AccountBody, await self._fetch(account.url))
        if not body.orders:
            return []
        orders: list[str] = []
        url = body.orders
        for _ in range(_LIST_PAGES):
            answer = await self._fetch(url)
            orders += _read(_OrdersBody, answer).orders
            url = answer.next_url
            if not url:
                break
        return orders

    async def authorization(self, url: str) -> Authorization:
        answer = await self._fetch(url)
        body = _read(_AuthorizationBody, answer)
        return Authorization(
            url, body.identifier.value.lower(), body.status, body.challenges, body.wildcard, self._retry_after_s(answer)
        )

    async def answer(self, challenge_url: str) -> None:
        """Tell the CA that it may look."""
        await self._post(challenge_url, {})  # `{}`, not nothing: that would only read it (RFC 8555 §7.5.1)

    async def finalize(self, order: Order, csr_der: bytes) -> Order:
        return self._order(order.url, await self._post(order.finalize_url, {"csr": _b64(csr_der)}))

    async def certificate(self, url: str) -> bytes:
        """The chain, leaf first, as PEM."""
        return (await self._fetch(url, accept="application/pem-certificate-chain")).body

    async def renewal_info(self, leaf: x509.Certificate) -> RenewalInfo | None:
        """When the CA would have it renewed (RFC 9773); None where it does not say."""
        directory = await self._get_directory()
        certificate = certificate_id(leaf)
        if not directory.renewalInfo or not certificate:
            return None
        answer = self._checked(await self._request("GET", f"{directory.renewalInfo.rstrip('/')}/{certificate}"))
        body = _read(_RenewalBody, answer)
        begins, ends = body.suggestedWindow.start.timestamp(), body.suggestedWindow.end.timestamp()
        if not begins < ends:
            raise AcmeError(Failure.SERVER, "the CA suggests a renewal window that ends before it begins")
        wait = self._retry_after_s(answer) or _ARI_ASK_AGAIN_S
        wait = min(max(wait, 60.0), 24 * 3600.0)  # RFC 9773 §4.3.2: bounds of our own
        return RenewalInfo(RenewalWindow(begins, ends, body.explanationURL), self._now() + wait)

    def key_authorization(self, token: str) -> str:
        """RFC 8555 §8.1. The account must be open."""
        return f"{token}.{_b64(self._jwk.thumbprint())}"

    # --- the account

    async def roll_key(self) -> AccountRecord:
        """Give the account a new key (RFC 8555 §7.3.5). Survives an end at any point: the new key is stored first."""
        directory = await self._get_directory()
        if not directory.keyChange:
            raise AcmeError(Failure.REFUSED, "the CA offers no change of keys")
        async with self._opening:
            self._account = None  # one that was cut off before is settled first: its key may be the one that counts
            await self._open_account()
            assert self._account is not None
            account = self._account
            new_pem = key_to_pem(new_key()).decode()
            account = await self._save(msgspec.structs.replace(account, next_key_pem=new_pem))
            new_jwk = _jwk(new_pem)
            inner = self._signed(
                {"account": account.url, "oldKey": self._jwk.public_key().to_partial_json()},
                new_jwk, None, directory.keyChange,
            )  # fmt: skip
            try:
                await self._post(directory.keyChange, json.loads(inner))
            except BaseException:
                self._account = None  # the CA may have it or not: whoever is next finds out
                raise
            return await self._save(msgspec.structs.replace(account, key_pem=new_pem, next_key_pem=""))

    async def _open_account(self) -> None:
        entry = await asyncio.to_thread(self._store.get, self.account_key)
        if entry is None:
            key_pem = (await asyncio.to_thread(lambda: key_to_pem(new_key()))).decode()
            account = AccountRecord(self.directory_url, key_pem, email=self._email, created_at=self._now())
            try:
                await asyncio.to_thread(self._store.put, self.account_key, msgspec.json.encode(account), 0)
            except ConflictError:  # another node was first
                entry = await asyncio.to_thread(self._store.get, self.account_key)
                assert entry is not None
        if entry is not None:
            account = _stored_account(entry)
        await asyncio.to_thread(_load_jose)
        self._use(account)
        if account.next_key_pem:
            account = await self._settle_rollover(account)
        if not account.url or account.email != self._email:
            await self._register(account)

    async def _settle_rollover(self, account: AccountRecord) -> AccountRecord:
        """A rollover was cut off: the CA knows which key counts (RFC 8555 §7.3.1)."""
        self._use(msgspec.structs.replace(account, key_pem=account.next_key_pem, url=""))
        directory = await self._get_directory()
        try:
            await self._post(directory.newAccount, {"onlyReturnExisting": True})
        except AcmeError as error:
            if error.problem != "accountDoesNotExist":
                raise
            return await self._save(msgspec.structs.replace(account, next_key_pem=""))
        return await self._save(msgspec.structs.replace(account, key_pem=account.next_key_pem, next_key_pem=""))

    async def _register(self, account: AccountRecord) -> None:
        """Make the account, or find the one that this key has, or tell it another address."""
        directory = await self._get_directory()
        contact = [f"mailto:{self._email}"] if self._email else []
        if account.url:
            await self._post(account.url, {"contact": contact})
            await self._save(msgspec.structs.replace(account, email=self._email))
            return
        payload: Json = {"termsOfServiceAgreed": True}
        if contact:
            payload["contact"] = contact
        if self._external is not None:
            payload["externalAccountBinding"] = self._binding(directory.newAccount)
        elif directory.meta is not None and directory.meta.externalAccountRequired:
            raise AcmeError(
                Failure.ACCOUNT,
                "the CA wants an external account: set acme_eab_kid and acme_eab_hmac_key of [certs] as it gave them",
                problem="externalAccountRequired",
            )
        answer = await self._post(directory.newAccount, payload)
        body = _read(_AccountBody, answer)
        if body.status != "valid":
            raise AcmeError(Failure.ACCOUNT, f"the CA says that our account is {_shown(body.status)}")
        url = self._location(answer, "an account")
        await self._save(msgspec.structs.replace(account, url=url, email=self._email))

    def _binding(self, url: str) -> Json:
        from acme import messages

        assert self._external is not None
        directory = messages.Directory({"newAccount": url})
        try:
            return messages.ExternalAccountBinding.from_data(
                self._jwk.public_key(), self._external.kid, self._external.hmac_key, directory
            )
        except Exception as error:  # what josepy raises for a key that is no base64 is not one type
            raise AcmeError(
                Failure.ACCOUNT, f"acme_eab_hmac_key is not a base64url key as the CA hands them out: {error}"
            ) from error

    async def _save(self, account: AccountRecord) -> AccountRecord:
        await asyncio.to_thread(self._store.put, self.account_key, msgspec.json.encode(account))
        self._use(account)
        return account

    def _use(self, account: AccountRecord) -> None:
        self._account = account
        self._jwk = _jwk(account.key_pem)

    async def forget_account(self) -> None:
        """The CA does not know the account any more: it is registered anew, with the same key, when next needed."""
        async with self._opening:
            if self._account is not None:
                await self._save(msgspec.structs.replace(self._account, url=""))
                self._account = None

    # --- the wire

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _get_directory(self) -> _Directory:
        if self._directory is None:
            answer = self._checked(await self._request("GET", self.directory_url))
            self._directory = _read(_Directory, answer)
        return self._directory

    async def _fetch(self, url: str, accept: str = "application/json") -> _Answer:
        return await self._post(url, None, accept)

    async def _post(self, url: str, payload: Json | None, accept: str = "application/json") -> _Answer:
        """POST, or POST-as-GET where the payload is None (RFC 8555 §6.3). A refused nonce is taken up again."""
        directory = await self._get_directory()
        is_account = url == directory.newAccount
        if not is_account and (self._account is None or not self._account.url):
            await self.open()
        assert self._account is not None
        kid = None if is_account else self._account.url
        for attempt in range(1, _NONCE_TRIES + 1):
            signed = self._signed(payload, self._jwk, await self._nonce(directory), url, kid)
            answer = await self._request("POST", url, signed, accept)
            if (fresh := answer.headers.get("Replay-Nonce")) and len(self._nonces) < _NONCES_KEPT:
                self._nonces.append(fresh)
            try:
                return self._checked(answer)
            except AcmeError as error:
                if error.problem == "badNonce" and attempt < _NONCE_TRIES:
                    continue
                raise
        raise AssertionError("the last attempt returns or raises")

    async def _nonce(self, directory: _Directory) -> str:
        if self._nonces:
            return self._nonces.pop()
        answer = await self._request("HEAD", directory.newNonce)
        nonce = answer.headers.get("Replay-Nonce")
        if not nonce:
            self._checked(answer)
            raise AcmeError(Failure.SERVER, f"the CA gave no nonce (status {answer.status} of {directory.newNonce})")
        return nonce

    def _signed(self, payload: Json | None, jwk: Any, nonce: str | None, url: str, kid: str | None = None) -> bytes:
        from acme.jws import JWS
        from josepy.errors import DeserializationError
        from josepy.json_util import decode_b64jose
        from josepy.jwa import ES256

        content = b"" if payload is None else json.dumps(payload).encode()
        try:
            nonce_bytes = decode_b64jose(nonce) if nonce is not None else None
        except DeserializationError as error:
            raise AcmeError(Failure.SERVER, f"the CA's nonce {_shown(str(nonce))!r} is not base64url") from error
        signed: str = JWS.sign(content, jwk, ES256, nonce_bytes, url, kid).json_dumps()
        return signed.encode()

    async def _request(self, method: str, url: str, body: bytes | None = None, accept: str = "") -> _Answer:
        headers = {"User-Agent": self._user_agent, "Accept-Language": "en"}
        if accept:
            headers["Accept"] = accept
        if body is not None:
            headers["Content-Type"] = "application/jose+json"
        async with self._as_acme_error(url):
            session = await self._get_session()
            timeout = aiohttp.ClientTimeout(total=self._timeout_s, sock_connect=_CONNECT_S)
            async with session.request(
                method,
                url,
                data=body,
                headers=headers,
                timeout=timeout,
                allow_redirects=method != "POST",
                max_redirects=3,
            ) as response:
                content = bytearray()
                async for chunk in response.content.iter_chunked(65_536):
                    content += chunk
                    if len(content) > _MAX_BYTES:
                        raise AcmeError(Failure.SERVER, f"the answer of {url} is over {_MAX_BYTES} bytes")
                self._note_date(response.headers.get("Date"))
                following = response.links.get("next")
                next_url = str(following.get("url", "")) if following is not None else ""
                return _Answer(response.status, response.headers, bytes(content), url, next_url)

    @contextlib.asynccontextmanager
    async def _as_acme_error(self, url: str) -> AsyncIterator[None]:
        try:
            yield
        except TimeoutError as error:
            raise AcmeError(Failure.NETWORK, f"{url} did not answer within {self._timeout_s:g} s") from error
        except aiohttp.ClientConnectorCertificateError as error:
            raise AcmeError(
                Failure.NETWORK,
                f"the certificate of {url} is not trusted ({error.certificate_error}): acme_ca_file of [certs] "
                "names the roots of a CA that is not a public one",
            ) from error
        except aiohttp.InvalidURL as error:
            raise AcmeError(Failure.SERVER, f"{_shown(url)!r} is not a URL that can be asked") from error
        except (aiohttp.ClientError, OSError) as error:
            raise AcmeError(Failure.NETWORK, f"{url} cannot be reached: {error or type(error).__name__}") from error

    async def _get_session(self) -> aiohttp.ClientSession:
        async with self._connecting:  # one, however many come first at once
            if self._session is None:
                try:
                    context = await asyncio.to_thread(ssl.create_default_context, cafile=self._ca_file)
                except (OSError, ssl.SSLError) as error:
                    raise AcmeError(Failure.NETWORK, f"acme_ca_file {self._ca_file} cannot be used: {error}") from error
                connector = aiohttp.TCPConnector(ssl=context, limit=16)
                self._session = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())
            return self._session

    def _note_date(self, text: str | None) -> None:
        with contextlib.suppress(ValueError, TypeError):
            self.clock_skew_s = parsedate_to_datetime(text or "").timestamp() - self._now()

    def _checked(self, answer: _Answer) -> _Answer:
        """The answer, if it is no error. Raises AcmeError with what the CA says."""
        if 200 <= answer.status < 300:
            return answer
        retry_after_s = self._retry_after_s(answer)
        try:
            problem = msgspec.json.decode(answer.body, type=Problem)
        except msgspec.MsgspecError:
            text = _shown(answer.body[:200].decode("utf-8", "replace"))
            failure = Failure.RATE_LIMITED if answer.status == 429 else Failure.SERVER
            raise AcmeError(
                failure,
                f"{answer.url} answered {answer.status}: {text!r}",
                retry_after_s=retry_after_s,
                status=answer.status,
            ) from None
        failure = _FAILURES.get(problem.code) or (
            Failure.SERVER if answer.status >= 500 else
            Failure.RATE_LIMITED if answer.status == 429 else Failure.REFUSED
        )  # fmt: skip
        named = f" ({problem.code})" if problem.code else f" ({answer.status})"
        raise AcmeError(
            failure,
            f"the CA says{named}: {problem}",
            problem=problem.code,
            retry_after_s=retry_after_s,
            status=answer.status,
        )

    def _order(self, url: str, answer: _Answer) -> Order:
        body = _read(_OrderBody, answer)
        if len(body.authorizations) > _AUTHORIZATIONS_MOST:
            raise AcmeError(
                Failure.SERVER,
                f"the order {_shown(url)} has {len(body.authorizations)} authorizations: "
                f"{_AUTHORIZATIONS_MOST} at most are looked at",
            )
        return Order(
            url,
            body.status,
            tuple(sorted(one.value.lower() for one in body.identifiers)),
            body.authorizations,
            body.finalize,
            body.certificate or "",
            body.expires.timestamp() if body.expires else 0.0,
            body.error,
            self._retry_after_s(answer),
        )

    def _location(self, answer: _Answer, what: str) -> str:
        if not (location := answer.headers.get("Location")):
            raise AcmeError(
                Failure.SERVER, f"{answer.url} answered with {what} and does not say where it is (no Location)"
            )
        return urljoin(answer.url, location)

    def _retry_after_s(self, answer: _Answer) -> float:
        """Seconds, from either form (RFC 9110 §10.2.3); 0 where there is none or it cannot be read."""
        text = answer.headers.get("Retry-After", "").strip()
        if text.isascii() and text.isdecimal():
            return float(text[:9])
        with contextlib.suppress(ValueError, TypeError):
            when = parsedate_to_datetime(text).timestamp()
            return max(0.0, when - (self._now() + self.clock_skew_s))
        return 0.0


def account_key(directory_url: str) -> str:
    """The key of the account's record in the store."""
    return f"account/{hashlib.sha256(directory_url.encode()).hexdigest()[:16]}"


def certificate_id(leaf: x509.Certificate) -> str:
    """How renewal information and `replaces` name a certificate (RFC 9773 §4.1); "" where it names no issuer key."""
    try:
        found = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    except x509.ExtensionNotFound:
        return ""
    if found is None:
        return ""
    serial = leaf.serial_number
    return (
        f"{_b64(found)}.{_b64(serial.to_bytes(serial.bit_length() // 8 + 1))}"  # DER: a leading zero keeps it positive
    )


def _stored_account(entry: Entry) -> AccountRecord:
    try:
        return msgspec.json.decode(entry.value, type=AccountRecord)
    except msgspec.MsgspecError as error:
        raise CertificateError(f"the record of the ACME account cannot be read: {error}") from error


def _read(kind: type[T], answer: _Answer) -> T:
    try:
        return msgspec.json.decode(answer.body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        text = _shown(answer.body[:120].decode("utf-8", "replace"))
        raise AcmeError(
            Failure.SERVER, f"the answer of {answer.url} is not what RFC 8555 has there ({error}): {text!r}"
        ) from error


def _load_jose() -> None:
    import acme.jws  # noqa: F401
    import josepy.jwk  # noqa: F401


def _jwk(key_pem: str) -> Any:  # Any: a type of josepy's, which is loaded late
    from josepy.jwk import JWKEC

    return JWKEC(key=key_from_pem(key_pem.encode()))


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _shown(text: str) -> str:
    """A foreign text, fit for a log and a terminal."""
    return "".join(one if one.isprintable() else " " for one in text)[:_DETAIL_CHARS].strip()


def csr_der(names: Sequence[str], key_pem: bytes) -> bytes:
    """The request that an order is finalised with."""
    key = serialization.load_pem_private_key(key_pem, password=None)
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
        .sign(key, hashes.SHA256())  # type: ignore[arg-type]  # EC or RSA: new_key and new_rsa_key make no others
    )
    return csr.public_bytes(serialization.Encoding.DER)
