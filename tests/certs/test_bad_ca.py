"""What a CA can do wrong, and the way to it: each ends in time, is named, loses no key, and is done once it is over.

In front of a real CA (Pebble) stands one that breaks what a test wants broken.
"""

from __future__ import annotations

import datetime
import itertools
import time
from collections.abc import Iterator
from email.utils import format_datetime
from pathlib import Path

import msgspec
import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID

from certs import Certificate
from certs.errors import AcmeError, Failure
from certs.issuer import AcmeClient
from certs.keys import new_key
from certs.order import KeyType, OrderRecord, OrderRun, Want, order_key
from certs.store import SealedStore
from tests.support.faulty_ca import (
    Act,
    Answer,
    Fault,
    FaultyCa,
    Forward,
    changed,
    drip,
    endless,
    faulty_ca,
    gives,
    hang,
    problem,
    reset,
    says,
    then_resets,
    without,
)
from tests.support.pebble import Pebble, pebble
from tests.support.txt_records import TxtRecords

SECRET = bytes(range(32))
TIMEOUT_S = 0.6
PATIENCE_S = 1.0
NO_PATIENCE_S = 0.3  # where nothing is to come
LONGEST_S = 12.0


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pebble]:
    with pebble(tmp_path_factory.mktemp("pebble"), 1, 1, environment={"PEBBLE_WFE_NONCEREJECT": "0"}) as made:
        yield made


@pytest.fixture(scope="module")
def front(real: Pebble, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyCa]:
    with faulty_ca(tmp_path_factory.mktemp("front"), real) as made:
        yield made


class Case:
    """A store, and runs against the CA in front."""

    def __init__(self, folder: Path, front: FaultyCa, real: Pebble) -> None:
        front.heal()
        front.seen.clear()
        front.window, front.profiles = None, {}
        front.replaced.clear()
        self.prove_patience_s = self.finalize_patience_s = PATIENCE_S
        self.front = front
        self.txt = TxtRecords(real.dns_management)
        self.store = SealedStore(folder / "store.db", SECRET, time.time)

    async def run(self, want: Want) -> Certificate:
        """One attempt, as a process would make it that has just started."""
        client = AcmeClient(
            self.front.directory_url, self.store, time.time, ca_file=str(self.front.ca_file),
            request_timeout_s=TIMEOUT_S,
        )  # fmt: skip
        run = OrderRun(
            client, self.store, self.txt, time.time, "node",
            prove_patience_s=self.prove_patience_s, finalize_patience_s=self.finalize_patience_s,
        )  # fmt: skip

        async def keep(certificate: Certificate) -> None:
            self.store.put("kept", certificate.to_pem())

        try:
            return await run.run(want, keep)
        finally:
            await client.close()

    def record(self, want: Want) -> OrderRecord | None:
        entry = self.store.get(order_key(want.names[0], want.key_type))
        return None if entry is None else msgspec.json.decode(entry.value, type=OrderRecord)

    async def fails(self, want: Want) -> AcmeError:
        began = time.monotonic()
        with pytest.raises(AcmeError) as caught:
            await self.run(want)
        assert time.monotonic() - began < LONGEST_S
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500
        return caught.value


@pytest.fixture
def case(tmp_path: Path, front: FaultyCa, real: Pebble) -> Iterator[Case]:
    made = Case(tmp_path, front, real)
    yield made
    made.store.close()


HTML = b"<html><body>502 Bad Gateway</body></html>"
EVERYWHERE = (
    "directory",
    "nonce",
    "account",
    "new order",
    "order",
    "authorization",
    "challenge",
    "finalize",
    "certificate",
)
WAYS: dict[str, tuple[Act, Failure]] = {
    "500 with a page": (says(500, HTML), Failure.SERVER),
    "503 as a problem": (problem("serverInternal", 503), Failure.SERVER),
    "rate limit": (problem("rateLimited", 429, "77"), Failure.RATE_LIMITED),
    "hangs": (hang, Failure.NETWORK),
    "drips": (drip, Failure.NETWORK),
    "resets": (reset, Failure.NETWORK),
    "no JSON": (says(200, b'{"status": "val', "application/json"), Failure.SERVER),
    "JSON of another shape": (says(200, b'[1, {"status": 7}]', "application/json"), Failure.SERVER),
    "endless": (endless, Failure.SERVER),
}
CASES = [
    (way, endpoint)
    for way in WAYS
    for endpoint in EVERYWHERE
    # a nonce comes in a header, and a chain is judged as one: other tests
    if not (endpoint in ("nonce", "certificate") and "JSON" in way)
    and not (endpoint == "nonce" and way in ("drips", "endless"))  # to HEAD there is no body
    and not (endpoint == "challenge" and "JSON" in way)  # what it says there does not matter
    # what takes its time is tried where the client is in another state each time
    and not (way in ("hangs", "drips") and endpoint in ("nonce", "account", "order", "challenge"))
]


