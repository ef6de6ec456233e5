"""Sets TXT records for DNS-01 challenges: by a command of the operator's, or by dynamic updates (RFC 2136).

Which name they are set at is `challenge_name`: where the CNAMEs from _acme-challenge.<host> end, so that a customer can
hand the proof over to a zone of ours for good. When a CA may look is `wait_visible`: when all of the zone's servers
show the record. All here blocks, for threads.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import dns.exception
import dns.message
import dns.name
import dns.query
import dns.rcode
import dns.rdatatype
import dns.tsig
import dns.tsigkeyring
import dns.update

from certs.dns_question import parse_server, printable
from certs.errors import DnsHookError, LookupFailedError
from certs.resolver import Resolver

_OUTPUT_MOST_BYTES = 4096  # of a command's output that is kept, from its end
_SHOWN_MOST = 600  # characters of it in a message
_PAUSES_S = (0.2, 0.5, 1.0, 2.0, 4.0)


class DnsHook(Protocol):
    """Sets and removes one TXT value beside others at a name. Both may be called again for what is done already."""

    def present(self, name: str, value: str) -> None:
        """Add the value at the name (no trailing dot), and keep others there. Raises DnsHookError."""

    def clean_up(self, name: str, value: str) -> None:
        """Remove that value, and keep others there. Raises DnsHookError."""


class ExecHook:
    """Calls `command present|cleanup NAME VALUE`, without a shell.

    The environment has WAKEFRONT_DNS_ACTION, WAKEFRONT_DNS_NAME and WAKEFRONT_DNS_VALUE as well. Status 0 means done.
    """

    def __init__(
        self, command: tuple[str, ...], timeout_s: float = 60.0, *, environment: Mapping[str, str] | None = None
    ) -> None:
        """`timeout_s`: then the command and what it started are killed. `environment`: None is this process's."""
        if not command:
            raise DnsHookError("no command to set TXT records with is configured")
        self._command = command
        self._timeout_s = timeout_s
        self._environment = environment

    def present(self, name: str, value: str) -> None:
        self._run("present", name, value)

    def clean_up(self, name: str, value: str) -> None:
        self._run("cleanup", name, value)

    def _run(self, action: str, name: str, value: str) -> None:
        said = f"DNS hook {self._command[0]} {action} {name}"
        environment = dict(os.environ if self._environment is None else self._environment)
        environment |= {
            "WAKEFRONT_DNS_ACTION": action,
            "WAKEFRONT_DNS_NAME": name,
            "WAKEFRONT_DNS_VALUE": value,
        }
        try:
            process = subprocess.Popen(
                [*self._command, action, name, value],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            raise DnsHookError(f"{said}: it cannot be started: {error}") from error
        try:
            output, is_over = self._read(process)
        finally:
            # what it left behind, too; its own pid is not free for others before it is waited for
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            assert process.stdout is not None  # PIPE
            process.stdout.close()
        shown = f"; it wrote: {_quoted(output)}" if output.strip() else ""
        if not is_over:
            raise DnsHookError(f"{said}: not done within {self._timeout_s:g} s{shown}")
        if process.returncode < 0:
            raise DnsHookError(f"{said}: ended by signal {-process.returncode}{shown}")
        if process.returncode:
            raise DnsHookError(f"{said}: status {process.returncode}{shown}")

    def _read(self, process: subprocess.Popen[bytes]) -> tuple[bytes, bool]:
        """The end of its output, and whether it ended in time. Reads on while it runs, so that it never blocks."""
        assert process.stdout is not None  # PIPE
        until = time.monotonic() + self._timeout_s
        kept = b""
        is_open = True
        os.set_blocking(process.stdout.fileno(), False)
        pidfd = os.pidfd_open(process.pid)
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ)
                selector.register(pidfd, selectors.EVENT_READ)
                while (left_s := until - time.monotonic()) > 0:
                    ready = {key.fileobj for key, _ in selector.select(left_s)}
                    if is_open and process.stdout in ready:
                        kept, is_open = self._more(process.stdout.fileno(), kept)
                        if not is_open:
                            selector.unregister(process.stdout)
                    if pidfd in ready:
                        # what it wrote last, but not what others that it started go on to write
                        return self._more(process.stdout.fileno(), kept)[0], True
        finally:
            os.close(pidfd)
        return kept, False

    @staticmethod
    def _more(descriptor: int, kept: bytes) -> tuple[bytes, bool]:
        """The output with what there is now, cut to its end, and whether there may be more."""
        try:
            data = os.read(descriptor, 65_536)
        except BlockingIOError:
            return kept, True
        return (kept + data)[-_OUTPUT_MOST_BYTES:], bool(data)


