"""Leases: the right to change a machine alone for a while (Fly docs, "Machine leases"; spec machines §5).

Whoever holds one names its nonce with each change; everybody else's changes are refused until it is given back or
expires. A lease guards what is asked through the admin API. Requests still wake machines, and idle ones are still
stopped. It is kept with the machine's row, so it outlives this process.
"""

from __future__ import annotations

import hmac
import math
import secrets
from datetime import UTC, datetime

from proxy.clock import Clock
from proxy.control.machines import Owned
from proxy.control.store import Lease, Store

HEADER = "fly-machine-lease-nonce"
DEFAULT_TTL_S = 13.0  # flyctl's
LONGEST_TTL_S = 86_400.0
LONGEST_DESCRIPTION = 200
_OWNER = "admin"  # of the one token that there is


class LeaseConflict(Exception):
    """Somebody else holds the machine, or the lease that is named is held no more."""


class Leases:
    """The leases of all machines."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    def held(self, machine: Owned) -> Lease | None:
        """The lease that is in force, if one is."""
        lease = machine.row.lease
        return lease if lease is not None and lease.expires_at > self._clock.unix() else None

    def check(self, machine: Owned, nonce: str | None) -> None:
        """Before a change. Raises LeaseConflict.

        A nonce that is not in force is refused even where nobody holds the machine: whoever sends it counts on having
        been alone since they took it, and they were not.
        """
        lease = self.held(machine)
        if lease is None and nonce:
            raise LeaseConflict(f"the lease of machine {machine.id} that this names has expired or was given back")
        if lease is not None and not hmac.compare_digest(
            (nonce or "").encode("utf-8", "surrogateescape"), lease.nonce.encode()
        ):
            what = "another lease" if nonce else "a lease"
            raise LeaseConflict(
                f"{what} of machine {machine.id} is held by {lease.owner} until {_moment(lease.expires_at)}"
                + (f" ({lease.description})" if lease.description else "")
            )

    def take(self, machine: Owned, ttl_s: float, description: str, nonce: str | None = None) -> Lease:
        """Take the lease or, with the nonce of the one in force, extend it. Raises LeaseConflict."""
        self.check(machine, nonce)
        old = self.held(machine)
        lease = Lease(
            nonce=old.nonce if old is not None else secrets.token_hex(6),
            expires_at=math.ceil(self._clock.unix() + ttl_s),
            owner=_OWNER,
            description=description or (old.description if old is not None else ""),
            version=machine.row.instance_id,
        )
        self._keep(machine, lease)
        return lease

    def release(self, machine: Owned, nonce: str) -> None:
        """Give it back. Raises LeaseConflict."""
        self.check(machine, nonce)
        self._keep(machine, None)

    def _keep(self, machine: Owned, lease: Lease | None) -> None:
        machine.row.lease = lease
        self._store.save(machine.row)


def _moment(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat(sep=" ", timespec="seconds").replace("+00:00", " UTC")