@pytest.mark.parametrize(("way", "endpoint"), CASES, ids=[f"{way}-{endpoint}" for way, endpoint in CASES])
async def test_a_fault_of_the_ca_is_named_and_the_order_is_done_after_it(case: Case, way: str, endpoint: str) -> None:
    act, failure = WAYS[way]
    want = Want((f"{way}-{endpoint}.example.com".replace(" ", "-").lower(),))
    case.front.faults.append(Fault(endpoint, act))
    error = await case.fails(want)
    assert error.failure is failure, str(error)
    if failure is Failure.RATE_LIMITED:
        assert error.retry_after_s == 77
    else:
        assert "https://127.0.0.1" in str(error) or "the CA says" in str(error)
    record = case.record(want)
    assert record is not None, "the order is not over"
    case.front.heal()
    certificate = await case.run(want)
    assert certificate.key_pem.decode() == record.key_pem, "the key that was stored before anything was asked"
    assert case.record(want) is None and not case.txt.shown
    if endpoint in ("order", "authorization", "challenge", "finalize", "certificate"):
        assert case.front.count("new order") == 1, "no second order while the first lives"


@pytest.mark.parametrize("endpoint", ["new order", "finalize"])
async def test_an_answer_that_is_lost_after_the_ca_has_acted_makes_no_second_order(case: Case, endpoint: str) -> None:
    want = Want((f"lost-{endpoint}.example.com".replace(" ", "-"),))
    case.front.faults.append(Fault(endpoint, then_resets(True), times=1))
    assert (await case.fails(want)).failure is Failure.NETWORK
    await case.run(want)
    assert case.front.count("new order") == 1


async def test_a_few_bad_nonces_are_taken_up_again_and_many_end_it(case: Case) -> None:
    case.front.faults.append(Fault("new order", problem("badNonce"), times=4))
    await case.run(Want(("nonces.example.com",)))
    case.front.faults.append(Fault("new order", problem("badNonce")))
    error = await case.fails(Want(("many-nonces.example.com",)))
    assert error.problem == "badNonce" and case.front.count("new order") < 20


async def test_an_answer_without_a_nonce_or_a_place_is_survived_or_said(case: Case) -> None:
    for endpoint in ("new order", "order", "authorization", "finalize"):
        case.front.faults.append(Fault(endpoint, without("Replay-Nonce")))
    await case.run(Want(("no-nonce.example.com",)))
    case.front.faults[:] = [Fault("new order", without("Location"))]
    error = await case.fails(Want(("no-place.example.com",)))
    assert error.failure is Failure.SERVER and "Location" in str(error)


async def test_a_rate_limit_may_come_as_a_date(case: Case) -> None:
    at = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=90)
    case.front.faults.append(Fault("new order", problem("rateLimited", 429, format_datetime(at, usegmt=True))))
    error = await case.fails(Want(("date.example.com",)))
    assert 80 < error.retry_after_s <= 91


@pytest.mark.parametrize(
    ("endpoint", "act", "said"),
    [
        ("order", changed(status="processing"), "processing"),
        ("order", changed(status="pending"), "pending"),
        ("authorization", changed(status="pending"), "has not looked"),
    ],
)
async def test_an_order_that_does_not_get_on_is_left_in_time_and_gone_on_with(
    case: Case, endpoint: str, act: Act, said: str
) -> None:
    want = Want((f"stuck-{endpoint}-{said}.example.com".replace(" ", "-"),))
    case.front.faults.append(Fault(endpoint, act, after=0 if endpoint == "order" else 1))
    case.finalize_patience_s = NO_PATIENCE_S
    if endpoint == "authorization":
        case.prove_patience_s = NO_PATIENCE_S
    error = await case.fails(want)
    assert error.failure is Failure.STUCK and said in str(error)
    case.front.heal()
    case.prove_patience_s = case.finalize_patience_s = PATIENCE_S
    await case.run(want)
    assert case.front.count("new order") == 1


@pytest.mark.parametrize("statuses", [("ready",), ("ready", "pending")], ids=["ready", "ready and pending"])
async def test_an_order_that_is_ready_again_after_each_finalization_is_left_in_time(
    case: Case, statuses: tuple[str, ...]
) -> None:
    want = Want((f"ready-{len(statuses)}.example.com",))
    told = itertools.cycle(statuses)

    async def turns(request: web.Request, forward: Forward) -> Answer:
        return await changed(status=next(told))(request, forward)

    case.front.faults += [Fault("order", turns), Fault("finalize", changed(status=statuses[-1]), times=1)]
    case.finalize_patience_s = NO_PATIENCE_S
    error = await case.fails(want)
    assert error.failure is Failure.STUCK and statuses[-1] in str(error)
    assert case.front.count("finalize") > 1, "it was tried again while there was time"
    case.front.heal()
    case.finalize_patience_s = PATIENCE_S
    await case.run(want)
    assert case.front.count("new order") == 1


async def test_an_order_with_more_authorizations_than_any_has_is_not_looked_through(case: Case) -> None:
    want = Want(("many.example.com",))
    many = [f"https://127.0.0.1/authZ/{number}" for number in range(101)]
    for endpoint in ("new order", "order"):
        case.front.faults.append(Fault(endpoint, changed(authorizations=many)))
    for _ in range(2):  # one that is new, and one that is gone on with
        error = await case.fails(want)
        assert error.failure is Failure.SERVER and "101 authorizations" in str(error)
    assert case.front.count("authorization") == 0
    case.front.heal()
    await case.run(want)