class Rfc2136Hook:
    """Dynamic updates (RFC 2136) over TCP, signed with TSIG (RFC 8945) if there is a key."""

    def __init__(
        self, server: str, zone: str | None = None, key_name: str = "", key_secret: str = "",
        algorithm: str = "hmac-sha256", ttl: int = 60, *, timeout_s: float = 10.0,
    ) -> None:  # fmt: skip
        """`server`: "IP:PORT". `zone` None: found by asking the server for SOA records. `key_secret`: base64.

        `ttl` in seconds, `timeout_s` of one update. Raises DnsHookError if the server or the key cannot be read.
        """
        try:
            self._server = parse_server(server)
            self._zone = dns.name.from_text(zone) if zone else None
            spoken = "hmac-md5.sig-alg.reg.int" if algorithm == "hmac-md5" else algorithm
            self._keyring = dns.tsigkeyring.from_text({key_name: (spoken, key_secret)}) if key_name else None
        except (ValueError, UnicodeError, dns.exception.DNSException) as error:
            raise DnsHookError(f"DNS updates: {error}") from error
        self._key_name = key_name
        self._ttl = ttl
        self._timeout_s = timeout_s

    def present(self, name: str, value: str) -> None:
        at, zone = self._place(name)
        update = self._update(zone)
        update.add(at, self._ttl, dns.rdatatype.TXT, _quoted_txt(value))  # adding what is there changes nothing
        self._send(update, "add TXT", name, zone)

    def clean_up(self, name: str, value: str) -> None:
        at, zone = self._place(name)
        update = self._update(zone)
        update.delete(at, dns.rdatatype.TXT, _quoted_txt(value))
        self._send(update, "remove TXT", name, zone)

    def _place(self, name: str) -> tuple[dns.name.Name, dns.name.Name]:
        try:
            at = dns.name.from_text(name)
        except (UnicodeError, dns.exception.DNSException) as error:
            raise DnsHookError(f"{name[:80]!r} is not a name in DNS: {error}") from error
        zone = self._zone if self._zone is not None else self._find_zone(at)
        if not at.is_subdomain(zone):
            raise DnsHookError(f"{name} is not in the zone {zone.to_text(True)} that {self._server} is to update")
        return at, zone

    def _find_zone(self, name: dns.name.Name) -> dns.name.Name:
        """The apex that the server itself says the name is in."""
        text = name.to_text(True)
        try:
            apex = Resolver((self._asked,), self._timeout_s, total_s=self._timeout_s).zone(text)
        except LookupFailedError as error:
            raise DnsHookError(f"{self._server} does not say which zone {text} is in: {error}") from error
        return dns.name.from_text(apex)

    @property
    def _asked(self) -> str:
        return f"[{self._server.address}]:{self._server.port}"

    def _update(self, zone: dns.name.Name) -> dns.update.UpdateMessage:
        update = dns.update.UpdateMessage(zone)
        if self._keyring is not None:
            update.use_tsig(self._keyring, dns.name.from_text(self._key_name))
        return update

    def _send(self, update: dns.update.UpdateMessage, what: str, name: str, zone: dns.name.Name) -> None:
        said = f"DNS update at {self._server}, {what} {name} in {zone.to_text(True) or '.'}"
        try:
            answer = dns.query.tcp(update, self._server.address, self._timeout_s, self._server.port)
        except (dns.tsig.PeerError, dns.tsig.BadTime, dns.tsig.BadSignature, dns.tsig.BadKey) as error:
            raise DnsHookError(f"{said}: {self._tsig_fault(error)}") from error
        except dns.exception.Timeout as error:
            raise DnsHookError(f"{said}: no answer within {self._timeout_s:g} s") from error
        except (OSError, EOFError) as error:
            ended = "the server ended the connection"
            detail = ended if isinstance(error, EOFError) else getattr(error, "strerror", None) or error
            raise DnsHookError(f"{said}: {detail}") from error
        except (dns.exception.DNSException, ValueError) as error:
            raise DnsHookError(f"{said}: the answer cannot be read: {printable(str(error), 200)}") from error
        if (rcode := answer.rcode()) != dns.rcode.NOERROR:
            text = dns.rcode.to_text(rcode)
            raise DnsHookError(f"{said}: {text}" + (f": {why}" if (why := self._why(rcode)) else ""))

    def _why(self, rcode: dns.rcode.Rcode) -> str:
        key = f"key {self._key_name}" if self._key_name else "no key"
        return {
            dns.rcode.REFUSED: f"the server does not let us ({key} was used) change this; see its update policy",
            dns.rcode.NOTAUTH: f"the server is not the primary of that zone, or does not accept the signature ({key})",
            dns.rcode.NOTZONE: "the name is not in that zone",
            dns.rcode.SERVFAIL: "the server failed; see its log (can it write the zone's journal?)",
            dns.rcode.NOTIMP: "the server takes no updates",
            dns.rcode.FORMERR: "the server does not understand the update",
        }.get(rcode, "")

    def _tsig_fault(self, error: Exception) -> str:
        if isinstance(error, dns.tsig.PeerBadKey):
            return f"BADKEY: the server knows no key {self._key_name}"
        if isinstance(error, dns.tsig.PeerBadSignature):
            return f"BADSIG: key {self._key_name} has another secret or algorithm there"
        if isinstance(error, dns.tsig.PeerBadTime | dns.tsig.BadTime):
            return "BADTIME: this machine's clock and the server's are too far apart (5 minutes are allowed)"
        if isinstance(error, dns.tsig.BadSignature | dns.tsig.BadKey):
            return f"the server's answer is not signed with key {self._key_name}"
        return f"the server does not accept the signature: {error}"