async def test_an_authorization_that_failed_is_told_in_the_cas_words_and_ends_the_order(case: Case) -> None:
    want = Want(("refused.example.com",))
    failed = {
        "type": "dns-01", "url": "https://127.0.0.1/x", "status": "invalid", "token": "t",
        "error": {"type": "urn:ietf:params:acme:error:caa", "detail": "CAA record \x1b[31mforbids\nit", "status": 403},
    }  # fmt: skip
    case.front.faults.append(Fault("authorization", changed(status="invalid", challenges=[failed])))
    error = await case.fails(want)
    assert (error.failure, error.problem, error.challenge) == (Failure.VALIDATION, "caa", "dns-01")
    assert "forbids" in str(error) and "\x1b" not in str(error)
    assert case.record(want) is None


async def test_an_order_that_the_ca_has_forgotten_is_begun_anew(case: Case) -> None:
    want = Want(("vanished.example.com",))
    case.front.faults.append(Fault("order", problem("malformed", 404)))
    await case.fails(want)
    case.front.heal()
    await case.run(want)
    assert case.front.count("new order") == 2


async def test_an_account_that_the_ca_has_forgotten_is_registered_anew_with_its_key(case: Case) -> None:
    await case.run(Want(("first.example.com",)))
    case.front.faults.append(Fault("new order", problem("accountDoesNotExist", 400), times=1))
    error = await case.fails(Want(("gone.example.com",)))
    assert error.failure is Failure.ACCOUNT
    registered = case.front.count("account")
    await case.run(Want(("gone.example.com",)))
    assert case.front.count("account") == registered + 1


def foreign_leaf(name: str, begins_days: float = -1, ends_days: float = 30) -> bytes:
    key = new_key()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
        .serial_number(1).not_valid_before(now + datetime.timedelta(days=begins_days))
        .not_valid_after(now + datetime.timedelta(days=ends_days))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    return made.public_bytes(serialization.Encoding.PEM)


def intermediate_alone(chain: bytes) -> bytes:
    return b"-----BEGIN" + chain.split(b"-----BEGIN")[2]


def foreign_issuer(chain: bytes) -> bytes:
    return b"-----BEGIN" + chain.split(b"-----BEGIN")[1] + foreign_leaf("some CA")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda chain: foreign_leaf("wrong.example.com"), "another key"),
        (intermediate_alone, "another key"),
        (foreign_issuer, "no chain"),
        (lambda chain: b"not a certificate", "not a chain"),
        (lambda chain: b"", "not a chain"),
        (lambda chain: chain + foreign_leaf("x") * 12, "more than 10"),
    ],
    ids=["other key", "intermediate alone", "foreign issuer", "garbage", "nothing", "too long"],
)
async def test_a_wrong_certificate_is_never_kept(case: Case, given: object, said: str) -> None:
    want = Want(("wrong.example.com",))
    case.front.faults.append(Fault("certificate", gives(given)))  # type: ignore[arg-type]  # of bytes, all of them
    error = await case.fails(want)
    assert error.failure is Failure.WRONG_CERTIFICATE and said in str(error)
    assert case.store.get("kept") is None
    case.front.heal()
    await case.run(want)


async def test_rsa_survives_a_fault_with_its_key(case: Case) -> None:
    want = Want(("rsa-again.example.com",), KeyType.RSA)
    case.front.faults.append(Fault("finalize", says(500, HTML), times=1))
    await case.fails(want)
    record = case.record(want)
    assert record is not None
    assert (await case.run(want)).key_pem.decode() == record.key_pem


# --- what Pebble 2.4 does not have: scripted answers


async def test_a_profile_is_asked_for_where_the_ca_has_it(case: Case) -> None:
    case.front.profiles = {"shortlived": "six days"}
    await case.run(Want(("short.example.com",), profile="shortlived"))
    (order,) = [one for one in case.front.seen if one.endpoint == "new order"]
    assert order.payload["profile"] == "shortlived"
    error = await case.fails(Want(("classic.example.com",), profile="classic"))
    assert error.failure is Failure.REFUSED and "shortlived" in str(error)


async def test_a_renewal_names_what_it_replaces_and_drops_it_where_the_ca_will_not_have_it(case: Case) -> None:
    now = datetime.datetime.now(datetime.UTC)
    case.front.window = (now, now + datetime.timedelta(days=1))
    await case.run(Want(("renewed.example.com",), replaces="aYhba4dGQEHhs3uEe6CuLN4ByNQ.AIdlQyE"))
    asked = [one.payload for one in case.front.seen if one.endpoint == "new order"]
    assert [one.get("replaces") for one in asked] == ["aYhba4dGQEHhs3uEe6CuLN4ByNQ.AIdlQyE"]
    case.front.seen.clear()
    case.front.replaced.add("x.y")
    await case.run(Want(("again.example.com",), replaces="x.y"))
    asked = [one.payload for one in case.front.seen if one.endpoint == "new order"]
    assert [one.get("replaces") for one in asked] == ["x.y", None]