def challenge_name(host: str, resolver: Resolver) -> str:
    """Where the TXT record of a DNS-01 challenge for a host goes (RFC 8555 §8.4), CNAMEs followed; `*.` may lead.

    Raises LookupFailedError if the CNAMEs go in a circle or cannot be followed.
    """
    return resolver.cname_end(f"_acme-challenge.{host.removeprefix('*.')}")


def wait_visible(
    resolver: Resolver, name: str, value: str, deadline: float, sleep: Callable[[float], None],
    monotonic: Callable[[], float] = time.monotonic,
) -> None:  # fmt: skip
    """Return when every server of the zone that answers shows the value.

    `deadline` is on the clock `monotonic`; `sleep` takes seconds. Raises DnsHookError when it has passed.
    """
    pauses = iter(_PAUSES_S)
    while True:
        try:
            if resolver.is_visible(name, value):
                return
            last = "it is not there yet"
        except LookupFailedError as error:
            last = str(error)
        left_s = deadline - monotonic()
        if left_s <= 0:
            raise DnsHookError(f"the TXT record at {name} is not to be seen at all name servers in time: {last}")
        sleep(min(next(pauses, _PAUSES_S[-1]), left_s))


def _quoted_txt(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _quoted(output: bytes) -> str:
    """The end of it, as one line."""
    text = printable(output.decode("utf-8", "replace").strip().replace("\n", " | "), _OUTPUT_MOST_BYTES * 4)
    return repr(text if len(text) <= _SHOWN_MOST else "..." + text[-_SHOWN_MOST:])
